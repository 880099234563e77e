//! Several connections of one device: which of them counts for others, and from when on.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that finds something wrong stops there"
)]

mod support;

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use fulmar_protocol::{
    close::CloseCode,
    frame::{AuthProof, Channel, Decoder, Frame, Hello, NetworkHint, Ping, Welcome},
    id::{DeviceClass, DeviceUid, Epoch},
    service::{Devices, Method},
    version::{ALPN, Features},
};
use support::{Phone, Running, SERVER_NAME, client_tls, config, token};
use tokio::net::UdpSocket;

/// Long enough for whatever is on its way on loopback.
const A_WHILE: Duration = Duration::from_millis(500);

const PATIENCE: Duration = Duration::from_secs(10);

/// An endpoint that may send early data.
fn endpoint(gateway: &Running) -> quinn::Endpoint {
    let mut tls = client_tls(&gateway.folder);
    tls.alpn_protocols = vec![ALPN.to_vec()];
    tls.enable_early_data = true;
    let tls = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let mut endpoint = quinn::Endpoint::client(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(tls)));
    endpoint
}

fn hello(token: &str, epoch: Epoch) -> Frame {
    Frame::Hello(Hello {
        minor: 0,
        features: Features::OURS.0,
        auth: AuthProof::Token(token.to_owned()),
        device: DeviceUid([7; 16]),
        class: DeviceClass::Phone,
        epoch,
        cursor_digest: 0,
        changed: Vec::new(),
        network: NetworkHint::default(),
    })
}

fn ping() -> Bytes {
    Frame::Ping(Ping { id: 1, time_ms: 1, flags: 0, padding: 0 }).to_bytes()
}

/// A connection of the device, after its HELLO.
struct Raw {
    quic: quinn::Connection,
    control: quinn::SendStream,
    answers: quinn::RecvStream,
    decoder: Decoder,
}

impl Raw {
    async fn connect(endpoint: &quinn::Endpoint, to: SocketAddr, hello: &Frame) -> Self {
        Self::on(endpoint.connect(to, SERVER_NAME).unwrap().await.unwrap(), hello).await
    }

    async fn on(quic: quinn::Connection, hello: &Frame) -> Self {
        let (mut control, answers) = quic.open_bi().await.unwrap();
        let mut first = BytesMut::new();
        Channel::Control.header().unwrap().encode(&mut first);
        hello.encode(&mut first);
        control.write_all(&first).await.unwrap();
        Self { quic, control, answers, decoder: Decoder::new(Channel::Control.frame_limit()) }
    }

    async fn welcome(&mut self) -> Welcome {
        tokio::time::timeout(PATIENCE, async {
            loop {
                if let Some(frame) = self.decoder.next().unwrap() {
                    let Frame::Welcome(welcome) = frame else { panic!("{frame:?}") };
                    return welcome;
                }
                let chunk = self.answers.read_chunk(4_096, true).await.unwrap();
                self.decoder.push(chunk.expect("an answer").bytes);
            }
        })
        .await
        .expect("the gateway answers")
    }

    /// Says what only follows a WELCOME: that the client goes on with this connection.
    async fn go_on(&mut self) {
        self.control.write_all(&ping()).await.unwrap();
    }

    async fn is_superseded(&self) {
        let closed = tokio::time::timeout(PATIENCE, self.quic.closed()).await.expect("it is closed");
        let quinn::ConnectionError::ApplicationClosed(close) = closed else {
            panic!("ended with {closed:?}")
        };
        assert_eq!(close.error_code.into_inner(), u64::from(CloseCode::Superseded.code()));
    }

    fn is_there(&self) -> bool {
        self.quic.close_reason().is_none()
    }
}

/// A road to the gateway on which nothing comes back while it is held.
async fn road(gateway: SocketAddr) -> (SocketAddr, Arc<AtomicBool>) {
    let front = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
    let back = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
    back.connect(gateway).await.unwrap();
    let (address, held) = (front.local_addr().unwrap(), Arc::new(AtomicBool::new(false)));
    let hold = Arc::clone(&held);
    tokio::spawn(async move {
        let (mut up, mut down) = (vec![0; 2_048], vec![0; 2_048]);
        let mut phone = None;
        loop {
            tokio::select! {
                come = front.recv_from(&mut up) => {
                    let Ok((length, from)) = come else { continue };
                    phone = Some(from);
                    let _ = back.send(&up[..length]).await;
                }
                come = back.recv(&mut down) => {
                    let (Ok(length), Some(phone)) = (come, phone) else { continue };
                    if !hold.load(Ordering::Relaxed) {
                        let _ = front.send_to(&down[..length], phone).await;
                    }
                }
            }
        }
    });
    (address, held)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_connection_of_a_device_takes_over_when_its_client_goes_on_with_it() {
    let parent = tempfile::tempdir().unwrap();
    let gateway = Running::start(config(&parent.path().join("data"))).await;
    let (endpoint, hello) = (endpoint(&gateway), hello(&token(&gateway.folder, "mallory"), Epoch::ZERO));
    let mut first = Raw::connect(&endpoint, gateway.address, &hello).await;
    let epoch = first.welcome().await.epoch;
    let mut second = Raw::connect(&endpoint, gateway.address, &hello).await;
    assert_eq!(second.welcome().await.epoch, epoch, "HELLOs of one race are given one epoch");
    tokio::time::sleep(A_WHILE).await;
    assert!(first.is_there() && second.is_there(), "nobody was chosen yet");
    first.go_on().await;
    tokio::time::sleep(A_WHILE).await;
    assert!(second.is_there(), "an older one does not end it");
    second.go_on().await;
    first.is_superseded().await;
    assert!(second.is_there());
    gateway.stop().await;
}

/// The gateway's handshake never reaches the client, so the client's end of it never reaches the gateway: as far as that can tell, the
/// early data, even a PING in it, may be a copy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn early_data_takes_nothing_over_and_shows_nobody_online_before_the_handshake_is_complete() {
    let parent = tempfile::tempdir().unwrap();
    let mut config = config(&parent.path().join("data"));
    config.listen.http_address = Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
    let gateway = Running::start(config).await;
    let token = token(&gateway.folder, "mallory");
    let mut tablet = Phone::new("mallory", &gateway.folder, gateway.address);
    tablet.go_online().await;
    let online = async |tablet: &mut Phone| {
        let devices: Devices = tablet.call(Method::MyDevices, &()).await.unwrap();
        devices.devices.iter().filter(|device| !device.this && device.online).count()
    };
    let (road, held) = road(gateway.address).await;
    let endpoint = endpoint(&gateway);
    let mut first = Raw::connect(&endpoint, road, &hello(&token, Epoch::ZERO)).await;
    let epoch = first.welcome().await.epoch;
    assert_eq!(online(&mut tablet).await, 0, "it may be an attempt that loses");
    first.go_on().await;
    tokio::time::sleep(A_WHILE).await;
    assert_eq!(online(&mut tablet).await, 1);
    first.quic.close(0u32.into(), b"");
    while online(&mut tablet).await > 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    // The older connection of the device stands by another road.
    let mut older = Raw::connect(&endpoint, gateway.address, &hello(&token, epoch)).await;
    older.welcome().await;
    held.store(true, Ordering::Relaxed);
    let early = endpoint.connect(road, SERVER_NAME).unwrap().into_0rtt();
    let Ok((early, accepted)) = early else { panic!("there is no TLS session to resume") };
    let before = gateway.metric("fulmar_sessions").await;
    let mut newer = Raw::on(early, &hello(&token, epoch)).await;
    let served = async {
        while gateway.metric("fulmar_sessions").await <= before {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, served).await.expect("early data is served at once");
    newer.go_on().await;
    tokio::time::sleep(A_WHILE).await;
    assert!(older.is_there(), "a copy of a first flight ends nothing");
    assert_eq!(online(&mut tablet).await, 0, "nor is anybody there by it");

    held.store(false, Ordering::Relaxed);
    assert!(tokio::time::timeout(PATIENCE, accepted).await.expect("the handshake goes on"), "early data");
    older.is_superseded().await;
    assert!(newer.is_there());
    assert_eq!(online(&mut tablet).await, 1);
    gateway.stop().await;
}
