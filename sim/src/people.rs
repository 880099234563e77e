//! The people of a seed's world: they chat while things go wrong, and everything they see is written down.
//!
//! - First everybody gets to know everybody, undisturbed. Then the plan takes its course. Then comes a calm in which everything
//!   must arrive, and then the checker is asked.
//! - Apps run in their phones' processes, so that they stand still and die with them. What an app knew of its sends is kept
//!   outside, as a person remembers what was sent.
//! - Memberships are taken from the records themselves and told to the checker at the end, in the log's order.
//!
//! Not here: what goes wrong (`plan`), what is a breach (`fulmar_badnet::checker`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use fulmar_badnet::checker::{Report, Rules, check};
use fulmar_badnet::history::{Client as Who, Conversation, Digest, Event, History, Tag};
use fulmar_badnet::{Rng, Share, SimTime};
use fulmar_client::{
    Client, ClientEvent, ConnectionState, ConversationId, Error, NetworkKind, Received, RecordKind,
    SendError, SendHandle, SendOptions, Token,
};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::bite::Bite;
use crate::disk::DiskManner;
use crate::network::Direction;
use crate::plan::{Deed, Plan, calm_path};
use crate::world::{Business, Phone, Recorder, Sim};

/// How long getting to know each other may take.
const MEETING_MAX: Duration = Duration::from_secs(60);

/// How long the calm may take.
const CALM_MAX: Duration = Duration::from_secs(240);

/// After so long without an event the calm is looked at.
const QUIET: Duration = Duration::from_secs(3);

/// How long the business takes to answer an app that asks for a token.
const BUSINESS_ANSWERS_AFTER: Duration = Duration::from_millis(50);

/// Longer than any world.
const FOR_GOOD: Duration = Duration::from_secs(86_400);

/// Troubles that are kept.
const TROUBLES_MAX: usize = 20;

/// What came of a seed's people.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// What the checker says.
    pub(crate) report: Report,
    /// What must not happen and a history can't say.
    pub(crate) troubles: Vec<String>,
    /// From the end of the faults until everything was where it belongs.
    pub(crate) converged_after: Duration,
}

/// A place to talk.
#[derive(Clone, Debug)]
struct Room {
    number: ConversationId,
    /// A group's owner (user), and who may come and go.
    group: Option<(usize, Vec<usize>)>,
    /// Users who are in it from the beginning.
    members: Vec<usize>,
}

/// What is remembered outside of the phones.
#[derive(Debug, Default)]
struct Board {
    counters: BTreeMap<usize, u64>,
    /// (phone, id of the send) → the message.
    sends: BTreeMap<(usize, u64), (Tag, ConversationId)>,
    open: BTreeSet<Tag>,
    ends: BTreeMap<Tag, Option<u64>>,
    users: BTreeMap<u64, usize>,
    /// By position: who joined (`true`) or left there.
    moves: BTreeMap<(u64, u64), (bool, Vec<usize>)>,
    /// Who is in a group, as its owner believes.
    believed: BTreeMap<u64, BTreeSet<usize>>,
    connected: BTreeMap<usize, bool>,
    runs: BTreeMap<usize, u64>,
    marked: BTreeMap<(usize, u64), u64>,
    /// Phones whose apps get no tokens.
    locked_out: BTreeSet<usize>,
    /// Those of them that know it.
    kicked: BTreeSet<usize>,
    clients: BTreeMap<usize, Client>,
    troubles: Vec<String>,
    changed: Option<Instant>,
}

/// What all apps share.
struct Stage {
    plan: Plan,
    rng: Rng,
    phones: Vec<Phone>,
    rooms: Mutex<Vec<Room>>,
    board: Mutex<Board>,
    recorder: Recorder,
    business: Business,
    ready: watch::Sender<bool>,
    talking: AtomicBool,
}

/// What everybody reads, in worlds that have it.
pub(crate) const BROADCAST: &str = "news";

/// The names of a plan's users.
pub(crate) fn names(plan: &Plan) -> Vec<String> {
    let users: BTreeSet<usize> = plan.phones.iter().copied().collect();
    users.into_iter().map(name_of).collect()
}

fn name_of(user: usize) -> String {
    format!("user-{user}")
}

fn who(phone: usize) -> Who {
    Who(u32::try_from(phone).unwrap_or(u32::MAX))
}

impl Stage {
    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rooms(&self) -> Vec<Room> {
        self.rooms.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn record(&self, event: Event) {
        self.board().changed = Some(Instant::now());
        self.recorder.record(event);
    }

    fn trouble(&self, what: String) {
        let mut board = self.board();
        if board.troubles.len() < TROUBLES_MAX {
            board.troubles.push(what);
        }
    }

    fn user_of(&self, phone: usize) -> usize {
        self.plan.phones.get(phone).copied().unwrap_or(usize::MAX)
    }

    /// A phone of this user.
    fn phone_of(&self, user: usize) -> usize {
        self.plan.phones.iter().position(|owner| *owner == user).unwrap_or(0)
    }

    fn is_talking(&self) -> bool {
        self.talking.load(Ordering::Relaxed)
    }

    /// Starts the app on a phone.
    fn start(self: &Arc<Self>, phone: usize) {
        let run = {
            let mut board = self.board();
            let run = board.runs.entry(phone).or_default();
            *run += 1;
            *run
        };
        if let Some(device) = self.phones.get(phone) {
            device.run(app(Arc::clone(self), phone, run));
        }
    }

    /// Kills the app on a phone.
    fn kill(&self, phone: usize) {
        let Some(device) = self.phones.get(phone) else { return };
        let client = self.board().clients.remove(&phone);
        device.kill_app();
        drop(client);
        self.connected(phone, false);
    }

    fn connected(&self, phone: usize, now: bool) {
        let before = self.board().connected.insert(phone, now).unwrap_or(false);
        if before != now {
            let client = who(phone);
            self.record(if now { Event::Connected { client } } else { Event::Disconnected { client } });
        }
    }

    fn client(&self, phone: usize) -> Option<Client> {
        self.board().clients.get(&phone).cloned()
    }

    /// A token for the app on a phone. Without one, its session is over.
    async fn token(&self, phone: usize) -> Result<String, &'static str> {
        // What its last connection brought is taken in by then.
        tokio::time::sleep(BUSINESS_ANSWERS_AFTER).await;
        let client = who(phone);
        let (locked_out, was_kicked) = {
            let mut board = self.board();
            let locked_out = board.locked_out.contains(&phone);
            let was_kicked =
                if locked_out { !board.kicked.insert(phone) } else { board.kicked.remove(&phone) };
            (locked_out, was_kicked)
        };
        if locked_out {
            if !was_kicked {
                self.recorder.bite(Bite::LoggedOut, format_args!("phone {phone}"));
                self.record(Event::Kicked { client });
            }
            return Err("logged out");
        }
        if was_kicked {
            self.record(Event::LoggedIn { client });
        }
        let good_for = self.plan.tokens.get(phone).copied().flatten().filter(|_| self.is_talking());
        let good_for = good_for.unwrap_or(FOR_GOOD);
        Ok(self.business.token(&name_of(self.user_of(phone)), good_for))
    }

    /// How a message ended, as its sender was told.
    fn ended(&self, tag: Tag, conversation: ConversationId, end: Result<u64, SendError>) {
        let place = match &end {
            Ok(seq) => Some(*seq),
            Err(_) => None,
        };
        {
            let mut board = self.board();
            if board.ends.get(&tag) == Some(&place) {
                // An app that was killed is told again.
                return;
            }
            board.ends.insert(tag, place);
            board.open.remove(&tag);
        }
        let client = tag.client;
        self.record(match end {
            Ok(seq) => Event::Acked { client, conversation: Conversation(conversation.get()), tag, seq },
            Err(SendError::Refused(_)) => Event::Refused { client, tag },
            Err(_) => Event::Expired { client, tag },
        });
    }

    /// An app was handed a record.
    fn received(&self, phone: usize, message: &Received) {
        let (client, conversation) = (who(phone), Conversation(message.conversation.get()));
        let seq = message.seq.get();
        if message.kind != RecordKind::Message {
            if matches!(message.kind, RecordKind::Created | RecordKind::Joined | RecordKind::Left) {
                let mut board = self.board();
                let users = message.roster();
                let users = users.iter().filter_map(|(user, _)| board.users.get(&user.get()).copied());
                let users = users.collect();
                let joined = message.kind != RecordKind::Left;
                board.moves.insert((conversation.0, seq), (joined, users));
            }
            self.record(Event::Notice { client, conversation, seq });
            return;
        }
        let Some((tag, _)) = Tag::read(&message.payload) else {
            self.trouble(format!("phone {phone} got something that nobody said at {conversation} {seq}"));
            self.record(Event::Notice { client, conversation, seq });
            return;
        };
        let user = self.board().users.get(&message.sender.get()).copied();
        let tagged = usize::try_from(tag.client.0).map(|phone| self.user_of(phone)).ok();
        let sender = match user {
            Some(user) if Some(user) == tagged => tag.client,
            _ => Who(u32::MAX),
        };
        let digest = Digest::of(&message.payload);
        self.record(Event::Delivered { client, conversation, seq, sender, tag, digest });
    }
}

/// What an app does from its start until it is killed.
async fn app(stage: Arc<Stage>, phone: usize, run: u64) {
    let Some(device) = stage.phones.get(phone).cloned() else { return };
    let options = match stage.plan.tokens.get(phone) {
        Some(Some(_)) => {
            let stage = Arc::downgrade(&stage);
            device.options_with(Token::provider(move || {
                let stage = stage.upgrade();
                async move { stage.ok_or("the world is over")?.token(phone).await.map_err(Into::into) }
            }))
        }
        _ => device.options(),
    };
    let client = match device.connect_with(options).await {
        Ok(client) => client,
        Err(error) => return stage.trouble(format!("phone {phone} can't open its client: {error}")),
    };
    stage.board().clients.insert(phone, client.clone());
    device.run(watch_states(Arc::clone(&stage), phone, client.clone()));
    // The stage is there as long as its apps.
    let _ = stage.ready.subscribe().wait_for(|ready| *ready).await;
    match client.outbox().await {
        Ok(entries) => {
            for entry in entries {
                let known = stage.board().sends.get(&(phone, entry.handle.id())).copied();
                match known {
                    Some((tag, room)) => {
                        device.run(follow(Arc::clone(&stage), tag, room, Arc::new(entry.handle)))
                    }
                    None => stage.trouble(format!("phone {phone} has a send that it never made")),
                }
            }
        }
        Err(error) => stage.trouble(format!("phone {phone} can't read its outbox: {error}")),
    }
    let rng = stage.rng.fork(((phone as u64 + 1) << 20) + run);
    device.run(read(Arc::clone(&stage), phone, client.clone(), rng.fork(1)));
    device.run(look(Arc::clone(&stage), phone, client.clone()));
    talk(stage, phone, device, client, rng).await;
}

async fn watch_states(stage: Arc<Stage>, phone: usize, client: Client) {
    let mut states = client.state();
    drop(client);
    while let Some(state) = states.next().await {
        let now = match state {
            ConnectionState::Live => true,
            ConnectionState::Offline { .. } | ConnectionState::Connecting => false,
            ConnectionState::Closed { reason } => {
                if reason != fulmar_client::CloseReason::Requested {
                    stage.trouble(format!("phone {phone} closed for good: {reason:?}"));
                }
                false
            }
            // On the way from one to the other.
            _ => continue,
        };
        stage.connected(phone, now);
    }
}

async fn follow(stage: Arc<Stage>, tag: Tag, room: ConversationId, handle: Arc<SendHandle>) {
    let end = handle.acked().await;
    if !matches!(end, Err(SendError::Closed)) {
        stage.ended(tag, room, end.map(|seq| seq.get()));
    }
}

async fn read(stage: Arc<Stage>, phone: usize, client: Client, mut rng: Rng) {
    let mut messages = client.messages();
    while let Some(message) = messages.next().await {
        stage.received(phone, &message);
        // Before anything else can happen: what was taken does not come again.
        messages.done();
        if rng.chance(Share::percent(40)) {
            let (room, seq) = (message.conversation, message.seq);
            let newer = {
                let mut board = stage.board();
                let marked = board.marked.entry((phone, room.get())).or_default();
                let newer = seq.get() > *marked;
                *marked = seq.get().max(*marked);
                newer
            };
            if newer {
                let of = who(stage.phone_of(stage.user_of(phone)));
                let conversation = Conversation(room.get());
                stage.record(Event::Read { client: who(phone), of, conversation, upto: seq.get() });
                let marked = client.conversation(room).mark_read(seq).await;
                if let Err(error) = marked
                    && !matches!(error, Error::Closed)
                {
                    stage.trouble(format!("phone {phone} can't mark {seq:?}: {error}"));
                }
            }
        }
    }
}

async fn look(stage: Arc<Stage>, phone: usize, client: Client) {
    let mut events = client.events();
    drop(client);
    while let Some(event) = events.next().await {
        match event {
            ClientEvent::Gap { conversation, from, to } => {
                if stage.plan.kept_for.is_some() {
                    stage.recorder.bite(Bite::Retained, format_args!("phone {phone}"));
                }
                stage.record(Event::GapTold {
                    client: who(phone),
                    conversation: Conversation(conversation.get()),
                    from: from.get(),
                    to: to.get(),
                });
            }
            ClientEvent::Receipt { conversation, user, read, .. } if read.get() > 0 => {
                let of = stage.board().users.get(&user.get()).map(|user| who(stage.phone_of(*user)));
                match of {
                    // Its own marks are noted where they are made.
                    Some(of) if of != who(stage.phone_of(stage.user_of(phone))) => {
                        let conversation = Conversation(conversation.get());
                        stage.record(Event::Read { client: who(phone), of, conversation, upto: read.get() });
                    }
                    Some(_) => {}
                    None => stage.trouble(format!("phone {phone} heard of a user nobody is: {user:?}")),
                }
            }
            _ => {}
        }
    }
}

async fn talk(stage: Arc<Stage>, phone: usize, device: Phone, client: Client, mut rng: Rng) {
    let user = stage.user_of(phone);
    let rooms: Vec<Room> = stage.rooms().into_iter().filter(|room| room.members.contains(&user)).collect();
    let mut last: Option<Arc<SendHandle>> = None;
    loop {
        tokio::time::sleep(rng.exponential(stage.plan.pause)).await;
        if !stage.is_talking() {
            return;
        }
        let Some(room) = rng.pick(&rooms).cloned() else { return };
        let conversation = client.conversation(room.number);
        match rng.below(100) {
            0..75 => last = say(&stage, phone, &device, &client, &room, None, &mut rng).await,
            75..83 => {
                let ttl = Some(Duration::from_secs(rng.between(1, 10)));
                last = say(&stage, phone, &device, &client, &room, ttl, &mut rng).await;
            }
            83..90 => {
                // Passes by: whether it arrives is nobody's promise.
                let _ = conversation.typing().await;
            }
            90..96 => {
                if let Some(handle) = last.take()
                    && let Err(error) = handle.cancel().await
                    && !matches!(error, Error::Closed)
                {
                    stage.trouble(format!("phone {phone} can't cancel: {error}"));
                }
            }
            _ => {
                if let Some((owner, members)) = &room.group
                    && *owner == user
                    && stage.plan.moves
                    && let Some(member) = rng.pick(members).copied()
                    && member != user
                {
                    device.run(move_member(Arc::clone(&stage), conversation, room.number, member));
                }
            }
        }
    }
}

async fn move_member(
    stage: Arc<Stage>,
    conversation: fulmar_client::Conversation,
    room: ConversationId,
    member: usize,
) {
    let is_in = {
        let mut board = stage.board();
        let believed = board.believed.entry(room.get()).or_default();
        let is_in = believed.remove(&member);
        if !is_in {
            believed.insert(member);
        }
        is_in
    };
    let name = name_of(member);
    // Whether it was done shows in the log; without an answer, the next one begins with a wrong belief and changes nothing.
    let _ = if is_in { conversation.remove(&[&name]).await } else { conversation.add(&[&name]).await };
}

async fn say(
    stage: &Arc<Stage>,
    phone: usize,
    device: &Phone,
    client: &Client,
    room: &Room,
    ttl: Option<Duration>,
    rng: &mut Rng,
) -> Option<Arc<SendHandle>> {
    let tag = {
        let mut board = stage.board();
        let counter = board.counters.entry(phone).or_default();
        *counter += 1;
        let tag = Tag { client: who(phone), counter: *counter };
        board.open.insert(tag);
        tag
    };
    // Not where pieces may be gone by retention: a body whose beginning is gone is not shown, and the gap that is told of ends
    // before its last piece.
    let whole = stage.plan.kept_for.is_none();
    let len =
        if rng.chance(Share::percent(2)) && whole { rng.between(17_000, 40_000) } else { rng.below(300) };
    let body: Vec<u8> = (0..len).map(|_| u8::try_from(rng.below(256)).unwrap_or(0)).collect();
    let payload = tag.stamp(&body);
    stage.record(Event::Queued {
        client: who(phone),
        conversation: Conversation(room.number.get()),
        tag,
        digest: Digest::of(&payload),
    });
    let options = SendOptions { ttl, ..SendOptions::default() };
    match client.conversation(room.number).send_with(payload, options).await {
        Ok(handle) => {
            stage.board().sends.insert((phone, handle.id()), (tag, room.number));
            let handle = Arc::new(handle);
            device.run(follow(Arc::clone(stage), tag, room.number, Arc::clone(&handle)));
            Some(handle)
        }
        Err(error) => {
            if !matches!(error, Error::Closed) {
                stage.trouble(format!("phone {phone} can't send: {error}"));
            }
            // It was not queued: it must not appear.
            stage.ended(tag, room.number, Err(SendError::Expired));
            None
        }
    }
}

/// Lets a seed's people live through their plan, and judges what they saw.
///
/// # Errors
/// They could not even meet.
pub(crate) async fn live(sim: &Sim, seed: u64, plan: Plan) -> anyhow::Result<Outcome> {
    let phones: Vec<Phone> = plan.phones.iter().map(|user| sim.phone(&name_of(*user))).collect();
    let stage = Arc::new(Stage {
        rng: Rng::new(seed).fork(200),
        phones,
        rooms: Mutex::default(),
        board: Mutex::default(),
        recorder: sim.recorder(),
        business: sim.business(),
        ready: watch::Sender::new(false),
        talking: AtomicBool::new(true),
        plan,
    });
    meet(sim, &stage).await?;
    for ((phone, path), die) in stage.phones.iter().zip(&stage.plan.paths).zip(&stage.plan.sockets_die) {
        phone.set_path(path.clone());
        phone.sockets_follow(!die);
    }
    sim.record(Event::GatewayStarted);
    stage.ready.send_replace(true);
    let begin = Instant::now();
    for planned in &stage.plan.deeds {
        tokio::time::sleep_until(begin + planned.at).await;
        carry_out(sim, &stage, &planned.deed).await?;
    }
    tokio::time::sleep_until(begin + stage.plan.length).await;
    stage.talking.store(false, Ordering::Relaxed);
    calm_down(sim, &stage).await?;
    let calm = Instant::now();
    let report = converge(sim, &stage, calm).await;
    let troubles = std::mem::take(&mut stage.board().troubles);
    let last = stage.board().changed.unwrap_or(calm);
    stage.board().clients.clear();
    Ok(Outcome { report, troubles, converged_after: last.saturating_duration_since(calm) })
}

/// Everybody gets to know everybody.
async fn meet(sim: &Sim, stage: &Arc<Stage>) -> anyhow::Result<()> {
    for phone in 0..stage.phones.len() {
        stage.start(phone);
    }
    let until = Instant::now() + MEETING_MAX;
    loop {
        let live = stage.board().connected.values().filter(|connected| **connected).count();
        if live == stage.phones.len() {
            break;
        }
        ensure!(
            Instant::now() < until,
            "only {live} phones are live after {MEETING_MAX:?}: {:?}",
            stage.board().troubles
        );
        sim.sleep(Duration::from_millis(20)).await;
    }
    for phone in 0..stage.phones.len() {
        let client = stage.client(phone).context("a phone without a client")?;
        let user = client.user().await?.context("a client that is live and has no user")?;
        stage.board().users.insert(user.get(), stage.user_of(phone));
    }
    let mut rooms = Vec::new();
    for (number, members) in stage.plan.groups.iter().enumerate() {
        let owner = members.first().copied().unwrap_or(0);
        let client = stage.client(stage.phone_of(owner)).context("a phone without a client")?;
        let names: Vec<String> = members.iter().skip(1).map(|member| name_of(*member)).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let group = client.create_group(&format!("group-{number}"), &names).await?;
        let number = group.number().context("a group without a number")?;
        stage.board().believed.insert(number.get(), members.iter().copied().collect());
        rooms.push(Room { number, group: Some((owner, members.clone())), members: members.clone() });
    }
    let users: BTreeSet<usize> = stage.plan.phones.iter().copied().collect();
    if stage.plan.broadcast {
        let client = stage.client(0).context("a phone without a client")?;
        let number = client.broadcast(BROADCAST).await?.resolved().await?;
        for phone in 0..stage.phones.len() {
            let conversation = Conversation(number.get());
            stage.record(Event::Joined { client: who(phone), conversation, first: 1 });
        }
        rooms.push(Room { number, group: None, members: users.iter().copied().collect() });
    }
    for one in &users {
        for two in users.range(one + 1..) {
            let client = stage.client(stage.phone_of(*one)).context("a phone without a client")?;
            let number = client.direct(&name_of(*two)).await?.resolved().await?;
            let members = vec![*one, *two];
            for phone in 0..stage.phones.len() {
                if members.contains(&stage.user_of(phone)) {
                    let conversation = Conversation(number.get());
                    stage.record(Event::Joined { client: who(phone), conversation, first: 1 });
                }
            }
            rooms.push(Room { number, group: None, members });
        }
    }
    *stage.rooms.lock().unwrap_or_else(PoisonError::into_inner) = rooms;
    Ok(())
}

async fn carry_out(sim: &Sim, stage: &Arc<Stage>, deed: &Deed) -> anyhow::Result<()> {
    let phone = |number: &usize| stage.phones.get(*number).context("a phone that is not there");
    match deed {
        Deed::BlackOut { phone: number, lasts } => phone(number)?.black_out(*lasts),
        Deed::Cut { phone: number, direction, cut } => phone(number)?.cut(*direction, *cut),
        Deed::Rebind { phone: number } => phone(number)?.rebind_nat(),
        Deed::NatIdleMax { phone: number, idle_max } => phone(number)?.nat_idle_max(Some(*idle_max)),
        Deed::ChangeNetwork { phone: number, path, told } => {
            phone(number)?.change_network((**path).clone());
            if *told {
                tell_network(stage, *number);
            }
        }
        Deed::LoseNetwork { phone: number } => phone(number)?.lose_network(),
        Deed::Block { phone: number, udp, data } => phone(number)?.block(*udp, *data),
        Deed::Freeze { phone: number, frozen } => phone(number)?.freeze(*frozen),
        Deed::SetClock { phone: number, ahead_ms } => phone(number)?.set_wall_clock(*ahead_ms),
        Deed::KillApp { phone: number } => stage.kill(*number),
        Deed::StartApp { phone: number } => {
            // One that is being closed starts again by itself.
            if stage.client(*number).is_none() && !stage.is_starting(*number) {
                stage.start(*number);
            }
        }
        Deed::LogOut { phone: number } => {
            stage.board().locked_out.insert(*number);
        }
        Deed::LogIn { phone: number } => {
            stage.board().locked_out.remove(number);
        }
        Deed::RestartApp { phone: number } => restart(sim, stage, *number)?,
        Deed::SocketRoom { phone: number, bytes } => phone(number)?.socket_room(Some(*bytes)),
        Deed::MuteDisk => sim.gateway().mute_disk(true),
        Deed::CrashGateway => {
            if sim.gateway().is_running() {
                sim.gateway().crash().await;
                sim.record(Event::GatewayKilled);
            }
        }
        Deed::DrainGateway => {
            if sim.gateway().is_running() {
                // It takes its time; what else is planned does not wait for it.
                sim.gateway().begin_drain();
            }
        }
        Deed::StartGateway => start_gateway(sim).await?,
        Deed::Disk(manner) => sim.gateway().disk(*manner),
    }
    Ok(())
}

async fn start_gateway(sim: &Sim) -> anyhow::Result<()> {
    if sim.gateway().is_draining() {
        sim.gateway().drain().await?;
    }
    if !sim.gateway().is_running() {
        sim.gateway().start().await?;
        sim.record(Event::GatewayStarted);
    }
    Ok(())
}

/// The operating system tells the app about the network.
fn tell_network(stage: &Arc<Stage>, number: usize) {
    if let (Some(phone), Some(client)) = (stage.phones.get(number), stage.client(number)) {
        let hint = Phone::hint(NetworkKind::Cellular);
        phone.run(async move {
            // A client that is closed needs no news.
            let _ = client.network_changed(hint).await;
        });
    }
}

/// The app is closed in order and started again.
fn restart(sim: &Sim, stage: &Arc<Stage>, number: usize) -> anyhow::Result<()> {
    let Some(client) = stage.client(number) else { return Ok(()) };
    let phone = stage.phones.get(number).context("a phone that is not there")?;
    sim.bite(Bite::AppRestarted, format_args!("phone {number}"));
    stage.board().clients.remove(&number);
    let again = Arc::clone(stage);
    phone.run(async move {
        if let Err(error) = client.close().await {
            again.trouble(format!("phone {number} can't close its client: {error}"));
        }
        drop(client);
        again.connected(number, false);
        // The process ends, and with it all that still holds the client; this task, too, when it is done.
        if let Some(phone) = again.phones.get(number) {
            phone.end_app();
        }
        again.start(number);
    });
    Ok(())
}

/// All faults end.
async fn calm_down(sim: &Sim, stage: &Arc<Stage>) -> anyhow::Result<()> {
    stage.board().locked_out.clear();
    sim.gateway().mute_disk(false);
    start_gateway(sim).await?;
    sim.gateway().disk(DiskManner::default());
    for (number, phone) in stage.phones.iter().enumerate() {
        for direction in [Direction::Up, Direction::Down] {
            phone.cut(direction, false);
        }
        phone.block(false, false);
        phone.nat_idle_max(None);
        if phone.has_network() {
            phone.set_path(calm_path());
        } else {
            phone.change_network(calm_path());
        }
        phone.sockets_follow(true);
        phone.socket_room(None);
        phone.freeze(false);
        if stage.client(number).is_none() && !stage.is_starting(number) {
            stage.start(number);
        }
    }
    sim.record(Event::GatewayStarted);
    Ok(())
}

impl Stage {
    /// Whether an app was started that has no client yet.
    fn is_starting(&self, phone: usize) -> bool {
        self.phones.get(phone).is_some_and(Phone::has_tasks)
    }

    /// Whether every outbox is empty and every phone is live.
    fn is_settled(&self) -> bool {
        let board = self.board();
        board.open.is_empty()
            && (0..self.phones.len()).all(|phone| board.connected.get(&phone) == Some(&true))
    }
}

/// Waits until everything is where it belongs, and asks the checker.
async fn converge(sim: &Sim, stage: &Arc<Stage>, calm: Instant) -> Report {
    loop {
        sim.sleep(Duration::from_millis(250)).await;
        let late = calm.elapsed() >= CALM_MAX;
        let quiet = stage.board().changed.is_none_or(|changed| changed.elapsed() >= QUIET);
        if late || (quiet && stage.is_settled()) {
            let report = judge(sim, stage);
            if report.holds() || late {
                return report;
            }
        }
    }
}

/// A membership: its first position, and of one that ended the last that came and the last there was.
type Stay = (u64, Option<(u64, u64)>);

/// Asks the checker. What it is told of memberships comes from the records:
///
/// - Who is removed while away can't come in any more to get what it missed: that counts as a gap it was told.
/// - A gap that really was told is a trouble, unless it lies behind the last that came and before the next membership, or the gateway
///   does not keep everything: then the checker judges whether it was time.
fn judge(sim: &Sim, stage: &Stage) -> Report {
    let seen = sim.history();
    let mut got: BTreeMap<(Who, u64), BTreeSet<u64>> = BTreeMap::new();
    for record in seen.records() {
        if let Event::Delivered { client, conversation, seq, .. }
        | Event::Notice { client, conversation, seq } = record.event
        {
            got.entry((client, conversation.0)).or_default().insert(seq);
        }
    }
    let mut stays: BTreeMap<(Who, u64), Vec<Stay>> = BTreeMap::new();
    for ((conversation, seq), (joined, users)) in &stage.board().moves {
        for (phone, _) in stage.plan.phones.iter().enumerate().filter(|(_, user)| users.contains(user)) {
            let key = (who(phone), *conversation);
            let stays = stays.entry(key).or_default();
            if *joined {
                stays.push((*seq, None));
            } else if let Some((first, open @ None)) = stays.last_mut() {
                let last = got.get(&key).and_then(|got| got.range(*first..=*seq).next_back().copied());
                *open = Some((last.unwrap_or_else(|| first.saturating_sub(1)), *seq));
            }
        }
    }
    let mut history = History::new();
    for record in seen.records() {
        if let Event::GapTold { client, conversation, from, to } = record.event {
            let stays = stays.get(&(client, conversation.0)).map_or(&[][..], Vec::as_slice);
            let missed =
                stays.iter().any(|(first, end)| *first <= to && end.is_none_or(|(last, _)| from <= last));
            if stage.plan.kept_for.is_some() {
                // Whether that was too soon is the checker's to say.
                history.record(record.at, record.event);
            } else if missed {
                stage.trouble(format!("{}", record.event));
            }
            continue;
        }
        history.record(record.at, record.event);
    }
    for ((client, conversation), stays) in stays {
        let conversation = Conversation(conversation);
        for (first, end) in stays {
            history.record(SimTime::END, Event::Joined { client, conversation, first });
            if let Some((got, last)) = end {
                history.record(SimTime::END, Event::Left { client, conversation, last });
                if got < last {
                    let (from, to) = (got + 1, last);
                    history.record(SimTime::END, Event::GapTold { client, conversation, from, to });
                }
            }
        }
    }
    let kept_for = stage.plan.kept_for;
    check(&history, &Rules { gaps_excused: true, kept_for, ..Rules::default() })
}
