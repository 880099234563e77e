//! The driver: one task per client, which waits for everything and decides nothing.
//!
//! ```text
//! app ──▶ outbox (database) ──▶ session half ──▶ link ──▶ gateway
//! app ◀── messages (database) ◀── ledger ◀── session half ◀── link ◀──
//! ```
//!
//! - What the session half says goes out in its order. What changes the database is gathered in the [`Ledger`] and
//!   committed together, one commit at a time; only then are handles resolved, messages shown and records acknowledged.
//! - Bounded: when the ledger is full, records are not read from the connection; when the half has no room, sends stay in
//!   the database.
//! - An epoch is on disk before the first send leaves under it.
//!
//! Not here: when to connect (`state`), exactly-once (`fulmar_protocol::session::client`).

mod feed;
mod ledger;
mod racing;
mod requests;

use std::{future::poll_fn, pin::Pin, sync::Arc, time::Duration};

use fulmar_protocol::{
    close::{CloseCode, RefusalCode, Retry},
    frame::{AuthProof, Channel, Frame, NetworkHint, Welcome},
    id::{ConversationId, Epoch, FolderId, Pseq},
    limit::OUTBOX_SENDS_MAX,
    session::client::{Client as Half, ClientConfig, Output, Restored},
};
use tokio::sync::{mpsc, oneshot};

pub(crate) use self::requests::{Call, Request};
use self::{
    feed::Feed,
    ledger::{Change, Ledger},
    racing::{RaceEvent, Racing, Won},
    requests::Requests,
};
use crate::{
    client::Shared,
    db::{Identity, Marker, Own, Restore, WaitingSend},
    error::Error,
    event::{ClientEvent, CloseReason, ConnectionState, OfflineReason},
    keepalive::{Answer, Keepalive},
    networks::{NetworkKey, Networks},
    options::{BoxFuture, Options, Token},
    platform::{Platform, within},
    race::{RTT_UNKNOWN, Verdict},
    state::{Action, Event, Machine, State},
    transport::{
        Dialer, Tls,
        link::{Link, LinkEvent},
    },
};

/// How long an answer may be overdue before the connection is suspect; three round trips when those are longer.
const OVERDUE_MIN: Duration = Duration::from_secs(1);

/// From the HELLO to the WELCOME.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection whose silence has lasted for so long is over for the gateway as well.
const SILENCE_MAX: Duration = Duration::from_secs(180);

/// A difference between the device's clocks that is sleep.
const SLEEP_MIN: Duration = Duration::from_secs(2);

/// How long after the WELCOME what was missed may still be coming in while the client counts as live.
const SYNC_MAX: Duration = Duration::from_secs(5);

/// How long closing waits for what is on its way.
const LINGER: Duration = Duration::from_millis(500);

/// How long the app's provider may take for a token.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(10);

/// What the database held when the client was made.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) identity: Identity,
    pub(crate) restore: Restore,
    pub(crate) arrival: u64,
    pub(crate) unacked: Vec<WaitingSend>,
    pub(crate) waiting: Vec<ConversationId>,
    /// What is known of networks.
    pub(crate) networks: Vec<u8>,
}

impl Start {
    /// Sends the session half starts with.
    pub(crate) const UNACKED_MAX: usize = OUTBOX_SENDS_MAX;
}

/// What is said before there is a connection, in its order: all of it goes on every attempt to make one.
struct Flight {
    frames: Vec<(Channel, Frame)>,
    /// The session half is beyond it: it waits for the answer, and says more. Otherwise there is a connection it goes on with until
    /// the answer is there.
    opening: bool,
}

struct Driver {
    shared: Arc<Shared>,
    options: Options,
    /// By the platform's monotonic clock.
    started: Duration,
    half: Half,
    machine: Machine,
    dialer: Arc<Dialer>,
    race: Option<Racing>,
    /// Tries whether QUIC gets through again, beside a connection by another way.
    probe: Option<(Racing, Flight)>,
    /// The winner of the race, until it is the connection.
    won: Option<(Box<Won>, Flight)>,
    proving: Option<BoxFuture<Result<AuthProof, String>>>,
    /// The first flight, while there is a race.
    flight: Option<Flight>,
    link: Option<Link>,
    networks: Networks,
    network: NetworkKey,
    keepalive: Keepalive,
    /// The gateway asked for proof of a new path so often.
    challenges: u64,
    /// How far the boot clock is ahead of the monotonic one.
    slept: Duration,
    ledger: Ledger,
    feed: Feed,
    requests: Requests,
    identity: Identity,
    /// How the connection proved who it is, until the WELCOME.
    by_ticket: bool,
    /// Since when nothing was heard that should have been.
    waiting_since: Option<Duration>,
    packets: u64,
    /// When the gateway was heard, or asked for a sign of life, last.
    asked_at: Duration,
    /// When a message came or left last.
    busy_at: Option<Duration>,
    /// Since when there is a send that is not acked.
    unacked_since: Option<Duration>,
    rtt: Duration,
    /// When the first PONG after the WELCOME came, until what was missed is in.
    ponged_at: Option<Duration>,
    /// It came.
    ponged: bool,
    reason: OfflineReason,
    /// The end, once it is decided.
    end: Option<CloseReason>,
    /// Not again before.
    lost_after: Duration,
}

/// Runs one client to its end.
pub(crate) async fn run(
    shared: Arc<Shared>,
    options: Options,
    tls: Tls,
    start: Start,
    mut inbox: mpsc::Receiver<Request>,
) {
    let platform = Arc::clone(&shared.platform);
    let dialer = Arc::new(Dialer::new(
        Arc::clone(&platform),
        tls,
        options.addresses.clone(),
        options.server_name.clone(),
    ));
    shared.traffic().udp = Some(Arc::clone(dialer.carried()));
    let networks = Networks::from_blob(&start.networks);
    let network = NetworkKey::new(options.network.kind, &options.network_name);
    let known = networks.network(network);
    let mut config = ClientConfig::new(start.identity.uid, options.class);
    config.grease = platform.random();
    config.hello_timeout = HELLO_TIMEOUT;
    // The driver asks sooner, as far as the network allows.
    config.keepalive = Duration::from_secs(3_600);
    config.answer_timeout = SILENCE_MAX;
    config.initial_rtt = known.initial_rtt();
    let feed = Feed::new(&start.unacked, start.waiting);
    let half = Half::new(
        config,
        Restored {
            epoch: start.identity.epoch,
            device: start.identity.device,
            cursors: start.restore.cursors,
            dirty: Vec::new(),
            unacked: start.unacked.into_iter().map(|waiting| waiting.send).collect(),
            marks: start.restore.marks,
        },
    );
    let mut driver = Driver {
        ledger: Ledger::default(),
        requests: Requests::default(),
        started: shared.platform.monotonic(),
        machine: Machine::new(),
        race: None,
        probe: None,
        won: None,
        proving: None,
        flight: None,
        link: None,
        keepalive: Keepalive::new(known.keepalive()),
        networks,
        network,
        challenges: 0,
        slept: sleep_of(&*platform),
        by_ticket: false,
        waiting_since: None,
        packets: 0,
        asked_at: Duration::ZERO,
        busy_at: None,
        unacked_since: None,
        rtt: Duration::ZERO,
        ponged_at: None,
        ponged: false,
        reason: OfflineReason::Starting,
        end: None,
        lost_after: Duration::ZERO,
        identity: start.identity,
        shared,
        options,
        half,
        dialer,
        feed,
    };
    driver.step(Event::Start);
    let reply = driver.serve(&mut inbox).await;
    driver.finish().await;
    // Requests that are still queued are answered by being dropped.
    drop(inbox);
    if let Some(reply) = reply {
        let _ = reply.send(());
    }
}

/// How far the device's boot clock is ahead of the one that stands still while it sleeps.
fn sleep_of(platform: &dyn Platform) -> Duration {
    platform.boot().saturating_sub(platform.monotonic())
}

/// What woke the driver.
enum Woken {
    Link(LinkEvent),
    Race(RaceEvent),
    Probe(RaceEvent),
    Proven(Result<AuthProof, String>),
    Committed(Result<ledger::Committed, Error>),
    Fed(Result<feed::Fed, Error>),
    Request(Option<Request>),
    App,
    Time,
}

impl Driver {
    fn now(&self) -> Duration {
        self.shared.platform.monotonic().saturating_sub(self.started)
    }

    async fn serve(&mut self, inbox: &mut mpsc::Receiver<Request>) -> Option<oneshot::Sender<()>> {
        let shared = Arc::clone(&self.shared);
        let mut app = Box::pin(shared.wake.notified());
        self.take_fresh();
        loop {
            if let Err(error) = self.carry_out().await {
                self.fail(&error);
            }
            if self.end.is_some() {
                return None;
            }
            self.ledger.start(&self.shared, self.own());
            self.feed.start(&self.shared, &self.half);
            match self.woken(inbox, &mut app).await {
                Woken::Link(event) => self.link_event(event),
                Woken::Race(event) => self.raced(event),
                Woken::Probe(event) => self.probed(event),
                Woken::Proven(proof) => self.proven(proof),
                Woken::Committed(Ok(committed)) => self.committed(committed),
                Woken::Fed(Ok(fed)) => {
                    let now = self.now();
                    self.shared.settle(&fed.expired);
                    for target in fed.unresolved.iter().flatten() {
                        self.open(target.clone(), false, None);
                    }
                    self.feed.fed(fed, &mut self.half, now);
                }
                Woken::Committed(Err(error)) | Woken::Fed(Err(error)) => self.fail(&error),
                Woken::Request(Some(Request::Close(reply))) => {
                    self.end = Some(CloseReason::Requested);
                    return Some(reply);
                }
                Woken::Request(Some(request)) => self.request(request),
                Woken::Request(None) => {
                    // The last handle is gone.
                    self.end = Some(CloseReason::Requested);
                    return None;
                }
                Woken::App => {
                    app = Box::pin(shared.wake.notified());
                    self.take_fresh();
                }
                Woken::Time => {}
            }
            self.note_attempts();
            self.time_passed();
        }
    }

    async fn woken(
        &mut self,
        inbox: &mut mpsc::Receiver<Request>,
        app: &mut Pin<Box<tokio::sync::futures::Notified<'_>>>,
    ) -> Woken {
        let timeout = self.timeout();
        let timeout = timeout.map(|at| self.started + at);
        let platform = Arc::clone(&self.shared.platform);
        let records = self.ledger.has_room();
        let Self { link, race, probe, proving, flight, ledger, feed, started, .. } = self;
        let io = poll_fn(|cx| {
            use std::task::Poll::{Pending, Ready};
            // It may have waited for long: what happened happens now, and not when the wait began.
            let now = platform.monotonic().saturating_sub(*started);
            if let Some(link) = link
                && let Ready(event) = link.poll(records, cx)
            {
                return Ready(Woken::Link(event));
            }
            if let Some(race) = race
                && let Ready(event) = race.poll(flight.as_ref().map(|flight| &flight.frames[..]), now, cx)
            {
                return Ready(Woken::Race(event));
            }
            if let Some((probe, flight)) = probe
                && let Ready(event) = probe.poll(Some(&flight.frames), now, cx)
            {
                return Ready(Woken::Probe(event));
            }
            if let Some(proof) = proving
                && let Ready(proof) = proof.as_mut().poll(cx)
            {
                *proving = None;
                return Ready(Woken::Proven(proof));
            }
            if let Ready(committed) = ledger.poll(cx) {
                return Ready(Woken::Committed(committed));
            }
            if let Ready(fed) = feed.poll(cx) {
                return Ready(Woken::Fed(fed));
            }
            Pending
        });
        tokio::select! {
            biased;
            woken = io => woken,
            () = app.as_mut() => Woken::App,
            request = inbox.recv() => Woken::Request(request),
            () = sleep_until(&*platform, timeout) => Woken::Time,
        }
    }

    /// The next moment at which something is due.
    fn timeout(&self) -> Option<Duration> {
        [
            self.half.poll_timeout(),
            self.machine.poll_timeout(),
            self.overdue_at(),
            self.race.as_ref().and_then(Racing::poll_timeout),
            self.probe.as_ref().and_then(|(probe, _)| probe.poll_timeout()),
            self.probe_at(),
            self.ping_at(),
            self.feed.poll_timeout(self.now(), self.shared.platform.unix_millis()),
            self.ponged_at.map(|at| at + SYNC_MAX),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn time_passed(&mut self) {
        let now = self.now();
        let unacked = self.half.unacked() > 0;
        self.unacked_since = self.unacked_since.filter(|_| unacked).or_else(|| unacked.then_some(now));
        if self.half.poll_timeout().is_some_and(|at| at <= now) {
            self.half.handle_timeout(now);
        }
        let wall = self.shared.platform.unix_millis();
        self.feed.handle_timeout(&mut self.half, now, wall);
        if self.overdue_at().is_some_and(|at| at <= now) && !self.listen() {
            self.step(Event::Overdue { srtt: self.srtt() });
        }
        if self.ping_at().is_some_and(|at| at <= now) {
            self.keepalive.pinged(now.saturating_sub(self.asked_at), now);
            self.asked_at = now;
            // An answer also says that the gateway has the cursors that were told before.
            let quiet = self.half.unacked() == 0 && self.half.dirty().next().is_none();
            if quiet { self.half.keep_alive(now) } else { self.half.ping(now) }
        }
        if self.machine.poll_timeout().is_some_and(|at| at <= now) {
            if self.machine.state() == State::Suspect {
                // Maybe for nothing: something was heard meanwhile.
                self.listen();
            }
            if self.machine.poll_timeout().is_some_and(|at| at <= now) {
                self.step(Event::Timer);
            }
        }
        if self.probe_at().is_some_and(|at| at <= now) {
            self.probe();
        }
        let slept = sleep_of(&*self.shared.platform);
        if slept.saturating_sub(std::mem::replace(&mut self.slept, slept)) >= SLEEP_MIN {
            tracing::debug!("the device slept");
            self.keepalive.forget();
            self.step(Event::Woke { srtt: self.srtt() });
        }
    }

    /// When it is time to see whether UDP gets through again.
    fn probe_at(&self) -> Option<Duration> {
        let link = self.link.as_ref().filter(|_| self.machine.state() == State::Live)?;
        let idle = self.race.is_none() && self.probe.is_none() && self.identity.ticket.is_some();
        let other = idle && link.connection().kind() != fulmar_transport::Kind::Quic;
        let at = self.networks.network(self.network).udp_probe_at().filter(|_| other)?;
        Some(self.now() + at.saturating_sub(self.wall()))
    }

    /// Time since 1970 by the device's clock.
    fn wall(&self) -> Duration {
        Duration::from_millis(self.shared.platform.unix_millis())
    }

    /// When a PING is due because all is quiet.
    fn ping_at(&self) -> Option<Duration> {
        let online = matches!(self.machine.state(), State::Syncing | State::Live);
        if !online || self.waiting_since.is_some() {
            return None;
        }
        // A send the gateway's transport has taken in but that is not acked may have died with its process.
        let waits = self.unacked_since.map(|since| since.max(self.asked_at) + self.prompt());
        [waits, self.keepalive.ping_at(self.asked_at, self.busy_at)].into_iter().flatten().min()
    }

    /// How long an answer may take before it is overdue.
    fn prompt(&self) -> Duration {
        OVERDUE_MIN.max(self.rtt * 3)
    }

    /// The round trip as last measured on this network.
    fn srtt(&self) -> Duration {
        let known = || self.networks.network(self.network).initial_rtt().unwrap_or(RTT_UNKNOWN);
        if self.rtt.is_zero() { known() } else { self.rtt }
    }

    /// When a missing answer makes the connection suspect.
    fn overdue_at(&self) -> Option<Duration> {
        let watched = matches!(self.machine.state(), State::Syncing | State::Live);
        let since = self.waiting_since.filter(|_| watched)?;
        Some(since + self.prompt())
    }

    /// Whether the gateway was heard since the last look: any packet counts.
    fn listen(&mut self) -> bool {
        let Some(link) = &self.link else { return false };
        let stats = link.connection().stats();
        self.rtt = stats.rtt;
        let heard = stats.packets_in > self.packets;
        self.packets = stats.packets_in;
        if heard {
            let now = self.now();
            self.heard(stats.path_challenges, now);
            self.half.heard(now);
            if self.machine.state() == State::Suspect {
                self.step(Event::Heard);
            }
        }
        heard
    }

    /// A packet of the gateway came on the connection.
    fn heard(&mut self, challenges: u64, now: Duration) {
        self.waiting_since = None;
        let moved = challenges > std::mem::replace(&mut self.challenges, challenges);
        let answer = if moved { Answer::Moved } else { Answer::Same };
        let prompt = self.prompt();
        self.keepalive.heard(answer, prompt, now);
    }

    fn step(&mut self, event: Event) {
        let now = self.now();
        let before = self.machine.state();
        for action in self.machine.step(event, now, self.shared.platform.random()) {
            match action {
                Action::Race => self.race(),
                Action::EndRace => self.end_race(),
                Action::Adopt => self.adopt(),
                Action::Nudge => self.half.nudge(false, now),
                Action::NudgePath => self.half.nudge(true, now),
                Action::Rebind => self.dialer.rebind(),
                Action::Drop => self.drop_link(CloseCode::Done),
                Action::NewSocket => self.dialer.forget_sockets(),
            }
        }
        let after = self.machine.state();
        if before != after {
            tracing::debug!(?before, ?after, ?event, "connection");
        }
        self.show();
    }

    /// Shows the app where the connection stands.
    fn show(&self) {
        let state = match self.machine.state() {
            State::Racing | State::Handshaking => ConnectionState::Connecting,
            State::Syncing => ConnectionState::Syncing,
            State::Live => ConnectionState::Live,
            State::Suspect => ConnectionState::Suspect,
            State::Draining => ConnectionState::Draining,
            State::Suspended => ConnectionState::Offline { reason: OfflineReason::Suspended, retry_in: None },
            State::Offline | State::Backoff => ConnectionState::Offline {
                reason: self.reason.clone(),
                retry_in: self.machine.poll_timeout().map(|at| at.saturating_sub(self.now())),
            },
            State::Closed => return,
        };
        self.shared.states.send_if_modified(|shown| {
            let changed = *shown != state;
            if changed {
                *shown = state;
            }
            changed
        });
    }

    /// Begins a race for a connection.
    fn race(&mut self) {
        self.end_race();
        let known = self.networks.network(self.network);
        let wall = self.wall();
        let ticket =
            self.identity.ticket.as_deref().filter(|_| self.identity.server == self.options.server_name);
        self.by_ticket = ticket.is_some();
        let proof = match (ticket, &self.options.token) {
            (Some(ticket), _) => Some(AuthProof::ticket(ticket)),
            (None, Token::Fixed(token)) => Some(AuthProof::Token(token.clone())),
            (None, Token::Provider(provider)) => {
                let (platform, asked) = (Arc::clone(&self.shared.platform), provider());
                self.proving = Some(Box::pin(async move {
                    match within(&*platform, TOKEN_TIMEOUT, asked).await {
                        Some(Ok(token)) => Ok(AuthProof::Token(token)),
                        Some(Err(error)) => Err(error.to_string()),
                        None => Err("the token provider did not answer".to_owned()),
                    }
                }));
                None
            }
        };
        self.race = Some(Racing::new(&self.dialer, known.memory(wall)));
        if let Some(proof) = proof {
            self.fly(proof);
        }
    }

    /// Puts the first flight out for all attempts of the race.
    fn fly(&mut self, proof: AuthProof) {
        let opening = self.link.is_none();
        let frames = if opening { Vec::new() } else { self.half.prepare(proof.clone(), self.hint()) };
        self.flight = Some(Flight { frames, opening });
        if opening {
            let now = self.now();
            self.half.connect_early(proof, self.hint(), now);
        }
    }

    /// Tries whether QUIC gets through again.
    fn probe(&mut self) {
        let Some(ticket) = self.identity.ticket.as_deref().map(AuthProof::ticket) else { return };
        let memory = self.networks.network(self.network).memory(self.wall());
        let flight = Flight { frames: self.half.prepare(ticket, self.hint()), opening: false };
        self.probe = Some((Racing::by_quic(&self.dialer, memory), flight));
    }

    /// What the gateway is told of the network.
    fn hint(&self) -> NetworkHint {
        NetworkHint { rtt_ms: u32::try_from(self.rtt.as_millis()).unwrap_or(0), ..self.options.network }
    }

    fn end_race(&mut self) {
        self.note_attempts();
        (self.race, self.probe, self.won, self.proving) = (None, None, None, None);
        if self.flight.take().is_some_and(|flight| flight.opening) {
            let now = self.now();
            self.half.disconnected(now);
        }
    }

    fn proven(&mut self, proof: Result<AuthProof, String>) {
        match proof {
            Ok(proof) => self.fly(proof),
            Err(text) => self.unreached(OfflineReason::NoToken(text)),
        }
    }

    fn raced(&mut self, event: RaceEvent) {
        let now = self.now();
        match event {
            RaceEvent::Won(won) => {
                self.networks.on(self.network).won(won.win, won.took);
                let prompt = self.prompt();
                self.keepalive.reached(won.took, prompt, now);
                if let Some(flight) = self.flight.take() {
                    self.won = Some((won, flight));
                    self.step(Event::Reached);
                }
            }
            RaceEvent::Nobody(text) => self.unreached(OfflineReason::Unreachable(text)),
            // The loop looks at the time anew.
            RaceEvent::Rescheduled => {}
            RaceEvent::Over(verdict) => {
                self.note_attempts();
                self.race = None;
                if let Some(verdict) = verdict {
                    let wall = self.wall();
                    self.networks.on(self.network).udp_was(verdict, wall);
                    // The app may be killed before the connection ends.
                    self.keep_networks();
                }
            }
        }
    }

    /// QUIC was tried beside another way.
    fn probed(&mut self, event: RaceEvent) {
        if matches!(event, RaceEvent::Rescheduled) {
            return;
        }
        self.note_attempts();
        let probe = self.probe.take();
        let wall = self.wall();
        let network = self.networks.on(self.network);
        match event {
            RaceEvent::Won(won) => {
                network.won(won.win, won.took);
                network.udp_was(Verdict::Works, wall);
                if let Some((_, flight)) = probe.filter(|_| self.machine.state() == State::Live) {
                    (self.won, self.by_ticket) = (Some((won, flight)), true);
                    self.step(Event::Goaway { spread: Duration::ZERO });
                    self.step(Event::Reached);
                } else {
                    won.link.close(CloseCode::Done);
                }
            }
            RaceEvent::Nobody(_) => network.udp_was(Verdict::Blocked, wall),
            RaceEvent::Over(_) | RaceEvent::Rescheduled => {}
        }
    }

    fn unreached(&mut self, reason: OfflineReason) {
        self.end_race();
        // A connection that is only suspected has a better reason, if it has any.
        if self.link.is_none() {
            self.reason = reason;
            // A socket that went bad shows only as silence.
            self.dialer.forget_sockets();
        }
        self.step(Event::Unreached);
    }

    /// For the report of attempts.
    fn note_attempts(&mut self) {
        let probe = self.probe.as_mut().map(|(probe, _)| probe);
        for race in [self.race.as_mut(), probe].into_iter().flatten() {
            self.shared.note_attempts(race.take_attempts());
            for connection in race.take_ended() {
                self.shared.traffic().ended(&connection);
            }
        }
    }

    /// Goes on with the winner of the race.
    fn adopt(&mut self) {
        let Some((won, flight)) = self.won.take() else { return };
        let Won { link, first, .. } = *won;
        let now = self.now();
        self.drop_link(CloseCode::Done);
        self.packets = 0;
        self.challenges = 0;
        self.ponged = false;
        self.asked_at = now;
        for (_, frame) in &flight.frames {
            self.sent(frame, now);
        }
        if flight.opening {
            self.half.reached(now);
        } else {
            self.half.switch(&flight.frames, now);
        }
        self.link = Some(link);
        self.link_event(first);
    }

    fn drop_link(&mut self, code: CloseCode) {
        let Some(link) = self.link.take() else { return };
        self.keep_networks();
        let mut traffic = self.shared.traffic();
        traffic.ended(link.connection());
        traffic.link = None;
        drop(traffic);
        link.close(code);
        self.waiting_since = None;
        self.ponged_at = None;
        let now = self.now();
        self.half.disconnected(now);
    }

    /// Writes down what was learned of networks; if that fails it is learned again.
    fn keep_networks(&mut self) {
        let network = self.networks.on(self.network);
        network.learned(self.keepalive.learned());
        if let (Some(srtt), Some(overdue)) = (self.half.rtt(), self.half.overdue_after()) {
            network.measured(srtt, overdue.saturating_sub(srtt) / 4);
        }
        let blob = self.networks.to_blob();
        self.shared.db.try_run(move |store| store.keep_networks(&blob));
    }

    /// The connection is gone or of no use.
    fn lost(&mut self, reason: OfflineReason, code: CloseCode) {
        self.drop_link(code);
        self.reason = reason;
        let after = std::mem::take(&mut self.lost_after);
        self.step(Event::Lost { after });
    }

    fn link_event(&mut self, event: LinkEvent) {
        let now = self.now();
        match event {
            LinkEvent::Frames(frames) => {
                self.asked_at = now;
                let challenges = self.link.as_ref().map(|link| link.connection().stats().path_challenges);
                self.heard(challenges.unwrap_or_default(), now);
                for (channel, frame) in frames {
                    // The half closes by itself when the gateway breaks the rules.
                    if let Err(violation) = self.half.handle(channel, frame, now) {
                        tracing::warn!(%violation, "the gateway broke the protocol");
                    }
                }
                if self.machine.state() == State::Suspect {
                    self.step(Event::Heard);
                }
            }
            LinkEvent::Violation(violation) => {
                tracing::warn!(%violation, "the gateway broke the framing");
                self.lost(OfflineReason::Lost(violation.to_string()), violation.close_code());
            }
            LinkEvent::Lost(code, text) => {
                tracing::debug!(?code, %text, "connection lost");
                self.closed_by_gateway(code, text);
            }
        }
    }

    fn closed_by_gateway(&mut self, code: Option<CloseCode>, text: String) {
        match code {
            // By a connection whose client went on with it. Attempts of our own races that lost never did.
            Some(CloseCode::Superseded) => self.end = Some(CloseReason::Superseded),
            Some(CloseCode::Kicked) => self.end = Some(CloseReason::Kicked(String::new())),
            Some(CloseCode::VersionUnsupported) => self.end = Some(CloseReason::Incompatible(text)),
            Some(CloseCode::AuthExpired | CloseCode::AuthFailed) => {
                self.identity.ticket = None;
                self.lost(OfflineReason::Lost(text), CloseCode::Done);
            }
            _ => self.lost(OfflineReason::Lost(text), CloseCode::Done),
        }
    }

    /// Does what the half says, in its order.
    async fn carry_out(&mut self) -> Result<(), Error> {
        while let Some(output) = self.half.poll_output() {
            let now = self.now();
            match output {
                Output::Transmit(channel, frame) => self.transmit(channel, &frame, now),
                Output::Welcomed(welcome) => {
                    if self.is_foreign(welcome.folder) {
                        return Ok(());
                    }
                    self.welcomed(&welcome);
                }
                Output::NewEpoch { epoch, unsettled, folder } => {
                    if self.is_foreign(folder) {
                        return Ok(());
                    }
                    self.new_epoch(epoch, &unsettled).await?;
                }
                Output::Deliver(record) => {
                    self.busy_at = Some(now);
                    self.ledger.push(Change::Marker(Marker::Record(Box::new(record))));
                }
                Output::Gap { conversation, from, to } => {
                    self.event(ClientEvent::Gap { conversation, from, to });
                    self.ledger.push(Change::Marker(Marker::Gone(conversation, to)));
                }
                Output::Acked { conversation, pseq, seq, .. } => {
                    self.feed.settled(conversation, pseq);
                    // Without a seq the record itself is on its way and settles it.
                    if let Some(seq) = seq {
                        self.ledger.push(Change::Acked(conversation, pseq, seq));
                    }
                }
                Output::Refused(refused) => {
                    self.feed.settled(refused.conversation, refused.pseq);
                    self.ledger.push(Change::Refused(refused.conversation, refused.pseq, refused.code));
                }
                Output::Opened(opened) => self.opened(opened),
                Output::Replied(reply) => self.replied(reply),
                Output::Page(_) => {}
                Output::Receipts(receipts) => self.ledger.push(Change::Receipts(receipts)),
                Output::Heads(heads) => {
                    for head in &heads {
                        if head.head > self.half.cursor(head.conversation) {
                            self.ledger.behind(head.conversation, head.head);
                        }
                    }
                    self.ledger.push(Change::Heads(heads));
                }
                Output::Event(event) => self.event(ClientEvent::Ephemeral {
                    conversation: event.conversation,
                    kind: event.kind,
                    sender: event.sender,
                    ttl: Duration::from_millis(event.ttl_ms.into()),
                    payload: bytes::Bytes::copy_from_slice(&event.payload),
                }),
                Output::RequestRefused(error) => self.request_refused(error),
                Output::Goaway(goaway) => {
                    self.dialer.learn(&goaway.addresses);
                    self.step(Event::Goaway { spread: Duration::from_millis(goaway.spread_ms.into()) });
                }
                Output::Kicked(kicked) => self.end = Some(CloseReason::Kicked(kicked.by)),
                Output::Failed(error) => self.refused(&error),
                Output::Rtt(rtt) => {
                    if self.machine.state() == State::Suspect {
                        self.step(Event::Answered);
                    }
                    if !std::mem::replace(&mut self.ponged, true) {
                        self.ponged_at = Some(now);
                    }
                    self.shared.traffic().rtt = rtt;
                }
                Output::Close(code) => {
                    let reason = match &self.reason {
                        OfflineReason::Refused(code) if self.machine.state() == State::Handshaking => {
                            OfflineReason::Refused(*code)
                        }
                        _ => OfflineReason::Lost(code.to_string()),
                    };
                    self.lost(reason, code);
                }
            }
        }
        let now = self.now();
        if let Some(at) = self.ponged_at
            && (self.ledger.is_caught_up() || now >= at + SYNC_MAX)
        {
            self.ponged_at = None;
            self.keep_networks();
            self.step(Event::Synced);
        }
        Ok(())
    }

    fn transmit(&mut self, channel: Channel, frame: &Frame, now: Duration) {
        if let Some(flight) = self.flight.as_mut().filter(|flight| flight.opening) {
            // The race writes it on each of its attempts.
            flight.frames.push((channel, frame.clone()));
            return;
        }
        self.sent(frame, now);
        let Some(link) = &mut self.link else { return };
        if matches!(frame, Frame::Send(_) | Frame::Ping(_)) && self.waiting_since.is_none() {
            // Only packets from now on are an answer.
            self.packets = link.connection().heard();
            self.waiting_since = Some(now);
        }
        link.write(channel, frame);
    }

    /// A frame leaves on a connection that is there.
    fn sent(&mut self, frame: &Frame, now: Duration) {
        if let Frame::Send(send) = frame
            && let Some(id) = self.feed.id(send.conversation, send.pseq)
        {
            self.busy_at = Some(now);
            self.shared.handles().sent(id);
        }
    }

    /// Whether the gateway works on another data folder than the one this database belongs to; then it is over, before
    /// anything is sent or taken under numbers that mean something else there.
    fn is_foreign(&mut self, folder: Option<FolderId>) -> bool {
        let (Some(ours), Some(theirs)) = (self.identity.folder, folder) else { return false };
        let foreign = ours != theirs;
        if foreign {
            tracing::error!("the gateway has another data folder than the one this database belongs to");
            self.end = Some(CloseReason::OtherGateway);
        }
        foreign
    }

    fn welcomed(&mut self, welcome: &Welcome) {
        let now = self.now();
        self.identity.folder = self.identity.folder.or(welcome.folder);
        let (shortest, longest) = welcome.keepalive_ms;
        self.keepalive.range(Duration::from_millis(shortest.into()), Duration::from_millis(longest.into()));
        self.dialer.learn(&welcome.addresses);
        if let Some(link) = &self.link {
            let mut traffic = self.shared.traffic();
            traffic.connections += 1;
            traffic.link = Some(link.connection().clone());
        }
        self.identity.user = Some(welcome.user);
        self.identity.device = Some(welcome.device);
        self.identity.ticket = Some(welcome.ticket.0.clone());
        self.identity.server.clone_from(&self.options.server_name);
        self.ledger.push(Change::Welcomed {
            user: welcome.user,
            device: welcome.device,
            ticket: welcome.ticket.0.clone(),
            server: self.options.server_name.clone(),
            server_time: welcome.server_time,
            folder: welcome.folder,
            at: self.shared.platform.monotonic(),
        });
        self.step(Event::Welcomed);
        self.half.ping(now);
        for target in self.feed.unresolved() {
            self.open(target, false, None);
        }
        self.ask_names();
    }

    /// Keeps the epoch before anything leaves under it; another one than ours numbers what waits anew.
    async fn new_epoch(&mut self, epoch: Epoch, unsettled: &[(ConversationId, Pseq)]) -> Result<(), Error> {
        if self.identity.epoch == Epoch::ZERO {
            self.shared.db.run(true, move |store| store.first_epoch(epoch)).await?;
        } else {
            // What was settled under the old numbers is written under them.
            while !self.ledger.is_empty() && self.identity.user.is_some() {
                self.ledger.start(&self.shared, self.own());
                let committed = poll_fn(|cx| self.ledger.poll(cx)).await?;
                self.committed(committed);
            }
            tracing::warn!(%epoch, unsettled = unsettled.len(), "the gateway did not know this device's sends");
            let waiting = self
                .shared
                .db
                .run(true, move |store| {
                    store.new_epoch(epoch)?;
                    store.waiting_conversations()
                })
                .await?;
            self.feed.renumbered(waiting);
        }
        self.identity.epoch = epoch;
        Ok(())
    }

    fn own(&self) -> Own {
        Own {
            user: self.identity.user.unwrap_or_default(),
            device: self.identity.device.unwrap_or_default(),
            epoch: self.identity.epoch,
        }
    }

    /// The HELLO was refused.
    fn refused(&mut self, error: &fulmar_protocol::frame::Error) {
        tracing::info!(code = %error.code, text = %error.text, "the gateway refused the connection");
        self.lost_after = Duration::from_millis(error.retry_after_ms.into());
        self.reason = OfflineReason::Refused(error.code);
        let changes = matches!(self.options.token, Token::Provider(_));
        match error.code.retry() {
            Retry::AfterAuth if self.by_ticket => {
                // The ticket is of no use any more; the token is.
                self.identity.ticket = None;
                self.shared.db.try_run(|store| store.forget_ticket());
            }
            Retry::AfterAuth if changes || error.code == RefusalCode::TokenNotYetValid => {}
            Retry::AfterAuth => self.end = Some(CloseReason::Refused(error.code)),
            Retry::Never if error.code == RefusalCode::KickedOut => {
                self.end = Some(CloseReason::Kicked(error.text.clone()));
            }
            Retry::Never => self.end = Some(CloseReason::Refused(error.code)),
            Retry::Same | Retry::OtherNode => {}
        }
    }

    fn committed(&mut self, committed: ledger::Committed) {
        let now = self.now();
        let ledger::Committed { delivered, arrival, receipts, names, resolved, replies } = committed;
        for (conversation, seq) in delivered.cursors {
            self.ledger.reached(conversation, seq);
            self.half.committed(conversation, seq, now);
        }
        self.shared.arrivals.send_if_modified(|newest| {
            let moved = arrival > *newest;
            *newest = arrival.max(*newest);
            moved
        });
        self.shared.traffic().stray_pieces += delivered.strays;
        self.shared.settle(&delivered.settled);
        for conversation in delivered.fresh {
            self.event(ClientEvent::Conversation { conversation });
        }
        let user = self.identity.user;
        for receipt in receipts {
            if Some(receipt.user) != user {
                self.shared.handles().receipt(receipt.conversation, receipt.recv, receipt.read);
            }
            let fulmar_protocol::frame::Receipt { conversation, user, recv, read } = receipt;
            self.event(ClientEvent::Receipt { conversation, user, recv, read });
        }
        for (user, name) in names {
            self.event(ClientEvent::Name { user, name });
        }
        for conversation in resolved {
            self.feed.hungry(conversation);
        }
        replies.send();
        self.requests.nameless(delivered.nameless);
        self.ask_names();
    }

    fn take_fresh(&mut self) {
        let now = self.now();
        let fresh = self.shared.fresh();
        let something = !fresh.handed.is_empty() || !fresh.sends.is_empty() || fresh.unresolved;
        for waiting in fresh.handed {
            self.feed.handed(waiting, &mut self.half, now);
        }
        for conversation in fresh.sends {
            self.feed.hungry(conversation);
        }
        for (conversation, read) in fresh.marks {
            self.half.mark(conversation, read, now);
        }
        for (conversation, pseq) in fresh.cancelled {
            self.feed.cancel(conversation, pseq, &mut self.half, now);
        }
        if fresh.unresolved {
            self.feed.look_for_names();
        }
        if something {
            self.step(Event::Poke);
        }
    }

    fn event(&self, event: ClientEvent) {
        // Nobody may be looking.
        let _ = self.shared.events.send(event);
    }

    /// The database failed: nothing can be promised any more.
    fn fail(&mut self, error: &Error) {
        tracing::error!(%error, "the client's database failed");
        self.end = Some(CloseReason::Database(error.to_string()));
    }

    /// Ends it: what is in the ledger is committed, what is in the buffers is sent if that is quick.
    async fn finish(&mut self) {
        let reason = self.end.take().unwrap_or(CloseReason::Requested);
        if !matches!(reason, CloseReason::Database(_)) {
            let platform = Arc::clone(&self.shared.platform);
            let lingered = within(&*platform, LINGER, self.linger()).await;
            if lingered.is_none() {
                tracing::debug!("not everything was sent before closing");
            }
        }
        self.step(Event::Close);
        self.requests.close();
        self.shared.handles().close();
        self.shared.closed.send_replace(true);
        self.shared.states.send_replace(ConnectionState::Closed { reason });
    }

    /// Until everything is written and acknowledged: a PONG says that the gateway has what was sent before its PING.
    async fn linger(&mut self) {
        let mut asked = false;
        loop {
            if self.carry_out().await.is_err() {
                return;
            }
            self.ledger.start(&self.shared, self.own());
            let online = self.link.is_some()
                && matches!(self.machine.state(), State::Syncing | State::Live | State::Draining);
            if self.ledger.is_empty() && !online {
                return;
            }
            if self.ledger.is_empty() && self.half.unacked() == 0 {
                if asked && self.ponged {
                    return;
                }
                if !asked {
                    asked = true;
                    self.ponged = false;
                    let now = self.now();
                    self.half.ping(now);
                    continue;
                }
            }
            let Self { link, ledger, .. } = self;
            let woken = poll_fn(|cx| {
                use std::task::Poll::{Pending, Ready};
                if let Ready(committed) = ledger.poll(cx) {
                    return Ready(Woken::Committed(committed));
                }
                if let Some(link) = link
                    && let Ready(event) = link.poll(true, cx)
                {
                    return Ready(Woken::Link(event));
                }
                Pending
            })
            .await;
            match woken {
                Woken::Link(LinkEvent::Frames(frames)) => {
                    let now = self.now();
                    for (channel, frame) in frames {
                        let _ = self.half.handle(channel, frame, now);
                    }
                }
                Woken::Committed(Ok(committed)) => self.committed(committed),
                _ => return,
            }
        }
    }
}

async fn sleep_until(platform: &dyn Platform, at: Option<Duration>) {
    match at {
        Some(at) => platform.sleep_until(at).await,
        None => std::future::pending().await,
    }
}
