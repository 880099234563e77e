//! Making a data folder from an export.
//!
//! - The whole file is read and checked before anything is written; then it is read again and becomes segments, as a
//!   settled log of the new folder.
//! - The new folder is made beside its place, its index is built, everything in it is read back and compared with the
//!   file, and only then it gets its name. Whatever goes wrong before that leaves nothing.
//! - With the shard count of the file, every number stays what it is. With another one, users and conversations get new
//!   numbers, the same one wherever they are named. New ones are above all old ones, so that a number which a
//!   device remembers never comes to mean something else.
//! - What a file says is checked like anything else from outside; memory is bounded by the users and conversations there are.
//!
//! Not here: the lines (`line`), where they come from (`export`).

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::{self, File},
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use fulmar_protocol::{
    id::{AppId, ConversationId, Seq, ShardId, UserId},
    limit::{NAME_BYTES_MAX, SHARDS_MAX},
};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::{
    MaintainError, Progress,
    export::{self, ExportOptions, ExportReport, Numbers, hex, sync_parent},
    line::{App, EXPORT_VERSION, LINE_BYTES_MAX, Line, lane_state},
};
use crate::{
    Durability, EngineKind, OpenError, Record, StoreOptions,
    commit::{self, CommitId},
    files::{Files, disk::Disk},
    format::Folder,
    key::{self, Key, Table},
    record::RECORD_PAYLOAD_BYTES_MAX,
    row::{ConversationClass, ConversationMeta, Device, Head, Member, Number, PendingLink, Row, User},
    segment::SegmentWriter,
    shard::{
        journal::Journal,
        manifest::{Entry, Manifest},
        overlay::{Counters, full_key},
        tip::Tip,
    },
};

/// How a compressed file begins.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Bytes after which a segment is ended and the next one begun.
const SEGMENT_BYTES: u64 = 64 << 20;

/// Bytes of rows kept in memory over all shards, until they go into a segment.
const ROW_BYTES: usize = 128 << 20;

/// Memory a row takes besides its bytes, about.
const ROW_OVERHEAD: usize = 64;

/// Lines between two words of progress.
const TELL_EVERY: u64 = 256;

/// What is imported, and how.
#[derive(Clone, Copy)]
pub struct ImportOptions<'a> {
    /// Shards of the new folder; `None`: as many as the file has. Another count gives every user and every conversation
    /// a new number: devices have to start with an empty database.
    pub shards: Option<u16>,
    /// Replaces the numbers of users in payloads and names, if numbers change.
    pub numbers: &'a dyn Numbers,
    /// Set from elsewhere: stop as soon as possible, and leave nothing.
    pub stop: &'a AtomicBool,
}

impl std::fmt::Debug for ImportOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImportOptions").field("shards", &self.shards).finish_non_exhaustive()
    }
}

/// What was imported.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ImportReport {
    /// What the new folder holds, as it was read back from it.
    pub imported: ExportReport,
    /// Shards of the new folder.
    pub shards: u16,
    /// Its engine.
    pub engine: String,
    /// Users and conversations have new numbers.
    pub renumbered: bool,
}

/// Makes the folder `to` from the export `from`. `options` say which engine it has and how it is opened. `to` must not
/// exist, or be an empty folder.
///
/// # Errors
/// The file is not a whole export or contradicts itself, or the folder can't be written: then nothing is left.
pub fn import(
    from: &Path,
    to: &Path,
    options: &StoreOptions,
    how: &ImportOptions<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<ImportReport, MaintainError> {
    if options.engine == EngineKind::Memory {
        return Err(
            OpenError::Options("an import makes a folder on disk: choose the engine sled or fjall").into()
        );
    }
    check_empty(to)?;
    let file = Source { path: from, stop: how.stop };
    let checked = file.check(progress)?;
    let shards = how.shards.unwrap_or(checked.shards);
    if shards == 0 || u64::from(shards) > SHARDS_MAX {
        return Err(OpenError::Options("a store has 1 to 256 shards").into());
    }
    let numbering = if shards == checked.shards {
        checked.check_places(from)?;
        None
    } else {
        Some(checked.numbering(from, shards, how.numbers)?)
    };
    let making = Making::begin(to)?;
    let at = making.path.as_path();
    let options = StoreOptions { shards, ..options.clone() };
    {
        let folder = Folder::open(at, shards, options.engine)?;
        let mut target = Target::begin(&folder, shards)?;
        let sha256 = file.each(progress, "importing", |number, line| {
            let failed = |what: String| file.broken(number, what);
            let line = match &numbering {
                Some(numbering) => numbering.line(line, how.numbers).map_err(failed)?,
                None => Some(line),
            };
            match line {
                Some(line) => target.put(line).map_err(|error| error.or(failed)),
                None => Ok(()),
            }
        })?;
        if sha256 != checked.sha256 {
            return Err(file.broken(1, "the file was changed while it was imported".to_owned()));
        }
        if let Some(numbering) = &numbering {
            target.count_from(numbering);
        }
        target.finish().map_err(|error| error.or(|what| file.broken(1, what)))?;
    }
    let imported = read_back(at, &options, how, progress)?;
    let counts = |of: &ExportReport| (of.lines, of.users, of.conversations, of.records);
    if counts(&imported) != (checked.lines, checked.users, checked.conversations, checked.records)
        && !(numbering.is_some() && imported.records == checked.records && imported.users == checked.users)
    {
        let what = format!(
            "{} lines, {} records instead of {} and {}",
            imported.lines, imported.records, checked.lines, checked.records
        );
        return Err(MaintainError::Differs { what });
    }
    if numbering.is_none() && imported.sha256 != checked.sha256 {
        return Err(MaintainError::Differs { what: format!("hash {}", imported.sha256) });
    }
    making.finish(to)?;
    Ok(ImportReport {
        imported,
        shards,
        engine: options.engine.name().to_owned(),
        renumbered: numbering.is_some(),
    })
}

fn check_empty(to: &Path) -> Result<(), MaintainError> {
    match fs::read_dir(to) {
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => Err(MaintainError::NotEmpty { path: to.to_owned() }),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(MaintainError::io("can't read the folder", to)(error)),
    }
}

/// Opens the new folder, which builds its index, and reads everything in it.
fn read_back(
    at: &Path,
    options: &StoreOptions,
    how: &ImportOptions<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<ExportReport, MaintainError> {
    let (store, _) = export::open_to_read(at, options)?;
    let what = ExportOptions { app: None, conversation: None, numbers: how.numbers, stop: how.stop };
    export::body(&store, &what, &mut io::sink(), &mut |told| {
        progress(Progress { doing: "reading back", ..told });
    })
}

/// The folder beside its place, gone unless it was finished.
struct Making {
    path: PathBuf,
    finished: bool,
}

impl Making {
    fn begin(to: &Path) -> Result<Self, MaintainError> {
        let name = to.file_name().unwrap_or_default().to_string_lossy();
        let path = to.with_file_name(format!(".{name}.importing"));
        if path.exists() {
            // Left by an import that was killed, unless one is at work right now.
            match Folder::open(&path, 1, EngineKind::Sled) {
                Ok(_) | Err(OpenError::OtherEngine { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            fs::remove_dir_all(&path).map_err(MaintainError::io("can't remove", &path))?;
        }
        fs::create_dir_all(&path).map_err(MaintainError::io("can't make the folder", &path))?;
        Ok(Self { path, finished: false })
    }

    fn finish(mut self, to: &Path) -> Result<(), MaintainError> {
        // Replaces an empty folder, and nothing else.
        fs::rename(&self.path, to).map_err(MaintainError::io("can't give the new folder its name", to))?;
        self.finished = true;
        sync_parent(to)
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        if !self.finished
            && let Err(error) = fs::remove_dir_all(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "what was begun could not be removed");
        }
    }
}

// ---- the file

struct Source<'a> {
    path: &'a Path,
    stop: &'a AtomicBool,
}

/// A file whose bytes are counted as they are read.
struct Counted {
    file: File,
    read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.file.read(buffer)?;
        self.read.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(bytes)
    }
}

/// A file that is read line by line.
struct Opened {
    lines: Box<dyn BufRead>,
    /// Bytes of the file read so far.
    read: Arc<AtomicU64>,
    /// Bytes of the file.
    of: u64,
}

/// What reading the whole file showed.
struct Checked {
    shards: u16,
    lines: u64,
    users: u64,
    conversations: u64,
    records: u64,
    sha256: String,
    named_users: Vec<(UserId, AppId, String, u64)>,
    named_conversations: Vec<(ConversationId, ConversationMeta, u64)>,
    /// The largest local number, of either kind, in the file.
    last: u64,
}

impl Source<'_> {
    fn io(&self) -> impl Fn(io::Error) -> MaintainError {
        let path = self.path.to_owned();
        move |error| MaintainError::io("can't read", &path)(error)
    }

    fn broken(&self, line: u64, what: String) -> MaintainError {
        MaintainError::Line { path: self.path.to_owned(), line, what }
    }

    fn open(&self) -> Result<Opened, MaintainError> {
        let mut file = File::open(self.path).map_err(MaintainError::io("can't open", self.path))?;
        let mut magic = [0; ZSTD_MAGIC.len()];
        let compressed = file.read_exact(&mut magic).is_ok() && magic == ZSTD_MAGIC;
        io::Seek::rewind(&mut file).map_err(self.io())?;
        let of = file.metadata().map_err(self.io())?.len();
        let read = Arc::new(AtomicU64::new(0));
        let counted = Counted { file, read: Arc::clone(&read) };
        let lines: Box<dyn BufRead> = if compressed {
            Box::new(BufReader::new(zstd::Decoder::new(counted).map_err(self.io())?))
        } else {
            Box::new(BufReader::new(counted))
        };
        Ok(Opened { lines, read, of })
    }

    /// Calls `each` with the number and the content of every line between the first and the last one. Returns the hash
    /// over them.
    fn each(
        &self,
        progress: &mut dyn FnMut(Progress),
        doing: &'static str,
        mut each: impl FnMut(u64, Line) -> Result<(), MaintainError>,
    ) -> Result<String, MaintainError> {
        let Opened { mut lines, read, of } = self.open()?;
        let mut told = Progress {
            shard: ShardId::new(0).unwrap_or_else(|| UserId::default().shard()),
            doing,
            done: 0,
            of,
        };
        let mut hash = Sha256::new();
        let mut text = Vec::new();
        for number in 1u64.. {
            if self.stop.load(Ordering::Relaxed) {
                return Err(MaintainError::Stopped);
            }
            text.clear();
            let limit = LINE_BYTES_MAX as u64 + 1;
            (&mut lines).take(limit).read_until(b'\n', &mut text).map_err(self.io())?;
            if text.len() > LINE_BYTES_MAX {
                return Err(self.broken(number, "the line is too long to be one of an export".to_owned()));
            }
            if text.last() != Some(&b'\n') {
                let what = "the file ends here, before its last line: it is not whole".to_owned();
                return Err(self.broken(number, what));
            }
            let line: Line = serde_json::from_slice(&text).map_err(|error| {
                let what =
                    if number == 1 { "not an export of a data folder" } else { "not a line of an export" };
                self.broken(number, format!("{what} ({error})"))
            })?;
            if let Line::Shard { shard, .. } = line
                && let Some(shard) = ShardId::new(shard)
            {
                told.shard = shard;
            }
            let last = matches!(line, Line::End { .. });
            if number > 1 && !last {
                hash.update(&text);
            }
            each(number, line)?;
            if last {
                break;
            }
            if number % TELL_EVERY == 0 {
                told.done = read.load(Ordering::Relaxed);
                progress(told);
            }
        }
        let more = lines.fill_buf().map_err(self.io())?;
        if !more.is_empty() {
            return Err(self.broken(1, "something follows its last line: it is not one export".to_owned()));
        }
        told.done = of;
        progress(told);
        Ok(hex(&hash.finalize()))
    }

    /// Reads the whole file and refuses what contradicts itself.
    fn check(&self, progress: &mut dyn FnMut(Progress)) -> Result<Checked, MaintainError> {
        let mut check = Check::default();
        let sha256 = self.each(progress, "checking the file", |number, line| {
            check.line(number, line).map_err(|what| self.broken(number, what))
        })?;
        let end = |what: &str| self.broken(check.number, what.to_owned());
        let Some(found) = check.end else { return Err(end("it has no last line")) };
        let counted = (check.lines, check.users.len() as u64, check.named, check.records);
        if (found.lines, found.users, found.conversations, found.records) != counted {
            return Err(end("the counts are not those of the lines: the file is damaged or was changed"));
        }
        if found.sha256 != sha256 {
            return Err(end("the hash is not that of the lines: the file is damaged or was changed"));
        }
        Ok(Checked {
            shards: check.shards,
            lines: found.lines,
            users: found.users,
            conversations: found.conversations,
            records: found.records,
            sha256,
            named_users: check.named_users,
            named_conversations: check.named_conversations,
            last: check.last,
        })
    }
}

/// The last line.
struct Ended {
    lines: u64,
    users: u64,
    conversations: u64,
    records: u64,
    sha256: String,
}

/// The log that is being read.
struct Log {
    conversation: ConversationId,
    next: Seq,
    count: u64,
    head: Seq,
    head_count: u64,
}

/// The rules of a file.
#[derive(Default)]
struct Check {
    /// The line that is being looked at.
    number: u64,
    shards: u16,
    lines: u64,
    records: u64,
    named: u64,
    users: HashSet<UserId>,
    conversations: HashSet<ConversationId>,
    named_users: Vec<(UserId, AppId, String, u64)>,
    named_conversations: Vec<(ConversationId, ConversationMeta, u64)>,
    log: Option<Log>,
    last_head: HashMap<u16, ConversationId>,
    last: u64,
    end: Option<Ended>,
}

type Checks = Result<(), String>;

fn name_fits(name: &str) -> Checks {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(format!("a name has 1 to {NAME_BYTES_MAX} bytes, not {}", name.len()));
    }
    Ok(())
}

impl Check {
    fn line(&mut self, number: u64, line: Line) -> Checks {
        self.number = number;
        if number == 1 {
            let Line::Export { version, shards, .. } = line else {
                return Err("not an export of a data folder".to_owned());
            };
            if version != EXPORT_VERSION {
                return Err(format!(
                    "the file has version {version}, this program reads version {EXPORT_VERSION}: use a newer program"
                ));
            }
            if shards == 0 || u64::from(shards) > SHARDS_MAX {
                return Err("a store has 1 to 256 shards".to_owned());
            }
            self.shards = shards;
            return Ok(());
        }
        if !matches!(line, Line::Record(_)) {
            self.end_log()?;
        }
        match line {
            Line::Export { .. } => return Err("a second first line".to_owned()),
            Line::End { lines, users, conversations, records, sha256 } => {
                self.end = Some(Ended { lines, users, conversations, records, sha256 });
                return Ok(());
            }
            Line::Shard { shard, users, conversations } => {
                if shard >= self.shards {
                    return Err(format!("there is no shard {shard} among {}", self.shards));
                }
                self.last = self.last.max(users).max(conversations);
            }
            Line::User { user, app, name, .. } => {
                self.here(user.shard())?;
                name_fits(&name)?;
                if user == UserId::default() || !self.users.insert(user) {
                    return Err(format!("user {user} for the second time"));
                }
                self.last = self.last.max(user.get() / SHARDS_MAX);
                self.named_users.push((user, app.0, name, number));
            }
            Line::Conversation { conversation, app, class, name, creator, created } => {
                self.here(conversation.shard())?;
                name_fits(&name)?;
                if conversation == ConversationId::default() || !self.conversations.insert(conversation) {
                    return Err(format!("conversation {conversation} for the second time"));
                }
                self.named += 1;
                self.last = self.last.max(conversation.get() / SHARDS_MAX);
                let meta = ConversationMeta { app: app.0, class: class.into(), name, creator, created };
                self.named_conversations.push((conversation, meta, number));
            }
            Line::Head { conversation, seq, count, low, low_count, .. } => {
                self.here(conversation.shard())?;
                let last = self.last_head.insert(conversation.shard().get(), conversation);
                if last.is_some_and(|last| last >= conversation) {
                    return Err(format!("conversation {conversation} is out of order"));
                }
                if low > seq || low_count > count {
                    return Err(format!("conversation {conversation} begins after its end"));
                }
                self.last = self.last.max(conversation.get() / SHARDS_MAX);
                let next = low.saturating_add(1);
                self.log = Some(Log { conversation, next, count: low_count, head: seq, head_count: count });
            }
            Line::Record(line) => {
                self.records += 1;
                let conversation = line.conversation;
                let record = Record::from(*line);
                let log = self.log.as_mut().filter(|log| log.conversation == conversation);
                let Some(log) = log.filter(|log| log.next == record.seq && record.seq <= log.head) else {
                    return Err(format!(
                        "conversation {conversation}: record {} is out of place",
                        record.seq
                    ));
                };
                if record.count < log.count || record.count > log.head_count {
                    return Err(format!("conversation {conversation}: the count jumps at {}", record.seq));
                }
                if record.payload.len() > RECORD_PAYLOAD_BYTES_MAX {
                    return Err(format!("a payload of {} bytes is too large", record.payload.len()));
                }
                log.next = log.next.saturating_add(1);
                log.count = record.count;
            }
            Line::Lane { conversation, epoch, last, recent, .. } => {
                self.here(conversation.shard())?;
                lane_state(epoch, last, recent).ok_or("a lane that remembers too much")?;
            }
            Line::Device { user, .. }
            | Line::Login { user, .. }
            | Line::Listed { user, .. }
            | Line::Received { user, .. } => self.here(user.shard())?,
            Line::Member { conversation, .. }
            | Line::Read { conversation, .. }
            | Line::Link { conversation, .. } => self.here(conversation.shard())?,
        }
        self.lines += 1;
        Ok(())
    }

    fn here(&self, shard: ShardId) -> Checks {
        if shard.get() < self.shards {
            return Ok(());
        }
        Err(format!("a number of shard {shard}, and there are only {}", self.shards))
    }

    fn end_log(&mut self) -> Checks {
        match self.log.take() {
            Some(log) if log.next != log.head.saturating_add(1) => Err(format!(
                "conversation {}: the records from {} to {} are missing",
                log.conversation, log.next, log.head
            )),
            _ => Ok(()),
        }
    }
}

// ---- numbers

impl Checked {
    /// With the numbers as they are, everything must lie where its name is looked for.
    fn check_places(&self, path: &Path) -> Result<(), MaintainError> {
        let broken = |line: u64, what: String| MaintainError::Line { path: path.to_owned(), line, what };
        let mut names = HashSet::with_capacity(self.named_users.len() + self.named_conversations.len());
        let users = self.named_users.iter();
        let users = users.map(|(user, app, name, line)| (user.shard(), *app, key::KIND_USER, name, *line));
        let conversations = self.named_conversations.iter().map(|(conversation, meta, line)| {
            (conversation.shard(), meta.app, key::kind_of(meta.class), &meta.name, *line)
        });
        for (shard, app, kind, name, line) in users.chain(conversations) {
            if !names.insert((app, kind, name)) {
                return Err(broken(line, format!("the name {name:?} for the second time")));
            }
            if ShardId::of_name(app, kind, name.as_bytes(), self.shards) != shard {
                return Err(broken(line, format!("{name:?} does not belong to shard {shard}")));
            }
        }
        Ok(())
    }

    /// New numbers for everything that has a name.
    fn numbering(&self, path: &Path, shards: u16, numbers: &dyn Numbers) -> Result<Numbering, MaintainError> {
        let broken = |line: u64, what: String| MaintainError::Line { path: path.to_owned(), line, what };
        let mut numbering = Numbering {
            users: HashMap::with_capacity(self.named_users.len()),
            conversations: HashMap::with_capacity(self.named_conversations.len()),
            last_users: vec![self.last; usize::from(shards)],
            last_conversations: vec![self.last; usize::from(shards)],
        };
        let mut names = HashSet::new();
        for (user, app, name, line) in &self.named_users {
            if !names.insert((*app, key::KIND_USER, name.clone())) {
                return Err(broken(*line, format!("the name {name:?} for the second time")));
            }
            let shard = ShardId::of_name(*app, key::KIND_USER, name.as_bytes(), shards);
            let number = next(&mut numbering.last_users, shard).and_then(UserId::new);
            let number = number.ok_or_else(|| broken(*line, "no number is left".to_owned()))?;
            numbering.users.insert(*user, number);
        }
        for (conversation, meta, line) in &self.named_conversations {
            let name = numbering.name(meta.class, &meta.name, numbers).map_err(|what| broken(*line, what))?;
            let kind = key::kind_of(meta.class);
            let shard = ShardId::of_name(meta.app, kind, name.as_bytes(), shards);
            if !names.insert((meta.app, kind, name)) {
                return Err(broken(*line, format!("the name {:?} for the second time", meta.name)));
            }
            let number = next(&mut numbering.last_conversations, shard).and_then(ConversationId::new);
            let number = number.ok_or_else(|| broken(*line, "no number is left".to_owned()))?;
            numbering.conversations.insert(*conversation, number);
        }
        Ok(numbering)
    }
}

/// The next number of a shard.
fn next(last: &mut [u64], shard: ShardId) -> Option<u64> {
    let last = last.get_mut(usize::from(shard.get()))?;
    *last = last.checked_add(1)?;
    shard.number(*last)
}

/// Which number becomes which.
struct Numbering {
    users: HashMap<UserId, UserId>,
    conversations: HashMap<ConversationId, ConversationId>,
    /// The last local number of each shard.
    last_users: Vec<u64>,
    last_conversations: Vec<u64>,
}

impl Numbering {
    fn user(&self, user: UserId) -> Result<UserId, String> {
        if user == UserId::default() {
            return Ok(user);
        }
        self.users.get(&user).copied().ok_or_else(|| {
            format!("user {user} is not in the file, and so can't get a new number: keep the shard count of the file")
        })
    }

    fn conversation(&self, conversation: ConversationId) -> Result<ConversationId, String> {
        self.conversations.get(&conversation).copied().ok_or_else(|| {
            format!(
                "conversation {conversation} has no name in the file, and so can't get a new number: keep the shard count of \
                 the file"
            )
        })
    }

    fn name(&self, class: ConversationClass, name: &str, numbers: &dyn Numbers) -> Result<String, String> {
        numbers.name(class, name, &mut |user| self.user(user).ok()).ok_or_else(|| {
            format!("the name {name:?} has a number that can't be replaced: keep the shard count of the file")
        })
    }

    /// A line with new numbers; `None`: there is none in the new folder.
    fn line(&self, line: Line, numbers: &dyn Numbers) -> Result<Option<Line>, String> {
        let u = |user| self.user(user);
        let c = |conversation| self.conversation(conversation);
        Ok(Some(match line {
            Line::Export { .. } | Line::End { .. } | Line::Shard { .. } => return Ok(None),
            Line::User { user, app, name, created } => Line::User { user: u(user)?, app, name, created },
            Line::Device { user, device, uid, class, epoch, class_epoch, seen } => {
                Line::Device { user: u(user)?, device, uid, class, epoch, class_epoch, seen }
            }
            Line::Login { user, class, epoch } => Line::Login { user: u(user)?, class, epoch },
            Line::Listed { user, conversation, joined, cleared, muted, changed } => {
                let (user, conversation) = (u(user)?, c(conversation)?);
                Line::Listed { user, conversation, joined, cleared, muted, changed }
            }
            Line::Received { user, device, conversation, seq } => {
                Line::Received { user: u(user)?, device, conversation: c(conversation)?, seq }
            }
            Line::Conversation { conversation, app, class, name, creator, created } => {
                let name = self.name(class.into(), &name, numbers)?;
                let (conversation, creator) = (c(conversation)?, u(creator)?);
                Line::Conversation { conversation, app, class, name, creator, created }
            }
            Line::Head { conversation, seq, count, time, low, low_count, members } => {
                Line::Head { conversation: c(conversation)?, seq, count, time, low, low_count, members }
            }
            Line::Record(line) => {
                let conversation = line.conversation;
                let mut record = Record::from(*line);
                let mut map = |user| self.user(user).ok();
                let payload = numbers.payload(record.kind, &record.payload, &mut map).ok_or_else(|| {
                    format!(
                        "the payload of record {} has a number that can't be replaced: keep the shard count of the file",
                        record.seq
                    )
                })?;
                if payload.len() > RECORD_PAYLOAD_BYTES_MAX {
                    return Err(format!("with new numbers, record {} is too large", record.seq));
                }
                record.payload = payload;
                record.sender = u(record.sender)?;
                Line::Record(Box::new((c(conversation)?, record).into()))
            }
            Line::Member { conversation, user, role, joined, since } => {
                Line::Member { conversation: c(conversation)?, user: u(user)?, role, joined, since }
            }
            Line::Read { conversation, user, seq } => {
                Line::Read { conversation: c(conversation)?, user: u(user)?, seq }
            }
            Line::Lane { conversation, user, device, epoch, last, recent } => {
                Line::Lane { conversation: c(conversation)?, user: u(user)?, device, epoch, last, recent }
            }
            Line::Link { conversation, user, listed } => {
                Line::Link { conversation: c(conversation)?, user: u(user)?, listed }
            }
        }))
    }
}

// ---- the folder

/// Why a line did not become part of the folder.
enum Refused {
    /// The line's fault.
    Line(String),
    Failed(MaintainError),
}

impl Refused {
    fn or(self, line: impl FnOnce(String) -> MaintainError) -> MaintainError {
        match self {
            Self::Line(what) => line(what),
            Self::Failed(error) => error,
        }
    }
}

/// The shards that are being written.
struct Target {
    shards: Vec<Shard>,
    /// Bytes of rows one shard keeps in memory.
    row_bytes: usize,
}

/// A shard that is being written: a settled log, in segments of one commit each.
struct Shard {
    id: ShardId,
    path: PathBuf,
    files: Disk,
    segment: Option<SegmentWriter>,
    rows: BTreeMap<Vec<u8>, Vec<u8>>,
    row_bytes: usize,
    manifest: Manifest,
}

impl Target {
    fn begin(folder: &Folder, shards: u16) -> Result<Self, MaintainError> {
        let mut begun = Vec::with_capacity(usize::from(shards));
        for id in (0..shards).filter_map(ShardId::new) {
            let path = folder.shard(id)?;
            begun.push(Shard {
                id,
                files: Disk::new(&path),
                path,
                segment: None,
                rows: BTreeMap::new(),
                row_bytes: 0,
                manifest: Manifest { edition: 1, ..Manifest::default() },
            });
        }
        Ok(Self { shards: begun, row_bytes: ROW_BYTES / usize::from(shards.max(1)) })
    }

    fn shard(&mut self, shard: ShardId) -> Result<&mut Shard, Refused> {
        let found = self.shards.get_mut(usize::from(shard.get()));
        found.ok_or_else(|| Refused::Line(format!("there is no shard {shard}")))
    }

    /// New numbers begin after those that were given.
    fn count_from(&mut self, numbering: &Numbering) {
        let last = numbering.last_users.iter().zip(&numbering.last_conversations);
        for (shard, (users, conversations)) in self.shards.iter_mut().zip(last) {
            shard.manifest.counters = Counters { users: *users, conversations: *conversations, epoch: 0 };
        }
    }

    fn put(&mut self, line: Line) -> Result<(), Refused> {
        let row_bytes = self.row_bytes;
        let shard = match line {
            Line::Export { .. } | Line::End { .. } => return Ok(()),
            Line::Shard { shard, users, conversations } => {
                let id =
                    ShardId::new(shard).ok_or_else(|| Refused::Line(format!("there is no shard {shard}")))?;
                self.shard(id)?.manifest.counters = Counters { users, conversations, epoch: 0 };
                return Ok(());
            }
            Line::User { user, app: App(app), name, created } => {
                let shard = self.shard(user.shard())?;
                shard.row(Table::Name, &Key::name(app, key::KIND_USER, &name), &Number(user.get()));
                shard.row(Table::User, &Key::user(user), &User { app, name, created });
                shard
            }
            Line::Device { user, device, uid, class, epoch, class_epoch, seen } => {
                let shard = self.shard(user.shard())?;
                shard.row(Table::Uid, &Key::uid(user, uid), &Number(device.get()));
                let row = Device { uid, class, epoch, class_epoch, seen };
                shard.row(Table::Device, &Key::device(user, device), &row);
                shard
            }
            Line::Login { user, class, epoch } => {
                let shard = self.shard(user.shard())?;
                shard.row(Table::ClassEpoch, &Key::class_epoch(user, class), &Number(epoch.get()));
                shard
            }
            Line::Listed { user, conversation, joined, cleared, muted, changed } => {
                let shard = self.shard(user.shard())?;
                let row = crate::Listed { joined, cleared, muted, changed };
                shard.row(Table::Listed, &Key::user_conversation(user, conversation), &row);
                shard
            }
            Line::Received { user, device, conversation, seq } => {
                let shard = self.shard(user.shard())?;
                shard.row(Table::Recv, &Key::recv(user, device, conversation), &Number(seq.get()));
                shard
            }
            Line::Conversation { conversation, app: App(app), class, name, creator, created } => {
                let shard = self.shard(conversation.shard())?;
                let class = ConversationClass::from(class);
                let named = Key::name(app, key::kind_of(class), &name);
                shard.row(Table::Name, &named, &Number(conversation.get()));
                let row = ConversationMeta { app, class, name, creator, created };
                shard.row(Table::Conversation, &Key::conversation(conversation), &row);
                shard
            }
            Line::Head { conversation, seq, count, time, low, low_count, members } => {
                let shard = self.shard(conversation.shard())?;
                let row = Head { seq, count, time, low, low_count, members };
                shard.row(Table::Head, &Key::conversation(conversation), &row);
                shard
            }
            Line::Record(line) => {
                let conversation = line.conversation;
                let shard = self.shard(conversation.shard())?;
                shard.record(conversation, &Record::from(*line)).map_err(Refused::Failed)?;
                shard
            }
            Line::Member { conversation, user, role, joined, since } => {
                let shard = self.shard(conversation.shard())?;
                let row = Member { role: role.into(), joined, since };
                shard.row(Table::Member, &Key::conversation_user(conversation, user), &row);
                shard
            }
            Line::Read { conversation, user, seq } => {
                let shard = self.shard(conversation.shard())?;
                shard.row(Table::Read, &Key::conversation_user(conversation, user), &Number(seq.get()));
                shard
            }
            Line::Lane { conversation, user, device, epoch, last, recent } => {
                let shard = self.shard(conversation.shard())?;
                let row = lane_state(epoch, last, recent);
                let row = row.ok_or_else(|| Refused::Line("a lane that remembers too much".to_owned()))?;
                shard.row(Table::Lane, &Key::lane(conversation, user, device), &row);
                shard
            }
            Line::Link { conversation, user, listed } => {
                let shard = self.shard(conversation.shard())?;
                let row = PendingLink { conversation, user, listed: listed.map(Into::into) };
                shard.row(Table::Link, &Key::conversation_user(conversation, user), &row);
                shard
            }
        };
        shard.end_segment_if_due(row_bytes).map_err(Refused::Failed)
    }

    fn finish(self) -> Result<(), Refused> {
        for shard in self.shards {
            shard.finish().map_err(Refused::Failed)?;
        }
        Ok(())
    }
}

impl Shard {
    fn io(&self) -> impl Fn(io::Error) -> MaintainError + use<> {
        let path = self.path.clone();
        move |error| MaintainError::io("can't write a shard in", &path)(error)
    }

    fn row<R: Row>(&mut self, table: Table, key: &Key, row: &R) {
        let (key, row) = (full_key(table, key.as_ref()), row.to_row());
        self.row_bytes += key.len() + row.len() + ROW_OVERHEAD;
        self.rows.insert(key, row);
    }

    fn record(&mut self, conversation: ConversationId, record: &Record) -> Result<(), MaintainError> {
        let io = self.io();
        let mut encoded = Vec::new();
        record.encode(conversation, &mut encoded);
        let segment = self.segment().map_err(&io)?;
        segment.record(conversation, record.seq, record.time, &encoded).map_err(io)
    }

    /// The segment that is being written.
    fn segment(&mut self) -> io::Result<&mut SegmentWriter> {
        if self.segment.is_none() {
            let id = self.manifest.next_segment;
            self.manifest.next_segment += 1;
            self.segment = Some(SegmentWriter::create(&self.files, self.id, id)?);
        }
        self.segment.as_mut().ok_or_else(|| io::Error::other("no segment is being written"))
    }

    fn end_segment_if_due(&mut self, row_bytes: usize) -> Result<(), MaintainError> {
        let bytes = self.segment.as_ref().map_or(0, SegmentWriter::bytes_written);
        if bytes < SEGMENT_BYTES && self.row_bytes < row_bytes {
            return Ok(());
        }
        self.end_segment()
    }

    fn end_segment(&mut self) -> Result<(), MaintainError> {
        let io = self.io();
        self.segment().map_err(&io)?;
        let Some(mut segment) = self.segment.take() else { return Ok(()) };
        for (full, row) in std::mem::take(&mut self.rows) {
            if let Some((table, key)) = full.split_first() {
                segment.row(*table, key, Some(&row)).map_err(&io)?;
            }
        }
        self.row_bytes = 0;
        // Each segment is what one commit without operations left behind, so that the log's numbers and hashes are whole.
        let (settled, _) = commit::encode(self.manifest.settled, 0, &[]);
        let summary = segment.finish(settled.number..=settled.number).map_err(&io)?;
        self.manifest.segments.push(Entry::new(&summary, self.manifest.edition, Vec::new()));
        self.manifest.settled = settled;
        Ok(())
    }

    fn finish(mut self) -> Result<(), MaintainError> {
        if self.segment.is_some() || !self.rows.is_empty() {
            self.end_segment()?;
        }
        let io = self.io();
        let settled = self.manifest.settled;
        let write = || {
            self.files.sync_folder()?;
            self.manifest.store(&self.files, self.id)?;
            let (tip, _) = Tip::open(&self.files)?;
            if settled != CommitId::ZERO {
                tip.write(settled)?;
            }
            Journal::begin(&self.files, self.id, Durability::Power, settled, 0).map(drop)
        };
        write().map_err(&io)
    }
}
