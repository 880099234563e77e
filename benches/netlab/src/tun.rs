//! A TUN device: a network interface whose packets are read and written by this process.
//!
//! - It lives as long as its descriptor: nothing is left of it when the process ends, however it ends.
//! - It may be moved into another namespace; the descriptor stays with it.
//!
//! Not here: what is done to the packets (`link`), addresses and namespaces (`namespace`).

use std::os::fd::OwnedFd;

use anyhow::Context as _;
use rustix::{
    fs::{Mode, OFlags},
    ioctl::{Opcode, Updater, opcode},
};

/// Where the kernel hands out such devices.
pub(crate) const DEVICE: &str = "/dev/net/tun";

/// Longest name of an interface, its final zero included.
const NAME_BYTES: usize = 16;

/// `TUNSETIFF`: make this descriptor an interface. The kernel names `int` as its type, and takes an `ifreq`.
const SET_INTERFACE: Opcode = opcode::write::<i32>(b'T', 202);
/// IP packets without the Ethernet part, and nothing before them.
const TUN_WITHOUT_HEADER: i16 = 0x0001 | 0x1000;

/// `struct ifreq` as far as this call looks at it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; NAME_BYTES],
    flags: i16,
    /// The rest of the kernel's union.
    rest: [u8; 22],
}

/// Makes the interface `name`, down and without an address, in this thread's network namespace. Reads and writes do
/// not block, one packet each.
///
/// # Errors
/// No device, no permission, or the name is taken.
pub(crate) fn open(name: &str) -> anyhow::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let device = rustix::fs::open(DEVICE, flags, Mode::empty())
        .with_context(|| format!("{DEVICE} can't be opened: is the tun module loaded (`modprobe tun`)?"))?;
    let mut request = InterfaceRequest { name: [0; NAME_BYTES], flags: TUN_WITHOUT_HEADER, rest: [0; 22] };
    anyhow::ensure!(name.len() < NAME_BYTES, "{name} is too long for an interface");
    for (byte, of_name) in request.name.iter_mut().zip(name.bytes()) {
        *byte = of_name;
    }
    set_interface(&device, &mut request).with_context(|| {
        format!("the interface {name} can't be made: it takes CAP_NET_ADMIN in its namespace")
    })?;
    Ok(device)
}

#[expect(unsafe_code, reason = "there is no safe call that makes a TUN interface")]
fn set_interface(device: &OwnedFd, request: &mut InterfaceRequest) -> rustix::io::Result<()> {
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which is 40 bytes on every 64-bit Linux and no more
    // anywhere; `InterfaceRequest` has that size and its layout, and outlives the call.
    unsafe {
        let update = Updater::<SET_INTERFACE, InterfaceRequest>::new(request);
        rustix::ioctl::ioctl(device, update)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_is_laid_out_as_the_kernel_reads_it() {
        assert_eq!(size_of::<InterfaceRequest>(), 40);
        assert_eq!(std::mem::offset_of!(InterfaceRequest, flags), NAME_BYTES);
        assert_eq!(SET_INTERFACE, 0x4004_54ca);
    }

    #[test]
    fn a_long_name_is_refused_before_the_kernel_sees_it() {
        // Where the device may not be opened, that is the error.
        assert!(open("an-interface-with-a-long-name").is_err());
    }
}
