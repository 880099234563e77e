//! A phone without a disk: the protocol's client half over quinn, in one task without queues in between.
//!
//! - What is delivered counts as committed at once, so ACKs leave as a real phone's would.
//! - A gap is nothing to stop at: who joins a group later never gets what was before. Benches count what must come.
//! - [`Phone::next`] may be dropped at any await: nothing is lost or written twice.
//!
//! Not here: reconnecting, the outbox (the SDK has them).

use std::{
    cell::RefCell,
    collections::{HashMap, VecDeque},
    future::poll_fn,
    net::SocketAddr,
    pin::Pin,
    task::{Context as TaskContext, Poll},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, bail};
use bytes::{Buf as _, Bytes, BytesMut};
use fulmar_gateway::{
    config::{DEMO_APP, DEV_ISSUER},
    data_folder::{DevKey, open_dev_key},
    identity::token::{Mint, mint},
};
use fulmar_protocol::{
    close::Retry,
    frame::{
        AuthProof, Bytes8, CallStatus, Channel, Decoder, Deliver, Frame, NetworkHint, OpenTarget, RecordKind,
        Send, SendRefused, StreamHeader,
    },
    id::{ConversationId, DeviceClass, DeviceUid, Pseq, Seq, UnixMillis, UserId},
    service::{
        self, ChangeMembers, CreateGroup, GroupCreated, ListMembers, MemberPage, MembersChanged, Method,
    },
    session::client::{Client, ClientConfig, Output, Restored},
};

/// Bytes read from a stream at once.
const READ_BYTES: usize = 8 * 1024;

thread_local! {
    /// What all phones of a thread read into, one after the other.
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES].into());
}

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(30);

/// Makes tokens for a gateway's data folder.
#[derive(Debug)]
pub struct Tokens(DevKey);

impl Tokens {
    /// With the folder's development key.
    ///
    /// # Errors
    /// The key can't be read.
    pub fn of(folder: &std::path::Path) -> anyhow::Result<Self> {
        Ok(Self(open_dev_key(folder)?))
    }

    /// A token for `user`, good for an hour.
    ///
    /// # Errors
    /// The name may not be.
    pub fn mint(&self, user: &str) -> anyhow::Result<String> {
        self.mint_for(DEMO_APP, user)
    }

    /// The same, of another app that takes tokens of the development key.
    ///
    /// # Errors
    /// The name may not be.
    pub fn mint_for(&self, app: &str, user: &str) -> anyhow::Result<String> {
        let now = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?;
        let now = UnixMillis::new(now).context("the clock is beyond the end of time")?;
        Ok(mint(&self.0, Mint { app, issuer: DEV_ISSUER, user, ttl_s: 3_600 }, now)?)
    }
}

/// What a bench wants to know.
#[derive(Clone, Debug)]
pub enum Seen {
    /// A record came.
    Delivered(Deliver),
    /// A send is durable.
    Acked(ConversationId, Pseq),
    /// A send was refused for good, or for now.
    Refused(Box<SendRefused>),
    /// Anything else.
    Other(Box<Output>),
}

/// How a server is reached.
#[derive(Debug)]
pub struct Road<'a> {
    /// From here.
    pub endpoint: &'a quinn::Endpoint,
    /// To there.
    pub server: SocketAddr,
    /// With TLS of its own, sessions included; the endpoint's unless given.
    pub config: Option<quinn::ClientConfig>,
    /// What is said first leaves as early data; there must be a TLS session.
    pub early: bool,
}

impl<'a> Road<'a> {
    /// With what the endpoint has, nothing early.
    #[must_use]
    pub const fn to(endpoint: &'a quinn::Endpoint, server: SocketAddr) -> Self {
        Self { endpoint, server, config: None, early: false }
    }

    /// A connection; where it may speak before the end of the handshake, also what waits for that, and says whether early data was
    /// taken.
    ///
    /// # Errors
    /// There is none, or early data was to be sent and there is no session for it.
    pub async fn open(self) -> anyhow::Result<(quinn::Connection, Option<quinn::ZeroRttAccepted>)> {
        let Self { endpoint, server, config, early } = self;
        let connecting = match config {
            Some(config) => endpoint.connect_with(config, server, "localhost")?,
            None => endpoint.connect(server, "localhost")?,
        };
        if !early {
            return Ok((connecting.await?, None));
        }
        match connecting.into_0rtt() {
            Ok((connection, accepted)) => Ok((connection, Some(accepted))),
            Err(_) => bail!("no TLS session that allows early data"),
        }
    }
}

struct Incoming {
    channel: Option<Channel>,
    kind: Option<u64>,
    stream: quinn::RecvStream,
    decoder: Decoder,
}

struct Outgoing {
    stream: Option<quinn::SendStream>,
    bytes: BytesMut,
}

type Accepting =
    Pin<Box<dyn Future<Output = Result<quinn::RecvStream, quinn::ConnectionError>> + core::marker::Send>>;

type Receiving = Pin<Box<dyn Future<Output = Result<Bytes, quinn::ConnectionError>> + core::marker::Send>>;

/// See the module's text.
pub struct Phone {
    half: Client,
    begin: Instant,
    connection: quinn::Connection,
    incoming: Vec<Incoming>,
    accepting: Accepting,
    datagram: Receiving,
    control: Outgoing,
    uplink: Outgoing,
    seen: VecDeque<Seen>,
    /// The last number of each lane.
    lanes: HashMap<ConversationId, Pseq>,
    newest: HashMap<ConversationId, Seq>,
    /// What the next connection proves itself with.
    ticket: Bytes8,
    watched: Watched,
}

/// What happened to sends that the protocol's half deals with by itself.
#[derive(Debug, Default)]
struct Watched {
    /// When each send left for the last time, if anybody asks.
    left: Option<HashMap<(ConversationId, Pseq), Instant>>,
    /// Sends that were refused for now.
    put_off: u64,
}

impl core::fmt::Debug for Phone {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Phone").field("half", &self.half).finish_non_exhaustive()
    }
}

impl Phone {
    /// Connects and waits for the WELCOME.
    ///
    /// # Errors
    /// It was not let in.
    pub async fn connect(
        endpoint: &quinn::Endpoint,
        gateway: SocketAddr,
        token: String,
        uid: u128,
    ) -> anyhow::Result<Self> {
        Self::connect_by(Road::to(endpoint, gateway), token, uid).await
    }

    /// The same by a road of its own.
    ///
    /// # Errors
    /// It was not let in.
    pub async fn connect_by(road: Road<'_>, token: String, uid: u128) -> anyhow::Result<Self> {
        let config = ClientConfig::new(DeviceUid(uid.to_be_bytes()), DeviceClass::Phone);
        let half = Client::new(config, Restored::default());
        let begun = Self::begin(half, Instant::now(), AuthProof::Token(token), road).await;
        begun.map_err(|(_, error)| error)
    }

    async fn begin(
        mut half: Client,
        begin: Instant,
        auth: AuthProof,
        road: Road<'_>,
    ) -> Result<Self, (Box<Client>, anyhow::Error)> {
        let opening = async {
            let (connection, completed) = road.open().await?;
            let streams = connection.open_bi().await?;
            anyhow::Ok((connection, completed, streams))
        };
        let (connection, completed, (send, recv)) = match opening.await {
            Ok(opened) => opened,
            Err(error) => return Err((Box::new(half), error)),
        };
        half.connect(auth, NetworkHint::default(), begin.elapsed());
        let (accepting, datagram) = (accept(&connection), receive(&connection));
        let mut phone = Self {
            half,
            begin,
            connection,
            // We opened the control stream and named it; its other half has no header.
            incoming: vec![Incoming {
                channel: Some(Channel::Control),
                kind: None,
                stream: recv,
                decoder: Decoder::new(Channel::Control.frame_limit()),
            }],
            accepting,
            datagram,
            control: Outgoing::new(Channel::Control, Some(send)),
            uplink: Outgoing::new(Channel::Uplink, None),
            seen: VecDeque::new(),
            lanes: HashMap::new(),
            newest: HashMap::new(),
            ticket: Bytes8::default(),
            watched: Watched::default(),
        };
        let welcomed = phone.answer(|output| match output {
            Output::Welcomed(welcome) => Some(welcome.ticket.clone()),
            _ => None,
        });
        let mut welcomed = welcomed.await.context("no WELCOME");
        if let Some(completed) = completed
            && !completed.await
            && welcomed.is_ok()
        {
            welcomed = Err(anyhow::anyhow!("early data was not taken"));
        }
        match welcomed {
            Ok(ticket) => {
                phone.ticket = ticket;
                Ok(phone)
            }
            Err(error) => Err((Box::new(phone.leave().half), error)),
        }
    }

    /// Leaves this connection, and makes the next one with what it knows: its ticket, its cursors, what is not acked.
    ///
    /// # Errors
    /// It was not let in.
    pub async fn reconnect(self, endpoint: &quinn::Endpoint, gateway: SocketAddr) -> anyhow::Result<Self> {
        self.leave().reconnect(endpoint, gateway).await.map_err(|(_, error)| error)
    }

    /// Leaves this connection.
    #[must_use]
    pub fn leave(self) -> Away {
        let Self { mut half, begin, connection, lanes, newest, ticket, .. } = self;
        half.disconnected(begin.elapsed());
        connection.close(0u8.into(), b"");
        Away { half, begin, lanes, newest, ticket }
    }

    fn now(&self) -> Duration {
        self.begin.elapsed()
    }

    /// Queues a message; it leaves in [`Self::next`]. `false`: there is no room now.
    ///
    /// # Errors
    /// The numbers are used up.
    pub fn send(&mut self, conversation: ConversationId, payload: Bytes) -> anyhow::Result<bool> {
        Ok(self.post(conversation, payload)?.is_some())
    }

    /// The same, and says under which number it leaves.
    ///
    /// # Errors
    /// The numbers are used up.
    pub fn post(&mut self, conversation: ConversationId, payload: Bytes) -> anyhow::Result<Option<Pseq>> {
        if !self.half.has_room() {
            return Ok(None);
        }
        let last = self.lanes.get(&conversation).copied().unwrap_or(Pseq::ZERO);
        let pseq = last.next().context("no more numbers")?;
        let send = Send {
            kind: RecordKind::Message,
            conversation,
            pseq,
            seen: self.newest.get(&conversation).copied().unwrap_or(Seq::ZERO),
            reference: None,
            ttl: None,
            more: false,
            continues: false,
            silent: false,
            cancel: false,
            payload,
        };
        let now = self.now();
        let taken = self.half.send(send, now).is_ok();
        if taken {
            self.lanes.insert(conversation, pseq);
        }
        Ok(taken.then_some(pseq))
    }

    /// Keeps when sends leave from now on; whoever calls this asks for each by [`Self::left`].
    pub fn watch_sends(&mut self) {
        self.watched.left.get_or_insert_default();
    }

    /// When an acked send had left, for the last time if the gateway did not take it before. Answers once.
    pub fn left(&mut self, conversation: ConversationId, pseq: Pseq) -> Option<Instant> {
        self.watched.left.as_mut()?.remove(&(conversation, pseq))
    }

    /// Sends that were refused for now since the last call. They leave again by themselves when the time has come that they
    /// were told.
    pub fn take_put_off(&mut self) -> u64 {
        std::mem::take(&mut self.watched.put_off)
    }

    /// Sends that are not acked.
    #[must_use]
    pub fn unacked(&self) -> usize {
        self.half.unacked()
    }

    /// The direct conversation with the user of this name.
    ///
    /// # Errors
    /// It was refused.
    pub async fn open_direct(&mut self, with: &str) -> anyhow::Result<ConversationId> {
        self.open(OpenTarget::Direct(with.to_owned())).await
    }

    /// The broadcast of this name.
    ///
    /// # Errors
    /// It was refused.
    pub async fn open_broadcast(&mut self, name: &str) -> anyhow::Result<ConversationId> {
        self.open(OpenTarget::Broadcast(name.to_owned())).await
    }

    async fn open(&mut self, target: OpenTarget) -> anyhow::Result<ConversationId> {
        let now = self.now();
        let id = self.half.open(target, true, now);
        self.answer(|output| match output {
            Output::Opened(opened) if opened.id == id => Some(Ok(opened.conversation)),
            Output::RequestRefused(error) if error.refers == id => Some(Err(anyhow::anyhow!("{error:?}"))),
            _ => None,
        })
        .await?
    }

    /// Has a conversation on screen from now on: its records come as they are, however large it is. The answer is something
    /// else that is [`Seen`].
    pub fn look_at(&mut self, conversation: ConversationId) {
        let now = self.now();
        self.half.open(OpenTarget::Number(conversation), true, now);
    }

    /// Makes a group of us and `members`, as many calls as that takes.
    ///
    /// # Errors
    /// It was refused.
    pub async fn create_group(&mut self, name: &str, members: &[String]) -> anyhow::Result<ConversationId> {
        let mut pages = members.chunks(service::PAGE_MAX);
        let first = pages.next().unwrap_or_default().to_vec();
        let body = service::encode(&CreateGroup { name: name.to_owned(), members: first });
        let group: GroupCreated = self.call(Method::CreateGroup, body).await?;
        for page in pages {
            self.add_members(group.conversation, page).await?;
        }
        Ok(group.conversation)
    }

    /// Adds members to a group of ours, at most [`service::PAGE_MAX`] at once.
    ///
    /// # Errors
    /// It was refused, or some were members before.
    pub async fn add_members(&mut self, to: ConversationId, members: &[String]) -> anyhow::Result<()> {
        let change = ChangeMembers { conversation: to, members: members.to_vec() };
        let changed: MembersChanged = self.call(Method::AddMembers, service::encode(&change)).await?;
        anyhow::ensure!(changed.changed as usize == members.len(), "only {} were added", changed.changed);
        Ok(())
    }

    /// A page of a conversation's members: those after `after`, in the order of their numbers.
    ///
    /// # Errors
    /// It was refused.
    pub async fn members(&mut self, of: ConversationId, after: UserId) -> anyhow::Result<MemberPage> {
        let page = ListMembers { conversation: of, after };
        self.call(Method::ListMembers, service::encode(&page)).await
    }

    async fn call<T: serde::de::DeserializeOwned>(
        &mut self,
        method: Method,
        body: Option<Bytes>,
    ) -> anyhow::Result<T> {
        let body = body.context("the call does not fit a frame")?;
        let now = self.now();
        let id = self.half.call(service::BUILTIN, method as u32, body, ANSWER, now);
        let reply = self
            .answer(|output| match output {
                Output::Replied(reply) if reply.id == id => Some(reply.clone()),
                _ => None,
            })
            .await?;
        anyhow::ensure!(reply.status == CallStatus::Ok, "{method:?}: {:?}", reply.status);
        service::decode(&reply.body).context("the answer can't be read")
    }

    /// Waits for one answer; records and acks that come meanwhile are kept for [`Self::next`].
    async fn answer<T>(&mut self, mut found: impl FnMut(&Output) -> Option<T>) -> anyhow::Result<T> {
        let mut kept = VecDeque::new();
        let waiting = async {
            loop {
                match self.next().await? {
                    Seen::Other(output) => {
                        if let Some(answer) = found(&output) {
                            return Ok(answer);
                        }
                        if let Output::Failed(error) = *output {
                            bail!("{error:?}");
                        }
                    }
                    seen => kept.push_back(seen),
                }
            }
        };
        let answer = tokio::time::timeout(ANSWER, waiting).await.context("no answer")?;
        kept.append(&mut self.seen);
        self.seen = kept;
        answer
    }

    /// What happens next.
    ///
    /// # Errors
    /// The connection ended, or the gateway broke the protocol.
    pub async fn next(&mut self) -> anyhow::Result<Seen> {
        loop {
            self.carry_out()?;
            // Frames first: what is seen may make the caller wait for something else.
            self.control.flush(&self.connection).await?;
            self.uplink.flush(&self.connection).await?;
            if let Some(seen) = self.seen.pop_front() {
                return Ok(seen);
            }
            let sleep = self.half.poll_timeout().map(|at| at.saturating_sub(self.now()));
            let input = poll_fn(|cx| self.poll_input(cx));
            match sleep {
                Some(sleep) => match tokio::time::timeout(sleep, input).await {
                    Ok(input) => input?,
                    Err(_) => {
                        let now = self.now();
                        self.half.handle_timeout(now);
                    }
                },
                None => input.await?,
            }
        }
    }

    fn carry_out(&mut self) -> anyhow::Result<()> {
        let now = self.now();
        while let Some(output) = self.half.poll_output() {
            match output {
                Output::Transmit(Channel::Control, frame) => frame.encode(&mut self.control.bytes),
                Output::Transmit(Channel::Uplink, frame) => {
                    if let (Frame::Send(send), Some(left)) = (&frame, &mut self.watched.left) {
                        left.insert((send.conversation, send.pseq), Instant::now());
                    }
                    frame.encode(&mut self.uplink.bytes);
                }
                // Full, or not supported: it is lost, as datagrams may be.
                Output::Transmit(Channel::Datagram, frame) => {
                    let _ = self.connection.send_datagram(frame.to_bytes());
                }
                Output::Transmit(channel, _) => bail!("nothing is sent on {}", channel.name()),
                Output::Deliver(deliver) => {
                    self.newest.insert(deliver.conversation, deliver.seq);
                    self.half.committed(deliver.conversation, deliver.seq, now);
                    self.seen.push_back(Seen::Delivered(deliver));
                }
                Output::Acked { conversation, pseq, .. } => {
                    self.seen.push_back(Seen::Acked(conversation, pseq));
                }
                Output::Refused(refused) => self.seen.push_back(Seen::Refused(Box::new(refused))),
                Output::Close(code) => bail!("the session ended: {code:?}"),
                other => self.seen.push_back(Seen::Other(Box::new(other))),
            }
        }
        Ok(())
    }

    fn poll_input(&mut self, cx: &mut TaskContext<'_>) -> Poll<anyhow::Result<()>> {
        while let Poll::Ready(accepted) = self.accepting.as_mut().poll(cx) {
            let stream = accepted?;
            // The limit is set when the stream has said what it is.
            self.incoming.push(Incoming { channel: None, kind: None, stream, decoder: Decoder::new(0) });
            self.accepting = accept(&self.connection);
        }
        let now = self.begin.elapsed();
        let mut moved = false;
        while let Poll::Ready(datagram) = self.datagram.as_mut().poll(cx) {
            let mut decoder = Decoder::new(Channel::Datagram.frame_limit());
            decoder.push(datagram?);
            while let Some(frame) = decoder.next()? {
                self.half.handle(Channel::Datagram, frame, now)?;
            }
            self.datagram = receive(&self.connection);
            moved = true;
        }
        for incoming in &mut self.incoming {
            let read = BUFFER.with_borrow_mut(|buffer| {
                let read = std::task::ready!(incoming.stream.poll_read(cx, buffer))?;
                if read == 0 {
                    return Poll::Ready(Err(anyhow::anyhow!("the gateway ended a stream")));
                }
                Poll::Ready(anyhow::Ok(Bytes::copy_from_slice(buffer.get(..read).unwrap_or_default())))
            });
            let Poll::Ready(bytes) = read else { continue };
            incoming.take(bytes?, &mut self.half, &mut self.watched, now)?;
            moved = true;
        }
        if moved { Poll::Ready(Ok(())) } else { Poll::Pending }
    }
}

fn receive(connection: &quinn::Connection) -> Receiving {
    let connection = connection.clone();
    Box::pin(async move { connection.read_datagram().await })
}

/// A phone that is not connected, and what it knows: its ticket, its cursors, what is not acked.
#[derive(Debug)]
pub struct Away {
    half: Client,
    begin: Instant,
    lanes: HashMap<ConversationId, Pseq>,
    newest: HashMap<ConversationId, Seq>,
    ticket: Bytes8,
}

impl Away {
    /// Connects again.
    ///
    /// # Errors
    /// It was not let in; it may try again.
    pub async fn reconnect(
        self,
        endpoint: &quinn::Endpoint,
        gateway: SocketAddr,
    ) -> Result<Phone, (Self, anyhow::Error)> {
        self.reconnect_by(Road::to(endpoint, gateway)).await
    }

    /// The same by a road of its own.
    ///
    /// # Errors
    /// It was not let in; it may try again.
    pub async fn reconnect_by(self, road: Road<'_>) -> Result<Phone, (Self, anyhow::Error)> {
        let Self { half, begin, lanes, newest, ticket } = self;
        match Phone::begin(half, begin, AuthProof::Ticket(ticket.clone()), road).await {
            Ok(next) => Ok(Phone { lanes, newest, ..next }),
            Err((half, error)) => Err((Self { half: *half, begin, lanes, newest, ticket }, error)),
        }
    }
}

fn accept(connection: &quinn::Connection) -> Accepting {
    let connection = connection.clone();
    Box::pin(async move { connection.accept_uni().await })
}

impl Incoming {
    fn take(
        &mut self,
        bytes: Bytes,
        half: &mut Client,
        watched: &mut Watched,
        now: Duration,
    ) -> anyhow::Result<()> {
        self.decoder.push(bytes);
        let channel = match self.channel {
            Some(channel) => channel,
            None => {
                if self.kind.is_none() {
                    self.kind = self.decoder.next_varint();
                }
                let Some(kind) = self.kind else { return Ok(()) };
                let Some(index) = self.decoder.next_varint() else { return Ok(()) };
                let channel = StreamHeader { kind, index }.channel()?;
                self.decoder.set_limit(channel.frame_limit());
                *self.channel.insert(channel)
            }
        };
        while let Some(frame) = self.decoder.next()? {
            if let Frame::SendRefused(refused) = &frame {
                watched.put_off += u64::from(refused.code.retry() != Retry::Never);
            }
            half.handle(channel, frame, now)?;
        }
        Ok(())
    }
}

impl Outgoing {
    fn new(channel: Channel, stream: Option<quinn::SendStream>) -> Self {
        let mut bytes = BytesMut::new();
        if let Some(header) = channel.header() {
            header.encode(&mut bytes);
        }
        Self { stream, bytes }
    }

    async fn flush(&mut self, connection: &quinn::Connection) -> anyhow::Result<()> {
        // A stream's header alone need not leave.
        if self.stream.is_none() {
            if self.bytes.len() <= 2 {
                return Ok(());
            }
            self.stream = Some(connection.open_uni().await?);
        }
        let Some(stream) = &mut self.stream else { return Ok(()) };
        while !self.bytes.is_empty() {
            let written = stream.write(&self.bytes).await?;
            self.bytes.advance(written);
        }
        Ok(())
    }
}
