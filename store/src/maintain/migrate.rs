//! Another engine for a data folder: its indexes are made from the segments, verified, and take the place of the old ones.
//!
//! - Per shard: `index.new/` is filled and compared with the segments row by row, and renamed to `index.<engine>/` when it is
//!   whole and durable. When all shards have one, the marker names the new engine. Only then the old indexes go.
//! - Interrupted before the marker changed, the folder is one of the old engine, and shards that have their new index are not
//!   done again if nothing was settled since. Interrupted after it, opening the folder puts the new indexes in place.
//! - Log and segments are only read.
//!
//! Not here: what an index holds (`shard::index`), making segments smaller (`compact`).

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use fulmar_protocol::id::{ConversationId, Seq, ShardId};
use serde::Serialize;

use super::{MaintainError, Progress, upgrade};
use crate::{
    EngineKind, OpenError,
    engine::{Direction, Engine, EngineError, Entry, place},
    files::disk::Disk,
    format::{Folder, Marker},
    key::{Key, Table},
    row::{Head, Row},
    segment::{Run, Segment, SegmentError},
    shard::{
        index::{self, Distance, IndexError},
        manifest::Manifest,
        segments::{Placed, Segments},
        view::{next_key, seal_row},
    },
    store::{INDEX, open_engine},
};

/// An index that is being made.
const NEW: &str = "index.new";

/// An index that was replaced.
const OLD: &str = "index.old";

/// Bytes the engine may cache while an index is made.
const CACHE_BYTES: u64 = 64 << 20;

/// Rows compared between two calls of `progress`.
const PROGRESS_ROWS: u64 = 16_384;

/// Rows read from the engine at a time.
const PAGE_ROWS: usize = 512;

/// What changing the engine did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MigrateReport {
    /// The engine the folder had.
    pub from: String,
    /// The engine it has now.
    pub to: String,
    /// Shards.
    pub shards: u16,
    /// Shards whose new index an interrupted attempt had finished.
    pub shards_done_before: u16,
    /// Rows of the new indexes, all of them compared with the segments; those of shards that were done before are not counted.
    pub rows: u64,
    /// Bytes of the segments the indexes were made from.
    pub segment_bytes: u64,
    /// Bytes of the old indexes.
    pub index_bytes_before: u64,
    /// Bytes of the new indexes.
    pub index_bytes_after: u64,
}

/// Changes the engine of the data folder at `path`, which nobody may have open. A folder of an older format is upgraded first. If
/// the folder has the engine already, what an interrupted attempt left is finished.
///
/// # Errors
/// The folder is in use, is not one, or is damaged; or `to` keeps nothing on disk. The folder can be opened with its old engine
/// then, and the work be done again; or, if only removing the old indexes failed, with the new one.
pub fn migrate(
    path: impl AsRef<Path>,
    to: EngineKind,
    progress: &mut dyn FnMut(Progress),
) -> Result<MigrateReport, MaintainError> {
    let path = path.as_ref();
    if to == EngineKind::Memory {
        return Err(MaintainError::MemoryEngine { path: path.to_owned() });
    }
    let mut folder = open_folder(path)?;
    upgrade::if_needed(&mut folder, progress)?;
    let from = engine_of(&folder)?;
    let mut report = MigrateReport {
        from: from.name().to_owned(),
        to: to.name().to_owned(),
        shards: folder.marker.shards,
        ..MigrateReport::default()
    };
    let shards = shards_of(&folder)?;
    if from != to {
        for (id, at) in &shards {
            let shard = Made::open(*id, at)?;
            report.segment_bytes += shard.segment_bytes();
            report.index_bytes_before +=
                bytes_in(&at.join(INDEX)).map_err(MaintainError::io("can't read", at))?;
            match make(&shard, to, progress)? {
                Some(rows) => report.rows += rows,
                None => report.shards_done_before += 1,
            }
        }
        if let Some((id, _)) = shards.last() {
            progress(Progress { shard: *id, doing: "naming the engine", done: 0, of: 0 });
        }
        let marker = Marker { engine: to.name().to_owned(), ..folder.marker.clone() };
        folder.set_marker(&Disk::new(path), marker)?;
    }
    for (id, at) in &shards {
        progress(Progress { shard: *id, doing: "replacing the index", done: 0, of: 0 });
        put_in_place(at, to).map_err(MaintainError::io("can't replace the index in", at))?;
        report.index_bytes_after += bytes_in(&at.join(INDEX)).map_err(MaintainError::io("can't read", at))?;
    }
    tracing::info!(folder = %path.display(), from = report.from, to = report.to, rows = report.rows, "changed the engine");
    Ok(report)
}

/// Opens and locks a folder that exists.
pub(super) fn open_folder(path: &Path) -> Result<Folder, MaintainError> {
    if !path.join("FORMAT").exists() {
        return Err(MaintainError::NoFolder { path: path.to_owned() });
    }
    Ok(Folder::open_existing(path)?)
}

/// The engine that keeps the indexes of a folder.
pub(super) fn engine_of(folder: &Folder) -> Result<EngineKind, OpenError> {
    let engine = &folder.marker.engine;
    EngineKind::from_name(engine).filter(|engine| *engine != EngineKind::Memory).ok_or_else(|| {
        OpenError::Marker {
            path: folder.path.clone(),
            what: format!("there is no engine {engine:?} for a folder"),
        }
    })
}

/// The shards of a folder and where they lie.
pub(super) fn shards_of(folder: &Folder) -> Result<Vec<(ShardId, PathBuf)>, OpenError> {
    let ids = (0..folder.marker.shards).filter_map(ShardId::new);
    ids.map(|id| Ok((id, folder.shard(id)?))).collect()
}

/// A shard's manifest and the segments it names.
pub(super) struct Made {
    pub(super) id: ShardId,
    pub(super) path: PathBuf,
    pub(super) files: Disk,
    pub(super) manifest: Manifest,
    pub(super) segments: Segments,
}

impl Made {
    pub(super) fn open(id: ShardId, path: &Path) -> Result<Self, MaintainError> {
        let files = Disk::new(path);
        let damaged = |what: String| MaintainError::Damaged { shard: id, what };
        let manifest = Manifest::load(&files, id).map_err(|error| damaged(error.to_string()))?;
        let segments = Segments::default();
        for entry in &manifest.segments {
            let segment = Segment::open(&files, id, entry.id)
                .map_err(|error| damaged(format!("segment {:016x} can't be used: {error}", entry.id)))?;
            if segment.summary().bytes != entry.bytes {
                return Err(damaged(format!("segment {:016x} is not the one the manifest means", entry.id)));
            }
            segments.add(entry.id, Arc::new(segment));
        }
        Ok(Self { id, path: path.to_owned(), files, manifest, segments })
    }

    pub(super) fn segment_bytes(&self) -> u64 {
        self.manifest.segments.iter().map(|entry| entry.bytes).sum()
    }

    /// What the index of this shard must hold.
    pub(super) fn expected(&self) -> Result<Expected, MaintainError> {
        let mut inputs = Vec::with_capacity(self.manifest.segments.len());
        for entry in &self.manifest.segments {
            let missing = || self.failed(&IndexError::Missing(entry.id));
            inputs.push((entry.id, self.segments.get(entry.id).ok_or_else(missing)?));
        }
        Expected::new(&inputs).map_err(|error| self.failed(&error))
    }

    pub(super) fn failed(&self, error: &IndexError) -> MaintainError {
        match error {
            IndexError::Engine(error) => self.engine(error),
            IndexError::Segment { .. } | IndexError::Missing(_) => {
                MaintainError::Damaged { shard: self.id, what: error.to_string() }
            }
        }
    }

    fn engine(&self, error: &EngineError) -> MaintainError {
        MaintainError::Engine { shard: self.id, reason: error.to_string() }
    }
}

/// Makes the index of `shard` for the engine `to`, verified and durable, beside the one there is. Returns its rows; `None` if
/// there is one already.
pub(super) fn make(
    shard: &Made,
    to: EngineKind,
    progress: &mut dyn FnMut(Progress),
) -> Result<Option<u64>, MaintainError> {
    let (new, ready) = (shard.path.join(NEW), ready(&shard.path, to));
    let of = shard.segment_bytes();
    let mut tell = |doing, done| progress(Progress { shard: shard.id, doing, done, of });
    tell("looking for a finished index", 0);
    if ready.exists() {
        // An attempt that was interrupted; what was settled since, it lacks.
        let here = place::is_here(&ready).map_err(MaintainError::io("can't read", &ready))?
            && open_engine(to, &ready, CACHE_BYTES)
                .and_then(|engine| index::distance(engine.as_ref(), &shard.manifest))
                .is_ok_and(|distance| distance == Distance::Here);
        if here {
            return Ok(None);
        }
        remove(&ready).map_err(MaintainError::io("can't remove", &ready))?;
    }
    remove(&new).map_err(MaintainError::io("can't remove", &new))?;
    tell("making the index", 0);
    let engine = open_engine(to, &new, CACHE_BYTES).map_err(|error| shard.engine(&error))?;
    place::note(&new).map_err(MaintainError::io("can't write into", &new))?;
    index::fill(engine.as_ref(), &shard.segments, &shard.manifest, |done| tell("making the index", done))
        .map_err(|error| shard.failed(&error))?;
    let rows = compare(engine.as_ref(), shard, &mut |done| tell("comparing the index", done))?;
    index::set_applied(engine.as_ref(), &shard.manifest).map_err(|error| shard.engine(&error))?;
    drop(engine);
    tell("finishing the index", of);
    let finish = || {
        fs::rename(&new, &ready)?;
        sync_folder(&shard.path)
    };
    finish().map_err(MaintainError::io("can't rename", &new))?;
    tell("finished the index", of);
    Ok(Some(rows))
}

/// Where the finished index for an engine lies until it is put in its place.
fn ready(shard: &Path, engine: EngineKind) -> PathBuf {
    shard.join(format!("{INDEX}.{}", engine.name()))
}

/// Puts a finished index for `engine`, if there is one, in the place of the one before, and removes all others. Interrupted, it is
/// done when it is called again.
pub(crate) fn put_in_place(shard: &Path, engine: EngineKind) -> io::Result<()> {
    let (index, old, ready) = (shard.join(INDEX), shard.join(OLD), ready(shard, engine));
    if ready.try_exists()? {
        remove(&old)?;
        // Renamed as a whole: nobody may find half of it.
        if index.try_exists()? {
            fs::rename(&index, &old)?;
        }
        fs::rename(&ready, &index)?;
        sync_folder(shard)?;
    }
    remove(&old)?;
    remove(&shard.join(NEW))?;
    for other in EngineKind::ALL.into_iter().filter(|other| *other != engine) {
        remove(&self::ready(shard, other))?;
    }
    Ok(())
}

fn remove(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Bytes on disk of all files in a folder; zero if there is none.
pub(super) fn bytes_in(folder: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let mut bytes = 0u64;
    for entry in entries {
        let entry = entry?;
        let data = entry.metadata()?;
        bytes =
            bytes.saturating_add(if data.is_dir() { bytes_in(&entry.path())? } else { data.blocks() * 512 });
    }
    Ok(bytes)
}

// ---- what an index must hold

/// Compares an index with the segments: every row they say is there, as they say it, and nothing else. Returns the rows.
pub(super) fn compare(
    engine: &dyn Engine,
    shard: &Made,
    progress: &mut dyn FnMut(u64),
) -> Result<u64, MaintainError> {
    let differs = |table: Table, key: &[u8], what: &str| MaintainError::Engine {
        shard: shard.id,
        reason: format!("its table {} {what} at {}", table.name(), hex(key)),
    };
    let mut expected = shard.expected()?;
    let mut rows = 0u64;
    let total = shard.segment_bytes();
    let entries = shard.manifest.segments.iter().map(|entry| entry.rows + entry.runs).sum::<u64>().max(1);
    for table in Table::ALL {
        let mut found =
            EngineRows { engine, table, from: Vec::new(), read: Vec::new().into_iter(), end: false };
        loop {
            let there = found.next().map_err(|error| shard.engine(&error))?;
            if table == Table::Shard {
                match there {
                    None => break,
                    Some((key, _)) if key == index::APPLIED => continue,
                    Some((key, _)) => return Err(differs(table, &key, "has a row that nobody wrote")),
                }
            }
            let want = expected.next_in(table).map_err(|error| shard.failed(&error))?;
            match (want, there) {
                (None, None) => break,
                (Some((key, value)), Some((k, v))) if key == k && value == v[..] => {}
                (Some((key, _)), Some((k, _))) if key == k => {
                    return Err(differs(table, &key, "has another row than the segments"));
                }
                (Some((key, _)), there) if there.as_ref().is_none_or(|(k, _)| *k > key) => {
                    return Err(differs(table, &key, "lacks a row"));
                }
                (_, Some((key, _))) => return Err(differs(table, &key, "has a row that is gone")),
                (Some((key, _)), None) => return Err(differs(table, &key, "lacks a row")),
            }
            rows += 1;
            if rows.is_multiple_of(PROGRESS_ROWS) {
                progress(
                    u64::try_from(u128::from(total) * u128::from(rows.min(entries)) / u128::from(entries))
                        .unwrap_or(total),
                );
            }
        }
    }
    Ok(rows)
}

fn hex(key: &[u8]) -> String {
    key.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// All rows of a table of an engine.
struct EngineRows<'a> {
    engine: &'a dyn Engine,
    table: Table,
    from: Vec<u8>,
    read: std::vec::IntoIter<Entry>,
    end: bool,
}

impl EngineRows<'_> {
    fn next(&mut self) -> Result<Option<Entry>, EngineError> {
        if self.read.as_slice().is_empty() && !self.end {
            let rows = self.engine.scan(self.table, &self.from, None, Direction::Ascending, PAGE_ROWS)?;
            self.end = rows.len() < PAGE_ROWS;
            if let Some((key, _)) = rows.last() {
                self.from = next_key(key);
            }
            self.read = rows.into_iter();
        }
        Ok(self.read.next())
    }
}

type Items<K, V> = Box<dyn Iterator<Item = Result<(K, V), SegmentError>> + Send>;

/// (table, key), and the row or the word that it is gone.
type NewestRows = Newest<(u8, Bytes), Option<Bytes>>;

/// Several ordered lists as one: of equal keys the last list's counts.
struct Newest<K, V> {
    /// The segment, its list, and what comes next in it.
    inputs: Vec<(u64, Items<K, V>, Option<V>)>,
    next: BinaryHeap<Reverse<(K, usize)>>,
}

impl<K: Ord, V> Newest<K, V> {
    /// `inputs`: oldest first.
    fn new(inputs: Vec<(u64, Items<K, V>)>) -> Result<Self, IndexError> {
        let mut newest = Self {
            inputs: inputs.into_iter().map(|(id, items)| (id, items, None)).collect(),
            next: BinaryHeap::new(),
        };
        for n in 0..newest.inputs.len() {
            newest.step(n)?;
        }
        Ok(newest)
    }

    fn step(&mut self, n: usize) -> Result<(), IndexError> {
        let Some((id, items, next)) = self.inputs.get_mut(n) else { return Ok(()) };
        let item = items.next().transpose().map_err(|error| IndexError::Segment { id: *id, error })?;
        if let Some((key, value)) = item {
            *next = Some(value);
            self.next.push(Reverse((key, n)));
        }
        Ok(())
    }

    /// What comes next, and in which segment it lies.
    fn next(&mut self) -> Result<Option<(u64, K, V)>, IndexError> {
        let Some(Reverse((key, mut newest))) = self.next.pop() else { return Ok(None) };
        let mut value = self.inputs.get_mut(newest).and_then(|input| input.2.take());
        self.step(newest)?;
        while self.next.peek().is_some_and(|Reverse((other, _))| *other == key) {
            let Some(Reverse((_, n))) = self.next.pop() else { break };
            // In order of their places, so a later one is of a newer segment.
            value = self.inputs.get_mut(n).and_then(|input| input.2.take());
            newest = n;
            self.step(n)?;
        }
        let id = self.inputs.get(newest).map_or(0, |input| input.0);
        Ok(value.map(|value| (id, key, value)))
    }
}

/// The newest version of every row in some segments, with the word that it is gone.
fn newest_rows(inputs: &[(u64, Arc<Segment>)]) -> Result<NewestRows, IndexError> {
    let rows = |segment: &Segment| -> Items<(u8, Bytes), Option<Bytes>> {
        Box::new(segment.rows().map(|row| row.map(|(table, key, row)| ((table, key), row))))
    };
    Newest::new(inputs.iter().map(|(id, segment)| (*id, rows(segment))).collect())
}

/// A key and what lies under it.
type KeyValue = (Vec<u8>, Vec<u8>);

/// The rows of an index as the segments have them, in order.
pub(super) struct Expected {
    rows: NewestRows,
    row: Option<(u8, Bytes, Bytes)>,
    runs: Newest<(ConversationId, Seq), Run>,
    /// Up to where conversations have lost their records.
    low: HashMap<ConversationId, Seq>,
    /// The conversation whose runs above its `low` have begun.
    above: Option<ConversationId>,
}

impl Expected {
    fn new(inputs: &[(u64, Arc<Segment>)]) -> Result<Self, IndexError> {
        let runs = |segment: &Segment| -> Items<(ConversationId, Seq), Run> {
            Box::new(segment.runs().map(|run| run.map(|run| ((run.conversation, run.first), run))))
        };
        Ok(Self {
            rows: newest_rows(inputs)?,
            row: None,
            runs: Newest::new(inputs.iter().map(|(id, segment)| (*id, runs(segment))).collect())?,
            low: HashMap::new(),
            above: None,
        })
    }

    /// The next row of `table`, as the index has it. Tables are asked for in order of their numbers.
    pub(super) fn next_in(&mut self, table: Table) -> Result<Option<KeyValue>, IndexError> {
        if table == Table::Run {
            return Ok(self.next_run()?.map(|placed| {
                let key = Key::run(placed.run.conversation, placed.run.first).into_bytes();
                let value = seal_row(table, &key, &placed.encode());
                (key, value)
            }));
        }
        while self.row.is_none() {
            let Some((_, (number, key), row)) = self.rows.next()? else { return Ok(None) };
            self.row = row.map(|row| (number, key, row));
        }
        if self.row.as_ref().is_some_and(|(number, ..)| *number != table as u8) {
            return Ok(None);
        }
        let Some((_, key, row)) = self.row.take() else { return Ok(None) };
        if table == Table::Head
            && let Ok(head) = Head::from_row(&row)
            && let Some(number) = key.first_chunk()
            && let Some(conversation) = ConversationId::new(u64::from_be_bytes(*number))
            && head.low > Seq::ZERO
        {
            self.low.insert(conversation, head.low);
        }
        let value = seal_row(table, &key, &row);
        Ok(Some((key.to_vec(), value)))
    }

    /// Up to where a conversation has lost its records.
    pub(super) fn low_of(&self, conversation: ConversationId) -> Seq {
        self.low.get(&conversation).copied().unwrap_or(Seq::ZERO)
    }

    pub(super) fn into_low(self) -> HashMap<ConversationId, Seq> {
        self.low
    }

    /// The next run an index points to. Heads were asked for before.
    pub(super) fn next_run(&mut self) -> Result<Option<Placed>, IndexError> {
        while let Some((segment, (conversation, _), run)) = self.runs.next()? {
            if self.above != Some(conversation) {
                if run.last() <= self.low_of(conversation) {
                    continue;
                }
                self.above = Some(conversation);
            }
            return Ok(Some(Placed { segment, run }));
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use fulmar_protocol::id::{DeviceId, Epoch, Pseq, UnixMillis, UserId};

    use super::*;
    use crate::{
        Member, Op, Record, RecordKind, Role, Store, StoreOptions,
        engine::memory::Memory,
        shard::{index::each_row, view::open_row},
    };

    fn shard() -> ShardId {
        ShardId::new(0).unwrap()
    }

    fn conversation(local: u64) -> ConversationId {
        ConversationId::new(shard().number(local).unwrap()).unwrap()
    }

    fn append(local: u64, n: u64) -> Op {
        let record = Record {
            seq: Seq::new(n).unwrap(),
            kind: RecordKind::Message,
            sender: UserId::new(256).unwrap(),
            device: DeviceId::FIRST,
            epoch: Epoch::FIRST,
            pseq: Pseq::new(n).unwrap(),
            time: UnixMillis::new(n).unwrap(),
            count: n,
            target: None,
            ttl: None,
            more: false,
            continues: false,
            silent: false,
            payload: Bytes::from_static(b"hello"),
        };
        Op::Append { conversation: conversation(local), record }
    }

    /// Some segments, with rows that were replaced, rows that are gone, and records that retention took.
    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let options =
            StoreOptions { shards: 1, settle_commits: 2, segment_bytes_max: 1, ..StoreOptions::default() };
        let store = Store::open(folder.path(), &options).unwrap();
        let (mut writer, _) = store.shard(shard()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for n in 1..=12 {
            let row = Member { role: Role::Member, joined: Seq::FIRST, since: UnixMillis::default() };
            let member = |user: u64, row| Op::Member {
                conversation: conversation(1),
                user: UserId::new(user * 256).unwrap(),
                row,
            };
            let mut batch = vec![append(1, n), append(2, n), member(n, Some(row)), member(99, Some(row))];
            if n > 6 {
                batch.push(member(n - 6, None));
            }
            if n == 9 {
                let low = Seq::new(5).unwrap();
                batch.push(Op::Low { conversation: conversation(2), low, count: 5 });
            }
            runtime.block_on(writer.commit(&batch)).unwrap();
        }
        store.close().unwrap();
        folder
    }

    #[test]
    fn an_index_is_right_only_with_every_row_and_no_other() {
        let folder = folder();
        let made = Made::open(shard(), &folder.path().join("shard-000")).unwrap();
        assert!(made.manifest.segments.len() > 2);
        let engine = Memory::default();
        index::fill(&engine, &made.segments, &made.manifest, |_| {}).unwrap();
        let rows = compare(&engine, &made, &mut |_| {}).unwrap();
        index::set_applied(&engine, &made.manifest).unwrap();
        assert_eq!(compare(&engine, &made, &mut |_| {}).unwrap(), rows, "the mark is no row");
        let mut seen = 0;
        for table in Table::ALL.into_iter().filter(|table| *table != Table::Shard) {
            let mut all = Vec::new();
            each_row(&engine, table, |key, value| {
                all.push((key.to_vec(), value.clone()));
                std::ops::ControlFlow::Continue(())
            })
            .unwrap();
            for (key, value) in &all {
                seen += 1;
                let refused = |what: &str| {
                    let error = compare(&engine, &made, &mut |_| {}).unwrap_err().to_string();
                    assert!(error.contains(what) && error.contains(table.name()), "{error}");
                };
                engine.remove(table, key).unwrap();
                refused("lacks a row");
                // Intact, but not what the segments say.
                let mut row = open_row(table, key, value).unwrap().to_vec();
                *row.last_mut().unwrap() ^= 1;
                engine.insert(table, key, &seal_row(table, key, &row)).unwrap();
                refused("has another row than the segments");
                engine.insert(table, key, value).unwrap();
                let mut more = key.clone();
                more.push(0);
                engine.insert(table, &more, value).unwrap();
                refused("has a row that is gone");
                engine.remove(table, &more).unwrap();
            }
        }
        assert_eq!(seen, rows);
        engine.insert(Table::Shard, b"else", b"1").unwrap();
        let error = compare(&engine, &made, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("nobody wrote"), "{error}");
    }
}
