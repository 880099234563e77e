//! A folder in memory that loses power and fails on purpose. Tests only.
//!
//! - Every call that changes something spends one of the [`Power`]'s operations; when none are left, that call and all
//!   after it fail. [`FaultyFiles::after_power_cut`] is what the disk may hold then: what was synced, and any part of the
//!   rest.
//! - Room is zeros like any others: its length and its bytes are as uncertain as those of an append until they are synced.
//! - A [`Fault`] fails calls of one kind on files of some names, once or until it is healed.
//! - An append to a file whose append or sync failed before is a broken promise of the caller's: see
//!   [`FaultyFiles::broken_promises`].
//!
//! Not here: engines that do the same (`engine::faulty`).

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use super::{Append, Files, ReadAt, Slots};

/// Bytes the disk takes or loses as one.
const SECTOR: usize = 512;

/// Bytes of the page cache that are written out together.
const PAGE: usize = 4096;

/// A small generator, so that a failing case is its seed.
#[derive(Clone, Debug)]
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        // Seeds that follow each other must not begin alike.
        let mut chance = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..4 {
            chance.below(2);
        }
        chance
    }

    /// A number below `n`, which is not zero.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % n
    }

    /// One of several.
    pub(crate) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::try_from(self.below(of.len() as u64)).unwrap_or(0)]
    }

    /// True in `percent` of all cases.
    pub(crate) fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// The power of a machine: operations that are left until it goes off. Clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Power {
    left: Arc<AtomicI64>,
}

impl Power {
    pub(crate) fn of(operations: i64) -> Self {
        Self { left: Arc::new(AtomicI64::new(operations)) }
    }

    pub(crate) fn for_ever() -> Self {
        Self::of(i64::MAX)
    }

    /// From now on so many operations are left.
    pub(crate) fn allow(&self, operations: i64) {
        self.left.store(operations, Ordering::SeqCst);
    }

    pub(crate) fn is_off(&self) -> bool {
        self.left.load(Ordering::SeqCst) <= 0
    }

    /// Takes one operation; false when the power is off.
    pub(crate) fn spend(&self) -> bool {
        let on = self.left.fetch_sub(1, Ordering::SeqCst) > 0;
        if !on {
            // Far from wrapping, however often it is asked.
            self.left.store(0, Ordering::SeqCst);
        }
        on
    }
}

/// What the file system is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Create,
    Append,
    Room,
    Sync,
    SyncFolder,
    Rename,
    Remove,
    Open,
    Read,
    SlotWrite,
}

/// How a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failing {
    /// Input/output error; nothing was done.
    Broken,
    /// No space; nothing was written.
    Full,
    /// No space; part of it was written.
    Partly,
    /// Input/output error, though all of it was done.
    Done,
}

impl Failing {
    fn error(self) -> io::Error {
        io::Error::from_raw_os_error(match self {
            Self::Broken | Self::Done => 5,
            Self::Full | Self::Partly => 28,
        })
    }
}

/// A fault to come.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub(crate) call: Call,
    /// How the file's name ends; the new name, with a rename. Everything ends with "".
    pub(crate) name: &'static str,
    /// Calls that succeed before.
    pub(crate) after: u64,
    /// Calls that fail then.
    pub(crate) times: u64,
    pub(crate) how: Failing,
}

/// How unsynced changes of the folder survive a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Names {
    /// Those before some point in time.
    Prefix,
    /// Any of them, as long as what happened to one name survives in order.
    Any,
}

#[derive(Clone, Debug, Default)]
struct Node {
    now: Vec<u8>,
    /// Where the next append goes.
    end: usize,
    durable: Vec<u8>,
    /// Overwrites, oldest first; never synced.
    slots: Vec<(usize, Vec<u8>)>,
    /// An append or a sync failed.
    failed: bool,
}

#[derive(Clone, Debug)]
enum FolderChange {
    Create(String, usize),
    Rename(String, String),
    Remove(String),
}

#[derive(Debug, Default)]
struct World {
    nodes: Vec<Node>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    changes: Vec<FolderChange>,
    faults: Vec<Fault>,
    failed_calls: u64,
    broken_promises: Vec<String>,
    delay: Duration,
}

/// See the module. Clones are the same folder.
#[derive(Clone, Debug)]
pub(crate) struct FaultyFiles {
    world: Arc<Mutex<World>>,
    power: Power,
}

#[derive(Debug)]
struct Handle {
    files: FaultyFiles,
    node: usize,
    name: String,
}

impl FaultyFiles {
    pub(crate) fn new(power: Power) -> Self {
        Self { world: Arc::default(), power }
    }

    pub(crate) fn power(&self) -> &Power {
        &self.power
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- faults

    /// From now on this fails as well.
    pub(crate) fn fail(&self, fault: Fault) {
        self.world().faults.push(fault);
    }

    /// Nothing fails any more.
    pub(crate) fn heal(&self) {
        self.world().faults.clear();
    }

    /// Calls that failed on purpose.
    pub(crate) fn failed_calls(&self) -> u64 {
        self.world().failed_calls
    }

    /// Every changing call takes this long.
    pub(crate) fn set_delay(&self, delay: Duration) {
        self.world().delay = delay;
    }

    /// Writes to files that must not be written to any more.
    pub(crate) fn broken_promises(&self) -> Vec<String> {
        self.world().broken_promises.clone()
    }

    fn fault(&self, call: Call, name: &str) -> Option<Failing> {
        let mut world = self.world();
        let mut how = None;
        for fault in world.faults.iter_mut().filter(|fault| fault.call == call && name.ends_with(fault.name))
        {
            if fault.after > 0 {
                fault.after -= 1;
            } else if fault.times > 0 {
                fault.times -= 1;
                how = how.or(Some(fault.how));
            }
        }
        world.failed_calls += u64::from(how.is_some());
        how
    }

    /// Spends power and time for a changing call; says how it has to fail, if it has to.
    fn begin(&self, call: Call, name: &str) -> io::Result<Option<Failing>> {
        if !self.power.spend() {
            return Err(io::Error::other("the power is off"));
        }
        let delay = self.world().delay;
        if !delay.is_zero() {
            let until = std::time::Instant::now() + delay;
            while let Some(left) = until.checked_duration_since(std::time::Instant::now()) {
                std::thread::park_timeout(left);
            }
        }
        Ok(self.fault(call, name))
    }

    fn looks(&self, call: Call, name: &str) -> io::Result<()> {
        if self.power.is_off() {
            return Err(io::Error::other("the power is off"));
        }
        self.fault(call, name).map_or(Ok(()), |how| Err(how.error()))
    }

    // ---- what is there, past all faults

    pub(crate) fn names(&self) -> Vec<String> {
        self.world().names.keys().cloned().collect()
    }

    /// The bytes of a file.
    pub(crate) fn get(&self, name: &str) -> Option<Vec<u8>> {
        let world = self.world();
        world.nodes.get(*world.names.get(name)?).map(|node| node.now.clone())
    }

    /// Puts a file there, durably.
    pub(crate) fn set(&self, name: &str, bytes: Vec<u8>) {
        let mut world = self.world();
        let node = world.nodes.len();
        world.nodes.push(Node { now: bytes.clone(), durable: bytes, ..Node::default() });
        world.names.insert(name.to_owned(), node);
        world.durable_names.insert(name.to_owned(), node);
    }

    /// Takes a file away, durably.
    pub(crate) fn take(&self, name: &str) {
        let mut world = self.world();
        world.names.remove(name);
        world.durable_names.remove(name);
    }

    /// The same files as they are now, all durable: what is found after the process was killed. `meanwhile` runs before
    /// anything more is done to them.
    pub(crate) fn after_kill<T>(&self, power: Power, meanwhile: impl FnOnce() -> T) -> (Self, T) {
        let world = self.world();
        let after = Self::new(power);
        for (name, node) in &world.names {
            after.set(name, world.nodes.get(*node).map(|node| node.now.clone()).unwrap_or_default());
        }
        (after, meanwhile())
    }

    /// What may be found after the power was cut.
    pub(crate) fn after_power_cut(&self, power: Power, names: Names, chance: &mut Chance) -> Self {
        self.after_power_cut_while(power, names, chance, |_| ()).0
    }

    /// What may be found after the power was cut. `meanwhile` runs before anything more is done to the files.
    pub(crate) fn after_power_cut_while<T>(
        &self,
        power: Power,
        names: Names,
        chance: &mut Chance,
        meanwhile: impl FnOnce(&mut Chance) -> T,
    ) -> (Self, T) {
        let world = self.world();
        let mut found = world.durable_names.clone();
        let kept = chance.below(world.changes.len() as u64 + 1);
        let mut lost: BTreeSet<&str> = BTreeSet::new();
        for (change, n) in world.changes.iter().zip(0..) {
            let touched: Vec<&str> = match change {
                FolderChange::Create(name, _) | FolderChange::Remove(name) => vec![name],
                FolderChange::Rename(from, to) => vec![from, to],
            };
            let survives = match names {
                Names::Prefix => n < kept,
                Names::Any => !touched.iter().any(|name| lost.contains(name)) && chance.percent(60),
            };
            if !survives {
                lost.extend(touched);
                continue;
            }
            match change {
                FolderChange::Create(name, node) => drop(found.insert(name.clone(), *node)),
                FolderChange::Remove(name) => drop(found.remove(name)),
                FolderChange::Rename(from, to) => {
                    if let Some(node) = found.remove(from) {
                        found.insert(to.clone(), node);
                    }
                }
            }
        }
        let after = Self::new(power);
        for (name, node) in found {
            if let Some(node) = world.nodes.get(node) {
                after.set(&name, node.after_power_cut(chance));
            }
        }
        (after, meanwhile(chance))
    }
}

impl Node {
    fn after_power_cut(&self, chance: &mut Chance) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        if self.now != self.durable && self.slots.is_empty() {
            self.tear(&mut bytes, chance);
        }
        let places: BTreeSet<usize> = self.slots.iter().map(|(at, _)| *at).collect();
        for place in places {
            let writes: Vec<&Vec<u8>> =
                self.slots.iter().filter(|(at, _)| *at == place).map(|(_, bytes)| bytes).collect();
            // The newest more often than not.
            let chosen =
                if chance.percent(40) { writes.len() as u64 } else { chance.below(writes.len() as u64 + 1) };
            if let Some(slot) =
                usize::try_from(chosen).ok().and_then(|n| n.checked_sub(1)).and_then(|n| writes.get(n))
            {
                let end = place + slot.len();
                bytes.resize(bytes.len().max(end), 0);
                bytes[place..end].copy_from_slice(slot);
            }
        }
        bytes
    }

    /// Lets any part of what was written since the last sync survive: what was appended, and room, whose length is as uncertain as its
    /// zeros.
    fn tear(&self, bytes: &mut Vec<u8>, chance: &mut Chance) {
        let (synced, all) = (self.durable.len(), self.now.len());
        let length = match chance.below(4) {
            0 => synced,
            1 => all,
            _ => synced + usize::try_from(chance.below((all.saturating_sub(synced)) as u64 + 1)).unwrap_or(0),
        };
        bytes.resize(length, 0);
        let survive = [0, 50, 90, 100][chance.below(4) as usize];
        // Bytes in room that was synced are overwritten in place.
        let same = self.now.iter().zip(&self.durable).position(|(now, durable)| now != durable);
        let mut at = same.unwrap_or(synced);
        while at < length {
            let page_end = ((at / PAGE + 1) * PAGE).min(length);
            let torn = chance.percent(20);
            let page = chance.percent(survive);
            while at < page_end {
                let sector_end = ((at / SECTOR + 1) * SECTOR).min(page_end);
                if if torn { chance.percent(50) } else { page } {
                    bytes[at..sector_end].copy_from_slice(&self.now[at..sector_end]);
                }
                at = sector_end;
            }
        }
    }
}

impl Files for FaultyFiles {
    fn create(&self, name: &str) -> io::Result<Box<dyn Append>> {
        if let Some(how) = self.begin(Call::Create, name)? {
            return Err(how.error());
        }
        let mut world = self.world();
        let node = world.nodes.len();
        world.nodes.push(Node::default());
        world.names.insert(name.to_owned(), node);
        world.changes.push(FolderChange::Create(name.to_owned(), node));
        drop(world);
        Ok(Box::new(Handle { files: self.clone(), node, name: name.to_owned() }))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn ReadAt>> {
        self.looks(Call::Open, name)?;
        let node = self.world().names.get(name).copied().ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(Handle { files: self.clone(), node, name: name.to_owned() }))
    }

    fn open_slots(&self, name: &str) -> io::Result<Box<dyn Slots>> {
        self.looks(Call::Open, name)?;
        let found = self.world().names.get(name).copied();
        let node = match found {
            Some(node) => node,
            None => {
                self.create(name)?;
                self.world().nodes.len() - 1
            }
        };
        Ok(Box::new(Handle { files: self.clone(), node, name: name.to_owned() }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let how = self.begin(Call::Rename, to)?;
        if let Some(how) = how
            && how != Failing::Done
        {
            return Err(how.error());
        }
        let mut world = self.world();
        let node = world.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        world.names.insert(to.to_owned(), node);
        world.changes.push(FolderChange::Rename(from.to_owned(), to.to_owned()));
        how.map_or(Ok(()), |how| Err(how.error()))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        if let Some(how) = self.begin(Call::Remove, name)? {
            return Err(how.error());
        }
        let mut world = self.world();
        world.names.remove(name).ok_or(io::ErrorKind::NotFound)?;
        world.changes.push(FolderChange::Remove(name.to_owned()));
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<(String, u64)>> {
        self.looks(Call::Read, "")?;
        let world = self.world();
        let length = |node: &usize| world.nodes.get(*node).map_or(0, |node| node.now.len() as u64);
        Ok(world.names.iter().map(|(name, node)| (name.clone(), length(node))).collect())
    }

    fn sync_folder(&self) -> io::Result<()> {
        if let Some(how) = self.begin(Call::SyncFolder, "")? {
            return Err(how.error());
        }
        let mut world = self.world();
        world.changes.clear();
        world.durable_names = world.names.clone();
        Ok(())
    }

    fn free(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }
}

impl Handle {
    fn with<T>(&self, work: impl FnOnce(&mut Node) -> T) -> io::Result<T> {
        let mut world = self.files.world();
        world.nodes.get_mut(self.node).map(work).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn keep_promise(&self, doing: &str) -> io::Result<()> {
        if self.with(|node| node.failed)? {
            let broken = format!("{doing} of {}, which had failed", self.name);
            self.files.world().broken_promises.push(broken);
        }
        Ok(())
    }
}

impl Append for Handle {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let how = self.files.begin(Call::Append, &self.name)?;
        self.keep_promise("an append")?;
        let written = match how {
            None | Some(Failing::Done) => bytes,
            Some(Failing::Partly) => bytes.get(..bytes.len() / 2).unwrap_or_default(),
            Some(Failing::Broken | Failing::Full) => &[],
        };
        self.with(|node| {
            let end = node.end + written.len();
            node.now.resize(node.now.len().max(end), 0);
            node.now[node.end..end].copy_from_slice(written);
            node.end = end;
            node.failed |= how.is_some();
        })?;
        how.map_or(Ok(()), |how| Err(how.error()))
    }

    fn make_room(&mut self, until: u64) -> io::Result<()> {
        let how = self.files.begin(Call::Room, &self.name)?;
        self.keep_promise("room")?;
        let until = usize::try_from(until).map_err(io::Error::other)?;
        self.with(|node| {
            let more = until.saturating_sub(node.now.len());
            let made = match how {
                None | Some(Failing::Done) => more,
                Some(Failing::Partly) => more / 2,
                Some(Failing::Broken | Failing::Full) => 0,
            };
            node.now.resize(node.now.len() + made, 0);
        })?;
        how.map_or(Ok(()), |how| Err(how.error()))
    }

    fn sync(&mut self) -> io::Result<()> {
        let how = self.files.begin(Call::Sync, &self.name)?;
        self.keep_promise("a sync")?;
        self.with(|node| {
            node.failed |= how.is_some();
            if matches!(how, None | Some(Failing::Done)) {
                node.durable.clone_from(&node.now);
            }
        })?;
        how.map_or(Ok(()), |how| Err(how.error()))
    }
}

impl ReadAt for Handle {
    fn read_exact_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        self.files.looks(Call::Read, &self.name)?;
        self.with(|node| {
            let at = usize::try_from(at).map_err(io::Error::other)?;
            let end = at.checked_add(buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            let found = node.now.get(at..end).ok_or(io::ErrorKind::UnexpectedEof)?;
            buffer.copy_from_slice(found);
            Ok(())
        })?
    }

    fn len(&self) -> io::Result<u64> {
        self.with(|node| node.now.len() as u64)
    }
}

impl Slots for Handle {
    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let how = self.files.begin(Call::SlotWrite, &self.name)?;
        if matches!(how, None | Some(Failing::Done)) {
            let at = usize::try_from(at).map_err(io::Error::other)?;
            self.with(|node| {
                let end = at + bytes.len();
                node.now.resize(node.now.len().max(end), 0);
                node.now[at..end].copy_from_slice(bytes);
                node.slots.push((at, bytes.to_vec()));
            })?;
        }
        how.map_or(Ok(()), |how| Err(how.error()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_synced_survives_and_the_rest_may() {
        let (mut lost, mut kept, mut torn, mut nameless) = (0, 0, 0, 0);
        for seed in 0..400 {
            let mut chance = Chance::new(seed);
            let files = FaultyFiles::new(Power::for_ever());
            let mut file = files.create("a").unwrap();
            file.append(b"synced").unwrap();
            file.sync().unwrap();
            if seed % 2 == 0 {
                files.sync_folder().unwrap();
            }
            file.append(&[7; 10_000]).unwrap();
            let names = if chance.percent(50) { Names::Prefix } else { Names::Any };
            let after = files.after_power_cut(Power::for_ever(), names, &mut chance);
            let Some(bytes) = after.get("a") else {
                assert_eq!(seed % 2, 1, "a synced name stays");
                nameless += 1;
                continue;
            };
            assert!(bytes.starts_with(b"synced"));
            let sevens = bytes[6..].iter().filter(|byte| **byte == 7).count();
            assert_eq!(bytes[6..].iter().filter(|byte| **byte == 0).count() + sevens, bytes.len() - 6);
            match sevens {
                0 => lost += 1,
                10_000 => kept += 1,
                _ => torn += 1,
            }
        }
        assert!(lost > 20 && kept > 20 && torn > 20 && nameless > 20, "{lost} {kept} {torn} {nameless}");
    }

    #[test]
    fn room_is_there_or_not_and_what_was_synced_in_it_stays() {
        let (mut none, mut part, mut all, mut lost, mut kept, mut torn) = (0, 0, 0, 0, 0, 0);
        for seed in 0..600 {
            let mut chance = Chance::new(seed);
            let files = FaultyFiles::new(Power::for_ever());
            let mut file = files.create("a").unwrap();
            file.append(b"synced").unwrap();
            file.sync().unwrap();
            files.sync_folder().unwrap();
            file.make_room(10_000).unwrap();
            let synced = seed % 2 == 0;
            if synced {
                file.sync().unwrap();
            }
            file.append(&[7; 3_000]).unwrap();
            let bytes = files.after_power_cut(Power::for_ever(), Names::Any, &mut chance).get("a").unwrap();
            assert!(bytes.starts_with(b"synced") && bytes.len() <= 10_000);
            assert!(!synced || bytes.len() == 10_000, "room that was synced stays");
            match bytes.len() {
                6 => none += 1,
                10_000 => all += 1,
                _ => part += 1,
            }
            let sevens = bytes[6..].iter().filter(|byte| **byte == 7).count();
            let zeros = bytes.iter().filter(|byte| **byte == 0).count();
            assert!(bytes.len() == 6 + sevens + zeros && bytes.iter().skip(3_006).all(|byte| *byte == 0));
            match sevens {
                0 => lost += 1,
                3_000 => kept += 1,
                _ => torn += 1,
            }
        }
        assert!(none > 20 && part > 20 && all > 20, "{none} {part} {all}");
        assert!(lost > 20 && kept > 20 && torn > 20, "{lost} {kept} {torn}");
    }

    #[test]
    fn a_name_keeps_its_order_and_slots_mix() {
        let (mut none, mut old, mut new, mut mixed) = (0, 0, 0, 0);
        for seed in 0..400 {
            let mut chance = Chance::new(seed);
            let files = FaultyFiles::new(Power::for_ever());
            files.set("m", b"old".to_vec());
            let mut file = files.create("m.new").unwrap();
            file.append(b"new").unwrap();
            file.sync().unwrap();
            files.rename("m.new", "m").unwrap();
            let tip = files.open_slots("tip").unwrap();
            for n in 1..=4u8 {
                tip.write_all_at(&[n; 4], u64::from(n % 2) * 4).unwrap();
            }
            let after = files.after_power_cut(Power::for_ever(), Names::Any, &mut chance);
            match after.get("m").unwrap().as_slice() {
                b"old" => old += 1,
                b"new" => new += 1,
                other => panic!("{other:?}"),
            }
            match after.get("tip").as_deref() {
                None | Some([]) => none += 1,
                Some(bytes) => {
                    assert!(bytes.chunks(4).all(|slot| slot.iter().all(|byte| *byte == slot[0])));
                    mixed += u64::from(bytes.first().is_none_or(|n| *n != 4));
                }
            }
        }
        assert!(none > 20 && old > 20 && new > 20 && mixed > 20, "{none} {old} {new} {mixed}");
    }

    #[test]
    fn faults_come_when_they_are_due_and_end() {
        let files = FaultyFiles::new(Power::for_ever());
        let fault = Fault { call: Call::Append, name: ".log", after: 1, times: 1, how: Failing::Partly };
        files.fail(fault);
        let mut other = files.create("x.seg").unwrap();
        let mut file = files.create("x.log").unwrap();
        other.append(b"1234").unwrap();
        file.append(b"12").unwrap();
        assert_eq!(file.append(b"3456").unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(files.get("x.log").unwrap(), b"1234");
        assert_eq!(files.broken_promises(), Vec::<String>::new());
        file.append(b"x").unwrap();
        assert_eq!(files.broken_promises().len(), 1);
        let off = FaultyFiles::new(Power::of(1));
        off.create("a").unwrap();
        assert!(off.create("b").is_err() && off.open("a").is_err() && off.power().is_off());
    }
}
