//! Where the chance of a world's thread comes from.
//!
//! - Two functions of the C library are interposed, `getrandom` and (for those who call the kernel by number) `syscall`.
//!   On a thread that belongs to a world they answer from its seed; on every other thread they do what they always do.
//! - With that, std's hash keys, the `getrandom` and `rand` crates and ring all draw from the seed: nothing in the
//!   gateway or in the SDK has to know that it is in a world.
//! - Only for programs linked against this crate on Linux with glibc. Elsewhere worlds run, but don't repeat.
//!
//! Not here: the chance of the network and of the plan, which is asked for openly (`fulmar_badnet::Rng`).

use std::cell::RefCell;

use fulmar_badnet::Rng;

thread_local! {
    // Without a destructor, so that it can be asked at any moment of a thread's life.
    static SOURCE: RefCell<Option<Rng>> = const { RefCell::new(None) };
}

/// From now on this thread draws from `rng`.
pub(crate) fn seed_this_thread(rng: Rng) {
    let _ = SOURCE.try_with(|source| {
        if let Ok(mut source) = source.try_borrow_mut() {
            *source = Some(rng);
        }
    });
    interposed::keep();
}

/// Fills `bytes` from this thread's seed; `false` when it has none.
fn fill(bytes: &mut [u8]) -> bool {
    let filled = SOURCE.try_with(|source| {
        let Ok(mut source) = source.try_borrow_mut() else { return false };
        let Some(rng) = source.as_mut() else { return false };
        for chunk in bytes.chunks_mut(8) {
            for (byte, drawn) in chunk.iter_mut().zip(rng.next_u64().to_le_bytes()) {
                *byte = drawn;
            }
        }
        true
    });
    filled.unwrap_or(false)
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(unsafe_code, reason = "functions of the C library are replaced, which is C's business")]
mod interposed {
    use std::ffi::{c_long, c_uint, c_void};
    use std::sync::atomic::{AtomicPtr, Ordering};

    /// As the C library's: seven words in registers and on the stack, of which the call uses what it needs.
    type Syscall = unsafe extern "C" fn(c_long, c_long, c_long, c_long, c_long, c_long, c_long) -> c_long;

    static REAL: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

    /// Named by those who seed a thread, so that the linker takes this module in.
    pub(super) fn keep() {
        std::hint::black_box(getrandom as *const c_void);
        std::hint::black_box(syscall as *const c_void);
    }

    /// The bytes at `buffer`, from the seed of this thread, if it has one.
    fn seeded(buffer: *mut u8, len: usize) -> bool {
        if len == 0 || buffer.is_null() {
            return false;
        }
        // SAFETY: the caller of `getrandom` hands over `len` writable bytes; they are only written.
        let bytes = unsafe {
            std::ptr::write_bytes(buffer, 0, len);
            std::slice::from_raw_parts_mut(buffer, len)
        };
        super::fill(bytes)
    }

    /// Random bytes as the C library promises them.
    ///
    /// # Safety
    /// `buffer` holds `len` writable bytes.
    #[unsafe(no_mangle)]
    pub(super) unsafe extern "C" fn getrandom(buffer: *mut c_void, len: usize, flags: c_uint) -> isize {
        if seeded(buffer.cast(), len) {
            return len.cast_signed();
        }
        // SAFETY: the words are those of the call with this number, as the caller gave them.
        let answer = unsafe {
            real(
                libc::SYS_getrandom,
                buffer as c_long,
                len.cast_signed() as c_long,
                c_long::from(flags),
                0,
                0,
                0,
            )
        };
        isize::try_from(answer).unwrap_or(-1)
    }

    /// A call of the kernel by number.
    ///
    /// # Safety
    /// As the call with this number.
    #[unsafe(no_mangle)]
    pub(super) unsafe extern "C" fn syscall(
        number: c_long,
        a: c_long,
        b: c_long,
        c: c_long,
        d: c_long,
        e: c_long,
        f: c_long,
    ) -> c_long {
        if number == libc::SYS_getrandom && seeded(a as *mut u8, usize::try_from(b).unwrap_or(0)) {
            return b;
        }
        // SAFETY: handed on as it came.
        unsafe { real(number, a, b, c, d, e, f) }
    }

    /// The C library's own `syscall`.
    unsafe fn real(
        number: c_long,
        a: c_long,
        b: c_long,
        c: c_long,
        d: c_long,
        e: c_long,
        f: c_long,
    ) -> c_long {
        let mut found = REAL.load(Ordering::Acquire);
        if found.is_null() {
            // SAFETY: the name is a C string; whoever comes first finds the same function as whoever comes second.
            found = unsafe { libc::dlsym(libc::RTLD_NEXT, c"syscall".as_ptr()) };
            if found.is_null() {
                std::process::abort();
            }
            REAL.store(found, Ordering::Release);
        }
        // SAFETY: `syscall` takes a number and up to six words, on every Linux with glibc in this order.
        let call = unsafe { std::mem::transmute::<*mut c_void, Syscall>(found) };
        // SAFETY: the caller's promise.
        unsafe { call(number, a, b, c, d, e, f) }
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
mod interposed {
    pub(super) fn keep() {}
}

#[cfg(test)]
#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod tests {
    use std::hash::{BuildHasher, RandomState};

    use ring::rand::SecureRandom;

    use super::*;

    /// Draws from everybody the gateway and the SDK draw from.
    fn draw() -> Vec<u64> {
        let hash = RandomState::new().hash_one(7u64);
        let mut direct = [0; 8];
        getrandom::fill(&mut direct).unwrap();
        let mut ring = [0; 8];
        ring::rand::SystemRandom::new().fill(&mut ring).unwrap();
        vec![hash, u64::from_le_bytes(direct), u64::from_le_bytes(ring), rand::random()]
    }

    fn on_a_thread(seed: Option<u64>) -> Vec<u64> {
        std::thread::spawn(move || {
            if let Some(seed) = seed {
                seed_this_thread(Rng::new(seed));
            }
            draw()
        })
        .join()
        .unwrap()
    }

    #[test]
    fn everybody_draws_from_the_seed_and_only_inside() {
        assert_eq!(on_a_thread(Some(1)), on_a_thread(Some(1)));
        for (one, two) in [(Some(1), Some(2)), (None, None), (Some(1), None)] {
            let (drawn, other) = (on_a_thread(one), on_a_thread(two));
            for (which, pair) in drawn.iter().zip(&other).enumerate() {
                assert_ne!(pair.0, pair.1, "source {which} of {one:?} and {two:?}");
            }
        }
    }
}
