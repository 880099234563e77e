//! An engine that keeps everything in memory, for tests and for gateways that need not remember.
//!
//! - Durable for as long as the [`Memory`] lives: two shards opened on the same one after the other see the same rows.
//!
//! Not here: faults (`faulty`).

use std::{
    collections::BTreeMap,
    ops::Bound,
    sync::{PoisonError, RwLock},
};

use bytes::Bytes;

use super::{Direction, Engine, EngineError, Entry};
use crate::key::Table;

/// One shard's rows.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    tables: RwLock<BTreeMap<Table, BTreeMap<Vec<u8>, Bytes>>>,
}

#[cfg(test)]
impl Memory {
    /// Forgets everything.
    pub(crate) fn clear(&self) {
        self.tables.write().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Engine for Memory {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        Ok(tables.get(&table).and_then(|rows| rows.get(key)).cloned())
    }

    fn insert(&self, table: Table, key: &[u8], value: &[u8]) -> Result<(), EngineError> {
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        tables.entry(table).or_default().insert(key.to_vec(), Bytes::copy_from_slice(value));
        Ok(())
    }

    fn remove(&self, table: Table, key: &[u8]) -> Result<(), EngineError> {
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        tables.entry(table).or_default().remove(key);
        Ok(())
    }

    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        direction: Direction,
        limit: usize,
    ) -> Result<Vec<Entry>, EngineError> {
        if to.is_some_and(|to| to <= from) {
            return Ok(Vec::new());
        }
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        let Some(rows) = tables.get(&table) else { return Ok(Vec::new()) };
        let range =
            rows.range::<[u8], _>((Bound::Included(from), to.map_or(Bound::Unbounded, Bound::Excluded)));
        let entry = |(key, value): (&Vec<u8>, &Bytes)| (key.clone(), value.clone());
        Ok(match direction {
            Direction::Ascending => range.take(limit).map(entry).collect(),
            Direction::Descending => range.rev().take(limit).map(entry).collect(),
        })
    }

    fn barrier(&self) -> Result<(), EngineError> {
        Ok(())
    }

    fn size(&self) -> u64 {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        tables.values().flatten().map(|(key, value)| (key.len() + value.len()) as u64).sum()
    }
}
