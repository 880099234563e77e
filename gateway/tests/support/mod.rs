//! What the gateway's end-to-end tests share: a gateway in a fresh folder, and phones made of the protocol's client
//! half over real QUIC, whose "database" is this process's memory.

#![allow(
    dead_code,
    unreachable_pub,
    missing_debug_implementations,
    reason = "each test binary uses its part of it"
)]

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use bytes::{Bytes, BytesMut};
use fulmar_gateway::{
    config::Config,
    conversation::shard::CommitLog,
    data_folder::DataFolder,
    drain::{self, Cause, DrainTrigger},
    gateway::Gateway,
    identity::token::{Mint, mint},
};
use fulmar_protocol::{
    frame::{
        AuthProof, Channel, Decoder, Deliver, Error as ErrorFrame, Frame, NetworkHint, OpenTarget, Opened,
        RecordKind, Reply, Send as SendFrame, SendRefused, StreamHeader, Welcome,
    },
    id::{ConversationId, DeviceClass, DeviceUid, Pseq, Seq, ShardId, UnixMillis},
    session::client::{Client as Half, ClientConfig, Output, Restored},
    version::{ALPN, WEBSOCKET_PATH, WEBSOCKET_PROTOCOL},
};
use fulmar_store::ShardWriter;
use fulmar_transport::{
    Connection, ConnectionError, Kind, RecvStream, SendStream, Setup,
    qmux::{Config as StreamConfig, Parameters, Side},
    secure,
    websocket::Names,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::mpsc,
    task::JoinHandle,
};

pub const SERVER_NAME: &str = "localhost";

pub fn unix_now() -> UnixMillis {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    UnixMillis::new(u64::try_from(now.as_millis()).unwrap()).unwrap()
}

/// A configuration for a gateway on loopback with ports the system chooses.
pub fn config(folder: &Path) -> Config {
    let mut config = Config::in_folder(folder);
    config.listen.address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    config.listen.http_address = None;
    config.data.shards = 2;
    config.receipts.persist_ms = 100;
    // A machine that is busy with other tests makes its cores late: who is refused then is tested where it is wanted.
    config.limits.core_wait_ms = 0;
    config
}

/// A token for `user` of the app every fresh folder has.
pub fn token(folder: &Path, user: &str) -> String {
    let folder = DataFolder::prepare(folder, &[]).unwrap();
    let config = Config::in_folder(folder.path());
    let app = &config.apps[0];
    mint(&folder.dev_key, Mint { app: &app.name, issuer: &app.issuer, user, ttl_s: 3_600 }, unix_now())
        .unwrap()
}

/// A gateway that runs in this process.
pub struct Running {
    pub address: SocketAddr,
    pub http: Option<SocketAddr>,
    pub folder: PathBuf,
    trigger: DrainTrigger,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Running {
    pub async fn start(config: Config) -> Self {
        Self::start_with(config, |_, writer| writer).await
    }

    /// With something between the shards and their logs.
    pub async fn start_with<W: CommitLog>(config: Config, wrap: impl Fn(ShardId, ShardWriter) -> W) -> Self {
        let folder = config.data.path.clone();
        let gateway = Gateway::start_with(config, wrap).await.unwrap();
        let address = gateway.address();
        let http = gateway.http_address();
        let (trigger, drain) = drain::drain(Duration::from_secs(5));
        let task = tokio::spawn(gateway.run(drain));
        Self { address, http, folder, trigger, task }
    }

    /// A page of the operator's: its status, and what it says.
    pub async fn page(&self, path: &str) -> (u16, String) {
        let mut stream = tokio::net::TcpStream::connect(self.http.expect("the pages are on")).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    /// The sum of a metric over its labels.
    pub async fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.page("/metrics").await;
        let values = text.lines().filter_map(|line| {
            let (key, value) = line.rsplit_once(' ')?;
            (key.split('{').next() == Some(name)).then(|| value.parse::<f64>().unwrap())
        });
        values.sum()
    }

    /// A metric's value where one of its labels has this value; 0 when it was never counted.
    pub async fn labelled(&self, name: &str, label: &str) -> f64 {
        let (_, text) = self.page("/metrics").await;
        let wanted = format!("\"{label}\"}}");
        let value = text.lines().find_map(|line| {
            let (key, value) = line.rsplit_once(' ')?;
            (key.split('{').next() == Some(name) && key.ends_with(&wanted))
                .then(|| value.parse::<f64>().unwrap())
        });
        value.unwrap_or(0.0)
    }

    pub fn drain(&self) {
        self.trigger.start(Cause::Request);
    }

    pub async fn stop(self) {
        self.drain();
        tokio::time::timeout(Duration::from_secs(20), self.task)
            .await
            .expect("the gateway leaves")
            .unwrap()
            .unwrap();
    }
}

/// TLS settings that trust the gateway of `folder` and no other.
pub fn client_tls(folder: &Path) -> rustls::ClientConfig {
    use rustls::pki_types::{CertificateDer, pem::PemObject};
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(folder.join("tls/cert.pem")).unwrap() {
        roots.add(certificate.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth()
}

/// What a WebSocket of the protocol is called.
pub const NAMES: Names = Names { path: WEBSOCKET_PATH, protocol: WEBSOCKET_PROTOCOL };

/// A connection over a byte stream, by TLS or by WebSocket.
pub async fn connect_stream(
    kind: Kind,
    tls: &rustls::ClientConfig,
    server: SocketAddr,
) -> Result<Connection, String> {
    let stream = tokio::net::TcpStream::connect(server).await.map_err(|error| error.to_string())?;
    fulmar_transport::tcp::tune(&stream).unwrap();
    let config = StreamConfig {
        // What docs/wire.md says every gateway allows.
        assumed: Some(Parameters {
            max_data: 65_536,
            max_stream_data_bidi_remote: 32_768,
            max_stream_data_uni: 32_768,
            max_streams_bidi: 1,
            max_streams_uni: 1,
            ..Parameters::default()
        }),
        ..StreamConfig::default()
    };
    let setup = Setup { side: Side::Client, remote: server, config, initial_rtt: Duration::from_millis(50) };
    let spawn = |task| drop(tokio::spawn(task));
    let connected = match kind {
        Kind::WebSocket => secure::connect_websocket(stream, SERVER_NAME, tls, NAMES, setup, spawn).await,
        _ => secure::connect_tls(stream, SERVER_NAME, tls, ALPN, setup, spawn).await,
    };
    connected.map_err(|error| error.to_string())
}

/// A client endpoint that trusts the gateway of `folder` and no other.
pub fn endpoint(folder: &Path) -> quinn::Endpoint {
    endpoint_with(folder, None)
}

/// The same, which takes no more than so many bytes per stream and twice that in all before somebody reads them.
fn endpoint_with(folder: &Path, window: Option<u32>) -> quinn::Endpoint {
    let mut tls = client_tls(folder);
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let mut config =
        quinn::ClientConfig::new(Arc::new(quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap()));
    let mut transport = quinn::TransportConfig::default();
    transport
        .initial_rtt(Duration::from_millis(50))
        .max_idle_timeout(Some(Duration::from_secs(20).try_into().unwrap()));
    if let Some(window) = window {
        transport.stream_receive_window(window.into()).receive_window((2 * window).into());
    }
    config.transport_config(Arc::new(transport));
    let mut endpoint = quinn::Endpoint::client(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
    endpoint.set_default_client_config(config);
    endpoint
}

struct Live {
    connection: Connection,
    control: SendStream,
    uplink: SendStream,
    frames: mpsc::Receiver<(Channel, Frame)>,
    readers: Vec<JoinHandle<()>>,
}

impl Drop for Live {
    fn drop(&mut self) {
        for reader in &self.readers {
            reader.abort();
        }
        self.connection.close(0, b"");
    }
}

/// A phone whose database is this struct.
pub struct Phone {
    pub name: String,
    endpoint: quinn::Endpoint,
    tls: rustls::ClientConfig,
    kind: Kind,
    /// Frames that wait to be handled.
    frames_max: usize,
    server: SocketAddr,
    token: String,
    ticket: Option<Vec<u8>>,
    half: Half,
    started: Instant,
    heard: Instant,
    live: Option<Live>,
    next_pseq: HashMap<ConversationId, Pseq>,
    pub received: HashMap<ConversationId, Vec<Deliver>>,
    pub sent: HashMap<(ConversationId, Pseq), Bytes>,
    pub acked: HashMap<(ConversationId, Pseq), Option<Seq>>,
    pub refused: Vec<SendRefused>,
    pub opened: Vec<Opened>,
    pub replies: Vec<Reply>,
    pub errors: Vec<ErrorFrame>,
    pub welcome: Option<Welcome>,
    pub goaways: usize,
    pub events: Vec<fulmar_protocol::frame::Event>,
    pub receipts: Vec<fulmar_protocol::frame::Receipt>,
    pub gaps: Vec<(ConversationId, Seq, Seq)>,
    pub heads: Vec<fulmar_protocol::frame::Head>,
    pub connects: usize,
    /// How the last connection ended.
    pub ended: Option<ConnectionError>,
}

impl Phone {
    pub fn new(name: &str, folder: &Path, server: SocketAddr) -> Self {
        let mut uid = [0u8; 16];
        getrandom::fill(&mut uid).unwrap();
        let config = ClientConfig {
            ack_delay: Duration::from_millis(20),
            ack_delay_dense: Duration::from_millis(20),
            gap_delay: Duration::from_millis(300),
            answer_timeout: Duration::from_secs(2),
            ..ClientConfig::new(DeviceUid(uid), DeviceClass::Phone)
        };
        Self {
            name: name.to_owned(),
            endpoint: endpoint(folder),
            tls: client_tls(folder),
            kind: Kind::Quic,
            frames_max: 256,
            server,
            token: token(folder, name),
            ticket: None,
            half: Half::new(config, Restored::default()),
            started: Instant::now(),
            heard: Instant::now(),
            live: None,
            next_pseq: HashMap::new(),
            received: HashMap::new(),
            sent: HashMap::new(),
            acked: HashMap::new(),
            refused: Vec::new(),
            opened: Vec::new(),
            replies: Vec::new(),
            errors: Vec::new(),
            welcome: None,
            goaways: 0,
            events: Vec::new(),
            receipts: Vec::new(),
            gaps: Vec::new(),
            heads: Vec::new(),
            connects: 0,
            ended: None,
        }
    }

    /// A phone that takes little in while it does nothing: what it is owed stays at the gateway.
    pub fn narrow(name: &str, folder: &Path, server: SocketAddr) -> Self {
        let endpoint = endpoint_with(folder, Some(64 << 10));
        Self { endpoint, frames_max: 8, ..Self::new(name, folder, server) }
    }

    /// From now on it connects by `kind`.
    pub fn by(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    /// From now on its gateway is at another address.
    pub const fn meet(&mut self, server: SocketAddr) {
        self.server = server;
    }

    pub fn now(&self) -> Duration {
        self.started.elapsed()
    }

    pub fn is_connected(&self) -> bool {
        self.live.is_some()
    }

    pub fn unacked(&self) -> usize {
        self.half.unacked()
    }

    /// Sends a frame in a datagram, past the session half.
    pub fn datagram(&self, frame: &Frame) {
        self.live.as_ref().unwrap().connection.send_datagram(frame.to_bytes()).unwrap();
    }

    /// The port it sends from.
    pub fn port(&self) -> u16 {
        self.endpoint.local_addr().unwrap().port()
    }

    /// Goes on from another port, as after a change of network.
    pub fn move_to_another_port(&self) {
        let socket = std::net::UdpSocket::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
        self.endpoint.rebind(socket).unwrap();
    }

    pub fn has_room(&self) -> bool {
        self.half.has_room()
    }

    pub fn set_token(&mut self, token: String) {
        self.token = token;
        self.ticket = None;
    }

    /// One attempt to connect; says HELLO. `false`: nobody there.
    pub async fn connect(&mut self) -> bool {
        self.disconnect();
        let connecting = async {
            match self.kind {
                Kind::Quic => match self.endpoint.connect(self.server, SERVER_NAME) {
                    Ok(connecting) => Ok(Connection::from(connecting.await?)),
                    Err(error) => Err(ConnectionError::Lost(error.to_string().into())),
                },
                kind => connect_stream(kind, &self.tls, self.server)
                    .await
                    .map_err(|error| ConnectionError::Lost(error.into())),
            }
        };
        let connection = match tokio::time::timeout(Duration::from_secs(2), connecting).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => {
                self.ended = Some(error);
                return false;
            }
            Err(_) => return false,
        };
        let (sender, frames) = mpsc::channel(self.frames_max);
        let Ok((control, control_in)) = connection.open_bi().await else { return false };
        let Ok(uplink) = connection.open_uni().await else { return false };
        let readers = vec![
            tokio::spawn(read_stream(control_in, Some(Channel::Control), sender.clone())),
            tokio::spawn(accept_streams(connection.clone(), sender.clone())),
            tokio::spawn(read_datagrams(connection.clone(), sender)),
        ];
        let mut live = Live { connection, control, uplink, frames, readers };
        let mut header = BytesMut::new();
        Channel::Control.header().unwrap().encode(&mut header);
        let control = live.control.write_all(&header).await;
        header.clear();
        Channel::Uplink.header().unwrap().encode(&mut header);
        if control.is_err() || live.uplink.write_all(&header).await.is_err() {
            return false;
        }
        self.live = Some(live);
        self.heard = Instant::now();
        self.connects += 1;
        let proof = match &self.ticket {
            Some(ticket) => AuthProof::ticket(ticket),
            None => AuthProof::Token(self.token.clone()),
        };
        self.half.connect(proof, NetworkHint::default(), self.now());
        self.flush().await;
        true
    }

    /// Connects, and waits for the WELCOME.
    pub async fn go_online(&mut self) {
        self.welcome = None;
        assert!(self.connect().await, "{}: no connection: {:?}", self.name, self.ended);
        self.until(|phone| phone.welcome.is_some()).await;
    }

    pub fn disconnect(&mut self) {
        if let Some(live) = self.live.take() {
            self.ended = live.connection.close_reason();
            drop(live);
            self.half.disconnected(self.now());
        }
    }

    /// Works until `done`, at most 10 s.
    pub async fn until(&mut self, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !done(self) {
            assert!(Instant::now() < deadline, "waited too long: {}", self.describe());
            self.step(Duration::from_millis(50)).await;
        }
    }

    /// Where it stands, for a test that fails.
    pub fn describe(&self) -> String {
        format!(
            "{}: connected {} ({} times), unsettled {:?}, refused {:?}, ended {:?}, errors {:?}, gaps {:?}, received {:?}",
            self.name,
            self.is_connected(),
            self.connects,
            self.unsettled(),
            self.refused,
            self.ended,
            self.errors,
            self.gaps,
            self.received.iter().map(|(c, r)| (*c, r.len())).collect::<Vec<_>>()
        )
    }

    /// Time since the gateway said anything.
    pub fn silence(&self) -> Duration {
        self.heard.elapsed()
    }

    /// Sends that were neither acked nor refused, in order.
    fn unsettled(&self) -> Vec<(ConversationId, Pseq)> {
        let refused = |key: &(ConversationId, Pseq)| {
            self.refused.iter().any(|refused| (refused.conversation, refused.pseq) == *key)
        };
        let mut unsettled: Vec<_> =
            self.sent.keys().filter(|key| !self.acked.contains_key(key) && !refused(key)).copied().collect();
        unsettled.sort_unstable();
        unsettled
    }

    /// Works for a while.
    pub async fn work(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.step(end.saturating_duration_since(Instant::now()).min(Duration::from_millis(20))).await;
        }
    }

    /// Sends what is due, then waits at most `wait` for one frame and handles it.
    pub async fn step(&mut self, wait: Duration) {
        self.flush().await;
        let now = self.now();
        let timer = self.half.poll_timeout().map_or(wait, |due| due.saturating_sub(now).min(wait));
        let Some(live) = &mut self.live else {
            tokio::time::sleep(wait.min(Duration::from_millis(10))).await;
            return;
        };
        match tokio::time::timeout(timer.max(Duration::from_millis(1)), live.frames.recv()).await {
            Ok(Some((channel, frame))) => {
                self.heard = Instant::now();
                let now = self.now();
                self.half.handle(channel, frame, now).unwrap_or_else(|violation| {
                    panic!("{}: the gateway broke the protocol: {violation}", self.name)
                });
            }
            Ok(None) => self.disconnect(),
            Err(_) => {
                let now = self.now();
                self.half.handle_timeout(now);
            }
        }
        self.flush().await;
    }

    async fn flush(&mut self) {
        let mut out: Vec<(Channel, Frame)> = Vec::new();
        let mut close = false;
        while let Some(output) = self.half.poll_output() {
            match output {
                Output::Transmit(channel, frame) => out.push((channel, frame)),
                Output::Welcomed(welcome) => {
                    self.ticket = Some(welcome.ticket.0.clone());
                    self.welcome = Some(*welcome);
                    // It goes on with this connection.
                    let now = self.now();
                    self.half.ping(now);
                }
                Output::NewEpoch { unsettled, .. } => {
                    assert!(unsettled.is_empty(), "{}: lost its epoch", self.name)
                }
                Output::Deliver(deliver) => {
                    let (conversation, seq) = (deliver.conversation, deliver.seq);
                    self.received.entry(conversation).or_default().push(deliver);
                    let now = self.now();
                    self.half.committed(conversation, seq, now);
                }
                Output::Gap { conversation, from, to } => self.gaps.push((conversation, from, to)),
                Output::Acked { conversation, pseq, seq, .. } => {
                    assert!(
                        self.acked.insert((conversation, pseq), seq).is_none(),
                        "{}: acked twice",
                        self.name
                    );
                }
                Output::Refused(refused) => self.refused.push(refused),
                Output::Opened(opened) => self.opened.push(opened),
                Output::Replied(reply) => self.replies.push(reply),
                Output::Event(event) => self.events.push(event),
                Output::Receipts(receipts) => self.receipts.extend(receipts),
                Output::Goaway(_) => self.goaways += 1,
                Output::Failed(error) | Output::RequestRefused(error) => self.errors.push(error),
                Output::Close(_) => close = true,
                Output::Heads(heads) => self.heads.extend(heads),
                Output::Page(_) | Output::Kicked(_) | Output::Rtt(_) => {}
            }
        }
        let mut failed = close;
        if let Some(live) = &mut self.live {
            let (mut control, mut uplink) = (BytesMut::new(), BytesMut::new());
            for (channel, frame) in out {
                match channel {
                    Channel::Control => frame.encode(&mut control),
                    Channel::Uplink => frame.encode(&mut uplink),
                    _ => drop(live.connection.send_datagram(frame.to_bytes())),
                }
            }
            failed |= live.control.write_all(&control).await.is_err();
            failed |= live.uplink.write_all(&uplink).await.is_err();
        }
        if failed {
            self.disconnect();
        }
    }

    /// Queues a message and returns its number.
    pub fn send(&mut self, conversation: ConversationId, payload: impl Into<Bytes>) -> Pseq {
        self.send_frame(SendFrame {
            kind: RecordKind::Message,
            conversation,
            pseq: Pseq::FIRST,
            seen: self.half.cursor(conversation),
            reference: None,
            ttl: None,
            more: false,
            continues: false,
            silent: false,
            cancel: false,
            payload: payload.into(),
        })
    }

    /// Queues a send under the next number of its conversation.
    pub fn send_frame(&mut self, mut send: SendFrame) -> Pseq {
        let next = self.next_pseq.entry(send.conversation).or_insert(Pseq::FIRST);
        let pseq = *next;
        *next = next.next().unwrap();
        send.pseq = pseq;
        self.sent.insert((send.conversation, pseq), send.payload.clone());
        let now = self.now();
        self.half.send(send, now).unwrap();
        pseq
    }

    /// Opens a conversation and returns its number.
    pub async fn open(&mut self, target: OpenTarget) -> Opened {
        let before = self.opened.len();
        let now = self.now();
        self.half.open(target, false, now);
        self.until(|phone| phone.opened.len() > before).await;
        self.opened[before].clone()
    }

    pub async fn direct(&mut self, with: &str) -> ConversationId {
        self.open(OpenTarget::Direct(with.to_owned())).await.conversation
    }

    /// Calls the built-in service.
    pub async fn call<T: serde::de::DeserializeOwned>(
        &mut self,
        method: fulmar_protocol::service::Method,
        body: &impl serde::Serialize,
    ) -> Result<T, fulmar_protocol::close::RefusalCode> {
        use fulmar_protocol::{frame::CallStatus, service};
        let before = self.replies.len();
        let body = service::encode(body).unwrap();
        let now = self.now();
        self.half.call(service::BUILTIN, method as u32, body, Duration::from_secs(5), now);
        self.until(|phone| phone.replies.len() > before).await;
        let reply = &self.replies[before];
        match reply.status {
            CallStatus::Ok => Ok(service::decode(&reply.body).expect("a reply of the method's type")),
            CallStatus::Refused(code) => Err(code),
        }
    }

    pub fn half(&mut self) -> &mut Half {
        &mut self.half
    }

    /// Payloads received in a conversation, messages only, in order.
    pub fn messages(&self, conversation: ConversationId) -> Vec<String> {
        let received = self.received.get(&conversation).into_iter().flatten();
        let messages = received.filter(|record| record.kind == RecordKind::Message);
        messages.map(|record| String::from_utf8_lossy(&record.payload).into_owned()).collect()
    }
}

async fn read_stream(
    mut stream: RecvStream,
    channel: Option<Channel>,
    sender: mpsc::Sender<(Channel, Frame)>,
) {
    let mut decoder = Decoder::new(channel.map_or(1 << 16, Channel::frame_limit).max(1 << 16));
    // The answering half of the control stream has no header: the client opened it.
    let (mut kind, mut index) = match channel {
        Some(_) => (Some(0), Some(0)),
        None => (None, None),
    };
    while let Ok(Some(chunk)) = stream.read_chunk(64 * 1024).await {
        decoder.push(chunk);
        if kind.is_none() {
            kind = decoder.next_varint();
        }
        if kind.is_some() && index.is_none() {
            index = decoder.next_varint();
        }
        let (Some(kind), Some(index)) = (kind, index) else { continue };
        let header = (StreamHeader { kind, index }).channel().expect("a stream the protocol knows");
        assert!(channel.is_none_or(|channel| channel == header));
        while let Some(frame) = decoder.next().expect("frames of the gateway decode") {
            if sender.send((header, frame)).await.is_err() {
                return;
            }
        }
    }
}

async fn accept_streams(connection: Connection, sender: mpsc::Sender<(Channel, Frame)>) {
    let mut streams = tokio::task::JoinSet::new();
    while let Ok(stream) = connection.accept_uni().await {
        streams.spawn(read_stream(stream, None, sender.clone()));
    }
}

async fn read_datagrams(connection: Connection, sender: mpsc::Sender<(Channel, Frame)>) {
    while let Ok(datagram) = connection.read_datagram().await {
        let mut decoder = Decoder::new(2_000);
        decoder.push(datagram);
        while let Some(frame) = decoder.next().expect("datagrams of the gateway decode") {
            if sender.send((Channel::Datagram, frame)).await.is_err() {
                return;
            }
        }
    }
}
