//! An engine that fails on purpose, and one that forgets on purpose. Tests only.
//!
//! - [`Faulty`] passes everything on until the call it was told to fail.
//! - [`Volatile`] remembers only what a barrier covered; at a power cut any part of the rest survives, each write by itself.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, Ordering},
    },
};

use bytes::Bytes;

use super::{Direction, Engine, EngineError, Entry, memory::Memory};
use crate::key::Table;

/// Fails the n-th insert or barrier from now, and all after it.
#[derive(Debug)]
pub(crate) struct Faulty {
    inner: Arc<dyn Engine>,
    inserts_left: AtomicI64,
    barriers_left: AtomicI64,
    error: EngineError,
}

impl Faulty {
    pub(crate) fn new(inner: Arc<dyn Engine>, error: EngineError) -> Self {
        Self { inner, inserts_left: AtomicI64::new(i64::MAX), barriers_left: AtomicI64::new(i64::MAX), error }
    }

    pub(crate) fn fail_insert_after(&self, n: i64) {
        self.inserts_left.store(n, Ordering::SeqCst);
    }

    pub(crate) fn fail_barrier_after(&self, n: i64) {
        self.barriers_left.store(n, Ordering::SeqCst);
    }

    fn spend(&self, left: &AtomicI64) -> Result<(), EngineError> {
        if left.fetch_sub(1, Ordering::SeqCst) <= 0 { Err(self.error.clone()) } else { Ok(()) }
    }
}

impl Engine for Faulty {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.inner.get(table, key)
    }

    fn insert(&self, table: Table, key: &[u8], value: &[u8]) -> Result<(), EngineError> {
        self.spend(&self.inserts_left)?;
        self.inner.insert(table, key, value)
    }

    fn remove(&self, table: Table, key: &[u8]) -> Result<(), EngineError> {
        self.inner.remove(table, key)
    }

    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        direction: Direction,
        limit: usize,
    ) -> Result<Vec<Entry>, EngineError> {
        self.inner.scan(table, from, to, direction, limit)
    }

    fn barrier(&self) -> Result<(), EngineError> {
        self.spend(&self.barriers_left)?;
        self.inner.barrier()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }
}

type Write = (Table, Vec<u8>, Option<Bytes>);

/// Loses at a power cut what no barrier covered.
#[derive(Debug, Default)]
pub(crate) struct Volatile {
    now: Memory,
    durable: Mutex<BTreeMap<(Table, Vec<u8>), Bytes>>,
    since: Mutex<Vec<Write>>,
    /// Writes left until the power goes.
    pub(crate) writes_left: AtomicI64,
}

impl Volatile {
    pub(crate) fn new(writes: i64) -> Self {
        Self { writes_left: AtomicI64::new(writes), ..Self::default() }
    }

    /// What is found after the power cut: everything durable, and of the rest what `keep` says.
    pub(crate) fn after_power_cut(&self, writes: i64, mut keep: impl FnMut() -> bool) -> Self {
        let next = Self::new(writes);
        let mut rows = self.durable.lock().unwrap().clone();
        for (table, key, value) in self.since.lock().unwrap().iter() {
            if keep() {
                match value {
                    Some(value) => rows.insert((*table, key.clone()), value.clone()),
                    None => rows.remove(&(*table, key.clone())),
                };
            }
        }
        for ((table, key), value) in &rows {
            next.now.insert(*table, key, value).unwrap();
        }
        *next.durable.lock().unwrap() = rows;
        next
    }

    fn write(&self, table: Table, key: &[u8], value: Option<&[u8]>) -> Result<(), EngineError> {
        if self.writes_left.fetch_sub(1, Ordering::SeqCst) <= 0 {
            return Err(EngineError::Failed("the power is off".to_owned()));
        }
        self.since.lock().unwrap().push((table, key.to_vec(), value.map(Bytes::copy_from_slice)));
        match value {
            Some(value) => self.now.insert(table, key, value),
            None => self.now.remove(table, key),
        }
    }
}

impl Engine for Volatile {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.now.get(table, key)
    }

    fn insert(&self, table: Table, key: &[u8], value: &[u8]) -> Result<(), EngineError> {
        self.write(table, key, Some(value))
    }

    fn remove(&self, table: Table, key: &[u8]) -> Result<(), EngineError> {
        self.write(table, key, None)
    }

    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        direction: Direction,
        limit: usize,
    ) -> Result<Vec<Entry>, EngineError> {
        self.now.scan(table, from, to, direction, limit)
    }

    fn barrier(&self) -> Result<(), EngineError> {
        if self.writes_left.load(Ordering::SeqCst) <= 0 {
            return Err(EngineError::Failed("the power is off".to_owned()));
        }
        let mut durable = self.durable.lock().unwrap();
        for (table, key, value) in self.since.lock().unwrap().drain(..) {
            match value {
                Some(value) => durable.insert((table, key), value),
                None => durable.remove(&(table, key)),
            };
        }
        Ok(())
    }

    fn size(&self) -> u64 {
        self.now.size()
    }
}
