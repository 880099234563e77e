//! An engine that loses power and fails on purpose. Tests only.
//!
//! - [`Volatile`] remembers only what a barrier covered; at a power cut any part of the rest survives, each write by itself.
//! - [`Engines`] is the place where one lies: it can be opened, thrown away, failed and cut off.
//!
//! Not here: files that do the same (`files::faulty`).

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;

use super::{Direction, Engine, EngineError, Entry, memory::Memory};
use crate::{
    files::faulty::{Chance, Power},
    key::Table,
    shard::settler::EngineOpener,
};

type Write = (Table, Vec<u8>, Option<Bytes>);
type Rows = BTreeMap<(Table, Vec<u8>), Bytes>;

/// What an engine is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EngineCall {
    /// Inserts and removals.
    Write,
    Barrier,
    Read,
    /// Opening it, thrown away before or not.
    Open,
}

/// A fault to come.
#[derive(Clone, Debug)]
pub(crate) struct EngineFault {
    pub(crate) call: EngineCall,
    /// Calls that succeed before.
    pub(crate) after: u64,
    /// Calls that fail then.
    pub(crate) times: u64,
    pub(crate) error: EngineError,
    /// It does not fail, it panics.
    pub(crate) panics: bool,
}

#[derive(Debug, Default)]
struct Faults {
    faults: Vec<EngineFault>,
    failed_calls: u64,
}

impl Faults {
    fn check(&mut self, call: EngineCall) -> Result<(), EngineError> {
        for fault in self.faults.iter_mut().filter(|fault| fault.call == call) {
            if fault.after > 0 {
                fault.after -= 1;
            } else if fault.times > 0 {
                fault.times -= 1;
                self.failed_calls += 1;
                assert!(!fault.panics, "an engine that panics on purpose");
                return Err(fault.error.clone());
            }
        }
        Ok(())
    }
}

/// Loses at a power cut what no barrier covered.
#[derive(Debug)]
pub(crate) struct Volatile {
    now: Memory,
    durable: Mutex<Rows>,
    since: Mutex<Vec<Write>>,
    /// What lay in its place before it was begun, until its first barrier.
    before: Mutex<Option<Rows>>,
    power: Power,
    faults: Arc<Mutex<Faults>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Volatile {
    fn with(rows: Rows, power: Power, faults: Arc<Mutex<Faults>>) -> Self {
        let now = Memory::default();
        for ((table, key), value) in &rows {
            now.insert(*table, key, value).unwrap();
        }
        Self {
            now,
            durable: Mutex::new(rows),
            since: Mutex::default(),
            before: Mutex::default(),
            power,
            faults,
        }
    }

    /// Rows as they are now.
    fn rows(&self) -> Rows {
        let mut rows = Rows::new();
        for table in Table::ALL {
            let found = self.now.scan(table, &[], None, Direction::Ascending, usize::MAX).unwrap();
            rows.extend(found.into_iter().map(|(key, value)| ((table, key), value)));
        }
        rows
    }

    /// Rows that may be found after a power cut.
    fn rows_after_power_cut(&self, chance: &mut Chance) -> Rows {
        if let Some(before) = &*lock(&self.before)
            && chance.percent(50)
        {
            return before.clone();
        }
        let mut rows = lock(&self.durable).clone();
        let keep = chance.pick(&[0, 30, 70, 95, 100]);
        for (table, key, value) in lock(&self.since).iter() {
            if chance.percent(keep) {
                match value {
                    Some(value) => rows.insert((*table, key.clone()), value.clone()),
                    None => rows.remove(&(*table, key.clone())),
                };
            }
        }
        rows
    }

    fn write(&self, table: Table, key: &[u8], value: Option<&[u8]>) -> Result<(), EngineError> {
        if !self.power.spend() {
            return Err(off());
        }
        lock(&self.faults).check(EngineCall::Write)?;
        lock(&self.since).push((table, key.to_vec(), value.map(Bytes::copy_from_slice)));
        match value {
            Some(value) => self.now.insert(table, key, value),
            None => self.now.remove(table, key),
        }
    }

    fn looks(&self) -> Result<(), EngineError> {
        if self.power.is_off() {
            return Err(off());
        }
        lock(&self.faults).check(EngineCall::Read)
    }
}

fn off() -> EngineError {
    EngineError::Failed("the power is off".to_owned())
}

impl Engine for Volatile {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.looks()?;
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
        self.looks()?;
        self.now.scan(table, from, to, direction, limit)
    }

    fn barrier(&self) -> Result<(), EngineError> {
        if !self.power.spend() {
            return Err(off());
        }
        lock(&self.faults).check(EngineCall::Barrier)?;
        let mut durable = lock(&self.durable);
        for (table, key, value) in lock(&self.since).drain(..) {
            match value {
                Some(value) => durable.insert((table, key), value),
                None => durable.remove(&(table, key)),
            };
        }
        *lock(&self.before) = None;
        Ok(())
    }

    fn size(&self) -> u64 {
        self.now.size()
    }
}

/// What becomes of an engine at a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Everything survives.
    Whole,
    /// Nothing does.
    Lost,
    /// What a barrier covered, and any part of the rest.
    Volatile,
}

/// Where the engine of a shard lies. Clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Engines {
    engine: Arc<Mutex<Arc<Volatile>>>,
    faults: Arc<Mutex<Faults>>,
    power: Power,
}

impl Engines {
    pub(crate) fn new(power: Power) -> Self {
        Self::with(Rows::new(), power)
    }

    fn with(rows: Rows, power: Power) -> Self {
        let faults: Arc<Mutex<Faults>> = Arc::default();
        let engine = Arc::new(Volatile::with(rows, power.clone(), Arc::clone(&faults)));
        Self { engine: Arc::new(Mutex::new(engine)), faults, power }
    }

    pub(crate) fn opener(&self) -> EngineOpener {
        let this = self.clone();
        Box::new(move |anew| {
            if !this.power.spend() {
                return Err(off());
            }
            lock(&this.faults).check(EngineCall::Open)?;
            let mut engine = lock(&this.engine);
            if anew {
                let next = Volatile::with(Rows::new(), this.power.clone(), Arc::clone(&this.faults));
                let before = lock(&engine.before).clone().unwrap_or_else(|| lock(&engine.durable).clone());
                *lock(&next.before) = Some(before);
                *engine = Arc::new(next);
            }
            let engine: Arc<dyn Engine> = Arc::<Volatile>::clone(&engine);
            Ok(engine)
        })
    }

    /// The engine that lies there now.
    pub(crate) fn engine(&self) -> Arc<Volatile> {
        Arc::clone(&lock(&self.engine))
    }

    pub(crate) fn fail(&self, fault: EngineFault) {
        lock(&self.faults).faults.push(fault);
    }

    pub(crate) fn heal(&self) {
        lock(&self.faults).faults.clear();
    }

    /// Calls that failed on purpose.
    pub(crate) fn failed_calls(&self) -> u64 {
        lock(&self.faults).failed_calls
    }

    /// What is found there after the process was killed.
    pub(crate) fn after_kill(&self, power: Power) -> Self {
        Self::with(self.engine().rows(), power)
    }

    pub(crate) fn after_power_cut(&self, power: Power, fate: Fate, chance: &mut Chance) -> Self {
        let rows = match fate {
            Fate::Whole => self.engine().rows(),
            Fate::Lost => Rows::new(),
            Fate::Volatile => self.engine().rows_after_power_cut(chance),
        };
        Self::with(rows, power)
    }
}
