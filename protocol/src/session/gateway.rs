//! The gateway's half of one connection: what the driver is to carry out about each frame.
//!
//! - Nothing of a client is carried out before the driver has accepted its HELLO: frames are held, in order, at most
//!   [`FIRST_FLIGHT_FRAMES_MAX`] of [`FIRST_FLIGHT_BYTES_MAX`] bytes.
//! - What leaves on the control stream keeps the order of what caused it: a PONG says that everything before its PING
//!   was handed to the driver.
//! - A SEND is handed out as often as it comes; the shard's [`crate::producer::Lane`] tells repetitions apart. Each
//!   one handed out is to be answered by [`Gateway::acked`] or [`Gateway::refused`], and counts until then.
//! - A SEND in a datagram is a copy of one that seems to be lost, or whose answer does: its SEND_ACK leaves in a datagram
//!   too, beside the one on the control stream, which may be held up by what was lost before it.
//! - SENDs of a connection whose HELLO named another epoch than the WELCOME are dropped: they are numbered for a log
//!   that is no more. The client connects again.
//!
//! The driver stops reading while it can't write the control stream: that is what bounds the answers in here.
//! PULLs are answered on another stream, so the driver bounds them ([`crate::limit::PULLS_INFLIGHT_MAX`]).
//!
//! Not here: lanes, rings, backlog (the gateway's fan-out); the transport.

use std::collections::VecDeque;

use core::time::Duration;

use super::{
    acks::PendingAcks,
    state::{GatewayInput, GatewayState, Step},
    timer::{Timer, Timers},
    window::Window,
};
use crate::{
    close::{CloseCode, RefusalCode, Retry},
    error::Violation,
    frame::{
        Ack, AckRun, Auth, Call, Channel, Cursors, Error, Event, Frame, Goaway, Hello, Kicked, Limits, Mark,
        Open, Ping, Pong, Pull, Send, SendAck, SendRefused, Side, Welcome,
    },
    id::{ConversationId, Epoch, Pseq, Seq, UnixMillis},
    limit::{FIRST_FLIGHT_BYTES_MAX, FIRST_FLIGHT_FRAMES_MAX},
    version::Features,
};

/// PONGs that wait to leave; of more PINGs than that, the oldest stay without an answer.
const PONGS_MAX: usize = 8;

/// Copies of SENDs whose answers are to leave in datagrams too; of more, the oldest are answered like any SEND.
const COPIES_UNANSWERED_MAX: usize = 16;

/// What may be set.
#[derive(Clone, Debug)]
pub struct GatewayConfig {
    /// From the connection to the HELLO.
    pub hello_timeout: Duration,
    /// Silence after which the connection is closed.
    pub idle_timeout: Duration,
    /// What the client may have in flight; goes into the WELCOME.
    pub limits: Limits,
    /// Seed of the feature bits that mean nothing (see [`Features::GREASE`]); the driver draws it.
    pub grease: u64,
}

impl Default for GatewayConfig {
    fn default() -> Self {
        Self {
            hello_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(180),
            limits: Limits::default(),
            grease: 0,
        }
    }
}

/// What the driver is to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Write this frame to the control stream.
    Transmit(Frame),
    /// Send this frame in a datagram; it may be lost. It is said on the control stream as well.
    Datagram(Frame),
    /// Look at the proof; answer with [`Gateway::welcome`] or [`Gateway::reject`].
    Authenticate(Box<Hello>),
    /// Look at the fresh token; answer with [`Gateway::reject`] when it is not good.
    Reauthenticate(Auth),
    /// Offer this to its conversation; answer with [`Gateway::acked`] or [`Gateway::refused`].
    Send(Send),
    /// Move a read cursor.
    Mark(Mark),
    /// Move receive cursors forward.
    Ack(Ack),
    /// Replace receive cursors, forward or back.
    Cursors(Cursors),
    /// Answer with OPENED or ERROR.
    Open(Open),
    /// Answer with BLOCKs on the backlog stream, or ERROR.
    Pull(Pull),
    /// Answer with REPLY.
    Call(Call),
    /// Pass it on to who is there.
    Event(Event),
    /// The client thinks that something is lost: write everything that is due now.
    Flush,
    /// Close the connection. Nothing follows.
    Close {
        /// The application error code.
        code: CloseCode,
        /// For the log; not sent unless it is harmless.
        reason: String,
    },
}

/// See the module's text.
#[derive(Debug)]
pub struct Gateway {
    config: GatewayConfig,
    state: GatewayState,
    window: Window,
    held: VecDeque<Frame>,
    held_bytes: usize,
    hello_epoch: Epoch,
    /// SENDs are numbered for another epoch.
    sends_void: bool,
    acks: PendingAcks,
    /// SENDs that came in datagrams and are not answered.
    copies: VecDeque<(ConversationId, Pseq)>,
    outputs: VecDeque<Output>,
    pongs: usize,
    timers: Timers,
    /// The wall clock and the driver's clock at the WELCOME.
    clock: Option<(UnixMillis, Duration)>,
}

impl Gateway {
    /// A half that waits for the HELLO.
    #[must_use]
    pub fn new(config: GatewayConfig, now: Duration) -> Self {
        let mut timers = Timers::default();
        timers.set(Timer::Hello, now + config.hello_timeout);
        timers.set(Timer::Idle, now + config.idle_timeout);
        let window = Window::new(config.limits);
        Self {
            config,
            state: GatewayState::Opening,
            window,
            held: VecDeque::new(),
            held_bytes: 0,
            hello_epoch: Epoch::ZERO,
            sends_void: false,
            acks: PendingAcks::default(),
            copies: VecDeque::new(),
            // One is what there is at a time as a rule; more would be kept for as long as the session.
            outputs: VecDeque::with_capacity(1),
            pongs: 0,
            timers,
            clock: None,
        }
    }

    /// Where it is.
    #[must_use]
    pub const fn state(&self) -> GatewayState {
        self.state
    }

    /// The client has opened its control stream: the time for the HELLO runs from here.
    pub fn began(&mut self, now: Duration) {
        if self.state == GatewayState::Opening {
            self.timers.set(Timer::Hello, now + self.config.hello_timeout);
        }
    }

    /// Takes a frame of the client.
    ///
    /// # Errors
    /// The client broke the protocol; [`Output::Close`] is put out too.
    pub fn handle(&mut self, channel: Channel, frame: Frame, now: Duration) -> Result<(), Violation> {
        if self.state == GatewayState::Closed {
            return Ok(());
        }
        self.heard(now);
        let taken = self.take(channel, frame, now);
        if let Err(violation) = taken {
            self.close(violation.close_code(), violation.to_string());
        }
        taken
    }

    /// Something of the client was authenticated by the transport: it is alive.
    pub fn heard(&mut self, now: Duration) {
        if self.state != GatewayState::Closed {
            self.timers.set(Timer::Idle, now + self.config.idle_timeout);
        }
    }

    fn take(&mut self, channel: Channel, frame: Frame, now: Duration) -> Result<(), Violation> {
        frame.check_channel(Side::Client, channel)?;
        let input = match (&frame, channel) {
            (Frame::Hello(_), _) => GatewayInput::Hello,
            (_, Channel::Control) => GatewayInput::Control,
            (_, Channel::Datagram) => GatewayInput::Datagram,
            _ => GatewayInput::Uplink,
        };
        match self.state.on(input) {
            Step::To(state) => {
                self.state = state;
                self.carry_out(channel, frame, now)
            }
            Step::Hold => self.hold(frame),
            Step::Ignore => Ok(()),
            Step::Violation => Err(Violation::OutOfState { frame: frame.name(), state: self.state.name() }),
        }
    }

    fn hold(&mut self, frame: Frame) -> Result<(), Violation> {
        self.held_bytes += frame.encoded_len();
        if self.held.len() >= FIRST_FLIGHT_FRAMES_MAX || self.held_bytes > FIRST_FLIGHT_BYTES_MAX {
            return Err(Violation::WindowExceeded { what: "frames before the WELCOME" });
        }
        if !frame.replayable() {
            return Err(Violation::OutOfState { frame: frame.name(), state: self.state.name() });
        }
        self.held.push_back(frame);
        Ok(())
    }

    fn carry_out(&mut self, channel: Channel, frame: Frame, now: Duration) -> Result<(), Violation> {
        let output = match frame {
            Frame::Hello(hello) => {
                self.timers.clear(Timer::Hello);
                self.hello_epoch = hello.epoch;
                Output::Authenticate(Box::new(hello))
            }
            Frame::Send(_) if self.sends_void => return Ok(()),
            Frame::Send(send) if channel == Channel::Datagram => {
                if !self.window.has_room() {
                    return Ok(());
                }
                let copy = (send.conversation, send.pseq);
                if !self.copies.contains(&copy) {
                    if self.copies.len() >= COPIES_UNANSWERED_MAX {
                        self.copies.pop_front();
                    }
                    self.copies.push_back(copy);
                }
                Output::Send(send)
            }
            Frame::Send(send) => {
                self.window.send(send.conversation, send.pseq)?;
                Output::Send(send)
            }
            Frame::Call(call) => {
                self.window.call(call.id)?;
                Output::Call(call)
            }
            Frame::Auth(auth) => Output::Reauthenticate(auth),
            Frame::Mark(mark) => Output::Mark(mark),
            Frame::Ack(ack) => Output::Ack(ack),
            Frame::Cursors(cursors) => Output::Cursors(cursors),
            Frame::Open(open) => Output::Open(open),
            Frame::Pull(pull) => Output::Pull(pull),
            Frame::Event(event) => Output::Event(event),
            Frame::Ping(ping) => return self.answer(ping, now),
            // This version asks no PINGs and makes no CALLs, so their answers come out of the blue.
            Frame::Pong(_) | Frame::Reply(_) => {
                return Err(Violation::OutOfState { frame: frame.name(), state: "nothing was asked" });
            }
            // `check_channel` lets no frame of a gateway through.
            _ => return Err(Violation::WrongChannel { frame: frame.name(), channel: channel.name() }),
        };
        self.outputs.push_back(output);
        Ok(())
    }

    fn answer(&mut self, ping: Ping, now: Duration) -> Result<(), Violation> {
        if ping.flags & crate::frame::PingFlags::QUIET.0 != 0 {
            return Ok(());
        }
        let nudge = ping.flags & crate::frame::PingFlags::NUDGE.0 != 0;
        if self.pongs >= PONGS_MAX {
            let oldest =
                self.outputs.iter().position(|output| matches!(output, Output::Transmit(Frame::Pong(_))));
            if let Some(oldest) = oldest {
                self.outputs.remove(oldest);
                self.pongs -= 1;
            }
        }
        let server_time = self.clock.and_then(|(time, at)| {
            let elapsed = u64::try_from(now.saturating_sub(at).as_millis()).ok()?;
            UnixMillis::new(time.get().checked_add(elapsed)?)
        });
        let pong = Pong { id: ping.id, time_ms: ping.time_ms, server_time: server_time.unwrap_or_default() };
        self.outputs.push_back(Output::Transmit(Frame::Pong(pong)));
        self.pongs += 1;
        if nudge && !matches!(self.outputs.iter().rev().nth(1), Some(Output::Flush)) {
            self.outputs.push_back(Output::Flush);
        }
        Ok(())
    }

    /// The driver accepts the HELLO: sends the WELCOME and carries out what was held. The limits are this half's own.
    pub fn welcome(&mut self, mut welcome: Welcome, now: Duration) {
        let Step::To(state) = self.state.on(GatewayInput::Welcome) else { return };
        self.state = state;
        welcome.limits = self.config.limits;
        welcome.features |= (self.config.grease << 56) & Features::GREASE.0;
        self.window.set_limits(welcome.limits);
        self.clock = Some((welcome.server_time, now));
        self.sends_void = self.hello_epoch != welcome.epoch && self.hello_epoch != Epoch::ZERO;
        self.outputs.push_back(Output::Transmit(Frame::Welcome(welcome)));
        self.held_bytes = 0;
        for frame in core::mem::take(&mut self.held) {
            let channel = match frame {
                Frame::Send(_) | Frame::Mark(_) => Channel::Uplink,
                _ => Channel::Control,
            };
            if let Err(violation) = self.carry_out(channel, frame, now) {
                self.close(violation.close_code(), violation.to_string());
                return;
            }
        }
    }

    /// The driver refuses the HELLO, or later an AUTH: sends the error and closes.
    pub fn reject(&mut self, error: Error, code: CloseCode, _now: Duration) {
        if self.state.on(GatewayInput::Reject) == Step::Ignore {
            return;
        }
        let reason = error.text.clone();
        self.outputs.push_back(Output::Transmit(Frame::Error(error)));
        self.close(code, reason);
    }

    /// The send is on disk as record `seq`; [`Seq::ZERO`]: its number is used up without a record.
    pub fn acked(&mut self, conversation: ConversationId, pseq: Pseq, seq: Seq, time: UnixMillis) {
        if self.state == GatewayState::Closed {
            return;
        }
        self.window.acked(conversation, pseq);
        let full = self.acks.acked(conversation, pseq, seq, time);
        self.push_ack(full);
        // Without a record it may have been refused, and only the control stream says why.
        if self.answered_copy(conversation, pseq) && seq != Seq::ZERO {
            let runs = vec![AckRun { count: 1, base: seq }];
            let ack = SendAck { conversation, up_to: pseq, time, runs };
            self.outputs.push_back(Output::Datagram(Frame::SendAck(ack)));
        }
    }

    /// Whether the send came in a datagram and was not answered before.
    fn answered_copy(&mut self, conversation: ConversationId, pseq: Pseq) -> bool {
        let at = self.copies.iter().position(|copy| *copy == (conversation, pseq));
        at.and_then(|at| self.copies.remove(at)).is_some()
    }

    /// Everything up to `up_to` was settled before, further back than anybody remembers where.
    pub fn settled(&mut self, conversation: ConversationId, up_to: Pseq, time: UnixMillis) {
        if self.state == GatewayState::Closed {
            return;
        }
        self.window.acked(conversation, up_to);
        let before = self.acks.settled(conversation, up_to, time);
        self.push_ack(before);
    }

    /// The send is refused. What was acked of the same conversation leaves first.
    pub fn refused(&mut self, refused: SendRefused) {
        if self.state == GatewayState::Closed {
            return;
        }
        let settled = refused.code.retry() == Retry::Never && refused.code != RefusalCode::StaleEpoch;
        self.window.refused(refused.conversation, refused.pseq, settled);
        self.answered_copy(refused.conversation, refused.pseq);
        let before = self.acks.take(refused.conversation);
        self.push_ack(before);
        self.outputs.push_back(Output::Transmit(Frame::SendRefused(refused)));
    }

    fn push_ack(&mut self, ack: Option<SendAck>) {
        self.outputs.extend(ack.map(|ack| Output::Transmit(Frame::SendAck(ack))));
    }

    /// Sends a control frame of the driver's: OPENED, REPLY, HEAD, RECEIPTS, ERROR, EVENT. A REPLY nobody waits for,
    /// a frame that may not leave on the control stream, and anything before the WELCOME is dropped.
    pub fn transmit(&mut self, frame: Frame) {
        if !matches!(self.state, GatewayState::Active | GatewayState::Draining)
            || frame.check_channel(Side::Gateway, Channel::Control).is_err()
        {
            return;
        }
        if let Frame::Reply(reply) = &frame
            && !self.window.replied(reply.id)
        {
            return;
        }
        self.outputs.push_back(Output::Transmit(frame));
    }

    /// The gateway is leaving: says so and goes on until the deadline in it, or until the client has left.
    pub fn drain(&mut self, goaway: Goaway, now: Duration) {
        let Step::To(state) = self.state.on(GatewayInput::Drain) else { return };
        self.state = state;
        self.timers.set(Timer::Hello, now + Duration::from_millis(goaway.deadline_ms.into()));
        self.outputs.push_back(Output::Transmit(Frame::Goaway(goaway)));
    }

    /// The device is logged out: says so and closes.
    pub fn kick(&mut self, kicked: Kicked) {
        if self.state.on(GatewayInput::Kick) == Step::Ignore {
            return;
        }
        let reason = format!("logged out by {}", kicked.by);
        self.flush_acks();
        self.outputs.push_back(Output::Transmit(Frame::Kicked(kicked)));
        self.close(CloseCode::Kicked, reason);
    }

    /// The connection is gone: nothing more is put out.
    pub fn closed(&mut self) {
        self.state = GatewayState::Closed;
        self.forget();
        self.outputs.clear();
    }

    fn close(&mut self, code: CloseCode, reason: String) {
        self.state = GatewayState::Closed;
        self.flush_acks();
        self.forget();
        self.outputs.push_back(Output::Close { code, reason });
    }

    fn forget(&mut self) {
        self.timers.clear_all();
        self.held.clear();
        self.held_bytes = 0;
        self.acks.clear();
        self.copies.clear();
    }

    fn flush_acks(&mut self) {
        while let Some(ack) = self.acks.pop() {
            self.push_ack(Some(ack));
        }
    }

    /// The time [`Self::poll_timeout`] named has come.
    pub fn handle_timeout(&mut self, now: Duration) {
        if self.state == GatewayState::Closed {
            return;
        }
        if self.timers.fired(Timer::Hello, now) {
            match self.state {
                GatewayState::Draining => self.close(CloseCode::Draining, "drained".to_owned()),
                _ => self.close(CloseCode::HelloTimeout, "no HELLO in time".to_owned()),
            }
        } else if self.timers.fired(Timer::Idle, now) {
            self.close(CloseCode::IdleTimeout, "nothing heard for too long".to_owned());
        }
    }

    /// What to do next; `None`: nothing until the next input.
    pub fn poll_output(&mut self) -> Option<Output> {
        if self.outputs.is_empty() && !self.acks.is_empty() {
            self.flush_acks();
        }
        let output = self.outputs.pop_front()?;
        if matches!(output, Output::Transmit(Frame::Pong(_))) {
            self.pongs = self.pongs.saturating_sub(1);
        }
        Some(output)
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Duration> {
        self.timers.next()
    }
}
