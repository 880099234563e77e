//! UDP sockets that share one address, a core each, and the system picking the one a packet belongs to.
//!
//! - The first socket takes the address for itself: one that another process has, whoever owns that, is refused as ever.
//! - The others join it (`SO_REUSEPORT`), and a small program in the system (classic BPF, no privileges needed) steers by
//!   connection id ([`super::steering`]). Sockets stand in the order of the cores as long as all of them are open.
//! - Where that can't be had there is one socket, and the reason.
//!
//! - Each has room for as much as comes in some hundred milliseconds, as far as the system allows (`net.core.rmem_max`). With the room it
//!   gives by itself, a few hundred packets, those of phones that come all at once pushed out everybody else's.
//!
//! Not here: what is read from them (`endpoint`).

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    time::{Duration, SystemTime},
};

use socket2::{Domain, Protocol, SockRef, Socket, Type};

/// Bytes of packets that may wait in a socket to be read; the system counts about two for each byte that came.
const RECEIVE_BYTES: usize = 4 * 1024 * 1024;

/// Takes `address` for as many cores. One socket in place of several comes with the reason.
///
/// # Errors
/// The address can't be taken at all.
pub fn bind(address: SocketAddr, cores: u16) -> io::Result<(Vec<UdpSocket>, Option<io::Error>)> {
    let first = UdpSocket::bind(address)?;
    make_room(&first);
    if cores <= 1 {
        return Ok((vec![first], None));
    }
    match share(&first, cores) {
        Ok(others) => Ok((std::iter::once(first).chain(others).collect(), None)),
        Err(error) => {
            // Nobody is to join it.
            SockRef::from(&first).set_reuse_port(false)?;
            Ok((vec![first], Some(error)))
        }
    }
}

fn share(first: &UdpSocket, cores: u16) -> io::Result<Vec<UdpSocket>> {
    let address = first.local_addr()?;
    SockRef::from(first).set_reuse_port(true)?;
    let mut others = Vec::new();
    for _ in 1..cores {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_reuse_port(true)?;
        socket.bind(&address.into())?;
        if others.is_empty() {
            // There is a group now, and it steers before anybody else is in it.
            system::steer(first, cores)?;
        }
        let socket = UdpSocket::from(socket);
        make_room(&socket);
        others.push(socket);
    }
    Ok(others)
}

fn make_room(socket: &UdpSocket) {
    // Less room is no reason not to serve; the system gives what it may.
    let _ = SockRef::from(socket).set_recv_buffer_size(RECEIVE_BYTES);
}

/// How long the packet that was last read from `socket` had waited there and since; `None`: that is not known.
pub fn age(socket: &UdpSocket) -> Option<Duration> {
    let came = system::came(socket)?;
    // A clock that was set back: it has just come.
    Some(SystemTime::now().duration_since(came).unwrap_or_default())
}

#[cfg(target_os = "linux")]
mod system {
    use std::{
        io,
        net::UdpSocket,
        os::fd::AsRawFd as _,
        time::{Duration, SystemTime, UNIX_EPOCH},
    };

    use super::super::steering::{ID_IN_LONG, ID_IN_SHORT, LONG_HEADER};

    /// What [`super::super::steering::core_of_packet`] says, for the system. A load from behind the end answers 0.
    fn program(cores: u16) -> [libc::sock_filter; 7] {
        let step = |code: u32, to_else: u8, k: u32| libc::sock_filter {
            code: u16::try_from(code).unwrap_or(0),
            jt: 0,
            jf: to_else,
            k,
        };
        [
            step(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0),
            step(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 2, LONG_HEADER.into()),
            step(libc::BPF_LD | libc::BPF_H | libc::BPF_ABS, 0, ID_IN_LONG.into()),
            step(libc::BPF_JMP | libc::BPF_JA, 0, 1),
            step(libc::BPF_LD | libc::BPF_H | libc::BPF_ABS, 0, ID_IN_SHORT.into()),
            step(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, 0, cores.max(1).into()),
            step(libc::BPF_RET | BPF_A, 0, 0),
        ]
    }

    /// "The accumulator", which the C library's constants lack.
    const BPF_A: u32 = 0x10;

    /// Steers the packets of every socket that shares `socket`'s address.
    #[expect(unsafe_code, reason = "no safe call sets this option")]
    pub(super) fn steer(socket: &UdpSocket, cores: u16) -> io::Result<()> {
        let mut program = program(cores);
        let told =
            libc::sock_fprog { len: u16::try_from(program.len()).unwrap_or(0), filter: program.as_mut_ptr() };
        let bytes = libc::socklen_t::try_from(size_of_val(&told)).unwrap_or(0);
        // SAFETY: the descriptor is open as long as `socket` is borrowed. The option takes a `sock_fprog`, which is what is
        // given with its size; its pointer and length are those of `program`, which lives until the call returns. The
        // system copies both and writes to neither.
        let answer = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_REUSEPORT_CBPF,
                (&raw const told).cast(),
                bytes,
            )
        };
        if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// `SIOCGSTAMPNS` with seconds of 64 bits on all machines, which the C library's constants lack.
    const LAST_STAMP: u32 = 0x8010_8907;

    /// When the packet that was last read came in. The system begins to note it when it is first asked.
    #[expect(unsafe_code, reason = "no safe call asks for this")]
    pub(super) fn came(socket: &UdpSocket) -> Option<SystemTime> {
        let mut stamp = [0i64; 2];
        // SAFETY: the descriptor is open as long as `socket` is borrowed. The request writes two numbers of 64 bits, seconds and
        // nanoseconds, to the place it is given, which has room for them and lives until the call returns.
        let answer = unsafe { libc::ioctl(socket.as_raw_fd(), LAST_STAMP as _, stamp.as_mut_ptr()) };
        let [seconds, nanos] = stamp;
        let since = Duration::new(u64::try_from(seconds).ok()?, u32::try_from(nanos).ok()?);
        (answer == 0).then_some(since).and_then(|since| UNIX_EPOCH.checked_add(since))
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use std::{io, net::UdpSocket, time::SystemTime};

    pub(super) fn came(_: &UdpSocket) -> Option<SystemTime> {
        None
    }

    pub(super) fn steer(_: &UdpSocket, _: u16) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "this system can't steer packets by connection id"))
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

    #[test]
    fn a_socket_has_the_room_the_system_allows() {
        let room = |socket: &UdpSocket| SockRef::from(socket).recv_buffer_size().unwrap();
        let plain = UdpSocket::bind(LOOPBACK).unwrap();
        let by_itself = room(&plain);
        SockRef::from(&plain).set_recv_buffer_size(RECEIVE_BYTES).unwrap();
        if room(&plain) <= by_itself {
            // This system gives as much unasked: nothing can be seen.
            return;
        }
        for cores in [1, 3] {
            let (sockets, _) = bind(LOOPBACK, cores).unwrap();
            assert!(sockets.iter().all(|socket| room(socket) == room(&plain)));
        }
    }

    #[test]
    fn an_address_is_taken_once_however_many_cores_share_it() {
        for (ours, theirs) in [(1, 1), (1, 3), (3, 1), (3, 3)] {
            let (sockets, why) = bind(LOOPBACK, ours).unwrap();
            assert!(why.is_none() || cfg!(not(target_os = "linux")), "{why:?}");
            let address = sockets[0].local_addr().unwrap();
            assert!(sockets.iter().all(|socket| socket.local_addr().unwrap() == address));
            let error = bind(address, theirs).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{ours} cores, then {theirs}");
            drop(sockets);
            bind(address, theirs).unwrap();
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_system_steers_as_the_rule_says() {
        use super::super::steering::PACKETS_OF_FIVE_CORES;

        for loopback in [LOOPBACK, SocketAddr::from(([0; 16], 0))] {
            let (sockets, why) = bind(loopback, 5).unwrap();
            assert!(why.is_none(), "{why:?}");
            assert_eq!(sockets.len(), 5);
            let port = sockets[0].local_addr().unwrap().port();
            let to = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            for socket in &sockets {
                socket.set_nonblocking(true).unwrap();
            }
            // From several ports: nothing else decides.
            for _ in 0..4 {
                let phone = UdpSocket::bind(LOOPBACK).unwrap();
                for (what, payload, core) in PACKETS_OF_FIVE_CORES {
                    phone.send_to(payload, to).unwrap();
                    // On loopback it is there when the call returns.
                    let got: Vec<usize> = (0..5)
                        .filter(|at| {
                            sockets[*at].recv(&mut [0; 64]).is_ok_and(|bytes| bytes == payload.len())
                        })
                        .collect();
                    assert_eq!(got, [usize::from(*core)], "{what}");
                }
            }
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    #[expect(clippy::disallowed_methods, reason = "packets get older in real time only")]
    fn the_system_says_how_old_a_packet_is() {
        let (sockets, _) = bind(LOOPBACK, 1).unwrap();
        let socket = &sockets[0];
        assert_eq!(age(socket), None, "nothing was read yet");
        // The system begins to note it a moment after it is asked for the first time.
        std::thread::sleep(Duration::from_millis(200));
        let phone = UdpSocket::bind(LOOPBACK).unwrap();
        for lies in [300, 20].map(Duration::from_millis) {
            let before = std::time::Instant::now();
            phone.send_to(b"hi", socket.local_addr().unwrap()).unwrap();
            std::thread::sleep(lies);
            socket.recv(&mut [0; 8]).unwrap();
            let age = age(socket).unwrap();
            // A clock that is being set right goes a little faster or slower.
            let most = before.elapsed() + Duration::from_millis(10);
            assert!(age >= lies.mul_f64(0.9) && age <= most, "{lies:?}: {age:?} of {most:?}");
        }
    }
}
