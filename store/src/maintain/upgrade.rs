//! Upgrading a folder of format 1, in which everything lay in sled, to the present format.
//!
//! - Everything of the new format is written beside the old database and made durable, for all shards; then the marker is
//!   replaced; then the old databases go. Interrupted before the marker was replaced, the folder is one of format 1 and the
//!   upgrade begins anew; interrupted after it, opening the folder removes what is left of the old databases.
//! - The old log is proven as the old program proved it, and every row and record is verified while it is copied. What is
//!   damaged refuses the whole: nothing is left out silently.
//! - Commits keep number, chain hash and bytes. Those that were not settled become a log file; the rest, what the tables
//!   hold, segments.
//! - Tables of format 1 may be ahead of their settled mark (settling was interrupted). Records after the mark are left to the
//!   log, and heads are put back to it; other rows may stay ahead, because replaying the log over them changes nothing.
//!
//! Not here: how sled is read (`engine::sled`), the index, which is made from the segments when the folder is opened.

use std::{
    collections::{HashMap, VecDeque},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use fulmar_protocol::id::{ConversationId, Seq, ShardId, UnixMillis};
use serde::Serialize;

use super::{MaintainError, Progress};
use crate::{
    Durability, OpenError,
    codec::{Cursor, Malformed},
    commit::{self, ChainHash, Commit, CommitId},
    engine::{EngineError, Entry, sled::Old},
    files::{Files, disk::Disk},
    format::{FORMAT_VERSION, Folder, Marker},
    key::{self, Table},
    op::Op,
    record::Record,
    row::{Head, Row},
    segment::{self, Segment, SegmentWriter, Summary},
    shard::{
        journal::{self, Journal},
        manifest::{self, Manifest},
        overlay::Counters,
        tip::Tip,
        view::{next_key, open_row},
    },
};

/// The format that is read here.
const OLD_FORMAT: u64 = 1;

/// The old database's folder in a shard's.
const OLD_DATABASE: &str = "sled";

const COMMITS: &str = "commit";
const BLOCKS: &str = "block";
const SETTLED: &[u8] = b"settled";
const COUNTERS: &[u8] = b"counters";

/// Bytes of a chunk of a commit or block.
const CHUNK_BYTES: usize = 4096;

/// Bytes sled may cache.
const CACHE_BYTES: u64 = 32 << 20;

/// Rows read from sled at a time.
const PAGE_ROWS: usize = 256;

/// Bytes after which another segment is begun.
const SEGMENT_BYTES: u64 = 512 << 20;

/// Bytes verified between two looks at the clock.
const VERIFY_STEP_BYTES: usize = 4 << 20;

/// Time between two lines of progress.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);

/// What an upgrade did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct UpgradeReport {
    /// The format the folder had.
    pub from: u64,
    /// The format it has now.
    pub to: u64,
    /// Shards.
    pub shards: u16,
    /// Records that were copied.
    pub records: u64,
    /// Rows that were copied.
    pub rows: u64,
    /// Commits that were not settled yet, and are a log file now.
    pub commits: u64,
    /// Bytes of the old databases.
    pub bytes_before: u64,
    /// Bytes of segments and log files.
    pub bytes_after: u64,
}

/// Brings a data folder to the present format. One that has it already is left as it is.
///
/// # Errors
/// The folder is in use, is not one, can't be written, or is damaged. It is as it was then.
pub fn upgrade(
    path: impl AsRef<Path>,
    progress: &mut dyn FnMut(Progress),
) -> Result<UpgradeReport, MaintainError> {
    let mut folder = super::migrate::open_folder(path.as_ref())?;
    Ok(if_needed(&mut folder, progress)?)
}

/// Upgrades an open folder if it has an older format, and removes what an interrupted upgrade left.
pub(crate) fn if_needed(
    folder: &mut Folder,
    progress: &mut dyn FnMut(Progress),
) -> Result<UpgradeReport, OpenError> {
    if folder.marker.format < FORMAT_VERSION {
        let root = Disk::new(&folder.path);
        let open = |path: &Path| -> Arc<dyn Files> { Arc::new(Disk::new(path)) };
        return run(folder, &root, &open, progress);
    }
    remove_old(folder)?;
    Ok(UpgradeReport {
        from: folder.marker.format,
        to: folder.marker.format,
        shards: folder.marker.shards,
        ..UpgradeReport::default()
    })
}

/// The upgrade; `root` is the folder, `open` opens a shard's.
fn run(
    folder: &mut Folder,
    root: &dyn Files,
    open: &dyn Fn(&Path) -> Arc<dyn Files>,
    progress: &mut dyn FnMut(Progress),
) -> Result<UpgradeReport, OpenError> {
    let began = Instant::now();
    let marker = folder.marker.clone();
    if marker.format != OLD_FORMAT || marker.engine != crate::EngineKind::Sled.name() {
        let what = format!("there never was a format {} of the engine {:?}", marker.format, marker.engine);
        return Err(OpenError::Marker { path: folder.path.clone(), what });
    }
    tracing::info!(folder = %folder.path.display(), shards = marker.shards, "upgrading the data folder from format 1");
    let mut report = UpgradeReport {
        from: marker.format,
        to: FORMAT_VERSION,
        shards: marker.shards,
        ..UpgradeReport::default()
    };
    for id in (0..marker.shards).filter_map(ShardId::new) {
        let path = folder.shard(id)?;
        let files = open(&path);
        Upgrade { id, path, files: files.as_ref(), progress, told: Instant::now(), done: 0, of: 0 }
            .run(&mut report)?;
    }
    // The shards' folders may be new.
    root.sync_folder().map_err(|source| OpenError::Io {
        doing: "can't sync the folder",
        path: folder.path.clone(),
        source,
    })?;
    // From here on the folder has the present format.
    folder.set_marker(root, Marker { format: FORMAT_VERSION, ..marker })?;
    remove_old(folder)?;
    tracing::info!(
        records = report.records, rows = report.rows, commits = report.commits, took = ?began.elapsed(),
        "the data folder is upgraded"
    );
    Ok(report)
}

/// Removes the old databases.
fn remove_old(folder: &Folder) -> Result<(), OpenError> {
    for id in (0..folder.marker.shards).filter_map(ShardId::new) {
        let old = folder.path.join(format!("shard-{:03}", id.get())).join(OLD_DATABASE);
        match std::fs::remove_dir_all(&old) {
            Ok(()) => tracing::info!(shard = %id, "removed the database of format 1"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(OpenError::Io { doing: "can't remove", path: old, source }),
        }
    }
    Ok(())
}

/// One shard on its way.
struct Upgrade<'a> {
    id: ShardId,
    path: PathBuf,
    files: &'a dyn Files,
    progress: &'a mut dyn FnMut(Progress),
    told: Instant,
    /// Bytes of rows read so far, and about how many there are.
    done: u64,
    of: u64,
}

/// What the commits after the settled mark do to a conversation's log.
#[derive(Clone, Copy, Debug)]
struct Unsettled {
    first: Seq,
    last: Seq,
}

/// A head that is ahead of the settled mark, put back.
#[derive(Clone, Copy, Debug)]
struct PutBack {
    seq: Seq,
    count: u64,
    time: UnixMillis,
}

impl Upgrade<'_> {
    fn run(mut self, report: &mut UpgradeReport) -> Result<(), OpenError> {
        let id = self.id;
        self.clear().map_err(|error| self.io("what an interrupted upgrade left can't be removed", &error))?;
        let (acknowledged, _) =
            Tip::read(self.files).map_err(|error| self.io("the tip file can't be read", &error))?;
        let old =
            Old::open(&self.path.join(OLD_DATABASE), CACHE_BYTES).map_err(|error| self.engine(&error))?;
        let Some(old) = old else {
            if acknowledged.number > 0 {
                let what = format!("the log ends here, but commit {} was acknowledged", acknowledged.number);
                return Err(self.damaged(1, what));
            }
            return Ok(());
        };
        self.of = old.size();
        report.bytes_before += self.of;
        let (settled, counters) = self.marks(&old)?;
        let (unsettled, last) = self.log(&old, settled, acknowledged, report)?;
        let mut manifest = Manifest { settled, counters, ..Manifest::default() };
        if settled.number > 0 {
            manifest.edition = 1;
            let mut out = Segments { files: self.files, id, manifest: &mut manifest, writer: None };
            let put_back = self.records(&old, &unsettled, &mut out)?;
            self.rows(&old, &put_back, &mut out)?;
            out.finish().map_err(|error| self.io("a segment can't be written", &error))?;
        } else if last.number == 0 && !self.is_empty(&old)? {
            return Err(self.settled("the settled mark is missing".to_owned()));
        }
        self.files.sync_folder().map_err(|error| self.io("its folder can't be synced", &error))?;
        for entry in &manifest.segments {
            self.verify(entry.id)?;
            report.records += entry.records;
            report.rows += entry.rows;
            report.bytes_after += entry.bytes;
        }
        let proven = journal::Reader::new(self.files, id, acknowledged).read(settled, |_| Ok(()))?;
        report.bytes_after += proven.bytes;
        if proven.last != last {
            return Err(self.settled("the log that was written is not the one that was read".to_owned()));
        }
        if manifest.edition > 0 {
            manifest
                .store(self.files, id)
                .map_err(|error| self.io("the manifest can't be written", &error))?;
        }
        self.tell("upgrading", self.of);
        tracing::info!(shard = %id, settled = settled.number, last = last.number, "upgraded a shard");
        Ok(())
    }

    /// Removes what an interrupted upgrade left: of these files format 1 had none.
    fn clear(&self) -> io::Result<()> {
        for (name, _) in self.files.list()? {
            let ours = name.starts_with(manifest::NAME)
                || name.ends_with(segment::SUFFIX)
                || name.ends_with(journal::SUFFIX);
            if ours {
                self.files.remove(&name)?;
            }
        }
        match std::fs::remove_dir_all(self.path.join(crate::store::INDEX)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// The settled mark and the counters.
    fn marks(&self, old: &Old) -> Result<(CommitId, Counters), OpenError> {
        let get = |key: &[u8]| -> Result<Option<Bytes>, OpenError> {
            let value = old.get(Table::Shard.name(), key).map_err(|error| self.engine(&error))?;
            let row = value.map(|value| open_row(Table::Shard, key, &value)).transpose();
            row.map_err(|what| self.settled(format!("{what} in table {}", Table::Shard.name())))
        };
        let bad = |what: Malformed| self.settled(what.to_string());
        let settled = get(SETTLED)?.map_or(Ok(CommitId::ZERO), |row| decode_settled(&row)).map_err(bad)?;
        let counters = get(COUNTERS)?
            .map_or_else(|| Ok(Counters::default()), |row| decode_counters(&row))
            .map_err(bad)?;
        if settled.number > 0 {
            return Ok((settled, counters));
        }
        // All that is in the log will raise them again.
        Ok((CommitId::ZERO, Counters::default()))
    }

    fn is_empty(&self, old: &Old) -> Result<bool, OpenError> {
        for table in [BLOCKS].into_iter().chain(Table::ALL.iter().map(|table| table.name())) {
            if !old.scan(table, &[], 1).map_err(|error| self.engine(&error))?.is_empty() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    // ---- the log

    /// Proves the commits after the settled mark and copies them into a log file. Returns what they append, and the last one.
    fn log(
        &mut self,
        old: &Old,
        settled: CommitId,
        tip: CommitId,
        report: &mut UpgradeReport,
    ) -> Result<(HashMap<ConversationId, Unsettled>, CommitId), OpenError> {
        let mut unsettled = HashMap::new();
        let mut last = settled;
        let mut file: Option<Journal> = None;
        let from = commit_key(settled.number.saturating_add(1));
        let mut chunks = Scan::new(old, COMMITS, from);
        while let Some(found) = self.next_chunks(&mut chunks)? {
            let expected = last.number.saturating_add(1);
            if found.number != expected {
                let what =
                    format!("the commits from {expected} to {} are missing", found.number.saturating_sub(1));
                return Err(self.damaged(expected, what));
            }
            let (commit, bytes) = match assemble(&found.chunks) {
                Ok(whole) => whole,
                Err(NotWhole::Incomplete) if found.is_last && found.number > tip.number => {
                    tracing::warn!(
                        shard = %self.id, commit = found.number, "dropping a last commit that was never acknowledged"
                    );
                    break;
                }
                Err(NotWhole::Incomplete) => {
                    return Err(self.damaged(found.number, "chunks of it are missing".to_owned()));
                }
                Err(NotWhole::Malformed(what)) => return Err(self.damaged(found.number, what.to_string())),
            };
            if commit.id.number != found.number {
                let what = format!("commit {} lies in its place", commit.id.number);
                return Err(self.damaged(found.number, what));
            }
            if commit.previous != last.chain {
                let what = "it does not follow the commit before it (chain hash)".to_owned();
                return Err(self.damaged(found.number, what));
            }
            appends(&commit, &mut unsettled).map_err(|what| self.damaged(found.number, what.to_string()))?;
            let written = match &mut file {
                Some(file) => file.append(&bytes),
                none => Journal::begin(self.files, self.id, Durability::Power, settled, 0)
                    .and_then(|begun| none.insert(begun).append(&bytes)),
            };
            written.map_err(|error| self.io("a log file can't be written", &error))?;
            last = commit.id;
            report.commits += 1;
            self.read("copying the log", bytes.len());
        }
        if let Some(mut file) = file {
            file.sync().map_err(|error| self.io("a log file can't be synced", &error))?;
        }
        if last.number < tip.number {
            let what = format!("the log ends here, but commit {} was acknowledged", tip.number);
            return Err(self.damaged(last.number.saturating_add(1), what));
        }
        if last.number == tip.number && last.chain != tip.chain {
            let what = "it is not the commit that was acknowledged (chain hash)".to_owned();
            return Err(self.damaged(last.number, what));
        }
        Ok((unsettled, last))
    }

    /// The chunks of the next commit; `None` at the end.
    fn next_chunks(&self, rows: &mut Scan<'_>) -> Result<Option<Chunks>, OpenError> {
        let number_of = |key: &[u8]| {
            key::number_at(key, 0).map_err(|what| self.settled(format!("{what} in table {COMMITS}")))
        };
        let failed = |error: EngineError| self.engine(&error);
        let Some((key, _)) = rows.peek().map_err(failed)? else { return Ok(None) };
        let number = number_of(key)?;
        let mut chunks = Vec::new();
        while let Some((key, _)) = rows.peek().map_err(failed)? {
            if number_of(key)? != number {
                return Ok(Some(Chunks { number, chunks, is_last: false }));
            }
            chunks.extend(rows.take());
        }
        Ok(Some(Chunks { number, chunks, is_last: true }))
    }

    // ---- what is settled

    /// Copies the records of all conversations. Returns the heads that are ahead of the settled mark.
    fn records(
        &mut self,
        old: &Old,
        unsettled: &HashMap<ConversationId, Unsettled>,
        out: &mut Segments<'_>,
    ) -> Result<HashMap<ConversationId, PutBack>, OpenError> {
        let mut put_back = HashMap::new();
        let mut heads = Scan::new(old, Table::Head.name(), Vec::new());
        let mut blocks = Scan::new(old, BLOCKS, Vec::new());
        while let Some((key, value)) = heads.next().map_err(|error| self.engine(&error))? {
            let conversation = self.id_at(Table::Head.name(), &key, 0)?;
            let head = self.head(&key, &value)?;
            let log = unsettled.get(&conversation);
            self.skip_headless(&mut blocks, conversation, unsettled)?;
            let seq = log.map_or(head.seq, |log| head.seq.min(log.first.prev()));
            if let Some(log) = log
                && log.first.prev() != seq
            {
                let what = format!(
                    "conversation {conversation}: records from {} are missing",
                    seq.saturating_add(1)
                );
                return Err(self.settled(what));
            }
            let newest = self.conversation(&mut blocks, conversation, head.low, seq, out)?;
            if seq < head.seq {
                let (count, time) = newest.unwrap_or_else(|| (head.low_count, UnixMillis::default()));
                put_back.insert(conversation, PutBack { seq, count, time });
            }
        }
        let end = ConversationId::new(fulmar_protocol::limit::VARINT_MAX);
        if let Some(end) = end {
            self.skip_headless(&mut blocks, end, unsettled)?;
        }
        Ok(put_back)
    }

    /// Steps over blocks of conversations before `until` that have no head: settling them was interrupted.
    fn skip_headless(
        &self,
        blocks: &mut Scan<'_>,
        until: ConversationId,
        unsettled: &HashMap<ConversationId, Unsettled>,
    ) -> Result<(), OpenError> {
        while let Some((key, _)) = blocks.peek().map_err(|error| self.engine(&error))? {
            let conversation: ConversationId = self.id_at(BLOCKS, key, 0)?;
            if conversation >= until {
                return Ok(());
            }
            if unsettled.get(&conversation).is_none_or(|log| log.first != Seq::FIRST) {
                return Err(self.settled(format!("conversation {conversation} has records and no head")));
            }
            blocks.take();
        }
        Ok(())
    }

    /// Copies the records after `low` up to `last` of one conversation. Returns count and time of `last`, if it is among them.
    fn conversation(
        &mut self,
        blocks: &mut Scan<'_>,
        conversation: ConversationId,
        low: Seq,
        last: Seq,
        out: &mut Segments<'_>,
    ) -> Result<Option<(u64, UnixMillis)>, OpenError> {
        let mut newest = None;
        let mut next = low.saturating_add(1);
        while let Some(block) = self.next_block(blocks, conversation)? {
            self.read("copying records", block.bytes.len());
            // What ends at `low` or before is a leftover of retention; what begins after `last` one of settling.
            let following = self.block_at(blocks, conversation)?;
            let passed = following.is_some_and(|first| first <= next);
            if passed || block.first > last || next > last {
                continue;
            }
            let damaged = |what: Malformed| {
                self.settled(format!(
                    "conversation {conversation}, records from {}: {what}",
                    block.first.max(next)
                ))
            };
            for (record, encoded) in decode_block(conversation, &block).map_err(damaged)? {
                if record.seq < next || record.seq > last {
                    continue;
                }
                if record.seq > next {
                    break;
                }
                out.record(conversation, &record, &encoded)
                    .map_err(|error| self.io("a segment can't be written", &error))?;
                if record.seq == last {
                    newest = Some((record.count, record.time));
                }
                next = next.saturating_add(1);
            }
        }
        if next <= last {
            let what = format!("conversation {conversation}: records from {next} to {last} are missing");
            return Err(self.settled(what));
        }
        Ok(newest)
    }

    /// Where the next block of this conversation begins, if there is one.
    fn block_at(
        &self,
        blocks: &mut Scan<'_>,
        conversation: ConversationId,
    ) -> Result<Option<Seq>, OpenError> {
        let Some((key, _)) = blocks.peek().map_err(|error| self.engine(&error))? else { return Ok(None) };
        if self.id_at::<ConversationId>(BLOCKS, key, 0)? != conversation {
            return Ok(None);
        }
        self.id_at(BLOCKS, key, 1).map(Some)
    }

    /// The next block of this conversation, all chunks of it that there are.
    fn next_block(
        &self,
        blocks: &mut Scan<'_>,
        conversation: ConversationId,
    ) -> Result<Option<Block>, OpenError> {
        let Some(first) = self.block_at(blocks, conversation)? else { return Ok(None) };
        let mut bytes = Vec::new();
        let mut whole = true;
        for n in 0u16.. {
            if self.block_at(blocks, conversation)? != Some(first) {
                break;
            }
            let Some((key, chunk)) = blocks.take() else { break };
            whole &= chunk_of(&key) == Some(n);
            bytes.extend_from_slice(&chunk);
        }
        Ok(Some(Block { first, bytes: bytes.into(), whole }))
    }

    /// Copies all rows.
    fn rows(
        &mut self,
        old: &Old,
        put_back: &HashMap<ConversationId, PutBack>,
        out: &mut Segments<'_>,
    ) -> Result<(), OpenError> {
        for table in Table::ALL {
            if matches!(table, Table::Shard | Table::Run) {
                continue;
            }
            let mut rows = Scan::new(old, table.name(), Vec::new());
            while let Some((key, value)) = rows.next().map_err(|error| self.engine(&error))? {
                let mut row = open_row(table, &key, &value)
                    .map_err(|what| self.settled(format!("{what} in table {}", table.name())))?;
                if table == Table::Head
                    && let Some(to) = put_back.get(&self.id_at(table.name(), &key, 0)?)
                {
                    row = put_head_back(self.head(&key, &value)?, *to).to_row().into();
                }
                out.row(table, &key, &row).map_err(|error| self.io("a segment can't be written", &error))?;
                self.read("copying rows", key.len() + value.len());
            }
        }
        Ok(())
    }

    fn head(&self, key: &[u8], value: &Bytes) -> Result<Head, OpenError> {
        open_row(Table::Head, key, value)
            .and_then(|row| Head::from_row(&row))
            .map_err(|what| self.settled(format!("{what} in table {}", Table::Head.name())))
    }

    /// Reads a new segment from end to end.
    fn verify(&mut self, id: u64) -> Result<(), OpenError> {
        let bad =
            |what: String| self.settled(format!("the new segment {id:016x} is not what was written: {what}"));
        let opened = Segment::open(self.files, self.id, id).map_err(|error| bad(error.to_string()))?;
        let mut verifier = opened.verifier();
        loop {
            let step = verifier.step(VERIFY_STEP_BYTES);
            match step.map_err(|error| {
                self.settled(format!("the new segment {id:016x} is not what was written: {error}"))
            })? {
                segment::Progress::Done => return Ok(()),
                segment::Progress::More => self.tell("verifying", self.of),
            }
        }
    }

    // ---- progress and errors

    fn read(&mut self, doing: &'static str, bytes: usize) {
        self.done = self.done.saturating_add(bytes as u64);
        if self.told.elapsed() >= PROGRESS_EVERY || cfg!(test) {
            self.tell(doing, self.done.min(self.of));
        }
    }

    fn tell(&mut self, doing: &'static str, done: u64) {
        if self.told.elapsed() >= PROGRESS_EVERY {
            self.told = Instant::now();
            tracing::info!(shard = %self.id, doing, bytes = done, of = self.of, "upgrading from format 1");
        }
        (self.progress)(Progress { shard: self.id, doing, done, of: self.of });
    }

    fn id_at<T: TryFrom<u64>>(&self, table: &str, key: &[u8], n: usize) -> Result<T, OpenError> {
        let number = key::number_at(key, n).ok().and_then(|number| T::try_from(number).ok());
        number.ok_or_else(|| self.settled(format!("a key of table {table} is damaged")))
    }

    fn engine(&self, error: &EngineError) -> OpenError {
        OpenError::Engine { shard: self.id, reason: error.to_string() }
    }

    fn io(&self, doing: &str, error: &io::Error) -> OpenError {
        OpenError::Log { shard: self.id, reason: format!("{doing}: {error}") }
    }

    fn settled(&self, what: String) -> OpenError {
        OpenError::Settled { shard: self.id, what }
    }

    fn damaged(&self, commit: u64, what: String) -> OpenError {
        OpenError::Damaged { shard: self.id, commit, what }
    }
}

/// Segments that are being written, one after the other.
struct Segments<'a> {
    files: &'a dyn Files,
    id: ShardId,
    manifest: &'a mut Manifest,
    writer: Option<SegmentWriter>,
}

impl Segments<'_> {
    fn writer(&mut self) -> io::Result<&mut SegmentWriter> {
        if self.writer.is_none() {
            let id = self.manifest.next_segment;
            self.manifest.next_segment = id.saturating_add(1);
            self.writer = Some(SegmentWriter::create(self.files, self.id, id)?);
        }
        self.writer.as_mut().ok_or_else(|| io::Error::other("no segment was begun"))
    }

    fn record(&mut self, conversation: ConversationId, record: &Record, encoded: &[u8]) -> io::Result<()> {
        if self.writer.as_ref().is_some_and(|writer| writer.bytes_written() >= SEGMENT_BYTES) {
            self.finish()?;
        }
        self.writer()?.record(conversation, record.seq, record.time, encoded)
    }

    fn row(&mut self, table: Table, key: &[u8], row: &[u8]) -> io::Result<()> {
        self.writer()?.row(table as u8, key, Some(row))
    }

    /// Ends the segment that is being written, if there is one.
    fn finish(&mut self) -> io::Result<()> {
        let Some(writer) = self.writer.take() else { return Ok(()) };
        let summary: Summary = writer.finish(1..=self.manifest.settled.number)?;
        let entry = manifest::Entry::new(&summary, self.manifest.edition, Vec::new());
        self.manifest.segments.push(entry);
        Ok(())
    }
}

/// All rows of a table from a key on, in order.
struct Scan<'a> {
    old: &'a Old,
    table: &'a str,
    from: Vec<u8>,
    read: VecDeque<Entry>,
    end: bool,
}

impl<'a> Scan<'a> {
    fn new(old: &'a Old, table: &'a str, from: Vec<u8>) -> Self {
        Self { old, table, from, read: VecDeque::new(), end: false }
    }

    fn peek(&mut self) -> Result<Option<&Entry>, EngineError> {
        if self.read.is_empty() && !self.end {
            let rows = self.old.scan(self.table, &self.from, PAGE_ROWS)?;
            self.end = rows.len() < PAGE_ROWS;
            if let Some((key, _)) = rows.last() {
                self.from = next_key(key);
            }
            self.read = rows.into();
        }
        Ok(self.read.front())
    }

    /// The row that was peeked at.
    fn take(&mut self) -> Option<Entry> {
        self.read.pop_front()
    }

    fn next(&mut self) -> Result<Option<Entry>, EngineError> {
        self.peek()?;
        Ok(self.take())
    }
}

/// The chunks of one commit.
struct Chunks {
    number: u64,
    chunks: Vec<Entry>,
    /// No chunk of a later commit follows.
    is_last: bool,
}

/// Why chunks are not a commit.
enum NotWhole {
    /// Chunks are missing; those that are there may be as they were written.
    Incomplete,
    Malformed(Malformed),
}

/// A whole, verified commit out of its chunks, and its bytes.
fn assemble(chunks: &[Entry]) -> Result<(Commit, Bytes), NotWhole> {
    for (n, (key, _)) in chunks.iter().enumerate() {
        if chunk_of(key).ok_or(NotWhole::Malformed(Malformed("key")))? as usize != n {
            return Err(NotWhole::Incomplete);
        }
    }
    let Some((_, first)) = chunks.first() else { return Err(NotWhole::Incomplete) };
    let header = commit::Header::decode(first).map_err(NotWhole::Malformed)?;
    if chunks.len() < (commit::HEADER_BYTES + header.body_bytes).div_ceil(CHUNK_BYTES) {
        return Err(NotWhole::Incomplete);
    }
    let mut bytes = Vec::with_capacity(chunks.len() * CHUNK_BYTES);
    for (_, chunk) in chunks {
        bytes.extend_from_slice(chunk);
    }
    let bytes = Bytes::from(bytes);
    let commit = commit::decode(bytes.clone()).map_err(NotWhole::Malformed)?;
    Ok((commit, bytes))
}

/// Takes note of what a commit appends, and that its operations make sense.
fn appends(commit: &Commit, unsettled: &mut HashMap<ConversationId, Unsettled>) -> Result<(), Malformed> {
    let mut at = 0;
    let mut ops = 0u32;
    while at < commit.body.len() {
        let decoded = Op::decode(&commit.body.slice(at..))?;
        at += decoded.taken;
        ops = ops.saturating_add(1);
        let Op::Append { conversation, record } = decoded.op else { continue };
        let seq = record.seq;
        let known =
            unsettled.entry(conversation).or_insert_with(|| Unsettled { first: seq, last: seq.prev() });
        if known.last.next() != Some(seq) || seq == Seq::ZERO {
            return Err(Malformed("commit: a record out of place"));
        }
        known.last = seq;
    }
    if ops == commit.ops { Ok(()) } else { Err(Malformed("commit operation count")) }
}

/// A block's chunks.
struct Block {
    first: Seq,
    bytes: Bytes,
    /// The chunks are numbered from 0 without a gap.
    whole: bool,
}

/// The records of a block with the bytes each was read from, all verified.
fn decode_block(conversation: ConversationId, block: &Block) -> Result<Vec<(Record, Bytes)>, Malformed> {
    if !block.whole {
        return Err(Malformed("block: chunk"));
    }
    let mut at = Cursor::new(&block.bytes);
    if at.u8("block version")? != 1 {
        return Err(Malformed("block version"));
    }
    let count = at.varint("block record count")?;
    let length = at.varint("block length")?;
    let mut at = at.at();
    if count == 0 || (block.bytes.len() - at) as u64 != length {
        return Err(Malformed("block length"));
    }
    let mut records = Vec::new();
    let mut expected = block.first;
    while at < block.bytes.len() {
        let rest = block.bytes.slice(at..);
        let (record, taken) = Record::decode(conversation, &rest)?;
        if record.seq != expected {
            return Err(Malformed("block: a record out of place"));
        }
        expected = expected.next().ok_or(Malformed("block: seq"))?;
        records.push((record, rest.slice(..taken)));
        at += taken;
    }
    if records.len() as u64 != count {
        return Err(Malformed("block record count"));
    }
    Ok(records)
}

/// A head as it was at the settled mark, as far as replaying the log needs it: what is not put back, the log sets again.
fn put_head_back(head: Head, to: PutBack) -> Head {
    let mut head = Head { seq: to.seq, count: to.count, time: to.time, ..head };
    if head.low > to.seq {
        head.low = to.seq;
        head.low_count = to.count;
    }
    head
}

fn decode_settled(row: &[u8]) -> Result<CommitId, Malformed> {
    let mut at = Cursor::new(row);
    if at.u8("settled mark")? != 1 {
        return Err(Malformed("settled mark"));
    }
    let number = u64::from_be_bytes(at.array("settled mark")?);
    let chain = ChainHash(at.array("settled mark")?);
    Ok(CommitId { number, chain })
}

fn decode_counters(row: &[u8]) -> Result<Counters, Malformed> {
    let mut at = Cursor::new(row);
    if at.u8("counters")? != 1 {
        return Err(Malformed("counters"));
    }
    let mut next = || Ok::<_, Malformed>(u64::from_be_bytes(at.array("counters")?));
    Ok(Counters { users: next()?, conversations: next()?, epoch: next()? })
}

fn commit_key(number: u64) -> Vec<u8> {
    let mut key = number.to_be_bytes().to_vec();
    key.extend_from_slice(&[0; 2]);
    key
}

/// The chunk number at the end of a commit's or block's key.
fn chunk_of(key: &[u8]) -> Option<u16> {
    key.last_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small numbers")]
mod tests;
