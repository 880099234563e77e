//! What stands in an engine's place while it is being opened again: it answers that it is away.
//!
//! Not here: who opens it again (`shard::settler`).

use bytes::Bytes;

use super::{Direction, Engine, EngineError, Entry};
use crate::key::Table;

/// Not there right now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Closed;

fn away<T>() -> Result<T, EngineError> {
    Err(EngineError::Failed("the index is being opened again".to_owned()))
}

impl Engine for Closed {
    fn get(&self, _table: Table, _key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        away()
    }

    fn insert(&self, _table: Table, _key: &[u8], _value: &[u8]) -> Result<(), EngineError> {
        away()
    }

    fn remove(&self, _table: Table, _key: &[u8]) -> Result<(), EngineError> {
        away()
    }

    fn scan(
        &self,
        _table: Table,
        _from: &[u8],
        _to: Option<&[u8]>,
        _direction: Direction,
        _limit: usize,
    ) -> Result<Vec<Entry>, EngineError> {
        away()
    }

    fn barrier(&self) -> Result<(), EngineError> {
        away()
    }

    fn size(&self) -> u64 {
        0
    }
}
