//! TCP through the proxy: whole, in order, late as the path says, and alone where UDP is blocked.

#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use fulmar_badnet::fault::{Fault, Target};
use fulmar_badnet::net::{Delay, Impairment, Loss, Rate};
use fulmar_badnet::proxy::{Admits, Config, Proxy};
use fulmar_badnet::{Path, Share};

const PATIENCE: Duration = Duration::from_secs(30);

/// A gateway that answers every byte with itself, by UDP and TCP on one port.
struct Echo {
    udp: UdpSocket,
    tcp: TcpListener,
}

impl Echo {
    fn new() -> Self {
        loop {
            let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
            if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()) {
                return Self { udp, tcp };
            }
        }
    }

    fn proxy(&self, direction: Impairment) -> Proxy {
        let config = Config::towards(self.udp.local_addr().unwrap()).seed(7).tcp(true);
        Proxy::start(config.path(Path::symmetric(direction))).unwrap()
    }

    /// Answers one connection until it ends.
    fn serve(&self) -> std::thread::JoinHandle<()> {
        let tcp = self.tcp.try_clone().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = tcp.accept().unwrap();
            let mut answers = stream.try_clone().unwrap();
            let _ = std::io::copy(&mut stream, &mut answers);
            let _ = answers.shutdown(std::net::Shutdown::Write);
        })
    }
}

fn connect(proxy: &Proxy) -> TcpStream {
    let stream = TcpStream::connect(proxy.addr()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

#[test]
fn bytes_come_whole_and_in_order_through_loss_and_a_bottleneck() {
    let echo = Echo::new();
    let proxy = echo.proxy(Impairment {
        delay: Delay::fixed(Duration::from_millis(10)).with_jitter(Duration::from_millis(5)),
        loss: Loss::random(Share::percent(5)),
        rate: Some(Rate::kbit(20_000, 16_000)),
        ..Impairment::default()
    });
    let serving = echo.serve();
    let sent: Vec<u8> = (0..=250u8).cycle().take(120_000).collect();
    let mut stream = connect(&proxy);
    let mut writer = stream.try_clone().unwrap();
    let bytes = sent.clone();
    let writing = std::thread::spawn(move || {
        writer.write_all(&bytes).unwrap();
        writer.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
    writing.join().unwrap();
    serving.join().unwrap();
    let tcp = proxy.stop().tcp;
    assert_eq!(tcp.connections, 1);
    assert!(tcp.up.segments >= 100 && tcp.up.bytes > 120_000, "{tcp:?}");
    assert!(tcp.up.repeated + tcp.down.repeated > 0, "{tcp:?}");
}

#[test]
fn connecting_and_asking_cost_two_round_trips() {
    let echo = Echo::new();
    let proxy =
        echo.proxy(Impairment { delay: Delay::fixed(Duration::from_millis(60)), ..Impairment::default() });
    let serving = echo.serve();
    let started = Instant::now();
    let mut stream = connect(&proxy);
    stream.write_all(b"x").unwrap();
    stream.read_exact(&mut [0]).unwrap();
    // Never sooner than the path allows; how much later is the machine's affair.
    assert!(started.elapsed() >= Duration::from_millis(240), "{:?}", started.elapsed());
    drop(stream);
    serving.join().unwrap();
}

#[test]
fn where_udp_is_blocked_tcp_passes_and_in_the_dark_nothing() {
    let echo = Echo::new();
    let proxy = echo.proxy(Impairment::default());
    let serving = echo.serve();
    proxy.admit(Admits::TCP_ONLY).unwrap();
    let mut stream = connect(&proxy);
    stream.write_all(b"a").unwrap();
    let mut byte = [0];
    stream.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"a");

    let phone = UdpSocket::bind("127.0.0.1:0").unwrap();
    let until = Instant::now() + PATIENCE;
    while proxy.totals().up.dark < 3 {
        assert!(Instant::now() < until, "{:?}", proxy.totals());
        phone.send_to(b"anybody?", proxy.addr()).unwrap();
        std::thread::yield_now();
    }
    assert_eq!(proxy.totals().up.delivered, 0);

    proxy.admit(Admits::NONE).unwrap();
    let repeated = proxy.totals().tcp.up.repeated;
    // What was sent before the dark fell may still come, so it is asked until a segment met the dark.
    while proxy.totals().tcp.up.repeated == repeated {
        assert!(Instant::now() < until, "{:?}", proxy.totals());
        stream.write_all(b"b").unwrap();
        std::thread::yield_now();
    }
    proxy.admit(Admits::ALL).unwrap();
    stream.write_all(b"c").unwrap();
    while byte != *b"c" {
        stream.read_exact(&mut byte).unwrap();
    }
    drop(stream);
    serving.join().unwrap();
}

#[test]
fn a_new_address_leaves_the_old_connection_in_silence() {
    let echo = Echo::new();
    let proxy = echo.proxy(Impairment::default());
    let serving = echo.serve();
    let mut stream = connect(&proxy);
    stream.write_all(b"a").unwrap();
    stream.read_exact(&mut [0]).unwrap();
    proxy.apply(Target::All, Fault::Rebind).unwrap();
    // The fault is carried out by another thread: asked until the answers stay away.
    stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let until = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < until, "the old connection still answers");
        stream.write_all(b"b").unwrap();
        if stream.read_exact(&mut [0]).is_err() {
            break;
        }
    }
    drop(stream);
    let other = echo.serve();
    let mut stream = connect(&proxy);
    stream.write_all(b"c").unwrap();
    stream.read_exact(&mut [0]).unwrap();
    drop(stream);
    let _ = serving.join();
    other.join().unwrap();
}
