//! System calls, made directly: the C library's functions of these names are what this library stands in for.

use std::{ffi::CStr, time::Duration};

use libc::{c_char, c_int, c_long};

/// A system call with the C library's convention: -1 and `errno` on failure.
macro_rules! call {
    ($number:ident $(, $argument:expr)*) => {
        // SAFETY: the arguments are passed on as the caller of the function we stand in for gave them, or point to
        // memory that this library owns for the time of the call; the kernel checks everything else.
        unsafe { libc::syscall(libc::$number $(, $argument)*) }
    };
}
pub(crate) use call;

/// Sets `errno` and gives -1, as a failed call does.
pub(crate) fn failed(number: c_int) -> c_long {
    // SAFETY: the C library gives each thread a valid address for its errno.
    unsafe { *libc::__errno_location() = number };
    -1
}

/// `errno` of this thread, to be put back after calls of our own.
pub(crate) fn errno() -> c_int {
    // SAFETY: as in `failed`.
    unsafe { *libc::__errno_location() }
}

/// Whether there is a file of this name.
pub(crate) fn exists(path: &[u8]) -> bool {
    let mut name = path.to_vec();
    name.push(0);
    let before = errno();
    let found = call!(SYS_faccessat, libc::AT_FDCWD, name.as_ptr(), libc::F_OK) == 0;
    failed(before);
    found
}

/// Writes everything; `false` if that failed.
pub(crate) fn write_all(descriptor: c_int, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        let written = call!(SYS_write, descriptor, bytes.as_ptr(), bytes.len());
        match usize::try_from(written) {
            Ok(written) if written > 0 => bytes = bytes.get(written..).unwrap_or_default(),
            _ if written < 0 && errno() == libc::EINTR => {}
            _ => return false,
        }
    }
    true
}

/// Says why on standard error and ends the process: nothing may be tested with settings other than those asked for.
pub(crate) fn give_up(why: &str) -> ! {
    write_all(2, format!("fulmar-faultdisk: {why}\n").as_bytes());
    loop {
        call!(SYS_exit_group, 112);
    }
}

/// Ends the process as `kill -9` does.
pub(crate) fn die() -> ! {
    loop {
        let process = call!(SYS_getpid);
        call!(SYS_kill, process, libc::SIGKILL);
    }
}

/// Waits.
pub(crate) fn sleep(time: Duration) {
    if time.is_zero() {
        return;
    }
    let mut left = libc::timespec {
        tv_sec: libc::time_t::try_from(time.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: c_long::from(time.subsec_nanos()),
    };
    let rest = std::ptr::from_mut(&mut left);
    let before = errno();
    while call!(SYS_nanosleep, rest, rest) != 0 && errno() == libc::EINTR {}
    failed(before);
}

/// Where a relative path given to a call begins; empty if it can't be told.
pub(crate) fn folder_of(descriptor: c_int) -> Vec<u8> {
    let name = if descriptor == libc::AT_FDCWD {
        "/proc/self/cwd\0".to_owned()
    } else {
        format!("/proc/self/fd/{descriptor}\0")
    };
    let mut target = vec![0u8; 4096];
    let before = errno();
    let length = call!(SYS_readlinkat, libc::AT_FDCWD, name.as_ptr(), target.as_mut_ptr(), target.len());
    failed(before);
    target.truncate(usize::try_from(length).unwrap_or(0));
    target
}

/// The bytes of a path that a caller gave; empty for a null pointer.
///
/// # Safety
/// `path` is null or a C string.
pub(crate) unsafe fn path<'a>(path: *const c_char) -> &'a [u8] {
    if path.is_null() {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(path) }.to_bytes()
}
