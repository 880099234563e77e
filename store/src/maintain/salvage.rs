//! Saving what is left of a damaged data folder into a new one.
//!
//! - Nothing is taken over that does not prove itself: runs by their checksums and those of their records, rows by those of
//!   their blocks, commits by chaining from what is settled. Commits behind one that does not are not taken.
//! - A conversation's log has no holes. Of one with records missing in between the newest part is kept: `low` moves to the
//!   end of the gap, and readers are told that what came before is gone, as they are by retention.
//! - Where records are missing at the end, and are known to have been there, empty notices take their places: numbers that
//!   devices have seen are never given again.
//! - Heads, lanes, counts of members, names and uids are worked out again from what is there where rows are missing.
//! - Segments of the cold tier are taken over as they are, if their files are whole.
//! - Of a segment whose header, footer or lists are damaged, the blocks of its index and of its rows are looked for everywhere in
//!   the file; each proves itself.
//! - The new folder is one that `verify` finds sound. Where a row's newest version is lost an older one may stand; the report
//!   names the segment.
//!
//! Not here: finding out whether a folder is damaged (`verify`).

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs, io,
    path::Path,
};

use bytes::Bytes;
use fulmar_protocol::{
    id::{ConversationId, DeviceId, Epoch, Pseq, Seq, ShardId, UnixMillis, UserId},
    limit::SHARDS_MAX,
};
use serde::Serialize;

use super::{
    MaintainError, Progress,
    folder::{self, shard_name},
    verify::{PROBLEMS_MAX, id_at, name_of, row_makes_sense, segment_id},
};
use crate::shard::truth::{self, AllRuns, Part, TableRows, TrueRow, TrueRows};
use crate::{
    Durability, EngineKind,
    commit::{self, ChainHash, Commit, CommitId},
    files::{Files, disk::Disk},
    format::{self, FORMAT_VERSION, Folder},
    key::{self, Key, Table},
    op::Op,
    record::{Record, RecordKind},
    row::{Device, Head, LaneState, Number, Row},
    segment::{self, SegmentWriter},
    shard::{
        journal::{self, Journal},
        manifest::{Entry, Manifest},
        overlay::{Counters, full_key},
        tip::Tip,
    },
};

/// Notices that may take the places of records missing at the end of one conversation. If more are missing, all of them are
/// gone, and what came before.
const NOTICES_MAX: u64 = 100_000;

/// Commits looked at to find the chain hash of the last settled one.
const SEARCHED_COMMITS: usize = 2;

const MARKER: &str = "FORMAT";

/// Where the marker is made when the old one can't be copied.
const MARKER_FOLDER: &str = "marker.new";

/// Records of one conversation that are gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Lost {
    /// The shard.
    pub shard: u16,
    /// The conversation.
    pub conversation: ConversationId,
    /// The first and the last record that are gone.
    pub seqs: (Seq, Seq),
    /// Why.
    pub what: String,
}

/// What [`salvage`] saved of one shard.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ShardSalvaged {
    /// The shard.
    pub shard: u16,
    /// Conversations with records or a head in the new folder, those that are in the log only aside.
    pub conversations: u64,
    /// Records in the new folder's segments, notices that take the place of others included.
    pub records: u64,
    /// Rows in the new folder's segments.
    pub rows: u64,
    /// The last commit whose effects are in the new folder.
    pub last_commit: u64,
    /// The last commit that had been acknowledged, as far as the old folder tells.
    pub acknowledged: u64,
    /// What could not be read or did not prove itself, in words; at most [`PROBLEMS_MAX`].
    pub damage: Vec<String>,
    /// Rows that were worked out again from records and other rows.
    pub rows_made_again: u64,
}

/// What [`salvage`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SalvageReport {
    /// Shard by shard.
    pub shards: Vec<ShardSalvaged>,
    /// Records that are gone, by conversation; at most [`PROBLEMS_MAX`] ranges.
    pub lost: Vec<Lost>,
    /// Records that are gone and are known to have been there, with those that are not listed.
    pub lost_records: u64,
}

/// Makes a sound data folder at `to`, which is empty or not there, of all that proves itself in the one at `from`, which is not
/// changed and which nobody else may have open.
///
/// # Errors
/// `from` can't be read at all, or `to` can't be written. `to` is not a data folder then.
pub fn salvage(
    from: impl AsRef<Path>,
    to: impl AsRef<Path>,
    progress: &mut dyn FnMut(Progress),
) -> Result<SalvageReport, MaintainError> {
    let (from, to) = (from.as_ref(), to.as_ref());
    let _held = folder::hold(from)?;
    let (shards, engine, marker_is_whole) = marker(from)?;
    fs::create_dir_all(to).map_err(MaintainError::io("can't create the folder", to))?;
    let mut there = fs::read_dir(to).map_err(MaintainError::io("can't read the folder", to))?;
    if there.next().is_some() {
        return Err(MaintainError::NotEmpty { path: to.to_owned() });
    }
    let mut report = SalvageReport::default();
    for shard in (0..shards).filter_map(ShardId::new) {
        let at = to.join(shard_name(shard));
        fs::create_dir_all(&at).map_err(MaintainError::io("can't create the folder", &at))?;
        let source = from.join(shard_name(shard));
        let mut saving = Saving {
            shard,
            from: Disk::new(&source),
            source: &source,
            to: Disk::new(&at),
            target: &at,
            report: &mut report,
            saved: ShardSalvaged { shard: shard.get(), ..ShardSalvaged::default() },
            rescued: Vec::new(),
            progress,
        };
        if source.is_dir() {
            saving.shard()?;
        } else {
            saving.damage("its folder is missing".to_owned());
        }
        let saved = saving.saved;
        report.shards.push(saved);
    }
    for entry in fs::read_dir(from).map_err(MaintainError::io("can't read the folder", from))?.flatten() {
        let name = entry.file_name();
        let beside = name != MARKER && name != "LOCK" && entry.file_type().is_ok_and(|kind| kind.is_file());
        // A file that can't be read is one more that is lost; the cold tier's name is the only one there is.
        if beside && let Err(error) = fs::copy(entry.path(), to.join(&name)) {
            tracing::warn!(file = %entry.path().display(), %error, "a file could not be saved");
        }
    }
    write_marker(from, to, shards, engine, marker_is_whole)?;
    Ok(report)
}

/// Shards, engine, and whether the marker says so itself.
fn marker(from: &Path) -> Result<(u16, EngineKind, bool), MaintainError> {
    if let Ok(Some((found, marker))) = format::read_marker(from) {
        if found < FORMAT_VERSION {
            return Err(MaintainError::OlderFormat { path: from.to_owned(), found, wanted: FORMAT_VERSION });
        }
        if let Some(engine) = EngineKind::from_name(&marker.engine) {
            return Ok((marker.shards, engine, true));
        }
    }
    // Every shard has its folder from the beginning.
    let there = |n: &u16| ShardId::new(*n).is_some_and(|shard| from.join(shard_name(shard)).is_dir());
    let most = u16::try_from(SHARDS_MAX).unwrap_or(u16::MAX);
    let Some(last) = (0..most).rev().find(there) else {
        return Err(MaintainError::NoFolder { path: from.to_owned() });
    };
    let sled = (0..=last).filter_map(ShardId::new).any(|shard| {
        let index = from.join(shard_name(shard)).join(crate::store::INDEX);
        !index.is_dir() || index.join("db").is_file()
    });
    Ok((last + 1, if sled { EngineKind::Sled } else { EngineKind::Fjall }, false))
}

fn write_marker(
    from: &Path,
    to: &Path,
    shards: u16,
    engine: EngineKind,
    copy: bool,
) -> Result<(), MaintainError> {
    let made = to.join(MARKER_FOLDER);
    let marker = if copy {
        from.join(MARKER)
    } else {
        drop(Folder::open(&made, shards, engine)?);
        made.join(MARKER)
    };
    super::backup::copy_whole(&marker, &to.join(MARKER))?;
    if !copy {
        fs::remove_dir_all(&made).map_err(MaintainError::io("can't remove", &made))?;
    }
    super::backup::sync_folder(to)
}

/// What becomes of one conversation that is not simply as it was.
#[derive(Clone, Copy, Debug, Default)]
struct Plan {
    head: Head,
    /// The last record that is written; those after it up to the head are notices.
    last: Seq,
}

/// What the part of the log that is kept does.
#[derive(Debug, Default)]
struct LogPart {
    commits: u64,
    /// The first record appended to a conversation, and what stands in it.
    first: HashMap<ConversationId, Record>,
    /// Where a conversation ends.
    last: HashMap<ConversationId, Seq>,
    /// Memberships as the log leaves them, and the count it says.
    members: HashMap<ConversationId, HashMap<UserId, bool>>,
    counts: HashMap<ConversationId, u64>,
}

struct Saving<'a> {
    shard: ShardId,
    from: Disk,
    source: &'a Path,
    to: Disk,
    target: &'a Path,
    report: &'a mut SalvageReport,
    saved: ShardSalvaged,
    /// Segments beside the new one that hold what was got out of damaged ones, until the new one has it.
    rescued: Vec<u64>,
    progress: &'a mut dyn FnMut(Progress),
}

impl Saving<'_> {
    fn damage(&mut self, what: String) {
        if self.saved.damage.len() < PROBLEMS_MAX {
            self.saved.damage.push(what);
        }
    }

    fn lost(&mut self, conversation: ConversationId, first: Seq, last: Seq, what: String) {
        self.report.lost_records += last.since(first).saturating_add(1);
        if self.report.lost.len() < PROBLEMS_MAX {
            let shard = self.shard.get();
            self.report.lost.push(Lost { shard, conversation, seqs: (first, last), what });
        }
    }

    fn writing(&self) -> impl Fn(io::Error) -> MaintainError + use<> {
        let target = self.target.to_owned();
        move |error| MaintainError::io("can't write in", &target)(error)
    }

    fn shard(&mut self) -> Result<(), MaintainError> {
        let (tip, _) = Tip::read(&self.from).unwrap_or_default();
        let manifest = match Manifest::load(&self.from, self.shard) {
            Ok(manifest) => Some(manifest),
            Err(error) => {
                self.damage(error.to_string());
                None
            }
        };
        let listed = self.from.list().map_err(MaintainError::io("can't read the folder", self.source))?;
        let there: Vec<u64> = listed.iter().filter_map(|(name, _)| segment_id(name)).collect();
        // A folder that lost its manifest shows none as well.
        let manifest = manifest.filter(|manifest| manifest.edition > 0 || there.is_empty());
        let (parts, cold) = self.parts(manifest.as_ref(), &there);
        let (settled, counters) = match &manifest {
            Some(manifest) => (manifest.settled, Some(manifest.counters)),
            None => (self.settled_without_manifest(&parts), None),
        };
        self.saved.acknowledged = tip.number.max(settled.number);

        let log = self.look_at_log(settled);
        let reached = settled.number.saturating_add(log.commits);
        if reached < self.saved.acknowledged {
            let (first, last) = (reached.saturating_add(1), self.saved.acknowledged);
            self.damage(format!(
                "commits {first} to {last} were acknowledged, and are not there or can't be proven"
            ));
        }
        let plans = self.plan(&parts, &log);
        let (entries, counters) = self.write_segments(&parts, &cold, settled, counters, &plans)?;
        for id in std::mem::take(&mut self.rescued) {
            match self.to.remove(&segment::name(id)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(self.writing()(error)),
                Ok(()) | Err(_) => {}
            }
        }
        let written = entries.iter().map(|entry| entry.id).max().unwrap_or(0);
        let manifest = Manifest {
            edition: 1,
            settled,
            before: ChainHash::default(),
            counters,
            next_segment: written.saturating_add(1),
            segments: entries,
        };
        if settled.number > 0 {
            manifest.store(&self.to, self.shard).map_err(self.writing())?;
        }
        let last = self.write_log(settled, &log, &plans)?;
        self.saved.last_commit = last.number;
        if last.number > 0 {
            let (tip, _) = Tip::open(&self.to).map_err(self.writing())?;
            tip.write(last).map_err(self.writing())?;
        }
        self.to.sync_folder().map_err(self.writing())
    }

    /// The segments that can be opened, oldest first, and what the manifest says of those in the cold tier.
    fn parts(&mut self, manifest: Option<&Manifest>, there: &[u64]) -> (Vec<Part>, Vec<Entry>) {
        let mut parts = Vec::new();
        let named: Vec<(u64, bool)> = match manifest {
            Some(manifest) => {
                manifest.segments.iter().map(|entry| (entry.id, entry.cold.is_some())).collect()
            }
            None => there.iter().map(|id| (*id, false)).collect(),
        };
        for (id, cold) in named {
            let opened = truth::open(&self.from, self.shard, id, cold);
            let followed = opened.and_then(|part| {
                // Only what lists runs and rows is read here.
                part.segment.runs().try_for_each(|run| run.map(drop))?;
                part.segment.rows().try_for_each(|row| row.map(drop))?;
                Ok(part)
            });
            match followed {
                Ok(part) => parts.push(part),
                Err(error) => {
                    self.damage(format!("segment {id:016x}: {error}"));
                    let entry =
                        manifest.and_then(|manifest| manifest.segments.iter().find(|entry| entry.id == id));
                    if !cold {
                        parts.extend(self.rescue(id, entry));
                    }
                }
            }
        }
        if manifest.is_none() {
            // Of a merge and its inputs both may be there: they say the same.
            parts.sort_by_key(|part| (part.segment.summary().last_commit, part.id));
        }
        let cold = manifest.map_or(&[][..], |manifest| &manifest.segments);
        (parts, cold.iter().filter(|entry| entry.cold.is_some()).cloned().collect())
    }

    /// What blocks of a damaged segment still tell, in a segment beside those that are made.
    fn rescue(&mut self, id: u64, entry: Option<&Entry>) -> Option<Part> {
        let commits = match (entry, truth::open(&self.from, self.shard, id, false)) {
            (Some(entry), _) => entry.first_commit..=entry.last_commit,
            (None, Ok(part)) => part.segment.summary().first_commit..=part.segment.summary().last_commit,
            // When is not known: whatever others say counts instead.
            (None, Err(_)) => 0..=0,
        };
        let mut lost = Vec::new();
        let rescued = segment::rescue(&self.from, &self.to, self.shard, id, commits, &mut |run, error| {
            let (conversation, first, last) = (run.conversation, run.first, run.last());
            lost.push(format!(
                "segment {id:016x} (conversation {conversation}, seqs {first} to {last}): {error}"
            ));
        });
        for what in lost {
            self.damage(what);
        }
        self.rescued.push(id);
        match rescued {
            Ok(summary) => {
                let (runs, rows) = (summary.runs, summary.rows);
                self.damage(format!(
                    "segment {id:016x}: {runs} runs and {rows} rows prove themselves and are kept"
                ));
                truth::open(&self.to, self.shard, id, false).ok()
            }
            Err(error) => {
                self.damage(format!("segment {id:016x}: nothing of it can be read: {error}"));
                None
            }
        }
    }

    /// Where what is settled ends, as the segments and the log tell it.
    fn settled_without_manifest(&mut self, parts: &[Part]) -> CommitId {
        let number = parts.iter().map(|part| part.segment.summary().last_commit).max().unwrap_or(0);
        if number == 0 {
            return CommitId::ZERO;
        }
        let near = journal::read_some(&self.from, number, SEARCHED_COMMITS).unwrap_or_default();
        let chain = near.iter().find_map(|commit| {
            if commit.id.number == number {
                Some(commit.id.chain)
            } else {
                (commit.id.number == number.saturating_add(1)).then_some(commit.previous)
            }
        });
        CommitId { number, chain: chain.unwrap_or_default() }
    }

    // ---- the log

    /// Walks through the commits after `settled` that prove themselves, at most `limit` of them. Returns why it ended.
    fn commits(
        &self,
        settled: CommitId,
        limit: u64,
        mut each: impl FnMut(Commit) -> Result<(), String>,
    ) -> Option<String> {
        let mut taken = 0;
        let mut stopped = None;
        let read = journal::Reader::new(&self.from, self.shard, CommitId::ZERO).read(settled, |commit| {
            if stopped.is_none() && taken < limit {
                match each(commit) {
                    Ok(()) => taken += 1,
                    Err(what) => stopped = Some(what),
                }
            }
            Ok(())
        });
        stopped.or_else(|| read.err().map(|error| error.to_string()))
    }

    fn look_at_log(&mut self, settled: CommitId) -> LogPart {
        let mut log = LogPart::default();
        let ended = self.commits(settled, u64::MAX, |commit| {
            let number = commit.id.number;
            note(&mut log, &commit).map_err(|what| format!("commit {number}: {what}"))?;
            log.commits += 1;
            Ok(())
        });
        if let Some(what) = ended {
            let last = settled.number + log.commits;
            self.damage(format!("the log ends at commit {last}: {what}"));
        }
        log
    }

    /// Writes the log of the new shard. Returns its last commit.
    fn write_log(
        &mut self,
        settled: CommitId,
        log: &LogPart,
        plans: &Plans,
    ) -> Result<CommitId, MaintainError> {
        let mut journal =
            Journal::begin(&self.to, self.shard, Durability::Power, settled, 0).map_err(self.writing())?;
        let mut last = settled;
        let mut failed = None;
        self.commits(settled, log.commits, |commit| {
            let (id, bytes) = commit::encode(last, commit.ops, &commit.body);
            last = id;
            match journal.append(&bytes) {
                Ok(()) => Ok(()),
                Err(error) => {
                    let what = error.to_string();
                    failed = Some(error);
                    Err(what)
                }
            }
        });
        if let Some(error) = failed {
            return Err(self.writing()(error));
        }
        // What the log says of counts may build on members that are gone.
        let mut body = Vec::new();
        let mut ops = 0;
        let mut counts: Vec<_> = log.counts.iter().collect();
        counts.sort_unstable();
        for (conversation, said) in counts {
            let (members, known) = plans.members.get(conversation).copied().unwrap_or_default();
            let now = log.members.get(conversation);
            let joined = now.map_or(0, |now| now.values().filter(|member| **member).count() as u64);
            let members = (members - known).saturating_add(joined);
            if members != *said {
                Op::MemberCount { conversation: *conversation, members }.encode(&mut body);
                ops += 1;
            }
        }
        if ops > 0 {
            let (id, bytes) = commit::encode(last, ops, &body);
            journal.append(&bytes).map_err(self.writing())?;
            last = id;
            self.saved.rows_made_again += u64::from(ops);
        }
        journal.sync().map_err(self.writing())?;
        Ok(last)
    }

    // ---- what is settled

    /// Reads every record, and works out what becomes of the conversations.
    fn plan(&mut self, parts: &[Part], log: &LogPart) -> Plans {
        let mut plans = Plans::default();
        let rows = TrueRows::new(parts);
        let mut heads = TableRows::new(rows.clone(), Table::Head as u8);
        let mut members = TableRows::new(rows.clone(), Table::Member as u8);
        let mut lanes = TableRows::new(rows, Table::Lane as u8);
        let mut runs = AllRuns::new(parts);
        let of: u64 = parts.iter().map(|part| part.segment.summary().run_bytes).sum();
        let mut done = 0;
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
            let head = heads
                .take_of(prefix.as_ref())
                .filter(|row| row_makes_sense(self.shard, Table::Head, row).is_ok())
                .and_then(|row| Head::from_row(&row.row).ok());
            let mut found = Found::default();
            while runs.peek().is_some_and(|run| run.conversation == conversation) {
                let Some((part, run)) = runs.take() else { break };
                done += u64::from(run.bytes);
                (self.progress)(Progress {
                    shard: self.shard,
                    doing: "reading records",
                    done,
                    of: of.max(done),
                });
                if let Err(what) = found.add(&part, &run, head.map_or(Seq::ZERO, |head| head.low)) {
                    let (first, last) = (run.first, run.last());
                    self.damage(format!(
                        "segment {:016x} (conversation {conversation}, seqs {first} to {last}): {what}",
                        part.id
                    ));
                }
            }
            let mut count = 0u64;
            let mut known = 0u64;
            let touched = log.members.get(&conversation);
            while let Some(row) = members.take_of(prefix.as_ref()) {
                if row_makes_sense(self.shard, Table::Member, &row).is_ok() {
                    count += 1;
                    let user = id_at::<UserId>(&row.key, 1);
                    known +=
                        u64::from(user.is_some_and(|user| touched.is_some_and(|t| t.contains_key(&user))));
                }
            }
            if touched.is_some() || log.counts.contains_key(&conversation) {
                plans.members.insert(conversation, (count, known));
            }
            self.lanes(conversation, &mut lanes, &mut found, &mut plans);
            self.saved.conversations += 1;
            let (plan, same) = self.head(conversation, head, &found, count, log);
            if !same {
                plans.heads.insert(conversation, plan);
            }
        }
        for (id, what) in runs.take_broken() {
            self.damage(format!("segment {id:016x}: its runs can't be followed: {what}"));
        }
        // Conversations the log goes on with, and nothing else is left of.
        let mut rest: Vec<_> = log.first.keys().copied().collect();
        rest.sort_unstable();
        for conversation in rest.into_iter().filter(|conversation| !plans.seen.contains(conversation)) {
            let (plan, _) = self.head(conversation, None, &Found::default(), 0, log);
            if plan.head.seq > Seq::ZERO {
                plans.heads.insert(conversation, plan);
            }
        }
        plans
    }

    /// What the head of a conversation becomes, and whether that is what it was.
    fn head(
        &mut self,
        conversation: ConversationId,
        head: Option<Head>,
        found: &Found,
        members: u64,
        log: &LogPart,
    ) -> (Plan, bool) {
        let next = log.first.get(&conversation);
        let known = head.unwrap_or_default();
        let low_before = known.low;
        let last = found.last.max(low_before);
        // Where the log goes on says best where what is settled ended.
        let end = next.map_or_else(|| known.seq.max(last), |record| record.seq.prev());
        let mut plan = Plan { head: Head { seq: end, members, ..known }, last: last.min(end) };
        if let Some((_, count, time)) = found.newest.filter(|(seq, ..)| *seq == end) {
            (plan.head.count, plan.head.time) = (count, time);
        } else if known.seq != end
            && let Some(record) = next
        {
            (plan.head.count, plan.head.time) = (count_before(record), record.time);
        }
        // Records that come later make what is missing a gap; without any that come before, there is nothing to be filled up.
        let all_gone = next.is_some() || last <= low_before || end.since(last) > NOTICES_MAX;
        if last < end && all_gone {
            plan.head.low = end;
            plan.head.low_count = plan.head.count;
            plan.last = end;
        } else if found.start > low_before {
            plan.head.low = found.start;
            plan.head.low_count = found.start_count;
        }
        if plan.head.low > low_before {
            let first = low_before.saturating_add(1);
            let what = match &found.gap {
                Some((from, to)) => {
                    format!(
                        "records {from} to {to} can't be read, and a log has no holes: what came before goes with them"
                    )
                }
                None => "they can't be read".to_owned(),
            };
            self.lost(conversation, first, plan.head.low, what);
        }
        if plan.last < end {
            let first = plan.last.saturating_add(1);
            let what = "they can't be read; empty notices stand in their places".to_owned();
            self.lost(conversation, first, end, what);
        }
        let same = head == Some(plan.head) && plan.last == end;
        (plan, same)
    }

    /// Lanes that are missing, or older than the records are.
    fn lanes(
        &mut self,
        conversation: ConversationId,
        rows: &mut TableRows,
        found: &mut Found,
        plans: &mut Plans,
    ) {
        plans.seen.insert(conversation);
        let prefix = Key::conversation(conversation);
        while let Some(row) = rows.take_of(prefix.as_ref()) {
            let (Some(user), Some(device)) = (id_at(&row.key, 1), id_at(&row.key, 2)) else { continue };
            let Ok(lane) = LaneState::from_row(&row.row) else { continue };
            if let Some(shown) = found.lanes.get(&(user, device))
                && (lane.epoch, lane.last) >= (shown.epoch, shown.last)
            {
                found.lanes.remove(&(user, device));
            }
        }
        for ((user, device), lane) in std::mem::take(&mut found.lanes) {
            let key = Key::lane(conversation, user, device);
            plans.rows.insert(full_key(Table::Lane, key.as_ref()), Some(lane.to_row()));
            self.saved.rows_made_again += 1;
        }
    }

    /// Writes what is left of what is settled. Returns the segments of the new manifest, and its counters.
    fn write_segments(
        &mut self,
        parts: &[Part],
        cold: &[Entry],
        settled: CommitId,
        counters: Option<Counters>,
        plans: &Plans,
    ) -> Result<(Vec<Entry>, Counters), MaintainError> {
        let mut entries = Vec::new();
        for entry in cold.iter().filter(|entry| parts.iter().any(|part| part.id == entry.id)) {
            let name = segment::name(entry.id);
            super::backup::copy_whole(&self.source.join(&name), &self.target.join(&name))?;
            entries.push(Entry { edition: 1, merged: false, replaces: Vec::new(), ..entry.clone() });
        }
        let mut rows = plans.rows.clone();
        for (conversation, plan) in &plans.heads {
            let key = Key::conversation(*conversation);
            rows.insert(full_key(Table::Head, key.as_ref()), Some(plan.head.to_row()));
            self.saved.rows_made_again += 1;
        }
        let mut counters_found = Counters { epoch: settled.number, ..Counters::default() };
        self.mend(parts, &mut rows);
        if settled.number == 0 {
            // Nothing was ever settled.
            return Ok((entries, counters.unwrap_or_default()));
        }
        let ids = parts.iter().map(|part| part.id).chain(self.rescued.iter().copied());
        let id = ids.max().unwrap_or(0).saturating_add(1);
        let mut writer = SegmentWriter::create(&self.to, self.shard, id).map_err(self.writing())?;
        self.write_records(parts, plans, &mut writer)?;
        self.write_rows(parts, !entries.is_empty(), rows, &mut writer, &mut counters_found)?;
        let first = entries.iter().map(|entry| entry.first_commit).max().unwrap_or(1).min(settled.number);
        let summary = writer.finish(first..=settled.number).map_err(self.writing())?;
        self.saved.records = summary.records;
        self.saved.rows = summary.rows;
        entries.push(Entry::new(&summary, 1, Vec::new()));
        self.to.sync_folder().map_err(self.writing())?;
        Ok((entries, counters.unwrap_or(counters_found)))
    }

    fn write_records(
        &mut self,
        parts: &[Part],
        plans: &Plans,
        writer: &mut SegmentWriter,
    ) -> Result<(), MaintainError> {
        let mut heads = TableRows::new(TrueRows::new(parts), Table::Head as u8);
        let mut runs = AllRuns::new(parts);
        // Conversations of which nothing but a plan is left have no records, and no notices either.
        while let Some(conversation) = runs.peek().map(|run| run.conversation) {
            let mut head = None;
            while let Some(row) = heads.peek() {
                let at = id_at::<ConversationId>(&row.key, 0);
                if at.is_some_and(|at| at > conversation) {
                    break;
                }
                head = heads.take().filter(|_| at == Some(conversation));
            }
            let head = head.and_then(|row| Head::from_row(&row.row).ok()).unwrap_or_default();
            let plan = plans.heads.get(&conversation).copied().unwrap_or(Plan { head, last: head.seq });
            let mut written = plan.head.low;
            while runs.peek().is_some_and(|run| run.conversation == conversation) {
                let Some((part, run)) = runs.take() else { break };
                if part.cold {
                    written = written.max(run.last().min(plan.last));
                    continue;
                }
                if run.last() <= written {
                    continue;
                }
                let Ok(bytes) = part.segment.run(&run) else { continue };
                for record in segment::records(&run, &bytes, written.saturating_add(1)) {
                    let Ok((record, encoded)) = record else { break };
                    if record.seq > plan.last {
                        break;
                    }
                    writer.record(conversation, record.seq, record.time, &encoded).map_err(self.writing())?;
                    written = record.seq;
                }
            }
            while written < plan.head.seq && plan.last < plan.head.seq {
                written = written.saturating_add(1);
                let notice = notice(written, &plan.head);
                let mut encoded = Vec::new();
                notice.encode(conversation, &mut encoded);
                writer.record(conversation, written, notice.time, &encoded).map_err(self.writing())?;
            }
        }
        Ok(())
    }

    fn write_rows(
        &mut self,
        parts: &[Part],
        with_gone: bool,
        rows: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
        writer: &mut SegmentWriter,
        counters: &mut Counters,
    ) -> Result<(), MaintainError> {
        let found = TrueRows::new(parts);
        let mut found = if with_gone { found.with_gone() } else { found };
        let mut made = rows.into_iter().peekable();
        let mut dropped = 0u64;
        while let Some(row) = found.next_up_to(u8::MAX) {
            let mut full = Vec::with_capacity(row.key.len() + 1);
            full.push(row.table);
            full.extend_from_slice(&row.key);
            while let Some((full, row)) = made.next_if(|(made, _)| *made < full) {
                count_full(counters, &full);
                put(writer, &full, row.as_deref(), with_gone).map_err(self.writing())?;
            }
            if let Some((full, row)) = made.next_if(|(made, _)| *made == full) {
                put(writer, &full, row.as_deref(), with_gone).map_err(self.writing())?;
                continue;
            }
            let Some(table) = Table::from_number(row.table) else {
                dropped += 1;
                continue;
            };
            let sense = row.gone || row_makes_sense(self.shard, table, &row).is_ok();
            dropped += u64::from(!sense);
            count(counters, table, &row.key);
            let value = (!row.gone && sense).then_some(&row.row[..]);
            put(writer, &full, value, with_gone).map_err(self.writing())?;
        }
        for (full, row) in made {
            count_full(counters, &full);
            put(writer, &full, row.as_deref(), with_gone).map_err(self.writing())?;
        }
        for (id, what) in found.take_broken() {
            self.damage(format!(
                "segment {id:016x}: its rows can't be followed ({what}): older versions of them may stand"
            ));
        }
        if dropped > 0 {
            self.damage(format!("{dropped} rows make no sense and were left out"));
        }
        Ok(())
    }

    /// Names and uids that do not lead where they must. Only if rows are missing; then all names are in memory.
    fn mend(&mut self, parts: &[Part], rows: &mut BTreeMap<Vec<u8>, Option<Vec<u8>>>) {
        if self.saved.damage.is_empty() {
            return;
        }
        let of = |table: Table| TableRows::new(TrueRows::new(parts), table as u8);
        let mut wanted: HashMap<Vec<u8>, u64> = HashMap::new();
        let mut there: HashSet<(bool, u64)> = HashSet::new();
        for table in [Table::User, Table::Conversation] {
            let mut of_table = of(table);
            while let Some(row) = of_table.take() {
                if row_makes_sense(self.shard, table, &row).is_ok()
                    && let Some((number, name)) = name_of(table, &row)
                {
                    wanted.insert(name.into_bytes(), number);
                    there.insert((table == Table::User, number));
                }
            }
        }
        let mut names = of(Table::Name);
        while let Some(row) = names.take() {
            let Ok(Number(number)) = Number::from_row(&row.row) else { continue };
            let user = row.key.get(8) == Some(&key::KIND_USER);
            match wanted.get(&row.key[..]) {
                Some(right) if *right == number => drop(wanted.remove(&row.key[..])),
                Some(_) => {}
                None if there.contains(&(user, number)) => {}
                None => drop(rows.insert(full_key(Table::Name, &row.key), None)),
            }
        }
        for (name, number) in wanted {
            rows.insert(full_key(Table::Name, &name), Some(Number(number).to_row()));
            self.saved.rows_made_again += 1;
        }
        let mut uids: HashMap<Vec<u8>, u64> = HashMap::new();
        let mut devices = of(Table::Device);
        while let Some(row) = devices.take() {
            if let (Some(user), Ok(device)) = (id_at::<UserId>(&row.key, 0), Device::from_row(&row.row)) {
                let number = key::number_at(&row.key, 1).unwrap_or_default();
                uids.insert(Key::uid(user, device.uid).into_bytes(), number);
            }
        }
        let mut found = of(Table::Uid);
        while let Some(row) = found.take() {
            match uids.get(&row.key[..]) {
                Some(number) if Number::from_row(&row.row) == Ok(Number(*number)) => {
                    uids.remove(&row.key[..]);
                }
                Some(_) => {}
                None => drop(rows.insert(full_key(Table::Uid, &row.key), None)),
            }
        }
        for (uid, number) in uids {
            rows.insert(full_key(Table::Uid, &uid), Some(Number(number).to_row()));
            self.saved.rows_made_again += 1;
        }
    }
}

/// Everything that is not simply taken over.
#[derive(Debug, Default)]
struct Plans {
    heads: HashMap<ConversationId, Plan>,
    /// Rows by table and key, to be written instead of those found; `None`: to be left out.
    rows: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    /// Of conversations whose members the log changes: members that are there, and those of them the log names.
    members: HashMap<ConversationId, (u64, u64)>,
    /// Conversations that something settled is left of.
    seen: HashSet<ConversationId>,
}

/// What the runs of one conversation come to.
#[derive(Debug, Default)]
struct Found {
    /// Records after this one are there without a gap …
    start: Seq,
    /// … with this `count` before them …
    start_count: u64,
    /// … up to this one.
    last: Seq,
    /// The last gap.
    gap: Option<(Seq, Seq)>,
    newest: Option<(Seq, u64, UnixMillis)>,
    lanes: BTreeMap<(UserId, DeviceId), LaneState>,
}

impl Found {
    /// Adds a run, of which records up to `low` do not matter.
    fn add(&mut self, part: &Part, run: &segment::Run, low: Seq) -> Result<(), String> {
        if self.last < low {
            (self.start, self.last) = (low, low);
        }
        if part.cold {
            if run.last() > self.last {
                self.goes_on(run.first, run.last(), None);
            }
            return Ok(());
        }
        let bytes = part.segment.run(run).map_err(|error| error.to_string())?;
        for record in segment::records(run, &bytes, Seq::ZERO) {
            let (record, _) = record.map_err(|error| error.to_string())?;
            if record.pseq > Pseq::ZERO {
                self.note(&record);
            }
            if record.seq > self.last {
                self.goes_on(record.seq, record.seq, Some(&record));
                self.newest = Some((record.seq, record.count, record.time));
            }
        }
        Ok(())
    }

    fn goes_on(&mut self, first: Seq, last: Seq, record: Option<&Record>) {
        if first > self.last.saturating_add(1) {
            self.gap = Some((self.last.saturating_add(1), first.prev()));
            self.start = first.prev();
            self.start_count = record.map_or(0, count_before);
        }
        self.last = self.last.max(last);
    }

    fn note(&mut self, record: &Record) {
        let lane = self.lanes.entry((record.sender, record.device)).or_default();
        lane.note(record.epoch, record.pseq, record.seq);
    }
}

/// The `count` of the record before this one, which is not there.
fn count_before(record: &Record) -> u64 {
    record.count.saturating_sub(u64::from(record.kind == RecordKind::Message))
}

/// What stands in the place of a record that is gone.
fn notice(seq: Seq, head: &Head) -> Record {
    Record {
        seq,
        kind: RecordKind::Notice,
        sender: UserId::default(),
        device: DeviceId::ZERO,
        epoch: Epoch::ZERO,
        pseq: Pseq::ZERO,
        time: head.time,
        count: head.count,
        target: None,
        ttl: None,
        more: false,
        continues: false,
        silent: true,
        payload: Bytes::new(),
    }
}

/// Takes note of what a commit does; refuses one that does not fit the commits before it.
fn note(log: &mut LogPart, commit: &Commit) -> Result<(), String> {
    let mut records: Vec<(ConversationId, Record)> = Vec::new();
    let mut members = Vec::new();
    let mut counts = Vec::new();
    let mut last: HashMap<ConversationId, Seq> = HashMap::new();
    let mut at = 0;
    let mut ops = 0u32;
    while at < commit.body.len() {
        let decoded = Op::decode(&commit.body.slice(at..)).map_err(|what| what.to_string())?;
        at += decoded.taken;
        ops = ops.saturating_add(1);
        match decoded.op {
            Op::Append { conversation, record } => {
                let before = last.get(&conversation).or_else(|| log.last.get(&conversation)).copied();
                if before.is_some_and(|before| before.next() != Some(record.seq)) {
                    return Err(format!(
                        "conversation {conversation}: record {} is out of place",
                        record.seq
                    ));
                }
                last.insert(conversation, record.seq);
                if before.is_none() {
                    records.push((conversation, Record { payload: Bytes::new(), ..record }));
                }
            }
            Op::Member { conversation, user, row } => members.push((conversation, user, row.is_some())),
            Op::MemberCount { conversation, members } => counts.push((conversation, members)),
            _ => {}
        }
    }
    if ops != commit.ops {
        return Err("it has not as many operations as it says".to_owned());
    }
    log.last.extend(last);
    log.first.extend(records);
    for (conversation, user, member) in members {
        log.members.entry(conversation).or_default().insert(user, member);
    }
    log.counts.extend(counts);
    Ok(())
}

/// Raises the counters to what a row's key names.
fn count(counters: &mut Counters, table: Table, key: &[u8]) {
    let local = key::number_at(key, 0).unwrap_or_default() / SHARDS_MAX;
    match table {
        Table::Head | Table::Conversation | Table::Member | Table::Read | Table::Lane | Table::Link => {
            counters.conversations = counters.conversations.max(local);
        }
        Table::User | Table::Listed | Table::Device | Table::Uid | Table::ClassEpoch | Table::Recv => {
            counters.users = counters.users.max(local);
        }
        Table::Name | Table::Shard | Table::Run => {}
    }
}

fn count_full(counters: &mut Counters, full: &[u8]) {
    if let Some((table, key)) = full.split_first()
        && let Some(table) = Table::from_number(*table)
    {
        count(counters, table, key);
    }
}

/// Writes a row; one that is gone only if an older segment may have it.
fn put(writer: &mut SegmentWriter, full: &[u8], row: Option<&[u8]>, with_gone: bool) -> io::Result<()> {
    match full.split_first() {
        Some((table, key)) if row.is_some() || with_gone => writer.row(*table, key, row),
        _ => Ok(()),
    }
}
