//! The way that is left where UDP is blocked: the same phones over TLS and over WebSocket, and what strangers may send there.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that finds something wrong stops there"
)]

mod support;

use std::time::Duration;

use bytes::{BufMut, BytesMut};
use fulmar_gateway::config::Config;
use fulmar_protocol::{
    close::CloseCode,
    frame::{Channel, put_varint},
    version::ALPN,
};
use fulmar_transport::{ConnectionError, Kind};
use rustls::pki_types::ServerName;
use support::{NAMES, Phone, Running, SERVER_NAME, client_tls, config, connect_stream};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

const STREAMS: [Kind; 2] = [Kind::Tls, Kind::WebSocket];

/// The pages are on, for metrics.
fn watched(folder: &std::path::Path) -> Config {
    let mut config = config(folder);
    config.listen.http_address = Some(std::net::SocketAddr::from((std::net::Ipv4Addr::LOCALHOST, 0)));
    config
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn phones_talk_by_whatever_gets_through() {
    let parent = tempfile::tempdir().unwrap();
    let gateway = Running::start(watched(&parent.path().join("data"))).await;
    let mut alice = Phone::new("alice", &gateway.folder, gateway.address).by(Kind::Tls);
    let mut bob = Phone::new("bob", &gateway.folder, gateway.address).by(Kind::WebSocket);
    let mut carol = Phone::new("carol", &gateway.folder, gateway.address);
    for phone in [&mut alice, &mut bob, &mut carol] {
        phone.go_online().await;
    }
    for (kind, want) in [("quic", 1), ("tls", 1), ("websocket", 1)] {
        let line = format!("fulmar_transport_connections{{transport=\"{kind}\"}} {want}");
        let (_, metrics) = gateway.page("/metrics").await;
        assert!(metrics.lines().any(|l| l == line), "{line} is missing in\n{metrics}");
    }
    let with_bob = alice.direct("bob").await;
    let with_carol = alice.direct("carol").await;
    // Several records per write, and one that takes several pieces.
    for n in 0..100 {
        alice.send(with_bob, format!("{n}"));
        alice.send(with_carol, format!("{n}"));
        bob.send(with_bob, format!("re {n}"));
        while !alice.has_room() || !bob.has_room() {
            alice.step(Duration::from_millis(1)).await;
            bob.step(Duration::from_millis(1)).await;
        }
    }
    alice.send(with_bob, vec![b'x'; 16_000]);
    bob.until(|bob| bob.unacked() == 0).await;
    alice.until(|alice| alice.unacked() == 0 && alice.messages(with_bob).len() == 201).await;
    bob.until(|bob| bob.unacked() == 0 && bob.messages(with_bob).len() == 201).await;
    carol.until(|carol| carol.messages(with_carol).len() == 100).await;
    let of_alice: Vec<String> =
        bob.messages(with_bob).into_iter().filter(|text| !text.starts_with("re") && text.len() < 9).collect();
    assert_eq!(of_alice, (0..100).map(|n| n.to_string()).collect::<Vec<_>>());
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_goes_on_by_another_way() {
    let parent = tempfile::tempdir().unwrap();
    let gateway = Running::start(config(&parent.path().join("data"))).await;
    let mut alice = Phone::new("alice", &gateway.folder, gateway.address);
    let mut bob = Phone::new("bob", &gateway.folder, gateway.address);
    bob.go_online().await;
    alice.go_online().await;
    let conversation = alice.direct("bob").await;
    let mut sent = 0;
    for kind in [Kind::Tls, Kind::WebSocket, Kind::Quic, Kind::Tls] {
        alice.disconnect();
        // What is sent to somebody who is away waits in the log.
        for _ in 0..40 {
            bob.send(conversation, format!("{sent}"));
            sent += 1;
        }
        bob.until(|bob| bob.unacked() == 0).await;
        alice = alice.by(kind);
        alice.send(conversation, format!("by {kind:?}"));
        sent += 1;
        alice.go_online().await;
        alice.until(|alice| alice.messages(conversation).len() == sent && alice.unacked() == 0).await;
        bob.until(|bob| bob.messages(conversation).len() == sent).await;
    }
    assert!(alice.gaps.is_empty() && alice.errors.is_empty(), "{}", alice.describe());
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_tells_streams_too_and_loses_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let gateway = Running::start(config(&parent.path().join("data"))).await;
    let mut phones = STREAMS.map(|kind| {
        Phone::new(if kind == Kind::Tls { "alice" } else { "bob" }, &gateway.folder, gateway.address).by(kind)
    });
    for phone in &mut phones {
        phone.go_online().await;
    }
    let conversation = phones.first_mut().unwrap().direct("bob").await;
    phones.first_mut().unwrap().send(conversation, "last");
    gateway.drain();
    for phone in &mut phones {
        phone.until(|phone| phone.goaways == 1 && phone.unacked() == 0).await;
    }
    let tls = client_tls(&gateway.folder);
    let refused = connect_stream(Kind::Tls, &tls, gateway.address).await;
    assert!(refused.is_err(), "who comes now is turned away: {refused:?}");
    phones.iter_mut().for_each(Phone::disconnect);
    gateway.stop().await;
}

/// A stream with TLS on it, and nothing said yet.
async fn raw(gateway: &Running, alpn: &[u8]) -> tokio_rustls::client::TlsStream<TcpStream> {
    let mut tls = client_tls(&gateway.folder);
    tls.alpn_protocols = vec![alpn.to_vec()];
    let stream = TcpStream::connect(gateway.address).await.unwrap();
    let name = ServerName::try_from(SERVER_NAME).unwrap();
    tokio_rustls::TlsConnector::from(std::sync::Arc::new(tls)).connect(name, stream).await.unwrap()
}

/// Reads until the gateway ends the stream.
async fn rest(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Vec<u8> {
    let mut all = Vec::new();
    let read = async {
        let mut piece = [0; 4096];
        while let Ok(len @ 1..) = stream.read(&mut piece).await {
            all.extend_from_slice(piece.get(..len).unwrap());
        }
    };
    tokio::time::timeout(Duration::from_secs(8), read).await.expect("the gateway ends it");
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_strangers_send_harms_nobody() {
    let parent = tempfile::tempdir().unwrap();
    let mut config = config(&parent.path().join("data"));
    // Who says too little to be refused is cut off before the test loses patience.
    config.limits.hello_timeout_ms = 4_000;
    let gateway = Running::start(config).await;
    let mut alice = Phone::new("alice", &gateway.folder, gateway.address).by(Kind::Tls);
    let mut bob = Phone::new("bob", &gateway.folder, gateway.address).by(Kind::WebSocket);
    alice.go_online().await;
    bob.go_online().await;
    let conversation = alice.direct("bob").await;
    let mut said = 0;

    // Bytes that are no TLS; a closed stream at once.
    for bytes in [&b"GET / HTTP/1.0\r\n\r\n"[..], b"\x16\x03\x01\xff\xff", b"", &[0xff; 2_000]] {
        let mut stream = TcpStream::connect(gateway.address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let _ = stream.shutdown().await;
        rest(&mut stream).await;
    }
    // Bytes that are no record, after TLS: a close with its reason comes back.
    for bytes in [vec![0xff; 4_000], b"\x00".to_vec(), {
        let mut huge = BytesMut::new();
        put_varint(&mut huge, 1 << 40);
        huge.to_vec()
    }] {
        let mut stream = raw(&gateway, ALPN).await;
        stream.write_all(&bytes).await.unwrap();
        let answer = rest(&mut stream).await;
        assert!(answer.windows(2).any(|pair| pair == [0x1c, 0x07]), "FRAME_ENCODING_ERROR: {answer:?}");
    }
    // Requests that ask for something else.
    for (request, status) in [
        ("GET / HTTP/1.1\r\nhost: x\r\n\r\n", ""),
        (
            "GET /elsewhere HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n\
             sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-protocol: fulmar.1\r\n\r\n",
            "HTTP/1.1 404",
        ),
        (
            "GET /fulmar HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n\
             sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-protocol: mqtt\r\n\r\n",
            "HTTP/1.1 400",
        ),
        ("\r\n\r\n\r\n", ""),
    ] {
        let mut stream = raw(&gateway, b"http/1.1").await;
        stream.write_all(request.as_bytes()).await.unwrap();
        let answer = rest(&mut stream).await;
        assert!(
            String::from_utf8_lossy(&answer).starts_with(status),
            "{request}: {}",
            String::from_utf8_lossy(&answer)
        );
    }
    let mut endless = raw(&gateway, b"http/1.1").await;
    let _ = endless.write_all(b"GET /fulmar HTTP/1.1\r\n").await;
    while endless.write_all(format!("x: {}\r\n", "y".repeat(1_000)).as_bytes()).await.is_ok() {}
    // A message of text in the WebSocket.
    let stream = raw(&gateway, b"http/1.1").await;
    let mut request = tokio_tungstenite::tungstenite::client::IntoClientRequest::into_client_request(
        format!("wss://{SERVER_NAME}{}", NAMES.path),
    )
    .unwrap();
    request.headers_mut().insert("sec-websocket-protocol", NAMES.protocol.parse().unwrap());
    let (mut socket, _) = tokio_tungstenite::client_async(request, stream).await.unwrap();
    futures_util::SinkExt::send(&mut socket, "text".into()).await.unwrap();
    let ended = async { while let Some(Ok(_)) = futures_util::StreamExt::next(&mut socket).await {} };
    tokio::time::timeout(Duration::from_secs(5), ended).await.expect("the gateway ends it");

    // Frames of Fulmar that break its rules: the same codes as by QUIC.
    for kind in STREAMS {
        let tls = client_tls(&gateway.folder);
        let connection = connect_stream(kind, &tls, gateway.address).await.unwrap();
        let (mut control, _answers) = connection.open_bi().await.unwrap();
        let mut bytes = BytesMut::new();
        Channel::Control.header().unwrap().encode(&mut bytes);
        put_varint(&mut bytes, 1 << 20);
        bytes.put_slice(&[2; 100]);
        control.write_all(&bytes).await.unwrap();
        let closed = tokio::time::timeout(Duration::from_secs(5), connection.closed()).await.unwrap();
        let ConnectionError::ApplicationClosed(close) = closed else { panic!("{kind:?}: {closed:?}") };
        assert_eq!(close.code, u64::from(CloseCode::TooLarge.code()), "{kind:?}");

        alice.send(conversation, format!("still fine after {kind:?}"));
        said += 1;
        alice.until(|alice| alice.unacked() == 0).await;
        bob.until(|bob| bob.messages(conversation).len() == said).await;
    }
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_slow_or_many_is_cut_off() {
    let parent = tempfile::tempdir().unwrap();
    let mut config = watched(&parent.path().join("data"));
    config.limits.hello_timeout_ms = 1_000;
    config.limits.handshakes_per_address = 4;
    config.limits.connections_per_address = 6;
    let gateway = Running::start(config).await;
    // A byte now and then does not move the limit.
    let mut slow = TcpStream::connect(gateway.address).await.unwrap();
    let mut slower = raw(&gateway, b"http/1.1").await;
    let drip = async {
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            if slow.write_all(b"\x16").await.is_err() {
                break;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(8), drip).await.expect("it is cut off");
    slower.write_all(b"GET ").await.unwrap_or(());
    assert!(rest(&mut slower).await.is_empty());
    // TLS and then nothing: the HELLO has its limit as by QUIC.
    let mut silent = raw(&gateway, ALPN).await;
    let answer = rest(&mut silent).await;
    assert!(answer.windows(2).any(|pair| pair == [0x1d, 0x12]), "HELLO_TIMEOUT: {answer:?}");
    // More at once than one address may: those beyond are closed at once.
    let mut many = Vec::new();
    for _ in 0..6 {
        many.push(TcpStream::connect(gateway.address).await.unwrap());
    }
    // The others stay until their handshake has taken too long.
    let ends = many.iter_mut().map(|stream| async move {
        let mut byte = [0];
        let read = tokio::time::timeout(Duration::from_millis(500), stream.read(&mut byte)).await;
        usize::from(matches!(read, Ok(Ok(0) | Err(_))))
    });
    let closed: usize = futures_util::future::join_all(ends).await.into_iter().sum();
    assert_eq!(closed, 2);
    drop(many);
    let turned_away = gateway.metric("fulmar_attempts_turned_away_total").await;
    assert!(turned_away >= 2.0, "{turned_away}");
    // There is room for those who behave.
    let mut alice = Phone::new("alice", &gateway.folder, gateway.address).by(Kind::Tls);
    tokio::time::sleep(Duration::from_millis(100)).await;
    alice.go_online().await;
    alice.disconnect();
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tcp_can_be_off() {
    let parent = tempfile::tempdir().unwrap();
    let mut config = config(&parent.path().join("data"));
    config.listen.tcp = false;
    let gateway = Running::start(config).await;
    assert!(TcpStream::connect(gateway.address).await.is_err());
    let mut alice = Phone::new("alice", &gateway.folder, gateway.address);
    alice.go_online().await;
    alice.disconnect();
    gateway.stop().await;
}
