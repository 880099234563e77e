//! Proving a data folder: every byte of it is read and compared with what must be there.
//!
//! - Files are only read. The engine alone opens its own files as it always does; nothing is asked of it but reads.
//! - Everything streams: memory is bounded by a block per segment, the members and producers of one conversation, and
//!   the part of the log that is not settled.
//! - What is wrong is told with its place, and the rest is looked at all the same.
//!
//! Not here: saving what is left of a folder that is damaged (`salvage`).

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    path::Path,
    sync::Arc,
    time::Instant,
};

use bytes::Bytes;
use fulmar_protocol::id::{ConversationId, DeviceId, Epoch, Pseq, Seq, ShardId, UnixMillis, UserId};
use serde::Serialize;

use super::{
    MaintainError, Progress,
    folder::{ReadFolder, shard_name},
};
use crate::shard::truth::{self, AllRuns, Part, TableRows, TrueRow, TrueRows};
use crate::{
    EngineKind, StoreOptions,
    codec::Malformed,
    commit::Commit,
    engine::{Direction, Engine, EngineError, place},
    error::OpenError,
    files::{Files, disk::Disk},
    key::{self, Key, Table},
    op::Op,
    row::{
        ConversationClass, ConversationMeta, Device, Head, LaneState, Listed, Member, Number, PendingLink,
        Row, User,
    },
    segment::{self, Progress as SegmentProgress, Run},
    shard::{
        index::{self, Distance},
        journal,
        manifest::{self, Manifest, ManifestError},
        segments::Placed,
        tip::{self, Tip},
        view::{next_key, open_row, seal_row},
    },
    store::open_engine,
};

/// Rows read from the engine at a time.
const PAGE_ROWS: usize = 256;

/// Names compared at a time: the tables are read once for each such part.
const NAMES_AT_ONCE: u64 = 200_000;

/// Bytes between two tellings of progress.
const TELL_EVERY: u64 = 4 << 20;

/// Bytes of a segment verified in one step.
const STEP_BYTES: usize = 4 << 20;

/// Whether something that is wrong can be made right without losing anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Repair {
    /// Nothing is lost, and nothing has to be done: the next start makes it right by itself.
    Start,
    /// Only the index is wrong: `fulmar store compact` makes it again from the segments, and so does a start after the
    /// shard's folder `index` was removed.
    Index,
    /// The log itself is damaged: restore a backup, or keep what proves itself with `fulmar store salvage`.
    No,
}

/// One thing that is not as it must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The shard; `None`: the folder as a whole.
    pub shard: Option<u16>,
    /// The file, relative to the data folder.
    pub file: String,
    /// The conversation, if it is about one.
    pub conversation: Option<ConversationId>,
    /// The first and the last record that are affected, if they are known.
    pub seqs: Option<(Seq, Seq)>,
    /// What is wrong.
    pub what: String,
    /// What can be done about it.
    pub repair: Repair,
}

/// What was found in one shard.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ShardVerified {
    /// The shard.
    pub shard: u16,
    /// Bytes of files that were read and compared.
    pub bytes: u64,
    /// Segments among them.
    pub segments: u64,
    /// Commits of the log that are not settled yet.
    pub commits: u64,
    /// The last commit of the log that proves itself.
    pub last_commit: u64,
    /// Bytes after it that no commit was acknowledged from: the end of a process or a power cut left them.
    pub torn_bytes: u64,
    /// Conversations.
    pub conversations: u64,
    /// Records.
    pub records: u64,
    /// Rows: the newest version of each.
    pub rows: u64,
    /// The index was compared with them. It is not if it is not there (a backup has none), was copied here, or lacks the last
    /// step: the next start makes it, or gives it that.
    pub index_compared: bool,
}

/// What [`verify`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Shard by shard.
    pub shards: Vec<ShardVerified>,
    /// What is wrong, at most [`PROBLEMS_MAX`] of it, in the order in which it was found.
    pub problems: Vec<Problem>,
    /// How much is wrong, with what is not listed.
    pub problem_count: u64,
    /// Bytes read per second.
    pub bytes_per_second: u64,
}

/// Problems that are listed in a report; more are only counted.
pub const PROBLEMS_MAX: usize = 1_000;

impl VerifyReport {
    /// Nothing is wrong.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.problem_count == 0
    }

    /// What is wrong can be made right without losing anything: by the next start, or by making indexes again.
    #[must_use]
    pub fn only_indexes(&self) -> bool {
        self.problem_count <= self.problems.len() as u64
            && self.problems.iter().all(|problem| problem.repair != Repair::No)
    }
}

/// Proves the data folder at `path`: every byte of its own files, that they fit together, and that the indexes are what
/// they must be. Nobody else may have it open.
///
/// # Errors
/// The folder can't be looked at. What is wrong inside of it stands in the report.
pub fn verify(
    path: impl AsRef<Path>,
    progress: &mut dyn FnMut(Progress),
) -> Result<VerifyReport, MaintainError> {
    let began = Instant::now();
    let folder = ReadFolder::hold(path.as_ref())?;
    let engine = EngineKind::from_name(&folder.marker.engine);
    let mut report = VerifyReport::default();
    if engine.is_none() {
        let what = format!("the engine {:?} is not known", folder.marker.engine);
        report.add(Problem::of_folder("FORMAT", what));
    }
    for (shard, at) in folder.shards() {
        if !at.is_dir() {
            report.add(Problem::of_folder(&shard_name(shard), "the folder of a shard is missing".to_owned()));
            continue;
        }
        let index = at.join(crate::store::INDEX);
        // One that was copied here is not used: the next start makes it again.
        let usable = engine.filter(|_| place::is_here(&index).unwrap_or(false));
        let engine =
            usable.map(|engine| open_engine(engine, &index, StoreOptions::default().engine_cache_bytes));
        let files = Disk::new(&at);
        let mut check = Check::new(shard, &files, &mut report, progress);
        check.shard(engine)?;
        let verified = check.verified;
        report.shards.push(verified);
    }
    let bytes: u64 = report.shards.iter().map(|shard| shard.bytes).sum();
    report.bytes_per_second = rate(bytes, began);
    Ok(report)
}

fn rate(bytes: u64, began: Instant) -> u64 {
    let millis = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
    bytes.saturating_mul(1_000) / millis
}

impl VerifyReport {
    fn add(&mut self, problem: Problem) {
        self.problem_count += 1;
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(problem);
        }
    }
}

impl Problem {
    fn of_folder(file: &str, what: String) -> Self {
        Self { shard: None, file: file.to_owned(), conversation: None, seqs: None, what, repair: Repair::No }
    }
}

/// What the unsettled log does to one conversation.
#[derive(Clone, Copy, Debug, Default)]
struct Logged {
    /// The first and the last record it appends.
    records: Option<(Seq, Seq)>,
    /// Up to where it says that records are gone.
    low: Seq,
}

/// One shard being verified.
struct Check<'a> {
    shard: ShardId,
    files: &'a dyn Files,
    report: &'a mut VerifyReport,
    progress: &'a mut dyn FnMut(Progress),
    verified: ShardVerified,
    log: HashMap<ConversationId, Logged>,
    done: u64,
    told: u64,
    of: u64,
}

/// What the runs of one conversation come to.
#[derive(Debug, Default)]
struct Seen {
    low: Seq,
    /// Records are there without a gap up to this one.
    covered: Seq,
    /// The index has them without a gap up to this one.
    indexed: Seq,
    /// The newest record that could be read: seq, count, time.
    newest: Option<(Seq, u64, UnixMillis)>,
    /// Epoch and number of the last record of every producer.
    lanes: BTreeMap<(UserId, DeviceId), (Epoch, Pseq)>,
}

impl<'a> Check<'a> {
    fn new(
        shard: ShardId,
        files: &'a dyn Files,
        report: &'a mut VerifyReport,
        progress: &'a mut dyn FnMut(Progress),
    ) -> Self {
        Self {
            shard,
            files,
            report,
            progress,
            verified: ShardVerified { shard: shard.get(), ..ShardVerified::default() },
            log: HashMap::new(),
            done: 0,
            told: 0,
            of: 0,
        }
    }

    // ---- telling

    fn file(&self, name: &str) -> String {
        format!("{}/{name}", shard_name(self.shard))
    }

    fn problem(&mut self, file: &str, what: impl Into<String>) {
        self.problem_in(file, None, None, what, Repair::No);
    }

    fn problem_in(
        &mut self,
        file: &str,
        conversation: Option<ConversationId>,
        seqs: Option<(Seq, Seq)>,
        what: impl Into<String>,
        repair: Repair,
    ) {
        let file = self.file(file);
        let shard = Some(self.shard.get());
        self.report.add(Problem { shard, file, conversation, seqs, what: what.into(), repair });
    }

    fn index_problem(&mut self, table: Table, conversation: Option<ConversationId>, what: &str) {
        let what = format!("table {}: {what}", table.name());
        self.problem_in(crate::store::INDEX, conversation, None, what, Repair::Index);
    }

    fn tell(&mut self, doing: &'static str, bytes: u64) {
        self.done += bytes;
        if self.done >= self.told + TELL_EVERY || self.told == 0 {
            self.told = self.done;
            let of = self.of.max(self.done);
            (self.progress)(Progress { shard: self.shard, doing, done: self.done, of });
        }
    }

    // ---- the files

    fn shard(&mut self, engine: Option<Result<Arc<dyn Engine>, EngineError>>) -> Result<(), MaintainError> {
        let name = shard_name(self.shard);
        let io = |error: std::io::Error| MaintainError::io("can't read the folder", Path::new(&name))(error);
        let listed = self.files.list().map_err(io)?;
        let (tip, damaged) = Tip::read(self.files).map_err(io)?;
        for what in damaged {
            let what = format!("one slot is unreadable ({what}); the next commits write it again");
            self.problem_in(tip::NAME, None, None, what, Repair::Start);
        }
        let (manifest, known) = match Manifest::load(self.files, self.shard) {
            Ok(manifest) => (manifest, true),
            Err(ManifestError::Io(error)) => return Err(io(error)),
            Err(ManifestError::Malformed(what)) => {
                self.problem(manifest::NAME, format!("it is damaged: {what}"));
                (Manifest::default(), false)
            }
        };
        let bytes_of = |wanted: &str| listed.iter().find(|(name, _)| name == wanted).map_or(0, |(_, n)| *n);
        let logs: u64 =
            listed.iter().filter(|(name, _)| journal::first_of(name).is_some()).map(|(_, n)| n).sum();
        self.verified.bytes += bytes_of(manifest::NAME) + bytes_of(tip::NAME);
        self.of = logs + manifest.segments.iter().map(|entry| entry.bytes).sum::<u64>();
        let has_manifest = listed.iter().any(|(name, _)| name == manifest::NAME);
        if !has_manifest {
            let segments = listed.iter().any(|(name, _)| name.ends_with(segment::SUFFIX));
            let log_from_1 = listed.iter().any(|(name, _)| journal::first_of(name) == Some(1));
            // A shard that never settled may have been interrupted in its first attempt; its log begins at 1.
            if segments && !log_from_1 {
                self.problem(manifest::NAME, "it is missing, but there are segments");
            }
        }
        if known {
            self.log(&manifest, tip);
        }
        let parts = self.open_segments(&manifest, known, &listed);
        let whole = known && parts.len() == manifest.segments.len();
        let engine = self.engine(engine, &manifest, whole);
        self.contents(&parts, engine, whole);
        Ok(())
    }

    /// Proves the log, and takes note of what it does to conversations.
    fn log(&mut self, manifest: &Manifest, tip: crate::CommitId) {
        let mut log = std::mem::take(&mut self.log);
        let mut commits = 0;
        let mut wrong: Vec<(u64, Wrong)> = Vec::new();
        let read = journal::Reader::new(self.files, self.shard, tip).read(manifest.settled, |commit| {
            commits += 1;
            if let Err(what) = note_commit(&mut log, &commit) {
                wrong.push((commit.id.number, what));
            }
            Ok(())
        });
        self.log = log;
        self.verified.commits = commits;
        let files = journal::list(self.files).unwrap_or_default();
        let after_settled = manifest.settled.number.saturating_add(1);
        let from = files.iter().rposition(|(first, _)| *first <= after_settled).unwrap_or(0);
        let bytes: u64 = files.iter().skip(from).map(|(_, bytes)| bytes).sum();
        let file_of = |commit: u64| {
            let file = files.iter().rev().find(|(first, _)| *first <= commit).or_else(|| files.first());
            file.map_or_else(|| "log".to_owned(), |(first, _)| journal::name(*first))
        };
        self.verified.bytes += bytes;
        self.tell("reading the log", bytes);
        match read {
            Ok(proven) => {
                self.verified.last_commit = proven.last.number;
                let headers = (files.len().saturating_sub(from) * journal::HEADER_BYTES) as u64;
                self.verified.torn_bytes = bytes.saturating_sub(proven.bytes + proven.room + headers);
            }
            Err(OpenError::Damaged { commit, what, .. }) => {
                self.verified.last_commit = commit.saturating_sub(1);
                self.problem(&file_of(commit), format!("commit {commit}: {what}"));
            }
            Err(error) => self.problem(&file_of(u64::MAX), error.to_string()),
        }
        for (commit, (conversation, seq, what)) in wrong {
            let seqs = seq.map(|seq| (seq, seq));
            let what = format!("commit {commit}: {what}");
            self.problem_in(&file_of(commit), conversation, seqs, what, Repair::No);
        }
    }

    /// Opens the segments that the manifest names, or, without one, all there are.
    fn open_segments(&mut self, manifest: &Manifest, known: bool, listed: &[(String, u64)]) -> Vec<Part> {
        let mut parts = Vec::new();
        if !known {
            let ids = listed.iter().filter_map(|(name, _)| segment_id(name)).collect::<Vec<_>>();
            for id in ids {
                match truth::open(self.files, self.shard, id, false) {
                    Ok(part) => parts.push(part),
                    Err(error) => self.problem(&segment::name(id), error.to_string()),
                }
            }
            return parts;
        }
        for entry in &manifest.segments {
            let name = segment::name(entry.id);
            let part = match truth::open(self.files, self.shard, entry.id, entry.cold.is_some()) {
                Ok(part) => part,
                Err(error) => {
                    self.problem(&name, error.to_string());
                    continue;
                }
            };
            let summary = *part.segment.summary();
            let same = summary.bytes == entry.bytes
                && (summary.first_commit, summary.last_commit) == (entry.first_commit, entry.last_commit)
                && (summary.runs, summary.rows, summary.records) == (entry.runs, entry.rows, entry.records)
                && (summary.run_bytes, summary.oldest, summary.newest)
                    == (entry.run_bytes, entry.oldest, entry.newest);
            if same {
                parts.push(part);
            } else {
                self.problem(&name, "its footer does not say what the manifest says of it");
            }
        }
        parts
    }

    /// The engine, if its rows can be compared.
    fn engine(
        &mut self,
        engine: Option<Result<Arc<dyn Engine>, EngineError>>,
        manifest: &Manifest,
        whole: bool,
    ) -> Option<Arc<dyn Engine>> {
        let engine = match engine? {
            Ok(engine) => engine,
            Err(error) => {
                let what = format!("it can't be opened: {error}");
                self.problem_in(crate::store::INDEX, None, None, what, Repair::Start);
                return None;
            }
        };
        if !whole {
            return None;
        }
        match index::distance(engine.as_ref(), manifest) {
            Ok(Distance::Here) => {
                self.verified.index_compared = true;
                Some(engine)
            }
            Ok(Distance::OneStep) => None,
            Ok(Distance::Far) => {
                let what = "it is not of what is settled: the next start makes it again";
                self.problem_in(crate::store::INDEX, None, None, what, Repair::Start);
                None
            }
            Err(error) => {
                let what = format!("it can't be read: {error}");
                self.problem_in(crate::store::INDEX, None, None, what, Repair::Start);
                None
            }
        }
    }

    // ---- what they hold

    fn contents(&mut self, parts: &[Part], engine: Option<Arc<dyn Engine>>, whole: bool) {
        for part in parts.iter().filter(|part| part.cold) {
            self.cold(part);
        }
        let mut rows = TrueRows::new(parts);
        let mut marks: HashMap<u8, TrueRows> = HashMap::new();
        let mut names = 0u64;
        let mut engine = engine;
        let mut walked = 0;
        for table in Table::ALL {
            marks.insert(table as u8, rows.clone());
            if table == Table::Run {
                break;
            }
            let mut stored = match (&engine, table) {
                (None, _) | (_, Table::Shard) => None,
                (Some(engine), _) => Some(Pages::new(Arc::clone(engine), table)),
            };
            while let Some(row) = rows.next_up_to(table as u8) {
                self.verified.rows += 1;
                names += u64::from(table == Table::Name);
                let bytes = std::mem::replace(&mut walked, rows.bytes);
                self.tell("checking rows", rows.bytes - bytes);
                if row.table != table as u8 || table == Table::Shard {
                    self.problem(&segment::name(row.segment), format!("a row of table {}", row.table));
                    continue;
                }
                if let Err(what) = row_makes_sense(self.shard, table, &row) {
                    let what = format!("a row of table {}: {what}", table.name());
                    self.problem(&segment::name(row.segment), what);
                }
                if let Some(pages) = &mut stored
                    && let Err(error) = self.compare(pages, &row)
                {
                    self.engine_failed(&mut engine, &mut stored, &error);
                }
            }
            if let Some(pages) = &mut stored {
                loop {
                    match pages.next() {
                        Ok(Some((key, _))) => self.too_many(table, &key),
                        Ok(None) => break,
                        Err(error) => {
                            self.engine_failed(&mut engine, &mut stored, &error);
                            break;
                        }
                    }
                }
            }
        }
        while let Some(row) = rows.next_up_to(u8::MAX) {
            self.problem(&segment::name(row.segment), format!("a row of table {}", row.table));
        }
        let broken = rows.take_broken();
        let followed = whole && broken.is_empty();
        for (id, what) in broken {
            self.problem(&segment::name(id), what);
        }
        self.runs(parts, &marks, engine.filter(|_| followed), followed);
        if followed {
            self.devices(&marks);
            self.names(&marks, names);
        }
        for part in parts {
            self.verified.segments += 1;
            self.verified.bytes += part.segment.summary().bytes;
        }
        (self.progress)(Progress { shard: self.shard, doing: "checked", done: self.of, of: self.of });
    }

    /// The file of a cold segment. What lies in the cold tier is not looked at.
    fn cold(&mut self, part: &Part) {
        let mut verifier = part.segment.verifier();
        loop {
            match verifier.step(STEP_BYTES) {
                Ok(SegmentProgress::More) => {}
                Ok(SegmentProgress::Done) => return,
                // Rows and runs that can't be followed are told of when they are walked through.
                Err(damage) if damage.conversation.is_none() => {}
                Err(damage) => {
                    let seqs = damage.seqs.as_ref().map(|seqs| (*seqs.start(), *seqs.end()));
                    let what = damage.what.to_string();
                    self.problem_in(&segment::name(part.id), damage.conversation, seqs, what, Repair::No);
                }
            }
        }
    }

    fn engine_failed(
        &mut self,
        engine: &mut Option<Arc<dyn Engine>>,
        stored: &mut Option<Pages>,
        error: &EngineError,
    ) {
        *engine = None;
        *stored = None;
        self.verified.index_compared = false;
        let what = format!("it can't be read: {error}");
        self.problem_in(crate::store::INDEX, None, None, what, Repair::Index);
    }

    /// Compares the engine's rows up to that of `row` with what they must be.
    fn compare(&mut self, pages: &mut Pages, row: &TrueRow) -> Result<(), EngineError> {
        let table = pages.table;
        loop {
            let Some((key, value)) = pages.peek()? else {
                self.index_problem(
                    table,
                    conversation_of(table, &row.key),
                    &format!("{} is missing", named(&row.key)),
                );
                return Ok(());
            };
            match key.as_slice().cmp(&row.key) {
                std::cmp::Ordering::Less => {
                    let key = key.clone();
                    pages.next()?;
                    self.too_many(table, &key);
                }
                std::cmp::Ordering::Greater => {
                    let what = format!("{} is missing", named(&row.key));
                    self.index_problem(table, conversation_of(table, &row.key), &what);
                    return Ok(());
                }
                std::cmp::Ordering::Equal => {
                    let right = seal_row(table, &row.key, &row.row);
                    let same = *value == right;
                    let legible = open_row(table, &row.key, value).is_ok();
                    pages.next()?;
                    if !same {
                        let how = if legible { "is not the newest" } else { "is damaged" };
                        let what = format!("{} {how}", named(&row.key));
                        self.index_problem(table, conversation_of(table, &row.key), &what);
                    }
                    return Ok(());
                }
            }
        }
    }

    fn too_many(&mut self, table: Table, key: &[u8]) {
        self.index_problem(table, conversation_of(table, key), &format!("{} must not be there", named(key)));
    }

    // ---- conversations

    /// Walks through all runs, with heads, members, lanes and the index beside them.
    fn runs(
        &mut self,
        parts: &[Part],
        marks: &HashMap<u8, TrueRows>,
        engine: Option<Arc<dyn Engine>>,
        followed: bool,
    ) {
        let rows_of = |table: Table| {
            let rows = marks.get(&(table as u8)).filter(|_| followed).cloned();
            TableRows::new(rows.unwrap_or_else(|| TrueRows::new(&[])), table as u8)
        };
        let mut heads = rows_of(Table::Head);
        let mut members = rows_of(Table::Member);
        let mut lanes = rows_of(Table::Lane);
        let mut stored = engine.map(|engine| Pages::new(engine, Table::Run));
        let mut runs = AllRuns::new(parts);
        let mut oldest: HashMap<u64, Option<UnixMillis>> = parts.iter().map(|part| (part.id, None)).collect();
        let mut unread: HashSet<u64> = parts.iter().filter(|p| p.cold).map(|p| p.id).collect();
        loop {
            let of_row = |row: Option<&TrueRow>| row.and_then(|row| id_at::<ConversationId>(&row.key, 0));
            let next = [
                runs.peek().map(|run| run.conversation),
                of_row(heads.peek()),
                of_row(members.peek()),
                of_row(lanes.peek()),
            ];
            let Some(conversation) = next.into_iter().flatten().min() else { break };
            let prefix = Key::conversation(conversation);
            let row = heads.take_of(prefix.as_ref());
            let in_file = row.as_ref().map(|row| segment::name(row.segment));
            let head = row.and_then(|row| Head::from_row(&row.row).ok());
            let logged = self.log.remove(&conversation).unwrap_or_default();
            let low = head.map_or(Seq::ZERO, |head| head.low);
            let mut seen = Seen { low, covered: low, indexed: low, ..Seen::default() };
            while runs.peek().is_some_and(|run| run.conversation == conversation) {
                let Some((part, run)) = runs.take() else { break };
                let mut there = vec![(part, run)];
                while runs
                    .peek()
                    .is_some_and(|next| (next.conversation, next.first) == (conversation, run.first))
                {
                    there.extend(runs.take());
                }
                for (part, run) in &there {
                    self.run(part, run, &mut seen, &mut oldest, &mut unread);
                }
                if let Some(pages) = &mut stored
                    && let Err(error) = self.placed(pages, &there, &mut seen)
                {
                    self.engine_failed(&mut None, &mut stored, &error);
                }
            }
            self.verified.conversations += 1;
            if !followed {
                continue;
            }
            let mut count = 0;
            while members.take_of(prefix.as_ref()).is_some() {
                count += 1;
            }
            self.head(conversation, head, in_file.as_deref(), logged, &seen, count);
            if stored.is_some() && head.is_some_and(|head| seen.indexed < head.seq) {
                let what = format!("no row for the run with record {}", seen.indexed.saturating_add(1));
                self.index_problem(Table::Run, Some(conversation), &what);
            }
            self.lanes(conversation, &mut lanes, seen);
        }
        if let Some(mut pages) = stored {
            loop {
                match pages.next() {
                    Ok(Some((key, _))) => self.too_many(Table::Run, &key),
                    Ok(None) => break,
                    Err(error) => {
                        self.engine_failed(&mut None, &mut None, &error);
                        break;
                    }
                }
            }
        }
        for (id, what) in runs.take_broken() {
            unread.insert(id);
            self.problem(&segment::name(id), what);
        }
        for part in parts.iter().filter(|part| !unread.contains(&part.id)) {
            let found = oldest.get(&part.id).copied().flatten().unwrap_or_default();
            if found != part.segment.summary().oldest {
                self.problem(&segment::name(part.id), "its footer has another time of the oldest record");
            }
        }
        // Conversations that are in the log only.
        let mut rest: Vec<_> = std::mem::take(&mut self.log).into_iter().collect();
        rest.sort_unstable_by_key(|(conversation, _)| *conversation);
        for (conversation, logged) in rest {
            self.verified.conversations += 1;
            if followed {
                self.follows(conversation, Head::default(), logged);
            }
        }
    }

    /// Reads a run and everything in it.
    fn run(
        &mut self,
        part: &Part,
        run: &Run,
        seen: &mut Seen,
        oldest: &mut HashMap<u64, Option<UnixMillis>>,
        unread: &mut HashSet<u64>,
    ) {
        let gap = run.first > seen.covered.saturating_add(1) && run.last() > seen.low;
        if gap {
            let missing = (seen.covered.saturating_add(1), run.first.prev());
            let what = "records are missing";
            self.problem_in(&segment::name(part.id), Some(run.conversation), Some(missing), what, Repair::No);
        }
        seen.covered = seen.covered.max(run.last());
        self.verified.records += run.count;
        self.tell("checking records", u64::from(run.bytes));
        if part.cold {
            return;
        }
        let mut read = || -> Result<(), segment::SegmentError> {
            let bytes = part.segment.run(run)?;
            for record in segment::records(run, &bytes, Seq::ZERO) {
                let (record, _) = record?;
                if record.seq == run.first
                    && let Some(oldest) = oldest.get_mut(&part.id)
                {
                    *oldest = Some(oldest.map_or(record.time, |other| other.min(record.time)));
                }
                if seen.newest.is_none_or(|(seq, ..)| seq <= record.seq) {
                    seen.newest = Some((record.seq, record.count, record.time));
                }
                if record.pseq > Pseq::ZERO {
                    let lane = seen.lanes.entry((record.sender, record.device)).or_default();
                    *lane = (*lane).max((record.epoch, record.pseq));
                }
            }
            Ok(())
        };
        if let Err(error) = read() {
            unread.insert(part.id);
            let seqs = Some((run.first, run.last()));
            let what = error.to_string();
            self.problem_in(&segment::name(part.id), Some(run.conversation), seqs, what, Repair::No);
        }
    }

    /// Compares the index' row for runs that begin at one record; `there`: all runs that do.
    fn placed(
        &mut self,
        pages: &mut Pages,
        there: &[(Part, Run)],
        seen: &mut Seen,
    ) -> Result<(), EngineError> {
        let Some((_, first)) = there.first() else { return Ok(()) };
        let key = Key::run(first.conversation, first.first);
        while let Some((stored, _)) = pages.peek()? {
            if stored.as_slice() >= key.as_ref() {
                break;
            }
            let stored = stored.clone();
            pages.next()?;
            self.too_many(Table::Run, &stored);
        }
        let Some((_, value)) = pages.peek()?.filter(|(stored, _)| stored.as_slice() == key.as_ref()) else {
            return Ok(());
        };
        let decoded = open_row(Table::Run, key.as_ref(), value)
            .and_then(|row| Placed::decode(first.conversation, first.first, &row));
        pages.next()?;
        let conversation = Some(first.conversation);
        match decoded {
            Err(what) => {
                let what = format!("{} is damaged ({what})", named(key.as_ref()));
                self.index_problem(Table::Run, conversation, &what);
            }
            Ok(placed) if there.iter().any(|(part, run)| part.id == placed.segment && *run == placed.run) => {
                let run = placed.run;
                if run.first > seen.indexed.saturating_add(1) && run.last() > seen.low {
                    let what = format!("no row for the run with record {}", seen.indexed.saturating_add(1));
                    self.index_problem(Table::Run, conversation, &what);
                }
                seen.indexed = seen.indexed.max(run.last());
            }
            Ok(placed) => {
                let what = format!(
                    "{} says segment {:016x}, where no such run lies",
                    named(key.as_ref()),
                    placed.segment
                );
                self.index_problem(Table::Run, conversation, &what);
            }
        }
        Ok(())
    }

    fn head(
        &mut self,
        conversation: ConversationId,
        head: Option<Head>,
        in_file: Option<&str>,
        logged: Logged,
        seen: &Seen,
        members: u64,
    ) {
        let file = in_file.unwrap_or(manifest::NAME);
        let at = Some(conversation);
        let Some(head) = head else {
            let what = "its head is missing or unreadable";
            self.problem_in(file, at, Some((Seq::FIRST, seen.covered)), what, Repair::No);
            return;
        };
        if seen.covered < head.seq {
            let missing = Some((seen.covered.saturating_add(1), head.seq));
            self.problem_in(file, at, missing, "records are missing at the end", Repair::No);
        }
        if seen.covered > head.seq && seen.covered > seen.low {
            let more = Some((head.seq.saturating_add(1), seen.covered));
            self.problem_in(file, at, more, "there are records after its head", Repair::No);
        }
        if let Some((seq, count, time)) = seen.newest
            && seq == head.seq
            && (count, time) != (head.count, head.time)
        {
            let what = "count and time of its head are not those of its last record";
            self.problem_in(file, at, Some((seq, seq)), what, Repair::No);
        }
        if head.members != members {
            let what = format!("its head says {} members, there are {members}", head.members);
            self.problem_in(file, at, None, what, Repair::No);
        }
        self.follows(conversation, head, logged);
    }

    /// Whether the log goes on where what is settled ends.
    fn follows(&mut self, conversation: ConversationId, head: Head, logged: Logged) {
        if let Some((first, _)) = logged.records
            && Some(first) != head.seq.next()
        {
            let what = format!("the log goes on at record {first}, what is settled ends at {}", head.seq);
            self.problem_in("log", Some(conversation), Some((first, first)), what, Repair::No);
        }
        let end = logged.records.map_or(head.seq, |(_, last)| last.max(head.seq));
        if logged.low > end {
            let what = format!("the log says that records up to {} are gone, it ends at {end}", logged.low);
            self.problem_in("log", Some(conversation), None, what, Repair::No);
        }
    }

    /// Compares the lanes of a conversation with what its records show.
    fn lanes(&mut self, conversation: ConversationId, rows: &mut TableRows, mut seen: Seen) {
        while let Some(row) = rows.take_of(Key::conversation(conversation).as_ref()) {
            let (Some(user), Some(device)) = (id_at(&row.key, 1), id_at(&row.key, 2)) else { continue };
            let Ok(lane) = LaneState::from_row(&row.row) else { continue };
            let Some((epoch, pseq)) = seen.lanes.remove(&(user, device)) else { continue };
            if (lane.epoch, lane.last) < (epoch, pseq) {
                let what = format!(
                    "the lane of user {user}, device {device} ends at {} in epoch {}, its records at {pseq} in epoch {epoch}",
                    lane.last, lane.epoch
                );
                self.problem_in(&segment::name(row.segment), Some(conversation), None, what, Repair::No);
            }
        }
        for ((user, device), _) in seen.lanes {
            let what = format!("the lane of user {user}, device {device} is missing");
            self.problem_in(manifest::NAME, Some(conversation), None, what, Repair::No);
        }
    }

    // ---- what is found by two keys

    /// Devices by number and by uid.
    fn devices(&mut self, marks: &HashMap<u8, TrueRows>) {
        let rows_of = |table: Table| {
            let rows = marks.get(&(table as u8)).cloned();
            TableRows::new(rows.unwrap_or_else(|| TrueRows::new(&[])), table as u8)
        };
        let (mut devices, mut uids) = (rows_of(Table::Device), rows_of(Table::Uid));
        loop {
            let user =
                [devices.peek(), uids.peek()].into_iter().flatten().filter_map(|row| row.key.get(..8)).min();
            let Some(user) = user.map(<[u8]>::to_vec) else { return };
            let mut of_user: HashMap<u64, (u64, Option<Device>)> = HashMap::new();
            while let Some(row) = devices.take_of(&user) {
                let number = key::number_at(&row.key, 1).unwrap_or_default();
                of_user.insert(number, (row.segment, Device::from_row(&row.row).ok()));
            }
            let mut found = HashSet::new();
            while let Some(row) = uids.take_of(&user) {
                let Ok(Number(number)) = Number::from_row(&row.row) else { continue };
                let device = of_user.get(&number).and_then(|(_, device)| *device);
                let uid = row.key.get(8..).unwrap_or_default();
                if device.is_none_or(|device| device.uid.0 != uid) {
                    let what = format!(
                        "{} of table uid leads to device {number}, which is another",
                        named(&row.key)
                    );
                    self.problem(&segment::name(row.segment), what);
                }
                found.insert(uid.to_vec());
            }
            for (number, (segment, device)) in of_user {
                if device.is_some_and(|device| !found.contains(&device.uid.0[..])) {
                    let what = format!("device {number} of user {} is not found by its uid", named(&user));
                    self.problem(&segment::name(segment), what);
                }
            }
        }
    }

    /// Users and conversations by number and by name, a part of the names at a time.
    fn names(&mut self, marks: &HashMap<u8, TrueRows>, names: u64) {
        let parts = names / NAMES_AT_ONCE + 1;
        let rows_of = |table: Table| {
            let rows = marks.get(&(table as u8)).cloned();
            TableRows::new(rows.unwrap_or_else(|| TrueRows::new(&[])), table as u8)
        };
        for part in 0..parts {
            let mine = |key: &[u8]| xxhash_rust::xxh3::xxh3_64(key) % parts == part;
            // Name → number and the segment that says so; those that are found are taken out.
            let mut known: HashMap<Bytes, (u64, u64)> = HashMap::new();
            let mut rows = rows_of(Table::Name);
            while let Some(row) = rows.take() {
                if mine(&row.key)
                    && let Ok(Number(number)) = Number::from_row(&row.row)
                {
                    known.insert(row.key, (number, row.segment));
                }
            }
            for table in [Table::User, Table::Conversation] {
                let mut rows = rows_of(table);
                while let Some(row) = rows.take() {
                    let Some((number, name)) = name_of(table, &row) else { continue };
                    if !mine(name.as_ref()) {
                        continue;
                    }
                    let leads_to = known.remove(name.as_ref());
                    if leads_to.is_none_or(|(leads_to, _)| leads_to != number) {
                        let what = match leads_to {
                            Some((other, _)) => {
                                format!("the name of {} {number} leads to {other}", table.name())
                            }
                            None => format!("{} {number} is not found by its name", table.name()),
                        };
                        self.problem(&segment::name(row.segment), what);
                    }
                }
            }
            // Former names stay and lead to whoever had them.
            let mut rest: HashMap<(bool, u64), u64> = known
                .into_iter()
                .map(|(key, (number, segment))| ((key.get(8) == Some(&key::KIND_USER), number), segment))
                .collect();
            if rest.is_empty() {
                continue;
            }
            for (table, user) in [(Table::User, true), (Table::Conversation, false)] {
                let mut rows = rows_of(table);
                while let Some(row) = rows.take() {
                    rest.remove(&(user, key::number_at(&row.key, 0).unwrap_or_default()));
                }
            }
            for ((user, number), segment) in rest {
                let whose = if user { "user" } else { "conversation" };
                self.problem(
                    &segment::name(segment),
                    format!("a name leads to {whose} {number}, which is not there"),
                );
            }
        }
    }
}

/// Whether a row makes sense to its table and the shard.
pub(crate) fn row_makes_sense(shard: ShardId, table: Table, row: &TrueRow) -> Result<(), Malformed> {
    let key = &row.key;
    let number = |n| key::number_at(key, n);
    let numbers = |n: usize| if key.len() == n * 8 { Ok(()) } else { Err(Malformed("key")) };
    let conversation_here = || {
        let id = ConversationId::new(number(0)?).ok_or(Malformed("key"))?;
        if id.shard() == shard { Ok(()) } else { Err(Malformed("key: it is of another shard")) }
    };
    let user_here = || {
        let id = UserId::new(number(0)?).ok_or(Malformed("key"))?;
        if id.shard() == shard { Ok(()) } else { Err(Malformed("key: it is of another shard")) }
    };
    let row = &row.row;
    match table {
        Table::Head => numbers(1).and_then(|()| conversation_here()).and_then(|()| {
            let head = Head::from_row(row)?;
            if head.low > head.seq { Err(Malformed("head row: low is beyond the head")) } else { Ok(()) }
        }),
        Table::Conversation => numbers(1)
            .and_then(|()| conversation_here())
            .and_then(|()| ConversationMeta::from_row(row).map(drop)),
        Table::Name => {
            if key.len() > 9 {
                Number::from_row(row).map(drop)
            } else {
                Err(Malformed("key"))
            }
        }
        Table::User => numbers(1).and_then(|()| user_here()).and_then(|()| User::from_row(row).map(drop)),
        Table::Member => {
            numbers(2).and_then(|()| conversation_here()).and_then(|()| Member::from_row(row).map(drop))
        }
        Table::Listed => numbers(2).and_then(|()| user_here()).and_then(|()| Listed::from_row(row).map(drop)),
        Table::Device => numbers(2).and_then(|()| user_here()).and_then(|()| Device::from_row(row).map(drop)),
        Table::Uid => numbers(3).and_then(|()| user_here()).and_then(|()| Number::from_row(row).map(drop)),
        Table::ClassEpoch => {
            if key.len() != 9 {
                return Err(Malformed("key"));
            }
            user_here().and_then(|()| Number::from_row(row).map(drop))
        }
        Table::Recv => numbers(3).and_then(|()| user_here()).and_then(|()| Number::from_row(row).map(drop)),
        Table::Read => {
            numbers(2).and_then(|()| conversation_here()).and_then(|()| Number::from_row(row).map(drop))
        }
        Table::Lane => {
            numbers(3).and_then(|()| conversation_here()).and_then(|()| LaneState::from_row(row).map(drop))
        }
        Table::Link => numbers(2).and_then(|()| conversation_here()).and_then(|()| {
            let link = PendingLink::from_row(row)?;
            if Key::conversation_user(link.conversation, link.user).as_ref() == key.as_ref() {
                Ok(())
            } else {
                Err(Malformed("link row: it is not under its key"))
            }
        }),
        Table::Shard | Table::Run => Err(Malformed("table")),
    }
}

/// The name key under which a user or a conversation must be found, and its number.
pub(crate) fn name_of(table: Table, row: &TrueRow) -> Option<(u64, Key)> {
    let number = key::number_at(&row.key, 0).ok()?;
    match table {
        Table::User => {
            let user = User::from_row(&row.row).ok()?;
            Some((number, Key::name(user.app, key::KIND_USER, &user.name)))
        }
        Table::Conversation => {
            let meta = ConversationMeta::from_row(&row.row).ok()?;
            let class: ConversationClass = meta.class;
            Some((number, Key::name(meta.app, key::kind_of(class), &meta.name)))
        }
        _ => None,
    }
}

/// Conversation, record, and what is wrong.
type Wrong = (Option<ConversationId>, Option<Seq>, String);

/// Takes note of what a commit does to conversations.
fn note_commit(log: &mut HashMap<ConversationId, Logged>, commit: &Commit) -> Result<(), Wrong> {
    let mut at = 0;
    let mut ops = 0u32;
    while at < commit.body.len() {
        let decoded = Op::decode(&commit.body.slice(at..)).map_err(|what| (None, None, what.to_string()))?;
        at += decoded.taken;
        ops = ops.saturating_add(1);
        match decoded.op {
            Op::Append { conversation, record } => {
                let logged = log.entry(conversation).or_default();
                let first = logged.records.map_or(record.seq, |(first, _)| first);
                if let Some((_, last)) = logged.records
                    && last.next() != Some(record.seq)
                {
                    let what = format!("a record that does not follow {last}");
                    return Err((Some(conversation), Some(record.seq), what));
                }
                logged.records = Some((first, record.seq));
            }
            Op::Low { conversation, low, .. } => {
                let logged = log.entry(conversation).or_default();
                logged.low = logged.low.max(low);
            }
            _ => {}
        }
    }
    if ops == commit.ops {
        Ok(())
    } else {
        Err((None, None, "it has not as many operations as it says".to_owned()))
    }
}

/// The id in a segment's name.
pub(crate) fn segment_id(name: &str) -> Option<u64> {
    let id = u64::from_str_radix(name.strip_suffix(segment::SUFFIX)?, 16).ok()?;
    (segment::name(id) == name).then_some(id)
}

pub(crate) fn id_at<T: TryFrom<u64>>(key: &[u8], n: usize) -> Option<T> {
    T::try_from(key::number_at(key, n).ok()?).ok()
}

fn conversation_of(table: Table, key: &[u8]) -> Option<ConversationId> {
    let at = match table {
        Table::Head
        | Table::Conversation
        | Table::Member
        | Table::Read
        | Table::Lane
        | Table::Link
        | Table::Run => 0,
        Table::Listed => 1,
        Table::Recv => 2,
        Table::Name | Table::User | Table::Device | Table::Uid | Table::ClassEpoch | Table::Shard => {
            return None;
        }
    };
    id_at(key, at)
}

/// A key as it is told to people.
fn named(key: &[u8]) -> String {
    let mut text = String::from("row ");
    for byte in key.iter().take(40) {
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// The engine's rows of one table, in order.
struct Pages {
    engine: Arc<dyn Engine>,
    table: Table,
    rows: VecDeque<(Vec<u8>, Bytes)>,
    from: Vec<u8>,
    ended: bool,
}

impl Pages {
    fn new(engine: Arc<dyn Engine>, table: Table) -> Self {
        Self { engine, table, rows: VecDeque::new(), from: Vec::new(), ended: false }
    }

    fn peek(&mut self) -> Result<Option<&(Vec<u8>, Bytes)>, EngineError> {
        if self.rows.is_empty() && !self.ended {
            let page = self.engine.scan(self.table, &self.from, None, Direction::Ascending, PAGE_ROWS)?;
            self.ended = page.len() < PAGE_ROWS;
            if let Some((last, _)) = page.last() {
                self.from = next_key(last);
            }
            self.rows = page.into();
        }
        Ok(self.rows.front())
    }

    fn next(&mut self) -> Result<Option<(Vec<u8>, Bytes)>, EngineError> {
        self.peek()?;
        Ok(self.rows.pop_front())
    }
}
