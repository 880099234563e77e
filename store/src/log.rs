//! What the store needs from a commit log, whoever keeps it.
//!
//! - One writer per shard: [`Log::acquire`] writes an epoch record, and whoever held an older epoch is fenced.
//! - One commit in flight, by type: [`Writer::commit`] borrows the writer until it is decided.
//! - A commit names its predecessor; a log that ends elsewhere refuses it. So a writer that lost an answer finds out.
//! - When `commit` returns `Ok`, the commit is durable by the log's own standard, and no later crash takes it back.
//!
//! The embedded log (`shard`) is the only one today; a replicated one fits behind the same two traits.
//!
//! Not here: what the bytes of a batch mean (`op`), the tables that are made from them (`shard::view`).

use std::future::Future;

use bytes::Bytes;
use fulmar_protocol::id::ShardId;

use crate::{
    commit::{Commit, CommitId},
    error::{CommitError, ReadError},
};

/// The commit logs of all shards.
pub trait Log: Send + Sync {
    /// Writes to one shard's log.
    type Writer: Writer;

    /// Takes the shard over: writes an epoch record and fences every earlier writer.
    ///
    /// # Errors
    /// As [`Writer::commit`].
    fn acquire(&self, shard: ShardId) -> impl Future<Output = Result<Self::Writer, CommitError>> + Send;

    /// Commits from number `from` on, at most `limit`, ascending. Those already settled into tables may be gone; the
    /// first that comes back says where the log begins.
    ///
    /// # Errors
    /// Damage, or a log that can't be reached.
    fn read(
        &self,
        shard: ShardId,
        from: u64,
        limit: usize,
    ) -> impl Future<Output = Result<Vec<Commit>, ReadError>> + Send;
}

/// Writes to one shard's log.
pub trait Writer: Send {
    /// The epoch it acquired the shard with.
    fn epoch(&self) -> u64;

    /// Where the log ends, as far as this writer knows.
    fn last(&self) -> CommitId;

    /// Appends one commit of `ops` operations after `expected` and waits until it is durable.
    ///
    /// Dropping the future does not take the commit back; the next call first learns what became of it and then
    /// answers [`CommitError::Conflict`] if `expected` is no longer the end.
    ///
    /// # Errors
    /// [`CommitError::Fenced`], [`CommitError::Unavailable`], [`CommitError::Full`], [`CommitError::Conflict`].
    fn commit(
        &mut self,
        expected: CommitId,
        ops: u32,
        body: Bytes,
    ) -> impl Future<Output = Result<CommitId, CommitError>> + Send;
}
