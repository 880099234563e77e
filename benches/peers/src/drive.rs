//! The work itself, the same for every server: one thread of clients, an open loop where there is a rate.
//!
//! - At a rate, messages are due at times decided before; where it is saturated, each sender is a fixed number of messages ahead of the
//!   slowest of its acks and readers.
//! - CPU of the server is read from the kernel at both ends of the measured time, and so is our own: who reads a figure must know whether
//!   we were what was slow.
//!
//! Not here: how clients talk (`client`), what is counted (`tally`).

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, VecDeque},
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use fulmar_benches::{
    meter::process_cpu,
    payload::Payloads,
    schedule::{Arrivals, Schedule},
    times::Times,
};
use tokio::{
    sync::{Notify, Semaphore},
    task::JoinSet,
};

use crate::{
    alarm::Alarm,
    client::{Client, Door, Left, Seen, To},
    plan::{PAYLOAD_BYTES, Point, Sizes, Work},
    report::Row,
    server::Server,
    tally::{Arrival, Seen as SeenNumbers, Stamp, Tally},
};

/// Messages that may wait for room at one sender; what is due beyond that is not sent, and said.
const OUTBOX_MAX: usize = 100_000;

/// How long after the last message what is missing may come.
const LATE: Duration = Duration::from_secs(30);

/// Between the last delivery and the reading of the kernel's counts.
const BREATH: Duration = Duration::from_millis(100);

/// How often it is looked whether everything came.
const LOOK: Duration = Duration::from_millis(5);

/// Seconds from one thing to the next, where it does not matter.
const SETTLE: Duration = Duration::from_secs(1);

/// Does one piece of work and says what it came to.
///
/// # Errors
/// A client failed, or what must come did not.
pub(crate) async fn carry_out(
    work: Work,
    server: &Server,
    sizes: &Sizes,
    progress: &dyn Fn(&str),
) -> anyhow::Result<Vec<Row>> {
    match work {
        Work::A => fan_out(server, sizes, progress).await,
        Work::B => pairs(server, sizes, progress).await,
        Work::C => connections(server, sizes, progress).await,
        Work::D => resume(server, sizes, progress).await,
    }
}

/// A sender and its readers.
#[derive(Debug)]
struct Line {
    readers: u64,
    /// Acks count for how far ahead the sender is.
    is_acked: bool,
    outbox: RefCell<VecDeque<Duration>>,
    /// How far ahead it may be where it is saturated; 0: it is not.
    window: Cell<u64>,
    posted: Cell<u64>,
    acked: Cell<u64>,
    delivered: Cell<u64>,
    wake: Notify,
}

impl Line {
    fn new(readers: u32, is_acked: bool) -> Rc<Self> {
        Rc::new(Self {
            readers: readers.into(),
            is_acked,
            outbox: RefCell::default(),
            window: Cell::default(),
            posted: Cell::default(),
            acked: Cell::default(),
            delivered: Cell::default(),
            wake: Notify::new(),
        })
    }

    fn ahead(&self) -> u64 {
        let delivered = self.delivered.get() / self.readers.max(1);
        let done = if self.is_acked { delivered.min(self.acked.get()) } else { delivered };
        self.posted.get().saturating_sub(done)
    }

    /// Something came of a message: the sender may go on when half of its window is done.
    fn moved(&self) {
        if self.ahead() * 2 <= self.window.get() {
            self.wake.notify_one();
        }
    }
}

/// What tasks of one party share.
#[derive(Debug)]
struct Stage {
    begin: Instant,
    /// Between which times messages must be due so that their times count.
    counted: Cell<(Duration, Duration)>,
    tally: RefCell<Tally>,
    filler: bytes::Bytes,
    failed: RefCell<Option<anyhow::Error>>,
}

impl Stage {
    fn new() -> Rc<Self> {
        Rc::new(Self {
            begin: Instant::now(),
            counted: Cell::new((Duration::MAX, Duration::MAX)),
            tally: RefCell::default(),
            filler: Payloads::new(1).body(PAYLOAD_BYTES),
            failed: RefCell::default(),
        })
    }

    fn now(&self) -> Duration {
        self.begin.elapsed()
    }

    /// How long it took since it was due, if that counts.
    fn took(&self, due: Duration) -> Option<Duration> {
        let (from, until) = self.counted.get();
        (due >= from && due < until).then(|| self.now().saturating_sub(due))
    }

    fn fail(&self, error: anyhow::Error) {
        self.failed.borrow_mut().get_or_insert(error);
    }

    fn check(&self) -> anyhow::Result<()> {
        self.failed.borrow_mut().take().map_or(Ok(()), Err)
    }
}

async fn talk(mut client: Client, to: To, line: Rc<Line>, stage: Rc<Stage>) -> anyhow::Result<()> {
    let mut unacked: HashMap<u64, Duration> = HashMap::new();
    loop {
        loop {
            let due = line.outbox.borrow().front().copied();
            let is_due = due.is_some();
            let due = match due {
                Some(due) => due,
                None if line.ahead() < line.window.get() => stage.now(),
                None => break,
            };
            let stamp = Stamp {
                number: line.posted.get() + 1,
                due: u64::try_from(due.as_nanos()).unwrap_or(u64::MAX),
            };
            let Some(number) = client.post(&to, stamp.message(&stage.filler))? else { break };
            line.posted.set(stamp.number);
            let mut tally = stage.tally.borrow_mut();
            tally.posted += 1;
            if is_due {
                line.outbox.borrow_mut().pop_front();
                if let Some(late) = stage.took(due) {
                    tally.handed.add(late);
                }
            }
            if line.is_acked {
                unacked.insert(number, due);
            }
        }
        tokio::select! {
            biased;
            () = line.wake.notified() => {}
            seen = client.next() => if let Seen::Acked(number) = seen?
                && let Some(due) = unacked.remove(&number)
            {
                line.acked.set(line.acked.get() + 1);
                let mut tally = stage.tally.borrow_mut();
                tally.acked += 1;
                if let Some(took) = stage.took(due) {
                    tally.ack.add(took);
                }
            }
        }
    }
}

async fn listen(mut client: Client, line: Rc<Line>, stage: Rc<Stage>) -> anyhow::Result<()> {
    let mut numbers = SeenNumbers::default();
    loop {
        let Seen::Message(message) = client.next().await? else { continue };
        let Some(stamp) = Stamp::of(&message) else { continue };
        let arrival = numbers.take(stamp.number);
        stage.tally.borrow_mut().came(arrival, stage.took(Duration::from_nanos(stamp.due)));
        if arrival != Arrival::Again {
            line.delivered.set(line.delivered.get() + 1);
            line.moved();
        }
    }
}

/// Clients at work; they end with this value.
struct Party {
    stage: Rc<Stage>,
    lines: Vec<Rc<Line>>,
    tasks: JoinSet<()>,
}

impl Party {
    fn new() -> Self {
        Self { stage: Stage::new(), lines: Vec::new(), tasks: JoinSet::new() }
    }

    fn spawn(&mut self, task: impl Future<Output = anyhow::Result<()>> + 'static) {
        let stage = Rc::clone(&self.stage);
        self.tasks.spawn_local(async move {
            if let Err(error) = task.await {
                stage.fail(error);
            }
        });
    }

    fn add(&mut self, talker: Client, to: To, listeners: Vec<Client>, is_acked: bool) {
        let line = Line::new(u32::try_from(listeners.len()).unwrap_or(u32::MAX), is_acked);
        for listener in listeners {
            self.spawn(listen(listener, Rc::clone(&line), Rc::clone(&self.stage)));
        }
        self.spawn(talk(talker, to, Rc::clone(&line), Rc::clone(&self.stage)));
        self.lines.push(line);
    }

    fn missing(&self) -> u64 {
        let missing =
            |line: &Rc<Line>| (line.posted.get() * line.readers).saturating_sub(line.delivered.get());
        self.lines.iter().map(missing).sum()
    }

    fn waiting(&self) -> usize {
        self.lines.iter().map(|line| line.outbox.borrow().len()).sum()
    }

    /// Talks at a rate (messages a second, of all lines), or as fast as windows allow, and measures.
    async fn talk(
        &mut self,
        server: &Server,
        point: Point,
        pace: Pace,
        warm_up: Duration,
        time: Duration,
    ) -> anyhow::Result<Row> {
        let stage = Rc::clone(&self.stage);
        *stage.tally.borrow_mut() = Tally::default();
        let from = stage.now() + warm_up;
        let until = from + time;
        stage.counted.set((from, until));
        if let Pace::Ahead(window) = pace {
            for line in &self.lines {
                line.window.set(window);
                line.wake.notify_one();
            }
        }
        let mut not_sent = 0;
        let mut alarm = Alarm::new()?;
        let mut schedule = match pace {
            Pace::Rate(rate, arrivals) => Schedule::new(arrivals, rate, stage.now(), 1),
            Pace::Ahead(_) => None,
        };
        let mut before = None;
        loop {
            let now = stage.now();
            stage.check()?;
            if before.is_none() && now >= from {
                before = Some(Reading::of(server, &stage)?);
            }
            if now >= until {
                break;
            }
            let next = if before.is_none() { from } else { until };
            let Some(schedule) = &mut schedule else {
                alarm.wait(next.saturating_sub(now).min(Duration::from_millis(50))).await?;
                continue;
            };
            while schedule.peek() <= now {
                let due = schedule.take();
                let turn = schedule.turn(self.lines.len());
                let Some(line) = self.lines.get(turn) else { continue };
                let mut outbox = line.outbox.borrow_mut();
                if outbox.len() < OUTBOX_MAX {
                    outbox.push_back(due);
                    line.wake.notify_one();
                } else {
                    not_sent += 1;
                }
            }
            alarm.wait(schedule.peek().min(next).saturating_sub(stage.now())).await?;
        }
        let after = Reading::of(server, &stage)?;
        let before = before.context("no time to measure")?;
        let commits = after.commits_since(server, &before);
        for line in &self.lines {
            line.window.set(0);
        }
        let unsent = self.waiting();
        let waited = Instant::now();
        while self.missing() > 0 || self.waiting() > 0 {
            stage.check()?;
            if waited.elapsed() > LATE {
                break;
            }
            tokio::time::sleep(LOOK).await;
        }
        tokio::time::sleep(BREATH).await;
        let tally = stage.tally.borrow().clone();
        let mut row = Row::new(server.peer(), point);
        row.measured(&before.until(&after), &tally);
        row.syncs_per_message = commits;
        row.missing = Some(self.missing());
        if not_sent > 0 || unsent > OUTBOX_MAX / 10 {
            row.doubts.push(format!(
                "beyond saturation: {} messages that were due had not left",
                not_sent + unsent
            ));
        }
        Ok(row)
    }
}

/// How fast.
#[derive(Clone, Copy, Debug)]
enum Pace {
    /// Messages a second.
    Rate(f64, Arrivals),
    /// As fast as it goes, so many ahead.
    Ahead(u64),
}

/// What is read at one moment.
#[derive(Clone, Copy, Debug)]
struct Reading {
    at: Instant,
    server: Duration,
    us: Duration,
    delivered: u64,
    posted: u64,
    commits: Option<u64>,
}

/// What lies between two readings.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Between {
    /// How long it took.
    pub(crate) time: Duration,
    /// CPU of the server.
    pub(crate) server: Duration,
    /// CPU of this process.
    pub(crate) us: Duration,
    /// Deliveries.
    pub(crate) delivered: u64,
    /// Messages posted.
    pub(crate) posted: u64,
}

impl Reading {
    fn of(server: &Server, stage: &Stage) -> anyhow::Result<Self> {
        let commits = server.commits();
        let tally = stage.tally.borrow();
        Ok(Self {
            at: Instant::now(),
            server: server.read()?.0,
            us: process_cpu(),
            delivered: tally.delivered,
            posted: tally.posted,
            commits,
        })
    }

    fn until(&self, after: &Self) -> Between {
        Between {
            time: after.at - self.at,
            server: after.server.saturating_sub(self.server),
            us: after.us.saturating_sub(self.us),
            delivered: after.delivered - self.delivered,
            posted: after.posted - self.posted,
        }
    }

    fn commits_since(&self, server: &Server, before: &Self) -> Option<f64> {
        let _ = server;
        let commits = self.commits?.saturating_sub(before.commits?);
        let posted = self.posted.saturating_sub(before.posted);
        (posted > 0).then(|| commits as f64 / posted as f64)
    }
}

fn is_acked(server: &Server) -> bool {
    server.peer().protocol() != crate::plan::Protocol::Nats
}

async fn fan_out(server: &Server, sizes: &Sizes, progress: &dyn Fn(&str)) -> anyhow::Result<Vec<Row>> {
    progress("connecting");
    let door = Door::of(server, true, sizes.connecting)?;
    let (talker, to, listeners) = door.group(sizes.receivers).await?;
    let mut party = Party::new();
    party.add(talker, to, listeners, is_acked(server));
    progress("at a rate");
    let pace = Pace::Rate(sizes.fan_out_rate, Arrivals::Even);
    let paced = party.talk(server, Point::FanOutPaced, pace, sizes.warm_up, sizes.paced).await?;
    progress("saturated");
    let pace = Pace::Ahead(sizes.fan_out_window);
    let saturated = party.talk(server, Point::FanOutSaturated, pace, sizes.warm_up, sizes.saturated).await?;
    Ok(vec![paced, saturated])
}

async fn pairs(server: &Server, sizes: &Sizes, progress: &dyn Fn(&str)) -> anyhow::Result<Vec<Row>> {
    progress("connecting");
    let door = Door::of(server, true, sizes.connecting)?;
    let mut party = Party::new();
    for (talker, to, listener) in door.pairs(sizes.pairs).await? {
        party.add(talker, to, vec![listener], is_acked(server));
    }
    progress("at a rate");
    let pace = Pace::Rate(sizes.pair_rate, Arrivals::Poisson);
    let paced = party.talk(server, Point::PairsPaced, pace, sizes.warm_up, sizes.paced).await?;
    progress("saturated");
    let pace = Pace::Ahead(sizes.pair_window);
    let saturated = party.talk(server, Point::PairsSaturated, pace, sizes.warm_up, sizes.saturated).await?;
    Ok(vec![paced, saturated])
}

async fn connections(server: &Server, sizes: &Sizes, progress: &dyn Fn(&str)) -> anyhow::Result<Vec<Row>> {
    // What a server does once, it has done then.
    let door = Door::of(server, false, sizes.connecting)?;
    drop(door.enter_all(sizes.idle..sizes.idle + 10, false).await?);
    tokio::time::sleep(SETTLE).await;
    progress("connecting");
    let (cpu, memory) = server.read()?;
    let (begin, us) = (Instant::now(), process_cpu());
    let clients = door.enter_all(0..sizes.idle, false).await?;
    let between = Between { time: begin.elapsed(), us: process_cpu() - us, ..Between::default() };
    let connected = server.read()?.0;
    progress("idle");
    let mut party = Party::new();
    for (_, mut client) in clients {
        party.spawn(async move {
            loop {
                client.next().await?;
            }
        });
    }
    tokio::time::sleep(sizes.rest).await;
    party.stage.check().context("an idle connection ended")?;
    let held = server.read()?.1;
    let mut row = Row::new(server.peer(), Point::Connections);
    row.connected(&Between { server: connected.saturating_sub(cpu), ..between }, sizes.idle);
    row.memory_kib = Some(held.saturating_sub(memory) as f64 / 1024.0 / f64::from(sizes.idle.max(1)));
    Ok(vec![row])
}

/// Posts one message to each, and as often again as `rounds` says; returns when all are acked.
async fn post_all(
    sender: &mut Client,
    to: &[To],
    numbers: std::ops::RangeInclusive<u64>,
    stage: &Stage,
) -> anyhow::Result<u64> {
    let mut posted = 0u64;
    let mut acked = 0u64;
    let is_acked = |seen: &Seen| u64::from(matches!(seen, Seen::Acked(_)));
    for number in numbers {
        for to in to {
            let stamp = Stamp { number, due: u64::try_from(stage.now().as_nanos()).unwrap_or(u64::MAX) };
            while sender.post(to, stamp.message(&stage.filler))?.is_none() {
                acked += is_acked(&sender.next().await?);
            }
            posted += 1;
        }
    }
    while acked < posted {
        let seen = tokio::time::timeout(LATE, sender.next()).await;
        acked += is_acked(
            &seen.with_context(|| format!("{} of {posted} messages were not acked", posted - acked))??,
        );
    }
    Ok(posted)
}

async fn resume(server: &Server, sizes: &Sizes, progress: &dyn Fn(&str)) -> anyhow::Result<Vec<Row>> {
    progress("connecting");
    let door = Rc::new(Door::of(server, true, sizes.connecting)?);
    let (mut sender, followers) = door.followers(sizes.resumers).await?;
    let stage = Stage::new();
    let (to, clients): (Vec<To>, Vec<Client>) = followers.into_iter().unzip();

    progress("one message while all are here");
    let mut reading = JoinSet::new();
    for (number, mut client) in (0..sizes.resumers).zip(clients) {
        reading.spawn_local(async move {
            let mut numbers = SeenNumbers::default();
            while numbers.count() < 1 {
                if let Seen::Message(message) = client.next().await?
                    && let Some(stamp) = Stamp::of(&message)
                {
                    numbers.take(stamp.number);
                }
            }
            // What acknowledges it must leave too.
            let _ = tokio::time::timeout(SETTLE, client.next()).await;
            anyhow::Ok((number, client, numbers))
        });
    }
    post_all(&mut sender, &to, 1..=1, &stage).await?;
    let mut away = Vec::new();
    while let Some(read) = reading.join_next().await {
        let (number, client, numbers) = read??;
        away.push((number, Left::from(client), numbers));
    }
    tokio::time::sleep(SETTLE).await;

    progress("messages while all are away");
    let missed = u64::from(sizes.missed);
    post_all(&mut sender, &to, 2..=1 + missed, &stage).await?;
    tokio::time::sleep(SETTLE).await;

    progress("coming back");
    let turns = Rc::new(Semaphore::new(sizes.connecting));
    let (begin, us, cpu) = (Instant::now(), process_cpu(), server.read()?.0);
    let mut coming = JoinSet::new();
    for (number, left, mut numbers) in away {
        let (door, turns) = (Rc::clone(&door), Rc::clone(&turns));
        coming.spawn_local(async move {
            let turn = turns.acquire().await?;
            let mut client =
                door.enter_again(number, left).await.with_context(|| format!("client {number}"))?;
            drop(turn);
            let (mut late, mut again) = (0u64, 0u64);
            while numbers.count() < 1 + missed {
                let Ok(seen) = tokio::time::timeout(LATE, client.next()).await else { break };
                if let Seen::Message(message) = seen?
                    && let Some(stamp) = Stamp::of(&message)
                {
                    match numbers.take(stamp.number) {
                        Arrival::InOrder => {}
                        Arrival::Late => late += 1,
                        Arrival::Again => again += 1,
                    }
                }
            }
            // Its connection stays, and what acknowledges leaves.
            let took = begin.elapsed();
            let _ = tokio::time::timeout(Duration::from_millis(1), client.next()).await;
            anyhow::Ok((took, 1 + missed - numbers.count(), late, again, client))
        });
    }
    let mut caught_up = Times::default();
    let (mut missing, mut late, mut again, mut here) = (0, 0, 0, Vec::new());
    let mut last = Duration::ZERO;
    while let Some(came) = coming.join_next().await {
        let (took, lost, behind, twice, client) = came??;
        caught_up.add(took);
        last = last.max(took);
        missing += lost;
        late += behind;
        again += twice;
        here.push(client);
    }
    let between = Between {
        time: begin.elapsed(),
        us: process_cpu() - us,
        server: server.read()?.0.saturating_sub(cpu),
        ..Between::default()
    };
    let mut row = Row::new(server.peer(), Point::Resume);
    row.connected(&between, sizes.resumers);
    row.rate = None;
    row.latency = Some((&caught_up).into());
    row.curve = caught_up;
    row.caught_up_ms = Some(last.as_secs_f64() * 1e3);
    row.missing = Some(missing);
    row.late = Some(late);
    row.again = Some(again);
    Ok(vec![row])
}
