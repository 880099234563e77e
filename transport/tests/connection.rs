//! Connections as gateway and SDK use them: over a byte stream in memory, over TLS, over a WebSocket, over QUIC.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use fulmar_transport::{
    ApplicationClose, Connection, ConnectionError, Kind, ReadError, RecvStream, SendDatagramError, Setup,
    WriteError,
    qmux::{Config, Parameters, Side},
    secure, tcp,
    websocket::Names,
};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    net::{TcpListener, TcpStream},
};

const ALPN: &[u8] = b"test/1";
const NAMES: Names = Names { path: "/test", protocol: "test.1" };
const NOWHERE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 1);

fn setup(side: Side) -> Setup {
    Setup { side, remote: NOWHERE, config: Config::default(), initial_rtt: Duration::from_millis(100) }
}

fn on_tokio(task: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>) {
    tokio::spawn(task);
}

fn over(stream: DuplexStream, side: Side) -> Connection {
    Connection::over(stream, Kind::Tls, setup(side), on_tokio)
}

fn pair(buffer: usize) -> (Connection, Connection) {
    let (one, two) = duplex(buffer);
    (over(one, Side::Client), over(two, Side::Server))
}

async fn all_of(mut stream: RecvStream) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(bytes) = stream.read_chunk(usize::MAX).await.unwrap() {
        all.extend_from_slice(&bytes);
    }
    all
}

struct Certificates {
    server: Arc<rustls::ServerConfig>,
    client: rustls::ClientConfig,
}

fn certificates() -> Certificates {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let certificate: CertificateDer<'static> = made.cert.der().clone();
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], key.into())
        .unwrap();
    server.alpn_protocols = vec![ALPN.to_vec(), secure::ALPN_HTTP.to_vec()];
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate).unwrap();
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    Certificates { server: Arc::new(server), client }
}

/// Everybody's turn is now.
async fn at_once() -> bool {
    true
}

/// A server and a client that have connected by `kind` over loopback.
async fn connected(kind: Kind) -> (Connection, Connection) {
    let certificates = certificates();
    if kind == Kind::Quic {
        return quic(certificates).await;
    }
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let accepting = tokio::spawn(async move {
        let (stream, remote) = listener.accept().await.unwrap();
        tcp::tune(&stream).unwrap();
        let setup = Setup { remote, ..setup(Side::Server) };
        secure::accept(stream, certificates.server, at_once(), ALPN, NAMES, setup, on_tokio).await.unwrap()
    });
    let stream = TcpStream::connect(address).await.unwrap();
    tcp::tune(&stream).unwrap();
    let setup = Setup { remote: address, ..setup(Side::Client) };
    let client = match kind {
        Kind::Tls => {
            secure::connect_tls(stream, "localhost", &certificates.client, ALPN, setup, on_tokio).await
        }
        _ => {
            secure::connect_websocket(stream, "localhost", &certificates.client, NAMES, setup, on_tokio).await
        }
    };
    (client.unwrap(), accepting.await.unwrap())
}

async fn quic(mut certificates: Certificates) -> (Connection, Connection) {
    use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
    let mut server = (*certificates.server).clone();
    server.alpn_protocols = vec![ALPN.to_vec()];
    certificates.client.alpn_protocols = vec![ALPN.to_vec()];
    let server = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(server).unwrap()));
    let server = quinn::Endpoint::server(server, (Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let address = server.local_addr().unwrap();
    let mut client = quinn::Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let config = Arc::new(QuicClientConfig::try_from(certificates.client).unwrap());
    client.set_default_client_config(quinn::ClientConfig::new(config));
    let accepting = tokio::spawn(async move { server.accept().await.unwrap().await.unwrap() });
    let client = client.connect(address, "localhost").unwrap().await.unwrap();
    (client.into(), accepting.await.unwrap().into())
}

const KINDS: [Kind; 3] = [Kind::Quic, Kind::Tls, Kind::WebSocket];

#[tokio::test]
async fn every_kind_carries_streams_and_datagrams_both_ways() {
    for kind in KINDS {
        let (client, server) = connected(kind).await;
        assert_eq!((client.kind(), server.kind()), (kind, kind));
        assert_eq!(client.quic().is_some(), kind == Kind::Quic);
        assert_eq!(server.remote_address().ip(), Ipv4Addr::LOCALHOST);

        let big: Vec<u8> = (0..300_000u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
        let (mut ask, answer) = client.open_bi().await.unwrap();
        ask.write_all(b"question").await.unwrap();
        ask.finish().unwrap();
        let (mut reply, question) = server.accept_bi().await.unwrap();
        assert_eq!(all_of(question).await, b"question", "{kind:?}");
        let sending = big.clone();
        let replying = tokio::spawn(async move {
            let half = sending.len() / 2;
            reply.write_all(&sending[..half]).await.unwrap();
            let mut chunks: Vec<Bytes> = sending[half..].chunks(999).map(Bytes::copy_from_slice).collect();
            reply.write_all_chunks(&mut chunks).await.unwrap();
            reply.finish().unwrap();
            assert_eq!(reply.stopped().await, Ok(None));
        });
        assert_eq!(all_of(answer).await, big, "{kind:?}");
        replying.await.unwrap();

        let mut uni = client.open_uni().await.unwrap();
        uni.set_priority(3).unwrap();
        uni.write_chunk(Bytes::from_static(b"one way")).await.unwrap();
        drop(uni);
        assert_eq!(all_of(server.accept_uni().await.unwrap()).await, b"one way", "{kind:?}");

        assert!(server.max_datagram_size().unwrap() >= 1_000);
        server.send_datagram(Bytes::from_static(b"dgram")).unwrap();
        assert_eq!(client.read_datagram().await.unwrap(), "dgram", "{kind:?}");
        assert_eq!(server.send_datagram(vec![0; 70_000].into()), Err(SendDatagramError::TooLarge));

        let stats = client.stats();
        assert!(stats.bytes_in > 300_000 && stats.bytes_out > 8 && stats.packets_out > 0, "{stats:?}");
        assert_eq!(client.heard(), client.stats().packets_in);
        assert!(client.rtt() < Duration::from_millis(100), "{kind:?}: measured, {:?}", client.rtt());
    }
}

#[tokio::test]
async fn every_kind_ends_with_the_code_of_who_closed() {
    for kind in KINDS {
        let (client, server) = connected(kind).await;
        let (mut send, recv) = client.open_bi().await.unwrap();
        send.write_all(b"x").await.unwrap();
        let (_out, mut input) = server.accept_bi().await.unwrap();
        assert_eq!(input.read_chunk(10).await.unwrap().unwrap(), "x");
        server.close(77, b"enough");
        let want = ConnectionError::ApplicationClosed(ApplicationClose {
            code: 77,
            reason: Bytes::from_static(b"enough"),
        });
        assert_eq!(client.closed().await, want, "{kind:?}");
        assert_eq!(client.close_reason(), Some(want.clone()));
        assert_eq!(server.closed().await, ConnectionError::LocallyClosed);
        let mut recv = recv;
        assert_eq!(recv.read_chunk(1).await, Err(ReadError::ConnectionLost(want.clone())), "{kind:?}");
        assert_eq!(send.write_all(b"y").await, Err(WriteError::ConnectionLost(want.clone())), "{kind:?}");
        assert_eq!(client.open_uni().await.err(), Some(want.clone()));
        assert_eq!(client.accept_uni().await.err(), Some(want.clone()));
        assert_eq!(client.read_datagram().await.err(), Some(want.clone()));
        assert_eq!(
            client.send_datagram(Bytes::new()),
            Err(SendDatagramError::ConnectionLost(want.clone())),
            "{kind:?}"
        );
    }
}

#[tokio::test]
async fn every_kind_can_give_streams_up() {
    for kind in KINDS {
        let (client, server) = connected(kind).await;
        let mut send = client.open_uni().await.unwrap();
        send.write_all(b"x").await.unwrap();
        let mut recv = server.accept_uni().await.unwrap();
        recv.read_chunk(1).await.unwrap();
        recv.stop(5).unwrap();
        assert_eq!(send.stopped().await, Ok(Some(5)), "{kind:?}");
        assert_eq!(send.write_all(b"y").await, Err(WriteError::Stopped(5)), "{kind:?}");
        let mut send = client.open_uni().await.unwrap();
        send.write_all(b"x").await.unwrap();
        let mut recv = server.accept_uni().await.unwrap();
        recv.read_chunk(1).await.unwrap();
        send.reset(6).unwrap();
        assert_eq!(recv.read_chunk(1).await, Err(ReadError::Reset(6)), "{kind:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn streams_work_through_a_pipe_of_one_byte() {
    let (client, server) = pair(1);
    let sending = tokio::spawn(async move {
        let mut stream = client.open_uni().await.unwrap();
        stream.write_all(&[7; 5_000]).await.unwrap();
        stream.finish().unwrap();
        stream.stopped().await.unwrap();
        client
    });
    let stream = server.accept_uni().await.unwrap();
    assert_eq!(all_of(stream).await, [7; 5_000]);
    drop(sending.await.unwrap());
    let end = server.closed().await;
    assert!(matches!(&end, ConnectionError::ApplicationClosed(close) if close.code == 0), "{end:?}");
}

#[tokio::test(start_paused = true)]
async fn a_live_message_overtakes_all_backlog_but_the_record_under_way() {
    // A narrow line: 1 KiB each 100 ms, and 4 KiB that wait before it.
    let (one, line) = duplex(4 * 1024);
    let client = over(one, Side::Client);
    let (far, two) = duplex(1024);
    let server = over(two, Side::Server);
    let (mut from_client, mut to_client) = tokio::io::split(line);
    let (mut from_server, mut to_server) = tokio::io::split(far);
    tokio::spawn(async move {
        let mut piece = vec![0; 1024];
        while let Ok(len @ 1..) = from_client.read(&mut piece).await {
            tokio::time::sleep(Duration::from_millis(100)).await;
            to_server.write_all(&piece[..len]).await.unwrap();
        }
    });
    tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_client).await });

    let mut live = client.open_uni().await.unwrap();
    live.set_priority(2).unwrap();
    live.write_all(b"header").await.unwrap();
    let mut backlog = client.open_uni().await.unwrap();
    backlog.set_priority(-1).unwrap();
    let writing = tokio::spawn(async move { backlog.write_all(&vec![0; 400_000]).await });
    let mut first = server.accept_uni().await.unwrap();
    assert_eq!(first.read_chunk(100).await.unwrap().unwrap(), "header");
    let mut second = server.accept_uni().await.unwrap();
    let reading = tokio::spawn(async move { while let Ok(Some(_)) = second.read_chunk(usize::MAX).await {} });
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_millis(1_730)).await;
        let before = tokio::time::Instant::now();
        live.write_all(b"now").await.unwrap();
        assert_eq!(first.read_chunk(100).await.unwrap().unwrap(), "now");
        let took = before.elapsed();
        // One record of backlog and the buffers: 4 + 4 + 1 + 1 KiB at 10 KiB/s. All of the backlog would take 40 s.
        assert!(took <= Duration::from_millis(1_300), "{took:?}");
    }
    assert!(!writing.is_finished(), "there was backlog all the time");
    writing.abort();
    reading.abort();
}

/// Bytes that somebody who had stopped reading gets before the live message.
async fn bytes_before_live(tuned: bool) -> usize {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(16 * 1024).unwrap();
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
    socket.listen(1).unwrap();
    socket.set_nonblocking(true).unwrap();
    let listener = TcpListener::from_std(socket.into()).unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    if tuned {
        tcp::tune(&stream).unwrap();
    }
    let (mut peer, _) = listener.accept().await.unwrap();
    let config = Config {
        assumed: Some(Parameters {
            max_data: 1 << 30,
            max_stream_data_uni: 1 << 30,
            max_streams_uni: 4,
            ..Parameters::default()
        }),
        ..Config::default()
    };
    let client = Connection::over(stream, Kind::Tls, Setup { config, ..setup(Side::Client) }, on_tokio);
    let mut live = client.open_uni().await.unwrap();
    live.set_priority(2).unwrap();
    let mut backlog = client.open_uni().await.unwrap();
    backlog.set_priority(-1).unwrap();
    let writing = tokio::spawn(async move { backlog.write_all(&vec![0; 64 << 20]).await });
    // Until nothing moves any more.
    let mut sent = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = client.stats().bytes_out;
        if std::mem::replace(&mut sent, now) == now {
            break;
        }
    }
    live.write_all(b"live").await.unwrap();
    let (mut heard, mut before) = (Vec::new(), 0);
    while !heard.windows(4).any(|window: &[u8]| window == b"live") {
        let from = heard.len().saturating_sub(3);
        heard.drain(..from);
        let mut piece = vec![0; 8 * 1024];
        let len = peer.read(&mut piece).await.unwrap();
        assert!(len > 0);
        heard.extend_from_slice(piece.get(..len).unwrap());
        before += len;
    }
    writing.abort();
    before
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn the_system_keeps_little_that_was_not_sent() {
    let (tuned, untuned) = (bytes_before_live(true).await, bytes_before_live(false).await);
    // What is on its way to the peer's buffer, and 16 KiB.
    assert!(tuned < 150_000 && 4 * tuned < untuned, "{tuned}, and {untuned} as it was");
}

#[tokio::test(start_paused = true)]
async fn silence_ends_a_connection_and_answers_keep_it() {
    let (one, two) = duplex(1024);
    let config = Config { idle_timeout_ms: 10_000, ..Config::default() };
    let client = Connection::over(one, Kind::Tls, Setup { config, ..setup(Side::Client) }, on_tokio);
    let server = over(two, Side::Server);
    let mut stream = client.open_uni().await.unwrap();
    for _ in 0..10 {
        stream.write_all(b"x").await.unwrap();
        tokio::time::sleep(Duration::from_secs(9)).await;
    }
    assert_eq!((client.close_reason(), server.close_reason()), (None, None), "it was not silent");
    let before = tokio::time::Instant::now();
    assert_eq!(client.closed().await, ConnectionError::TimedOut);
    assert!(before.elapsed() <= Duration::from_secs(10), "{:?}", before.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_breaks_the_rules_is_told_and_left() {
    let (one, mut peer) = duplex(64 * 1024);
    let server = over(one, Side::Server);
    peer.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n\xff\xff\xff\xff").await.unwrap();
    peer.write_all(&[0xff; 4_000]).await.unwrap();
    let end = server.closed().await;
    assert!(matches!(end, ConnectionError::Violation(_)), "{end:?}");
    let mut said = Vec::new();
    peer.read_to_end(&mut said).await.unwrap();
    let close = b"\x1c";
    assert!(said.windows(close.len()).any(|window| window == close), "{said:?}");
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_ends_is_a_lost_connection() {
    let (one, peer) = duplex(1024);
    let server = over(one, Side::Server);
    drop(peer);
    assert!(matches!(server.closed().await, ConnectionError::Lost(_)));
    let (one, _peer) = duplex(1024);
    // A task that never runs: whoever owned it has thrown it away.
    let connection = Connection::over(one, Kind::Tls, setup(Side::Client), drop);
    assert!(matches!(connection.closed().await, ConnectionError::Lost(_)));
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_read_holds_nobody_up() {
    let (one, _peer) = duplex(512);
    let config = Config {
        assumed: Some(Parameters {
            max_data: 1 << 30,
            max_stream_data_uni: 1 << 30,
            max_streams_uni: 4,
            ..Parameters::default()
        }),
        ..Config::default()
    };
    let client = Connection::over(one, Kind::Tls, Setup { config, ..setup(Side::Client) }, on_tokio);
    let mut stream = client.open_uni().await.unwrap();
    let writing = tokio::time::timeout(Duration::from_secs(5), stream.write_all(&vec![1; 1 << 20])).await;
    assert!(writing.is_err(), "the buffer is bounded");
    client.close(3, b"bored");
    assert_eq!(client.closed().await, ConnectionError::LocallyClosed);
}

#[tokio::test(start_paused = true)]
async fn a_stuck_stream_leaves_its_task_alone() {
    // Driver and handles in one task, as the gateway has them, and a peer that reads nothing.
    let (one, _peer) = duplex(512);
    let config = Config {
        assumed: Some(Parameters {
            max_data: 1 << 30,
            max_stream_data_uni: 1 << 30,
            max_streams_uni: 4,
            ..Parameters::default()
        }),
        ..Config::default()
    };
    let mut driver = None;
    let client =
        Connection::over(one, Kind::Tls, Setup { config, ..setup(Side::Client) }, |task| driver = Some(task));
    let mut driver = driver.unwrap();
    let mut stream = client.open_uni().await.unwrap();
    let body = vec![1; 1 << 20];
    let mut writing = std::pin::pin!(stream.write_all(&body));
    let mut accepting = std::pin::pin!(client.accept_uni());
    let mut turns = 0;
    let working = std::future::poll_fn(|cx| {
        turns += 1;
        assert!(turns < 100, "it looks again and again without a reason");
        let ended = driver.as_mut().poll(cx).is_ready();
        let done = writing.as_mut().poll(cx).is_ready() || accepting.as_mut().poll(cx).is_ready();
        if ended || done { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    });
    let waited = tokio::time::timeout(Duration::from_secs(5), working).await;
    assert!(waited.is_err(), "nothing can happen");
}

#[tokio::test]
async fn nothing_is_answered_before_its_turn() {
    use tokio::{io::AsyncReadExt as _, sync::oneshot};
    for let_in in [true, false] {
        let certificates = certificates();
        let (here, mut there) = duplex(1 << 16);
        let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
        let mut client = rustls::ClientConnection::new(Arc::new(certificates.client), name).unwrap();
        let mut hello = Vec::new();
        client.write_tls(&mut hello).unwrap();
        let (asked, is_asked) = oneshot::channel();
        let (give, given) = oneshot::channel();
        let turn = async move {
            asked.send(()).unwrap();
            given.await.unwrap()
        };
        let setup = setup(Side::Server);
        let accepting =
            tokio::spawn(secure::accept(here, certificates.server, turn, ALPN, NAMES, setup, on_tokio));
        there.write_all(hello.get(..hello.len() / 2).unwrap()).await.unwrap();
        tokio::task::yield_now().await;
        there.write_all(hello.get(hello.len() / 2..).unwrap()).await.unwrap();
        // It asks for its turn once all of the first words are there, and does nothing else.
        is_asked.await.unwrap();
        let mut answer = [0; 1];
        let silent = tokio::time::timeout(Duration::from_millis(20), there.read(&mut answer)).await;
        assert!(silent.is_err(), "{silent:?}");
        give.send(let_in).unwrap();
        let read = there.read(&mut answer).await.unwrap();
        assert_eq!(read, usize::from(let_in), "an answer, or the end");
        if !let_in {
            let refused = accepting.await.unwrap();
            assert!(matches!(refused, Err(secure::HandshakeError::NoTurn)), "{refused:?}");
        }
    }
}

#[tokio::test]
async fn who_speaks_something_else_is_refused() {
    let certificates = certificates();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Arc::clone(&certificates.server);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let accepted = secure::accept(
                stream,
                Arc::clone(&server),
                at_once(),
                ALPN,
                NAMES,
                setup(Side::Server),
                on_tokio,
            )
            .await;
            assert!(accepted.is_err(), "{accepted:?}");
        }
    });
    let dial = async || TcpStream::connect(address).await.unwrap();
    let refused = secure::connect_tls(
        dial().await,
        "localhost",
        &certificates.client,
        b"other/1",
        setup(Side::Client),
        on_tokio,
    )
    .await;
    assert!(refused.is_err(), "another ALPN");
    for names in [Names { path: "/elsewhere", ..NAMES }, Names { protocol: "other.1", ..NAMES }] {
        let refused = secure::connect_websocket(
            dial().await,
            "localhost",
            &certificates.client,
            names,
            setup(Side::Client),
            on_tokio,
        )
        .await;
        assert!(refused.is_err(), "{names:?}");
    }
    let refused = secure::connect_tls(
        dial().await,
        "elsewhere.example",
        &certificates.client,
        ALPN,
        setup(Side::Client),
        on_tokio,
    )
    .await;
    assert!(refused.is_err(), "another name");
}
