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
    CONVERSATIONS, Conversation, History, Person, State, Timeline, app, conversation, counter, shard_id, user,
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

/// Compares every shard with its history, and gives after how many commits each stands.
///
/// # Errors
/// The first difference.
pub fn compare(store: &Store, timelines: &mut [Timeline], bounds: &Bounds) -> Result<Vec<u64>, Wrong> {
    let mut stands = Vec::new();
    if usize::from(store.shards()) != timelines.len() {
        return different(format!("it has {} shards instead of {}", store.shards(), timelines.len()));
    }
    for (shard, timeline) in (0u16..).zip(timelines) {
        let reader = store.reader(shard_id(shard)).map_err(|error| Wrong::Unreadable(error.to_string()))?;
        let at = commits(&reader, shard)?;
        let limit = |all: &[u64]| all.get(usize::from(shard)).copied().unwrap_or(0);
        let (acked, sent) = (limit(&bounds.acked), limit(&bounds.sent));
        if at < acked {
            return different(format!("shard {shard} stands at commit {at}, but {acked} was acknowledged"));
        }
        if at > sent {
            return different(format!("shard {shard} stands at commit {at}, but only {sent} were sent"));
        }
        compare_shard(&reader, &timeline.at(at))?;
        stands.push(at);
    }
    Ok(stands)
}

/// Compares one shard with the state it must be in.
///
/// # Errors
/// The first difference.
pub fn compare_shard(reader: &ShardReader, want: &State) -> Result<(), Wrong> {
    let shard = want.shard;
    for local in 1..=CONVERSATIONS + 1 {
        let nothing = Conversation::default();
        compare_conversation(reader, shard, local, want.conversations.get(&local).unwrap_or(&nothing))?;
    }
    for (local, person) in &want.people {
        compare_person(reader, shard, *local, person)?;
    }
    let got = reader.pending_links(None, usize::MAX)?;
    let links: Vec<_> = want.conversations.values().flat_map(|c| c.links.values().copied()).collect();
    same(|| format!("shard {shard}: pending links"), &got, &links)
}

fn same<T: PartialEq + Debug>(what: impl Fn() -> String, got: &T, want: &T) -> Result<(), Wrong> {
    if got == want { Ok(()) } else { different(format!("{}: {got:?} instead of {want:?}", what())) }
}

fn compare_conversation(
    reader: &ShardReader,
    shard: u16,
    local: u64,
    want: &Conversation,
) -> Result<(), Wrong> {
    let id = conversation(shard, local);
    let what = |part: &'static str| move || format!("shard {shard}: conversation {local}: {part}");
    let head = reader.head(id)?.unwrap_or_default();
    same(what("head"), &head, &want.head)?;
    same(what("meta"), &reader.meta(id)?, &want.meta)?;
    let got = reader.records(id, Seq::FIRST, end(), ALL)?;
    if got.len() != want.records.len() || !got.iter().eq(want.records.iter()) {
        let at = got.iter().zip(&want.records).position(|(got, want)| got != want);
        let place = at.and_then(|at| want.records.get(at)).map(|record| record.seq.get());
        return different(format!(
            "shard {shard}: conversation {local}: {} records instead of {}, the first different one is {place:?}",
            got.len(),
            want.records.len(),
        ));
    }
    // The same by other ways of reading.
    if let Some(last) = want.records.back() {
        let some = Limits { records: 10, bytes: usize::MAX };
        let got = reader.records_before(id, end(), some)?;
        let from = want.records.len().saturating_sub(10);
        if !got.iter().eq(want.records.iter().skip(from)) {
            return different(what("the last ten records")());
        }
        same(what("last record"), &reader.record(id, last.seq)?.as_ref(), &Some(last))?;
    }
    if let Some(middle) = want.records.get(want.records.len() / 2) {
        same(what("a record"), &reader.record(id, middle.seq)?.as_ref(), &Some(middle))?;
        same(what("the count at a record"), &reader.count_at(id, middle.seq)?, &middle.count)?;
    }
    let lanes = reader.lanes(id, None, usize::MAX)?;
    let wanted: Vec<_> = want.lanes.iter().map(|((u, d), lane)| (*u, *d, lane.clone())).collect();
    same(what("lanes"), &lanes, &wanted)?;
    let members = reader.members(id, None, usize::MAX)?;
    same(what("members"), &members, &want.members.iter().map(|(user, row)| (*user, *row)).collect())?;
    let read = reader.read_cursors(id, None, usize::MAX)?;
    same(what("read cursors"), &read, &want.read.iter().map(|(user, seq)| (*user, *seq)).collect())?;
    if let Some(meta) = &want.meta {
        let found = reader.conversation_by_name(app(), meta.class, &meta.name)?;
        same(what("its name"), &found, &Some(id))?;
    }
    Ok(())
}

fn compare_person(reader: &ShardReader, shard: u16, local: u64, want: &Person) -> Result<(), Wrong> {
    let id = user(shard, local);
    let what = |part: &'static str| move || format!("shard {shard}: user {local}: {part}");
    same(what("row"), &reader.user(id)?, &want.row)?;
    let name = format!("user {id}");
    same(what("name"), &reader.user_by_name(app(), &name)?, &want.row.as_ref().map(|_| id))?;
    let listed = reader.user_conversations(id, None, usize::MAX)?;
    same(what("list"), &listed, &want.listed.iter().map(|(c, row)| (*c, *row)).collect())?;
    let devices = reader.devices(id, None, usize::MAX)?;
    same(what("devices"), &devices, &want.devices.iter().map(|(device, row)| (*device, *row)).collect())?;
    for (device, row) in &want.devices {
        same(what("a device's uid"), &reader.device_by_uid(id, row.uid)?, &Some((*device, *row)))?;
    }
    let class = DeviceClass::Phone;
    let epoch = want.classes.get(&(class as u8)).copied().unwrap_or_default();
    same(what("login counter"), &reader.class_epoch(id, class)?, &epoch)?;
    for device in [DeviceId::FIRST, DeviceId::FIRST.saturating_add(1)] {
        let got = reader.recv_cursors(id, device, None, usize::MAX)?;
        let wanted: Vec<_> =
            want.received.iter().filter(|((d, _), _)| *d == device).map(|((_, c), seq)| (*c, *seq)).collect();
        same(what("device cursors"), &got, &wanted)?;
    }
    Ok(())
}

/// Takes every shard's writer and commits one batch of `next`, a history in which a turn begins after `stands`. Gives the
/// states the shards are in then.
///
/// # Errors
/// A commit that failed.
pub fn commit_more(
    store: &Store,
    next: &History,
    timelines: &mut [Timeline],
    stands: &[u64],
) -> anyhow::Result<Vec<State>> {
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let mut states = Vec::new();
    for ((shard, at), timeline) in (0u16..).zip(stands).zip(timelines) {
        let (mut writer, _) = store.shard(shard_id(shard)).context("taking a writer")?;
        let mut state = timeline.at(*at);
        let batch = next.advance(&mut state);
        runtime.block_on(writer.commit(&batch)).context("committing")?;
        states.push(state);
    }
    Ok(states)
}

/// Opens the folder, compares everything, commits one batch more on every shard, and looks at it again through a second
/// opening. Gives after how many commits each shard stood at first.
///
/// # Errors
/// What is wrong.
pub fn whole(
    folder: &Path,
    options: &StoreOptions,
    history: &History,
    timelines: &mut [Timeline],
    bounds: &Bounds,
    close: bool,
) -> anyhow::Result<Vec<u64>> {
    let store = open(folder, options)?;
    let stands = compare(&store, timelines, bounds)?;
    let next = history.crashed(&stands);
    let states = commit_more(&store, &next, timelines, &stands)?;
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
        compare_shard(&reader, state).context("opened a second time")?;
    }
    Ok(stands)
}
