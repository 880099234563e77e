//! Settling: committed changes go from the overlay into the tables, in slices between commits.
//!
//! The order, and the barriers in it, which are mostly those the commits need anyway:
//! 1. the closed layer's rows and blocks are written; readers use the tables from then on
//! 2. barrier
//! 3. the settled mark (number and chain hash of the layer's last commit) is written
//! 4. barrier
//! 5. commits up to the mark are deleted
//!
//! A crash anywhere leaves commits that recovery replays over tables that may hold some of their rows already.
//!
//! Not here: when to settle (`committer`), what rows look like (`row`, `block`).

use std::sync::Arc;

use fulmar_protocol::id::{ConversationId, Seq};

use super::{
    block,
    overlay::{Counters, Overlay, Touched},
    view::{View, open_row, seal_row},
};
use crate::{
    codec::{Cursor, Malformed},
    commit::{CHUNK_BYTES, ChainHash, CommitId},
    engine::{Direction, Engine, EngineError},
    error::ReadError,
    key::{self, Key, Table},
    row::Row,
};

/// Key of the settled mark in [`Table::Shard`].
pub(crate) const SETTLED: &[u8] = b"settled";

/// Key of the counters in [`Table::Shard`].
pub(crate) const COUNTERS: &[u8] = b"counters";

/// Blocks below a retention mark that are removed in one go.
const REMOVE_BLOCKS: usize = 64;

/// Where settling stands. See the module for the order.
#[derive(Debug)]
enum Stage {
    Idle,
    Writing(Writing),
    /// Written; the next barrier makes it durable.
    Written(CommitId),
    /// The mark is written; the next barrier makes it durable.
    Marked(CommitId),
    /// Commits up to this one are being deleted.
    Deleting(u64),
}

#[derive(Debug)]
struct Writing {
    layer: Arc<Overlay>,
    conversations: Vec<ConversationId>,
    /// The last row written, with its table in front.
    row: Option<Vec<u8>>,
}

/// Settles the layers of one shard.
#[derive(Debug)]
pub(crate) struct Settler {
    stage: Stage,
}

impl Settler {
    /// `settled`: commits up to it may be left over from before.
    pub(crate) fn new(settled: u64) -> Self {
        Self { stage: if settled > 0 { Stage::Deleting(settled) } else { Stage::Idle } }
    }

    /// Nothing is under way.
    pub(crate) fn is_idle(&self) -> bool {
        matches!(self.stage, Stage::Idle)
    }

    /// It goes on only after a barrier.
    pub(crate) fn needs_barrier(&self) -> bool {
        matches!(self.stage, Stage::Written(_) | Stage::Marked(_))
    }

    /// Begins with the layer that was growing, if nothing is under way.
    pub(crate) fn begin(&mut self, view: &View) {
        if self.is_idle()
            && let Some(layer) = view.freeze()
        {
            let mut conversations: Vec<ConversationId> = layer.touched.keys().copied().collect();
            // Neighbours in the tables one after the other; taken from the end.
            conversations.sort_unstable_by(|a, b| b.cmp(a));
            self.stage = Stage::Writing(Writing { layer, conversations, row: None });
        }
    }

    /// Writes or deletes about `budget` bytes' worth. Returns whether there was anything to do.
    pub(crate) fn step(&mut self, view: &View, budget: usize) -> Result<bool, ReadError> {
        match &mut self.stage {
            Stage::Idle | Stage::Written(_) | Stage::Marked(_) => Ok(false),
            Stage::Writing(writing) => {
                if write_slice(view, writing, budget)? {
                    let last = writing.layer.last;
                    view.drop_frozen();
                    self.stage = Stage::Written(last);
                }
                Ok(true)
            }
            Stage::Deleting(upto) => {
                let rows = (budget / CHUNK_BYTES).clamp(4, 256) * 2;
                if delete_commits(view, *upto, rows)? {
                    self.stage = Stage::Idle;
                }
                Ok(true)
            }
        }
    }

    /// Everything written so far is durable.
    pub(crate) fn on_barrier(&mut self, view: &View) -> Result<(), ReadError> {
        match self.stage {
            Stage::Written(last) => {
                let value = seal_row(Table::Shard, SETTLED, &mark(last));
                view.engine().insert(Table::Shard, SETTLED, &value).map_err(|error| view.failed(error))?;
                self.stage = Stage::Marked(last);
            }
            Stage::Marked(last) => self.stage = Stage::Deleting(last.number),
            Stage::Idle | Stage::Writing(_) | Stage::Deleting(_) => {}
        }
        Ok(())
    }
}

fn mark(last: CommitId) -> Vec<u8> {
    let mut row = vec![1];
    row.extend_from_slice(&last.number.to_be_bytes());
    row.extend_from_slice(&last.chain.0);
    row
}

/// The last commit that is settled; [`CommitId::ZERO`] if none is.
pub(crate) fn settled(engine: &dyn Engine) -> Result<CommitId, MarkError> {
    let Some(value) = engine.get(Table::Shard, SETTLED)? else { return Ok(CommitId::ZERO) };
    let row = open_row(Table::Shard, SETTLED, &value)?;
    let mut at = Cursor::new(&row);
    if at.u8("settled mark")? != 1 {
        return Err(Malformed("settled mark").into());
    }
    let number = u64::from_be_bytes(at.array("settled mark")?);
    let chain = ChainHash(at.array("settled mark")?);
    Ok(CommitId { number, chain })
}

/// Why the mark could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MarkError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

/// Returns whether the layer is written.
fn write_slice(view: &View, writing: &mut Writing, budget: usize) -> Result<bool, ReadError> {
    let engine = view.engine();
    let mut written = 0;
    while written < budget {
        let Some(conversation) = writing.conversations.last().copied() else { break };
        if let Some(touched) = writing.layer.touched.get(&conversation) {
            written += write_conversation(view, conversation, touched)?;
            if touched.low_moved && !remove_below(view, conversation, touched.head.low)? {
                // More to remove: the same conversation again. Writing it twice changes nothing.
                continue;
            }
        }
        writing.conversations.pop();
    }
    if written >= budget {
        return Ok(false);
    }
    let start = writing.row.clone().map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
    for (full, row) in writing.layer.rows.range((start, std::ops::Bound::Unbounded)) {
        let Some((table, key)) = split(full) else { continue };
        match row {
            Some(row) => engine.insert(table, key, &seal_row(table, key, row)),
            None => engine.remove(table, key),
        }
        .map_err(|error| view.failed(error))?;
        written += full.len() + row.as_ref().map_or(0, |row| row.len()) + 16;
        writing.row = Some(full.clone());
        if written >= budget {
            return Ok(false);
        }
    }
    let counters = counters_row(&writing.layer.counters);
    engine
        .insert(Table::Shard, COUNTERS, &seal_row(Table::Shard, COUNTERS, &counters))
        .map_err(|error| view.failed(error))?;
    Ok(true)
}

fn split(full: &[u8]) -> Option<(Table, &[u8])> {
    let (number, key) = full.split_first()?;
    let table = Table::ALL.get(usize::from(*number).checked_sub(1)?)?;
    Some((*table, key))
}

fn counters_row(counters: &Counters) -> Vec<u8> {
    let mut row = vec![1];
    for counter in [counters.users, counters.conversations, counters.epoch] {
        row.extend_from_slice(&counter.to_be_bytes());
    }
    row
}

/// The counters as the tables have them.
pub(crate) fn counters(engine: &dyn Engine) -> Result<Counters, MarkError> {
    let Some(value) = engine.get(Table::Shard, COUNTERS)? else { return Ok(Counters::default()) };
    let row = open_row(Table::Shard, COUNTERS, &value)?;
    let mut at = Cursor::new(&row);
    if at.u8("counters")? != 1 {
        return Err(Malformed("counters").into());
    }
    let mut next = || Ok::<_, Malformed>(u64::from_be_bytes(at.array("counters")?));
    Ok(Counters { users: next()?, conversations: next()?, epoch: next()? })
}

/// Writes what happened to a conversation; returns about how many bytes.
fn write_conversation(
    view: &View,
    conversation: ConversationId,
    touched: &Touched,
) -> Result<usize, ReadError> {
    let engine = view.engine();
    let mut written = 0;
    let mut put = |table: Table, key: &[u8], value: &[u8]| {
        written += key.len() + value.len() + 16;
        engine.insert(table, key, value).map_err(|error| view.failed(error))
    };
    if let Some(first) = touched.records.front() {
        let first = first.record.seq;
        let mut builder = last_block(view, conversation, first)?;
        for pending in &touched.records {
            let block = builder.get_or_insert_with(|| block::Builder::new(pending.record.seq));
            if !block.fits(pending.encoded.len()) {
                write_block(conversation, block, &mut put)?;
                *block = block::Builder::new(pending.record.seq);
            }
            block.push(&pending.encoded);
        }
        if let Some(block) = builder {
            write_block(conversation, &block, &mut put)?;
        }
    }
    let key = Key::conversation(conversation);
    put(Table::Head, key.as_ref(), &seal_row(Table::Head, key.as_ref(), &touched.head.to_row()))?;
    for ((user, device), lane) in &touched.lanes {
        let key = Key::lane(conversation, *user, *device);
        put(Table::Lane, key.as_ref(), &seal_row(Table::Lane, key.as_ref(), &lane.to_row()))?;
    }
    Ok(written)
}

fn write_block(
    conversation: ConversationId,
    block: &block::Builder,
    put: &mut impl FnMut(Table, &[u8], &[u8]) -> Result<(), ReadError>,
) -> Result<(), ReadError> {
    for (n, chunk) in block.finish().chunks(CHUNK_BYTES).enumerate() {
        let key = Key::block(conversation, block.first, u16::try_from(n).unwrap_or(u16::MAX));
        put(Table::Block, key.as_ref(), chunk)?;
    }
    Ok(())
}

/// The last block before `first`, to be written again with more in it; `None` if it is large enough to be left alone.
/// Blocks from `first` on are what an interrupted settling left: they are removed, the layer has their records.
fn last_block(
    view: &View,
    conversation: ConversationId,
    first: Seq,
) -> Result<Option<block::Builder>, ReadError> {
    let engine = view.engine();
    loop {
        let Some(key) = view.last_block_key(
            conversation,
            Seq::new(fulmar_protocol::limit::VARINT_MAX - 1).unwrap_or(first),
        )?
        else {
            return Ok(None);
        };
        let begins: Seq = view.id_at(&key, 1)?;
        if begins >= first {
            engine.remove(Table::Block, &key).map_err(|error| view.failed(error))?;
            continue;
        }
        if key::chunk_of(&key).is_ok_and(|chunk| chunk > 0) {
            return Ok(None);
        }
        let Some(bytes) = engine.get(Table::Block, &key).map_err(|error| view.failed(error))? else {
            return Ok(None);
        };
        let records = block::decode(conversation, begins, &bytes)
            .map_err(|what| view.damaged(Some(conversation), Some(begins), what))?;
        let reaches_in = records.last().is_some_and(|(record, _)| record.seq >= first);
        if bytes.len() >= block::REWRITE_BELOW_BYTES && !reaches_in {
            return Ok(None);
        }
        let mut builder = block::Builder::new(begins);
        for (record, encoded) in &records {
            if record.seq < first {
                builder.push(encoded);
            }
        }
        return Ok(Some(builder));
    }
}

/// Removes blocks that end at `low` or before. Returns whether all are gone.
fn remove_below(view: &View, conversation: ConversationId, low: Seq) -> Result<bool, ReadError> {
    let engine = view.engine();
    let from = Key::block(conversation, Seq::ZERO, 0);
    let to = Key::block(conversation, low.saturating_add(1), 0);
    let rows = engine
        .scan(Table::Block, from.as_ref(), Some(to.as_ref()), Direction::Ascending, REMOVE_BLOCKS)
        .map_err(|error| view.failed(error))?;
    let whole_page = rows.len() == REMOVE_BLOCKS;
    let mut going = false;
    for (key, chunk) in rows {
        if key::chunk_of(&key).is_ok_and(|chunk| chunk == 0) {
            let begins: Seq = view.id_at(&key, 1)?;
            let header = block::Header::decode(&chunk)
                .map_err(|what| view.damaged(Some(conversation), Some(begins), what))?;
            going = begins.saturating_add(header.count).prev() <= low;
        }
        if !going {
            return Ok(true);
        }
        engine.remove(Table::Block, &key).map_err(|error| view.failed(error))?;
    }
    Ok(!whole_page)
}

/// Deletes at most `rows` chunks of commits up to `upto`. Returns whether all are gone.
fn delete_commits(view: &View, upto: u64, rows: usize) -> Result<bool, ReadError> {
    let engine = view.engine();
    let to = Key::commit(upto.saturating_add(1), 0);
    let found = engine
        .scan(Table::Commit, &[], Some(to.as_ref()), Direction::Ascending, rows)
        .map_err(|error| view.failed(error))?;
    let done = found.len() < rows;
    for (key, _) in found {
        engine.remove(Table::Commit, &key).map_err(|error| view.failed(error))?;
    }
    Ok(done)
}
