//! What is kept for devices that are away: a resume finds the same as a look at everything, over random histories of sends,
//! members, cursors, connections, expiry, failing commits and restarts; and it costs what changed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "a test that finds something wrong stops there; its numbers are small"
)]

use std::{
    collections::{BTreeMap, HashMap},
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use bytes::Bytes;
use fulmar_badnet::{Rng, Share};
use fulmar_gateway::{
    conversation::{
        Command, GroupRequest, LoginRequest, MembersRequest,
        route::{Named, Route},
        shard::{self, CommitLog, Handed, IntakeLimits, ShardHandle, ShardLimits, Worker, carry_link},
    },
    fanout::{
        owed::{Owed, Settled},
        ring::RingLimits,
        roster::{AwayLimits, MARK_BYTES, SEAT_BYTES},
    },
    ground::simulate,
    metrics::Metrics,
    receipt::resume::{self, Looked},
};
use fulmar_protocol::{
    frame::{RecordKind, Send},
    id::{
        AppId, ConversationId, DeviceClass, DeviceId, DeviceUid, Epoch, Producer, Pseq, Seq, ShardId,
        UnixMillis, UserId,
    },
    session::digest::CursorDigest,
};
use fulmar_store::{
    CommitError, EngineKind, MemoryDisk, Op, PendingLink, ShardReader, ShardWriter, Store, StoreOptions,
};
use futures_util::future::join_all;

const SHARDS: u16 = 2;

/// Commits where it is called, and fails when it is told to.
struct InPlace {
    writer: ShardWriter,
    failing: Arc<AtomicBool>,
}

struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn here<T>(future: impl Future<Output = T>) -> T {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(done) => return done,
            Poll::Pending => std::thread::park(),
        }
    }
}

impl CommitLog for InPlace {
    async fn commit(&mut self, batch: &[Op]) -> Result<(), CommitError> {
        if self.failing.load(Ordering::Relaxed) {
            return Err(CommitError::Unavailable { reason: "it fails now".to_owned() });
        }
        here(self.writer.commit(batch)).map(|_| ())
    }
}

struct Device {
    uid: DeviceUid,
    epoch: Epoch,
    number: DeviceId,
    /// The truth.
    cursors: BTreeMap<ConversationId, Seq>,
    /// Cursors the gateway may not have heard of.
    changed: BTreeMap<ConversationId, Seq>,
    /// Connections, and whether each was told what the device lacks.
    sessions: Vec<(Arc<Owed>, bool)>,
    pseqs: HashMap<ConversationId, Pseq>,
}

struct User {
    name: String,
    number: UserId,
    devices: Vec<Device>,
}

struct World {
    disk: MemoryDisk,
    limits: ShardLimits,
    metrics: Metrics,
    failing: Arc<AtomicBool>,
    store: Option<Store>,
    shards: Vec<ShardHandle>,
    workers: Vec<Worker>,
    users: Vec<User>,
    groups: Vec<(ConversationId, usize)>,
    links: Vec<PendingLink>,
    numbers: u64,
    kept: u64,
    full: u64,
}

fn app() -> AppId {
    AppId::of("demo")
}

fn limits(away: AwayLimits) -> ShardLimits {
    ShardLimits {
        ring: RingLimits { records: 8, bytes: 4_096 },
        loaded_max: 1_000_000,
        members_max: 100,
        inline_members_max: 100,
        receipts_members_max: 2,
        away,
        intake: IntakeLimits::waiting_for(Duration::from_secs(5)),
        cursor_delay: Duration::from_millis(500),
    }
}

impl World {
    async fn new(limits: ShardLimits, users: u64, devices: u64) -> Self {
        let mut world = Self {
            disk: MemoryDisk::default(),
            limits,
            metrics: Metrics::default(),
            failing: Arc::default(),
            store: None,
            shards: Vec::new(),
            workers: Vec::new(),
            users: Vec::new(),
            groups: Vec::new(),
            links: Vec::new(),
            numbers: 0,
            kept: 0,
            full: 0,
        };
        world.open();
        for user in 0..users {
            let devices = (0..devices).map(|device| Device {
                uid: DeviceUid([u8::try_from(user * 8 + device + 1).unwrap(); 16]),
                epoch: Epoch::ZERO,
                number: DeviceId::ZERO,
                cursors: BTreeMap::new(),
                changed: BTreeMap::new(),
                sessions: Vec::new(),
                pseqs: HashMap::new(),
            });
            let devices = devices.collect();
            world.users.push(User { name: format!("user-{user}"), number: UserId::default(), devices });
            assert!(world.connect(usize::try_from(user).unwrap(), 0, true).await, "nothing fails yet");
        }
        world
    }

    fn open(&mut self) {
        let options = StoreOptions {
            shards: SHARDS,
            engine: EngineKind::Memory,
            memory: Some(self.disk.clone()),
            ..StoreOptions::default()
        };
        let store = Store::open("", &options).unwrap();
        for id in (0..SHARDS).filter_map(ShardId::new) {
            let (writer, reader) = store.shard(id).unwrap();
            let writer = InPlace { writer, failing: Arc::clone(&self.failing) };
            let (handle, worker) =
                shard::start(id, writer, reader, self.limits, self.metrics.clone()).unwrap();
            self.shards.push(handle);
            self.workers.push(worker);
        }
        self.store = Some(store);
    }

    /// The gateway ends, and starts again: nothing that was kept in memory is there any more.
    async fn restart(&mut self) {
        self.shards.clear();
        for worker in self.workers.drain(..) {
            assert!(worker.ended().await);
        }
        self.store = None;
        for device in self.users.iter_mut().flat_map(|user| &mut user.devices) {
            device.sessions.clear();
        }
        self.open();
    }

    fn route(&self) -> Route {
        Route::new(SHARDS)
    }

    fn named(&self, kind: Named, name: &str) -> &ShardHandle {
        &self.shards[self.route().name(app(), kind, name)]
    }

    fn of_user(&self, user: UserId) -> &ShardHandle {
        &self.shards[self.route().user(user).unwrap()]
    }

    fn of(&self, conversation: ConversationId) -> &ShardHandle {
        &self.shards[self.route().conversation(conversation).unwrap()]
    }

    fn reader_of(&self, conversation: ConversationId) -> Option<ShardReader> {
        Some(self.shards[self.route().conversation(conversation)?].reader.clone())
    }

    /// Waits until everything asked before is decided, on disk or void, and told.
    async fn settle(&self) {
        for shard in &self.shards {
            let _ = shard.ask(Command::Flush).await;
        }
    }

    async fn carry_links(&mut self) {
        for link in std::mem::take(&mut self.links) {
            if carry_link(&self.shards, self.route(), link).await.is_err() {
                self.links.push(link);
            }
        }
    }

    async fn group(&mut self, owner: usize, members: &[usize]) -> Option<ConversationId> {
        let person = |user: &User| (user.number, user.name.clone());
        let name = format!("group-{}", self.groups.len());
        let request = GroupRequest {
            app: app(),
            name: name.clone(),
            owner: person(&self.users[owner]),
            members: members.iter().map(|user| person(&self.users[*user])).collect(),
        };
        let made = self.named(Named::Group, &name).ask(|answer| Command::Group(request, answer)).await;
        let (conversation, links) = made.ok()?;
        self.links.extend(links);
        self.carry_links().await;
        self.groups.push((conversation, owner));
        Some(conversation)
    }

    /// Groups of the first two users, made at once.
    async fn groups_of_two(&mut self, count: usize) {
        let person = |user: usize| (self.users[user].number, self.users[user].name.clone());
        let made = (self.groups.len()..self.groups.len() + count).map(|number| {
            let name = format!("group-{number}");
            let request =
                GroupRequest { app: app(), name: name.clone(), owner: person(0), members: vec![person(1)] };
            let shard = self.named(Named::Group, &name);
            shard.ask(|answer| Command::Group(request, answer))
        });
        let made: Vec<_> = join_all(made).await.into_iter().map(Result::unwrap).collect();
        let links = made.iter().flat_map(|(_, links)| links);
        let carried = join_all(links.map(|link| carry_link(&self.shards, self.route(), *link))).await;
        assert!(carried.iter().all(Result::is_ok));
        self.groups.extend(made.iter().map(|(conversation, _)| (*conversation, 0)));
    }

    async fn members(&mut self, group: usize, add: Option<usize>, remove: Option<usize>) {
        let (conversation, owner) = self.groups[group];
        let person = |user: usize| (self.users[user].number, self.users[user].name.clone());
        let request = MembersRequest {
            app: app(),
            conversation,
            by: self.users[owner].number,
            add: add.into_iter().map(person).collect(),
            remove: remove.into_iter().map(person).collect(),
        };
        if let Ok((_, _, links)) = self.of(conversation).ask(|answer| Command::Members(request, answer)).await
        {
            self.links.extend(links);
        }
        self.carry_links().await;
    }

    async fn send(&mut self, user: usize, conversation: ConversationId) -> bool {
        let User { number, devices, .. } = &mut self.users[user];
        let device = &mut devices[0];
        let pseq = *device.pseqs.entry(conversation).or_insert(Pseq::FIRST);
        let session = Arc::new(Owed::new(*number, device.number, 0, 1_000));
        let producer = Producer { user: *number, device: device.number, epoch: device.epoch };
        let send = Send {
            kind: RecordKind::Message,
            conversation,
            pseq,
            seen: Seq::ZERO,
            reference: None,
            ttl: None,
            more: false,
            continues: false,
            silent: false,
            cancel: false,
            payload: Bytes::from_static(b"hi"),
        };
        let command = Command::Send { session: Arc::clone(&session), app: app(), producer, send };
        self.of(conversation).send(command).await.unwrap();
        self.settle().await;
        let settled = session.take_control().settled;
        let device = &mut self.users[user].devices[0];
        match settled.first() {
            Some(Settled::Acked { pseq, .. }) => {
                device.pseqs.insert(conversation, pseq.next().unwrap());
                true
            }
            Some(Settled::Refused(refused)) => {
                device.pseqs.insert(conversation, refused.expected);
                false
            }
            other => panic!("{other:?}"),
        }
    }

    /// A device connects as `connection::dispatch` serves it, and what it is found to lack is compared to what a look at
    /// everything finds. `finds_out`: its connection lives until it is told. `false`: it was not let in.
    async fn connect(&mut self, user: usize, device: usize, finds_out: bool) -> bool {
        let found = self.arrive(user, device).await;
        let Some((session, found)) = found else { return false };
        if finds_out {
            resume::owe(&session, &found.missed);
        }
        self.users[user].devices[device].sessions.push((session, finds_out));
        true
    }

    async fn arrive(&mut self, user: usize, device: usize) -> Option<(Arc<Owed>, Looked)> {
        let (name, at) = (self.users[user].name.clone(), &self.users[user].devices[device]);
        let changed: Vec<_> = at.changed.iter().map(|(conversation, seq)| (*conversation, *seq)).collect();
        let cursors: HashMap<_, _> =
            at.cursors.iter().map(|(conversation, seq)| (*conversation, *seq)).collect();
        let digest = CursorDigest::of(cursors.iter().map(|(conversation, seq)| (*conversation, *seq)));
        let request = LoginRequest {
            app: app(),
            name: name.clone(),
            uid: at.uid,
            class: DeviceClass::Phone,
            epoch: at.epoch,
            changed: changed.clone(),
        };
        let login =
            self.named(Named::User, &name).ask(|answer| Command::Login(request, answer)).await.ok()?;
        self.numbers += 1;
        let (number, epoch, fresh) = (login.device, login.epoch, login.fresh);
        let session = Arc::new(Owed::new(login.user, number, self.numbers, 1_000));
        let mut lacks = Some(Vec::new());
        for shard in &self.shards {
            let some = shard.tell(|answer| Command::Arrive(Arc::clone(&session), answer)).await.unwrap();
            lacks = lacks.zip(some).map(|(all, some)| [all, some].concat());
        }
        self.users[user].number = login.user;
        let at = &mut self.users[user].devices[device];
        (at.number, at.epoch) = (number, epoch);
        if fresh {
            at.pseqs.clear();
        }
        let shard = self.of_user(login.user);
        let known = match login.digest {
            Some(known) => known,
            None if fresh => CursorDigest::default(),
            None => {
                let ask =
                    |answer| Command::KnownCursors { user: login.user, device: number, of: None, answer };
                let waiting = shard.ask(ask).await.unwrap();
                let mut all = resume::cursors_on_disk(&shard.reader, login.user, number).unwrap();
                for (conversation, seq) in waiting.cursors {
                    let known = all.entry(conversation).or_default();
                    *known = (*known).max(seq);
                }
                let digest = CursorDigest::of(all.iter().map(|(conversation, seq)| (*conversation, *seq)));
                let keep =
                    Command::KeepDigest { user: login.user, device: number, digest, moves: waiting.moves };
                shard.send(keep).await.unwrap();
                all.extend(changed.iter().copied());
                CursorDigest::of(all.iter().map(|(conversation, seq)| (*conversation, *seq)))
            }
        };
        let shard_of = |conversation| self.reader_of(conversation);
        let full = resume::missed(&shard.reader, shard_of, login.user, &[], &cursors).unwrap();
        let agreed = known == digest && !fresh;
        // The gateway is told what has changed, or everything if the digests differ.
        let entries = if agreed { changed.clone() } else { cursors.clone().into_iter().collect() };
        let told = Command::Cursors { user: login.user, device: number, entries };
        shard.send(told).await.unwrap();
        let found = match lacks.filter(|_| agreed) {
            Some(lacks) => {
                let mut among = lacks;
                among.extend(changed.iter().map(|(conversation, _)| *conversation));
                among.sort_unstable();
                among.dedup();
                let of = Some(among.clone());
                let ask = |answer| Command::KnownCursors { user: login.user, device: number, of, answer };
                let mut known: HashMap<_, _> = shard.ask(ask).await.unwrap().cursors.into_iter().collect();
                known.extend(changed);
                let kept = resume::missed_among(among, shard_of, login.user, &[], &known).unwrap();
                assert_eq!(kept.missed, full.missed, "{name}'s device {device}");
                self.kept += 1;
                kept
            }
            None => {
                self.full += 1;
                full
            }
        };
        let at = &mut self.users[user].devices[device];
        at.changed.clear();
        Some((session, found))
    }

    async fn disconnect(&mut self, user: usize, device: usize, which: usize) {
        let (session, _) = self.users[user].devices[device].sessions.swap_remove(which);
        for shard in &self.shards {
            shard.send(Command::Depart(Arc::clone(&session))).await.unwrap();
        }
    }

    /// Where a device can have received more than its cursor says, and how far.
    fn ahead(&self, user: usize, device: usize) -> Vec<(ConversationId, Seq, Seq)> {
        let User { number, devices, .. } = &self.users[user];
        let mut ahead = Vec::new();
        for (conversation, _) in &self.groups {
            let reader = self.reader_of(*conversation).unwrap();
            let head = reader.head(*conversation).unwrap().map_or(Seq::ZERO, |head| head.seq);
            let cursor = devices[device].cursors.get(conversation).copied().unwrap_or_default();
            if cursor < head && reader.member(*conversation, *number).unwrap().is_some() {
                ahead.push((*conversation, cursor, head));
            }
        }
        ahead
    }

    /// The device has committed records up to `seq`; `told`: its ack arrives.
    async fn receive(
        &mut self,
        user: usize,
        device: usize,
        conversation: ConversationId,
        seq: Seq,
        told: bool,
    ) {
        let at = &mut self.users[user].devices[device];
        at.cursors.insert(conversation, seq);
        let session = at.sessions.iter().find(|(_, caught_up)| *caught_up);
        match session.filter(|_| told) {
            Some((session, _)) => {
                let entries = vec![(conversation, seq)];
                session.acked(&entries);
                let (user, device) = (session.user, session.device);
                at.changed.remove(&conversation);
                let ack = Command::Cursors { user, device, entries };
                // As connections do: whatever is asked after it finds it taken in.
                assert!(matches!(self.of_user(user).hand_unhurried(ack), Handed::Over));
            }
            None => {
                at.changed.insert(conversation, seq);
            }
        }
    }
}

/// Runs a simulated world.
fn simulated<T>(work: impl AsyncFnOnce() -> T) -> T {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(tokio::task::LocalSet::new().run_until(async {
        simulate(UnixMillis::new(1_790_000_000_000).unwrap());
        work().await
    }))
}

fn metric(metrics: &Metrics, name: &str) -> u64 {
    let text = metrics.encode();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.map_or(0, |value| value.parse().unwrap())
}

/// (resumes from what was kept, looks at everything, devices forgotten for each reason) of one random history.
async fn history(seed: u64) -> (u64, u64, [u64; 3]) {
    let mut rng = Rng::new(seed);
    let few = seed.is_multiple_of(2);
    let (groups_max, membering) = if few { (4, 12) } else { (12, 4) };
    let away = AwayLimits {
        lasts: Duration::from_secs(rng.below(300) + 20),
        bytes: if rng.chance(Share::percent(30)) { 3 * SEAT_BYTES + 8 * MARK_BYTES } else { 1 << 20 },
        marks: if rng.chance(Share::percent(30)) { 3 } else { 100 },
        // Half of the histories are about few groups that are large, shrink, and go out of memory.
        members: if few { 2 + rng.below(2) as usize } else { 100 },
    };
    let loaded_max = if rng.chance(Share::percent(50)) { 1 } else { 1_000 };
    let (users, devices) = (5, 2);
    let mut world =
        World::new(ShardLimits { loaded_max, ..limits(away) }, users as u64, devices as u64).await;
    let failing = rng.chance(Share::percent(30));
    for _ in 0..150 {
        let (user, device) = (rng.below(users as u64) as usize, rng.below(devices as u64) as usize);
        let group = rng.below(world.groups.len().max(1) as u64) as usize;
        match rng.below(100) {
            0..12 if world.groups.len() < groups_max => {
                let members: Vec<usize> = (0..users).filter(|_| rng.chance(Share::percent(50))).collect();
                world.group(user, &members).await;
            }
            0..36 if !world.groups.is_empty() => {
                world.send(user, world.groups[group].0).await;
            }
            36..50 if !world.groups.is_empty() && rng.chance(Share::percent(membering * 8)) => {
                let (add, remove) =
                    if rng.chance(Share::percent(50)) { (Some(user), None) } else { (None, Some(user)) };
                world.members(group, add, remove).await;
            }
            50..62 => {
                world.connect(user, device, rng.chance(Share::percent(80))).await;
            }
            62..72 => {
                let sessions = world.users[user].devices[device].sessions.len();
                if sessions > 0 {
                    world.disconnect(user, device, rng.below(sessions as u64) as usize).await;
                }
            }
            72..88 if world.users[user].devices[device].sessions.iter().any(|(_, caught_up)| *caught_up) => {
                for (conversation, cursor, head) in world.ahead(user, device) {
                    if rng.chance(Share::percent(70)) {
                        let far = if rng.chance(Share::percent(70)) { head.since(cursor) } else { 1 };
                        let told = rng.chance(Share::percent(90));
                        world.receive(user, device, conversation, cursor.saturating_add(far), told).await;
                    }
                }
            }
            88 => {
                // Its database is gone, or an older one is back.
                let at = &mut world.users[user].devices[device];
                if at.sessions.is_empty() {
                    if rng.chance(Share::percent(50)) {
                        (at.epoch, at.cursors, at.changed) = (Epoch::ZERO, BTreeMap::new(), BTreeMap::new());
                    } else if let Some((conversation, seq)) = at.cursors.pop_first() {
                        at.cursors.insert(conversation, seq.prev());
                        at.cursors.retain(|_, seq| *seq != Seq::ZERO);
                        at.changed.remove(&conversation);
                    }
                }
            }
            89 if rng.chance(Share::percent(30)) => {
                world.settle().await;
                world.failing.store(false, Ordering::Relaxed);
                world.restart().await;
            }
            90..94 if failing => world.failing.store(rng.chance(Share::percent(50)), Ordering::Relaxed),
            _ => {}
        }
        tokio::time::sleep(Duration::from_millis(rng.below(4_000))).await;
        if !world.links.is_empty() {
            // Until lists follow, they show less than there is.
            world.failing.store(false, Ordering::Relaxed);
            while !world.links.is_empty() {
                tokio::time::sleep(Duration::from_secs(1)).await;
                world.carry_links().await;
            }
        }
    }
    let forgotten = ["expired", "full", "marks"]
        .map(|reason| metric(&world.metrics, &format!("fulmar_away_forgotten_total{{reason=\"{reason}\"}}")));
    (world.kept, world.full, forgotten)
}

#[test]
fn what_is_kept_for_who_is_away_is_what_a_look_at_everything_finds() {
    let (mut kept, mut full, mut forgotten) = (0, 0, [0; 3]);
    for seed in 0..300 {
        let seen = simulated(async || history(seed).await);
        kept += seen.0;
        full += seen.1;
        for (sum, seen) in forgotten.iter_mut().zip(seen.2) {
            *sum += seen;
        }
    }
    println!("{kept} resumes from what was kept, {full} looks at everything, forgotten: {forgotten:?}");
    assert!(kept > 1_000 && full > 300, "both ways were tried: {kept}, {full}");
    assert!(forgotten.iter().all(|times| *times > 5), "every bound was met: {forgotten:?}");
}

#[test]
fn a_resume_of_five_thousand_conversations_looks_at_the_three_that_changed() {
    let away = AwayLimits { lasts: Duration::from_secs(3_600), bytes: 64 << 20, marks: 1_024, members: 500 };
    simulated(async || {
        let mut world = World::new(limits(away), 2, 1).await;
        world.disconnect(1, 0, 0).await;
        for _ in 0..20 {
            world.groups_of_two(250).await;
        }
        assert!(world.connect(1, 0, true).await);
        for (conversation, _, head) in world.ahead(1, 0) {
            world.receive(1, 0, conversation, head, true).await;
        }
        world.disconnect(1, 0, 0).await;
        tokio::time::sleep(Duration::from_secs(600)).await;
        for group in [17, 2_500, 4_999] {
            assert!(world.send(0, world.groups[group].0).await);
        }
        let kept = world.kept;
        let (session, found) = world.arrive(1, 0).await.unwrap();
        assert_eq!((world.kept, found.missed.len(), found.heads), (kept + 1, 3, 3));
        resume::owe(&session, &found.missed);
        // After a restart nothing is known: once, everything is looked at.
        world.users[1].devices[0].sessions.push((session, true));
        world.restart().await;
        let (session, found) = world.arrive(1, 0).await.unwrap();
        assert_eq!((found.missed.len(), found.heads), (3, 5_000));
        resume::owe(&session, &found.missed);
        world.users[1].devices[0].sessions.push((session, true));
        world.disconnect(1, 0, 0).await;
        let (_, found) = world.arrive(1, 0).await.unwrap();
        assert_eq!((found.missed.len(), found.heads), (3, 3), "known again, and not acked yet");
        let (session, _) = world.arrive(1, 0).await.unwrap();
        resume::owe(&session, &found.missed);
        world.users[1].devices[0].sessions.push((session, true));
        for (conversation, _, head) in world.ahead(1, 0) {
            world.receive(1, 0, conversation, head, true).await;
        }
        world.disconnect(1, 0, 0).await;
        let kept = world.kept;
        let (_, found) = world.arrive(1, 0).await.unwrap();
        assert_eq!((world.kept, found.missed.len(), found.heads), (kept + 1, 0, 0), "nothing changed");
    });
}
