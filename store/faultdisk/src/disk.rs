//! What is known of the files below the root, and what is done about a call that changes them.
//!
//! - Everything that changes a file or a name happens under one lock, together with its place in the recording.
//! - A descriptor is known from the open that made it (or the copy) to its close.
//!
//! Not here: the functions that stand in for the C library's (`symbol`), which calls a rule means (`rule`).

use std::{
    collections::BTreeMap,
    os::unix::ffi::OsStringExt,
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use libc::{c_int, c_long};

use crate::{
    recording::{Event, MAGIC, SyncKind},
    rule::{self, Operation, Rule, Verdict},
    system::{self, call},
};

/// Descriptors that can be known. Beyond them nothing is recorded, and the process is ended instead.
const DESCRIPTORS: usize = 65_536;

static DISK: OnceLock<Option<Disk>> = OnceLock::new();
static KNOWN: [AtomicBool; DESCRIPTORS] = [const { AtomicBool::new(false) }; DESCRIPTORS];

/// The settings, and what was opened.
#[derive(Debug)]
pub(crate) struct Disk {
    root: Vec<u8>,
    marks: Option<Vec<u8>>,
    delay: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    recording: Option<c_int>,
    sequence: u64,
    rules: Vec<Rule>,
    handles: BTreeMap<c_int, Handle>,
    opened: u32,
    syncs: u64,
    /// Bytes written below the root.
    written: u64,
}

#[derive(Clone, Debug)]
struct Handle {
    number: u32,
    path: Vec<u8>,
    is_marks: bool,
}

/// Where a path leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Elsewhere,
    /// Below the root, relative to it; empty: the root.
    Below(Vec<u8>),
    Marks,
}

/// The disk; `None` if there is none to be played in this process.
pub(crate) fn disk() -> Option<&'static Disk> {
    DISK.get_or_init(Disk::from_environment).as_ref()
}

/// The disk, if `descriptor` is of one of its files.
pub(crate) fn disk_of(descriptor: c_int) -> Option<&'static Disk> {
    let known = usize::try_from(descriptor).ok().and_then(|at| KNOWN.get(at))?;
    if known.load(Ordering::Acquire) { disk() } else { None }
}

fn know(descriptor: c_int, known: bool) {
    match usize::try_from(descriptor).ok().and_then(|at| KNOWN.get(at)) {
        Some(flag) => flag.store(known, Ordering::Release),
        None if known => system::give_up("a descriptor is beyond those that can be followed"),
        None => {}
    }
}

impl Disk {
    fn from_environment() -> Option<Self> {
        let variable = |name: &str| std::env::var_os(name).map(OsStringExt::into_vec);
        let root = normal(&variable("FULMAR_FAULTDISK_ROOT")?);
        if root.len() < 2 {
            system::give_up("FULMAR_FAULTDISK_ROOT is not an absolute path of a folder");
        }
        let text = |name: &str| variable(name).map(|value| String::from_utf8_lossy(&value).into_owned());
        let delay = text("FULMAR_FAULTDISK_SYNC_DELAY_US").map_or(0, |value| {
            value.parse().unwrap_or_else(|_| {
                system::give_up("FULMAR_FAULTDISK_SYNC_DELAY_US is not a number of microseconds")
            })
        });
        let rules = text("FULMAR_FAULTDISK_RULES").map_or_else(Vec::new, |value| {
            rule::parse(&value)
                .unwrap_or_else(|error| system::give_up(&format!("FULMAR_FAULTDISK_RULES: {error}")))
        });
        let recording = variable("FULMAR_FAULTDISK_RECORD").map(|mut path| {
            path.push(0);
            let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC | libc::O_CLOEXEC;
            let opened = call!(SYS_openat, libc::AT_FDCWD, path.as_ptr(), flags, 0o600);
            match c_int::try_from(opened) {
                Ok(descriptor) if descriptor >= 0 && system::write_all(descriptor, &MAGIC) => descriptor,
                _ => system::give_up("the recording can't be written"),
            }
        });
        let marks = variable("FULMAR_FAULTDISK_MARKS").map(|path| normal(&path));
        let state = State { recording, rules, ..State::default() };
        Some(Self { root, marks, delay: Duration::from_micros(delay), state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where `path`, given to a call that resolves it against `folder`, leads.
    pub(crate) fn place(&self, folder: c_int, path: &[u8]) -> Place {
        let whole = if path.starts_with(b"/") {
            normal(path)
        } else {
            let mut whole = system::folder_of(folder);
            if !whole.starts_with(b"/") {
                return Place::Elsewhere;
            }
            whole.push(b'/');
            whole.extend_from_slice(path);
            normal(&whole)
        };
        if self.marks.as_ref() == Some(&whole) {
            return Place::Marks;
        }
        match whole.strip_prefix(self.root.as_slice()) {
            Some([]) => Place::Below(Vec::new()),
            Some([b'/', below @ ..]) => Place::Below(below.to_vec()),
            _ => Place::Elsewhere,
        }
    }

    // ---- descriptors

    /// Opens. `make` is the system call.
    pub(crate) fn open(&self, place: &Place, flags: c_int, make: impl FnOnce() -> c_long) -> c_long {
        let Place::Below(path) = place else { return self.open_marks(place, make) };
        let mut state = self.state();
        let creates = flags & libc::O_CREAT != 0;
        let operation = if creates { Operation::Create } else { Operation::Open };
        if flags & libc::O_TMPFILE == libc::O_TMPFILE {
            state.unsupported("a file without a name");
        }
        // Files that are only read are nobody's business here, unless it is a folder: those are synced.
        let (result, after) = state.judged(operation, &[path], 0, make);
        let Some(descriptor) = fitting(result) else { return result };
        state.opened += 1;
        let number = state.opened;
        state.handles.insert(descriptor, Handle { number, path: path.clone(), is_marks: false });
        know(descriptor, true);
        state.record(&Event::Open {
            handle: number,
            path: path.clone(),
            truncate: flags & libc::O_TRUNC != 0 && flags & libc::O_ACCMODE != libc::O_RDONLY,
            write_through: flags & libc::O_DSYNC != 0,
        });
        after.carry_out();
        result
    }

    fn open_marks(&self, place: &Place, make: impl FnOnce() -> c_long) -> c_long {
        let result = make();
        if let (Place::Marks, Some(descriptor)) = (place, fitting(result)) {
            let handle = Handle { number: 0, path: Vec::new(), is_marks: true };
            self.state().handles.insert(descriptor, handle);
            know(descriptor, true);
        }
        result
    }

    /// `copy` is another descriptor of what `of` has open.
    pub(crate) fn copied(&self, of: c_int, copy: c_long) {
        let Some(copy) = fitting(copy) else { return };
        let mut state = self.state();
        if let Some(handle) = state.handles.get(&of).cloned() {
            state.handles.insert(copy, handle);
            know(copy, true);
        }
    }

    /// The descriptor means something else from now on.
    pub(crate) fn forget(&self, descriptor: c_int) {
        let mut state = self.state();
        know(descriptor, false);
        state.handles.remove(&descriptor);
    }

    // ---- files

    /// Writes `bytes` at `offset`; at the descriptor's position if that is `None`. `make` is the system call, given how many
    /// of the bytes it may write.
    pub(crate) fn write(
        &self,
        descriptor: c_int,
        offset: Option<u64>,
        bytes: &[u8],
        make: impl FnOnce(usize) -> c_long,
    ) -> c_long {
        let mut state = self.state();
        let Some(handle) = state.handles.get(&descriptor).cloned() else {
            return make(bytes.len());
        };
        if handle.is_marks {
            let result = make(bytes.len());
            if let Ok(written) = usize::try_from(result) {
                state.record(&Event::Mark { bytes: bytes.get(..written).unwrap_or_default().to_vec() });
            }
            return result;
        }
        let (mut most, mut after) = (bytes.len(), After::Nothing);
        match state.judge(Operation::Write, &[&handle.path], bytes.len() as u64) {
            Verdict::Go => {}
            Verdict::GoAndDie => after = After::Die,
            Verdict::Die => system::die(),
            Verdict::Fail(number) => return system::failed(number),
            Verdict::Skip => return c_long::try_from(bytes.len()).unwrap_or(0),
            Verdict::Short(room) => most = most.min(usize::try_from(room).unwrap_or(most)),
        }
        let result = make(most);
        if let Ok(written) = usize::try_from(result)
            && written > 0
        {
            state.written = state.written.saturating_add(written as u64);
            let offset = offset.unwrap_or_else(|| {
                let end = call!(SYS_lseek, descriptor, 0, libc::SEEK_CUR);
                u64::try_from(end).unwrap_or(0).saturating_sub(written as u64)
            });
            let bytes = bytes.get(..written).unwrap_or_default().to_vec();
            state.record(&Event::Write { handle: handle.number, offset, bytes });
        }
        after.carry_out();
        result
    }

    /// Something wrote to `descriptor` without showing the bytes: they are read back. `make` says where it wrote.
    pub(crate) fn write_unseen(
        &self,
        descriptor: c_int,
        make: impl FnOnce() -> (c_long, Option<u64>),
    ) -> c_long {
        let mut state = self.state();
        let Some(handle) = state.handles.get(&descriptor).cloned() else { return make().0 };
        let mut offset = None;
        let (result, after) = state.judged(Operation::Write, &[&handle.path], 0, || {
            let (result, at) = make();
            offset = at;
            result
        });
        if let Ok(written) = usize::try_from(result)
            && written > 0
        {
            let end = || u64::try_from(call!(SYS_lseek, descriptor, 0, libc::SEEK_CUR)).unwrap_or(0);
            let offset = offset.unwrap_or_else(|| end().saturating_sub(written as u64));
            // The descriptor itself may be for writing only.
            let name = format!("/proc/self/fd/{descriptor}\0");
            let own = call!(SYS_openat, libc::AT_FDCWD, name.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC, 0);
            let mut bytes = vec![0u8; written];
            let read = call!(SYS_pread64, own, bytes.as_mut_ptr(), written, offset);
            call!(SYS_close, own);
            if read == result {
                state.written = state.written.saturating_add(written as u64);
                state.record(&Event::Write { handle: handle.number, offset, bytes });
            } else {
                state.unsupported("bytes that could not be read back");
            }
        }
        after.carry_out();
        result
    }

    /// Sets a file's length; `length` is what it is afterwards, asked for once the call was made.
    pub(crate) fn set_length(
        &self,
        descriptor: c_int,
        make: impl FnOnce() -> c_long,
        length: impl FnOnce() -> Option<u64>,
    ) -> c_long {
        let mut state = self.state();
        let Some(handle) = state.handles.get(&descriptor).cloned() else { return make() };
        let (result, after) = state.judged(Operation::Length, &[&handle.path], 0, make);
        if result == 0
            && after != After::Skipped
            && let Some(length) = length()
        {
            state.record(&Event::Length { handle: handle.number, length });
        }
        after.carry_out();
        result
    }

    /// Syncs what `descriptor` has open.
    pub(crate) fn sync(&self, descriptor: c_int, kind: SyncKind, make: impl FnOnce() -> c_long) -> c_long {
        let (sync, number, after) = {
            let mut state = self.state();
            let handle = state.handles.get(&descriptor).cloned();
            let (number, path) = handle.map_or((0, Vec::new()), |handle| (handle.number, handle.path));
            let after = match state.judge(Operation::Sync, &[&path], 0) {
                Verdict::Go | Verdict::Short(_) => After::Nothing,
                Verdict::GoAndDie => After::Die,
                Verdict::Die => system::die(),
                Verdict::Fail(error) => {
                    state.record(&Event::SyncFail { handle: number });
                    return system::failed(error);
                }
                Verdict::Skip => return 0,
            };
            state.syncs += 1;
            let sync = state.syncs;
            state.record(&Event::SyncBegin { handle: number, sync, kind });
            (sync, number, after)
        };
        let result = make();
        system::sleep(self.delay);
        let event = if result == 0 { Event::SyncEnd { sync } } else { Event::SyncFail { handle: number } };
        self.state().record(&event);
        after.carry_out();
        result
    }

    // ---- names

    /// Changes names: `event` says how, once the call was made.
    pub(crate) fn name(
        &self,
        operation: Operation,
        paths: &[&[u8]],
        make: impl FnOnce() -> c_long,
        event: impl FnOnce() -> Event,
    ) -> c_long {
        let mut state = self.state();
        let (result, after) = state.judged(operation, paths, 0, make);
        if result == 0 && after != After::Skipped {
            state.record(&event());
        }
        after.carry_out();
        result
    }

    /// Notes what a recording can't hold.
    pub(crate) fn unsupported(&self, what: &str) {
        self.state().unsupported(what);
    }
}

/// What follows a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    Nothing,
    Die,
    /// It was not made at all.
    Skipped,
}

impl After {
    fn carry_out(self) {
        if self == Self::Die {
            system::die();
        }
    }
}

impl State {
    fn judge(&mut self, operation: Operation, paths: &[&[u8]], bytes: u64) -> Verdict {
        rule::judge(&mut self.rules, operation, paths, self.written, bytes)
    }

    /// Makes a call if the rules let it be made.
    fn judged(
        &mut self,
        operation: Operation,
        paths: &[&[u8]],
        bytes: u64,
        make: impl FnOnce() -> c_long,
    ) -> (c_long, After) {
        match self.judge(operation, paths, bytes) {
            Verdict::Go | Verdict::Short(_) => (make(), After::Nothing),
            Verdict::GoAndDie => (make(), After::Die),
            Verdict::Die => system::die(),
            Verdict::Fail(number) => (system::failed(number), After::Nothing),
            Verdict::Skip => (0, After::Skipped),
        }
    }

    fn record(&mut self, event: &Event) {
        let Some(recording) = self.recording else { return };
        self.sequence += 1;
        let mut frame = Vec::with_capacity(64);
        event.encode(self.sequence, &mut frame);
        let before = system::errno();
        if !system::write_all(recording, &frame) {
            system::give_up("the recording can't be written");
        }
        system::failed(before);
    }

    fn unsupported(&mut self, what: &str) {
        self.record(&Event::Unsupported { what: what.as_bytes().to_vec() });
    }
}

fn fitting(descriptor: c_long) -> Option<c_int> {
    c_int::try_from(descriptor).ok().filter(|descriptor| *descriptor >= 0)
}

/// The path without `.`, `..`, doubled and closing slashes. Links are not followed.
fn normal(path: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    let mut whole = Vec::with_capacity(path.len());
    for part in parts {
        whole.push(b'/');
        whole.extend_from_slice(part);
    }
    whole
}
