//! Living through a day: one phone that is measured, people who write to it, and its user.
//!
//! - What happens when follows from the seed, hour by hour; everybody else stands beside the gateway and is always there.
//! - An app in the background is suspended and its process stands still. A message that has not come after [`PUSH`] is told by a push of
//!   the vendor; that wakes the app for as long as messages come, and costs nothing here: its packets are the vendor's.
//! - At the end of the day everything that was said must have come, in both directions: figures of a phone that lost something
//!   would mean nothing.
//!
//! Not here: what an hour is like (`kinds`).

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use fulmar_client::{Client, Conversation, ConversationId, RecordKind, SendHandle};
use fulmar_sim::net::Path;
use fulmar_sim::{Phone, Rng, Sim, Spent, World};
use tokio::time::Instant;

use crate::kinds::{Background, Day, GROUP, Hour, Network};

/// From a message to the push that tells of it, unless it has come.
const PUSH: Duration = Duration::from_secs(1);

/// How long an app that was woken goes on after the last message.
const LINGER: Duration = Duration::from_secs(5);

/// How long it waits for the first.
const WAKE_MAX: Duration = Duration::from_secs(30);

/// Between two looks whether it may be suspended again.
const LOOK: Duration = Duration::from_millis(500);

/// From the end of a session until the process stands still: the connection is closed in between.
const GOODBYE: Duration = Duration::from_millis(300);

/// Between two messages of a burst.
const BURST_PAUSE: Duration = Duration::from_secs(6);

/// What the end of the day may take.
const EVENING_MAX: Duration = Duration::from_secs(120);

/// What hours of one kind came to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sum {
    pub(crate) hours: u64,
    pub(crate) sent: u64,
    pub(crate) received: u64,
    pub(crate) spent: Spent,
    /// From a message's send to the phone's app, for messages that came while the app was suspended; the push is in it.
    pub(crate) pushed: Vec<Duration>,
    /// The same for all others.
    pub(crate) live: Vec<Duration>,
}

impl Sum {
    pub(crate) fn add(&mut self, other: &Self) {
        self.hours += other.hours;
        self.sent += other.sent;
        self.received += other.received;
        self.spent = self.spent.plus(&other.spent);
        self.pushed.extend(&other.pushed);
        self.live.extend(&other.live);
    }
}

/// Lives through a day; what each kind of hour came to, by its place in the day. The event log goes to `log`.
pub(crate) fn day(day: &'static Day, seed: u64, log: Option<&std::path::Path>) -> anyhow::Result<Vec<Sum>> {
    // The others stand beside the gateway.
    let world = World::new(seed).path(Path::default()).limit(Duration::from_secs(30 * 3_600));
    let world = world.keep_log(log.is_some());
    let ended = world.run(async move |sim| {
        let mut life = Life::begin(sim, day, Rng::new(seed).fork(7)).await?;
        let mut sums = Vec::new();
        for (hour, count) in day.hours {
            let mut sum = Sum::default();
            for _ in 0..*count {
                let told = life.board().heard.len();
                let before = life.phone.spent();
                life.hour(hour).await?;
                let spent = life.phone.spent().since(&before);
                let mut one = life.told_since(told);
                (one.hours, one.sent, one.received) = (1, hour.sent, hour.direct + hour.group);
                one.spent = spent;
                sum.add(&one);
            }
            sums.push(sum);
        }
        life.end().await?;
        Ok(sums)
    });
    if let (Some(file), Some(lines)) = (log, &ended.log) {
        std::fs::write(file, lines)?;
    }
    ended.value
}

/// What the app has been handed.
#[derive(Debug, Default)]
struct Board {
    /// Number → when it was said, and whether the app was suspended then.
    said: BTreeMap<u64, (Instant, bool)>,
    /// In the order in which they came: number, when.
    heard: Vec<(u64, Instant)>,
    /// Who is unread, and up to where.
    unread: BTreeMap<ConversationId, fulmar_client::Seq>,
}

struct Life<'a> {
    sim: &'a Sim,
    rng: Rng,
    phone: Phone,
    client: Client,
    board: Arc<Mutex<Board>>,
    looking: Arc<AtomicBool>,
    /// The conversations as the phone's app has them, and as the others do.
    ours: [Conversation; 2],
    friend: Conversation,
    group: Vec<Conversation>,
    /// The others' clients, which live as long as the day.
    _others: Vec<Client>,
    network: &'static Network,
    /// The app knows which network it is in.
    told: bool,
    suspended: bool,
    /// Woken by a push, at this moment.
    woken: Option<Instant>,
    /// When the business sees that a message has not come: number, and where it was said.
    pushes: VecDeque<(Instant, u64, ConversationId)>,
    next: u64,
    waiting: Vec<SendHandle>,
}

#[derive(Clone, Copy, Debug)]
enum Happening {
    Look,
    LookAway,
    Send,
    Direct,
    Group,
    Move(usize),
}

async fn live(client: &Client) -> anyhow::Result<()> {
    let reached = tokio::time::timeout(EVENING_MAX, client.state().live()).await;
    anyhow::ensure!(reached.context("not live in time")?, "the client closed");
    Ok(())
}

/// A text of a length as people write it, that begins with a number.
fn text(number: u64, rng: &mut Rng) -> Vec<u8> {
    let mut text = number.to_be_bytes().to_vec();
    let len = usize::try_from(rng.between(20, 160)).unwrap_or(100);
    text.resize(len, b'.');
    text
}

/// What comes is taken, and marked as read while somebody looks.
async fn read(client: Client, board: Arc<Mutex<Board>>, looking: Arc<AtomicBool>) {
    let mut messages = client.messages();
    while let Some(message) = messages.next().await {
        let said = message.kind == RecordKind::Message && !message.own;
        let Some(number) = message.payload.first_chunk().filter(|_| said) else { continue };
        let looking = looking.load(Ordering::Relaxed);
        {
            let mut board = board.lock().unwrap_or_else(PoisonError::into_inner);
            board.heard.push((u64::from_be_bytes(*number), Instant::now()));
            if !looking {
                board.unread.insert(message.conversation, message.seq);
            }
        }
        if looking {
            // A client that is closed has no marks.
            let _ = client.conversation(message.conversation).mark_read(message.seq).await;
        }
    }
}

/// The others read at once.
async fn read_as_friend(client: Client) {
    let mut messages = client.messages();
    while let Some(message) = messages.next().await {
        if !message.own {
            let _ = client.conversation(message.conversation).mark_read(message.seq).await;
        }
    }
}

impl<'a> Life<'a> {
    async fn begin(sim: &'a Sim, day: &Day, rng: Rng) -> anyhow::Result<Self> {
        let (first, _) = day.hours.first().context("a day without hours")?;
        let network = *first.networks.first().context("an hour without a network")?;
        let phone = sim.phone("alice");
        phone.set_path((network.path)());
        phone.nat_idle_max(Some(Duration::from_secs(network.nat_s)));
        let options = phone.options().network(Phone::hint(network.kind)).network_name(network.name);
        let client = Client::connect(options).await?;
        live(&client).await?;
        let mut others = Vec::new();
        for number in 0..GROUP {
            let other = sim.phone(&format!("friend-{number}")).connect().await?;
            live(&other).await?;
            others.push(other);
        }
        let names: Vec<String> = (1..GROUP).map(|number| format!("friend-{number}")).collect();
        let mut names: Vec<&str> = names.iter().map(String::as_str).collect();
        names.push("alice");
        let first = others.first().context("nobody else")?;
        let made = first.create_group("friends", &names).await?;
        let number = made.number().context("a group without a number")?;
        let friend = first.direct("alice").await?;
        let direct = friend.resolved().await?;
        let group = others.iter().map(|other| other.conversation(number)).collect();
        for other in &others {
            tokio::task::spawn_local(read_as_friend(other.clone()));
        }
        let (board, looking) = (Arc::default(), Arc::new(AtomicBool::new(false)));
        phone.run(read(client.clone(), Arc::clone(&board), Arc::clone(&looking)));
        let ours = [client.conversation(direct), client.conversation(number)];
        // What getting to know each other costs is no part of the day.
        sim.sleep(Duration::from_secs(60)).await;
        Ok(Self {
            sim,
            rng,
            phone,
            client,
            board,
            looking,
            ours,
            friend,
            group,
            _others: others,
            network,
            told: true,
            suspended: false,
            woken: None,
            pushes: VecDeque::new(),
            next: 1,
            waiting: Vec::new(),
        })
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long what came since then was on its way.
    fn told_since(&self, count: usize) -> Sum {
        let mut sum = Sum::default();
        let board = self.board();
        for (number, at) in board.heard.iter().skip(count) {
            if let Some((said, suspended)) = board.said.get(number) {
                let took = at.saturating_duration_since(*said);
                if *suspended { sum.pushed.push(took) } else { sum.live.push(took) }
            }
        }
        sum
    }

    async fn hour(&mut self, hour: &Hour) -> anyhow::Result<()> {
        let begin = Instant::now();
        let end = begin + Duration::from_secs(3_600);
        let first = *hour.networks.first().context("an hour without a network")?;
        if !std::ptr::eq(first, self.network) {
            self.enter(first).await?;
        }
        match hour.background {
            Background::Connected => {
                self.wake(None).await?;
                self.woken = None;
            }
            Background::Pushed => self.suspend().await?,
        }
        for (at, what) in self.draw(hour) {
            self.pass(hour, begin + at).await?;
            self.happens(hour, what).await?;
        }
        self.pass(hour, end).await
    }

    /// What happens in an hour and when, in order.
    fn draw(&mut self, hour: &Hour) -> Vec<(Duration, Happening)> {
        let mut all = Vec::new();
        let length = Duration::from_secs(hour.session_s);
        // Sessions don't meet: each has its own part of the hour.
        let part = Duration::from_secs(3_600 / hour.sessions.max(1));
        let mut sessions = Vec::new();
        for number in 0..hour.sessions {
            let part_begins = part * u32::try_from(number).unwrap_or(0);
            let begins = part_begins + self.rng.duration(Duration::ZERO, part.saturating_sub(length));
            // Up to the hour's end it is still this hour's.
            let ends = (begins + length).min(Duration::from_millis(3_599_000));
            all.extend([(begins, Happening::Look), (ends, Happening::LookAway)]);
            sessions.push((begins, ends));
        }
        for _ in 0..hour.sent {
            if let Some((begins, ends)) = self.rng.pick(&sessions).copied() {
                let from = begins + Duration::from_secs(5).min(length / 2);
                all.push((self.rng.duration(from, ends), Happening::Send));
            }
        }
        for (count, what) in [(hour.direct, Happening::Direct), (hour.group, Happening::Group)] {
            let mut left = count;
            while left > 0 {
                let burst = self.rng.between(1, hour.burst * 2 - 1).min(left);
                left -= burst;
                let mut at = self.rng.duration(Duration::ZERO, Duration::from_secs(3_300));
                for _ in 0..burst {
                    all.push((at.min(Duration::from_secs(3_590)), what));
                    at += self.rng.exponential(BURST_PAUSE);
                }
            }
        }
        for number in 0..hour.moves {
            let part = Duration::from_secs(3_600 / hour.moves);
            let begins = part * u32::try_from(number).unwrap_or(0);
            let to = usize::try_from(number + 1).unwrap_or(0) % hour.networks.len();
            all.push((begins + self.rng.duration(Duration::ZERO, part), Happening::Move(to)));
        }
        all.sort_by_key(|(at, _)| *at);
        all
    }

    /// Time passes: pushes come, and an app that was woken is suspended again.
    async fn pass(&mut self, hour: &Hour, until: Instant) -> anyhow::Result<()> {
        loop {
            let push = self.pushes.front().map(|(at, ..)| *at);
            let rest = self.woken.map(|woken| {
                let board = self.board();
                let last = board.heard.last().map(|(_, at)| *at).filter(|last| *last >= woken);
                last.map_or(woken + WAKE_MAX, |last| last + LINGER)
            });
            // While it is awake, what comes moves the end.
            let look = rest.map(|rest| rest.min(Instant::now() + LOOK));
            let next = [push, look].into_iter().flatten().min().filter(|next| *next < until);
            tokio::time::sleep_until(next.unwrap_or(until)).await;
            let Some(next) = next else { return Ok(()) };
            if push == Some(next) {
                let Some((_, number, conversation)) = self.pushes.pop_front() else { continue };
                let came = self.board().heard.iter().rev().any(|(heard, _)| *heard == number);
                if self.suspended && !came {
                    self.wake(Some(conversation)).await?;
                    self.woken = Some(Instant::now());
                }
            } else if rest == Some(next) && hour.background == Background::Pushed {
                self.suspend().await?;
            }
        }
    }

    async fn happens(&mut self, hour: &Hour, what: Happening) -> anyhow::Result<()> {
        match what {
            Happening::Look => {
                self.wake(None).await?;
                self.woken = None;
                self.looking.store(true, Ordering::Relaxed);
                let unread = std::mem::take(&mut self.board().unread);
                let (client, screen) = (self.client.clone(), self.ours.clone());
                let screen = self.rng.pick(&screen).cloned().context("no conversation")?;
                self.phone.run(async move {
                    for (conversation, seq) in unread {
                        // A client that is closed has no marks; a screen that nobody was told of is none.
                        let _ = client.conversation(conversation).mark_read(seq).await;
                    }
                    let _ = screen.on_screen().await;
                });
            }
            Happening::LookAway => {
                self.looking.store(false, Ordering::Relaxed);
                if hour.background == Background::Pushed {
                    self.suspend().await?;
                }
            }
            Happening::Send => {
                let payload = text(0, &mut self.rng);
                let to = self.rng.pick(&self.ours).context("no conversation")?;
                // Whether it is seen is nobody's promise.
                let _ = to.typing().await;
                self.waiting.push(to.send(payload).await?);
            }
            Happening::Direct => {
                let from = self.friend.clone();
                self.say(&from).await?;
            }
            Happening::Group => {
                let from = self.rng.pick(&self.group).cloned().context("an empty group")?;
                self.say(&from).await?;
            }
            Happening::Move(to) => {
                let network = *hour.networks.get(to).context("no such network")?;
                self.enter(network).await?;
            }
        }
        Ok(())
    }

    /// Somebody writes to the phone.
    async fn say(&mut self, from: &Conversation) -> anyhow::Result<()> {
        let number = self.next;
        self.next += 1;
        let suspended = self.suspended;
        self.board().said.insert(number, (Instant::now(), suspended));
        let payload = text(number, &mut self.rng);
        from.send(payload).await?;
        let conversation = from.number().context("a conversation without a number")?;
        self.pushes.push_back((Instant::now() + PUSH, number, conversation));
        Ok(())
    }

    async fn enter(&mut self, network: &'static Network) -> anyhow::Result<()> {
        self.network = network;
        self.phone.change_network((network.path)());
        self.phone.nat_idle_max(Some(Duration::from_secs(network.nat_s)));
        self.told = false;
        if !self.suspended {
            self.tell().await?;
        }
        Ok(())
    }

    /// The operating system tells the app where it is.
    async fn tell(&mut self) -> anyhow::Result<()> {
        if !std::mem::replace(&mut self.told, true) {
            self.client.network_changed_to(Phone::hint(self.network.kind), self.network.name).await?;
        }
        Ok(())
    }

    async fn wake(&mut self, pushed: Option<ConversationId>) -> anyhow::Result<()> {
        if std::mem::take(&mut self.suspended) {
            self.phone.freeze(false);
            self.tell().await?;
            match pushed {
                Some(conversation) => self.client.wake(conversation).await?,
                None => self.client.resume().await?,
            }
        }
        Ok(())
    }

    async fn suspend(&mut self) -> anyhow::Result<()> {
        self.woken = None;
        if !std::mem::replace(&mut self.suspended, true) {
            self.client.suspend().await?;
            self.sim.sleep(GOODBYE).await;
            self.phone.freeze(true);
        }
        Ok(())
    }

    /// Everything that was said must be there.
    async fn end(&mut self) -> anyhow::Result<()> {
        self.wake(None).await?;
        for handle in self.waiting.drain(..) {
            let acked = tokio::time::timeout(EVENING_MAX, handle.acked()).await;
            acked.context("a message was not acked by the end of the day")??;
        }
        let late = Instant::now() + EVENING_MAX;
        let want: Vec<u64> = (1..self.next).collect();
        loop {
            let mut heard: Vec<u64> = self.board().heard.iter().map(|(number, _)| *number).collect();
            heard.sort_unstable();
            if heard == want {
                return Ok(());
            }
            let missing = want.len().saturating_sub(heard.len());
            anyhow::ensure!(Instant::now() < late, "{missing} messages are missing at the end of the day");
            self.sim.sleep(Duration::from_millis(100)).await;
        }
    }
}
