//! A small gateway for tests: real QUIC and the real session half, logs in memory, and faults on demand.
//!
//! Not here: everything a gateway has to be besides (`gateway/tests` runs the clients against the real one).

use std::{
    collections::{BTreeMap, HashMap, HashSet, hash_map::Entry},
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use fulmar_client::Trust;
use fulmar_protocol::{
    close::{CloseCode, RefusalCode},
    frame::{
        AuthProof, Block, Bytes8, CallStatus, Channel, ConversationClass, Decoder, Deliver, Error, Frame,
        Goaway, Hello, Limits, OpenTarget, Opened, Origin, Receipt, Receipts, Reply, Resumption, SendRefused,
        StreamHeader, Welcome, WireTime,
    },
    id::{
        ClassEpoch, ConversationId, DeviceId, DeviceUid, Epoch, FolderId, Pseq, RequestId, Seq, SessionId,
        UnixMillis, UserId,
    },
    producer::{Decision, Lane, fingerprint},
    service::{self, Method, Names, NamesFound},
    session::gateway::{Gateway, GatewayConfig, Output},
    version::{ALPN, Features},
};
use quinn::{Connection, Endpoint, SendStream, VarInt};
use tokio::{
    net::UdpSocket,
    sync::{mpsc, watch},
};

/// Faults, switched on by tests.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    /// Appends sends but closes the connection instead of acking, this many times.
    pub(crate) cut_before_ack: u32,
    /// Refuses every send for good.
    pub(crate) refuse_sends: bool,
    /// Refuses tickets.
    pub(crate) refuse_tickets: bool,
    /// Says nothing more on connections that are up, and accepts none.
    pub(crate) mute: bool,
}

struct Log {
    members: HashSet<UserId>,
    name: String,
    records: Vec<(Deliver, DeviceId, Epoch, Pseq)>,
    lanes: HashMap<(UserId, DeviceId, Epoch), Lane>,
    read: HashMap<UserId, Seq>,
}

#[derive(Default)]
struct World {
    users: Vec<String>,
    devices: HashMap<DeviceUid, (UserId, DeviceId, Epoch)>,
    logs: BTreeMap<ConversationId, Log>,
    epochs: u64,
    faults: Faults,
    connections: u64,
    /// The data folder its WELCOMEs name.
    folder: Option<FolderId>,
    live: Vec<Connection>,
}

impl World {
    fn user(&mut self, name: &str) -> UserId {
        let index = self.users.iter().position(|user| user == name).unwrap_or_else(|| {
            self.users.push(name.to_owned());
            self.users.len() - 1
        });
        UserId::new(256 * (index as u64 + 1)).unwrap()
    }

    fn name(&self, user: UserId) -> String {
        self.users[usize::try_from(user.get() / 256 - 1).unwrap()].clone()
    }
}

/// A running gateway.
#[derive(Clone)]
pub(crate) struct Scripted {
    world: Arc<Mutex<World>>,
    news: watch::Sender<u64>,
    pub(crate) address: SocketAddr,
    certificate: Vec<u8>,
    key: Vec<u8>,
    endpoint: Arc<Mutex<Option<Endpoint>>>,
    goaway: watch::Sender<u64>,
    started: Instant,
}

impl Scripted {
    pub(crate) async fn start() -> Self {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let gateway = Self {
            world: Arc::default(),
            news: watch::Sender::new(0),
            address: "127.0.0.1:0".parse().unwrap(),
            certificate: made.cert.der().to_vec(),
            key: made.signing_key.serialize_der(),
            endpoint: Arc::default(),
            goaway: watch::Sender::new(0),
            started: Instant::now(),
        };
        gateway.listen()
    }

    fn listen(mut self) -> Self {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![self.certificate.clone().into()],
                rustls::pki_types::PrivateKeyDer::Pkcs8(self.key.clone().into()),
            )
            .unwrap();
        tls.alpn_protocols = vec![ALPN.to_vec()];
        let tls = quinn::crypto::rustls::QuicServerConfig::try_from(tls).unwrap();
        let config = quinn::ServerConfig::with_crypto(Arc::new(tls));
        let endpoint = Endpoint::server(config, self.address).unwrap();
        self.address = endpoint.local_addr().unwrap();
        *self.endpoint.lock().unwrap() = Some(endpoint.clone());
        let gateway = self.clone();
        tokio::spawn(async move {
            while let Some(incoming) = endpoint.accept().await {
                let gateway = gateway.clone();
                tokio::spawn(async move {
                    if gateway.world.lock().unwrap().faults.mute {
                        incoming.ignore();
                    } else if let Ok(connection) = incoming.await {
                        gateway.world.lock().unwrap().live.push(connection.clone());
                        Session::serve(gateway, connection).await;
                    }
                });
            }
        });
        self
    }

    pub(crate) fn trust(&self) -> Trust {
        Trust::Certificate(self.certificate.clone())
    }

    pub(crate) fn faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.world.lock().unwrap().faults);
    }

    /// Welcomed connections so far.
    pub(crate) fn connections(&self) -> u64 {
        self.world.lock().unwrap().connections
    }

    /// Closes every connection.
    pub(crate) fn cut(&self, code: CloseCode) {
        for connection in std::mem::take(&mut self.world.lock().unwrap().live) {
            connection.close(VarInt::from_u32(code.code()), b"cut");
        }
    }

    pub(crate) fn say_goaway(&self) {
        self.goaway.send_modify(|count| *count += 1);
    }

    /// From now on it works on another data folder, with a log of its own and nobody in it.
    pub(crate) fn move_to(&self, folder: FolderId) {
        let mut world = self.world.lock().unwrap();
        (world.folder, world.logs, world.devices) = (Some(folder), BTreeMap::new(), HashMap::new());
    }

    /// Whether anybody has opened or said anything in its data folder.
    pub(crate) fn is_untouched(&self) -> bool {
        self.world.lock().unwrap().logs.is_empty()
    }

    /// Payloads of all messages of a conversation, in order.
    pub(crate) fn log(&self, conversation: ConversationId) -> Vec<Bytes> {
        let world = self.world.lock().unwrap();
        world.logs[&conversation].records.iter().map(|(record, ..)| record.payload.clone()).collect()
    }

    /// How far a user has read.
    pub(crate) fn read(&self, user: &str, conversation: ConversationId) -> Option<Seq> {
        let mut world = self.world.lock().unwrap();
        let user = world.user(user);
        world.logs[&conversation].read.get(&user).copied()
    }

    /// Forgets the epochs it handed out.
    pub(crate) fn forget_devices(&self) {
        for (_, _, epoch) in self.world.lock().unwrap().devices.values_mut() {
            *epoch = Epoch::ZERO;
        }
    }
}

/// A road between clients and a gateway that can go dark.
pub(crate) struct Road {
    pub(crate) address: SocketAddr,
    dark: Arc<AtomicBool>,
}

impl Road {
    pub(crate) async fn to(gateway: &Scripted) -> Self {
        let front = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let road = Self { address: front.local_addr().unwrap(), dark: Arc::default() };
        let (dark, there) = (Arc::clone(&road.dark), gateway.address);
        tokio::spawn(async move {
            let mut backs: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
            let mut packet = vec![0; 2_048];
            while let Ok((length, from)) = front.recv_from(&mut packet).await {
                if let Entry::Vacant(entry) = backs.entry(from) {
                    let back = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
                    back.connect(there).await.unwrap();
                    entry.insert(Arc::clone(&back));
                    let (front, dark) = (Arc::clone(&front), Arc::clone(&dark));
                    tokio::spawn(async move {
                        let mut packet = vec![0; 2_048];
                        while let Ok(length) = back.recv(&mut packet).await {
                            if !dark.load(Ordering::Relaxed) {
                                let _ = front.send_to(&packet[..length], from).await;
                            }
                        }
                    });
                }
                if !dark.load(Ordering::Relaxed) {
                    let _ = backs[&from].send(&packet[..length]).await;
                }
            }
        });
        road
    }

    pub(crate) fn dark(&self, dark: bool) {
        self.dark.store(dark, Ordering::Relaxed);
    }
}

struct Session {
    gateway: Scripted,
    half: Gateway,
    connection: Connection,
    control: SendStream,
    lane: Option<SendStream>,
    backlog: Option<SendStream>,
    user: UserId,
    device: DeviceId,
    epoch: Epoch,
    /// How far each conversation was written to this client; `None`: the client's cursors are not known yet.
    sent: Option<HashMap<ConversationId, Seq>>,
}

impl Session {
    async fn serve(gateway: Scripted, connection: Connection) {
        let Ok((control, answers)) = connection.accept_bi().await else { return };
        let (frames, mut inbox) = mpsc::channel(64);
        tokio::spawn(read(answers, frames.clone()));
        let uplinks = connection.clone();
        tokio::spawn(async move {
            while let Ok(uplink) = uplinks.accept_uni().await {
                tokio::spawn(read(uplink, frames.clone()));
            }
        });
        let mut news = gateway.news.subscribe();
        let mut goaway = gateway.goaway.subscribe();
        let now = gateway.started.elapsed();
        let mut session = Self {
            half: Gateway::new(GatewayConfig { grease: 5, ..GatewayConfig::default() }, now),
            gateway,
            connection,
            control,
            lane: None,
            backlog: None,
            user: UserId::default(),
            device: DeviceId::ZERO,
            epoch: Epoch::ZERO,
            sent: None,
        };
        loop {
            if session.carry_out().await.is_none() || session.push().await.is_none() {
                return;
            }
            tokio::select! {
                frame = inbox.recv() => match frame {
                    Some((channel, frame)) => {
                        if session.gateway.world.lock().unwrap().faults.mute {
                            continue;
                        }
                        let now = session.gateway.started.elapsed();
                        session.half.handle(channel, frame, now).expect("the client keeps to the protocol");
                    }
                    None => return,
                },
                _ = news.changed() => {}
                _ = goaway.changed() => {
                    let now = session.gateway.started.elapsed();
                    let goaway = Goaway { code: CloseCode::Draining, deadline_ms: 5_000, spread_ms: 10,
                        addresses: Vec::new(), text: String::new() };
                    session.half.drain(goaway, now);
                }
            }
        }
    }

    async fn carry_out(&mut self) -> Option<()> {
        while let Some(output) = self.half.poll_output() {
            let now = self.gateway.started.elapsed();
            match output {
                Output::Transmit(frame) => self.control.write_all(&frame.to_bytes()).await.ok()?,
                Output::Datagram(frame) => drop(self.connection.send_datagram(frame.to_bytes())),
                Output::Authenticate(hello) => self.authenticate(&hello, now),
                Output::Send(send) => self.send(&send)?,
                Output::Mark(mark) => {
                    let mut world = self.gateway.world.lock().unwrap();
                    let log = world.logs.get_mut(&mark.conversation)?;
                    log.read.insert(self.user, mark.read);
                }
                Output::Cursors(cursors) => {
                    self.sent = Some(cursors.entries.into_iter().collect());
                }
                Output::Open(open) => self.open(open.id, &open.target),
                Output::Pull(pull) => {
                    let block = {
                        let world = self.gateway.world.lock().unwrap();
                        let log = world.logs.get(&pull.conversation)?;
                        let records: Vec<_> = log
                            .records
                            .iter()
                            .map(|record| shown(record, self.user))
                            .filter(|record| record.seq >= pull.from && record.seq <= pull.to)
                            .take(64)
                            .collect();
                        Block {
                            pull: pull.id,
                            last: true,
                            conversation: pull.conversation,
                            low: Seq::FIRST,
                            head: Seq::new(log.records.len() as u64)?,
                            first: pull.from,
                            records,
                        }
                    };
                    self.write(Channel::Backlog, &Frame::Block(block)).await?;
                }
                Output::Call(call) => self.call(call.id, call.method, &call.body),
                Output::Close { code, .. } => {
                    self.control.finish().ok()?;
                    // The frames before get a moment to arrive.
                    let _ = tokio::time::timeout(Duration::from_millis(200), self.control.stopped()).await;
                    self.connection.close(VarInt::from_u32(code.code()), b"");
                    return None;
                }
                Output::Ack(ack) => self.receipts(&ack.entries),
                Output::Reauthenticate(_) | Output::Event(_) | Output::Flush => {}
            }
        }
        Some(())
    }

    fn authenticate(&mut self, hello: &Hello, now: Duration) {
        let mut world = self.gateway.world.lock().unwrap();
        let name = match &hello.auth {
            AuthProof::Token(token) => token.clone(),
            AuthProof::Ticket(ticket) if !world.faults.refuse_tickets => {
                String::from_utf8(ticket.0.clone()).unwrap()
            }
            AuthProof::Ticket(_) => {
                let error = error(RefusalCode::BadTicket, RequestId::ZERO);
                return self.half.reject(error, CloseCode::AuthFailed, now);
            }
        };
        if name == "nobody" {
            let error = error(RefusalCode::BadToken, RequestId::ZERO);
            return self.half.reject(error, CloseCode::AuthFailed, now);
        }
        self.user = world.user(&name);
        let number = DeviceId::new(world.devices.len() as u64 + 1).unwrap();
        world.epochs += 1;
        let fresh = Epoch::new(world.epochs).unwrap();
        let device = world.devices.entry(hello.device).or_insert((self.user, number, Epoch::ZERO));
        if device.2 == Epoch::ZERO || hello.epoch != device.2 {
            device.2 = fresh;
        }
        (_, self.device, self.epoch) = *device;
        world.connections += 1;
        let known = hello.cursor_digest != 0;
        self.sent = (!known).then(HashMap::new);
        let welcome = Welcome {
            minor: 0,
            features: Features::OURS.without(Features::ACKS_ARE_ECHOES).0,
            session: SessionId::FIRST,
            ticket: Bytes8(name.into_bytes()),
            user: self.user,
            device: self.device,
            epoch: self.epoch,
            class_epoch: ClassEpoch::FIRST,
            server_time: clock(),
            lanes: 4,
            limits: Limits::default(),
            keepalive_ms: (1_000, 60_000),
            resumption: if known { Resumption::NeedCursors } else { Resumption::Fresh },
            addresses: Vec::new(),
            folder: world.folder,
        };
        drop(world);
        self.half.welcome(welcome, now);
    }

    fn send(&mut self, send: &fulmar_protocol::frame::Send) -> Option<()> {
        let mut world = self.gateway.world.lock().unwrap();
        let faults = world.faults;
        let log = world.logs.get_mut(&send.conversation).expect("a conversation that was opened");
        let key = (self.user, self.device, self.epoch);
        let lane = log.lanes.entry(key).or_insert_with(|| Lane::new(self.epoch));
        let refuse = |code, expected| SendRefused {
            conversation: send.conversation,
            pseq: send.pseq,
            code,
            expected,
            retry_after_ms: 10,
        };
        match lane.offer(self.epoch, send.pseq, fingerprint(send)) {
            Decision::Append if faults.refuse_sends || send.cancel => {
                lane.consumed(send.pseq);
                let code = if send.cancel { RefusalCode::Cancelled } else { RefusalCode::NotAllowed };
                self.half.refused(refuse(code, send.pseq.next()?));
            }
            Decision::Append => {
                let seq = Seq::new(log.records.len() as u64 + 1)?;
                lane.appended(send.pseq, seq, fingerprint(send));
                let record = Deliver {
                    kind: send.kind,
                    conversation: send.conversation,
                    seq,
                    sender: self.user,
                    time: WireTime::Full(clock()),
                    origin: (send.more || send.continues).then_some(Origin {
                        device: self.device,
                        epoch: self.epoch,
                        pseq: send.pseq,
                    }),
                    reference: send.reference,
                    ttl: send.ttl,
                    more: send.more,
                    continues: send.continues,
                    silent: send.silent,
                    payload: Bytes::copy_from_slice(&send.payload),
                };
                log.records.push((record, self.device, self.epoch, send.pseq));
                self.gateway.news.send_modify(|news| *news += 1);
                if faults.cut_before_ack > 0 {
                    world.faults.cut_before_ack -= 1;
                    self.connection.close(VarInt::from_u32(CloseCode::Internal.code()), b"cut before ack");
                    return None;
                }
                drop(world);
                self.half.acked(send.conversation, send.pseq, seq, clock());
            }
            Decision::Again { seq: Some(seq) } => {
                self.half.acked(send.conversation, send.pseq, seq, clock());
            }
            Decision::Again { seq: None } => self.half.settled(send.conversation, send.pseq, clock()),
            Decision::Early { expected } => self.half.refused(refuse(RefusalCode::OutOfOrder, expected)),
            Decision::Conflict => panic!("other bytes under a number that was used: {send:?}"),
            Decision::Stale { .. } => panic!("a send of an old epoch"),
        }
        Some(())
    }

    fn open(&mut self, id: RequestId, target: &OpenTarget) {
        let mut world = self.gateway.world.lock().unwrap();
        let found = match target {
            OpenTarget::Number(number) => Some(*number),
            OpenTarget::Direct(name) if name == "ghost" => None,
            OpenTarget::Direct(name) => {
                let peer = world.user(name);
                let members = HashSet::from([self.user, peer]);
                let number = world.logs.iter().find(|(_, log)| log.members == members).map(|(n, _)| *n);
                Some(number.unwrap_or_else(|| {
                    let number = ConversationId::new(256 * (world.logs.len() as u64 + 1)).unwrap();
                    let log = Log {
                        members,
                        name: String::new(),
                        records: Vec::new(),
                        lanes: HashMap::new(),
                        read: HashMap::new(),
                    };
                    world.logs.insert(number, log);
                    number
                }))
            }
            OpenTarget::Group(_) | OpenTarget::Broadcast(_) => None,
        };
        let Some((number, log)) = found.and_then(|number| Some((number, world.logs.get(&number)?))) else {
            drop(world);
            return self.half.transmit(Frame::Error(error(RefusalCode::UnknownUser, id)));
        };
        let peer = log.members.iter().copied().find(|user| *user != self.user).unwrap_or(self.user);
        let opened = Opened {
            id,
            conversation: number,
            class: ConversationClass::Direct,
            name: world.name(peer),
            peer,
            head: Seq::new(log.records.len() as u64).unwrap(),
            count: log.records.len() as u64,
            low: Seq::FIRST,
            joined: Seq::ZERO,
            read: log.read.get(&self.user).copied().unwrap_or_default(),
            last_pseq: Pseq::ZERO,
        };
        assert!(log.name.is_empty(), "there are only direct conversations here");
        drop(world);
        self.half.transmit(Frame::Opened(opened));
    }

    fn call(&mut self, id: RequestId, method: u32, body: &[u8]) {
        let (status, body) = if method == Method::Names as u32 {
            let names: Names = service::decode(body).unwrap();
            let world = self.gateway.world.lock().unwrap();
            let names = names.users.into_iter().map(|user| (user, world.name(user))).collect();
            (CallStatus::Ok, service::encode(&NamesFound { names }).unwrap())
        } else {
            (CallStatus::Refused(RefusalCode::UnknownService), Bytes::from_static(b"not here"))
        };
        self.half.transmit(Frame::Reply(Reply { id, status, body }));
    }

    /// Tells nobody else but the one who is connected here: its own ACK comes back as the peer's receipt would.
    fn receipts(&mut self, acked: &[(ConversationId, Seq)]) {
        let world = self.gateway.world.lock().unwrap();
        let mut entries = Vec::new();
        for (conversation, recv) in acked {
            for user in world.logs[conversation].members.iter().filter(|user| **user != self.user) {
                let read = world.logs[conversation].read.get(user).copied().unwrap_or_default();
                entries.push(Receipt { conversation: *conversation, user: *user, recv: *recv, read });
            }
        }
        drop(world);
        self.half.transmit(Frame::Receipts(Receipts { entries }));
    }

    /// Writes the records this client does not have.
    async fn push(&mut self) -> Option<()> {
        let mut due = Vec::new();
        {
            let world = self.gateway.world.lock().unwrap();
            let Some(sent) = self.sent.as_mut().filter(|_| !world.faults.mute) else { return Some(()) };
            for (number, log) in world.logs.iter().filter(|(_, log)| log.members.contains(&self.user)) {
                let from = sent.entry(*number).or_insert(Seq::ZERO);
                let skip = usize::try_from(from.get()).ok()?;
                due.extend(log.records.iter().skip(skip).map(|record| shown(record, self.user)));
                *from = Seq::new(log.records.len() as u64)?;
            }
        }
        for record in due {
            self.write(Channel::Lane(0), &Frame::Deliver(record)).await?;
        }
        self.carry_out_boxed().await
    }

    fn carry_out_boxed(&mut self) -> std::pin::Pin<Box<dyn Future<Output = Option<()>> + Send + '_>> {
        Box::pin(self.carry_out())
    }

    async fn write(&mut self, channel: Channel, frame: &Frame) -> Option<()> {
        let slot = if channel == Channel::Backlog { &mut self.backlog } else { &mut self.lane };
        let mut bytes = BytesMut::new();
        if slot.is_none() {
            *slot = Some(self.connection.open_uni().await.ok()?);
            channel.header().unwrap().encode(&mut bytes);
        }
        frame.encode(&mut bytes);
        slot.as_mut()?.write_all(&bytes).await.ok()
    }
}

fn shown((record, device, epoch, pseq): &(Deliver, DeviceId, Epoch, Pseq), user: UserId) -> Deliver {
    let origin = Origin { device: *device, epoch: *epoch, pseq: *pseq };
    Deliver { origin: if record.sender == user { Some(origin) } else { record.origin }, ..record.clone() }
}

fn error(code: RefusalCode, refers: RequestId) -> Error {
    Error { code, refers, retry: code.retry(), retry_after_ms: 0, text: String::new() }
}

fn clock() -> UnixMillis {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    UnixMillis::new(u64::try_from(now.as_millis()).unwrap()).unwrap()
}

async fn read(mut stream: quinn::RecvStream, frames: mpsc::Sender<(Channel, Frame)>) {
    let mut decoder = Decoder::new(Channel::Uplink.frame_limit());
    let mut header = Vec::new();
    while let Ok(Some(chunk)) = stream.read_chunk(64 * 1024, true).await {
        decoder.push(chunk.bytes);
        while header.len() < 2 {
            let Some(number) = decoder.next_varint() else { break };
            header.push(number);
        }
        let [kind, index] = header[..] else { continue };
        let channel = StreamHeader { kind, index }.channel().expect("a stream a client may open");
        while let Some(frame) = decoder.next().expect("frames") {
            if frames.send((channel, frame)).await.is_err() {
                return;
            }
        }
    }
}
