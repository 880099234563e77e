//! The functions that stand in for the C library's.
//!
//! Each of them looks whether the file is below the root; if not, it makes the system call and nothing else. `open` and `fcntl`
//! have a variable number of arguments in C. On the systems this is built for, an argument that was not passed is some value
//! in a register: it is passed on, and the kernel does not look at it. The contracts are those of the C library's functions of
//! the same names.

use libc::{c_char, c_int, c_long, c_uint, c_void, iovec, mode_t, off_t, size_t, ssize_t};

use crate::{
    disk::{Place, disk, disk_of},
    recording::{Event, SyncKind},
    rule::Operation,
    system::{call, path},
};

const HERE: c_int = libc::AT_FDCWD;

fn int(result: c_long) -> c_int {
    c_int::try_from(result).unwrap_or(-1)
}

fn offset(at: off_t) -> u64 {
    u64::try_from(at).unwrap_or(0)
}

// ---- descriptors

unsafe fn open_at(folder: c_int, name: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    let make = || call!(SYS_openat, folder, name, flags, mode);
    let Some(disk) = disk() else { return int(make()) };
    // SAFETY: the caller's promise, as in all functions here.
    int(match disk.place(folder, unsafe { path(name) }) {
        Place::Elsewhere => make(),
        place => disk.open(&place, flags, make),
    })
}

/// Stands in for a function that opens a file.
macro_rules! opens {
    ($($name:ident ( $($argument:ident : $type:ty),* ) => $folder:expr, $path:expr, $flags:expr, $mode:expr;)*) => {$(
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name($($argument: $type),*) -> c_int {
            // SAFETY: the caller keeps the contract of the function we stand in for.
            unsafe { open_at($folder, $path, $flags, $mode) }
        }
    )*};
}

opens! {
    open(name: *const c_char, flags: c_int, mode: mode_t) => HERE, name, flags, mode;
    open64(name: *const c_char, flags: c_int, mode: mode_t) => HERE, name, flags, mode;
    openat(folder: c_int, name: *const c_char, flags: c_int, mode: mode_t) => folder, name, flags, mode;
    openat64(folder: c_int, name: *const c_char, flags: c_int, mode: mode_t) => folder, name, flags, mode;
    creat(name: *const c_char, mode: mode_t) => HERE, name, libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC, mode;
    creat64(name: *const c_char, mode: mode_t) => HERE, name, libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC, mode;
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn close(descriptor: c_int) -> c_int {
    if let Some(disk) = disk_of(descriptor) {
        disk.forget(descriptor);
    }
    int(call!(SYS_close, descriptor))
}

/// The folder stream closes its descriptor by itself, unseen.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn fdopendir(descriptor: c_int) -> *mut libc::DIR {
    if let Some(disk) = disk_of(descriptor) {
        disk.forget(descriptor);
    }
    // SAFETY: `RTLD_NEXT` finds the C library's own function, whose type this is; the argument is the caller's.
    unsafe {
        let next = libc::dlsym(libc::RTLD_NEXT, c"fdopendir".as_ptr());
        if next.is_null() {
            return std::ptr::null_mut();
        }
        let next: unsafe extern "C" fn(c_int) -> *mut libc::DIR = std::mem::transmute(next);
        next(descriptor)
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn dup(descriptor: c_int) -> c_int {
    let copy = call!(SYS_dup, descriptor);
    if let Some(disk) = disk_of(descriptor) {
        disk.copied(descriptor, copy);
    }
    int(copy)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn dup2(descriptor: c_int, wanted: c_int) -> c_int {
    if descriptor == wanted {
        let is_open = call!(SYS_fcntl, descriptor, libc::F_GETFD) >= 0;
        return if is_open { descriptor } else { -1 };
    }
    // SAFETY: the same contract, but for equal descriptors.
    unsafe { dup3(descriptor, wanted, 0) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn dup3(descriptor: c_int, wanted: c_int, flags: c_int) -> c_int {
    if let Some(disk) = disk_of(wanted) {
        disk.forget(wanted);
    }
    let copy = call!(SYS_dup3, descriptor, wanted, flags);
    if let Some(disk) = disk_of(descriptor) {
        disk.copied(descriptor, copy);
    }
    int(copy)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn fcntl(descriptor: c_int, command: c_int, argument: usize) -> c_int {
    let result = call!(SYS_fcntl, descriptor, command, argument);
    if matches!(command, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC)
        && let Some(disk) = disk_of(descriptor)
    {
        disk.copied(descriptor, result);
    }
    int(result)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn fcntl64(descriptor: c_int, command: c_int, argument: usize) -> c_int {
    // SAFETY: the same contract.
    unsafe { fcntl(descriptor, command, argument) }
}

// ---- writing

/// # Safety
/// `data` points to `length` readable bytes.
unsafe fn bytes<'a>(data: *const c_void, length: size_t) -> &'a [u8] {
    if data.is_null() || length == 0 {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(data.cast(), length) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn write(descriptor: c_int, data: *const c_void, length: size_t) -> ssize_t {
    let make = |length: usize| call!(SYS_write, descriptor, data, length);
    let result = match disk_of(descriptor) {
        // SAFETY: the contract of write.
        Some(disk) => disk.write(descriptor, None, unsafe { bytes(data, length) }, make),
        None => make(length),
    };
    ssize_t::try_from(result).unwrap_or(-1)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pwrite(
    descriptor: c_int,
    data: *const c_void,
    length: size_t,
    at: off_t,
) -> ssize_t {
    let make = |length: usize| call!(SYS_pwrite64, descriptor, data, length, at);
    let result = match disk_of(descriptor) {
        // SAFETY: the contract of pwrite.
        Some(disk) => disk.write(descriptor, Some(offset(at)), unsafe { bytes(data, length) }, make),
        None => make(length),
    };
    ssize_t::try_from(result).unwrap_or(-1)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pwrite64(
    descriptor: c_int,
    data: *const c_void,
    length: size_t,
    at: off_t,
) -> ssize_t {
    // SAFETY: the same contract.
    unsafe { pwrite(descriptor, data, length, at) }
}

/// The bytes of several buffers, one after the other.
///
/// # Safety
/// `buffers` points to `count` buffers of readable bytes.
unsafe fn gathered(buffers: *const iovec, count: c_int) -> Vec<u8> {
    let mut all = Vec::new();
    for n in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: the caller's promise.
        let buffer = unsafe { &*buffers.add(n) };
        // SAFETY: likewise.
        all.extend_from_slice(unsafe { bytes(buffer.iov_base, buffer.iov_len) });
    }
    all
}

/// Writes gathered bytes as one write; a null position means the descriptor's own.
unsafe fn write_gathered(
    descriptor: c_int,
    buffers: *const iovec,
    count: c_int,
    at: Option<off_t>,
    make: impl FnOnce() -> c_long,
) -> ssize_t {
    let result = match disk_of(descriptor) {
        None => make(),
        Some(disk) => {
            // SAFETY: the contract of writev.
            let all = unsafe { gathered(buffers, count) };
            disk.write(descriptor, at.map(offset), &all, |length| match at {
                Some(at) => call!(SYS_pwrite64, descriptor, all.as_ptr(), length, at),
                None => call!(SYS_write, descriptor, all.as_ptr(), length),
            })
        }
    };
    ssize_t::try_from(result).unwrap_or(-1)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn writev(descriptor: c_int, buffers: *const iovec, count: c_int) -> ssize_t {
    let make = || call!(SYS_writev, descriptor, buffers, count);
    // SAFETY: the contract of writev.
    unsafe { write_gathered(descriptor, buffers, count, None, make) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pwritev(
    descriptor: c_int,
    buffers: *const iovec,
    count: c_int,
    at: off_t,
) -> ssize_t {
    let make = || call!(SYS_pwritev, descriptor, buffers, count, at, at >> 32);
    // SAFETY: the contract of pwritev.
    unsafe { write_gathered(descriptor, buffers, count, Some(at), make) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pwritev64(
    descriptor: c_int,
    buffers: *const iovec,
    count: c_int,
    at: off_t,
) -> ssize_t {
    // SAFETY: the same contract.
    unsafe { pwritev(descriptor, buffers, count, at) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pwritev2(
    descriptor: c_int,
    buffers: *const iovec,
    count: c_int,
    at: off_t,
    flags: c_int,
) -> ssize_t {
    let make = || call!(SYS_pwritev2, descriptor, buffers, count, at, at >> 32, flags);
    if flags != 0
        && let Some(disk) = disk_of(descriptor)
    {
        disk.unsupported("pwritev2 with flags");
    }
    let place = if at == -1 { None } else { Some(at) };
    // SAFETY: the contract of pwritev2.
    unsafe { write_gathered(descriptor, buffers, count, place, make) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pwritev64v2(
    descriptor: c_int,
    buffers: *const iovec,
    count: c_int,
    at: off_t,
    flags: c_int,
) -> ssize_t {
    // SAFETY: the same contract.
    unsafe { pwritev2(descriptor, buffers, count, at, flags) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn copy_file_range(
    from: c_int,
    from_at: *mut off_t,
    to: c_int,
    to_at: *mut off_t,
    length: size_t,
    flags: c_uint,
) -> ssize_t {
    let make = || call!(SYS_copy_file_range, from, from_at, to, to_at, length, flags);
    let result = match disk_of(to) {
        None => make(),
        Some(disk) => disk.write_unseen(to, || {
            // SAFETY: null, or the address of an offset, by the contract of copy_file_range.
            let at = unsafe { to_at.as_ref() }.map(|at| offset(*at));
            (make(), at)
        }),
    };
    ssize_t::try_from(result).unwrap_or(-1)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn sendfile(
    to: c_int,
    from: c_int,
    from_at: *mut off_t,
    length: size_t,
) -> ssize_t {
    let make = || call!(SYS_sendfile, to, from, from_at, length);
    let result = match disk_of(to) {
        None => make(),
        Some(disk) => disk.write_unseen(to, || (make(), None)),
    };
    ssize_t::try_from(result).unwrap_or(-1)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn sendfile64(
    to: c_int,
    from: c_int,
    from_at: *mut off_t,
    length: size_t,
) -> ssize_t {
    // SAFETY: the same contract.
    unsafe { sendfile(to, from, from_at, length) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn splice(
    from: c_int,
    from_at: *mut off_t,
    to: c_int,
    to_at: *mut off_t,
    length: size_t,
    flags: c_uint,
) -> ssize_t {
    if let Some(disk) = disk_of(to) {
        disk.unsupported("splice");
    }
    ssize_t::try_from(call!(SYS_splice, from, from_at, to, to_at, length, flags)).unwrap_or(-1)
}

// ---- lengths

fn length_now(descriptor: c_int) -> Option<u64> {
    let mut status = std::mem::MaybeUninit::<libc::stat>::uninit();
    if call!(SYS_fstat, descriptor, status.as_mut_ptr()) != 0 {
        return None;
    }
    // SAFETY: the call succeeded, so the kernel has filled it.
    u64::try_from(unsafe { status.assume_init() }.st_size).ok()
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ftruncate(descriptor: c_int, length: off_t) -> c_int {
    let make = || call!(SYS_ftruncate, descriptor, length);
    int(match disk_of(descriptor) {
        Some(disk) => disk.set_length(descriptor, make, || u64::try_from(length).ok()),
        None => make(),
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ftruncate64(descriptor: c_int, length: off_t) -> c_int {
    // SAFETY: the same contract.
    unsafe { ftruncate(descriptor, length) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn truncate(name: *const c_char, length: off_t) -> c_int {
    let make = || call!(SYS_truncate, name, length);
    let Some(disk) = disk() else { return int(make()) };
    // SAFETY: the contract of truncate.
    if disk.place(HERE, unsafe { path(name) }) == Place::Elsewhere {
        return int(make());
    }
    // As its parts, so that the file has a handle.
    // SAFETY: the contracts of the parts, with the same name.
    unsafe {
        let descriptor = open_at(HERE, name, libc::O_WRONLY | libc::O_CLOEXEC, 0);
        if descriptor < 0 {
            return -1;
        }
        let result = ftruncate(descriptor, length);
        close(descriptor);
        result
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn truncate64(name: *const c_char, length: off_t) -> c_int {
    // SAFETY: the same contract.
    unsafe { truncate(name, length) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn fallocate(
    descriptor: c_int,
    mode: c_int,
    from: off_t,
    length: off_t,
) -> c_int {
    let make = || call!(SYS_fallocate, descriptor, mode, from, length);
    let Some(disk) = disk_of(descriptor) else { return int(make()) };
    if mode & !libc::FALLOC_FL_KEEP_SIZE != 0 {
        // Holes and moved ranges: nobody who is recorded makes any.
        disk.unsupported("fallocate with a mode that changes bytes");
    }
    let before = length_now(descriptor);
    int(disk.set_length(descriptor, make, || length_now(descriptor).filter(|now| Some(*now) != before)))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn fallocate64(
    descriptor: c_int,
    mode: c_int,
    from: off_t,
    length: off_t,
) -> c_int {
    // SAFETY: the same contract.
    unsafe { fallocate(descriptor, mode, from, length) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn posix_fallocate(descriptor: c_int, from: off_t, length: off_t) -> c_int {
    // SAFETY: the contract of fallocate is wider.
    if unsafe { fallocate(descriptor, 0, from, length) } == 0 { 0 } else { crate::system::errno() }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn posix_fallocate64(descriptor: c_int, from: off_t, length: off_t) -> c_int {
    // SAFETY: the same contract.
    unsafe { posix_fallocate(descriptor, from, length) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mmap(
    address: *mut c_void,
    length: size_t,
    protection: c_int,
    flags: c_int,
    descriptor: c_int,
    at: off_t,
) -> *mut c_void {
    if flags & (libc::MAP_SHARED | libc::MAP_SHARED_VALIDATE) != 0
        && flags & libc::MAP_PRIVATE == 0
        && protection & libc::PROT_WRITE != 0
        && let Some(disk) = disk_of(descriptor)
    {
        disk.unsupported("a shared writable mapping");
    }
    let mapped = call!(SYS_mmap, address, length, protection, flags, descriptor, at);
    // An address, or -1: the C library's `MAP_FAILED` is the same number.
    std::ptr::with_exposed_provenance_mut(usize::from_ne_bytes(mapped.to_ne_bytes()))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mmap64(
    address: *mut c_void,
    length: size_t,
    protection: c_int,
    flags: c_int,
    descriptor: c_int,
    at: off_t,
) -> *mut c_void {
    // SAFETY: the same contract.
    unsafe { mmap(address, length, protection, flags, descriptor, at) }
}

// ---- names

/// Changes two names.
unsafe fn two_names(
    operation: Operation,
    from: (c_int, *const c_char),
    to: (c_int, *const c_char),
    make: impl FnOnce() -> c_long,
    event: impl FnOnce(Vec<u8>, Vec<u8>) -> Event,
) -> c_int {
    let Some(disk) = disk() else { return int(make()) };
    // SAFETY: the caller's promise.
    let places = unsafe { (disk.place(from.0, path(from.1)), disk.place(to.0, path(to.1))) };
    match places {
        (Place::Below(from), Place::Below(to)) => {
            int(disk.name(operation, &[&from, &to], make, || event(from.clone(), to.clone())))
        }
        (Place::Elsewhere | Place::Marks, Place::Elsewhere | Place::Marks) => int(make()),
        _ => {
            disk.unsupported("a name that goes into the root or out of it");
            int(make())
        }
    }
}

/// Changes one name.
unsafe fn one_name(
    operation: Operation,
    folder: c_int,
    name: *const c_char,
    make: impl FnOnce() -> c_long,
    event: impl FnOnce(Vec<u8>) -> Event,
) -> c_int {
    let Some(disk) = disk() else { return int(make()) };
    // SAFETY: the caller's promise.
    match disk.place(folder, unsafe { path(name) }) {
        Place::Below(path) => int(disk.name(operation, &[&path], make, || event(path.clone()))),
        Place::Elsewhere | Place::Marks => int(make()),
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn renameat2(
    from_folder: c_int,
    from: *const c_char,
    to_folder: c_int,
    to: *const c_char,
    flags: c_uint,
) -> c_int {
    let make = || call!(SYS_renameat2, from_folder, from, to_folder, to, flags);
    if flags & libc::RENAME_EXCHANGE != 0
        && let Some(disk) = disk()
    {
        disk.unsupported("two names exchanged");
    }
    // SAFETY: the contract of renameat2.
    unsafe {
        two_names(Operation::Rename, (from_folder, from), (to_folder, to), make, |from, to| Event::Rename {
            from,
            to,
        })
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn renameat(
    from_folder: c_int,
    from: *const c_char,
    to_folder: c_int,
    to: *const c_char,
) -> c_int {
    // SAFETY: the same contract.
    unsafe { renameat2(from_folder, from, to_folder, to, 0) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn rename(from: *const c_char, to: *const c_char) -> c_int {
    // SAFETY: the same contract.
    unsafe { renameat2(HERE, from, HERE, to, 0) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn linkat(
    from_folder: c_int,
    from: *const c_char,
    to_folder: c_int,
    to: *const c_char,
    flags: c_int,
) -> c_int {
    let make = || call!(SYS_linkat, from_folder, from, to_folder, to, flags);
    // SAFETY: the contract of linkat.
    unsafe {
        two_names(Operation::Link, (from_folder, from), (to_folder, to), make, |from, to| Event::Link {
            from,
            to,
        })
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn link(from: *const c_char, to: *const c_char) -> c_int {
    // SAFETY: the same contract.
    unsafe { linkat(HERE, from, HERE, to, 0) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn symlinkat(
    target: *const c_char,
    folder: c_int,
    name: *const c_char,
) -> c_int {
    if let Some(disk) = disk()
        // SAFETY: the contract of symlinkat.
        && matches!(disk.place(folder, unsafe { path(name) }), Place::Below(_))
    {
        disk.unsupported("a symbolic link");
    }
    int(call!(SYS_symlinkat, target, folder, name))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn symlink(target: *const c_char, name: *const c_char) -> c_int {
    // SAFETY: the same contract.
    unsafe { symlinkat(target, HERE, name) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn unlinkat(folder: c_int, name: *const c_char, flags: c_int) -> c_int {
    let make = || call!(SYS_unlinkat, folder, name, flags);
    // SAFETY: the contract of unlinkat.
    unsafe {
        one_name(Operation::Unlink, folder, name, make, |path| {
            if flags & libc::AT_REMOVEDIR != 0 { Event::Rmdir { path } } else { Event::Unlink { path } }
        })
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn unlink(name: *const c_char) -> c_int {
    // SAFETY: the same contract.
    unsafe { unlinkat(HERE, name, 0) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn rmdir(name: *const c_char) -> c_int {
    // SAFETY: the same contract.
    unsafe { unlinkat(HERE, name, libc::AT_REMOVEDIR) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mkdirat(folder: c_int, name: *const c_char, mode: mode_t) -> c_int {
    let make = || call!(SYS_mkdirat, folder, name, mode);
    // SAFETY: the contract of mkdirat.
    unsafe { one_name(Operation::Mkdir, folder, name, make, |path| Event::Mkdir { path }) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mkdir(name: *const c_char, mode: mode_t) -> c_int {
    // SAFETY: the same contract.
    unsafe { mkdirat(HERE, name, mode) }
}

// ---- syncs

fn sync_of(descriptor: c_int, kind: SyncKind, make: impl FnOnce() -> c_long) -> c_int {
    int(match disk_of(descriptor) {
        Some(disk) => disk.sync(descriptor, kind, make),
        None => make(),
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn fsync(descriptor: c_int) -> c_int {
    sync_of(descriptor, SyncKind::Full, || call!(SYS_fsync, descriptor))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn fdatasync(descriptor: c_int) -> c_int {
    sync_of(descriptor, SyncKind::Data, || call!(SYS_fdatasync, descriptor))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn sync_file_range(
    descriptor: c_int,
    from: off_t,
    length: off_t,
    flags: c_uint,
) -> c_int {
    sync_of(descriptor, SyncKind::Range, || call!(SYS_sync_file_range, descriptor, from, length, flags))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn syncfs(descriptor: c_int) -> c_int {
    sync_of(descriptor, SyncKind::All, || call!(SYS_syncfs, descriptor))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn sync() {
    let make = || {
        call!(SYS_sync);
        0
    };
    match disk() {
        Some(disk) => {
            disk.sync(-1, SyncKind::All, make);
        }
        None => {
            make();
        }
    }
}
