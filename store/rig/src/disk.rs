//! A disk with a cache, as a recording of writes and syncs leaves it: what is on it for sure, and what may be.
//!
//! What is assumed, and no more:
//! - A file's bytes and length are durable once a `fsync` or `fdatasync` of that file, asked for after them, has returned. Until
//!   then each 4 KiB page has what it had when it was last synced, or what it had after any one of the writes since; and a page
//!   that was on its way is torn: each sector of 512 bytes is the older or the newer one.
//! - A length that is not yet synced is any of those it had since, whatever became of the bytes. Bytes that were never written
//!   are zero. A cut-off end comes back with its old bytes if the shorter length did not get there.
//! - Names (created, renamed, removed) are durable once the folder itself was synced. Until then a folder has had some of its
//!   changes, in their order: those before any one of them. ([`Names::AnyOrder`]: any of them, but those of one name in their
//!   order.) Folders do not wait for each other, and a synced file does not take its name along.
//! - A rename within a folder happens or does not. Between folders, each folder is on its own.
//! - A sync that failed has lost what it was for: each page of it may be on the disk or not, and later syncs of the same file do
//!   not make up for it.
//! - `sync_file_range` promises nothing.
//!
//! ext4 and xfs promise more (one journal for all folders; a synced new file keeps its name; with `data=ordered`, bytes before
//! lengths). Nothing here is less than what they may lose, except sectors that the device itself damages.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
};

use anyhow::{Context as _, bail, ensure};

use crate::{
    chance::Chance,
    recording::{Event, SyncKind},
};

/// Pages are what a cache writes back.
const PAGE: usize = 4_096;

/// Sectors are what a disk writes whole.
const SECTOR: usize = 512;

/// In which order the changes of a folder reach the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Names {
    /// Within a folder as they were made (journalling file systems).
    #[default]
    InOrder,
    /// As they like, but for those of one name.
    AnyOrder,
}

type Id = usize;

#[derive(Clone, Debug)]
enum Change {
    Write { offset: usize, bytes: Arc<Vec<u8>> },
    Length(usize),
}

#[derive(Clone, Debug)]
struct Pending<T> {
    /// The event that did it.
    event: usize,
    change: T,
    fate: Fate,
}

/// What is known of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Not synced yet.
    Open,
    /// A sync of it failed: nobody will ever know.
    Doubtful,
    /// Synced, but over something doubtful, so that it can't be taken into the durable bytes yet.
    Durable,
}

#[derive(Clone, Debug, Default)]
struct File {
    durable: Arc<Vec<u8>>,
    pending: Vec<Pending<Change>>,
}

/// Names that change together; `None`: the name is gone.
type Renaming = Vec<(Vec<u8>, Option<Id>)>;

#[derive(Clone, Debug, Default)]
struct Folder {
    now: BTreeMap<Vec<u8>, Id>,
    durable: BTreeMap<Vec<u8>, Id>,
    pending: Vec<Pending<Renaming>>,
}

#[derive(Clone, Debug)]
enum Node {
    File(File),
    Folder(Folder),
}

/// A disk, at some event of a recording.
#[derive(Clone, Debug)]
pub struct Disk {
    nodes: Vec<Node>,
    handles: BTreeMap<u32, (Id, bool)>,
    syncs: BTreeMap<u64, (Option<Id>, usize, SyncKind)>,
    /// Events played so far.
    events: usize,
}

const ROOT: Id = 0;

/// Something in a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A folder; it stands before what is in it.
    Folder,
    /// A file and its bytes.
    File(Arc<Vec<u8>>),
}

/// What a disk holds, by path from the root.
pub type Image = BTreeMap<String, Entry>;

impl Disk {
    /// A disk that holds `image`, all of it durable.
    ///
    /// # Errors
    /// When an entry lies in no folder.
    pub fn new(image: &Image) -> anyhow::Result<Self> {
        let mut disk = Self {
            nodes: vec![Node::Folder(Folder::default())],
            handles: BTreeMap::new(),
            syncs: BTreeMap::new(),
            events: 0,
        };
        for (path, entry) in image {
            let (folder, name) = disk.parent(path.as_bytes())?;
            let id = disk.nodes.len();
            disk.nodes.push(match entry {
                Entry::Folder => Node::Folder(Folder::default()),
                Entry::File(bytes) => Node::File(File { durable: Arc::clone(bytes), pending: Vec::new() }),
            });
            let folder = disk.folder_mut(folder)?;
            folder.now.insert(name.clone(), id);
            folder.durable.insert(name, id);
        }
        Ok(disk)
    }

    // ---- playing

    /// Plays the next event.
    ///
    /// # Errors
    /// When it does not fit what was played so far.
    pub fn play(&mut self, event: &Event) -> anyhow::Result<()> {
        self.events += 1;
        match event {
            Event::Open { handle, path, truncate, write_through } => {
                let id = match self.find(path) {
                    Some(id) => id,
                    None => {
                        let id = self.nodes.len();
                        self.nodes.push(Node::File(File::default()));
                        let (folder, name) = self.parent(path)?;
                        self.rename_in(folder, vec![(name, Some(id))])?;
                        id
                    }
                };
                self.handles.insert(*handle, (id, *write_through));
                if *truncate {
                    self.change(*handle, Change::Length(0))?;
                }
            }
            Event::Write { handle, offset, bytes } => {
                let offset = usize::try_from(*offset)?;
                self.change(*handle, Change::Write { offset, bytes: Arc::new(bytes.clone()) })?;
            }
            Event::Length { handle, length } => {
                self.change(*handle, Change::Length(usize::try_from(*length)?))?
            }
            Event::Rename { from, to } => {
                let id = self.find(from).context("a rename of nothing")?;
                let (old, new) = (self.parent(from)?, self.parent(to)?);
                if old.0 == new.0 {
                    self.rename_in(old.0, vec![(old.1, None), (new.1, Some(id))])?;
                } else {
                    self.rename_in(new.0, vec![(new.1, Some(id))])?;
                    self.rename_in(old.0, vec![(old.1, None)])?;
                }
            }
            Event::Unlink { path } | Event::Rmdir { path } => {
                let (folder, name) = self.parent(path)?;
                self.rename_in(folder, vec![(name, None)])?;
            }
            Event::Mkdir { path } => {
                let id = self.nodes.len();
                self.nodes.push(Node::Folder(Folder::default()));
                let (folder, name) = self.parent(path)?;
                self.rename_in(folder, vec![(name, Some(id))])?;
            }
            Event::Link { from, to } => {
                let id = self.find(from).context("a link to nothing")?;
                let (folder, name) = self.parent(to)?;
                self.rename_in(folder, vec![(name, Some(id))])?;
            }
            Event::SyncBegin { handle, sync, kind } => {
                let of = self.handles.get(handle).map(|(id, _)| *id);
                ensure!(of.is_some() || *kind == SyncKind::All, "a sync of what was never opened");
                self.syncs.insert(*sync, (of, self.events, *kind));
            }
            Event::SyncEnd { sync } => {
                let (of, upto, kind) = self.syncs.remove(sync).context("a sync ends that never began")?;
                match (kind, of) {
                    (SyncKind::Range, _) => {}
                    (SyncKind::Full | SyncKind::Data, Some(id)) => self.make_durable(id, upto),
                    (SyncKind::Full | SyncKind::Data, None) => bail!("a sync of nothing"),
                    (SyncKind::All, _) => {
                        for id in 0..self.nodes.len() {
                            self.make_durable(id, upto);
                        }
                    }
                }
            }
            Event::SyncFail { handle } => {
                let of = self.handles.get(handle).map(|(id, _)| *id);
                // A folder's changes are the journal's: they are synced by the next sync that works.
                if let Some(Node::File(file)) = of.and_then(|id| self.nodes.get_mut(id)) {
                    for pending in file.pending.iter_mut().filter(|pending| pending.fate == Fate::Open) {
                        pending.fate = Fate::Doubtful;
                    }
                }
            }
            Event::Mark { .. } => {}
            Event::Unsupported { what } => bail!("{}", String::from_utf8_lossy(what)),
        }
        Ok(())
    }

    fn change(&mut self, handle: u32, change: Change) -> anyhow::Result<()> {
        let (id, write_through) = *self.handles.get(&handle).context("a write to what was never opened")?;
        let event = self.events;
        let Some(Node::File(file)) = self.nodes.get_mut(id) else { bail!("a write to a folder") };
        file.pending.push(Pending { event, change, fate: Fate::Open });
        if write_through {
            self.make_durable(id, event);
        }
        Ok(())
    }

    fn rename_in(&mut self, folder: Id, changes: Renaming) -> anyhow::Result<()> {
        let event = self.events;
        let folder = self.folder_mut(folder)?;
        follow(&mut folder.now, &changes);
        folder.pending.push(Pending { event, change: changes, fate: Fate::Open });
        Ok(())
    }

    fn make_durable(&mut self, id: Id, upto: usize) {
        match self.nodes.get_mut(id) {
            Some(Node::File(file)) => {
                let split = file.pending.partition_point(|pending| pending.event <= upto);
                let in_doubt = file.pending.iter().take(split).any(|pending| pending.fate == Fate::Doubtful);
                if in_doubt {
                    for pending in
                        file.pending.iter_mut().take(split).filter(|pending| pending.fate == Fate::Open)
                    {
                        pending.fate = Fate::Durable;
                    }
                } else if split > 0 {
                    let bytes = Arc::make_mut(&mut file.durable);
                    for pending in file.pending.drain(..split) {
                        carry_out(bytes, &pending.change);
                    }
                }
            }
            Some(Node::Folder(folder)) => {
                let split = folder.pending.partition_point(|pending| pending.event <= upto);
                for pending in folder.pending.drain(..split) {
                    follow(&mut folder.durable, &pending.change);
                }
            }
            None => {}
        }
    }

    fn folder_mut(&mut self, id: Id) -> anyhow::Result<&mut Folder> {
        match self.nodes.get_mut(id) {
            Some(Node::Folder(folder)) => Ok(folder),
            _ => bail!("something lies in what is no folder"),
        }
    }

    fn find(&self, path: &[u8]) -> Option<Id> {
        let parts = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty());
        parts.into_iter().try_fold(ROOT, |at, part| match self.nodes.get(at) {
            Some(Node::Folder(folder)) => folder.now.get(part).copied(),
            _ => None,
        })
    }

    /// The folder of a path, and the name in it.
    fn parent(&self, path: &[u8]) -> anyhow::Result<(Id, Vec<u8>)> {
        let (folder, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(at) => (path.get(..at).unwrap_or_default(), path.get(at + 1..).unwrap_or_default()),
            None => (&[][..], path),
        };
        let folder =
            self.find(folder).with_context(|| format!("no folder for {}", String::from_utf8_lossy(path)))?;
        Ok((folder, name.to_vec()))
    }

    // ---- what may be on it

    /// What everybody sees who reads it now.
    #[must_use]
    pub fn now(&self) -> Image {
        self.collect(&mut |folder| folder.now.clone(), &mut |file| {
            let mut bytes = Arc::clone(&file.durable);
            for pending in &file.pending {
                carry_out(Arc::make_mut(&mut bytes), &pending.change);
            }
            bytes
        })
    }

    /// What is on it if the power goes now: one of many possibilities.
    #[must_use]
    pub fn after_power_cut(&self, names: Names, chance: &mut Chance) -> Image {
        // Some cuts lose all that can be lost, some nothing, most of them some.
        let greed = match chance.below(10) {
            0 => 0,
            1 => 100,
            _ => 10 + chance.below(81),
        };
        let seed = chance.draw();
        let mut of_folders = Chance::of(&[seed, 1]);
        let mut of_files = Chance::of(&[seed, 2]);
        self.collect(
            &mut |folder| {
                let mut entries = folder.durable.clone();
                let changes = folder.pending.iter().map(|pending| &pending.change);
                match names {
                    Names::InOrder => {
                        let most = folder.pending.len() as u64;
                        let kept = match greed {
                            0 => 0,
                            100 => most,
                            _ => of_folders.below(most + 1),
                        };
                        for change in changes.take(usize::try_from(kept).unwrap_or(usize::MAX)) {
                            follow(&mut entries, change);
                        }
                    }
                    Names::AnyOrder => {
                        let mut held_up = BTreeSet::new();
                        for change in changes {
                            let free = change.iter().all(|(name, _)| !held_up.contains(name));
                            if free && of_folders.percent(greed) {
                                follow(&mut entries, change);
                            } else {
                                held_up.extend(change.iter().map(|(name, _)| name.clone()));
                            }
                        }
                    }
                }
                entries
            },
            &mut |file| torn(file, greed, &mut of_files),
        )
    }

    /// Walks over what is there: `entries` says what a folder has, `bytes` what a file has.
    fn collect(
        &self,
        entries: &mut impl FnMut(&Folder) -> BTreeMap<Vec<u8>, Id>,
        bytes: &mut impl FnMut(&File) -> Arc<Vec<u8>>,
    ) -> Image {
        let mut image = Image::new();
        let mut seen = BTreeMap::new();
        let mut left = vec![(String::new(), ROOT)];
        while let Some((path, id)) = left.pop() {
            let entry = match self.nodes.get(id) {
                Some(Node::Folder(folder)) => {
                    for (name, id) in entries(folder) {
                        let name = String::from_utf8_lossy(&name).into_owned();
                        let below = if path.is_empty() { name } else { format!("{path}/{name}") };
                        left.push((below, id));
                    }
                    Entry::Folder
                }
                // A file with two names is one file.
                Some(Node::File(file)) => {
                    Entry::File(Arc::clone(seen.entry(id).or_insert_with(|| bytes(file))))
                }
                None => continue,
            };
            if !path.is_empty() {
                image.insert(path, entry);
            }
        }
        image
    }
}

fn follow(entries: &mut BTreeMap<Vec<u8>, Id>, changes: &Renaming) {
    for (name, id) in changes {
        match id {
            Some(id) => entries.insert(name.clone(), *id),
            None => entries.remove(name),
        };
    }
}

fn carry_out(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Length(length) => bytes.resize(*length, 0),
        Change::Write { offset, bytes: data } => {
            let end = offset + data.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            if let Some(place) = bytes.get_mut(*offset..end) {
                place.copy_from_slice(data);
            }
        }
    }
}

/// One of the contents a file may have after a power cut. `greed`: of a hundred pages, about so many keep what was written.
fn torn(file: &File, greed: u64, chance: &mut Chance) -> Arc<Vec<u8>> {
    if file.pending.is_empty() {
        return Arc::clone(&file.durable);
    }
    // The length: as after so many of the changes.
    let all = file.pending.len();
    let reached = match greed {
        0 => 0,
        100 => all,
        _ => chance.index(all + 1),
    };
    let grown = |length: usize, change: &Change| match change {
        Change::Length(to) => *to,
        Change::Write { offset, bytes } => length.max(offset + bytes.len()),
    };
    let changes = || file.pending.iter().map(|pending| &pending.change);
    let got_there =
        |at: usize| at < reached || file.pending.get(at).is_some_and(|pending| pending.fate == Fate::Durable);
    let length = changes()
        .enumerate()
        .filter(|(at, _)| got_there(*at))
        .fold(file.durable.len(), |length, (_, change)| grown(length, change));
    // Where the file was cut off: what had been there is gone, if the shorter length got there; if it did not, then neither did
    // anything that was written after it.
    let mut base = Arc::clone(&file.durable);
    let mut last = all;
    let mut live_length = file.durable.len();
    for (at, change) in changes().enumerate() {
        if let Change::Length(to) = change
            && *to < live_length
        {
            if got_there(at) {
                if *to < base.len() {
                    let bytes = Arc::make_mut(&mut base);
                    bytes.truncate(*to);
                }
            } else {
                last = at;
                break;
            }
        }
        live_length = grown(live_length, change);
    }
    let bytes = Arc::make_mut(&mut base);
    bytes.resize(length.max(bytes.len()), 0);
    bytes.truncate(length);

    // The pages that were written, and by which of the changes.
    let mut pages: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (at, change) in changes().take(last).enumerate() {
        if let Change::Write { offset, bytes } = change
            && !bytes.is_empty()
        {
            for page in offset / PAGE..=(offset + bytes.len() - 1) / PAGE {
                pages.entry(page).or_default().push(at);
            }
        }
    }
    for (page, writes) in pages {
        let start = page * PAGE;
        if start >= bytes.len() {
            continue;
        }
        let is_durable =
            |at: &usize| file.pending.get(*at).is_some_and(|pending| pending.fate == Fate::Durable);
        let older = match (chance.percent(greed), chance.percent(70)) {
            (false, _) => 0,
            (true, true) => writes.len(),
            (true, false) => 1 + chance.index(writes.len()),
        };
        if older == 0 && !writes.iter().any(is_durable) {
            continue;
        }
        // What is there at least, and what is there in this case.
        let mut base_content = page_of(bytes, start);
        for at in writes.iter().filter(|at| is_durable(at)) {
            let change = file.pending.get(*at).map(|pending| &pending.change);
            overwrite(&mut base_content, start, change, file, *at, last);
        }
        let mut content = page_of(bytes, start);
        let there = writes.iter().enumerate().filter(|(n, at)| *n < older || is_durable(at));
        for (_, at) in there {
            overwrite(
                &mut content,
                start,
                file.pending.get(*at).map(|pending| &pending.change),
                file,
                *at,
                last,
            );
        }
        if chance.percent(25) {
            for sector in 0..PAGE / SECTOR {
                if chance.percent(50) {
                    let range = sector * SECTOR..(sector + 1) * SECTOR;
                    if let (Some(to), Some(from)) = (content.get_mut(range.clone()), base_content.get(range))
                    {
                        to.copy_from_slice(from);
                    }
                }
            }
        }
        let end = bytes.len().min(start + PAGE);
        if let (Some(to), Some(from)) = (bytes.get_mut(start..end), content.get(..end - start)) {
            to.copy_from_slice(from);
        }
    }
    base
}

fn page_of(bytes: &[u8], start: usize) -> Vec<u8> {
    let mut page = bytes.get(start..bytes.len().min(start + PAGE)).unwrap_or_default().to_vec();
    page.resize(PAGE, 0);
    page
}

/// Puts what a write says about the page at `start` into `content`, but for what a later shortening took away again.
fn overwrite(content: &mut [u8], start: usize, change: Option<&Change>, file: &File, at: usize, last: usize) {
    let Some(Change::Write { offset, bytes }) = change else { return };
    let cut = file
        .pending
        .get(at + 1..last)
        .unwrap_or_default()
        .iter()
        .filter_map(|pending| match pending.change {
            Change::Length(to) => Some(to),
            Change::Write { .. } => None,
        })
        .min()
        .unwrap_or(usize::MAX);
    let from = start.max(*offset);
    let to = (start + PAGE).min(offset + bytes.len()).min(cut);
    if from < to
        && let (Some(place), Some(data)) =
            (content.get_mut(from - start..to - start), bytes.get(from - offset..to - offset))
    {
        place.copy_from_slice(data);
    }
}

/// Writes an image into an empty folder.
///
/// # Errors
/// Those of the file system.
pub fn write_out(image: &Image, folder: &Path) -> std::io::Result<()> {
    for (path, entry) in image {
        let path = folder.join(path);
        match entry {
            Entry::Folder => std::fs::create_dir(path)?,
            Entry::File(bytes) => write_sparse(&path, bytes)?,
        }
    }
    Ok(())
}

/// Leaves pages of zeros out: databases reserve much that they do not use.
fn write_sparse(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    const PIECE: usize = 64 * 1024;
    let zeros = [0u8; PIECE];
    let file = std::fs::File::create(path)?;
    file.set_len(bytes.len() as u64)?;
    let mut at = 0u64;
    for piece in bytes.chunks(PIECE) {
        if zeros.get(..piece.len()) != Some(piece) {
            file.write_all_at(piece, at)?;
        }
        at += piece.len() as u64;
    }
    Ok(())
}

/// Reads a folder.
///
/// # Errors
/// Those of the file system, and names that are not UTF-8.
pub fn read_in(folder: &Path) -> anyhow::Result<Image> {
    let mut image = Image::new();
    let mut left = vec![String::new()];
    while let Some(path) = left.pop() {
        for entry in std::fs::read_dir(folder.join(&path))? {
            let entry = entry?;
            let name = entry.file_name().into_string().ok().context("a name that is not UTF-8")?;
            let below = if path.is_empty() { name } else { format!("{path}/{name}") };
            if entry.file_type()?.is_dir() {
                image.insert(below.clone(), Entry::Folder);
                left.push(below);
            } else {
                image.insert(below, Entry::File(Arc::new(std::fs::read(entry.path())?)));
            }
        }
    }
    Ok(image)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn open(handle: u32, path: &str) -> Event {
        Event::Open { handle, path: path.as_bytes().to_vec(), truncate: false, write_through: false }
    }

    fn write(handle: u32, offset: u64, byte: u8, length: usize) -> Event {
        Event::Write { handle, offset, bytes: vec![byte; length] }
    }

    fn sync(handle: u32, sync: u64) -> [Event; 2] {
        [Event::SyncBegin { handle, sync, kind: SyncKind::Data }, Event::SyncEnd { sync }]
    }

    fn played(events: &[Event]) -> Disk {
        let mut disk = Disk::new(&Image::new()).unwrap();
        for event in events {
            disk.play(event).unwrap();
        }
        disk
    }

    /// Everything seen in many cuts of the same disk.
    fn cuts(disk: &Disk, names: Names) -> BTreeSet<Vec<(String, Vec<u8>)>> {
        let images = (0..400).map(|seed| disk.after_power_cut(names, &mut Chance::of(&[seed])));
        images
            .map(|image| {
                let files = image.into_iter().filter_map(|(path, entry)| match entry {
                    Entry::File(bytes) => Some((path, bytes.to_vec())),
                    Entry::Folder => None,
                });
                files.collect()
            })
            .collect()
    }

    /// The contents that file `a` has in many cuts.
    fn contents(events: &[Event]) -> BTreeSet<Vec<u8>> {
        let files = |image: Vec<(String, Vec<u8>)>| image.into_iter().map(|(_, bytes)| bytes);
        cuts(&played(events), Names::InOrder).into_iter().flat_map(files).collect()
    }

    /// A folder whose file `a` has a durable name.
    fn named() -> Vec<Event> {
        let mut events = vec![open(1, "a"), open(9, "")];
        events.extend(sync(9, 1));
        events
    }

    #[test]
    fn what_was_synced_is_there_and_the_rest_may_be() {
        let mut events = named();
        events.push(write(1, 0, 7, 100));
        assert!(contents(&events).contains(&vec![]), "nothing of it");
        assert!(contents(&events).contains(&vec![7; 100]), "all of it");
        assert!(contents(&events).contains(&vec![0; 100]), "the length, and not the bytes");
        events.extend(sync(1, 2));
        assert_eq!(contents(&events), [vec![7; 100]].into());
        events.push(write(1, 50, 8, 100));
        let after = contents(&events);
        assert!(after.iter().all(|bytes| bytes[..50] == [7; 50]), "durable bytes stay");
        assert!(after.contains(&[vec![7; 50], vec![8; 100]].concat()));
        assert!(after.contains(&vec![7; 100]));
    }

    #[test]
    fn a_sync_covers_what_was_written_before_it_began() {
        let mut events = named();
        events.push(write(1, 0, 1, 10));
        events.push(Event::SyncBegin { handle: 1, sync: 2, kind: SyncKind::Full });
        events.push(write(1, 10, 2, 10));
        assert!(contents(&events).contains(&vec![]), "not before it has returned");
        events.push(Event::SyncEnd { sync: 2 });
        let after = contents(&events);
        assert!(after.iter().all(|bytes| bytes[..10] == [1; 10]));
        assert!(after.contains(&vec![1; 10]));
    }

    #[test]
    fn writing_a_range_out_promises_nothing() {
        let mut events = named();
        events.push(write(1, 0, 1, 10));
        events.push(Event::SyncBegin { handle: 1, sync: 2, kind: SyncKind::Range });
        events.push(Event::SyncEnd { sync: 2 });
        assert!(contents(&events).contains(&vec![]));
    }

    #[test]
    fn pages_are_torn_at_sectors_and_nowhere_else() {
        let mut events = named();
        events.push(write(1, 0, 1, 2 * PAGE));
        events.extend(sync(1, 2));
        events.push(write(1, 0, 2, 2 * PAGE));
        let after = contents(&events);
        let sectors = |bytes: &Vec<u8>| bytes.chunks(SECTOR).map(<[u8]>::to_vec).collect::<Vec<_>>();
        let whole = [vec![1; SECTOR], vec![2; SECTOR]];
        assert!(after.iter().all(|bytes| sectors(bytes).iter().all(|sector| whole.contains(sector))));
        assert!(after.iter().any(|bytes| bytes[..SECTOR] != bytes[SECTOR..2 * SECTOR]), "torn within a page");
        assert!(
            after.iter().any(|bytes| bytes[0] == 1 && bytes[PAGE] == 2),
            "the second page without the first"
        );
    }

    #[test]
    fn an_end_that_was_cut_off_comes_back_or_is_gone() {
        let mut events = named();
        events.push(write(1, 0, 1, 100));
        events.extend(sync(1, 2));
        events.push(Event::Length { handle: 1, length: 10 });
        events.push(write(1, 10, 2, 10));
        let after = contents(&events);
        assert!(after.contains(&vec![1; 100]), "the shorter length did not get there");
        assert!(after.contains(&[vec![1; 10], vec![2; 10]].concat()));
        assert!(
            after.contains(&[vec![1; 10], vec![0; 10]].concat()),
            "the old bytes do not come back under it"
        );
        assert!(!after.iter().any(|bytes| bytes.len() == 100 && bytes[10] == 2));
    }

    #[test]
    fn a_failed_sync_is_not_made_up_for_by_a_later_one() {
        let mut events = named();
        events.push(write(1, 0, 1, 10));
        events.push(Event::SyncFail { handle: 1 });
        events.push(write(1, 10, 2, 10));
        events.extend(sync(1, 2));
        let after = contents(&events);
        assert!(after.iter().all(|bytes| bytes[10..20] == [2; 10]), "what came after it is durable");
        let first: BTreeSet<_> = after.iter().map(|bytes| bytes[..10].to_vec()).collect();
        assert_eq!(first, [vec![0; 10], vec![1; 10]].into(), "what it was for may be missing for good");
    }

    #[test]
    fn names_need_the_folders_sync_and_keep_their_order() {
        let files = |events: &[Event], names| -> BTreeSet<String> {
            let paths = |image: Vec<(String, Vec<u8>)>| {
                image.into_iter().map(|(path, _)| path).collect::<Vec<_>>().join("+")
            };
            cuts(&played(events), names).into_iter().map(paths).collect()
        };
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        let mut events = vec![open(1, "a"), write(1, 0, 1, 10)];
        events.extend(sync(1, 1));
        assert_eq!(files(&events, Names::InOrder), set(&["", "a"]), "a synced file may have no name");
        events.push(open(9, ""));
        events.extend(sync(9, 2));
        events.push(open(2, "b"));
        events.push(Event::Rename { from: b"a".to_vec(), to: b"c".to_vec() });
        assert_eq!(files(&events, Names::InOrder), set(&["a", "a+b", "b+c"]));
        assert_eq!(files(&events, Names::AnyOrder), set(&["a", "a+b", "b+c", "c"]));
        events.push(Event::Unlink { path: b"b".to_vec() });
        assert!(!files(&events, Names::AnyOrder).contains("a+b+c"), "a rename happens as a whole");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever is done: a cut disk has only bytes that were written to that place, and everything is there once
        /// everything was synced.
        #[test]
        fn a_cut_makes_nothing_up(
            writes in proptest::collection::vec((0u64..20_000, 1u8.., 1usize..9_000, any::<bool>()), 1..12),
            seed in any::<u64>(),
        ) {
            let mut events = named();
            let mut at: BTreeMap<usize, BTreeSet<u8>> = BTreeMap::new();
            for (n, (offset, byte, length, synced)) in (2..).zip(&writes) {
                events.push(write(1, *offset, *byte, *length));
                for place in 0..*length {
                    at.entry(usize::try_from(*offset).unwrap() + place).or_default().insert(*byte);
                }
                if *synced {
                    events.extend(sync(1, n));
                }
            }
            let mut disk = played(&events);
            let image = disk.after_power_cut(Names::InOrder, &mut Chance::of(&[seed]));
            let Some(Entry::File(bytes)) = image.get("a") else { panic!("the name was durable") };
            for (place, byte) in bytes.iter().enumerate() {
                prop_assert!(*byte == 0 || at.get(&place).is_some_and(|bytes| bytes.contains(byte)));
            }
            for event in sync(1, 1_000) {
                disk.play(&event).unwrap();
            }
            prop_assert_eq!(disk.after_power_cut(Names::InOrder, &mut Chance::of(&[seed])), disk.now());
        }
    }
}
