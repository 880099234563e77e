//! Opening a shard: prove the commit log, and replay what the tables do not hold yet.
//!
//! - Every commit after the settled mark is verified: checksums, its number, the chain hash of the one before.
//! - Only the very last commit may be incomplete, and only if the tip proves (or leaves open) that it was never
//!   acknowledged; it is dropped. Anything else that is not as it was written refuses the shard, and says where.
//! - Replay needs no more memory than running does: it settles as it goes.
//!
//! Not here: reading damaged records (`view` refuses them one by one).

use std::time::{Duration, Instant};

use bytes::Bytes;
use fulmar_protocol::id::ShardId;

use super::{
    settle::{self, Settler},
    view::View,
};
use crate::{
    codec::Malformed,
    commit::{self, Commit, CommitId, Header},
    engine::{Direction, Engine, EngineError, Entry},
    error::{OpenError, ReadError},
    key::{self, Key, Table},
};

/// Chunks read from the commit table at a time.
const CHUNKS_AT_A_TIME: usize = 64;

/// Time between two lines of progress.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);

/// What a shard goes on from.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub(crate) last: CommitId,
    pub(crate) settler: Settler,
    /// Commits that were replayed.
    pub(crate) replayed: u64,
}

/// Proves and replays the log. `tip` is the last commit known to be acknowledged.
pub(crate) fn recover(
    shard: ShardId,
    view: &View,
    tip: CommitId,
    settle_bytes: usize,
) -> Result<Recovered, OpenError> {
    let engine = view.engine().as_ref();
    let at_mark = |error: settle::MarkError| match error {
        settle::MarkError::Engine(error) => engine_error(shard, &error),
        settle::MarkError::Malformed(what) => damaged(shard, 0, what.to_string()),
    };
    let settled = settle::settled(engine).map_err(at_mark)?;
    let counters = settle::counters(engine).map_err(at_mark)?;
    view.start_from(settled, counters);

    let mut last = settled;
    let mut settler = Settler::new(settled.number);
    let mut replayed = 0u64;
    let began = Instant::now();
    let mut told = began;
    let mut commits = Commits::after(engine, settled.number);
    loop {
        let found = commits.next_chunks().map_err(|error| engine_error(shard, &error))?;
        let Some(found) = found else { break };
        let expected = last.number.saturating_add(1);
        if found.number != expected {
            let what =
                format!("the commits from {expected} to {} are missing", found.number.saturating_sub(1));
            return Err(damaged(shard, expected, what));
        }
        let commit = match assemble(&found) {
            Ok(commit) => commit,
            Err(NotWhole::Incomplete) if found.is_last && found.number > tip.number => {
                tracing::warn!(%shard, commit = found.number, "dropping a last commit that was never acknowledged");
                for (key, _) in &found.chunks {
                    engine.remove(Table::Commit, key).map_err(|error| engine_error(shard, &error))?;
                }
                // What follows under the same number must never be mixed with it.
                engine.barrier().map_err(|error| engine_error(shard, &error))?;
                break;
            }
            Err(NotWhole::Incomplete) => {
                return Err(damaged(shard, found.number, "chunks of it are missing".to_owned()));
            }
            Err(NotWhole::Malformed(what)) => return Err(damaged(shard, found.number, what.to_string())),
        };
        if commit.id.number != found.number {
            return Err(damaged(
                shard,
                found.number,
                format!("commit {} lies in its place", commit.id.number),
            ));
        }
        if commit.previous != last.chain {
            return Err(damaged(
                shard,
                found.number,
                "it does not follow the commit before it (chain hash)".to_owned(),
            ));
        }
        view.apply(&commit).map_err(|error| unreadable(shard, found.number, error))?;
        last = commit.id;
        replayed += 1;
        if view.active_size().1 >= settle_bytes {
            settle_all(view, &mut settler).map_err(|error| unreadable(shard, found.number, error))?;
        }
        if told.elapsed() >= PROGRESS_EVERY {
            told = Instant::now();
            tracing::info!(%shard, commit = last.number, acknowledged = tip.number, "replaying the log");
        }
    }
    if last.number < tip.number {
        let what = format!("the log ends here, but commit {} was acknowledged", tip.number);
        return Err(damaged(shard, last.number.saturating_add(1), what));
    }
    if last.number == tip.number && last.chain != tip.chain {
        return Err(damaged(
            shard,
            last.number,
            "it is not the commit that was acknowledged (chain hash)".to_owned(),
        ));
    }
    if replayed > 0 {
        tracing::info!(%shard, replayed, last = last.number, took = ?began.elapsed(), "replayed the log");
    }
    Ok(Recovered { last, settler, replayed })
}

/// Settles everything there is, waiting for each barrier.
pub(crate) fn settle_all(view: &View, settler: &mut Settler) -> Result<(), ReadError> {
    loop {
        if settler.is_idle() {
            settler.begin(view);
            if settler.is_idle() {
                return Ok(());
            }
        }
        while settler.step(view, usize::MAX)? && !settler.needs_barrier() && !settler.is_idle() {}
        if settler.needs_barrier() {
            view.engine().barrier().map_err(|error| view.failed(error))?;
            settler.on_barrier(view)?;
        }
    }
}

fn engine_error(shard: ShardId, error: &EngineError) -> OpenError {
    OpenError::Engine { shard, reason: error.to_string() }
}

fn unreadable(shard: ShardId, commit: u64, error: ReadError) -> OpenError {
    match error {
        ReadError::Engine { reason, .. } => OpenError::Engine { shard, reason },
        ReadError::Damaged { what, .. } => damaged(shard, commit, what),
    }
}

fn damaged(shard: ShardId, commit: u64, what: String) -> OpenError {
    OpenError::Damaged { shard, commit, what }
}

/// The chunks of one commit.
#[derive(Debug)]
pub(crate) struct Chunks {
    pub(crate) number: u64,
    pub(crate) chunks: Vec<Entry>,
    /// No chunk of a later commit follows.
    pub(crate) is_last: bool,
}

/// Why chunks are not a commit.
#[derive(Debug)]
pub(crate) enum NotWhole {
    /// Chunks are missing; those that are there may be as they were written.
    Incomplete,
    Malformed(Malformed),
}

/// A whole, verified commit out of its chunks.
pub(crate) fn assemble(found: &Chunks) -> Result<Commit, NotWhole> {
    for (n, (key, _)) in found.chunks.iter().enumerate() {
        if key::chunk_of(key).map_err(NotWhole::Malformed)? as usize != n {
            return Err(NotWhole::Incomplete);
        }
    }
    let Some((_, first)) = found.chunks.first() else { return Err(NotWhole::Incomplete) };
    let header = Header::decode(first).map_err(NotWhole::Malformed)?;
    if found.chunks.len() < header.chunks() {
        return Err(NotWhole::Incomplete);
    }
    let mut bytes = Vec::with_capacity(found.chunks.len() * commit::CHUNK_BYTES);
    for (_, chunk) in &found.chunks {
        bytes.extend_from_slice(chunk);
    }
    commit::decode(Bytes::from(bytes)).map_err(NotWhole::Malformed)
}

/// Walks over the commit table.
#[derive(Debug)]
pub(crate) struct Commits<'a> {
    engine: &'a dyn Engine,
    from: Vec<u8>,
    read: std::collections::VecDeque<Entry>,
    end: bool,
}

impl<'a> Commits<'a> {
    pub(crate) fn after(engine: &'a dyn Engine, number: u64) -> Self {
        let from = Key::commit(number.saturating_add(1), 0).into_bytes();
        Self { engine, from, read: std::collections::VecDeque::new(), end: false }
    }

    fn peek(&mut self) -> Result<Option<&Entry>, EngineError> {
        if self.read.is_empty() && !self.end {
            let rows =
                self.engine.scan(Table::Commit, &self.from, None, Direction::Ascending, CHUNKS_AT_A_TIME)?;
            self.end = rows.len() < CHUNKS_AT_A_TIME;
            if let Some((key, _)) = rows.last() {
                self.from = super::view::next_key(key);
            }
            self.read = rows.into();
        }
        Ok(self.read.front())
    }

    /// The chunks of the next commit; `None` at the end.
    pub(crate) fn next_chunks(&mut self) -> Result<Option<Chunks>, EngineError> {
        let number_of = |key: &[u8]| key::number_at(key, 0).map_err(|e| EngineError::Failed(e.to_string()));
        let Some((key, _)) = self.peek()? else { return Ok(None) };
        let number = number_of(key)?;
        let mut chunks = Vec::new();
        let mut is_last = true;
        while let Some((key, _)) = self.peek()? {
            if number_of(key)? != number {
                is_last = false;
                break;
            }
            chunks.extend(self.read.pop_front());
        }
        Ok(Some(Chunks { number, chunks, is_last }))
    }
}
