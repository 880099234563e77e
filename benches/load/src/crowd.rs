//! The phones: one thread and runtime for each part of them, one task for each phone.
//!
//! - Threads share nothing but [`Lasts`] and what [`Phase`] says; each counts for itself.
//! - A thread's conductor hands over what is due to the phones' outboxes; a phone sends it as soon as its window has room. Either
//!   delay is counted, from when the message was due.
//! - A slow reader's task does not look at its connection until it may read on, so its streams fill as a stuck phone's do.
//!
//! Not here: when messages are due (`schedule`), what the figures mean (`verdict`).

use std::{
    cell::RefCell,
    collections::{HashMap, VecDeque},
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    rc::Rc,
    sync::{Arc, atomic::AtomicU64, atomic::Ordering, mpsc},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use fulmar_benches::{
    bare,
    meter::thread_cpu,
    phone::{Phone, Seen, Tokens},
    schedule::{Arrivals, Schedule},
};
use fulmar_protocol::{
    id::{ConversationId, Pseq, Seq},
    service::PAGE_MAX,
    session::client::Output,
};
use tokio::{
    sync::{Notify, Semaphore, watch},
    task::LocalSet,
};

use crate::{
    plan::{BROADCAST, Bodies, Lengths, Shape, Stamp, Talk, absent_user, app_name, user},
    tally::{Lasts, Tally},
};

/// Handshakes of one thread at the same time; those that wait for their turn are counted from when they were due.
const HANDSHAKES: usize = 256;

/// The first pause of a phone that was turned away in a storm, on average.
const PAUSE_MIN: Duration = Duration::from_millis(200);

/// The longest one.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// How long it tries.
const PERSISTENCE: Duration = Duration::from_secs(60);

/// Heads of a conversation come no sooner after each other than this, with the gateway's own `fanout.head_interval_ms`; a little is
/// for the way.
const HEADS_APART: Duration = Duration::from_millis(900);

/// How often a thread looks whether it is late.
const LOOK: Duration = Duration::from_millis(10);

/// What every phone is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Connect.
    Connect,
    /// Make the conversations.
    SetUp,
    /// Talk, from these times after the beginning on: when the first message is due, when measuring begins, when the last is
    /// due.
    Talk(Duration, Duration, Duration),
    /// Slow readers read on as fast as they can.
    CatchUp,
    /// It is over.
    End,
}

/// What the phones are like.
#[derive(Debug)]
pub(crate) struct Orders {
    /// When everything began; all times count from here.
    pub(crate) begin: Instant,
    /// The run's own number, so that nobody else's messages count.
    pub(crate) run: u64,
    /// Where the gateway listens.
    pub(crate) gateway: SocketAddr,
    /// Its data folder: its certificate and its development key.
    pub(crate) data: PathBuf,
    /// Who talks with whom.
    pub(crate) shape: Shape,
    /// The conversations.
    pub(crate) talks: Vec<Talk>,
    /// Messages a second: of all, or of each app's senders.
    pub(crate) rates: Vec<f64>,
    /// Time between two broadcasts, if there are any.
    pub(crate) broadcast_every: Option<Duration>,
    /// From when to when it is how many times as many, after the beginning of measuring.
    pub(crate) surge: Option<(Duration, Duration, f64)>,
    /// Messages that may wait for one phone's window. What comes beyond is not sent, and counted as due.
    pub(crate) outbox: usize,
    /// How they are spread.
    pub(crate) arrivals: Arrivals,
    /// How long they are.
    pub(crate) lengths: Lengths,
    /// Threads.
    pub(crate) threads: u32,
    /// Sockets of each thread.
    pub(crate) sockets: u32,
    /// Connects a second, of all.
    pub(crate) connect_rate: f64,
    /// Bytes a second a slow reader takes; 0: none ever.
    pub(crate) slow_bytes: u32,
    /// When phones come back all at once, after the beginning of measuring, and how many of a hundred.
    pub(crate) storm: Option<(Duration, u32)>,
    /// The same seed, the same work.
    pub(crate) seed: u64,
}

impl Orders {
    /// The address of a socket. On this machine each has one of its own, so that the gateway's limits for one address don't take
    /// all phones for one household.
    fn local(&self, socket: u32) -> Ipv4Addr {
        if !self.gateway.ip().is_loopback() {
            return Ipv4Addr::UNSPECIFIED;
        }
        // 127.0.0.1 and up, round and round below 127.255.255.255.
        Ipv4Addr::from_bits(Ipv4Addr::LOCALHOST.to_bits() + socket % 0x00ff_fffe)
    }
}

/// What threads share.
#[derive(Debug, Default)]
pub(crate) struct Common {
    /// The next message's number.
    pub(crate) number: AtomicU64,
    /// Deliveries that must come of what was sent.
    pub(crate) expected: AtomicU64,
    /// Phones that a storm took, and that are not back.
    pub(crate) away: AtomicU64,
    /// Deliveries that slow readers must get in the end, those outside the measured time included.
    pub(crate) expected_slowly: AtomicU64,
    /// The last recipients.
    pub(crate) lasts: Lasts,
}

/// What a thread tells.
#[derive(Debug)]
pub(crate) enum News {
    /// A phone is connected, or can't be.
    Connected(bool),
    /// So many members more have joined.
    Joined(u64),
    /// A conversation is there.
    Made(usize, ConversationId),
    /// It can't go on.
    Failed(anyhow::Error),
}

/// A thread of phones.
#[derive(Debug)]
pub(crate) struct Thread {
    /// What it counts.
    pub(crate) tally: Arc<Tally>,
    handle: std::thread::JoinHandle<()>,
    busy: Arc<AtomicU64>,
}

impl Thread {
    /// CPU it has used, up to some milliseconds ago.
    pub(crate) fn cpu(&self) -> Duration {
        Duration::from_nanos(self.busy.load(Ordering::Relaxed))
    }

    /// Waits for its end.
    pub(crate) fn join(self) {
        // A thread that panicked has said so.
        let _ = self.handle.join();
    }
}

/// Conversations by their place in the plan, once they are made.
pub(crate) type Conversations = Arc<std::sync::OnceLock<Vec<ConversationId>>>;

/// Starts one of the threads.
///
/// # Errors
/// The system has none to spare.
pub(crate) fn start(
    ordinal: u32,
    orders: &Arc<Orders>,
    common: &Arc<Common>,
    conversations: &Conversations,
    phase: &watch::Receiver<Phase>,
    news: &mpsc::Sender<News>,
) -> anyhow::Result<Thread> {
    let tally = Arc::new(Tally::default());
    let busy = Arc::new(AtomicU64::new(0));
    let part = Part {
        ordinal,
        orders: Arc::clone(orders),
        common: Arc::clone(common),
        conversations: Arc::clone(conversations),
        tally: Arc::clone(&tally),
        phase: phase.clone(),
        news: news.clone(),
    };
    let (news, cpu) = (news.clone(), Arc::clone(&busy));
    let handle = std::thread::Builder::new().name(format!("phones-{ordinal}")).spawn(move || {
        let run = || -> anyhow::Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            LocalSet::new().block_on(&runtime, Rc::new(part).play(cpu))
        };
        if let Err(error) = run() {
            // Nobody listens any more: it is over.
            let _ = news.send(News::Failed(error));
        }
    })?;
    Ok(Thread { tally, handle, busy })
}

/// A message that is due.
struct Due {
    talk: usize,
    at: Duration,
    number: u64,
    /// There was no room for it once.
    waited: bool,
}

/// A phone as its thread sees it.
#[derive(Default)]
struct Seat {
    outbox: RefCell<VecDeque<Due>>,
    orders: RefCell<VecDeque<Order>>,
    wake: Notify,
}

enum Order {
    Make(usize),
    LookAt(usize),
    Reconnect(Duration),
}

struct Part {
    ordinal: u32,
    orders: Arc<Orders>,
    common: Arc<Common>,
    conversations: Conversations,
    tally: Arc<Tally>,
    phase: watch::Receiver<Phase>,
    news: mpsc::Sender<News>,
}

impl Part {
    fn now(&self) -> Duration {
        self.orders.begin.elapsed()
    }

    fn tell(&self, news: News) {
        // Nobody listens any more: it is over.
        let _ = self.news.send(news);
    }

    async fn until(&self, at: Duration) {
        tokio::time::sleep_until((self.orders.begin + at).into()).await;
    }

    /// Waits until the phase is one of these.
    async fn reach<T>(&self, found: impl Fn(Phase) -> Option<T>) -> Option<T> {
        let mut phase = self.phase.clone();
        loop {
            let now = *phase.borrow_and_update();
            if let Some(found) = found(now) {
                return Some(found);
            }
            phase.changed().await.ok()?;
        }
    }

    /// Whether the figures of a message that is due then count.
    fn counts(&self, due: Duration) -> bool {
        matches!(*self.phase.borrow(), Phase::Talk(_, from, until) if due >= from && due < until)
    }

    async fn play(self: Rc<Self>, cpu: Arc<AtomicU64>) -> anyhow::Result<()> {
        let sockets = (0..self.orders.sockets).map(|n| {
            let number = self.ordinal.saturating_mul(self.orders.sockets).saturating_add(n);
            bare::client_endpoint_at(&self.orders.data, self.orders.local(number))
        });
        let sockets: Rc<[quinn::Endpoint]> = sockets.collect::<Result<Vec<_>, _>>()?.into();
        let tokens = Rc::new(Tokens::of(&self.orders.data)?);
        let turns = Rc::new(Semaphore::new(HANDSHAKES));
        let mut seats = HashMap::new();
        let mine = (0..self.orders.shape.phones).filter(|phone| phone % self.orders.threads == self.ordinal);
        let begin = self.now();
        for (phone, socket) in mine.zip(sockets.iter().cycle()) {
            let due = begin + Duration::try_from_secs_f64(f64::from(phone) / self.orders.connect_rate)?;
            let seat = Rc::new(Seat::default());
            seats.insert(phone, Rc::clone(&seat));
            let user = User {
                part: Rc::clone(&self),
                seat,
                phone,
                socket: socket.clone(),
                tokens: Rc::clone(&tokens),
                turns: Rc::clone(&turns),
                sent: RefCell::default(),
                seen: RefCell::default(),
                told: RefCell::default(),
            };
            tokio::task::spawn_local(async move { user.live(due).await });
        }
        let seats = Rc::new(seats);
        tokio::task::spawn_local(Rc::clone(&self).look_at_the_clock(cpu));
        self.reach(|phase| (phase != Phase::Connect).then_some(())).await;
        for (number, talk) in self.orders.talks.iter().enumerate() {
            if let Some(seat) = talk.members.first().and_then(|phone| seats.get(phone)) {
                seat.orders.borrow_mut().push_back(Order::Make(number));
                seat.wake.notify_one();
            }
        }
        let talk = |phase| match phase {
            Phase::Talk(first, from, until) => Some(Some((first, from, until))),
            Phase::End => Some(None),
            Phase::Connect | Phase::SetUp | Phase::CatchUp => None,
        };
        if let Some(Some((first, from, until))) = self.reach(talk).await {
            self.look(&seats);
            let storm = Rc::clone(&self).storm(Rc::clone(&seats), from);
            tokio::task::spawn_local(storm);
            let apps = 0..self.orders.rates.len();
            let conducting = apps.map(|app| self.conduct(&seats, app, first, from, until));
            futures_util::future::join(
                futures_util::future::join_all(conducting),
                self.announce(&seats, from, until),
            )
            .await;
            self.reach(|phase| (phase == Phase::End).then_some(())).await;
        }
        Ok(())
    }

    /// Some phones have their conversations open from now on.
    fn look(&self, seats: &HashMap<u32, Rc<Seat>>) {
        if self.orders.shape.open_percent == 0 {
            return;
        }
        for (number, talk) in self.orders.talks.iter().enumerate() {
            let looking = talk.members.iter().filter(|phone| self.orders.shape.is_looking(**phone));
            for seat in looking.filter_map(|phone| seats.get(phone)) {
                seat.orders.borrow_mut().push_back(Order::LookAt(number));
                seat.wake.notify_one();
            }
        }
    }

    /// How late timers are here, and how much this thread works.
    async fn look_at_the_clock(self: Rc<Self>, cpu: Arc<AtomicU64>) {
        loop {
            tokio::time::sleep(LOOK).await;
            cpu.store(u64::try_from(thread_cpu().as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
    }

    /// Some phones lose their connections and come back, all at once.
    async fn storm(self: Rc<Self>, seats: Rc<HashMap<u32, Rc<Seat>>>, from: Duration) {
        let Some((after, percent)) = self.orders.storm else { return };
        self.until(from + after).await;
        for (phone, seat) in seats.iter() {
            // As for slow readers, by another factor: the two are not the same phones. Where few of many talk, they go on.
            let talks = self.orders.shape.pairs.is_some_and(|pairs| *phone < 2 * pairs);
            if phone.wrapping_mul(41) % 100 < percent && !self.orders.shape.is_slow(*phone) && !talks {
                self.common.away.fetch_add(1, Ordering::Relaxed);
                seat.orders.borrow_mut().push_back(Order::Reconnect(from + after));
                seat.wake.notify_one();
            }
        }
    }

    /// Hands the broadcasts over that are due, to the phone that sends them.
    async fn announce(&self, seats: &HashMap<u32, Rc<Seat>>, from: Duration, until: Duration) {
        let Some(every) = self.orders.broadcast_every else { return };
        let talk = self.orders.talks.len().checked_sub(1);
        let sender = talk.and_then(|talk| self.orders.talks.get(talk)?.members.first());
        let (Some(talk), Some(seat)) = (talk, sender.and_then(|phone| seats.get(phone))) else { return };
        let mut due = from;
        while due < until {
            self.until(due).await;
            self.tally.note(|tally, _| tally.due += 1);
            let number = self.common.number.fetch_add(1, Ordering::Relaxed);
            seat.outbox.borrow_mut().push_back(Due { talk, at: due, number, waited: false });
            seat.wake.notify_one();
            due += every;
        }
    }

    fn is_broadcast(&self, conversation: ConversationId) -> bool {
        // It is the last of them, if there is one.
        self.orders.broadcast_every.is_some()
            && self.conversations.get().and_then(|made| made.last()) == Some(&conversation)
    }

    /// Hands over what is due to the senders of an app.
    async fn conduct(
        &self,
        seats: &HashMap<u32, Rc<Seat>>,
        app: usize,
        first: Duration,
        from: Duration,
        until: Duration,
    ) {
        // Who sends here: (phone, conversation).
        let mut senders = Vec::new();
        let mut all = 0usize;
        for (number, talk) in self.orders.talks.iter().enumerate() {
            let of_app = || talk.senders.iter().filter(|phone| self.orders.shape.app(**phone) == app);
            all += of_app().count();
            senders.extend(of_app().filter(|phone| seats.contains_key(phone)).map(|phone| (*phone, number)));
        }
        let share = senders.len() as f64 / all.max(1) as f64;
        let rate = self.orders.rates.get(app).copied().unwrap_or_default() * share;
        let seed = self.orders.seed.wrapping_mul(31).wrapping_add(u64::from(self.ordinal));
        let seed = seed.wrapping_add((app as u64) << 32);
        let surge = self.orders.surge.map(|(begin, end, factor)| (from + begin, from + end, factor));
        let factor = surge.map_or(1.0, |(_, _, factor)| factor.max(1.0));
        // In a surge all of them count, else so many of them.
        let Some(mut schedule) = Schedule::new(self.orders.arrivals, rate * factor, first, seed) else {
            return;
        };
        let mut credit = 0.0;
        while schedule.peek() < until {
            self.until(schedule.peek()).await;
            let now = self.now();
            while schedule.peek() < until.min(now) {
                let due = schedule.take();
                let turn = schedule.turn(senders.len());
                let in_surge = surge.is_some_and(|(begin, end, _)| due >= begin && due < end);
                credit += if in_surge { 1.0 } else { 1.0 / factor };
                if credit < 1.0 - 1e-9 {
                    continue;
                }
                credit -= 1.0;
                let Some((phone, talk)) = senders.get(turn) else { continue };
                let Some(seat) = seats.get(phone) else { continue };
                let counts = self.counts(due);
                let mut outbox = seat.outbox.borrow_mut();
                let room = outbox.len() < self.orders.outbox;
                self.tally.note(|tally, _| {
                    tally.due += u64::from(counts);
                    tally.given_up += u64::from(counts && !room);
                    if let Some(of_app) = tally.of_app(app) {
                        of_app.due += u64::from(counts);
                    }
                });
                if room {
                    let number = self.common.number.fetch_add(1, Ordering::Relaxed);
                    outbox.push_back(Due { talk: *talk, at: due, number, waited: false });
                    seat.wake.notify_one();
                }
            }
        }
    }
}

/// One phone's life.
struct User {
    part: Rc<Part>,
    seat: Rc<Seat>,
    phone: u32,
    socket: quinn::Endpoint,
    tokens: Rc<Tokens>,
    turns: Rc<Semaphore>,
    /// What is not acked: when it was due.
    sent: RefCell<HashMap<(ConversationId, Pseq), Duration>>,
    /// The last record of each conversation.
    seen: RefCell<HashMap<ConversationId, Seq>>,
    /// When it was told the last head of each conversation.
    told: RefCell<HashMap<ConversationId, Duration>>,
}

impl User {
    async fn live(self, due: Duration) {
        let part = &self.part;
        part.until(due).await;
        let connected = self.connect(due).await;
        if let Err(error) = &connected {
            self.refused(&format!("{error:#}"));
        }
        part.tell(News::Connected(connected.is_ok()));
        let Ok(mut phone) = connected else { return };
        let mut bodies = Bodies::new(part.orders.lengths.clone(), part.orders.seed ^ u64::from(self.phone));
        loop {
            match self.attend(&mut phone, &mut bodies).await {
                Ok(due) => match self.again(phone, due).await {
                    Ok(next) => phone = next,
                    Err(error) => return self.refused(&format!("{error:#}")),
                },
                Err(error) => return self.refused(&format!("phone {}: {error:#}", self.phone)),
            }
        }
    }

    fn refused(&self, why: &str) {
        self.part.tally.note(|counts, _| {
            counts.refused += 1;
            counts.refusal.get_or_insert_with(|| why.to_owned());
        });
    }

    async fn connect(&self, due: Duration) -> anyhow::Result<Phone> {
        let _turn = self.turns.acquire().await?;
        let app = app_name(self.part.orders.shape.app(self.phone));
        let token = self.tokens.mint_for(&app, &user(self.phone))?;
        let uid = (u128::from(self.part.orders.run) << 64) | (u128::from(self.phone) + 1);
        let mut phone = Phone::connect(&self.socket, self.part.orders.gateway, token, uid).await?;
        phone.watch_sends();
        let took = self.part.now().saturating_sub(due);
        self.part.tally.note(|counts, _| counts.connect.add(took));
        Ok(phone)
    }

    /// Comes back, at once: a storm takes no turns. Who is turned away waits twice as long each time, as phones do, and not all as
    /// long as each other.
    async fn again(&self, phone: Phone, due: Duration) -> anyhow::Result<Phone> {
        let mut away = phone.leave();
        let mut pause = PAUSE_MIN;
        let mut phone = loop {
            let error = match away.reconnect(&self.socket, self.part.orders.gateway).await {
                Ok(phone) => break phone,
                Err((still, error)) => {
                    away = still;
                    error
                }
            };
            if self.part.now().saturating_sub(due) > PERSISTENCE {
                return Err(error.context("it never got back in"));
            }
            self.part.tally.note(|counts, _| counts.turned_away += 1);
            let share = f64::from(self.phone.wrapping_mul(2_654_435_761) >> 16) / 65_536.0;
            tokio::time::sleep(pause.mul_f64(0.5 + share)).await;
            pause = (pause * 2).min(PAUSE_MAX);
        };
        phone.watch_sends();
        let took = self.part.now().saturating_sub(due);
        self.part.tally.note(|counts, _| counts.back.add(took));
        self.part.common.away.fetch_sub(1, Ordering::Relaxed);
        Ok(phone)
    }

    /// Sends and receives; returns when the phone is to connect again, and since when it is.
    async fn attend(&self, phone: &mut Phone, bodies: &mut Bodies) -> anyhow::Result<Duration> {
        let is_slow = self.part.orders.shape.is_slow(self.phone);
        loop {
            let order = self.seat.orders.borrow_mut().pop_front();
            match order {
                Some(Order::Make(talk)) => self.make(phone, talk).await?,
                Some(Order::LookAt(talk)) => {
                    if let Some(conversation) = self.part.conversations.get().and_then(|made| made.get(talk))
                    {
                        phone.look_at(*conversation);
                    }
                }
                Some(Order::Reconnect(due)) => return Ok(due),
                None => {}
            }
            self.post(phone, bodies)?;
            let seen = tokio::select! {
                biased;
                () = self.seat.wake.notified() => continue,
                seen = phone.next() => seen?,
            };
            let bytes = self.take(seen, phone);
            let talking = matches!(*self.part.phase.borrow(), Phase::Talk(..));
            if is_slow
                && talking
                && let Some(bytes) = bytes
            {
                self.stall(bytes).await;
            }
        }
    }

    /// A slow reader has read so much.
    async fn stall(&self, bytes: usize) {
        let rate = self.part.orders.slow_bytes;
        if rate == 0 {
            self.part.reach(|phase| matches!(phase, Phase::CatchUp | Phase::End).then_some(())).await;
        } else {
            let pause = tokio::time::sleep(Duration::from_secs_f64(bytes as f64 / f64::from(rate)));
            tokio::select! {
                () = pause => {}
                _ = self.part.reach(|phase| matches!(phase, Phase::CatchUp | Phase::End).then_some(())) => {}
            }
        }
    }

    /// Sends what is due, as far as there is room.
    fn post(&self, phone: &mut Phone, bodies: &mut Bodies) -> anyhow::Result<()> {
        let part = &self.part;
        let Some(conversations) = part.conversations.get() else { return Ok(()) };
        loop {
            let next = self.seat.outbox.borrow_mut().pop_front();
            let Some(Due { talk, at, number, waited }) = next else { return Ok(()) };
            let Some((conversation, plan)) = conversations.get(talk).zip(part.orders.talks.get(talk)) else {
                continue;
            };
            let due = u64::try_from(at.as_nanos()).unwrap_or(u64::MAX);
            let stamp = Stamp { run: part.orders.run, number, due, sender: self.phone };
            let recipients = plan.recipients(self.phone, &part.orders.shape);
            let late = part.now().saturating_sub(at);
            let counts = part.counts(at);
            match phone.post(*conversation, bodies.message(stamp))? {
                Some(pseq) => {
                    self.sent.borrow_mut().insert((*conversation, pseq), at);
                    if counts {
                        part.common.expected.fetch_add(u64::from(recipients), Ordering::Relaxed);
                        part.common.lasts.begin(number, recipients);
                    }
                    part.common.expected_slowly.fetch_add(plan.slow_readers().into(), Ordering::Relaxed);
                    part.tally.note(|tally, _| {
                        tally.sent += u64::from(counts);
                        if counts {
                            tally.late.add(late);
                        }
                    });
                }
                None => {
                    part.tally.note(|tally, _| tally.waited += u64::from(counts && !waited));
                    self.seat.outbox.borrow_mut().push_front(Due { talk, at, number, waited: true });
                    return Ok(());
                }
            }
        }
    }

    /// Counts what was seen; how many bytes of a message.
    fn take(&self, seen: Seen, phone: &mut Phone) -> Option<usize> {
        let part = &self.part;
        let put_off = phone.take_put_off();
        let app = part.orders.shape.app(self.phone);
        if put_off > 0 {
            part.tally.note(|tally, recent| {
                tally.put_off += put_off;
                recent.put_off += put_off;
                if let Some(of_app) = tally.of_app(app) {
                    of_app.put_off += put_off;
                }
            });
        }
        match seen {
            Seen::Acked(conversation, pseq) => {
                let left = phone.left(conversation, pseq);
                let due = self.sent.borrow_mut().remove(&(conversation, pseq))?;
                let took = part.now().saturating_sub(due);
                let admitted = left.map(|left| left.elapsed());
                let counts = part.counts(due);
                part.tally.note(|tally, recent| {
                    recent.acked += 1;
                    recent.ack.add(took);
                    if let Some(admitted) = admitted {
                        recent.admitted.add(admitted);
                    }
                    if counts {
                        tally.acked += 1;
                        tally.ack.add(took);
                        if let Some(admitted) = admitted {
                            tally.admitted.add(admitted);
                        }
                        if let Some(of_app) = tally.of_app(app) {
                            of_app.acked += 1;
                            of_app.ack.add(took);
                            if let Some(admitted) = admitted {
                                of_app.admitted.add(admitted);
                            }
                        }
                    }
                });
                None
            }
            Seen::Delivered(record) => {
                let before = self.seen.borrow_mut().insert(record.conversation, record.seq);
                let is_slow = part.orders.shape.is_slow(self.phone);
                // A slow reader never sends, so that nothing reaches it but by a delivery.
                let in_order = before.is_none_or(|before| {
                    if is_slow { record.seq == before.saturating_add(1) } else { record.seq > before }
                });
                let stamp = Stamp::of(&record.payload).filter(|stamp| stamp.run == part.orders.run)?;
                if stamp.sender == self.phone {
                    return Some(record.payload.len());
                }
                let due = Duration::from_nanos(stamp.due);
                let took = part.now().saturating_sub(due);
                let counts = part.counts(due);
                let stormy = part.common.away.load(Ordering::Relaxed) > 0;
                let broadcast = part.is_broadcast(record.conversation);
                let was_last = counts && !is_slow && part.common.lasts.reached(stamp.number);
                let shape = &part.orders.shape;
                let looking = (shape.open_percent > 0).then(|| shape.is_looking(self.phone));
                part.tally.note(|tally, recent| {
                    tally.disordered += u64::from(!in_order);
                    if is_slow {
                        tally.delivered_slowly += 1;
                        return;
                    }
                    recent.delivered += 1;
                    if broadcast {
                        if counts {
                            tally.delivered += 1;
                            tally.told.add(took);
                        }
                        if was_last {
                            tally.told_last.add(took);
                        }
                        return;
                    }
                    recent.delivery.add(took);
                    if counts {
                        tally.delivered += 1;
                        tally.delivery.add(took);
                        let weather = if stormy { &mut tally.stormy } else { &mut tally.calm };
                        weather.add(took);
                        match looking {
                            Some(true) => tally.looking.add(took),
                            Some(false) => tally.elsewhere.add(took),
                            None => {}
                        }
                    }
                    if was_last {
                        tally.last.add(took);
                    }
                });
                Some(record.payload.len())
            }
            Seen::Refused(refused) => {
                self.sent.borrow_mut().remove(&(refused.conversation, refused.pseq));
                self.refused(&format!("a send was refused: {:?}", refused.code));
                None
            }
            Seen::Other(output) => {
                if let Output::Heads(heads) = *output {
                    self.told_heads(heads.iter().map(|head| head.conversation));
                }
                None
            }
        }
    }

    /// Counts heads, in the measured time only.
    fn told_heads(&self, of: impl Iterator<Item = ConversationId>) {
        let now = self.part.now();
        let counts = self.part.counts(now);
        for conversation in of {
            let before = self.told.borrow_mut().insert(conversation, now);
            let early = before.is_some_and(|before| now.saturating_sub(before) < HEADS_APART);
            self.part.tally.note(|tally, _| {
                tally.heads += u64::from(counts);
                tally.heads_early += u64::from(counts && early);
            });
        }
    }

    /// Makes a group with all its members. Those who never come are in it first: whoever is online from the beginning is told of each
    /// page of members that joins after it.
    async fn make_group(
        &self,
        phone: &mut Phone,
        number: usize,
        talk: &Talk,
    ) -> anyhow::Result<ConversationId> {
        let others = talk.members.iter().skip(1).map(|phone| user(*phone));
        let names: Vec<String> = (0..talk.absent).map(absent_user).chain(others).collect();
        let mut pages = names.chunks(PAGE_MAX);
        let first = pages.next().unwrap_or_default();
        let conversation = phone.create_group(&format!("load {number}"), first).await?;
        self.part.tell(News::Joined(first.len() as u64));
        for page in pages {
            phone.add_members(conversation, page).await?;
            self.part.tell(News::Joined(page.len() as u64));
        }
        Ok(conversation)
    }

    async fn make(&self, phone: &mut Phone, number: usize) -> anyhow::Result<()> {
        let part = &self.part;
        let talk = part.orders.talks.get(number).context("no such conversation in the plan")?;
        let made = if talk.broadcast {
            phone.open_broadcast(BROADCAST).await
        } else if part.orders.shape.groups == 0 {
            let other = talk.members.get(1).context("a pair has two")?;
            phone.open_direct(&user(*other)).await
        } else {
            self.make_group(phone, number, talk).await
        };
        match made {
            Ok(conversation) => part.tell(News::Made(number, conversation)),
            Err(error) => part.tell(News::Failed(error.context("a conversation can't be made"))),
        }
        Ok(())
    }
}
