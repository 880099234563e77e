//! The client's half of a session: it outlives connections and says again what was not confirmed.
//!
//! - A send stays until it is settled: acked, refused for good, or seen as its own echo under our epoch. On a new
//!   connection everything unsettled leaves again, in order; the gateway stores it once.
//! - A record is handed out once and in order, per conversation; the application says when it is on disk
//!   ([`Client::committed`]), and only then it is acknowledged.
//! - A cursor is *dirty* until the gateway is known to have it: it answered something that was sent after the ACK.
//!   Dirty cursors ride in the next HELLO.
//! - Before the WELCOME only what may be replayed leaves, at most the first flight of [`crate::limit`]; and no SEND
//!   while there is no epoch, for the gateway would store it under one we may never learn.
//! - A WELCOME under another epoch than ours ends the connection: sends on their way are numbered for the old one, and
//!   the gateway drops them.
//!
//! Not here: when to connect and where (the SDK's driver), what is on disk (the SDK's database).

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use core::time::Duration;

use bytes::Bytes;

use super::{
    acks,
    hedge::{Hedges, Left},
    inflight::{Inflight, Room, Settled, Wait},
    reading::Readers,
    request::{Ask, Requests},
    state::{ClientInput, ClientState, Step},
    timer::{Timer, Timers},
};
use crate::{
    close::{CloseCode, RefusalCode, Retry},
    error::Violation,
    frame::{
        Ack, Auth, AuthProof, Block, Call, CallStatus, Channel, Cursors, Deliver, Error, Event, Frame,
        Goaway, Head, Hello, Kicked, Limits, Mark, NetworkHint, Open, OpenTarget, Opened, Origin, Ping,
        PingFlags, Pong, Pull, Receipt, Reply, Resumption, Send, SendAck, SendRefused, Side, Welcome,
        WireTime,
    },
    id::{
        ConversationId, DeviceClass, DeviceId, DeviceUid, Epoch, FolderId, Pseq, RequestId, Seq, ServiceId,
        UnixMillis, UserId,
    },
    limit::{
        ACK_DELAY, ACK_DELAY_DENSE, ACK_EVERY, BLOCK_RECORDS_MAX, DATAGRAM_BYTES_MAX, ENTRIES_PER_FRAME_MAX,
        FIRST_FLIGHT_BYTES_MAX, FIRST_FLIGHT_FRAMES_MAX, FIRST_FLIGHT_SENDS_MAX, HELLO_BYTES_MAX, MARKS_MAX,
        PING_PADDING_BYTES_MAX, REORDER_BYTES_MAX, REORDER_RECORDS_MAX,
    },
    version::{Features, MINOR},
};

/// PINGs whose answers are waited for; of more, the oldest are forgotten.
const PINGS_MAX: usize = 16;

/// Sends that go along with one nudge.
const ALONG_MAX: usize = 4;

/// Bytes of the first flight kept for requests and read cursors.
const FIRST_FLIGHT_RESERVE: usize = 8 * 1024;

/// What may be set.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// The SDK database's own name.
    pub device: DeviceUid,
    /// What kind of device it is.
    pub class: DeviceClass,
    /// What the SDK can do.
    pub features: Features,
    /// From one ACK to the next, while records keep coming. The first one after a pause leaves at once.
    pub ack_delay: Duration,
    /// The same while they keep coming so densely that the last ACK was for more than one arrival.
    pub ack_delay_dense: Duration,
    /// Commits after which an ACK does not wait.
    pub ack_every: usize,
    /// Silence after which a PING leaves; held to the range of the WELCOME.
    pub keepalive: Duration,
    /// From the HELLO to its answer.
    pub hello_timeout: Duration,
    /// From a PING to a sign of life.
    pub answer_timeout: Duration,
    /// The round trip of the network as it was before, if it is known: what is lost at first is noticed sooner. One that
    /// comes with [`Client::connect`] replaces it.
    pub initial_rtt: Option<Duration>,
    /// How long a hole may stay before it is pulled.
    pub gap_delay: Duration,
    /// Records of one conversation that may wait for their predecessors.
    pub reorder_records: usize,
    /// Bytes of all records that wait.
    pub reorder_bytes: usize,
    /// Seed of the feature bits that mean nothing (see [`Features::GREASE`]); the driver draws it.
    pub grease: u64,
}

impl ClientConfig {
    /// The defaults.
    #[must_use]
    pub fn new(device: DeviceUid, class: DeviceClass) -> Self {
        Self {
            device,
            class,
            features: Features::OURS,
            ack_delay: ACK_DELAY,
            ack_delay_dense: ACK_DELAY_DENSE,
            ack_every: ACK_EVERY,
            keepalive: Duration::from_secs(30),
            hello_timeout: Duration::from_secs(10),
            answer_timeout: Duration::from_secs(10),
            initial_rtt: None,
            gap_delay: Duration::from_secs(1),
            reorder_records: REORDER_RECORDS_MAX,
            reorder_bytes: REORDER_BYTES_MAX,
            grease: 0,
        }
    }
}

/// What the SDK's database knows of earlier times.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// The epoch of the last WELCOME; zero before the first.
    pub epoch: Epoch,
    /// The own device's number of the last WELCOME.
    pub device: Option<DeviceId>,
    /// Every conversation and the last seq committed.
    pub cursors: Vec<(ConversationId, Seq)>,
    /// Conversations whose cursor the gateway may not know. May be left empty: the digest finds out, at the price of
    /// sending all cursors.
    pub dirty: Vec<ConversationId>,
    /// Unsettled sends, ascending by pseq within a conversation; they may have left. At most
    /// [`crate::limit::OUTBOX_SENDS_MAX`], the rest follows by [`Client::send`] as there is room.
    pub unacked: Vec<Send>,
    /// Read cursors the gateway may not know.
    pub marks: Vec<(ConversationId, Seq)>,
}

/// What the driver and the application are to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Write this frame to this channel.
    Transmit(Channel, Frame),
    /// The session is open.
    Welcomed(Box<Welcome>),
    /// Keep this epoch. From none to the first: all goes on, `unsettled` is empty. From one to another: the half has
    /// forgotten every send and closes; number what is unsettled from 1 again, give it to [`Client::send`], connect.
    NewEpoch {
        /// The epoch to send under.
        epoch: Epoch,
        /// Sends of the old epoch that may have left, and so may be stored or not.
        unsettled: Vec<(ConversationId, Pseq)>,
        /// The data folder that gave it. In another one than the client's, the sends may not be given again: their numbers mean
        /// something else there.
        folder: Option<FolderId>,
    },
    /// The next record of its conversation.
    Deliver(Deliver),
    /// These records can't be had any more.
    Gap {
        /// Where.
        conversation: ConversationId,
        /// The first.
        from: Seq,
        /// The last.
        to: Seq,
    },
    /// A send is stored.
    Acked {
        /// Where.
        conversation: ConversationId,
        /// Which.
        pseq: Pseq,
        /// Its record; `None`: settled so long ago that the gateway does not remember, the echo tells.
        seq: Option<Seq>,
        /// The gateway's time of the ack, not before the record's.
        time: UnixMillis,
    },
    /// A send will never be stored.
    Refused(SendRefused),
    /// Answers an open.
    Opened(Opened),
    /// Answers a call.
    Replied(Reply),
    /// Answers a pull of the application; the last block is marked.
    Page(Block),
    /// How far members have come.
    Receipts(Vec<Receipt>),
    /// How far conversations have come; what is missing is being pulled.
    Heads(Vec<Head>),
    /// Something that is not stored.
    Event(Event),
    /// An open or a pull of the application was refused.
    RequestRefused(Error),
    /// The gateway is leaving: open the next connection, then leave this one.
    Goaway(Goaway),
    /// The device is logged out: do not connect again until the user acts.
    Kicked(Kicked),
    /// The HELLO or an AUTH was refused.
    Failed(Error),
    /// A round trip of the session's own, queueing included.
    Rtt(Duration),
    /// Close the connection, then call [`Client::disconnected`].
    Close(CloseCode),
}

#[derive(Clone, Copy, Debug)]
struct Marked {
    read: Seq,
    /// It left on this connection.
    sent: bool,
    order: u64,
}

#[derive(Clone, Copy, Debug)]
struct PingSent {
    id: u64,
    at: Duration,
    /// ACKs that had left before it.
    acks: u64,
}

/// See the module's text.
#[derive(Debug)]
pub struct Client {
    config: ClientConfig,
    state: ClientState,
    epoch: Epoch,
    device: Option<DeviceId>,
    user: Option<UserId>,
    limits: Limits,
    features: Features,
    keepalive: Duration,
    inflight: Inflight,
    /// SENDs that may have been lost alone.
    hedges: Hedges<Pseq, ()>,
    /// Bytes that left since the hedges were last told.
    left: usize,
    readers: Readers,
    requests: Requests,
    /// Cursors the gateway may not know; the number of the ACK that told it, if one has left on this connection.
    dirty: BTreeMap<ConversationId, Option<u64>>,
    /// Dirty cursors that no ACK of this connection has named.
    due: BTreeSet<ConversationId>,
    /// Dirty cursors that were not told on any connection.
    untold: BTreeSet<ConversationId>,
    /// Own records that were made from SEND_ACKs and are not committed.
    made: BTreeSet<(ConversationId, Seq)>,
    /// Records of others that were committed since the last ACK.
    commits: u64,
    /// How often there were any.
    arrivals: u64,
    acks_sent: u64,
    /// Until then an ACK waits for more; nothing, if none has left on this connection.
    ack_waits: Option<Duration>,
    /// The changed cursors of the last HELLO.
    told: Vec<(ConversationId, Seq)>,
    marks: BTreeMap<ConversationId, Marked>,
    marks_due: BTreeSet<ConversationId>,
    marks_seen: u64,
    pings: VecDeque<PingSent>,
    pings_sent: u64,
    /// Frames that may still leave before the WELCOME.
    first_flight: usize,
    timers: Timers,
    /// The gateway's clock and ours at the WELCOME.
    clock: Option<(UnixMillis, Duration)>,
    outputs: VecDeque<Output>,
}

impl Client {
    /// A half without a connection.
    #[must_use]
    pub fn new(config: ClientConfig, restored: Restored) -> Self {
        let mut inflight = Inflight::new();
        for send in restored.unacked {
            inflight.insert(send, true);
        }
        let readers =
            Readers::new(restored.cursors, config.reorder_records, config.reorder_bytes, config.gap_delay);
        let keepalive = config.keepalive;
        let hedges = Hedges::new(config.initial_rtt);
        let mut client = Self {
            config,
            state: ClientState::Offline,
            epoch: restored.epoch,
            device: restored.device,
            user: None,
            limits: Limits::default(),
            features: Features::default(),
            keepalive,
            inflight,
            hedges,
            left: 0,
            readers,
            requests: Requests::new(),
            untold: restored.dirty.iter().copied().collect(),
            dirty: restored.dirty.into_iter().map(|conversation| (conversation, None)).collect(),
            due: BTreeSet::new(),
            made: BTreeSet::new(),
            commits: 0,
            arrivals: 0,
            acks_sent: 0,
            ack_waits: None,
            told: Vec::new(),
            marks: BTreeMap::new(),
            marks_due: BTreeSet::new(),
            marks_seen: 0,
            pings: VecDeque::new(),
            pings_sent: 0,
            first_flight: 0,
            timers: Timers::default(),
            clock: None,
            outputs: VecDeque::new(),
        };
        for (conversation, read) in restored.marks {
            client.remember_mark(conversation, read);
        }
        client
    }

    /// Where it is.
    #[must_use]
    pub const fn phase(&self) -> ClientState {
        self.state
    }

    /// The epoch sends are numbered under; zero before the first WELCOME.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The own device's number, once it was welcomed.
    #[must_use]
    pub const fn device(&self) -> Option<DeviceId> {
        self.device
    }

    /// The committed cursor of a conversation.
    #[must_use]
    pub fn cursor(&self, conversation: ConversationId) -> Seq {
        self.readers.cursor(conversation)
    }

    /// Conversations whose committed cursor the gateway may not know.
    pub fn dirty(&self) -> impl Iterator<Item = ConversationId> + '_ {
        self.dirty.keys().copied()
    }

    /// Read cursors the gateway may not know.
    pub fn marks(&self) -> impl Iterator<Item = (ConversationId, Seq)> + '_ {
        self.marks.iter().map(|(conversation, marked)| (*conversation, marked.read))
    }

    /// Sends that are not settled.
    #[must_use]
    pub fn unacked(&self) -> usize {
        self.inflight.len()
    }

    /// Whether [`Self::send`] takes one more.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.inflight.has_room()
    }

    /// The smoothed round trip, the gateway's work included. `None`: nothing is known yet. Worth keeping per network:
    /// see [`ClientConfig::initial_rtt`] and [`NetworkHint::rtt_ms`].
    #[must_use]
    pub const fn rtt(&self) -> Option<Duration> {
        self.hedges.rtt().smoothed()
    }

    /// How long an answer may take before its question counts as lost: `max(17/16 srtt, srtt + 4 rttvar, 40 ms)`. `None`:
    /// nothing is known yet.
    #[must_use]
    pub fn overdue_after(&self) -> Option<Duration> {
        self.hedges.rtt().overdue_after()
    }

    /// Copies of SENDs that left in datagrams because their answers were overdue, ever.
    #[must_use]
    pub const fn hedged(&self) -> u64 {
        self.hedges.copies()
    }

    /// There is a new connection: HELLO leaves, and after it what is unsettled.
    pub fn connect(&mut self, auth: AuthProof, network: NetworkHint, now: Duration) {
        self.connect_early(auth, network, now);
        self.reached(now);
    }

    /// The gateway answers on the connection that [`Self::connect_early`] was for: the time for its WELCOME runs from here.
    pub fn reached(&mut self, now: Duration) {
        if self.state == ClientState::Opening {
            self.timers.set(Timer::Hello, now + self.config.hello_timeout);
        }
    }

    /// There may be a new connection soon: the first flight is put out, to be written on every attempt to make one. It may
    /// be replayed. [`Self::reached`] says that there is one, [`Self::disconnected`] that there is none.
    pub fn connect_early(&mut self, auth: AuthProof, network: NetworkHint, now: Duration) {
        if self.state != ClientState::Offline {
            self.disconnected(now);
        }
        self.enter(ClientInput::Connect);
        if network.rtt_ms > 0 {
            self.hedges.reseed(Duration::from_millis(network.rtt_ms.into()));
        }
        let hello = self.hello(auth, network);
        self.told.clone_from(&hello.changed);
        self.push(Channel::Control, Frame::Hello(hello));
        self.first_flight = FIRST_FLIGHT_FRAMES_MAX;
        self.inflight.set_room(self.first_room());
        self.pump(now);
    }

    /// The first flight of a connection beside the one there is, to be written on every attempt to make it: HELLO, and what is
    /// unsettled. Nothing changes by it; [`Self::switch`] goes over to a connection on which it was written.
    #[must_use]
    pub fn prepare(&self, auth: AuthProof, network: NetworkHint) -> Vec<(Channel, Frame)> {
        let hello = self.hello(auth, network);
        let sends = self.inflight.first(self.first_room());
        let sends = sends.into_iter().map(|send| (Channel::Uplink, Frame::Send(send)));
        core::iter::once((Channel::Control, Frame::Hello(hello))).chain(sends).collect()
    }

    /// The gateway answers on a connection on which `flight`, made by [`Self::prepare`], was written. The one before is gone;
    /// what `flight` does not hold leaves on the new one.
    pub fn switch(&mut self, flight: &[(Channel, Frame)], now: Duration) {
        if self.state != ClientState::Offline {
            self.disconnected(now);
        }
        self.enter(ClientInput::Connect);
        self.first_flight = FIRST_FLIGHT_FRAMES_MAX.saturating_sub(flight.len());
        self.inflight.set_room(self.first_room());
        for (_, frame) in flight {
            match frame {
                Frame::Hello(hello) => self.told.clone_from(&hello.changed),
                Frame::Send(send) => self.inflight.said(send),
                _ => {}
            }
        }
        self.reached(now);
        self.pump(now);
    }

    fn hello(&self, auth: AuthProof, network: NetworkHint) -> Hello {
        let mut hello = Hello {
            minor: MINOR,
            features: self.config.features.0 | ((self.config.grease << 56) & Features::GREASE.0),
            auth,
            device: self.config.device,
            class: self.config.class,
            epoch: self.epoch,
            cursor_digest: self.readers.digest().0,
            changed: self.changed(),
            network,
        };
        while !hello.changed.is_empty() && Frame::Hello(hello.clone()).encoded_len() > HELLO_BYTES_MAX {
            hello.changed.truncate(hello.changed.len() / 2);
        }
        hello
    }

    /// Room for sends before the WELCOME.
    fn first_room(&self) -> Room {
        // Without an epoch nothing may be sent: the gateway hands one out at every such HELLO.
        let sends = if self.epoch == Epoch::ZERO { 0 } else { FIRST_FLIGHT_SENDS_MAX };
        Room {
            per_conversation: sends.min(usize::from(self.limits.inflight_per_conversation)),
            in_all: sends.min(usize::from(self.limits.inflight_per_producer)),
            bytes: FIRST_FLIGHT_BYTES_MAX - FIRST_FLIGHT_RESERVE,
        }
    }

    /// Dirty cursors for a HELLO, those first that were never told: the gateway has the others, as a rule.
    fn changed(&self) -> Vec<(ConversationId, Seq)> {
        if self.untold.len() > ENTRIES_PER_FRAME_MAX {
            // All of them will be asked for.
            return Vec::new();
        }
        let told = self.dirty.keys().filter(|conversation| !self.untold.contains(conversation));
        self.untold
            .iter()
            .chain(told)
            .take(ENTRIES_PER_FRAME_MAX)
            .map(|conversation| (*conversation, self.readers.cursor(*conversation)))
            .collect()
    }

    /// The connection is gone.
    pub fn disconnected(&mut self, _now: Duration) {
        self.enter(ClientInput::Disconnected);
        self.timers.clear_all();
        self.outputs.retain(|output| !matches!(output, Output::Transmit(..) | Output::Close(_)));
        self.inflight.disconnected();
        self.hedges.clear();
        self.left = 0;
        self.ack_waits = None;
        (self.commits, self.arrivals) = (0, 0);
        self.readers.disconnected();
        self.pings.clear();
        self.told.clear();
        self.due = self.dirty.keys().copied().collect();
        self.dirty.values_mut().for_each(|ack| *ack = None);
        self.marks.values_mut().for_each(|marked| marked.sent = false);
        self.marks_due = self.marks.keys().copied().collect();
        for id in self.requests.disconnected() {
            self.call_failed(id, RefusalCode::ConnectionLost);
        }
    }

    fn call_failed(&mut self, id: RequestId, code: RefusalCode) {
        let status = CallStatus::Refused(code);
        self.outputs.push_back(Output::Replied(Reply { id, status, body: Bytes::new() }));
    }

    /// Enters the state an input leads to; whether there was one.
    fn enter(&mut self, input: ClientInput) -> bool {
        match self.state.on(input) {
            Step::To(state) => {
                self.state = state;
                true
            }
            _ => false,
        }
    }

    /// Takes a frame of the gateway.
    ///
    /// # Errors
    /// The gateway broke the protocol; [`Output::Close`] is put out too.
    pub fn handle(&mut self, channel: Channel, frame: Frame, now: Duration) -> Result<(), Violation> {
        if matches!(self.state, ClientState::Offline | ClientState::Closing) {
            return Ok(());
        }
        self.heard(now);
        let taken = self.take(channel, frame, now);
        match taken {
            Ok(()) => self.pump(now),
            Err(violation) => self.close(violation.close_code()),
        }
        taken
    }

    /// Something of the gateway was authenticated by the transport: it is alive.
    pub fn heard(&mut self, now: Duration) {
        if self.state.is_welcomed() {
            self.timers.clear(Timer::Idle);
            self.timers.set(Timer::Ping, now + self.keepalive);
        }
    }

    fn close(&mut self, code: CloseCode) {
        if self.enter(ClientInput::Close) {
            self.end(code);
        }
    }

    fn end(&mut self, code: CloseCode) {
        self.timers.clear_all();
        self.hedges.clear();
        self.outputs.push_back(Output::Close(code));
    }

    fn take(&mut self, channel: Channel, frame: Frame, now: Duration) -> Result<(), Violation> {
        frame.check_channel(Side::Gateway, channel)?;
        let input = match &frame {
            Frame::Welcome(welcome) if self.epoch != Epoch::ZERO && welcome.epoch != self.epoch => {
                ClientInput::NewEpoch
            }
            Frame::Welcome(_) => ClientInput::Welcome,
            Frame::Deliver(_) | Frame::Block(_) | Frame::Event(_) | Frame::Ping(_) => ClientInput::Record,
            Frame::Error(error) if error.refers == RequestId::ZERO => ClientInput::Refused,
            Frame::Goaway(_) => ClientInput::Goaway,
            Frame::Kicked(_) => ClientInput::Kicked,
            _ => ClientInput::Control,
        };
        match self.state.on(input) {
            Step::To(state) => self.state = state,
            Step::Violation => {
                return Err(Violation::OutOfState { frame: frame.name(), state: self.state.name() });
            }
            Step::Hold | Step::Ignore => return Ok(()),
        }
        match frame {
            Frame::Welcome(welcome) if input == ClientInput::NewEpoch => self.renumber(&welcome),
            Frame::Welcome(welcome) => self.welcomed(welcome, now)?,
            Frame::Deliver(deliver) => {
                self.echo(&deliver, now);
                self.readers.record(deliver, now, &mut self.outputs);
            }
            Frame::Block(block) => self.block(block, now),
            Frame::SendAck(ack) => self.acked(channel, &ack, now)?,
            Frame::SendRefused(refused) => self.send_refused(refused, now),
            Frame::Heads(heads) => {
                for head in &heads.entries {
                    self.readers.head(*head, now);
                }
                self.outputs.push_back(Output::Heads(heads.entries));
            }
            Frame::Receipts(receipts) => {
                self.read_elsewhere(&receipts.entries);
                self.outputs.push_back(Output::Receipts(receipts.entries));
            }
            Frame::Opened(opened) => {
                if let Some((Ask::Open(open), acks)) = self.requests.answered(opened.id) {
                    self.confirm(acks);
                    if open.on_screen {
                        self.readers.show(opened.conversation);
                    }
                    self.outputs.push_back(Output::Opened(opened));
                }
            }
            Frame::Reply(reply) => {
                if let Some((Ask::Call(_), acks)) = self.requests.answered(reply.id) {
                    self.confirm(acks);
                    self.outputs.push_back(Output::Replied(reply));
                }
            }
            Frame::Error(error) => self.refused(error, now),
            Frame::Event(event) => self.outputs.push_back(Output::Event(event)),
            Frame::Ping(ping) => self.pong(ping, now),
            Frame::Pong(pong) => self.ponged(pong, now),
            Frame::Goaway(goaway) => self.outputs.push_back(Output::Goaway(goaway)),
            Frame::Kicked(kicked) => {
                self.outputs.push_back(Output::Kicked(kicked));
                self.end(CloseCode::Kicked);
            }
            Frame::Call(call) => {
                // This version offers no services of its own.
                let status = CallStatus::Refused(RefusalCode::UnknownService);
                self.push(Channel::Control, Frame::Reply(Reply { id: call.id, status, body: Bytes::new() }));
            }
            // `check_channel` lets no frame of a client through.
            frame => return Err(Violation::WrongChannel { frame: frame.name(), channel: channel.name() }),
        }
        Ok(())
    }

    fn welcomed(&mut self, welcome: Welcome, now: Duration) -> Result<(), Violation> {
        if welcome.minor > MINOR {
            return Err(Violation::Version);
        }
        self.device = Some(welcome.device);
        self.user = Some(welcome.user);
        self.limits = welcome.limits;
        self.features = Features(welcome.features).and(self.config.features);
        self.clock = Some((welcome.server_time, now));
        let (shortest, longest) = welcome.keepalive_ms;
        self.keepalive = self
            .config
            .keepalive
            .min(Duration::from_millis(longest.into()))
            .max(Duration::from_millis(shortest.into()))
            .max(Duration::from_secs(1));
        self.timers.clear(Timer::Hello);
        self.timers.set(Timer::Ping, now + self.keepalive);
        self.first_flight = usize::MAX;
        self.inflight.set_room(Room {
            per_conversation: welcome.limits.inflight_per_conversation.into(),
            in_all: welcome.limits.inflight_per_producer.into(),
            bytes: usize::MAX,
        });
        self.requests.set_calls_max(welcome.limits.calls_inflight.into());
        self.readers.welcomed(now);
        if self.epoch == Epoch::ZERO && welcome.epoch != Epoch::ZERO {
            self.epoch = welcome.epoch;
            self.outputs.push_back(Output::NewEpoch {
                epoch: self.epoch,
                unsettled: Vec::new(),
                folder: welcome.folder,
            });
        }
        // The first flight is behind this: what is overdue from here on was lost. How long its answers take says little.
        for send in self.inflight.flying().take(FIRST_FLIGHT_SENDS_MAX) {
            let (size, hedge) = self.hedgeable(send);
            let left = Left { size, hedge, timed: false, patience: Duration::ZERO };
            self.hedges.sent(send.conversation, send.pseq, (), left, now);
        }
        let resumption = welcome.resumption;
        self.outputs.push_back(Output::Welcomed(Box::new(welcome)));
        match resumption {
            Resumption::Resumed => {
                for (conversation, seq) in core::mem::take(&mut self.told) {
                    if self.readers.cursor(conversation) == seq {
                        self.dirty.remove(&conversation);
                        self.due.remove(&conversation);
                        self.untold.remove(&conversation);
                    }
                }
                // What was dirty and not told made no difference: the digests are equal.
                if !self.due.is_empty() {
                    self.timers.set_if_clear(Timer::Ack, now + self.config.ack_delay);
                }
            }
            Resumption::NeedCursors => self.send_cursors(),
            Resumption::Fresh => {
                for (conversation, _) in self.readers.cursors() {
                    self.dirty.insert(conversation, None);
                    self.due.insert(conversation);
                }
                self.flush_acks(now);
            }
        }
        Ok(())
    }

    /// Bytes of a SEND, and whether it may leave again in a datagram.
    fn hedgeable(&self, send: &Send) -> (usize, bool) {
        let size = Frame::Send(send.clone()).encoded_len();
        (size, size <= DATAGRAM_BYTES_MAX && self.features.has(Features::HEDGE))
    }

    /// The gateway gave this database another epoch: what was numbered under ours is void.
    fn renumber(&mut self, welcome: &Welcome) {
        self.device = Some(welcome.device);
        self.user = Some(welcome.user);
        self.epoch = welcome.epoch;
        let unsettled = self.inflight.forget();
        self.outputs.push_back(Output::NewEpoch { epoch: welcome.epoch, unsettled, folder: welcome.folder });
        self.end(CloseCode::Done);
    }

    fn send_cursors(&mut self) {
        let all: Vec<_> = self.readers.cursors().collect();
        self.acks_sent += 1;
        let mut frames: Vec<Vec<_>> = all.chunks(crate::frame::PAIRS_FIT).map(<[_]>::to_vec).collect();
        if frames.is_empty() {
            frames.push(Vec::new());
        }
        let count = frames.len();
        for (index, entries) in frames.into_iter().enumerate() {
            let last = index + 1 == count;
            self.push(Channel::Control, Frame::Cursors(Cursors { last, entries }));
        }
        self.due.clear();
        self.untold.clear();
        self.dirty.values_mut().for_each(|ack| *ack = Some(self.acks_sent));
    }

    /// An own record came back: its send is settled.
    fn echo(&mut self, deliver: &Deliver, now: Duration) {
        let Some(origin) = deliver.origin else { return };
        let ours = Some(deliver.sender) == self.user && Some(origin.device) == self.device;
        if !ours || origin.epoch != self.epoch {
            return;
        }
        let highest = self.inflight.highest_left(deliver.conversation);
        if highest.is_none_or(|highest| origin.pseq > highest) {
            return;
        }
        let time = deliver.time.expand(self.server_time(now));
        // Only this one: what came before it may have been refused, and that answer is on its way.
        if let Some(send) = self.inflight.remove(deliver.conversation, origin.pseq) {
            self.hedges.answered(deliver.conversation, origin.pseq, now);
            self.settled(Settled { send, seq: Some(deliver.seq) }, time);
        }
    }

    fn acked(&mut self, channel: Channel, ack: &SendAck, now: Duration) -> Result<(), Violation> {
        let Some(highest) = self.inflight.highest_left(ack.conversation) else { return Ok(()) };
        if ack.up_to > highest {
            return Err(Violation::BadAck);
        }
        let seqs: BTreeMap<Pseq, Seq> = acks::pairs(ack).take(crate::limit::OUTBOX_SENDS_MAX).collect();
        let settled = if channel == Channel::Datagram {
            // It overtakes: acks of what it does not name may be on their way.
            self.inflight.named(ack.conversation, &seqs)
        } else if seqs.is_empty() {
            self.inflight.forgotten(ack.conversation, ack.up_to)
        } else {
            self.inflight.acked(ack.conversation, ack.up_to, &seqs, now)
        };
        for settled in settled {
            match settled.seq {
                Some(_) => self.hedges.answered(ack.conversation, settled.send.pseq, now),
                None => self.hedges.forget(ack.conversation, settled.send.pseq),
            }
            let own = self.own_record(&settled, ack.time);
            let stored = settled.seq.filter(|seq| *seq != Seq::ZERO);
            self.settled(settled, ack.time);
            match (own, stored) {
                (Some(own), _) => {
                    if own.seq > self.readers.cursor(own.conversation) {
                        self.made.insert((own.conversation, own.seq));
                    }
                    self.readers.record(own, now, &mut self.outputs);
                }
                (None, Some(seq)) if self.features.has(Features::ACKS_ARE_ECHOES) => {
                    // What it was is not known here any more: it has to be asked for.
                    let conversation = ack.conversation;
                    self.readers.head(Head { conversation, head: seq, count: 0, low: Seq::ZERO }, now);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// An own record as its echo would bring it: what was sent, and what the gateway says of it. `None`: the gateway sends the
    /// echo, or what was stored is not what is known here.
    fn own_record(&self, settled: &Settled, time: UnixMillis) -> Option<Deliver> {
        let seq = settled.seq.filter(|seq| *seq != Seq::ZERO)?;
        let send = &settled.send;
        if !self.features.has(Features::ACKS_ARE_ECHOES) || send.cancel {
            return None;
        }
        Some(Deliver {
            kind: send.kind,
            conversation: send.conversation,
            seq,
            sender: self.user?,
            time: WireTime::Full(time),
            origin: Some(Origin { device: self.device?, epoch: self.epoch, pseq: send.pseq }),
            reference: send.reference,
            ttl: send.ttl,
            more: send.more,
            continues: send.continues,
            silent: send.silent,
            payload: send.payload.clone(),
        })
    }

    fn settled(&mut self, settled: Settled, time: UnixMillis) {
        let Settled { send, seq } = settled;
        let (conversation, pseq) = (send.conversation, send.pseq);
        self.outputs.push_back(if seq == Some(Seq::ZERO) {
            let code = if send.cancel { RefusalCode::Cancelled } else { RefusalCode::Consumed };
            let expected = pseq.saturating_add(1);
            Output::Refused(SendRefused { conversation, pseq, code, expected, retry_after_ms: 0 })
        } else {
            Output::Acked { conversation, pseq, seq, time }
        });
    }

    fn send_refused(&mut self, refused: SendRefused, now: Duration) {
        let SendRefused { conversation, pseq, code, retry_after_ms, .. } = refused;
        self.hedges.forget(conversation, pseq);
        match code.retry() {
            Retry::Never => {
                if self.inflight.remove(conversation, pseq).is_some() {
                    self.outputs.push_back(Output::Refused(refused));
                }
            }
            Retry::Same | Retry::OtherNode | Retry::AfterAuth => {
                let after = Duration::from_millis(retry_after_ms.into());
                let wait = Wait { after, busy: code == RefusalCode::Busy };
                self.inflight.postponed(conversation, pseq, wait, now);
            }
        }
    }

    fn block(&mut self, block: Block, now: Duration) {
        for record in &block.records {
            self.echo(record, now);
        }
        if block.pull == RequestId::ZERO {
            self.readers.block(block, now, &mut self.outputs);
        } else if self.requests.pulled(block.pull, &block) {
            self.outputs.push_back(Output::Page(block));
        } else {
            self.readers.pulled(block, now, &mut self.outputs);
        }
    }

    fn refused(&mut self, error: Error, now: Duration) {
        if error.refers == RequestId::ZERO {
            self.outputs.push_back(Output::Failed(error));
            return self.end(CloseCode::Done);
        }
        let retry = match error.retry {
            Retry::Never => None,
            Retry::Same | Retry::OtherNode | Retry::AfterAuth => {
                Some(Duration::from_millis(error.retry_after_ms.into()))
            }
        };
        if self.readers.refused(error.refers, retry, now).is_none()
            && self.requests.answered(error.refers).is_some()
        {
            self.outputs.push_back(Output::RequestRefused(error));
        }
    }

    fn read_elsewhere(&mut self, receipts: &[Receipt]) {
        for receipt in receipts {
            if Some(receipt.user) == self.user
                && self.marks.get(&receipt.conversation).is_some_and(|marked| marked.read <= receipt.read)
            {
                self.marks.remove(&receipt.conversation);
                self.marks_due.remove(&receipt.conversation);
            }
        }
    }

    fn server_time(&self, now: Duration) -> UnixMillis {
        self.clock
            .and_then(|(time, at)| {
                let elapsed = u64::try_from(now.saturating_sub(at).as_millis()).ok()?;
                UnixMillis::new(time.get().checked_add(elapsed)?)
            })
            .unwrap_or_default()
    }

    fn pong(&mut self, ping: Ping, now: Duration) {
        let waiting =
            self.outputs.iter().filter(|o| matches!(o, Output::Transmit(_, Frame::Pong(_)))).count();
        if waiting < PINGS_MAX {
            let server_time = self.server_time(now);
            let pong = Pong { id: ping.id, time_ms: ping.time_ms, server_time };
            self.push(Channel::Control, Frame::Pong(pong));
        }
    }

    fn ponged(&mut self, pong: Pong, now: Duration) {
        let Some(index) = self.pings.iter().position(|ping| ping.id == pong.id) else { return };
        let Some(ping) = self.pings.get(index).copied() else { return };
        self.pings.drain(..=index);
        let took = now.saturating_sub(ping.at);
        self.hedges.sample(took);
        self.outputs.push_back(Output::Rtt(took));
        self.confirm(ping.acks);
    }

    /// The gateway answered something that had left after `acks` ACKs: it has those.
    fn confirm(&mut self, acks: u64) {
        self.dirty.retain(|_, ack| ack.is_none_or(|ack| ack > acks));
    }

    /// Sends a change of a conversation; its number is the next of its lane, given by the caller's database. The same
    /// number again with `cancel` set takes the first one's place.
    ///
    /// # Errors
    /// Returns the send when there is no room ([`Self::has_room`]): send it again later, and nothing behind it before.
    pub fn send(&mut self, send: Send, now: Duration) -> Result<(), Send> {
        if !send.cancel && !self.inflight.has_room() {
            return Err(send);
        }
        if let Some(tombstone) = self.inflight.insert(send, false)
            && self.first_flight > 0
        {
            self.first_flight -= usize::from(!self.state.is_welcomed());
            self.push(Channel::Uplink, Frame::Send(tombstone));
        }
        self.pump(now);
        Ok(())
    }

    /// The application's storage has everything up to `seq`: an ACK becomes due. One of nothing but own records that were
    /// made here goes along with the next that leaves for another reason: nobody waits for it.
    pub fn committed(&mut self, conversation: ConversationId, seq: Seq, now: Duration) {
        let moved = self.readers.committed(conversation, seq);
        if moved == 0 {
            return;
        }
        let made = (conversation, Seq::ZERO)..=(conversation, seq);
        let made: Vec<_> = self.made.range(made).copied().collect();
        for own in &made {
            self.made.remove(own);
        }
        let moved = moved.saturating_sub(made.len() as u64);
        self.dirty.insert(conversation, None);
        self.due.insert(conversation);
        self.untold.insert(conversation);
        self.commits = self.commits.saturating_add(moved);
        self.arrivals += u64::from(moved > 0);
        if self.state.is_welcomed() && moved > 0 {
            // A record by itself is acknowledged at once: the transport's own acknowledgement shares the packet. Only
            // while they keep coming it pays to wait for more.
            let at = self.ack_waits.unwrap_or(now);
            if self.commits >= self.config.ack_every as u64 || at <= now {
                self.flush_acks(now);
            } else {
                self.timers.set_if_clear(Timer::Ack, at);
            }
        }
        self.tell_left(now);
    }

    fn flush_acks(&mut self, now: Duration) {
        self.timers.clear(Timer::Ack);
        let arrivals = core::mem::take(&mut self.arrivals);
        self.commits = 0;
        if self.due.is_empty() {
            return;
        }
        self.acks_sent += 1;
        let delay = if arrivals > 1 { self.config.ack_delay_dense } else { self.config.ack_delay };
        self.ack_waits = Some(now + delay);
        let entries: Vec<_> = core::mem::take(&mut self.due)
            .into_iter()
            .map(|conversation| {
                self.untold.remove(&conversation);
                self.dirty.insert(conversation, Some(self.acks_sent));
                (conversation, self.readers.cursor(conversation))
            })
            .collect();
        for ack in Ack::split(&entries) {
            self.push(Channel::Control, Frame::Ack(ack));
        }
    }

    /// The user has read up to `read`. Moves only forward.
    pub fn mark(&mut self, conversation: ConversationId, read: Seq, now: Duration) {
        self.remember_mark(conversation, read);
        self.pump(now);
    }

    fn remember_mark(&mut self, conversation: ConversationId, read: Seq) {
        if self.marks.get(&conversation).is_some_and(|marked| marked.read >= read) {
            return;
        }
        self.marks_seen += 1;
        self.marks.insert(conversation, Marked { read, sent: false, order: self.marks_seen });
        self.marks_due.insert(conversation);
        if self.marks.len() > MARKS_MAX {
            // The oldest that has left: it most likely arrived, and only small conversations confirm it.
            let oldest = self.marks.iter().min_by_key(|(_, marked)| (!marked.sent, marked.order));
            if let Some((&oldest, _)) = oldest {
                self.marks.remove(&oldest);
                self.marks_due.remove(&oldest);
            }
        }
    }

    /// Looks a conversation up. Answered by [`Output::Opened`] or [`Output::RequestRefused`].
    pub fn open(&mut self, target: OpenTarget, on_screen: bool, now: Duration) -> RequestId {
        let id = self.requests.number();
        if let (true, OpenTarget::Number(conversation)) = (on_screen, &target) {
            self.readers.show(*conversation);
        }
        self.ask(id, Ask::Open(Open { id, target, on_screen }), None, now);
        id
    }

    /// Calls a service. Answered by [`Output::Replied`], which says so when `deadline` passes first; zero leaves the
    /// deadline to the gateway.
    pub fn call(
        &mut self,
        service: ServiceId,
        method: u32,
        body: Bytes,
        deadline: Duration,
        now: Duration,
    ) -> RequestId {
        let id = self.requests.number();
        let deadline_ms = u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX);
        let call = Call { service, method, id, deadline_ms, body };
        let at = (deadline > Duration::ZERO).then(|| now + deadline);
        self.ask(id, Ask::Call(call), at, now);
        id
    }

    /// Asks for records of the past. Answered by [`Output::Page`] or [`Output::RequestRefused`].
    pub fn pull(
        &mut self,
        conversation: ConversationId,
        from: Seq,
        to: Seq,
        limit: u32,
        newest: bool,
        now: Duration,
    ) -> RequestId {
        let id = self.requests.number();
        let most = u32::try_from(BLOCK_RECORDS_MAX * 8).unwrap_or(u32::MAX);
        let pull = Pull { id, conversation, from, to, limit: limit.clamp(1, most), newest };
        self.ask(id, Ask::Pull(pull), None, now);
        id
    }

    fn ask(&mut self, id: RequestId, ask: Ask, deadline: Option<Duration>, now: Duration) {
        let is_call = matches!(ask, Ask::Call(_));
        if self.requests.insert(ask, deadline) {
            self.pump(now);
        } else if is_call {
            self.call_failed(id, RefusalCode::Busy);
        } else {
            let code = RefusalCode::Busy;
            self.outputs.push_back(Output::RequestRefused(Error {
                code,
                refers: id,
                retry: code.retry(),
                retry_after_ms: 0,
                text: "too many requests are unanswered".to_owned(),
            }));
        }
    }

    /// Sends something that is not stored; dropped when there is no welcomed connection.
    pub fn event(&mut self, event: Event, now: Duration) {
        if self.state.is_welcomed() {
            let datagram = self.features.has(Features::DATAGRAM_EVENTS);
            let channel = if datagram { Channel::Datagram } else { Channel::Control };
            self.push(channel, Frame::Event(event));
            self.tell_left(now);
        }
    }

    /// Sends a PING; its answer comes out as [`Output::Rtt`]. Nothing before the WELCOME.
    pub fn ping(&mut self, now: Duration) {
        self.send_ping(PingFlags::default(), 0, now);
    }

    /// Sends a PING nobody answers: two packets instead of three keep a silent connection. Whether it arrived is for the
    /// transport to say ([`Self::heard`]).
    pub fn keep_alive(&mut self, now: Duration) {
        self.send_ping(PingFlags::QUIET, 0, now);
    }

    /// Sends a PING that asks the gateway to write everything that is due: something seems to be lost. `padded` (the
    /// first one from a new address): until the gateway has validated the address it may send only three times what came
    /// from it, so the PING is filled up, and the allowance holds a challenge and the messages.
    pub fn nudge(&mut self, padded: bool, now: Duration) {
        self.send_ping(PingFlags::NUDGE, if padded { PING_PADDING_BYTES_MAX } else { 0 }, now);
        self.send_along(now);
    }

    /// Small sends that are not acked go along with a nudge, as far as copies can be paid: if it is the first packet that
    /// gets through, they need not wait until it is acknowledged.
    fn send_along(&mut self, now: Duration) {
        if !self.state.is_welcomed() {
            return;
        }
        let sends: Vec<Send> =
            self.inflight.flying().filter(|send| self.hedgeable(send).1).take(ALONG_MAX).cloned().collect();
        for send in sends {
            let frame = Frame::Send(send);
            if self.hedges.pay(frame.encoded_len(), now) {
                self.outputs.push_back(Output::Transmit(Channel::Datagram, frame));
            }
        }
    }

    fn send_ping(&mut self, flags: PingFlags, padding: usize, now: Duration) {
        if !self.state.is_welcomed() {
            return;
        }
        // So that the answer confirms them.
        self.flush_acks(now);
        self.pings_sent += 1;
        let time_ms = u64::try_from(now.as_millis()).unwrap_or(0);
        if self.pings.len() >= PINGS_MAX {
            self.pings.pop_front();
        }
        if flags != PingFlags::QUIET {
            self.pings.push_back(PingSent { id: self.pings_sent, at: now, acks: self.acks_sent });
        }
        let padding = u16::try_from(padding).unwrap_or(0);
        let ping = Ping { id: self.pings_sent, time_ms, flags: flags.0, padding };
        self.push(Channel::Control, Frame::Ping(ping));
        self.tell_left(now);
        self.timers.set(Timer::Ping, now + self.keepalive);
        self.timers.set_if_clear(Timer::Idle, now + self.config.answer_timeout);
    }

    /// Shows a fresh token before the old one ends.
    pub fn reauthenticate(&mut self, auth: Auth) {
        if self.state.is_welcomed() {
            self.push(Channel::Control, Frame::Auth(auth));
        }
    }

    /// The time [`Self::poll_timeout`] named has come.
    pub fn handle_timeout(&mut self, now: Duration) {
        while let Some(id) = self.requests.expire(now) {
            self.call_failed(id, RefusalCode::DeadlineExceeded);
        }
        if self.timers.fired(Timer::Hello, now) {
            return self.close(CloseCode::HelloTimeout);
        }
        if self.timers.fired(Timer::Idle, now) {
            return self.close(CloseCode::IdleTimeout);
        }
        if self.timers.fired(Timer::Ping, now) {
            self.ping(now);
        }
        if self.timers.fired(Timer::Ack, now) {
            self.flush_acks(now);
        }
        self.hedge(now);
        self.inflight.handle_timeout(now);
        self.readers.handle_timeout(now);
        self.pump(now);
    }

    /// Copies of SENDs whose answers are overdue leave in datagrams.
    fn hedge(&mut self, now: Duration) {
        while let Some((conversation, pseq, ())) = self.hedges.take_due(now) {
            if let Some(send) = self.inflight.flies(conversation, pseq) {
                let frame = Frame::Send(send.clone());
                self.outputs.push_back(Output::Transmit(Channel::Datagram, frame));
            }
        }
    }

    /// Tells the hedges that something left: what was lost before it shows by it.
    fn tell_left(&mut self, now: Duration) {
        let bytes = core::mem::take(&mut self.left);
        if bytes > 0 {
            self.hedges.left(bytes, now);
        }
    }

    fn push(&mut self, channel: Channel, frame: Frame) {
        self.left += frame.encoded_len();
        self.outputs.push_back(Output::Transmit(channel, frame));
    }

    /// Puts out everything that may leave now.
    fn pump(&mut self, now: Duration) {
        let welcomed = self.state.is_welcomed();
        if !welcomed && self.state != ClientState::Opening {
            return;
        }
        while self.first_flight > 0 {
            let Some((channel, frame)) = self.next_frame(welcomed) else { break };
            if let Frame::Send(send) = &frame
                && welcomed
            {
                if self.commits > 0 {
                    self.flush_acks(now);
                }
                let (size, hedge) = self.hedgeable(send);
                let left = Left { size, hedge, timed: true, patience: Duration::ZERO };
                self.hedges.sent(send.conversation, send.pseq, (), left, now);
            }
            self.push(channel, frame);
            if !welcomed {
                self.first_flight -= 1;
            }
        }
        self.tell_left(now);
    }

    fn next_frame(&mut self, welcomed: bool) -> Option<(Channel, Frame)> {
        if let Some(send) = self.inflight.take_next() {
            return Some((Channel::Uplink, Frame::Send(send)));
        }
        if let Some(conversation) = self.marks_due.pop_first()
            && let Some(marked) = self.marks.get_mut(&conversation)
        {
            marked.sent = true;
            return Some((Channel::Uplink, Frame::Mark(Mark { conversation, read: marked.read })));
        }
        if let Some(frame) = self.requests.take_next(!welcomed, self.acks_sent) {
            return Some((Channel::Control, frame));
        }
        if welcomed && let Some(pull) = self.readers.next_pull(|| self.requests.number()) {
            return Some((Channel::Control, Frame::Pull(pull)));
        }
        None
    }

    /// What to do next; `None`: nothing until the next input.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Duration> {
        [
            self.timers.next(),
            self.hedges.next_due(),
            self.requests.next_timeout(),
            self.inflight.next_timeout(),
            self.readers.next_timeout(),
        ]
        .into_iter()
        .flatten()
        .min()
    }
}
