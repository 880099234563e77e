//! The driver of one shard: takes commands, lets [`super::state`] decide, commits in groups, then tells everybody.
//!
//! - One thread per shard; reads it needs to decide may block it, nobody else.
//! - One commit is in flight; what is decided meanwhile is the next one. That is the group commit: no timer, no
//!   minimum, a lone send is committed at once.
//! - A failed commit refuses everything it held and everything decided since, retryably, and forgets what it knew
//!   of the conversations, which are loaded again from disk.
//!
//! Not here: what is decided (`state`, `directory`), how it is stored (`fulmar_store`).

use std::{
    collections::HashMap,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use fulmar_protocol::{
    close::{CloseCode, RefusalCode},
    frame::{self, Receipt, WireTime},
    id::{AppId, ConversationId, DeviceId, Epoch, Producer, Pseq, Seq, ShardId, UnixMillis, UserId},
};
use fulmar_store::{
    CommitError, ConversationClass, Device, Op, PendingLink, ReadError, ShardReader, ShardWriter, User,
};
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, debug_span, error, warn};

use super::{
    command::{
        Answer, Command, DirectRequest, Found, GroupRequest, LoggedIn, LoginRequest, MembersRequest, Refusal,
    },
    commit::{Batch, Effect, send_refused},
    directory::Directory,
    state::{self, MembersChange, Progress, State, Verdict},
};
use crate::{
    fanout::{
        owed::{Ending, Owed, Settled},
        push,
        ring::{Ring, RingLimits},
        roster::Roster,
    },
    metrics::Metrics,
    record,
};

/// Commands that may wait for a shard. Full: the connection that asks waits, and its client's uplink with it.
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
    /// How long receive and read cursors may wait for a commit of others before they get their own.
    pub cursor_delay: Duration,
}

/// Receive cursors that may wait to be written; beyond it they are written at once.
const CURSORS_WAITING_MAX: usize = 16_384;

/// Links the repair asks for at a time.
const LINKS_PAGE: usize = 256;

/// Sends commands to one shard.
#[derive(Clone, Debug)]
pub struct ShardHandle {
    commands: mpsc::Sender<Command>,
    /// Reads what is on disk, without asking the shard.
    pub reader: ShardReader,
}

impl ShardHandle {
    /// Hands a command over; waits while the queue is full.
    ///
    /// # Errors
    /// [`RefusalCode::Draining`]: the shard is gone.
    pub async fn send(&self, command: Command) -> Result<(), Refusal> {
        self.commands.send(command).await.map_err(|_| Refusal::new(RefusalCode::Draining))
    }

    /// Hands a command over, or drops it when the queue is full. For what need not arrive.
    pub fn offer(&self, command: Command) -> bool {
        self.commands.try_send(command).is_ok()
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

    /// Commands that wait.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.commands.max_capacity() - self.commands.capacity()
    }
}

/// Starts the shard's thread. It ends when every handle is gone, after its last commit.
///
/// # Errors
/// The thread can't be started.
pub fn start(
    shard: ShardId,
    writer: ShardWriter,
    reader: ShardReader,
    limits: ShardLimits,
    metrics: Metrics,
) -> std::io::Result<(ShardHandle, std::thread::JoinHandle<()>)> {
    let (commands, queue) = mpsc::channel(QUEUE_MAX);
    let directory = Directory::new(reader.clone());
    let handle = ShardHandle { commands, reader: reader.clone() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let thread = std::thread::Builder::new().name(format!("shard-{shard}")).spawn(move || {
        let shard = Shard {
            id: shard,
            reader,
            directory,
            limits,
            metrics,
            loaded: HashMap::new(),
            roster: Roster::default(),
            batch: Batch::default(),
            cursors: HashMap::new(),
            reads: HashMap::new(),
            cursors_since: None,
            tick: 0,
        };
        runtime.block_on(shard.run(writer, queue));
    })?;
    Ok((handle, thread))
}

#[derive(Debug)]
struct Loaded {
    state: State,
    ring: Arc<Ring>,
    used: u64,
}

type InFlight = Pin<Box<dyn Future<Output = (ShardWriter, Vec<Effect>, Result<(), CommitError>)>>>;

struct Shard {
    id: ShardId,
    reader: ShardReader,
    directory: Directory,
    limits: ShardLimits,
    metrics: Metrics,
    loaded: HashMap<ConversationId, Loaded>,
    roster: Roster,
    batch: Batch,
    /// Receive cursors that wait for a commit.
    cursors: HashMap<(UserId, DeviceId, ConversationId), Seq>,
    /// Read cursors that wait for a commit.
    reads: HashMap<(ConversationId, UserId), Seq>,
    cursors_since: Option<Instant>,
    tick: u64,
}

impl Shard {
    async fn run(mut self, writer: ShardWriter, mut queue: mpsc::Receiver<Command>) {
        let mut idle_writer = Some(writer);
        let mut in_flight: Option<InFlight> = None;
        let mut open = true;
        let mut timer = tokio::time::interval(self.limits.cursor_delay.max(Duration::from_millis(10)));
        timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while open || in_flight.is_some() || !self.batch.is_empty() {
            if in_flight.is_none() && !self.batch.is_empty() {
                self.add_cursors(false);
                if let Some(writer) = idle_writer.take() {
                    in_flight = Some(self.commit(writer));
                }
            }
            tokio::select! {
                biased;
                done = async { match in_flight.as_mut() { Some(commit) => commit.await, None => std::future::pending().await } },
                    if in_flight.is_some() => {
                    in_flight = None;
                    let (writer, effects, result) = done;
                    idle_writer = Some(writer);
                    self.committed(effects, result);
                }
                command = queue.recv(), if open && self.batch.has_room() => match command {
                    Some(command) => {
                        self.handle(command);
                        // Take what is there already, so that it shares the commit.
                        while self.batch.has_room() {
                            let Ok(command) = queue.try_recv() else { break };
                            self.handle(command);
                        }
                    }
                    None => {
                        open = false;
                        self.add_cursors(true);
                    }
                },
                _ = timer.tick(), if open => {
                    if self.cursors_since.is_some_and(|since| since.elapsed() >= self.limits.cursor_delay) {
                        self.add_cursors(true);
                    }
                    self.put_away(in_flight.is_none());
                }
            }
        }
        debug!(shard = %self.id, "shard ended");
    }

    fn commit(&mut self, mut writer: ShardWriter) -> InFlight {
        self.directory.batch_started();
        let Batch { ops, effects, .. } = std::mem::take(&mut self.batch);
        let started = Instant::now();
        let records = ops.iter().filter(|op| matches!(op, Op::Append { .. })).count();
        let metrics = self.metrics.clone();
        Box::pin(async move {
            if ops.is_empty() {
                return (writer, effects, Ok(()));
            }
            let result = writer.commit(&ops).await.map(|_| ());
            metrics.commits.inc();
            metrics.commit_records.observe(records as f64);
            metrics.commit_duration.observe(started.elapsed().as_secs_f64());
            (writer, effects, result)
        })
    }

    fn committed(&mut self, effects: Vec<Effect>, result: Result<(), CommitError>) {
        match result {
            Ok(_) => {
                self.directory.batch_committed();
                for effect in effects {
                    self.carry_out(effect);
                }
            }
            Err(error) => {
                let code = match error {
                    CommitError::Full { .. } => RefusalCode::StorageFull,
                    _ => RefusalCode::StorageUnavailable,
                };
                error!(shard = %self.id, %error, "a commit failed; its askers are refused");
                self.directory.batch_failed();
                let since = std::mem::take(&mut self.batch);
                for effect in effects.into_iter().chain(since.effects) {
                    refuse(effect, Refusal::new(code));
                }
                let loaded: Vec<_> = self.loaded.drain().collect();
                for (conversation, loaded) in loaded {
                    self.roster.unload(conversation, loaded.state.members());
                }
            }
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Settle(session, settled) => {
                if let Settled::Acked { conversation, pseq, seq, .. } = settled {
                    debug_span!("ack", conversation = conversation.get())
                        .in_scope(|| debug!(%pseq, %seq, "committed"));
                }
                session.settle(settled);
            }
            Effect::Answer(answer) => answer(Ok(())),
            Effect::Publish { conversation, record, joined, left } => {
                for user in joined {
                    self.roster.join(conversation, user);
                }
                let sessions = self.roster.present(conversation);
                if let Some(loaded) = self.loaded.get(&conversation) {
                    let wire = record::to_wire(conversation, &record, WireTime::short(record.time));
                    let inline = loaded.state.member_count() <= self.limits.inline_members_max;
                    push::push(&loaded.ring, wire, record::origin(&record), record.time, sessions, inline);
                    self.metrics.deliveries.inc_by(sessions.len() as u64);
                    debug_span!("fanout", conversation = conversation.get()).in_scope(
                        || debug!(seq = %record.seq, recipients = sessions.len(), "committed and published"),
                    );
                }
                for user in left {
                    self.roster.leave(conversation, user);
                }
            }
        }
    }

    /// Puts cursors that wait into the batch: all of them when they are due, else only if there is room to spare.
    fn add_cursors(&mut self, due: bool) {
        if !due && self.cursors.len() + self.reads.len() < CURSORS_WAITING_MAX {
            return;
        }
        for ((conversation, user), seq) in std::mem::take(&mut self.reads) {
            self.batch.push(Op::Read { conversation, user, seq });
        }
        let mut rest = HashMap::new();
        for ((user, device, conversation), seq) in std::mem::take(&mut self.cursors) {
            if self.batch.has_room() {
                self.batch.push(Op::Recv { user, device, conversation, seq });
            } else {
                rest.insert((user, device, conversation), seq);
            }
        }
        self.cursors_since = if rest.is_empty() { None } else { Some(Instant::now()) };
        self.cursors = rest;
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
            if let Some(loaded) = self.loaded.remove(&conversation) {
                self.roster.unload(conversation, loaded.state.members());
            }
        }
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Send { session, app, producer, send } => self.send(session, app, producer, &send),
            Command::Login(request, answer) => {
                let result = self.login(&request);
                self.answer_when_committed(answer, result);
            }
            Command::User { app, name, create, answer } => {
                let result = self.user(app, &name, create);
                self.answer_when_committed(answer, result);
            }
            Command::Direct(request, answer) => {
                let result = self.direct(request);
                self.answer_when_committed(answer, result);
            }
            Command::GroupByName { app, name, answer } => {
                let found = self.directory.conversation(app, ConversationClass::Group, &name);
                let result = self
                    .read(found)
                    .and_then(|found| found.ok_or_else(|| RefusalCode::UnknownConversation.into()));
                self.answer_when_committed(answer, result);
            }
            Command::Group(request, answer) => {
                let result = self.group(request);
                self.answer_when_committed(answer, result);
            }
            Command::Members(request, answer) => {
                let result = self.members(request);
                self.answer_when_committed(answer, result);
            }
            Command::Find { app, conversation, producer, answer } => {
                let result = self.find(app, conversation, producer);
                self.answer_when_committed(answer, result);
            }
            Command::Link(link, answer) => {
                self.batch.push(Op::Listed {
                    user: link.user,
                    conversation: link.conversation,
                    row: link.listed,
                });
                self.answer_when_committed(answer, Ok(()));
            }
            Command::LinkDone { conversation, user } => self.batch.push(Op::LinkDone { conversation, user }),
            Command::Arrive(session, answer) => {
                self.arrive(&session);
                let _ = answer.send(());
            }
            Command::Depart(session) => self.roster.depart(&session),
            Command::Cursors { user, device, entries } => {
                for (conversation, seq) in entries {
                    if !self.keeps_cursor(user, device, conversation) {
                        continue;
                    }
                    let known = self.cursors.entry((user, device, conversation)).or_default();
                    *known = (*known).max(seq);
                }
                self.cursors_since.get_or_insert_with(Instant::now);
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
                let online = users.iter().map(|user| !self.roster.sessions(*user).is_empty()).collect();
                let _ = answer.send(online);
            }
            Command::DevicesHere(user, answer) => {
                let here = self.roster.sessions(user).iter().map(|session| session.device).collect();
                let _ = answer.send(here);
            }
            Command::Flush(answer) => {
                self.add_cursors(true);
                self.answer_when_committed(answer, Ok(()));
            }
        }
    }

    /// Refusals are told at once, results after the commit they rest on.
    fn answer_when_committed<T: Send + 'static>(&mut self, answer: Answer<T>, result: Result<T, Refusal>) {
        match result {
            Err(refusal) => {
                let _ = answer.send(Err(refusal));
            }
            Ok(value) => self.batch.answer(move |committed| {
                let _ = answer.send(committed.map(|()| value));
            }),
        }
    }

    fn read<T>(&self, result: Result<T, ReadError>) -> Result<T, Refusal> {
        result.map_err(|error| {
            error!(shard = %self.id, %error, "reading the log failed");
            Refusal::new(match error {
                ReadError::Damaged { .. } => RefusalCode::Damaged,
                _ => RefusalCode::StorageUnavailable,
            })
        })
    }

    /// The conversation, loaded, if it is one of `app`.
    fn load(&mut self, app: AppId, conversation: ConversationId) -> Result<&mut Loaded, Refusal> {
        self.tick += 1;
        if !self.loaded.contains_key(&conversation) {
            if conversation.shard() != self.id {
                return Err(RefusalCode::UnknownConversation.into());
            }
            let meta = self.read(self.reader.meta(conversation))?.ok_or(RefusalCode::UnknownConversation)?;
            if meta.app != app {
                return Err(RefusalCode::UnknownConversation.into());
            }
            let head = self.read(self.reader.head(conversation))?.unwrap_or_default();
            let mut members = Vec::new();
            let mut after = None;
            loop {
                let page = self.read(self.reader.members(conversation, after, 4_096))?;
                let Some((last, _)) = page.last() else { break };
                after = Some(*last);
                members.extend(page);
            }
            let small = members.len() <= self.limits.receipts_members_max;
            self.roster.load(conversation, members.iter().map(|(user, _)| *user));
            let mut state = State::load(conversation, meta, head, members);
            if small {
                let reads = self.reader.read_cursors(conversation, None, self.limits.receipts_members_max);
                for (user, read) in self.read(reads)? {
                    state.restore_progress(user, Progress { recv: read, read });
                }
            }
            let ring = Arc::new(Ring::new(self.limits.ring));
            self.loaded.insert(conversation, Loaded { state, ring, used: self.tick });
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
        let (conversation, pseq) = (send.conversation, send.pseq);
        let _span = debug_span!("append", conversation = conversation.get()).entered();
        let verdict = self.decide(app, producer, send);
        let now = unix_now();
        match verdict {
            Ok(Verdict::Append(record)) => {
                self.metrics.sends_accepted.inc();
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
                    Some(seq) => self.batch.acked(session, conversation, pseq, seq, now),
                    None => {
                        let before = Settled::Before { conversation, up_to: pseq, time: now };
                        self.batch.effects.push(Effect::Settle(session, before));
                    }
                }
            }
            Ok(Verdict::Consumed { code, op }) => {
                self.metrics.send_refused(code.name());
                self.batch.push(op);
                self.batch.refused(session, conversation, pseq, code.into(), pseq.saturating_add(1));
            }
            Ok(Verdict::Early { expected }) => {
                self.metrics.send_refused(RefusalCode::OutOfOrder.name());
                self.batch.refused(session, conversation, pseq, RefusalCode::OutOfOrder.into(), expected);
            }
            Ok(Verdict::Refused { code, expected }) => {
                self.metrics.send_refused(code.name());
                self.batch.refused(session, conversation, pseq, code.into(), expected);
            }
            Err(refusal) => {
                self.metrics.send_refused(refusal.code.name());
                self.batch.refused(session, conversation, pseq, refusal, pseq);
            }
        }
    }

    fn decide(&mut self, app: AppId, producer: Producer, send: &frame::Send) -> Result<Verdict, Refusal> {
        self.load(app, send.conversation)?;
        let referred = match send.reference {
            Some(seq) if seq != Seq::ZERO => {
                let found = self.reader.record(send.conversation, seq);
                self.read(found)?
            }
            _ => None,
        };
        let Self { loaded, reader, .. } = self;
        let loaded = loaded.get_mut(&send.conversation).ok_or(RefusalCode::UnknownConversation)?;
        if !loaded.state.knows_lane(producer.user, producer.device) {
            let lane = reader.lane(send.conversation, producer.user, producer.device);
            let lane = lane.map_err(|_| Refusal::new(RefusalCode::StorageUnavailable))?;
            loaded.state.restore_lane(producer.user, producer.device, lane);
        }
        Ok(loaded.state.send(producer, send, referred.as_ref(), unix_now()))
    }

    fn login(&mut self, request: &LoginRequest) -> Result<LoggedIn, Refusal> {
        let now = unix_now();
        let user = self.user(request.app, &request.name, true)?;
        let known = self.directory.device(user, request.uid);
        let known = self.read(known)?;
        let class_epoch = self.read(self.reader.class_epoch(user, request.class))?;
        let (device, mut row, fresh) = match known {
            Some((device, row)) => (device, row, row.epoch != request.epoch),
            None => {
                let next = self.directory.next_device(user);
                let device = self.read(next)?.ok_or(RefusalCode::StorageFull)?;
                let row = Device {
                    uid: request.uid,
                    class: request.class,
                    epoch: Epoch::ZERO,
                    class_epoch,
                    seen: now,
                };
                (device, row, true)
            }
        };
        if fresh {
            row.epoch = row.epoch.saturating_add(1);
        }
        // A device that comes back writes nothing, but for an hourly note of when it was seen.
        if fresh || row.class != request.class || now.get().saturating_sub(row.seen.get()) > 3_600_000 {
            row.seen = now;
            row.class = request.class;
            self.directory.put_device(user, device, row);
            self.batch.push(Op::Device { user, device, row });
        }
        let mut cursors = HashMap::new();
        if !fresh {
            let mut after = None;
            loop {
                let page = self.read(self.reader.recv_cursors(user, device, after, 4_096))?;
                let Some((last, _)) = page.last() else { break };
                after = Some(*last);
                cursors.extend(page);
            }
            for ((_, _, conversation), seq) in
                self.cursors.iter().filter(|((of, on, _), _)| *of == user && *on == device)
            {
                let known: &mut Seq = cursors.entry(*conversation).or_default();
                *known = (*known).max(*seq);
            }
        }
        let cursors = cursors.into_iter().collect();
        Ok(LoggedIn { user, device, epoch: row.epoch, class_epoch, fresh, cursors })
    }

    fn user(&mut self, app: AppId, name: &str, create: bool) -> Result<UserId, Refusal> {
        let found = self.directory.user(app, name);
        if let Some(user) = self.read(found)? {
            return Ok(user);
        }
        if !create {
            return Err(RefusalCode::UnknownUser.into());
        }
        let row = User { app, name: name.to_owned(), created: unix_now() };
        let user = self.directory.name_user(&row).ok_or(RefusalCode::StorageFull)?;
        self.batch.push(Op::NameUser { user, row });
        Ok(user)
    }

    fn direct(&mut self, request: DirectRequest) -> Result<(ConversationId, Vec<PendingLink>), Refusal> {
        let name = state::direct_name(request.user.0, request.peer.0);
        let found = self.directory.conversation(request.app, ConversationClass::Direct, &name);
        if let Some(found) = self.read(found)? {
            return Ok((found, Vec::new()));
        }
        let owner = request.user.0;
        let mut members = vec![request.user];
        if request.peer.0 != owner {
            members.push(request.peer);
        }
        self.create(request.app, ConversationClass::Direct, name, owner, &members)
    }

    fn group(&mut self, request: GroupRequest) -> Result<(ConversationId, Vec<PendingLink>), Refusal> {
        let found = self.directory.conversation(request.app, ConversationClass::Group, &request.name);
        let owner = request.owner.0;
        if let Some(found) = self.read(found)? {
            let loaded = self.load(request.app, found)?;
            let mine = loaded.state.meta().creator == owner;
            return if mine { Ok((found, Vec::new())) } else { Err(RefusalCode::NameTaken.into()) };
        }
        let mut members = vec![request.owner];
        for member in request.members {
            if !members.iter().any(|(user, _)| *user == member.0) {
                members.push(member);
            }
        }
        self.create(request.app, ConversationClass::Group, request.name, owner, &members)
    }

    fn create(
        &mut self,
        app: AppId,
        class: ConversationClass,
        name: String,
        owner: UserId,
        members: &[(UserId, String)],
    ) -> Result<(ConversationId, Vec<PendingLink>), Refusal> {
        let now = unix_now();
        let meta = state::meta(app, class, name, owner, now);
        let id = self.directory.name_conversation(&meta).ok_or(RefusalCode::StorageFull)?;
        let creation = State::create(id, meta, owner, members, now);
        self.tick += 1;
        let ring = Arc::new(Ring::new(self.limits.ring));
        self.roster.load(id, []);
        self.loaded.insert(id, Loaded { state: creation.state, ring, used: self.tick });
        Ok((id, self.put_change(id, creation.change)))
    }

    fn put_change(&mut self, conversation: ConversationId, change: MembersChange) -> Vec<PendingLink> {
        let MembersChange { record, ops, links, joined, left } = change;
        self.batch.extend(ops);
        self.batch.effects.push(Effect::Publish { conversation, record, joined, left });
        links
    }

    fn members(&mut self, request: MembersRequest) -> Result<(u32, Seq, Vec<PendingLink>), Refusal> {
        let members_max = self.limits.members_max;
        let loaded = self.load(request.app, request.conversation)?;
        let change =
            loaded.state.change(request.by, &request.add, &request.remove, members_max, unix_now())?;
        let Some(change) = change else { return Ok((0, Seq::ZERO, Vec::new())) };
        let changed = u32::try_from(change.joined.len() + change.left.len()).unwrap_or(u32::MAX);
        let seq = change.record.seq;
        Ok((changed, seq, self.put_change(request.conversation, change)))
    }

    fn find(
        &mut self,
        app: AppId,
        conversation: ConversationId,
        producer: Producer,
    ) -> Result<Found, Refusal> {
        let member = self.load(app, conversation)?.state.member(producer.user).copied();
        let member = member.ok_or(RefusalCode::UnknownConversation)?;
        let on_disk = self.read(self.reader.read_cursor(conversation, producer.user))?;
        let waiting = self.reads.get(&(conversation, producer.user)).copied().unwrap_or_default();
        let lane = self.read(self.reader.lane(conversation, producer.user, producer.device))?;
        let receipts_members_max = self.limits.receipts_members_max;
        let loaded = self.load(app, conversation)?;
        loaded.state.restore_lane(producer.user, producer.device, lane);
        Ok(Found {
            conversation,
            meta: loaded.state.meta().clone(),
            // The answer leaves after the commit this state rests on.
            head: *loaded.state.head(),
            progress: if loaded.state.member_count() <= receipts_members_max {
                loaded.state.members().filter_map(|user| Some((user, loaded.state.progress(user)?))).collect()
            } else {
                Vec::new()
            },
            member,
            read: on_disk.max(waiting),
            last_pseq: loaded.state.last_pseq(producer),
        })
    }

    fn arrive(&mut self, session: &Arc<Owed>) {
        if session.user.shard() == self.id {
            for other in self.roster.sessions(session.user) {
                if other.device == session.device && other.connection != session.connection {
                    other.end(Ending::Close(
                        CloseCode::Superseded,
                        "a newer connection of this device took over",
                    ));
                }
            }
        }
        self.roster.arrive(session);
    }

    /// Whether a device's cursor is worth keeping: for the conversations of its user, and those it once was in. What
    /// is not kept is asked for at the next resume, and a client that makes conversations up fills no disk.
    fn keeps_cursor(&self, user: UserId, device: DeviceId, conversation: ConversationId) -> bool {
        self.cursors.contains_key(&(user, device, conversation))
            || self.reader.user_conversation(user, conversation).is_ok_and(|listed| listed.is_some())
            || self.reader.recv_cursor(user, device, conversation).is_ok_and(|seq| seq != Seq::ZERO)
    }

    fn mark(&mut self, app: AppId, user: UserId, conversation: ConversationId, read: Seq) {
        let Ok(loaded) = self.load(app, conversation) else { return };
        if loaded.state.member(user).is_none() {
            return;
        }
        let read = read.min(loaded.state.head().seq);
        let known = self.reads.entry((conversation, user)).or_default();
        *known = (*known).max(read);
        self.cursors_since.get_or_insert_with(Instant::now);
        self.progressed(conversation, user, Seq::ZERO, read);
    }

    /// Tells the others of a small conversation how far a member has come, if that is news.
    fn progressed(&mut self, conversation: ConversationId, user: UserId, recv: Seq, read: Seq) {
        let Some(loaded) = self.loaded.get_mut(&conversation) else { return };
        if loaded.state.member_count() > self.limits.receipts_members_max {
            return;
        }
        let Some(Progress { recv, read }) = loaded.state.progressed(user, recv, read) else { return };
        let receipt = Receipt { conversation, user, recv, read };
        for session in self.roster.present(conversation) {
            session.receipt(receipt);
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

fn refuse(effect: Effect, refusal: Refusal) {
    match effect {
        Effect::Settle(
            session,
            Settled::Acked { conversation, pseq, .. } | Settled::Before { conversation, up_to: pseq, .. },
        ) => {
            session.settle(Settled::Refused(send_refused(conversation, pseq, refusal, pseq)));
        }
        Effect::Settle(session, Settled::Refused(refused)) => {
            // It was to be told after a commit that failed: what it rests on is not on disk.
            let expected: Pseq = refused.pseq;
            session.settle(Settled::Refused(send_refused(
                refused.conversation,
                refused.pseq,
                refusal,
                expected,
            )));
        }
        Effect::Answer(answer) => answer(Err(refusal)),
        Effect::Publish { .. } => {}
    }
}

/// Repairs what a crash left half done: users' lists that don't follow their conversations yet. Runs until everything
/// owed at the start is done; a link whose shard is busy is tried again.
pub async fn repair_links(shards: &[ShardHandle], route: super::route::Route) {
    for shard in shards {
        let mut after = None;
        loop {
            let reader = shard.reader.clone();
            let pending = tokio::task::spawn_blocking(move || reader.pending_links(after, LINKS_PAGE)).await;
            let pending = match pending {
                Ok(Ok(pending)) => pending,
                Ok(Err(error)) => {
                    warn!(%error, "links that wait can't be read");
                    break;
                }
                Err(_) => break,
            };
            let Some(last) = pending.last() else { break };
            after = Some((last.conversation, last.user));
            for link in pending {
                if let Err(refusal) = carry_link(shards, route, link).await {
                    warn!(conversation = %link.conversation, user = %link.user, code = %refusal.code, "a link waits");
                }
            }
        }
    }
}

/// One link: the user's list follows, then the conversation's shard is told that it did.
///
/// # Errors
/// The user's shard can't do it at the moment; the link stays pending.
pub async fn carry_link(
    shards: &[ShardHandle],
    route: super::route::Route,
    link: PendingLink,
) -> Result<(), Refusal> {
    let unknown = Refusal::new(RefusalCode::UnknownUser);
    let user = route.user(link.user).and_then(|shard| shards.get(shard)).ok_or(unknown)?;
    user.ask(|answer| Command::Link(link, answer)).await?;
    let conversation =
        route.conversation(link.conversation).and_then(|shard| shards.get(shard)).ok_or(unknown)?;
    conversation.send(Command::LinkDone { conversation: link.conversation, user: link.user }).await
}

/// The gateway's clock.
#[must_use]
pub fn unix_now() -> UnixMillis {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).ok().and_then(UnixMillis::new).unwrap_or_default()
}
