//! The commit log on disk: files that are only appended to, one `fdatasync` per commit.
//!
//! - A file is a header of [`HEADER_BYTES`] and whole commits, one after the other. It is named after the number of its
//!   first commit. Header and name are durable before the first commit is written.
//! - A file whose write or sync failed is left as it is. The next one begins with the number that failed: what the earlier
//!   file says from there on is void.
//! - A file may have zeros ahead of its last commit ([`Room`]), which the next commits overwrite. They promise nothing: a commit is
//!   durable by its own sync, wherever it lies.
//! - Every file that is read is proven: the header, each commit's checksums, number and chain hash.
//! - Only the very last commit may be unreadable, and only if the tip leaves open that it was never acknowledged. Power
//!   loss can't do anything else: a commit is written when the one before it is durable. If there are only zeros in its place, the log
//!   just ends there; zeros in the place of any other commit are damage.
//!
//! Not here: the bytes of a commit (`commit`), when files are begun and removed (`committer`, `settler`).

use std::{io, sync::Arc};

use bytes::Bytes;
use fulmar_protocol::id::ShardId;

use super::boot::BootId;
use crate::{
    Durability,
    codec::{Cursor, Malformed},
    commit::{self, ChainHash, Commit, CommitId, Header},
    error::OpenError,
    files::{Append, Files, ReadAt},
};

/// Bytes before the first commit of a file.
pub(crate) const HEADER_BYTES: usize = 64;

const MAGIC: [u8; 4] = *b"FLMJ";
const VERSION: u8 = 1;
pub(crate) const SUFFIX: &str = ".log";

/// A file of the log before it has its name.
const NAME_NEW: &str = "new.log";

/// Bytes looked through at a time for commits behind an unreadable one.
const SEARCH_BYTES: usize = 64 * 1024;

/// The name of the file that begins with commit `first`.
pub(crate) fn name(first: u64) -> String {
    format!("{first:016x}{SUFFIX}")
}

/// The first commit of the file called `name`; `None` if it is not a file of the log.
pub(crate) fn first_of(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(SUFFIX)?;
    let first = u64::from_str_radix(digits, 16).ok()?;
    (self::name(first) == name).then_some(first)
}

/// What room ahead begins and ends at a multiple of: what the file system keeps as one.
const ROOM_UNIT: u64 = 4096;

/// The first step of room in a file is this part of the largest.
const FIRST_ROOM: u64 = 16;

/// A commit that would fill this part of the largest step alone is written so slowly that room saves nothing.
const SMALL_FOR_ROOM: u64 = 8;

/// Zeros ahead of the last commit.
///
/// A sync of bytes that lie in space written before writes those and nothing else. Otherwise it also writes what the file system knows
/// of the file: its length, and which blocks are its own.
#[derive(Clone, Copy, Debug, Default)]
struct Room {
    /// Where it ends.
    until: u64,
    /// Bytes of the next step; 0: there is none.
    step: u64,
    /// Bytes of a step at most.
    step_max: u64,
}

impl Room {
    fn new(step_max: u64) -> Self {
        if step_max == 0 {
            return Self::default();
        }
        let step_max = step_max.max(ROOM_UNIT);
        Self { until: 0, step: (step_max / FIRST_ROOM).max(ROOM_UNIT), step_max }
    }

    /// Whether the next step is due with a file that ends at `end`, its last commit being of `commit` bytes.
    fn is_due(&self, end: u64, commit: u64) -> bool {
        self.until.saturating_sub(end) < self.step / 4 && commit <= self.step_max / SMALL_FOR_ROOM
    }

    /// Where the next step ends.
    fn next(&self, end: u64) -> u64 {
        self.until.max(end).saturating_add(self.step).next_multiple_of(ROOM_UNIT)
    }

    fn made(&mut self, until: u64) {
        self.until = until;
        self.step = self.step.saturating_mul(2).min(self.step_max);
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// The file that commits are appended to.
#[derive(Debug)]
pub(crate) struct Journal {
    file: Box<dyn Append>,
    /// Where the last commit ends.
    end: u64,
    /// Bytes of the last commit.
    newest: u64,
    room: Room,
    /// Somebody was asked for more.
    asked: bool,
}

impl Journal {
    /// Begins the file for the commits after `last`, and makes it durable. It gets room ahead in steps of `room` bytes at most; 0: none.
    pub(crate) fn begin(
        files: &dyn Files,
        shard: ShardId,
        durability: Durability,
        last: CommitId,
        room: u64,
    ) -> io::Result<Self> {
        let first = last.number.saturating_add(1);
        let header =
            FileHeader { shard, durability, first, previous: last.chain, boot: BootId::now() }.encode();
        // Where nobody waits for the disk nobody is helped by room.
        let room = if durability == Durability::Power { room } else { 0 };
        let journal = match Self::write_new(files, &header, Room::new(room)) {
            // It may be the room that does not fit.
            Err(error) if room > 0 && is_full(&error) => Self::write_new(files, &header, Room::default())?,
            written => written?,
        };
        // One of the same name holds nothing that was acknowledged, but its name makes what an earlier file says void: it is
        // replaced, so that there is no moment without either.
        files.rename(NAME_NEW, &name(first))?;
        files.sync_folder()?;
        Ok(journal)
    }

    fn write_new(files: &dyn Files, header: &[u8], room: Room) -> io::Result<Self> {
        let mut file = files.create(NAME_NEW)?;
        file.append(header)?;
        let mut journal = Self { file, end: header.len() as u64, newest: 0, room, asked: false };
        journal.write_room()?;
        journal.file.sync()?;
        Ok(journal)
    }

    /// Whether there is little room left: [`Self::make_room`] when nobody waits.
    pub(crate) fn needs_room(&self) -> bool {
        self.room.is_due(self.end, self.newest)
    }

    /// The same, for somebody who tells the one who makes it.
    pub(crate) fn ask_for_room(&mut self) -> bool {
        self.asked = self.needs_room();
        self.asked
    }

    /// Whether somebody was told and has not looked since.
    pub(crate) fn has_asked_for_room(&self) -> bool {
        self.asked
    }

    /// Somebody looks whether there is room.
    pub(crate) fn looked_for_room(&mut self) {
        self.asked = false;
    }

    /// Makes more room ahead, and waits until that is durable, so that no commit has to. Without space for it there will be no more in
    /// this file.
    ///
    /// # Errors
    /// It could not be written for another reason, or not be synced: nothing may be written to this file any more, and nothing may rest on it,
    /// for the page that its last commit ends in was written again.
    pub(crate) fn make_room(&mut self) -> io::Result<()> {
        if self.write_room()? { self.file.sync() } else { Ok(()) }
    }

    /// Returns whether there is something to sync.
    fn write_room(&mut self) -> io::Result<bool> {
        if self.room.step == 0 {
            return Ok(false);
        }
        let until = self.room.next(self.end);
        match self.file.make_room(until) {
            Ok(()) => {
                self.room.made(until);
                Ok(true)
            }
            Err(error) if is_full(&error) => {
                tracing::debug!(%error, "no room ahead in this log file");
                self.room = Room::default();
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Writes a commit's bytes; durable with the next [`Self::sync`].
    pub(crate) fn append(&mut self, commit: &[u8]) -> io::Result<()> {
        self.file.append(commit)?;
        self.newest = commit.len() as u64;
        self.end = self.end.saturating_add(self.newest);
        Ok(())
    }

    /// Waits until everything appended survives power loss. Needed before the next file is begun, too: only the last file
    /// of the log may end in the middle of a commit.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        self.file.sync()
    }
}

/// The start of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileHeader {
    shard: ShardId,
    durability: Durability,
    /// The first commit.
    first: u64,
    /// The chain hash before it.
    previous: ChainHash,
    /// The running system it was written under.
    boot: BootId,
}

impl FileHeader {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES);
        out.extend_from_slice(&MAGIC);
        out.push(VERSION);
        out.push(u8::from(self.durability == Durability::Process));
        out.extend_from_slice(&self.shard.get().to_be_bytes());
        out.extend_from_slice(&self.first.to_be_bytes());
        out.extend_from_slice(&self.previous.0);
        out.extend_from_slice(&self.boot.0);
        out.extend_from_slice(&[0; 12]);
        let crc = crc32c::crc32c(&out);
        out.extend_from_slice(&crc.to_be_bytes());
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let bytes = bytes.get(..HEADER_BYTES).ok_or(Malformed("log file header"))?;
        let mut at = Cursor::new(bytes);
        if at.array("log file magic")? != MAGIC {
            return Err(Malformed("log file magic"));
        }
        if at.u8("log file version")? != VERSION {
            return Err(Malformed("log file version"));
        }
        let durability = match at.u8("log file durability")? {
            0 => Durability::Power,
            1 => Durability::Process,
            _ => return Err(Malformed("log file durability")),
        };
        let shard = ShardId::new(u16::from_be_bytes(at.array("log file shard")?))
            .ok_or(Malformed("log file shard"))?;
        let first = u64::from_be_bytes(at.array("log file first commit")?);
        let previous = ChainHash(at.array("log file chain hash")?);
        let boot = BootId(at.array("log file boot")?);
        let reserved: [u8; 12] = at.array("log file reserved")?;
        if reserved != [0; 12] {
            return Err(Malformed("log file reserved"));
        }
        let covered = at.at();
        let crc = u32::from_be_bytes(at.array("log file checksum")?);
        if crc != crc32c::crc32c(bytes.get(..covered).unwrap_or_default()) {
            return Err(Malformed("log file checksum"));
        }
        Ok(Self { shard, durability, first, previous, boot })
    }
}

/// Names of the log's files, in order of their first commits.
pub(crate) fn list(files: &dyn Files) -> io::Result<Vec<(u64, u64)>> {
    let mut found: Vec<(u64, u64)> =
        files.list()?.into_iter().filter_map(|(name, bytes)| Some((first_of(&name)?, bytes))).collect();
    found.sort_unstable();
    Ok(found)
}

/// What the end of the log looks like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The last commit is whole; there is nothing behind it but room.
    Whole,
    /// Bytes after the last commit are not a commit, and were never acknowledged.
    Torn {
        /// How many, without the zeros behind them.
        bytes: u64,
    },
}

/// What proving a log ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Proven {
    /// The last commit.
    pub(crate) last: CommitId,
    /// Bytes read.
    pub(crate) bytes: u64,
    /// Zeros at the ends of the files.
    pub(crate) room: u64,
}

impl Proven {
    /// A file has `rest` bytes behind its last commit, and from `written` bytes on they are zeros.
    fn end(&mut self, written: u64, rest: u64) -> End {
        self.room += rest.saturating_sub(written);
        if written == 0 { End::Whole } else { End::Torn { bytes: written } }
    }
}

/// A log being proven and read, from one commit on.
pub(crate) struct Reader<'a> {
    files: &'a dyn Files,
    shard: ShardId,
    /// The last commit that is known to be acknowledged.
    tip: CommitId,
    tolerate_loss: bool,
}

impl<'a> Reader<'a> {
    /// `tip`: the last commit known to be acknowledged.
    pub(crate) fn new(files: &'a dyn Files, shard: ShardId, tip: CommitId) -> Self {
        Self { files, shard, tip, tolerate_loss: false }
    }

    /// Hands every commit after `settled` to `each`, in order.
    ///
    /// # Errors
    /// What is not as it was written; and what `each` returns.
    pub(crate) fn read(
        &mut self,
        settled: CommitId,
        mut each: impl FnMut(Commit) -> Result<(), OpenError>,
    ) -> Result<Proven, OpenError> {
        let files = list(self.files).map_err(|error| self.io("can't list", &error))?;
        let mut proven = Proven { last: settled, bytes: 0, room: 0 };
        let mut headers = Vec::with_capacity(files.len());
        for (place, (first, bytes)) in files.iter().enumerate() {
            let file = self.files.open(&name(*first)).map_err(|error| self.io("can't open", &error))?;
            match self.header(file.as_ref(), *bytes, *first) {
                Ok(header) => headers.push((header, file, *bytes)),
                // Begun, but not durable: commits are written only when the header is.
                Err(what)
                    if *bytes <= HEADER_BYTES as u64
                        && (place + 1 < files.len() || !self.acknowledged(*first)) =>
                {
                    tracing::warn!(shard = %self.shard, file = name(*first), %what, "a log file was begun and holds nothing");
                }
                Err(what) => {
                    let what = format!("the header of its file {} is unreadable: {what}", name(*first));
                    return Err(self.damaged(*first, what));
                }
            }
        }
        if let Some((header, _, _)) = headers.last() {
            self.tolerate_loss = header.durability == Durability::Process && header.boot != BootId::now();
        }
        // Files whose commits are all settled may be left over.
        let from = headers
            .iter()
            .rposition(|(header, _, _)| header.first <= settled.number.saturating_add(1))
            .unwrap_or(0);
        let rest = headers.get(from..).unwrap_or_default();
        for (place, (header, file, bytes)) in rest.iter().enumerate() {
            let next = rest.get(place + 1).map(|(header, _, _)| header);
            let expected = proven.last.number.saturating_add(1);
            if header.first > expected {
                let what = format!("the commits from {expected} to {} are missing", header.first - 1);
                return Err(self.damaged(expected, what));
            }
            let end = self.read_file(header, file.as_ref(), *bytes, next, settled, &mut proven, &mut each)?;
            match (end, next) {
                (End::Torn { bytes }, None) => {
                    let last = proven.last.number;
                    tracing::warn!(
                        shard = %self.shard, last, bytes,
                        "dropping the end of the log, which was never acknowledged"
                    );
                }
                (End::Torn { .. }, Some(_)) | (End::Whole, _) => {}
            }
        }
        if self.tolerate_loss {
            if proven.last.number < self.tip.number {
                tracing::warn!(
                    shard = %self.shard, last = proven.last.number, acknowledged = self.tip.number,
                    "the log lost its newest commits in a power cut: that is what the level `process` may do"
                );
            }
            return Ok(proven);
        }
        if proven.last.number < self.tip.number {
            let what = format!("the log ends here, but commit {} was acknowledged", self.tip.number);
            return Err(self.damaged(proven.last.number.saturating_add(1), what));
        }
        if proven.last.number == self.tip.number && proven.last.chain != self.tip.chain {
            let what = "it is not the commit that was acknowledged (chain hash)".to_owned();
            return Err(self.damaged(proven.last.number, what));
        }
        Ok(proven)
    }

    fn header(&self, file: &dyn ReadAt, bytes: u64, first: u64) -> Result<FileHeader, String> {
        let mut header = [0; HEADER_BYTES];
        if bytes < HEADER_BYTES as u64 {
            return Err("it is too short".to_owned());
        }
        file.read_exact_at(&mut header, 0).map_err(|error| error.to_string())?;
        let header = FileHeader::decode(&header).map_err(|what| what.to_string())?;
        if header.shard != self.shard {
            return Err(format!("it is of shard {}", header.shard));
        }
        if header.first != first {
            return Err(format!("it says that commit {} is its first", header.first));
        }
        Ok(header)
    }

    #[expect(clippy::too_many_arguments, reason = "one step of `read`, cut off for its length")]
    fn read_file(
        &self,
        header: &FileHeader,
        file: &dyn ReadAt,
        bytes: u64,
        next: Option<&FileHeader>,
        settled: CommitId,
        proven: &mut Proven,
        each: &mut impl FnMut(Commit) -> Result<(), OpenError>,
    ) -> Result<End, OpenError> {
        let mut before = CommitId { number: header.first.saturating_sub(1), chain: header.previous };
        let mut at = HEADER_BYTES as u64;
        loop {
            if before.number == proven.last.number && before.chain != proven.last.chain {
                let what = "it does not follow the commit before it (chain hash)".to_owned();
                return Err(self.damaged(before.number.saturating_add(1), what));
            }
            if at >= bytes {
                return Ok(End::Whole);
            }
            let number = before.number.saturating_add(1);
            if next.is_some_and(|next| next.first <= number) {
                // Void from here on: the next file has these numbers. Whether it can be read is no matter.
                let written = written(file, at, bytes).unwrap_or(bytes - at);
                return Ok(proven.end(written, bytes - at));
            }
            let commit = match read_commit(file, at, bytes) {
                Ok(commit) if commit.id.number != number => {
                    let what = format!("commit {} lies in its place", commit.id.number);
                    return Err(self.damaged(number, what));
                }
                Ok(commit) if commit.previous != before.chain => {
                    let what = "it does not follow the commit before it (chain hash)".to_owned();
                    return Err(self.damaged(number, what));
                }
                Ok(commit) => commit,
                Err(Unreadable::Io(error)) => return Err(self.io("can't read", &error)),
                Err(Unreadable::Malformed(what)) => {
                    if number <= settled.number {
                        // Needed no more, and neither is what lies behind it, unless that is.
                        if self.commit_behind(file, at, bytes, settled.number)? && !self.tolerate_loss {
                            return Err(self.damaged(number, what.to_string()));
                        }
                        return self.end(file, at, bytes, proven);
                    }
                    if next.is_some() || (self.acknowledged(number) && !self.tolerate_loss) {
                        let ends =
                            written(file, at, bytes).map_err(|error| self.io("can't read", &error))? == 0;
                        let what = match next {
                            _ if !ends => what.to_string(),
                            Some(next) => {
                                format!(
                                    "the commits from {number} to {} are missing",
                                    next.first.saturating_sub(1)
                                )
                            }
                            None => {
                                format!("the log ends here, but commit {} was acknowledged", self.tip.number)
                            }
                        };
                        return Err(self.damaged(number, what));
                    }
                    if !self.tolerate_loss && self.commit_behind(file, at, bytes, number)? {
                        let what = format!("{what}, and later commits lie behind it");
                        return Err(self.damaged(number, what));
                    }
                    return self.end(file, at, bytes, proven);
                }
            };
            let length = (commit::HEADER_BYTES + commit.body.len()) as u64;
            at += length;
            proven.bytes += length;
            before = commit.id;
            if number > settled.number {
                proven.last = commit.id;
                each(commit)?;
            }
        }
    }

    /// How a file ends that has no commit at `at`, once that is known not to be damage.
    fn end(&self, file: &dyn ReadAt, at: u64, bytes: u64, proven: &mut Proven) -> Result<End, OpenError> {
        let written = written(file, at, bytes).map_err(|error| self.io("can't read", &error))?;
        Ok(proven.end(written, bytes - at))
    }

    /// Whether a whole header of a later commit stands somewhere behind `at`.
    fn commit_behind(&self, file: &dyn ReadAt, at: u64, bytes: u64, number: u64) -> Result<bool, OpenError> {
        let mut from = at.saturating_add(1);
        let mut window = vec![0; SEARCH_BYTES + commit::HEADER_BYTES];
        while from < bytes {
            let length = usize::try_from(bytes - from).unwrap_or(usize::MAX).min(window.len());
            let Some(found) = window.get_mut(..length) else { break };
            file.read_exact_at(found, from).map_err(|error| self.io("can't read", &error))?;
            let later = found
                .windows(commit::HEADER_BYTES)
                .filter(|bytes| bytes.starts_with(&commit::MAGIC))
                .any(|bytes| Header::decode(bytes).is_ok_and(|header| header.id.number > number));
            if later {
                return Ok(true);
            }
            from += SEARCH_BYTES as u64;
        }
        Ok(false)
    }

    fn acknowledged(&self, number: u64) -> bool {
        self.tip.number > 0 && number <= self.tip.number
    }

    fn damaged(&self, commit: u64, what: String) -> OpenError {
        OpenError::Damaged { shard: self.shard, commit, what }
    }

    fn io(&self, doing: &str, error: &io::Error) -> OpenError {
        OpenError::Log { shard: self.shard, reason: format!("{doing} its files: {error}") }
    }
}

/// How many of the bytes from `at` on are left without the zeros at their end.
fn written(file: &dyn ReadAt, at: u64, bytes: u64) -> io::Result<u64> {
    let mut window = vec![0; SEARCH_BYTES];
    let (mut from, mut end) = (at, at);
    while from < bytes {
        let length = usize::try_from(bytes - from).unwrap_or(usize::MAX).min(window.len());
        let Some(found) = window.get_mut(..length) else { break };
        file.read_exact_at(found, from)?;
        if let Some(last) = found.iter().rposition(|byte| *byte != 0) {
            end = from + last as u64 + 1;
        }
        from += length as u64;
    }
    Ok(end - at)
}

enum Unreadable {
    Io(io::Error),
    Malformed(Malformed),
}

fn read_commit(file: &dyn ReadAt, at: u64, bytes: u64) -> Result<Commit, Unreadable> {
    let short = || Unreadable::Malformed(Malformed("commit: it is cut off"));
    let left = bytes.saturating_sub(at);
    if left < commit::HEADER_BYTES as u64 {
        return Err(short());
    }
    let mut start = [0; commit::HEADER_BYTES];
    file.read_exact_at(&mut start, at).map_err(Unreadable::Io)?;
    let header = Header::decode(&start).map_err(Unreadable::Malformed)?;
    let length = commit::HEADER_BYTES + header.body_bytes;
    if (length as u64) > left {
        return Err(short());
    }
    let mut whole = vec![0; length];
    file.read_exact_at(&mut whole, at).map_err(Unreadable::Io)?;
    commit::decode(Bytes::from(whole)).map_err(Unreadable::Malformed)
}

/// Whole commits from number `from` on, at most `limit`; those that are settled may be gone. For readers beside a log that
/// is being written: an unreadable end is just the end.
pub(crate) fn read_some(files: &dyn Files, from: u64, limit: usize) -> io::Result<Vec<Commit>> {
    let mut commits: Vec<Commit> = Vec::new();
    let list = list(files)?;
    for (place, (first, bytes)) in list.iter().enumerate() {
        let next = list.get(place + 1).map(|(first, _)| *first);
        if next.is_some_and(|next| next <= from) {
            continue;
        }
        let file: Arc<dyn ReadAt> = match files.open(&name(*first)) {
            Ok(file) => file,
            // Settled and removed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let mut at = HEADER_BYTES as u64;
        while at < *bytes && commits.len() < limit {
            let commit = match read_commit(file.as_ref(), at, *bytes) {
                Ok(commit) => commit,
                Err(Unreadable::Io(error)) => return Err(error),
                Err(Unreadable::Malformed(_)) => break,
            };
            at += (commit::HEADER_BYTES + commit.body.len()) as u64;
            let number = commit.id.number;
            if next.is_some_and(|next| next <= number) {
                break;
            }
            let follows = commits.last().is_none_or(|last| last.id.number.saturating_add(1) == number);
            if number >= from && follows {
                commits.push(commit);
            }
        }
    }
    Ok(commits)
}
