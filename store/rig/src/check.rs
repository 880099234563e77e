//! Comparing a store with a history.
//!
//! - A store tells by its counters after how many commits it stands; then everything it can be asked is compared with that
//!   state: what is missing, what is too much, and what is different.
//!
//! Not here: how the store got into its folder (`power`, `kill`, `damage`).

use std::{
    fmt::Debug,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use fulmar_protocol::id::{DeviceClass, DeviceId, Seq};
use fulmar_store::{Limits, ReadError, ShardReader, Store, StoreOptions};

use crate::history::{
    CONVERSATIONS, Conversation, History, Person, State, Timeline, Turns, app, conversation, counter,
    shard_id, user,
};

const ALL: Limits = Limits { records: usize::MAX, bytes: usize::MAX };

/// How long another thread of this process may still hold a file.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// Beyond every record.
fn end() -> Seq {
    Seq::new(1 << 50).unwrap_or(Seq::ZERO)
}

/// What a folder must hold, shard by shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// At least so many commits: they were acknowledged.
    pub acked: Vec<u64>,
    /// At most so many: no more were ever sent.
    pub sent: Vec<u64>,
    /// What was refused after the last acknowledged one: it may be there all the same, alone and last.
    pub void: Vec<Vec<Turns>>,
}

/// Where a shard stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// What it holds.
    pub state: State,
    /// The turns that led there.
    pub turns: Turns,
}

/// The history that led to where the shards stand, after a crash.
#[must_use]
pub fn crashed(seed: u64, stands: &[Standing]) -> History {
    let shards = stands.iter().map(|standing| standing.turns.clone()).collect();
    History { seed, shards }.crashed(&commits_of(stands))
}

/// After how many commits the shards stand.
#[must_use]
pub fn commits_of(stands: &[Standing]) -> Vec<u64> {
    stands.iter().map(|standing| standing.state.commits).collect()
}

/// Why a store is not as it must be.
#[derive(Debug, thiserror::Error)]
pub enum Wrong {
    /// It could not be opened.
    #[error("refused to open: {0}")]
    Refused(String),
    /// It opened, and a read was refused.
    #[error("a read was refused: {0}")]
    Unreadable(String),
    /// It opened, and something is not as it was written.
    #[error("{0}")]
    Different(String),
}

impl From<ReadError> for Wrong {
    fn from(error: ReadError) -> Self {
        Self::Unreadable(error.to_string())
    }
}

fn different<T>(what: String) -> Result<T, Wrong> {
    Err(Wrong::Different(what))
}

/// After how many commits a shard stands.
///
/// # Errors
/// A read that was refused.
pub fn commits(reader: &ShardReader, shard: u16) -> Result<u64, ReadError> {
    let (who, device, what) = counter(shard);
    Ok(reader.recv_cursor(who, device, what)?.get())
}

/// Opens the store in `folder`.
///
/// sled's threads may hold its file a moment longer than the handle that was dropped; that is waited for, nothing else is.
///
/// # Errors
/// Why it refused.
pub fn open(folder: &Path, options: &StoreOptions) -> Result<Store, Wrong> {
    let began = Instant::now();
    loop {
        match Store::open(folder, options) {
            Ok(store) => return Ok(store),
            Err(error) => {
                let text = error.to_string();
                if !text.contains("could not acquire lock") || began.elapsed() > LOCK_PATIENCE {
                    return Err(Wrong::Refused(text));
                }
                std::thread::park_timeout(Duration::from_millis(2));
            }
        }
    }
}

/// How answers are judged.
#[derive(Debug, Default)]
pub struct Judge {
    /// Refusals that were taken note of; `None`: a refusal is as bad as a wrong answer.
    refused: Option<Vec<String>>,
}

impl Judge {
    /// One who lets nothing pass.
    #[must_use]
    pub fn strict() -> Self {
        Self::default()
    }

    /// One to whom a refusal with a report is an honest answer.
    #[must_use]
    pub fn lenient() -> Self {
        Self { refused: Some(Vec::new()) }
    }

    /// The refusals so far.
    #[must_use]
    pub fn refusals(&self) -> &[String] {
        self.refused.as_deref().unwrap_or_default()
    }

    /// An answer; `None` if it was refused, and that may be.
    fn answer<T>(&mut self, result: Result<T, ReadError>) -> Result<Option<T>, Wrong> {
        match (result, &mut self.refused) {
            (Ok(answer), _) => Ok(Some(answer)),
            (Err(error), Some(refused)) => {
                refused.push(error.to_string());
                Ok(None)
            }
            (Err(error), None) => Err(error.into()),
        }
    }

    /// An answer that must be this one.
    fn same<T: PartialEq + Debug>(
        &mut self,
        what: impl Fn() -> String,
        got: Result<T, ReadError>,
        want: &T,
    ) -> Result<(), Wrong> {
        match self.answer(got)? {
            Some(got) if got != *want => different(format!("{}: {got:?} instead of {want:?}", what())),
            _ => Ok(()),
        }
    }

    /// Compares every shard with its history, and gives where each stands.
    ///
    /// # Errors
    /// The first difference.
    pub fn compare(
        &mut self,
        store: &Store,
        timelines: &mut [Timeline],
        bounds: &Bounds,
    ) -> Result<Vec<Standing>, Wrong> {
        let mut stands = Vec::new();
        if usize::from(store.shards()) != timelines.len() {
            return different(format!("it has {} shards instead of {}", store.shards(), timelines.len()));
        }
        for (shard, timeline) in (0u16..).zip(timelines) {
            let reader =
                store.reader(shard_id(shard)).map_err(|error| Wrong::Unreadable(error.to_string()))?;
            let limit = |all: &[u64]| all.get(usize::from(shard)).copied().unwrap_or(0);
            let (acked, sent) = (limit(&bounds.acked), limit(&bounds.sent));
            let turns = timeline.turns().cloned().unwrap_or_else(|| Turns { begun: 0, list: Vec::new() });
            let at = self.answer(commits(&reader, shard))?;
            if let Some(at) = at {
                if at < acked {
                    return different(format!(
                        "shard {shard} stands at commit {at}, but {acked} was acknowledged"
                    ));
                }
                if at > sent {
                    return different(format!(
                        "shard {shard} stands at commit {at}, but only {sent} were sent"
                    ));
                }
            }
            // One that does not tell where it stands must fit one of the states it may be in.
            let range = at.map_or(acked..=sent, |at| at..=at);
            let usual = range.map(|at| (at, turns.clone()));
            let void = bounds.void.get(usize::from(shard)).into_iter().flatten();
            let void =
                void.filter(|_| at.is_none_or(|at| at == acked + 1)).map(|turns| (acked + 1, turns.clone()));
            let mut first_difference = Ok(());
            let mut standing = None;
            for (at, turns) in usual.chain(void) {
                let state = timeline.at_in(at, &turns);
                match self.compare_shard(&reader, &state) {
                    Ok(()) => {
                        standing = Some(Standing { state, turns });
                        break;
                    }
                    Err(error) => first_difference = first_difference.and(Err(error)),
                }
            }
            match standing {
                Some(standing) => stands.push(standing),
                None => {
                    return Err(first_difference
                        .err()
                        .unwrap_or_else(|| Wrong::Different("nothing fits".to_owned())));
                }
            }
        }
        Ok(stands)
    }

    /// Compares one shard with the state it must be in.
    ///
    /// # Errors
    /// The first difference.
    pub fn compare_shard(&mut self, reader: &ShardReader, want: &State) -> Result<(), Wrong> {
        let shard = want.shard;
        for local in 1..=CONVERSATIONS + 1 {
            let nothing = Conversation::default();
            let want = want.conversations.get(&local).unwrap_or(&nothing);
            self.compare_conversation(reader, shard, local, want)?;
        }
        for (local, person) in &want.people {
            self.compare_person(reader, shard, *local, person)?;
        }
        let links = want.conversations.values().flat_map(|c| c.links.values().copied()).collect();
        self.same(|| format!("shard {shard}: pending links"), reader.pending_links(None, usize::MAX), &links)
    }

    fn compare_conversation(
        &mut self,
        reader: &ShardReader,
        shard: u16,
        local: u64,
        want: &Conversation,
    ) -> Result<(), Wrong> {
        let id = conversation(shard, local);
        let what = |part: &'static str| move || format!("shard {shard}: conversation {local}: {part}");
        self.same(what("head"), reader.head(id).map(Option::unwrap_or_default), &want.head)?;
        self.same(what("meta"), reader.meta(id), &want.meta)?;
        match self.answer(reader.records(id, Seq::FIRST, end(), ALL))? {
            Some(got) if !got.iter().eq(want.records.iter()) => {
                let at = got.iter().zip(&want.records).position(|(got, want)| got != want);
                let place = at.and_then(|at| want.records.get(at)).map(|record| record.seq.get());
                return different(format!(
                    "shard {shard}: conversation {local}: {} records instead of {}, the first different one is {place:?}",
                    got.len(),
                    want.records.len(),
                ));
            }
            Some(_) => {}
            // One by one: what can be read must be right.
            None => {
                for record in &want.records {
                    self.same(what("one record"), reader.record(id, record.seq), &Some(record.clone()))?;
                }
            }
        }
        // The same by other ways of reading.
        if let Some(last) = want.records.back() {
            let some = Limits { records: 10, bytes: usize::MAX };
            let from = want.records.len().saturating_sub(10);
            let ten = want.records.iter().skip(from).cloned().collect();
            self.same(what("the last ten records"), reader.records_before(id, end(), some), &ten)?;
            self.same(what("last record"), reader.record(id, last.seq), &Some(last.clone()))?;
        }
        if let Some(middle) = want.records.get(want.records.len() / 2) {
            self.same(what("a record"), reader.record(id, middle.seq), &Some(middle.clone()))?;
            self.same(what("the count at a record"), reader.count_at(id, middle.seq), &middle.count)?;
        }
        let lanes = want.lanes.iter().map(|((u, d), lane)| (*u, *d, lane.clone())).collect();
        self.same(what("lanes"), reader.lanes(id, None, usize::MAX), &lanes)?;
        for ((user, device), lane) in &want.lanes {
            self.same(what("a lane"), reader.lane(id, *user, *device), &Some(lane.clone()))?;
        }
        let members = want.members.iter().map(|(user, row)| (*user, *row)).collect();
        self.same(what("members"), reader.members(id, None, usize::MAX), &members)?;
        for (user, row) in &want.members {
            self.same(what("a member"), reader.member(id, *user), &Some(*row))?;
        }
        let read = want.read.iter().map(|(user, seq)| (*user, *seq)).collect();
        self.same(what("read cursors"), reader.read_cursors(id, None, usize::MAX), &read)?;
        if let Some(meta) = &want.meta {
            let found = reader.conversation_by_name(app(), meta.class, &meta.name);
            self.same(what("its name"), found, &Some(id))?;
        }
        Ok(())
    }

    fn compare_person(
        &mut self,
        reader: &ShardReader,
        shard: u16,
        local: u64,
        want: &Person,
    ) -> Result<(), Wrong> {
        let id = user(shard, local);
        let what = |part: &'static str| move || format!("shard {shard}: user {local}: {part}");
        self.same(what("row"), reader.user(id), &want.row)?;
        let name = format!("user {id}");
        self.same(what("name"), reader.user_by_name(app(), &name), &want.row.as_ref().map(|_| id))?;
        let listed = want.listed.iter().map(|(c, row)| (*c, *row)).collect();
        self.same(what("list"), reader.user_conversations(id, None, usize::MAX), &listed)?;
        let devices = want.devices.iter().map(|(device, row)| (*device, *row)).collect();
        self.same(what("devices"), reader.devices(id, None, usize::MAX), &devices)?;
        for (device, row) in &want.devices {
            self.same(what("a device's uid"), reader.device_by_uid(id, row.uid), &Some((*device, *row)))?;
        }
        let class = DeviceClass::Phone;
        let epoch = want.classes.get(&(class as u8)).copied().unwrap_or_default();
        self.same(what("login counter"), reader.class_epoch(id, class), &epoch)?;
        for device in [DeviceId::FIRST, DeviceId::FIRST.saturating_add(1)] {
            let of_device = want.received.iter().filter(|((d, _), _)| *d == device);
            let wanted = of_device.map(|((_, c), seq)| (*c, *seq)).collect();
            self.same(what("device cursors"), reader.recv_cursors(id, device, None, usize::MAX), &wanted)?;
        }
        Ok(())
    }
}

/// Takes every shard's writer and commits one batch of `next`, a history in which a turn begins after `stands`. Gives the
/// states the shards are in then.
///
/// # Errors
/// A commit that failed.
pub fn commit_more(store: &Store, next: &History, stands: &[Standing]) -> anyhow::Result<Vec<State>> {
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let mut states = Vec::new();
    for (shard, standing) in (0u16..).zip(stands) {
        let (mut writer, _) = store.shard(shard_id(shard)).context("taking a writer")?;
        let mut state = standing.state.clone();
        let batch = next.advance(&mut state);
        runtime.block_on(writer.commit(&batch)).context("committing")?;
        states.push(state);
    }
    Ok(states)
}

/// Opens the folder, compares everything, commits one batch more on every shard, and looks at it again through a second
/// opening. Gives where each shard stood at first.
///
/// # Errors
/// What is wrong.
pub fn whole(
    folder: &Path,
    options: &StoreOptions,
    seed: u64,
    timelines: &mut [Timeline],
    bounds: &Bounds,
    close: bool,
) -> anyhow::Result<Vec<Standing>> {
    let store = open(folder, options)?;
    let stands = Judge::strict().compare(&store, timelines, bounds)?;
    let states = commit_more(&store, &crashed(seed, &stands), &stands)?;
    if close {
        store.close().context("closing")?;
    }
    drop(store);
    let store = open(folder, options).context("opened a second time")?;
    for (shard, state) in (0u16..).zip(&states) {
        let reader = store.reader(shard_id(shard))?;
        ensure!(
            commits(&reader, shard)? == state.commits,
            "the second opening stands at another commit than the first one left"
        );
        Judge::strict().compare_shard(&reader, state).context("opened a second time")?;
    }
    Ok(stands)
}
