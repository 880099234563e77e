//! What every engine must make true, and what must hold when one fails.
//!
//! The same suite runs over sled and memory; `crash` cuts the power at random writes; `faults` fails single calls and
//! damages single rows; `room` looks at the end of the log.

mod crash;
mod damage;
mod faults;
mod model;
mod room;
mod suite;

use std::sync::Arc;

use bytes::Bytes;
use fulmar_protocol::id::{AppId, ConversationId, DeviceId, Epoch, Pseq, Seq, ShardId, UnixMillis, UserId};

use crate::{
    Op, OpenError, Record, RecordKind, ShardReader, ShardWriter, StoreOptions,
    commit::CommitId,
    engine::{
        Engine,
        faulty::{Engines, Fate},
        memory::Memory,
    },
    files::{
        Files,
        faulty::{Chance, FaultyFiles, Names, Power},
    },
    shard::{Shard, committer::Request, settler::EngineOpener},
    writer::ask,
};

pub(crate) const SHARD: u16 = 3;

pub(crate) fn shard_id() -> ShardId {
    ShardId::new(SHARD).unwrap()
}

pub(crate) fn conversation(local: u64) -> ConversationId {
    ConversationId::new(shard_id().number(local).unwrap()).unwrap()
}

pub(crate) fn user(local: u64) -> UserId {
    UserId::new(shard_id().number(local).unwrap()).unwrap()
}

pub(crate) fn seq(n: u64) -> Seq {
    Seq::new(n).unwrap()
}

pub(crate) fn app() -> AppId {
    AppId::of("demo")
}

pub(crate) fn message(n: u64, payload: impl Into<Bytes>) -> Record {
    Record {
        seq: seq(n),
        kind: RecordKind::Message,
        sender: user(1),
        device: DeviceId::FIRST,
        epoch: Epoch::FIRST,
        pseq: Pseq::new(n).unwrap(),
        time: UnixMillis::new(1_700_000_000_000 + n).unwrap(),
        count: n,
        target: None,
        ttl: None,
        more: false,
        continues: false,
        silent: false,
        payload: payload.into(),
    }
}

pub(crate) fn append(local: u64, n: u64, payload: impl Into<Bytes>) -> Op {
    Op::Append { conversation: conversation(local), record: message(n, payload) }
}

/// A disk and an engine on it.
pub(crate) struct Machine {
    pub(crate) files: FaultyFiles,
    pub(crate) engines: Engines,
}

impl Machine {
    pub(crate) fn new() -> Self {
        let power = Power::for_ever();
        Self { files: FaultyFiles::new(power.clone()), engines: Engines::new(power) }
    }

    pub(crate) fn open(&self, options: &StoreOptions) -> Result<Open, OpenError> {
        Open::over(Arc::new(self.files.clone()), self.engines.opener(), options)
    }

    /// What is found when the process was killed.
    pub(crate) fn after_kill(&self) -> Self {
        let power = Power::for_ever();
        let (files, engines) = self.files.after_kill(power.clone(), || self.engines.after_kill(power));
        Self { files, engines }
    }

    /// What may be found after a power cut; there is power for so many operations then.
    pub(crate) fn after_power_cut(&self, operations: i64, chance: &mut Chance) -> Self {
        let power = Power::of(operations);
        let names = if chance.percent(50) { Names::Prefix } else { Names::Any };
        let fate = [Fate::Whole, Fate::Lost, Fate::Volatile, Fate::Volatile][chance.below(4) as usize];
        assert_eq!(self.files.broken_promises(), Vec::<String>::new());
        let (files, engines) = self.files.after_power_cut_while(power.clone(), names, chance, |chance| {
            self.engines.after_power_cut(power, fate, chance)
        });
        Self { files, engines }
    }
}

/// Waits until something is so.
pub(crate) fn until(what: &str, mut so: impl FnMut() -> bool) {
    let began = std::time::Instant::now();
    while !so() {
        assert!(began.elapsed().as_secs() < 30, "waited for {what}");
        std::thread::park_timeout(std::time::Duration::from_millis(2));
    }
}

/// Opens one engine that lives in memory, again and again; told to, it begins with an empty one.
pub(crate) fn in_memory(engine: &Arc<Memory>) -> EngineOpener {
    let engine = Arc::clone(engine);
    Box::new(move |anew| {
        if anew {
            engine.clear();
        }
        let engine: Arc<dyn Engine> = Arc::<Memory>::clone(&engine);
        Ok(engine)
    })
}

/// A shard without a data folder.
pub(crate) struct Open {
    pub(crate) shard: Shard,
    pub(crate) writer: ShardWriter,
    pub(crate) reader: ShardReader,
}

impl Open {
    pub(crate) fn over(
        files: Arc<dyn Files>,
        opener: EngineOpener,
        options: &StoreOptions,
    ) -> Result<Self, OpenError> {
        let shard = Shard::open(shard_id(), files, opener, None, options, 1)?;
        let (epoch, last) = acquire(&shard)
            .map_err(|error| OpenError::Engine { shard: shard_id(), reason: error.to_string() })?;
        let reader = ShardReader { shared: Arc::clone(&shard.shared) };
        let writer = ShardWriter { writer: shard.writer(epoch, last), reader: reader.clone() };
        Ok(Self { shard, writer, reader })
    }

    pub(crate) fn commit(&mut self, batch: &[Op]) -> Result<CommitId, crate::CommitError> {
        block_on(self.writer.commit(batch)).map(|committed| committed.commit)
    }

    /// Waits until the thread is gone, so that nothing is written any more. Nothing is settled that was not.
    pub(crate) fn abandon(self) {
        let Self { shard, writer, reader } = self;
        drop((writer, reader));
        drop(shard);
    }

    pub(crate) fn close(self) -> Result<(), crate::CommitError> {
        let (reply, answer) = std::sync::mpsc::sync_channel(1);
        self.shard.requests.send(Request::Close(reply)).unwrap();
        let result = answer.recv().unwrap();
        self.abandon();
        result
    }
}

pub(crate) fn acquire(shard: &Shard) -> Result<(u64, CommitId), crate::CommitError> {
    let (reply, answer) = std::sync::mpsc::sync_channel(1);
    ask(&shard.requests, Request::Acquire(Box::new(move |result| reply.send(result).unwrap())))?;
    answer.recv().unwrap()
}

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}
