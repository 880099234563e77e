//! Writing a data folder as lines of JSON, for other programs and for another folder.
//!
//! - The folder is locked for as long as it is read, and everything that was committed is in the file: of each shard up to
//!   its last commit, which the first line names.
//! - Lines come shard by shard in order of tables and keys, so that a folder has one body, whatever its engine or its
//!   history. The last line has a hash of it.
//! - The file gets its name when it is whole and durable.
//!
//! Not here: the lines themselves (`line`), what payloads and names of conversations mean ([`Numbers`], the gateway's).

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use fulmar_protocol::id::{AppId, ConversationId, DeviceClass, ShardId, UnixMillis, UserId};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::{
    MaintainError, Progress,
    line::{App, EXPORT_VERSION, Line},
};
use crate::{
    EngineKind, ReadError, Store, StoreOptions,
    codec::Malformed,
    format,
    key::{Key, Table},
    reader::ShardReader,
    record::RecordKind,
    row::{
        ConversationClass, ConversationMeta, Device, Head, LaneState, Listed, Member, Number, PendingLink,
        Row, User,
    },
    shard::{manifest::Manifest, view::Limits},
};

/// How the names of compressed exports end.
const COMPRESSED_SUFFIX: &str = "zst";

/// Rows read at a time.
const PAGE_ROWS: usize = 512;

/// Records read at a time.
const PAGE: Limits = Limits { records: 512, bytes: 1 << 20 };

const CLASSES: [DeviceClass; 5] =
    [DeviceClass::Phone, DeviceClass::Tablet, DeviceClass::Desktop, DeviceClass::Web, DeviceClass::Bot];

/// What only whoever writes payloads and names of conversations knows: the numbers of users that stand in them.
pub trait Numbers {
    /// The payload of a record of this kind with the number of every user it names replaced. `None` if it can't be
    /// understood, or has a number that `map` does not know.
    fn payload(
        &self,
        kind: RecordKind,
        payload: &Bytes,
        map: &mut dyn FnMut(UserId) -> Option<UserId>,
    ) -> Option<Bytes>;

    /// The same for the name of a conversation.
    fn name(
        &self,
        class: ConversationClass,
        name: &str,
        map: &mut dyn FnMut(UserId) -> Option<UserId>,
    ) -> Option<String>;
}

/// What is exported, and how.
#[derive(Clone, Copy)]
pub struct ExportOptions<'a> {
    /// Only the users and conversations of this app.
    pub app: Option<AppId>,
    /// Only this conversation, with every user it names.
    pub conversation: Option<ConversationId>,
    /// Finds the users a conversation names.
    pub numbers: &'a dyn Numbers,
    /// Set from elsewhere: stop as soon as possible, and leave nothing.
    pub stop: &'a AtomicBool,
}

impl std::fmt::Debug for ExportOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExportOptions")
            .field("app", &self.app)
            .field("conversation", &self.conversation)
            .finish_non_exhaustive()
    }
}

/// Where an export goes.
pub enum ExportTo<'a> {
    /// A file that does not exist yet; compressed if its name ends in `.zst`.
    File(&'a Path),
    /// Anything else, uncompressed.
    Writer(&'a mut dyn Write),
}

impl std::fmt::Debug for ExportTo<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Writer(_) => f.debug_tuple("Writer").finish_non_exhaustive(),
        }
    }
}

/// What an export, or an import, holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ExportReport {
    /// Lines between the first and the last one.
    pub lines: u64,
    /// Users.
    pub users: u64,
    /// Devices.
    pub devices: u64,
    /// Conversations.
    pub conversations: u64,
    /// Memberships.
    pub members: u64,
    /// Records.
    pub records: u64,
    /// Bytes of lines, before they were compressed.
    pub bytes: u64,
    /// SHA-256 over the lines between the first and the last one, in hexadecimal digits.
    pub sha256: String,
}

/// Writes the folder at `path` as lines. `options` say how the folder is opened; engine and shard count are the folder's.
///
/// The folder is opened as a gateway would open it, and so must not be in use.
///
/// # Errors
/// The folder can't be opened, what is in it can't be read, or the file can't be written: then there is none.
pub fn export(
    path: &Path,
    options: &StoreOptions,
    to: ExportTo<'_>,
    what: &ExportOptions<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<ExportReport, MaintainError> {
    if let ExportTo::File(to) = to
        && to.exists()
    {
        return Err(MaintainError::Exists { path: to.to_owned() });
    }
    let (store, engine) = open_to_read(path, options)?;
    match to {
        ExportTo::Writer(out) => {
            let mut out = BufWriter::new(out);
            let report = write(&store, engine, what, &mut out, progress)?;
            out.flush().map_err(MaintainError::io("can't write", Path::new("the export")))?;
            Ok(report)
        }
        ExportTo::File(to) => {
            let unfinished = Unfinished::of(to);
            let failed = |error| MaintainError::io("can't write", to)(error);
            let file = File::create(&unfinished.path).map_err(failed)?;
            let report = if to.extension().is_some_and(|end| end == COMPRESSED_SUFFIX) {
                let mut encoder =
                    zstd::Encoder::new(file, zstd::DEFAULT_COMPRESSION_LEVEL).map_err(failed)?;
                encoder.include_checksum(true).map_err(failed)?;
                let mut out = BufWriter::new(encoder);
                let report = write(&store, engine, what, &mut out, progress)?;
                let encoder = out.into_inner().map_err(|error| failed(error.into_error()))?;
                encoder.finish().and_then(|file| file.sync_all()).map_err(failed)?;
                report
            } else {
                let mut out = BufWriter::new(file);
                let report = write(&store, engine, what, &mut out, progress)?;
                let file = out.into_inner().map_err(|error| failed(error.into_error()))?;
                file.sync_all().map_err(failed)?;
                report
            };
            unfinished.finish(to)?;
            Ok(report)
        }
    }
}

/// The file beside its place, gone unless it was finished.
struct Unfinished {
    path: PathBuf,
    finished: bool,
}

impl Unfinished {
    fn of(to: &Path) -> Self {
        let name = to.file_name().unwrap_or_default().to_string_lossy();
        Self { path: to.with_file_name(format!(".{name}.unfinished")), finished: false }
    }

    fn finish(mut self, to: &Path) -> Result<(), MaintainError> {
        fs::rename(&self.path, to).map_err(MaintainError::io("can't write", to))?;
        self.finished = true;
        sync_parent(to)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.finished {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Makes the entry of `path` durable.
pub(super) fn sync_parent(path: &Path) -> Result<(), MaintainError> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let synced = File::open(parent).and_then(|folder| folder.sync_all());
    synced.map_err(MaintainError::io("can't sync the folder", parent))
}

/// Opens a folder with its own engine and settles everything, so that the tables have all there is.
pub(super) fn open_to_read(
    path: &Path,
    options: &StoreOptions,
) -> Result<(Store, EngineKind), MaintainError> {
    let Some((found, marker)) = format::read_marker(path)? else {
        return Err(MaintainError::NoFolder { path: path.to_owned() });
    };
    if found != format::FORMAT_VERSION {
        let wanted = format::FORMAT_VERSION;
        return Err(MaintainError::OlderFormat { path: path.to_owned(), found, wanted });
    }
    let engine = EngineKind::from_name(&marker.engine).ok_or_else(|| crate::OpenError::Marker {
        path: path.to_owned(),
        what: format!("there is no engine {:?}", marker.engine),
    })?;
    let store = Store::open(path, &StoreOptions { engine, shards: marker.shards, ..options.clone() })?;
    store
        .close()
        .map_err(|error| MaintainError::Settle { path: path.to_owned(), reason: error.to_string() })?;
    Ok((store, engine))
}

fn write(
    store: &Store,
    engine: EngineKind,
    what: &ExportOptions<'_>,
    out: &mut dyn Write,
    progress: &mut dyn FnMut(Progress),
) -> Result<ExportReport, MaintainError> {
    let mut commits = Vec::new();
    for reader in readers(store) {
        let shared = &reader.shared;
        let manifest = Manifest::load(shared.files.as_ref(), shared.id)
            .map_err(|error| MaintainError::Damaged { shard: shared.id, what: error.to_string() })?;
        commits.push(manifest.settled.number);
    }
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let written = u64::try_from(since.as_millis()).ok().and_then(UnixMillis::new).unwrap_or_default();
    let first = Line::Export {
        version: EXPORT_VERSION,
        program: env!("CARGO_PKG_VERSION").to_owned(),
        shards: store.shards(),
        engine: engine.name().to_owned(),
        written,
        commits,
        app: what.app.map(App),
        conversation: what.conversation,
    };
    let mut buffer = Vec::new();
    encode(&first, &mut buffer)?;
    put(out, &buffer)?;
    let first_bytes = buffer.len() as u64;
    let mut report = body(store, what, out, progress)?;
    let end = Line::End {
        lines: report.lines,
        users: report.users,
        conversations: report.conversations,
        records: report.records,
        sha256: report.sha256.clone(),
    };
    buffer.clear();
    encode(&end, &mut buffer)?;
    put(out, &buffer)?;
    report.bytes += first_bytes + buffer.len() as u64;
    Ok(report)
}

fn encode(line: &Line, buffer: &mut Vec<u8>) -> Result<(), MaintainError> {
    let written = serde_json::to_writer(&mut *buffer, line).map_err(io::Error::from);
    written.map_err(MaintainError::io("can't write", Path::new("a line of the export")))?;
    buffer.push(b'\n');
    Ok(())
}

fn put(out: &mut dyn Write, bytes: &[u8]) -> Result<(), MaintainError> {
    out.write_all(bytes).map_err(MaintainError::io("can't write", Path::new("the export")))
}

/// Writes everything between the first and the last line.
pub(super) fn body(
    store: &Store,
    what: &ExportOptions<'_>,
    out: &mut dyn Write,
    progress: &mut dyn FnMut(Progress),
) -> Result<ExportReport, MaintainError> {
    let mut users = HashSet::new();
    if let Some(conversation) = what.conversation {
        let shard = conversation.shard();
        let reader =
            store.reader(shard).ok().filter(|reader| matches!(reader.head(conversation), Ok(Some(_))));
        let reader = reader.ok_or(MaintainError::NoConversation { conversation })?;
        users = named_by(&reader, conversation, what)?;
    }
    let mut body = Body {
        what,
        users,
        out,
        buffer: Vec::new(),
        hash: Sha256::new(),
        report: ExportReport::default(),
        told: Progress {
            shard: ShardId::new(0).unwrap_or_else(|| UserId::default().shard()),
            doing: "",
            done: 0,
            of: 0,
        },
        progress,
    };
    for reader in readers(store) {
        let of = store.stats(reader.shard()).map_or(0, |stats| stats.segment_bytes);
        body.told = Progress { shard: reader.shard(), doing: "exporting", done: 0, of };
        body.shard(&reader)?;
    }
    body.report.sha256 = hex(&body.hash.finalize());
    Ok(body.report)
}

pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn readers(store: &Store) -> impl Iterator<Item = ShardReader> {
    (0..store.shards()).filter_map(ShardId::new).filter_map(|shard| store.reader(shard).ok())
}

/// Every user that one conversation names.
fn named_by(
    reader: &ShardReader,
    conversation: ConversationId,
    what: &ExportOptions<'_>,
) -> Result<HashSet<UserId>, MaintainError> {
    let mut users = HashSet::new();
    let prefix = Key::conversation(conversation);
    let mut add = |key: &[u8]| {
        users.insert(reader.shared.view.id_at::<UserId>(key, 1)?);
        Ok(())
    };
    each::<Member>(reader, Table::Member, prefix.as_ref(), |key, _| add(key))?;
    each::<Number>(reader, Table::Read, prefix.as_ref(), |key, _| add(key))?;
    each::<LaneState>(reader, Table::Lane, prefix.as_ref(), |key, _| add(key))?;
    each::<PendingLink>(reader, Table::Link, prefix.as_ref(), |key, _| add(key))?;
    if let Some(meta) = reader.meta(conversation)? {
        users.insert(meta.creator);
        let mut add = |user| {
            users.insert(user);
            Some(user)
        };
        what.numbers.name(meta.class, &meta.name, &mut add);
    }
    each_record(reader, conversation, |record| {
        users.insert(record.sender);
        let mut add = |user| {
            users.insert(user);
            Some(user)
        };
        what.numbers.payload(record.kind, &record.payload, &mut add);
        if what.stop.load(Ordering::Relaxed) { Err(MaintainError::Stopped) } else { Ok(()) }
    })?;
    users.remove(&UserId::default());
    Ok(users)
}

/// Every row of a table whose key starts with `prefix`.
fn each<R: Row>(
    reader: &ShardReader,
    table: Table,
    prefix: &[u8],
    mut row: impl FnMut(&[u8], R) -> Result<(), MaintainError>,
) -> Result<(), MaintainError> {
    let mut after: Option<Vec<u8>> = None;
    loop {
        let rows = reader.shared.view.list::<R>(table, prefix, after.as_deref(), PAGE_ROWS)?;
        let last = rows.len() < PAGE_ROWS;
        after = rows.last().map(|(key, _)| key.clone());
        for (key, value) in rows {
            row(&key, value)?;
        }
        if last {
            return Ok(());
        }
    }
}

fn each_record(
    reader: &ShardReader,
    conversation: ConversationId,
    mut each: impl FnMut(crate::Record) -> Result<(), MaintainError>,
) -> Result<(), MaintainError> {
    let Some(head) = reader.head(conversation)? else { return Ok(()) };
    let mut from = head.low.saturating_add(1);
    while from <= head.seq {
        let page = reader.records(conversation, from, head.seq, PAGE)?;
        let first = page.first().map(|record| record.seq);
        let Some(last) = page.last().map(|record| record.seq).filter(|_| first == Some(from)) else {
            let what = "conversation: records are missing";
            return Err(reader.shared.view.damaged(Some(conversation), Some(from), Malformed(what)).into());
        };
        for record in page {
            each(record)?;
        }
        from = last.saturating_add(1);
    }
    Ok(())
}

struct Body<'a> {
    what: &'a ExportOptions<'a>,
    /// The users that one conversation names, if only that is wanted.
    users: HashSet<UserId>,
    out: &'a mut dyn Write,
    buffer: Vec<u8>,
    hash: Sha256,
    report: ExportReport,
    told: Progress,
    progress: &'a mut dyn FnMut(Progress),
}

/// The last answer to whether something is wanted.
struct Last<T>(Option<(T, bool)>);

impl<T: PartialEq + Copy> Last<T> {
    fn or(&mut self, of: T, ask: impl FnOnce() -> Result<bool, ReadError>) -> Result<bool, ReadError> {
        match self.0 {
            Some((known, answer)) if known == of => Ok(answer),
            _ => {
                let answer = ask()?;
                self.0 = Some((of, answer));
                Ok(answer)
            }
        }
    }
}

impl Body<'_> {
    fn put(&mut self, line: &Line) -> Result<(), MaintainError> {
        if self.what.stop.load(Ordering::Relaxed) {
            return Err(MaintainError::Stopped);
        }
        self.buffer.clear();
        encode(line, &mut self.buffer)?;
        self.hash.update(&self.buffer);
        put(self.out, &self.buffer)?;
        let report = &mut self.report;
        report.lines += 1;
        report.bytes += self.buffer.len() as u64;
        match line {
            Line::User { .. } => report.users += 1,
            Line::Device { .. } => report.devices += 1,
            Line::Conversation { .. } => report.conversations += 1,
            Line::Member { .. } => report.members += 1,
            Line::Record(_) => report.records += 1,
            _ => {}
        }
        Ok(())
    }

    fn tell(&mut self, bytes: usize) {
        self.told.done = self.told.done.saturating_add(bytes as u64).min(self.told.of);
        (self.progress)(self.told);
    }

    fn wants_user(&self, reader: &ShardReader, user: UserId) -> Result<bool, ReadError> {
        if self.what.conversation.is_some() {
            return Ok(self.users.contains(&user));
        }
        match self.what.app {
            None => Ok(true),
            Some(app) => Ok(reader.user(user)?.is_some_and(|row| row.app == app)),
        }
    }

    fn wants_conversation(
        &self,
        reader: &ShardReader,
        conversation: ConversationId,
    ) -> Result<bool, ReadError> {
        match (self.what.conversation, self.what.app) {
            (Some(only), _) => Ok(only == conversation),
            (None, None) => Ok(true),
            (None, Some(app)) => Ok(reader.meta(conversation)?.is_some_and(|meta| meta.app == app)),
        }
    }

    /// Of rows in the users' shards.
    fn is_of(&self, conversation: ConversationId) -> bool {
        self.what.conversation.is_none_or(|only| only == conversation)
    }

    fn shard(&mut self, reader: &ShardReader) -> Result<(), MaintainError> {
        let counters = reader.shared.view.counters();
        let (users, conversations) = (counters.users, counters.conversations);
        self.put(&Line::Shard { shard: reader.shard().get(), users, conversations })?;
        self.users(reader)?;
        self.conversations(reader)?;
        self.told.done = self.told.of;
        (self.progress)(self.told);
        Ok(())
    }

    fn users(&mut self, reader: &ShardReader) -> Result<(), MaintainError> {
        let view = &reader.shared.view;
        let mut wanted = Last(None);
        each::<User>(reader, Table::User, &[], |key, row| {
            let user = view.id_at(key, 0)?;
            if self.wants_user(reader, user)? { self.put(&Line::user(user, row)) } else { Ok(()) }
        })?;
        each::<Device>(reader, Table::Device, &[], |key, row| {
            let user = view.id_at(key, 0)?;
            if !wanted.or(user, || self.wants_user(reader, user))? {
                return Ok(());
            }
            self.put(&Line::device(user, view.id_at(key, 1)?, &row))
        })?;
        each::<Number>(reader, Table::ClassEpoch, &[], |key, row| {
            let user = view.id_at(key, 0)?;
            if !wanted.or(user, || self.wants_user(reader, user))? {
                return Ok(());
            }
            let number = key.get(8).copied();
            let class = CLASSES.into_iter().find(|class| Some(*class as u8) == number);
            let class = class.ok_or_else(|| view.damaged(None, None, Malformed("class epoch key")))?;
            self.put(&Line::Login { user, class, epoch: reader.as_id(row)? })
        })?;
        each::<Listed>(reader, Table::Listed, &[], |key, row| {
            let (user, conversation) = (view.id_at(key, 0)?, view.id_at(key, 1)?);
            if !self.is_of(conversation) || !wanted.or(user, || self.wants_user(reader, user))? {
                return Ok(());
            }
            self.put(&Line::listed(user, conversation, &row))
        })?;
        each::<Number>(reader, Table::Recv, &[], |key, row| {
            let (user, conversation) = (view.id_at(key, 0)?, view.id_at(key, 2)?);
            if !self.is_of(conversation) || !wanted.or(user, || self.wants_user(reader, user))? {
                return Ok(());
            }
            let (device, seq) = (view.id_at(key, 1)?, reader.as_id(row)?);
            self.put(&Line::Received { user, device, conversation, seq })
        })
    }

    fn conversations(&mut self, reader: &ShardReader) -> Result<(), MaintainError> {
        let view = &reader.shared.view;
        let mut wanted = Last(None);
        each::<ConversationMeta>(reader, Table::Conversation, &[], |key, row| {
            let conversation = view.id_at(key, 0)?;
            if !self.wants_conversation(reader, conversation)? {
                return Ok(());
            }
            self.put(&Line::conversation(conversation, row))
        })?;
        each::<Head>(reader, Table::Head, &[], |key, row| {
            let conversation = view.id_at(key, 0)?;
            if !self.wants_conversation(reader, conversation)? {
                return Ok(());
            }
            self.put(&Line::head(conversation, &row))?;
            each_record(reader, conversation, |record| {
                self.tell(record.payload.len() + 32);
                self.put(&Line::Record(Box::new((conversation, record).into())))
            })
        })?;
        each::<Member>(reader, Table::Member, &[], |key, row| {
            let conversation = view.id_at(key, 0)?;
            if !wanted.or(conversation, || self.wants_conversation(reader, conversation))? {
                return Ok(());
            }
            self.put(&Line::member(conversation, view.id_at(key, 1)?, &row))
        })?;
        each::<Number>(reader, Table::Read, &[], |key, row| {
            let conversation = view.id_at(key, 0)?;
            if !wanted.or(conversation, || self.wants_conversation(reader, conversation))? {
                return Ok(());
            }
            self.put(&Line::Read { conversation, user: view.id_at(key, 1)?, seq: reader.as_id(row)? })
        })?;
        each::<LaneState>(reader, Table::Lane, &[], |key, row| {
            let conversation = view.id_at(key, 0)?;
            if !wanted.or(conversation, || self.wants_conversation(reader, conversation))? {
                return Ok(());
            }
            self.put(&Line::lane(conversation, view.id_at(key, 1)?, view.id_at(key, 2)?, row))
        })?;
        each::<PendingLink>(reader, Table::Link, &[], |_, row| {
            if !wanted.or(row.conversation, || self.wants_conversation(reader, row.conversation))? {
                return Ok(());
            }
            self.put(&Line::link(&row))
        })
    }
}
