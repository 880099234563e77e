//! The driver of one shard: takes commands, lets [`super::state`] decide, commits in groups, then tells everybody.
//!
//! - One thread per shard; reads it needs to decide may block it, nobody else. While it rests, the core that asks something brief may look at it
//!   in its place (`home`).
//! - One commit is in flight; what is decided meanwhile is the next one. That is the group commit: no timer, no
//!   minimum, a lone send is committed at once.
//! - A failed commit is void. Writes it held, and those decided since, are refused as retryable; questions are answered
//!   again without them; the conversations they touched are loaded again from disk. Until a commit succeeds, writes
//!   are refused before anything is decided about them, and reads go on (`storage`).
//! - One damaged conversation is refused alone: a batch that trips over it is committed without it.
//! - What comes while the batch is full waits: sends by app and not for long (`intake`), everything else in its order.
//!
//! Not here: what is decided (`state`, `directory`), how it is stored (`fulmar_store`).

mod broadcasting;
mod cursors;
mod entrance;
mod epochs;
mod fate;
mod links;
mod parking;
mod people;

pub use self::{
    broadcasting::open_broadcasts,
    links::{carry_link, repair_links},
};
pub use super::intake::IntakeLimits;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fmt,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use fulmar_protocol::{
    close::{CloseCode, RefusalCode},
    frame::{self, WireTime},
    id::{AppId, ConversationId, Producer, Pseq, Seq, ShardId, UserId},
};
use fulmar_store::{CommitError, ConversationClass, Op, ReadError, ShardReader, ShardWriter};
use tokio::sync::{
    mpsc::{self, error::TrySendError},
    oneshot, watch,
};
use tracing::{debug, debug_span, error};

use self::{cursors::WaitingCursors, entrance::Arrived, epochs::RecentEpochs, parking::Parking};
use super::{
    command::{Answer, Command, Refusal},
    commit::{Batch, Effect},
    directory::Directory,
    home::{Home, at_home, has_time_for, where_it_may_commit},
    intake::Intake,
    state::{Progress, State, Verdict},
    storage::Storage,
    unhurried::Unhurried,
    visits,
};
use crate::{
    broadcasts::Broadcasts,
    fanout::{
        broadcast::Broadcasting,
        owed::{Ending, Owed, Settled},
        push,
        ring::{Ring, RingLimits},
        roster::{AwayLimits, Forgotten, Roster},
    },
    ground::{blocking, is_simulated, now, unix_now},
    metrics::Metrics,
    record,
};

/// Commands that may be on their way to a shard. Full: the connection that asks waits, and its client's uplink with it. A shard
/// takes them in even while its batch is full, so that it can refuse what would have to wait for too long.
pub const QUEUE_MAX: usize = 4_096;

/// Bounds of a shard.
#[derive(Clone, Copy, Debug)]
pub struct ShardLimits {
    /// Rings of recent records.
    pub ring: RingLimits,
    /// Conversations kept loaded; beyond it those not used for longest are put away.
    pub loaded_max: usize,
    /// Members of a group.
    pub members_max: usize,
    /// Members up to which everybody who is here is served records as they come.
    pub inline_members_max: usize,
    /// Members up to which a conversation has receipts.
    pub receipts_members_max: usize,
    /// What is kept for devices that are away.
    pub away: AwayLimits,
    /// Sends that may wait for their turn.
    pub intake: IntakeLimits,
    /// How long receive and read cursors may wait for a commit of others before they get their own.
    pub cursor_delay: Duration,
}

/// Seats of a conversation up to which a visited shard tells them: a core's connections wait meanwhile.
const VISITED_SEATS_MAX: usize = 64;

/// A visited shard commits while that takes no longer than this as a rule, which is some times what two wake-ups of threads take.
const VISITED_COMMIT_WITHIN: Duration = Duration::from_micros(600);

/// Receive cursors that may wait to be written; beyond it they are written at once.
const CURSORS_WAITING_MAX: usize = 16_384;

/// Conversations that are remembered as reported damaged, so that each is logged once.
const DAMAGED_TOLD_MAX: usize = 1_024;

/// Between two lines in the log about an engine that can't read.
const UNREADABLE_TOLD_EVERY: Duration = Duration::from_secs(10);

/// What a send to a damaged conversation is told to wait: until somebody has repaired it.
const DAMAGED_WAIT_MS: u32 = 30_000;

/// Where a shard's batches are committed: the store's writer, or what a test puts around it.
pub trait CommitLog: Send + 'static {
    /// Commits a batch: all of it or nothing.
    ///
    /// # Errors
    /// Nothing of the batch is in the log, and never will be.
    fn commit(&mut self, batch: &[Op]) -> impl Future<Output = Result<(), CommitError>> + Send;
}

impl CommitLog for ShardWriter {
    async fn commit(&mut self, batch: &[Op]) -> Result<(), CommitError> {
        Self::commit(self, batch).await.map(|_| ())
    }
}

/// Sends commands to one shard.
#[derive(Clone, Debug)]
pub struct ShardHandle {
    commands: mpsc::Sender<Command>,
    /// Where the shard lives; in a simulated world, nowhere.
    home: Option<Arc<Home>>,
    unhurried: Arc<Unhurried>,
    /// Sends and others that were taken in and wait for a batch with room.
    waiting: Arc<AtomicUsize>,
    /// Why the shard takes no writes, while it takes none.
    pub fault: watch::Receiver<Option<String>>,
    /// Reads what is on disk, without asking the shard.
    pub reader: ShardReader,
}

/// What became of a command.
pub enum Handed {
    /// The shard has it.
    Over,
    /// Its queue is full: it will have it when this ends.
    Waiting(Pin<Box<dyn Future<Output = Result<(), Refusal>> + Send>>),
    /// [`RefusalCode::Draining`]: the shard is gone.
    Refused(Refusal),
}

impl fmt::Debug for Handed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Over => "Over",
            Self::Waiting(_) => "Waiting",
            Self::Refused(_) => "Refused",
        })
    }
}

impl ShardHandle {
    /// Hands a command over; waits while the queue is full.
    ///
    /// # Errors
    /// [`RefusalCode::Draining`]: the shard is gone.
    pub async fn send(&self, command: Command) -> Result<(), Refusal> {
        match self.hand(command) {
            Handed::Over => Ok(()),
            Handed::Waiting(waiting) => waiting.await,
            Handed::Refused(refusal) => Err(refusal),
        }
    }

    /// Hands a command over if there is room for it, else says what to wait for.
    pub fn hand(&self, command: Command) -> Handed {
        let draining = || Refusal::new(RefusalCode::Draining);
        match self.try_send(command) {
            Ok(()) => Handed::Over,
            Err(TrySendError::Closed(_)) => Handed::Refused(draining()),
            Err(TrySendError::Full(command)) => {
                let commands = self.commands.clone();
                Handed::Waiting(Box::pin(async move { commands.send(command).await.map_err(|_| draining()) }))
            }
        }
    }

    #[expect(clippy::result_large_err, reason = "what found no room is handed back")]
    fn try_send(&self, command: Command) -> Result<(), TrySendError<Command>> {
        visits::call(self.home.as_ref(), || self.commands.try_send(command))
    }

    /// Hands over what nobody waits for: it wakes no shard, is taken in some milliseconds later, and before whatever is handed over
    /// after it. To be called within a runtime.
    pub fn hand_unhurried(&self, command: Command) -> Handed {
        match self.unhurried.leave(command, self.home.as_ref()) {
            None => Handed::Over,
            Some(command) => self.hand(command),
        }
    }

    /// Hands a command over, or drops it when the queue is full. For what need not arrive.
    pub fn offer(&self, command: Command) -> bool {
        self.try_send(command).is_ok()
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// The shard's refusal; [`RefusalCode::Draining`] when it is gone.
    pub async fn ask<T>(&self, command: impl FnOnce(Answer<T>) -> Command) -> Result<T, Refusal> {
        let (answer, wait) = oneshot::channel();
        self.send(command(answer)).await?;
        wait.await.unwrap_or(Err(Refusal::new(RefusalCode::Draining)))
    }

    /// Asks what can't be refused.
    ///
    /// # Errors
    /// [`RefusalCode::Draining`]: the shard is gone.
    pub async fn tell<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Refusal> {
        let (answer, wait) = oneshot::channel();
        self.send(command(answer)).await?;
        wait.await.map_err(|_| Refusal::new(RefusalCode::Draining))
    }

    /// Commands that wait, besides those that nobody waits for.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.commands.max_capacity() - self.commands.capacity() + self.waiting.load(Ordering::Relaxed)
    }
}

/// Starts the shard on a thread of its own, which cores may visit (in a simulated world: as a task of this thread's `LocalSet`). It ends when
/// every handle is gone, after its last commit.
///
/// # Errors
/// The thread can't be started.
pub fn start<W: CommitLog>(
    shard: ShardId,
    writer: W,
    reader: ShardReader,
    limits: ShardLimits,
    metrics: Metrics,
) -> std::io::Result<(ShardHandle, Worker)> {
    let (commands, queue) = mpsc::channel(QUEUE_MAX);
    let directory = Directory::new(reader.clone());
    let (fault_told, fault) = watch::channel(None);
    let waiting = Arc::default();
    let unhurried = Arc::<Unhurried>::default();
    let rests = Arc::<AtomicBool>::default();
    let handle = ShardHandle {
        commands,
        home: None,
        unhurried: Arc::clone(&unhurried),
        waiting: Arc::clone(&waiting),
        fault,
        reader: reader.clone(),
    };
    metrics.storage_writable(shard, true);
    let name = format!("shard-{shard}");
    let resting = Arc::clone(&rests);
    let shard = Shard {
        started: now(),
        id: shard,
        reader,
        directory,
        limits,
        metrics,
        loaded: HashMap::new(),
        roster: Roster::new(shard, limits.away),
        broadcasts: Arc::default(),
        broadcasting: Broadcasting::default(),
        batch: Batch::default(),
        cursors: WaitingCursors::default(),
        reads: HashMap::new(),
        cursors_since: None,
        tick: 0,
        storage: Storage::default(),
        parking: Parking::default(),
        intake: Intake::new(limits.intake),
        others: VecDeque::new(),
        unhurried,
        waiting,
        rests,
        commits_in: VISITED_COMMIT_WITHIN / 2,
        recent_epochs: RecentEpochs::default(),
        fault: fault_told,
        damaged_told: HashSet::new(),
        unreadable_told: None,
    };
    if is_simulated() {
        let task = tokio::task::spawn_local(shard.run(writer, queue));
        return Ok((handle, Worker::Task(task)));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let home = Home::new(shard.run(writer, queue), resting, runtime.handle().clone());
    let handle = ShardHandle { home: Some(Arc::clone(&home)), ..handle };
    let run = move || runtime.block_on(home.live());
    Ok((handle, Worker::Thread(std::thread::Builder::new().name(name).spawn(run)?)))
}

/// What a shard runs on. It ends when nobody can ask the shard any more and everything is written down.
#[derive(Debug)]
pub enum Worker {
    /// A thread of its own.
    Thread(std::thread::JoinHandle<()>),
    /// In a simulated world, a task of the world's thread.
    Task(tokio::task::JoinHandle<()>),
}

impl Worker {
    /// Waits for the end; whether it was one in order.
    pub async fn ended(self) -> bool {
        match self {
            Self::Thread(thread) => blocking(move || thread.join().is_ok()).await.unwrap_or(false),
            Self::Task(task) => task.await.is_ok(),
        }
    }
}

#[derive(Debug)]
struct Loaded {
    state: State,
    ring: Arc<Ring>,
    /// Everybody who is here is served its records as they come.
    inline: bool,
    used: u64,
}

/// A batch whose fate is decided.
struct Done<W> {
    writer: W,
    batch: Batch,
    /// How long its commit took, if there was one.
    took: Option<Duration>,
    result: Result<(), CommitError>,
}

type InFlight<W> = Pin<Box<dyn Future<Output = Done<W>> + Send>>;

struct Shard {
    started: Instant,
    id: ShardId,
    reader: ShardReader,
    directory: Directory,
    limits: ShardLimits,
    metrics: Metrics,
    loaded: HashMap<ConversationId, Loaded>,
    roster: Roster,
    /// All broadcasts there are.
    broadcasts: Arc<Broadcasts>,
    /// Those of this shard, and who is told of them.
    broadcasting: Broadcasting,
    batch: Batch,
    /// Receive cursors that wait for a commit.
    cursors: WaitingCursors,
    /// Read cursors that wait for a commit.
    reads: HashMap<(ConversationId, UserId), Seq>,
    cursors_since: Option<Instant>,
    tick: u64,
    storage: Storage,
    /// Sends whose predecessors are missing.
    parking: Parking,
    /// Sends that came while the batch was full.
    intake: Intake<Arrived>,
    /// Other commands that did.
    others: VecDeque<Command>,
    /// Those that nobody waits for.
    unhurried: Arc<Unhurried>,
    /// How many of both, for others to see.
    waiting: Arc<AtomicUsize>,
    /// There is nothing to do: cores may visit it.
    rests: Arc<AtomicBool>,
    /// How long half of the commits take, about.
    commits_in: Duration,
    fault: watch::Sender<Option<String>>,
    recent_epochs: RecentEpochs,
    /// Damaged conversations that were logged.
    damaged_told: HashSet<ConversationId>,
    /// When it was last logged that the engine can't read.
    unreadable_told: Option<Instant>,
}

impl Shard {
    async fn run<W: CommitLog>(mut self, writer: W, mut queue: mpsc::Receiver<Command>) {
        let mut idle_writer = Some(writer);
        let mut in_flight: Option<InFlight<W>> = None;
        let mut open = true;
        let mut timer = tokio::time::interval(self.limits.cursor_delay.max(Duration::from_millis(10)));
        timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while open || in_flight.is_some() || !self.batch.is_empty() || self.somebody_waits() {
            self.let_in();
            if !open && !self.somebody_waits() {
                self.add_cursors(true);
            }
            if in_flight.is_none() && !self.batch.is_empty() {
                self.add_cursors(false);
                self.where_it_may_commit().await;
                if let Some(writer) = idle_writer.take() {
                    self.directory.batch_started();
                    let batch = std::mem::take(&mut self.batch);
                    in_flight = Some(self.commit(writer, batch));
                    let clock = self.clock();
                    self.intake.batch_left(clock);
                    self.let_in();
                }
            }
            let parked = self.parking.next_expiry();
            let telling = self.broadcasting.due().map(|due| due.saturating_sub(self.clock()));
            let rests = open && in_flight.is_none() && !self.somebody_waits();
            self.rests.store(rests, Ordering::Relaxed);
            tokio::select! {
                biased;
                done = async { match in_flight.as_mut() { Some(commit) => commit.await, None => std::future::pending().await } },
                    if in_flight.is_some() => {
                    in_flight = None;
                    let Done { writer, batch, took, result } = done;
                    if let Some(took) = took {
                        self.commits_in = towards(self.commits_in, took);
                    }
                    match self.committed(batch, result) {
                        None => idle_writer = Some(writer),
                        Some(rest) => in_flight = Some(self.commit(writer, rest)),
                    }
                }
                () = sleep(telling.unwrap_or_default()), if open && telling.is_some() => {
                    self.at_home().await;
                    let clock = self.clock();
                    self.metrics.deliveries.inc_by(self.broadcasting.tell(clock) as u64);
                }
                command = queue.recv(), if open && self.has_room() => match command {
                    Some(command) => {
                        let (mut next, mut taken) = (Some(command), 0);
                        while let Some(command) = next {
                            let work = command.work().saturating_add(self.unhurried.work());
                            if !self.is_brief(&command) || !has_time_for(work) {
                                self.at_home().await;
                            }
                            self.take_in(command);
                            taken += 1;
                            // Take what is there already, so that it shares the commit.
                            next = if taken <= QUEUE_MAX && self.has_room() { queue.try_recv().ok() } else { None };
                        }
                    }
                    None => {
                        self.at_home().await;
                        open = false;
                        self.take_in_unhurried();
                        self.add_cursors(true);
                    }
                },
                () = self.unhurried.due(), if open && self.has_room() => {
                    if !has_time_for(self.unhurried.work()) {
                        self.at_home().await;
                    }
                    self.take_in_unhurried();
                }
                () = tokio::time::sleep(parked.unwrap_or_default()), if open && parked.is_some() && self.batch.has_room() => {
                    self.at_home().await;
                    self.refuse_expired();
                }
                _ = timer.tick(), if open => {
                    self.at_home().await;
                    if self.cursors_since.is_some_and(|since| now().saturating_duration_since(since) >= self.limits.cursor_delay) {
                        self.add_cursors(true);
                    }
                    self.probe();
                    self.put_away(in_flight.is_none());
                    self.look_after_the_absent();
                }
            }
        }
        debug!(shard = %self.id, "shard ended");
    }

    /// Goes on at home, if a core visits.
    async fn at_home(&mut self) {
        self.rests.store(false, Ordering::Relaxed);
        at_home().await;
    }

    /// Goes on at home, if a core visits that has no time for a commit, or if commits take long.
    async fn where_it_may_commit(&mut self) {
        self.rests.store(false, Ordering::Relaxed);
        if self.batch.ops.is_empty() {
            return;
        }
        if self.commits_in > VISITED_COMMIT_WITHIN {
            at_home().await;
        } else {
            where_it_may_commit().await;
        }
    }

    /// Whether a command is done with in some microseconds for each that it counts as ([`Command::work`]), but for its commit: it reads a row or two,
    /// and tells few. Others are not for a core that visits.
    fn is_brief(&self, command: &Command) -> bool {
        let is_small = |conversation: &ConversationId| {
            self.loaded.contains_key(conversation) && self.roster.seats(*conversation) <= VISITED_SEATS_MAX
        };
        match command {
            Command::Send { send, .. } => send.reference.is_none() && is_small(&send.conversation),
            Command::Event { event, .. } => is_small(&event.conversation),
            Command::Mark { conversation, .. } => is_small(conversation),
            Command::Login(..)
            | Command::User { .. }
            | Command::Arrive(..)
            | Command::Confirm(_)
            | Command::Depart(_)
            | Command::KeepDigest { .. }
            | Command::Cursors { .. }
            | Command::Received { .. }
            | Command::DevicesHere(..) => true,
            Command::Direct(..)
            | Command::GroupByName { .. }
            | Command::Broadcast { .. }
            | Command::Broadcasts(_)
            | Command::Group(..)
            | Command::Members(..)
            | Command::Find { .. }
            | Command::Link(..)
            | Command::LinkDone { .. }
            | Command::KnownCursors { .. }
            | Command::Online(..)
            | Command::Trim { .. }
            | Command::Flush(_) => false,
        }
    }

    /// Time on the roster's clock.
    fn clock(&self) -> Duration {
        now().saturating_duration_since(self.started)
    }

    /// Forgets devices that have been away for too long, and counts.
    fn look_after_the_absent(&mut self) {
        let clock = self.clock();
        self.roster.expire(clock);
        let Forgotten { expired, full, marks } = self.roster.take_forgotten();
        for (reason, times) in [("expired", expired), ("full", full), ("marks", marks)] {
            self.metrics.forgotten(reason, times);
        }
        let (devices, marks) = self.roster.kept();
        self.metrics.away(self.id, devices, marks);
    }

    fn unload(&mut self, conversation: ConversationId) {
        if let Some(loaded) = self.loaded.remove(&conversation) {
            self.roster.unload(conversation, loaded.state.members());
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Settle(session, settled) => {
                if let Settled::Refused(refused) = &settled {
                    self.metrics.send_refused(refused.code.name());
                }
                if let Settled::Acked { conversation, pseq, seq, .. } = settled {
                    debug_span!("ack", conversation = conversation.get())
                        .in_scope(|| debug!(%pseq, %seq, "committed"));
                }
                session.settle(settled);
            }
            Effect::Answer { give, .. } => {
                // On disk: there is nothing to ask again.
                let _ = give(Ok(()));
            }
            Effect::Trimmed { conversation, low, count } => self.trimmed(conversation, low, count),
            Effect::Publish { conversation, record, joined, left } => {
                if record.pseq != Pseq::ZERO {
                    self.metrics.sends_accepted.inc();
                }
                let others = !joined.is_empty() || !left.is_empty();
                for user in joined {
                    self.roster.join(conversation, user);
                    for session in self.roster.sessions(user) {
                        session.rejoin(conversation, record.seq);
                    }
                }
                if let Some(loaded) = self.loaded.get_mut(&conversation) {
                    loaded.state.sent(record.sender, record.seq);
                    // Of a broadcast only the sender's own devices are told at once.
                    let everybody = self.broadcasting.published(conversation, record.seq, &loaded.ring);
                    let own = self.roster.sessions(record.sender).filter(|_| everybody);
                    let sessions = self.roster.present(conversation).chain(own);
                    let wire = record::to_wire(conversation, &record, WireTime::short(record.time));
                    let (members, max) = (loaded.state.member_count(), self.limits.inline_members_max);
                    loaded.inline = push::goes_inline(loaded.inline, members, max);
                    let origin = record::origin(&record);
                    let told = push::push(&loaded.ring, wire, origin, record.time, sessions, loaded.inline);
                    self.metrics.deliveries.inc_by(told as u64);
                    debug_span!("fanout", conversation = conversation.get())
                        .in_scope(|| debug!(seq = %record.seq, recipients = told, "committed and published"));
                }
                self.roster.mark_away(conversation);
                for user in left {
                    self.roster.leave(conversation, user);
                }
                if let Some(loaded) = self.loaded.get(&conversation).filter(|_| others) {
                    self.roster.resize(conversation, loaded.state.members());
                }
            }
        }
    }

    /// Puts conversations away that were not used for longest, when there are too many. Only between commits: a state
    /// ahead of the disk can't be loaded again.
    fn put_away(&mut self, idle: bool) {
        if !idle || !self.batch.is_empty() || self.loaded.len() <= self.limits.loaded_max {
            return;
        }
        let mut used: Vec<u64> = self.loaded.values().map(|loaded| loaded.used).collect();
        let excess =
            (self.loaded.len() - self.limits.loaded_max + self.limits.loaded_max / 10).min(used.len() - 1);
        let (_, cutoff, _) = used.select_nth_unstable(excess);
        let cutoff = *cutoff;
        let old: Vec<ConversationId> =
            self.loaded.iter().filter(|(_, loaded)| loaded.used < cutoff).map(|(id, _)| *id).collect();
        for conversation in old {
            self.unload(conversation);
        }
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Send { session, app, producer, send } => self.send(session, app, producer, &send),
            Command::Login(request, answer) => {
                let before = self.batch.ops.len();
                let result = self.login(&request);
                let again = self.asks_only(before, move |answer| Command::Login(request, answer));
                self.answer_when_committed(None, answer, result, again);
            }
            Command::User { app, name, create, answer } => {
                let before = self.batch.ops.len();
                let result = self.user(app, &name, create);
                let again = self.asks_only(before, move |answer| Command::User { app, name, create, answer });
                self.answer_when_committed(None, answer, result, again);
            }
            Command::Direct(request, answer) => {
                let before = self.batch.ops.len();
                let result = self.direct(&request);
                let about = result.as_ref().ok().map(|(conversation, _)| *conversation);
                let again = self.asks_only(before, move |answer| Command::Direct(request, answer));
                self.answer_when_committed(about, answer, result, again);
            }
            Command::GroupByName { app, name, answer } => {
                let found = self.directory.conversation(app, ConversationClass::Group, &name);
                let result = self
                    .read(found)
                    .and_then(|found| found.ok_or_else(|| RefusalCode::UnknownConversation.into()));
                let again: Option<Again<_>> =
                    Some(Box::new(move |answer| Command::GroupByName { app, name, answer }));
                self.answer_when_committed(None, answer, result, again);
            }
            Command::Broadcast { app, name, owner, answer } => {
                let before = self.batch.ops.len();
                let result = self.broadcast(app, &name, owner);
                let about = result.as_ref().ok().copied();
                let again =
                    self.asks_only(before, move |answer| Command::Broadcast { app, name, owner, answer });
                self.answer_when_committed(about, answer, result, again);
            }
            Command::Broadcasts(broadcasts) => self.broadcasts(broadcasts),
            Command::Group(request, answer) => {
                let before = self.batch.ops.len();
                let result = self.group(&request);
                let about = result.as_ref().ok().map(|(conversation, _)| *conversation);
                let again = self.asks_only(before, move |answer| Command::Group(request, answer));
                self.answer_when_committed(about, answer, result, again);
            }
            Command::Members(request, answer) => {
                let (before, about) = (self.batch.ops.len(), request.conversation);
                let result = self.members(&request);
                let again = self.asks_only(before, move |answer| Command::Members(request, answer));
                self.answer_when_committed(Some(about), answer, result, again);
            }
            Command::Find { app, conversation, producer, answer } => {
                let result = self.find(app, conversation, producer);
                let again: Option<Again<_>> =
                    Some(Box::new(move |answer| Command::Find { app, conversation, producer, answer }));
                self.answer_when_committed(Some(conversation), answer, result, again);
            }
            Command::Link(link, answer) => {
                let result = self.writable();
                if result.is_ok() {
                    self.batch.push(Op::Listed {
                        user: link.user,
                        conversation: link.conversation,
                        row: link.listed,
                    });
                }
                self.answer_when_committed(None, answer, result, None);
            }
            Command::LinkDone { conversation, user } => {
                // If not now, then by the repair when the log can be written again.
                if self.writable().is_ok() {
                    self.batch.push(Op::LinkDone { conversation, user });
                }
            }
            Command::Trim { conversation, low, count, answer } => {
                let result = self.trim(conversation, low, count);
                self.answer_when_committed(Some(conversation), answer, result, None);
            }
            Command::Arrive(session, answer) => {
                let mut lacks = self.roster.arrive(&session);
                if let Some(lacks) = &mut lacks {
                    lacks.extend(self.broadcasting.of(session.app));
                }
                self.broadcasting.arrive(&session);
                let _ = answer.send(lacks);
            }
            Command::Confirm(session) => self.take_over(&session),
            Command::Depart(session) => {
                let clock = self.clock();
                self.roster.depart(&session, clock);
                self.broadcasting.depart(&session);
            }
            Command::KnownCursors { user, device, of, answer } => {
                let _ = answer.send(self.known_cursors(user, device, of));
            }
            Command::KeepDigest { user, device, digest, moves } => {
                self.roster.keep_digest(user, device, digest, moves);
            }
            Command::Cursors { user, device, entries } => {
                for (conversation, seq) in entries {
                    self.received(user, device, conversation, seq);
                }
                if self.cursors.len() >= CURSORS_WAITING_MAX {
                    self.add_cursors(true);
                }
            }
            Command::Received { user, entries } => {
                for (conversation, seq) in entries {
                    self.progressed(conversation, user, seq, Seq::ZERO);
                }
            }
            Command::Mark { app, user, conversation, read } => self.mark(app, user, conversation, read),
            Command::Event { app, event } => self.event(app, event),
            Command::Online(users, answer) => {
                let online = users
                    .iter()
                    .map(|user| self.roster.sessions(*user).any(|session| session.is_confirmed()))
                    .collect();
                let _ = answer.send(online);
            }
            Command::DevicesHere(user, answer) => {
                let here = self
                    .roster
                    .sessions(user)
                    .filter(|session| session.is_confirmed())
                    .map(|session| session.device)
                    .collect();
                let _ = answer.send(here);
            }
            Command::Flush(answer) => {
                let result = self.writable();
                self.add_cursors(true);
                self.answer_when_committed(None, answer, result, None);
            }
        }
    }

    /// The way to ask again, for a command that has put nothing into the batch since it held `before` operations.
    fn asks_only<T>(
        &self,
        before: usize,
        again: impl FnOnce(Answer<T>) -> Command + Send + 'static,
    ) -> Option<Again<T>> {
        if self.batch.ops.len() == before { Some(Box::new(again)) } else { None }
    }

    /// Refusals are told at once, results after the commit they rest on. When that fails, `again` asks once more.
    fn answer_when_committed<T: Send + 'static>(
        &mut self,
        about: Option<ConversationId>,
        answer: Answer<T>,
        result: Result<T, Refusal>,
        again: Option<Again<T>>,
    ) {
        match result {
            Err(refusal) => {
                let _ = answer.send(Err(refusal));
            }
            Ok(value) => {
                let give = move |committed: Result<(), Refusal>| match (committed, again) {
                    (Err(_), Some(again)) => Some(again(answer)),
                    (committed, _) => {
                        let _ = answer.send(committed.map(|()| value));
                        None
                    }
                };
                self.batch.answer(about, Box::new(give));
            }
        }
    }

    fn read<T>(&mut self, result: Result<T, ReadError>) -> Result<T, Refusal> {
        result.map_err(|error| match error {
            ReadError::Damaged { conversation, .. } => {
                match conversation {
                    Some(conversation) => self.tell_damaged(conversation, &error.to_string()),
                    None => self.tell_unreadable(&error),
                }
                RefusalCode::Damaged.into()
            }
            error => {
                self.tell_unreadable(&error);
                RefusalCode::StorageUnavailable.into()
            }
        })
    }

    /// Logs once per conversation that it is damaged.
    fn tell_damaged(&mut self, conversation: ConversationId, what: &str) {
        self.metrics.damaged_reads.inc();
        if self.damaged_told.len() < DAMAGED_TOLD_MAX && self.damaged_told.insert(conversation) {
            error!(shard = %self.id, %conversation, what, "a conversation is damaged and refused; the others go on");
        }
    }

    /// Logs now and then that the engine can't read.
    fn tell_unreadable(&mut self, error: &ReadError) {
        if self.unreadable_told.is_none_or(|at| now().saturating_duration_since(at) >= UNREADABLE_TOLD_EVERY)
        {
            self.unreadable_told = Some(now());
            error!(shard = %self.id, %error, "reading the log failed");
        }
    }

    /// The conversation, loaded, if it is one of `app`.
    fn load(&mut self, app: AppId, conversation: ConversationId) -> Result<&mut Loaded, Refusal> {
        self.tick += 1;
        if !self.loaded.contains_key(&conversation) {
            if conversation.shard() != self.id {
                return Err(RefusalCode::UnknownConversation.into());
            }
            let meta = self.reader.meta(conversation);
            let meta = self.read(meta)?.ok_or(RefusalCode::UnknownConversation)?;
            if meta.app != app {
                return Err(RefusalCode::UnknownConversation.into());
            }
            let writers = self.broadcasts.get(conversation).map(|broadcast| broadcast.writers.clone());
            if meta.class == ConversationClass::Broadcast && writers.is_none() {
                // It is no longer configured.
                return Err(RefusalCode::UnknownConversation.into());
            }
            let head = self.reader.head(conversation);
            let head = self.read(head)?.unwrap_or_default();
            let mut members = Vec::new();
            let mut after = None;
            loop {
                let page = self.reader.members(conversation, after, 4_096);
                let page = self.read(page)?;
                let Some((last, _)) = page.last() else { break };
                after = Some(*last);
                members.extend(page);
            }
            let small = members.len() <= self.limits.receipts_members_max;
            let reads = if small {
                let reads = self.reader.read_cursors(conversation, None, self.limits.receipts_members_max);
                self.read(reads)?
            } else {
                Vec::new()
            };
            // Nothing can fail from here on: what is in the roster is loaded.
            self.roster.load(conversation, members.iter().map(|(user, _)| *user));
            let mut state = State::load(conversation, meta, head, members);
            if let Some(writers) = writers {
                state.open_to_all(writers);
            }
            for (user, read) in reads {
                state.restore_progress(user, Progress { recv: read, read });
            }
            let ring = Arc::new(Ring::new(self.limits.ring));
            self.loaded.insert(conversation, Loaded { state, ring, inline: true, used: self.tick });
        }
        let tick = self.tick;
        match self.loaded.get_mut(&conversation) {
            Some(loaded) if loaded.state.meta().app == app => {
                loaded.used = tick;
                Ok(loaded)
            }
            _ => Err(RefusalCode::UnknownConversation.into()),
        }
    }

    fn send(&mut self, session: Arc<Owed>, app: AppId, producer: Producer, send: &frame::Send) {
        self.offer(session, app, producer, send);
        self.unpark(send.conversation, producer);
    }

    /// Decides about one send.
    fn offer(&mut self, session: Arc<Owed>, app: AppId, producer: Producer, send: &frame::Send) {
        let (conversation, pseq) = (send.conversation, send.pseq);
        let _span = debug_span!("append", conversation = conversation.get()).entered();
        let closed = self.storage.admits(self.batch.ops.is_empty(), now());
        let verdict = self.decide(app, producer, send, closed.err().map(|refusal| refusal.code));
        let now = unix_now();
        match verdict {
            Ok(Verdict::Append(record)) => {
                debug!(%pseq, seq = %record.seq, "appended");
                self.batch.push(Op::Append { conversation, record: record.clone() });
                self.batch.acked(session, conversation, pseq, record.seq, record.time);
                self.batch.effects.push(Effect::Publish {
                    conversation,
                    record,
                    joined: vec![],
                    left: vec![],
                });
            }
            Ok(Verdict::Again(seq)) => {
                self.metrics.sends_repeated.inc();
                // It may be in a batch that is not on disk yet, so the answer takes the same way.
                match seq {
                    Some(seq) => {
                        // A client makes its own record from the answer: the time is the record's, if it is on disk.
                        let stored = self.reader.record(conversation, seq).ok().flatten();
                        let head =
                            || self.loaded.get(&conversation).map_or(now, |loaded| loaded.state.head().time);
                        let time = stored.map_or_else(head, |record| record.time);
                        self.batch.acked(session, conversation, pseq, seq, time);
                    }
                    None => {
                        let before = Settled::Before { conversation, up_to: pseq, time: now };
                        self.batch.effects.push(Effect::Settle(session, before));
                    }
                }
            }
            Ok(Verdict::Consumed { code, op }) => {
                self.batch.push(op);
                self.batch.refused(session, conversation, pseq, code.into(), pseq.saturating_add(1));
            }
            Ok(Verdict::Early { expected }) => self.park(session, app, producer, send, expected),
            Ok(Verdict::Refused { code, expected }) => {
                // Because the log can't be written: that says how long to wait as well.
                let refusal = closed.err().filter(|closed| closed.code == code);
                if refusal.is_some() {
                    self.metrics.storage_refused(code.name());
                }
                let refusal = refusal.unwrap_or_else(|| code.into());
                self.batch.refused(session, conversation, pseq, refusal, expected);
            }
            Err(refusal) => {
                // Nothing was decided, so nothing may be final: the number is not used up. What is damaged can be
                // repaired.
                let refusal = if refusal.code == RefusalCode::Damaged {
                    Refusal { code: RefusalCode::StorageUnavailable, retry_after_ms: DAMAGED_WAIT_MS }
                } else {
                    refusal
                };
                self.batch.refused(session, conversation, pseq, refusal, pseq);
            }
        }
    }

    fn decide(
        &mut self,
        app: AppId,
        producer: Producer,
        send: &frame::Send,
        closed: Option<RefusalCode>,
    ) -> Result<Verdict, Refusal> {
        self.load(app, send.conversation)?;
        let referred = match send.reference {
            Some(seq) if seq != Seq::ZERO => {
                let found = self.reader.record(send.conversation, seq);
                match self.read(found) {
                    Ok(found) => Ok(found),
                    // Only this send wants that record: it is refused for good, and what follows goes on.
                    Err(refusal) if refusal.code == RefusalCode::Damaged => Err(RefusalCode::Damaged),
                    Err(refusal) => return Err(refusal),
                }
            }
            _ => Ok(None),
        };
        let Self { loaded, reader, .. } = self;
        let loaded = loaded.get_mut(&send.conversation).ok_or(RefusalCode::UnknownConversation)?;
        if !loaded.state.knows_lane(producer.user, producer.device) {
            let lane = reader.lane(send.conversation, producer.user, producer.device);
            let lane = lane.map_err(|_| Refusal::new(RefusalCode::StorageUnavailable))?;
            loaded.state.restore_lane(producer.user, producer.device, lane);
        }
        let referred = referred.as_ref().map(Option::as_ref).map_err(|code| *code);
        Ok(loaded.state.send(producer, send, referred, closed, unix_now()))
    }

    fn trim(&mut self, conversation: ConversationId, low: Seq, count: u64) -> Result<u64, Refusal> {
        let head = self.reader.head(conversation);
        let head = self.read(head)?.ok_or(RefusalCode::UnknownConversation)?;
        let low = low.min(head.seq);
        if low <= head.low {
            return Ok(0);
        }
        self.writable()?;
        self.batch.push(Op::Low { conversation, low, count });
        self.batch.effects.push(Effect::Trimmed { conversation, low, count });
        Ok(low.since(head.low))
    }

    /// Tells the members who are here where their conversation begins now. Who is not here, or whose conversation is not
    /// loaded, learns it when it asks for anything of it.
    fn trimmed(&mut self, conversation: ConversationId, low: Seq, count: u64) {
        let Some(loaded) = self.loaded.get_mut(&conversation) else { return };
        loaded.state.trimmed(low, count);
        // What is on disk: the state may be ahead of it.
        let Ok(Some(head)) = self.reader.head(conversation) else { return };
        for session in self.roster.present(conversation) {
            let Some(member) = loaded.state.member(session.user) else { continue };
            let low = head.low.saturating_add(1).max(member.joined);
            session.trimmed(frame::Head { conversation, head: head.seq, count: head.count, low });
        }
    }

    /// Ends older connections of a device, once its client goes on with this one. Newer ones are attempts that this one won
    /// against, which their client closes, or its next connection.
    fn take_over(&self, session: &Owed) {
        if session.user.shard() == self.id {
            for other in self.roster.sessions(session.user) {
                if other.device == session.device && other.connection < session.connection {
                    other.end(Ending::Close(
                        CloseCode::Superseded,
                        "a newer connection of this device took over",
                    ));
                }
            }
        }
    }

    fn event(&mut self, app: AppId, event: frame::Event) {
        let conversation = event.conversation;
        let Ok(loaded) = self.load(app, conversation) else { return };
        if loaded.state.member(event.sender).is_none() {
            return;
        }
        for session in self.roster.present(conversation) {
            if session.user != event.sender {
                session.event(event.clone());
            }
        }
    }
}

/// A step of an eighth from what was the median of something towards what it is, by the next value. Unlike a mean it hardly
/// minds the one commit in a hundred for which the disk takes ten times as long.
fn towards(median: Duration, value: Duration) -> Duration {
    let step = median / 8 + Duration::from_micros(1);
    if value > median { median + step } else { median.saturating_sub(step) }
}

/// Waits so long; not at all, for nothing.
async fn sleep(wait: Duration) {
    if !wait.is_zero() {
        tokio::time::sleep(wait).await;
    }
}

/// Asks again what was asked in a batch that failed.
type Again<T> = Box<dyn FnOnce(Answer<T>) -> Command + Send>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_commits_is_followed_and_a_slow_one_among_many_is_not() {
        let us = Duration::from_micros;
        let after = |times: &[(usize, Duration)]| {
            let each = times.iter().flat_map(|(count, took)| std::iter::repeat_n(*took, *count));
            each.fold(us(300), towards)
        };
        for (times, from, to) in [
            (&[(100, us(300))][..], 260, 340),
            (&[(100, us(40))], 30, 50),
            (&[(20, us(2_000))], 1_500, 2_300),
            // A mean would be far above 600 after each of these.
            (&[(100, us(300)), (1, us(50_000))], 260, 400),
            (&[(3, us(300)), (1, us(50_000)), (3, us(300)), (1, us(50_000)), (3, us(300))], 200, 450),
            (&[(50, Duration::ZERO)], 0, 2),
        ] {
            let median = after(times);
            assert!((us(from)..=us(to)).contains(&median), "{times:?}: {median:?}");
        }
    }
}
