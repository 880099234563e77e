//! The fixture of format 1, as it was written, with settling interrupted, cut off at every step of its upgrade, and damaged.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard},
};

use fulmar_protocol::id::{AppId, DeviceId, UserId};

use super::*;
use crate::{
    EngineKind, Limits, Store, StoreOptions,
    codec::put_varint,
    files::{Append, ReadAt, Slots},
    key::Key,
    row::{LaneState, Number},
    shard::view::seal_row,
};

const ALL: Limits = Limits { records: usize::MAX, bytes: usize::MAX };

fn shard() -> ShardId {
    ShardId::new(0).unwrap()
}

fn conversation() -> ConversationId {
    ConversationId::new(shard().number(1).unwrap()).unwrap()
}

fn user(local: u64) -> UserId {
    UserId::new(shard().number(local).unwrap()).unwrap()
}

fn seq(n: u64) -> Seq {
    Seq::new(n).unwrap()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// A copy of the fixture: 30 records settled, 10 more and a cursor in the log.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/format-1"), folder.path());
    folder
}

/// Changes the old database.
fn change(folder: &Path, change: impl FnOnce(&Old)) {
    let old = Old::open(&folder.join("shard-000/sled"), 1 << 20).unwrap().unwrap();
    change(&old);
}

fn look(folder: &Path) -> Result<Vec<Record>, OpenError> {
    let store = Store::open(folder, &StoreOptions::default())?;
    let reader = store.reader(shard()).unwrap();
    let c = conversation();
    assert_eq!(reader.head(c).unwrap().unwrap().seq, seq(40));
    assert_eq!(reader.head(c).unwrap().unwrap().count, 40);
    assert_eq!(reader.user_by_name(AppId::of("demo"), "bob").unwrap(), Some(user(2)));
    assert_eq!(reader.member_count(c).unwrap(), 2);
    assert_eq!(reader.members(c, None, 9).unwrap().len(), 2);
    assert_eq!(reader.read_cursor(c, user(2)).unwrap(), seq(33));
    assert_eq!(reader.lane(c, user(1), DeviceId::FIRST).unwrap().unwrap().last.get(), 40);
    let records = reader.records(c, Seq::FIRST, seq(99), ALL).unwrap();
    assert!(records.iter().zip(1..).all(|(record, n)| record.seq == seq(n)));
    assert_eq!(records.len(), 40);
    assert!(!folder.join("shard-000/sled").exists());
    Ok(records)
}

// ---- power cuts

/// What happened to the names of a folder since it was synced.
enum Named {
    Created(PathBuf),
    Renamed { from: PathBuf, to: PathBuf, replaced: Option<Vec<u8>> },
    Removed(PathBuf, Vec<u8>),
}

#[derive(Default)]
struct World {
    /// Calls that are still answered.
    left: u64,
    names: Vec<(PathBuf, Named)>,
    /// Files that were created, and how much of them is durable.
    synced: Vec<(PathBuf, u64)>,
}

/// Files on disk that stop to answer after some calls, and can then lose what was not synced.
#[derive(Clone)]
struct Cut {
    path: PathBuf,
    world: Arc<Mutex<World>>,
}

impl std::fmt::Debug for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cut").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Cut {
    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    fn tick(&self) -> io::Result<MutexGuard<'_, World>> {
        let mut world = self.world();
        world.left = world.left.checked_sub(1).ok_or_else(|| io::Error::other("the power is gone"))?;
        Ok(world)
    }

    fn disk(&self) -> Disk {
        Disk::new(&self.path)
    }

    /// Takes back what was not synced: of the names all after the first `keep`, of every file a part.
    fn lose(&self, keep: usize, part: u64) {
        let mut world = self.world();
        for (path, synced) in &world.synced {
            let Ok(data) = fs::metadata(path) else { continue };
            let kept = synced + data.len().saturating_sub(*synced) * part / 100;
            fs::OpenOptions::new().write(true).open(path).unwrap().set_len(kept).unwrap();
        }
        while world.names.len() > keep {
            match world.names.pop().unwrap().1 {
                Named::Created(path) => {
                    let _ = fs::remove_file(path);
                }
                Named::Renamed { from, to, replaced } => {
                    fs::rename(&to, from).unwrap();
                    if let Some(bytes) = replaced {
                        fs::write(to, bytes).unwrap();
                    }
                }
                Named::Removed(path, bytes) => fs::write(path, bytes).unwrap(),
            }
        }
    }
}

#[derive(Debug)]
struct CutFile {
    cut: Cut,
    /// Its place among those that were created.
    place: usize,
    file: Box<dyn Append>,
}

impl Append for CutFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let _world = self.cut.tick()?;
        self.file.append(bytes)
    }

    fn make_room(&mut self, until: u64) -> io::Result<()> {
        let _world = self.cut.tick()?;
        self.file.make_room(until)
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut world = self.cut.tick()?;
        let (path, synced) = &mut world.synced[self.place];
        *synced = fs::metadata(path)?.len();
        Ok(())
    }
}

impl Files for Cut {
    fn create(&self, name: &str) -> io::Result<Box<dyn Append>> {
        let mut world = self.tick()?;
        let path = self.path.join(name);
        if !path.exists() {
            world.names.push((self.path.clone(), Named::Created(path.clone())));
        }
        let place = world.synced.len();
        world.synced.push((path, 0));
        let file = self.disk().create(name)?;
        Ok(Box::new(CutFile { cut: self.clone(), place, file }))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn ReadAt>> {
        self.disk().open(name)
    }

    fn open_slots(&self, name: &str) -> io::Result<Box<dyn Slots>> {
        self.disk().open_slots(name)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut world = self.tick()?;
        let (old, new) = (self.path.join(from), self.path.join(to));
        for (path, _) in &mut world.synced {
            if *path == old {
                path.clone_from(&new);
            }
        }
        let replaced = fs::read(&new).ok();
        world.names.push((self.path.clone(), Named::Renamed { from: old, to: new, replaced }));
        self.disk().rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut world = self.tick()?;
        let path = self.path.join(name);
        if let Ok(bytes) = fs::read(&path) {
            world.names.push((self.path.clone(), Named::Removed(path.clone(), bytes)));
        }
        for (other, _) in &mut world.synced {
            if *other == path {
                *other = PathBuf::new();
            }
        }
        self.disk().remove(name)
    }

    fn list(&self) -> io::Result<Vec<(String, u64)>> {
        self.disk().list()
    }

    fn sync_folder(&self) -> io::Result<()> {
        let mut world = self.tick()?;
        world.names.retain(|(folder, _)| *folder != self.path);
        Ok(())
    }

    fn free(&self) -> io::Result<Option<u64>> {
        self.disk().free()
    }
}

/// Upgrades until the power goes after `calls` calls. Returns whether it was done before that.
fn cut(folder: &Path, calls: u64, chance: u64) -> bool {
    let mut open = Folder::open_existing(folder).unwrap();
    let world = Arc::new(Mutex::new(World { left: calls, ..World::default() }));
    let root = Cut { path: folder.to_owned(), world: Arc::clone(&world) };
    let shard = |path: &Path| -> Arc<dyn Files> {
        Arc::new(Cut { path: path.to_owned(), world: Arc::clone(&world) })
    };
    let done = if open.marker.format == OLD_FORMAT {
        let done = run(&mut open, &root, &shard, &mut |_| {});
        let error = done.as_ref().map_or_else(ToString::to_string, |_| "the power is gone".to_owned());
        assert!(error.contains("the power is gone"), "{error}");
        done.is_ok()
    } else {
        true
    };
    let names = root.world().names.len();
    root.lose((chance as usize * 7) % (names + 1), chance * 31 % 101);
    done
}

#[test]
fn a_power_cut_at_every_step_loses_nothing() {
    let (mut cuts, mut old, mut new) = (0, 0, 0);
    for calls in 0.. {
        let folder = folder();
        // Twice, so that an upgrade begins over what another one left.
        let first = cut(folder.path(), calls, calls);
        if !first {
            cut(folder.path(), calls * 7 % 30, calls + 3);
        }
        let marker = fs::read_to_string(folder.path().join("FORMAT")).unwrap();
        if marker.contains("format = 1") {
            old += 1
        } else {
            new += 1
        }
        look(folder.path()).unwrap();
        if first {
            break;
        }
        cuts += 1;
    }
    assert!(cuts > 12 && old > 10 && new > 0, "{cuts} cuts, {old} before, {new} after the marker");
}

#[test]
fn an_upgrade_that_was_done_is_not_done_again_and_its_rest_is_removed() {
    let folder = folder();
    let report = upgrade(folder.path(), &mut |_| {}).unwrap();
    assert_eq!((report.from, report.to, report.records, report.commits), (1, 2, 30, 12));
    assert!(report.rows >= 8 && report.bytes_after > 0 && report.bytes_before > 0);
    // Interrupted while the old databases went.
    let old = folder.path().join("shard-000/sled");
    fs::create_dir_all(old.join("blobs")).unwrap();
    fs::write(old.join("db"), "half of it").unwrap();
    let again = upgrade(folder.path(), &mut |_| {}).unwrap();
    assert_eq!((again.from, again.to, again.records), (2, 2, 0));
    look(folder.path()).unwrap();
}

#[test]
fn progress_comes_to_its_end() {
    let folder = folder();
    let mut told = Vec::new();
    upgrade(folder.path(), &mut |progress| told.push(progress)).unwrap();
    let last = told.last().unwrap();
    assert_eq!((last.shard, last.done), (shard(), last.of));
    assert!(told.iter().all(|progress| progress.done <= progress.of));
}

// ---- settling that was interrupted

/// The bytes of a block, as format 1 wrote it.
fn block(records: &[Record]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for record in records {
        record.encode(conversation(), &mut bytes);
    }
    let mut out = vec![1];
    put_varint(&mut out, records.len() as u64);
    put_varint(&mut out, bytes.len() as u64);
    out.extend_from_slice(&bytes);
    out
}

fn block_key(first: u64, chunk: u16) -> Vec<u8> {
    let mut key = conversation().get().to_be_bytes().to_vec();
    key.extend_from_slice(&first.to_be_bytes());
    key.extend_from_slice(&chunk.to_be_bytes());
    key
}

fn put<R: Row>(old: &Old, table: Table, key: &Key, row: &R) {
    old.set(table.name(), key.as_ref(), Some(&seal_row(table, key.as_ref(), &row.to_row())));
}

fn head(old: &Old) -> Head {
    let key = Key::conversation(conversation());
    let value = old.get("head", key.as_ref()).unwrap().unwrap();
    Head::from_row(&open_row(Table::Head, key.as_ref(), &value).unwrap()).unwrap()
}

#[test]
fn tables_that_are_ahead_of_the_mark_are_put_back_to_it() {
    let c = conversation();
    let records = {
        let folder = folder();
        look(folder.path()).unwrap()
    };
    let newest = records.last().unwrap();
    let mut lane = LaneState::default();
    for record in &records {
        lane.note(record.epoch, record.pseq, record.seq);
    }
    for written in 0..32 {
        let folder = folder();
        change(folder.path(), |old| {
            // In the order in which it was settled, or with any of it lost in a power cut.
            if written & 1 > 0 {
                old.set(BLOCKS, &block_key(31, 0), Some(&block(&records[30..36])));
            }
            if written & 2 > 0 {
                old.set(BLOCKS, &block_key(37, 0), Some(&block(&records[36..])));
            }
            if written & 4 > 0 {
                let ahead = Head { seq: newest.seq, count: newest.count, time: newest.time, ..head(old) };
                put(old, Table::Head, &Key::conversation(c), &ahead);
            }
            if written & 8 > 0 {
                put(old, Table::Lane, &Key::lane(c, user(1), DeviceId::FIRST), &lane);
            }
            if written & 16 > 0 {
                put(old, Table::Read, &Key::conversation_user(c, user(2)), &Number(33));
            }
        });
        assert_eq!(look(folder.path()).unwrap(), records, "{written:b}");
    }
}

/// The last block is written again with more in it, a large record takes several chunks, and retention removes blocks: all of
/// it may have been interrupted.
#[test]
fn blocks_are_read_as_they_were_left() {
    let folder = folder();
    let records = {
        let other = self::folder();
        look(other.path()).unwrap()
    };
    let large = Record { payload: vec![7; 10_000].into(), ..records[19].clone() };
    let mut want = records.clone();
    want[19] = large.clone();
    change(folder.path(), |old| {
        while let Some((key, _)) = old.scan(BLOCKS, &[], 1).unwrap().first() {
            old.set(BLOCKS, key, None);
        }
        // Records 1 to 5 are gone; chunks of the block they were in are left.
        let ahead = Head { low: seq(5), low_count: 5, ..head(old) };
        put(old, Table::Head, &Key::conversation(conversation()), &ahead);
        old.set(BLOCKS, &block_key(1, 1), Some(b"the second chunk of a block whose first is gone"));
        old.set(BLOCKS, &block_key(4, 0), Some(&block(&records[3..19])));
        for (n, chunk) in block(&[large]).chunks(CHUNK_BYTES).enumerate() {
            old.set(BLOCKS, &block_key(20, n as u16), Some(chunk));
        }
        // This one reaches into what is in the log only.
        old.set(BLOCKS, &block_key(21, 0), Some(&block(&records[20..35])));
    });
    let store = Store::open(folder.path(), &StoreOptions::default()).unwrap();
    let reader = store.reader(shard()).unwrap();
    assert_eq!(reader.records(conversation(), Seq::FIRST, seq(99), ALL).unwrap(), want[5..]);
    assert_eq!(reader.head(conversation()).unwrap().unwrap().low, seq(5));
}

// ---- damage

#[test]
fn what_is_damaged_is_refused_and_stays_as_it_is() {
    type Damage = Box<dyn Fn(&Old)>;
    let flip = |table: &'static str, nth: usize| -> Damage {
        Box::new(move |old| {
            let rows = old.scan(table, &[], 99).unwrap();
            let (key, value) = rows.get(nth).unwrap();
            let mut value = value.to_vec();
            let at = value.len() / 2;
            value[at] ^= 1;
            old.set(table, key, Some(&value));
        })
    };
    let remove = |table: &'static str, from_end: usize| -> Damage {
        Box::new(move |old| {
            let rows = old.scan(table, &[], 99).unwrap();
            let (key, _) = rows.get(rows.len() - 1 - from_end).unwrap();
            old.set(table, key, None);
        })
    };
    let cases: Vec<(&str, Damage, &str)> = vec![
        ("a commit", flip(COMMITS, 0), "its log is damaged at commit"),
        ("a commit in the middle", remove(COMMITS, 4), "its log is damaged at commit"),
        ("the last commit", remove(COMMITS, 0), "was acknowledged"),
        ("a block", flip(BLOCKS, 0), "malformed record"),
        ("a whole block", remove(BLOCKS, 0), "are missing"),
        ("a head", flip("head", 0), "malformed row checksum in table head"),
        ("all of a head", remove("head", 0), "has records and no head"),
        ("a member", flip("member", 1), "malformed row checksum in table member"),
        ("a name", flip("name", 0), "malformed row checksum in table name"),
        (
            "the settled mark",
            Box::new(|old| old.set("shard", SETTLED, Some(b"nonsense"))),
            "malformed row checksum in table shard",
        ),
        ("no settled mark", Box::new(|old| old.set("shard", SETTLED, None)), "are missing"),
        (
            "neither mark nor log",
            Box::new(|old| {
                old.set("shard", SETTLED, None);
                while let Some((key, _)) = old.scan(COMMITS, &[], 1).unwrap().first() {
                    old.set(COMMITS, key, None);
                }
            }),
            "was acknowledged",
        ),
    ];
    for (what, damage, sentence) in cases {
        let folder = folder();
        change(folder.path(), |old| damage(old));
        for _ in 0..2 {
            let error = Store::open(folder.path(), &StoreOptions::default()).unwrap_err().to_string();
            assert!(error.contains(sentence), "{what}: {error}");
            assert!(error.starts_with("shard 0: "), "{what}: {error}");
        }
        let marker = fs::read_to_string(folder.path().join("FORMAT")).unwrap();
        assert!(marker.contains("format = 1"), "{what}");
        assert!(folder.path().join("shard-000/sled/db").exists(), "{what}");
    }
}

/// After a power cut the tip may be older, so the log alone can't say that all of it is gone.
#[test]
fn tables_without_mark_and_log_are_refused_even_without_a_tip() {
    let folder = folder();
    fs::remove_file(folder.path().join("shard-000/tip")).unwrap();
    change(folder.path(), |old| {
        old.set("shard", SETTLED, None);
        while let Some((key, _)) = old.scan(COMMITS, &[], 1).unwrap().first() {
            old.set(COMMITS, key, None);
        }
    });
    let error = Store::open(folder.path(), &StoreOptions::default()).unwrap_err();
    assert!(error.to_string().contains("the settled mark is missing"), "{error}");
}

#[test]
fn a_lost_database_is_refused_and_one_that_never_was_is_empty() {
    let folder = folder();
    fs::remove_dir_all(folder.path().join("shard-000/sled")).unwrap();
    let error = Store::open(folder.path(), &StoreOptions::default()).unwrap_err();
    assert!(error.to_string().contains("was acknowledged"), "{error}");
    // The folder was begun and its shards never were.
    fs::remove_dir_all(folder.path().join("shard-000")).unwrap();
    let store = Store::open(folder.path(), &StoreOptions::default()).unwrap();
    assert_eq!(store.reader(shard()).unwrap().head(conversation()).unwrap(), None);
}

#[test]
fn a_commit_that_was_never_acknowledged_may_lack_its_end() {
    let folder = folder();
    // The tip that reached the disk is one older, and the last commit lost its only chunk's place.
    let shard_folder = folder.path().join("shard-000");
    let (commit, before) = {
        let old = Old::open(&shard_folder.join("sled"), 1 << 20).unwrap().unwrap();
        let rows = old.scan(COMMITS, &[], 999).unwrap();
        let last = rows.last().unwrap().clone();
        let header = commit::Header::decode(&last.1).unwrap();
        let mut key = last.0.clone();
        *key.last_mut().unwrap() = 1;
        old.set(COMMITS, &last.0, None);
        old.set(COMMITS, &key, Some(&last.1));
        (header.id.number, header.previous)
    };
    let error = Store::open(folder.path(), &StoreOptions::default()).unwrap_err();
    assert!(matches!(error, OpenError::Damaged { commit: at, .. } if at == commit), "{error}");
    fs::remove_file(shard_folder.join("tip")).unwrap();
    let (tip, _) = Tip::open(&Disk::new(&shard_folder)).unwrap();
    tip.write(CommitId { number: commit - 1, chain: before }).unwrap();
    let store = Store::open(folder.path(), &StoreOptions::default()).unwrap();
    let reader = store.reader(shard()).unwrap();
    assert_eq!(
        reader.read_cursor(conversation(), user(2)).unwrap(),
        Seq::ZERO,
        "the last commit was the cursor"
    );
    assert_eq!(reader.head(conversation()).unwrap().unwrap().seq, seq(40));
}

#[test]
fn another_engine_is_refused_before_anything_is_upgraded() {
    let folder = folder();
    let options = StoreOptions { engine: EngineKind::Fjall, ..StoreOptions::default() };
    let error = Store::open(folder.path(), &options).unwrap_err().to_string();
    let want = "change it with `fulmar store migrate --to fjall`, or set the engine to \"sled\"";
    assert!(error.ends_with(want), "{error}");
    assert!(folder.path().join("shard-000/sled").exists());
    look(folder.path()).unwrap();
}
