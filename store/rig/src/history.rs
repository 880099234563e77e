//! What a store was told, and what it must therefore hold.
//!
//! - The commits of a shard follow from (seed, shard, number, turn) and the state before them, so a state is named by how many
//!   commits led to it. Every commit counts itself, in a cursor: a store tells by itself where it stands.
//! - A turn is one stay between two crashes. What is sent after a crash differs from what was sent before it under the same
//!   number, so the two can't be taken for each other.
//!
//! Not here: comparing a store with a state (`check`).

use std::collections::{BTreeMap, VecDeque};

use anyhow::Context as _;
use bytes::Bytes;
use fulmar_protocol::{
    id::{
        AppId, ClassEpoch, ConversationId, DeviceClass, DeviceId, DeviceUid, Epoch, Pseq, Seq, ShardId,
        UnixMillis, UserId,
    },
    limit::{LANE_ACKS_REMEMBERED, SEND_PAYLOAD_BYTES_MAX},
};
use fulmar_store::{
    ConversationClass, ConversationMeta, Device, Head, LaneState, Listed, Member, Op, PendingLink, Record,
    RecordKind, Role, User,
};

use crate::chance::Chance;

/// Conversations of a shard that something happens in.
pub const CONVERSATIONS: u64 = 6;

/// Users of a shard that do something.
pub const USERS: u64 = 7;

/// Records a conversation keeps, about; what is older goes by [`Op::Low`].
const KEPT: usize = 150;

/// The user whose cursor counts the commits.
const COUNTING: u64 = 1_000;

/// The app everybody belongs to.
#[must_use]
pub fn app() -> AppId {
    AppId::of("rig")
}

/// A shard's number as a type; numbers here are small.
#[must_use]
pub fn shard_id(shard: u16) -> ShardId {
    ShardId::new(shard).unwrap_or_else(|| unreachable!("a rig has few shards"))
}

fn number(shard: u16, local: u64) -> u64 {
    shard_id(shard).number(local).unwrap_or_else(|| unreachable!("a rig has few of everything"))
}

/// A conversation of a shard.
#[must_use]
pub fn conversation(shard: u16, local: u64) -> ConversationId {
    small(number(shard, local))
}

/// A user of a shard.
#[must_use]
pub fn user(shard: u16, local: u64) -> UserId {
    small(number(shard, local))
}

/// The cursor that counts a shard's commits.
#[must_use]
pub fn counter(shard: u16) -> (UserId, DeviceId, ConversationId) {
    (user(shard, COUNTING), DeviceId::FIRST, conversation(shard, 1))
}

/// A number of any kind; those of a rig are small.
fn small<T: TryFrom<u64>>(number: u64) -> T {
    T::try_from(number).unwrap_or_else(|_| unreachable!("a rig's numbers are small"))
}

/// One conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conversation {
    /// Its head; the default one if nothing happened.
    pub head: Head,
    /// What it is.
    pub meta: Option<ConversationMeta>,
    /// Records after the head's `low`.
    pub records: VecDeque<Record>,
    /// Its lanes.
    pub lanes: BTreeMap<(UserId, DeviceId), LaneState>,
    /// Its members.
    pub members: BTreeMap<UserId, Member>,
    /// How far they have read.
    pub read: BTreeMap<UserId, Seq>,
    /// What its shard still owes to lists.
    pub links: BTreeMap<UserId, PendingLink>,
}

/// One user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Person {
    /// The row, if it has a name.
    pub row: Option<User>,
    /// The user's list.
    pub listed: BTreeMap<ConversationId, Listed>,
    /// The user's devices.
    pub devices: BTreeMap<DeviceId, Device>,
    /// Login counters.
    pub classes: BTreeMap<u8, ClassEpoch>,
    /// Device cursors.
    pub received: BTreeMap<(DeviceId, ConversationId), Seq>,
}

/// All that one shard holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// The shard.
    pub shard: u16,
    /// How many commits led here.
    pub commits: u64,
    /// Its conversations, by local number.
    pub conversations: BTreeMap<u64, Conversation>,
    /// Its users, by local number.
    pub people: BTreeMap<u64, Person>,
}

impl State {
    /// Nothing yet.
    #[must_use]
    pub fn empty(shard: u16) -> Self {
        Self {
            shard,
            commits: 0,
            conversations: (1..=CONVERSATIONS).map(|local| (local, Conversation::default())).collect(),
            people: (1..=USERS).map(|local| (local, Person::default())).collect(),
        }
    }

    fn at(&mut self, id: ConversationId) -> &mut Conversation {
        self.conversations.entry(id.get() / number_step()).or_default()
    }

    fn of(&mut self, id: UserId) -> &mut Person {
        self.people.entry(id.get() / number_step()).or_default()
    }

    fn apply_one(&mut self, op: &Op) {
        match op {
            Op::Append { conversation, record } => {
                let c = self.at(*conversation);
                c.head.seq = record.seq;
                c.head.count = record.count;
                c.head.time = record.time;
                c.records.push_back(record.clone());
                if record.pseq > Pseq::ZERO {
                    let lane = c.lanes.entry((record.sender, record.device)).or_default();
                    note(lane, record.epoch, record.pseq, record.seq);
                }
            }
            Op::Refuse { conversation, user, device, epoch, pseq } => {
                let lane = self.at(*conversation).lanes.entry((*user, *device)).or_default();
                note(lane, *epoch, *pseq, Seq::ZERO);
            }
            Op::NameUser { user, row } => self.of(*user).row = Some(row.clone()),
            Op::NameConversation { conversation, row } => self.at(*conversation).meta = Some(row.clone()),
            Op::Member { conversation, user, row } => {
                let c = self.at(*conversation);
                match row {
                    Some(row) => c.members.insert(*user, *row),
                    None => c.members.remove(user),
                };
                c.head.members = c.members.len() as u64;
            }
            Op::Listed { user, conversation, row } => {
                let listed = &mut self.of(*user).listed;
                match row {
                    Some(row) => listed.insert(*conversation, *row),
                    None => listed.remove(conversation),
                };
            }
            Op::Device { user, device, row } => {
                self.of(*user).devices.insert(*device, *row);
            }
            Op::ClassEpoch { user, class, epoch } => {
                let at = self.of(*user).classes.entry(*class as u8).or_insert(ClassEpoch::ZERO);
                *at = (*at).max(*epoch);
            }
            Op::Recv { user, device, conversation, seq } => {
                if *user != counter(self.shard).0 {
                    let at = self.of(*user).received.entry((*device, *conversation)).or_insert(Seq::ZERO);
                    *at = (*at).max(*seq);
                }
            }
            Op::Read { conversation, user, seq } => {
                let at = self.at(*conversation).read.entry(*user).or_insert(Seq::ZERO);
                *at = (*at).max(*seq);
            }
            Op::Low { conversation, low, count } => {
                let c = self.at(*conversation);
                if *low > c.head.low {
                    c.head.low = *low;
                    c.head.low_count = *count;
                }
                while c.records.front().is_some_and(|record| record.seq <= c.head.low) {
                    c.records.pop_front();
                }
            }
            Op::Link(link) => {
                self.at(link.conversation).links.insert(link.user, *link);
            }
            Op::LinkDone { conversation, user } => {
                self.at(*conversation).links.remove(user);
            }
            Op::MemberCount { .. } | Op::Acquire { .. } => {}
        }
    }

    /// Draws the batch that follows on this state, and does what it says.
    fn advance(&mut self, mut chance: Chance) -> Vec<Op> {
        self.commits += 1;
        let (who, device, what) = counter(self.shard);
        let count = small(self.commits);
        let mut draft = Draft { state: self, ops: Vec::new() };
        draft.push(Op::Recv { user: who, device, conversation: what, seq: count });
        let many = chance.percent(4);
        let ops = if many { 40 + chance.below(160) } else { 1 + chance.below(12) };
        for _ in 0..ops {
            draft.one(&mut chance, many);
        }
        draft.ops
    }
}

/// Numbers of one shard lie so far apart.
fn number_step() -> u64 {
    number(0, 2) - number(0, 1)
}

fn note(lane: &mut LaneState, epoch: Epoch, pseq: Pseq, seq: Seq) {
    if epoch < lane.epoch || (epoch == lane.epoch && pseq <= lane.last) {
        return;
    }
    if epoch > lane.epoch {
        lane.epoch = epoch;
        lane.recent.clear();
    }
    lane.last = pseq;
    if lane.recent.len() >= LANE_ACKS_REMEMBERED {
        lane.recent.pop_front();
    }
    lane.recent.push_back((pseq, seq));
}

/// A batch that is being made: each operation builds on those before it.
struct Draft<'a> {
    state: &'a mut State,
    ops: Vec<Op>,
}

impl Draft<'_> {
    fn push(&mut self, op: Op) {
        self.state.apply_one(&op);
        self.ops.push(op);
    }

    fn one(&mut self, chance: &mut Chance, many: bool) {
        let shard = self.state.shard;
        // The first conversation gets half of everything, so that some are long and some are short.
        let local = if chance.percent(50) { 1 } else { 1 + chance.below(CONVERSATIONS) };
        let id = conversation(shard, local);
        let who = user(shard, 1 + chance.below(USERS));
        let device: DeviceId = small(1 + chance.below(2));
        let now: UnixMillis = small(1_700_000_000_000 + self.state.commits * 1_000 + chance.below(1_000));
        let head = self.state.at(id).head;
        match chance.below(if many { 60 } else { 100 }) {
            0..60 => self.append(chance, id, (who, device), now),
            60..64 => {
                let (epoch, pseq) = next_place(chance, self.state.at(id).lanes.get(&(who, device)));
                self.push(Op::Refuse { conversation: id, user: who, device, epoch, pseq });
            }
            64..70 => {
                let row = (!chance.percent(35)).then(|| Member {
                    role: *chance.pick(&[Role::Member, Role::Admin, Role::Owner]).unwrap_or(&Role::Member),
                    joined: head.seq,
                    since: now,
                });
                self.push(Op::Member { conversation: id, user: who, row });
            }
            70..74 => {
                let row = User { app: app(), name: format!("user {who}"), created: now };
                self.push(Op::NameUser { user: who, row });
            }
            74..77 => {
                let row = ConversationMeta {
                    app: app(),
                    class: ConversationClass::Group,
                    name: format!("conversation {id}"),
                    creator: who,
                    created: now,
                };
                self.push(Op::NameConversation { conversation: id, row });
            }
            77..81 => {
                let row = (!chance.percent(30)).then(|| Listed {
                    joined: head.seq,
                    cleared: small(chance.below(head.seq.get() + 1)),
                    muted: chance.percent(20),
                    changed: now,
                });
                self.push(Op::Listed { user: who, conversation: id, row });
            }
            81..84 => {
                let row = Device {
                    uid: uid(who, device, chance.below(3)),
                    class: DeviceClass::Phone,
                    epoch: small(chance.below(100)),
                    class_epoch: small(chance.below(100)),
                    seen: now,
                };
                self.push(Op::Device { user: who, device, row });
            }
            84..86 => {
                let epoch = small(chance.below(1_000) + 1);
                self.push(Op::ClassEpoch { user: who, class: DeviceClass::Phone, epoch });
            }
            86..91 => {
                let seq = small(chance.below(head.seq.get() + 1) + 1);
                self.push(Op::Recv { user: who, device, conversation: id, seq });
            }
            91..95 => {
                let seq = small(chance.below(head.seq.get() + 1) + 1);
                self.push(Op::Read { conversation: id, user: who, seq });
            }
            95..97 => {
                let listed = chance.percent(50).then_some(Listed {
                    joined: head.seq,
                    cleared: Seq::ZERO,
                    muted: false,
                    changed: now,
                });
                self.push(Op::Link(PendingLink { conversation: id, user: who, listed }));
            }
            97..99 => self.push(Op::LinkDone { conversation: id, user: who }),
            _ => self.forget(chance, id),
        }
        if self.state.at(id).records.len() > KEPT && chance.percent(30) {
            self.forget(chance, id);
        }
    }

    fn append(
        &mut self,
        chance: &mut Chance,
        id: ConversationId,
        producer: (UserId, DeviceId),
        time: UnixMillis,
    ) {
        let c = self.state.at(id);
        let head = c.head;
        let by_system = chance.percent(5);
        let length = match chance.below(100) {
            0..70 => chance.below(200),
            70..95 => chance.below(900),
            95..99 => chance.below(6_000),
            _ => SEND_PAYLOAD_BYTES_MAX as u64 - chance.below(3),
        };
        let (epoch, pseq) =
            if by_system { (Epoch::ZERO, Pseq::ZERO) } else { next_place(chance, c.lanes.get(&producer)) };
        let record = Record {
            seq: head.seq.saturating_add(1),
            kind: if by_system { RecordKind::Notice } else { RecordKind::Message },
            sender: producer.0,
            device: if by_system { DeviceId::ZERO } else { producer.1 },
            epoch,
            pseq,
            time,
            count: head.count + u64::from(!by_system),
            target: chance.percent(10).then(|| small(chance.below(head.seq.get() + 1))),
            ttl: chance.percent(5).then_some(60),
            more: chance.percent(3),
            continues: chance.percent(3),
            silent: chance.percent(3),
            payload: Bytes::from(chance.bytes(usize::try_from(length).unwrap_or(0))),
        };
        self.push(Op::Append { conversation: id, record });
    }

    fn forget(&mut self, chance: &mut Chance, id: ConversationId) {
        let c = self.state.at(id);
        let Some(last) = c.records.get(chance.index(c.records.len())) else { return };
        let low = Op::Low { conversation: id, low: last.seq, count: last.count };
        self.push(low);
    }
}

fn next_place(chance: &mut Chance, lane: Option<&LaneState>) -> (Epoch, Pseq) {
    match lane {
        Some(lane) if !chance.percent(2) => (lane.epoch, lane.last.saturating_add(1)),
        Some(lane) => (lane.epoch.saturating_add(1), Pseq::FIRST),
        None => (Epoch::FIRST, Pseq::FIRST),
    }
}

fn uid(user: UserId, device: DeviceId, edition: u64) -> DeviceUid {
    let number = u128::from(user.get()) << 72 | u128::from(device.get()) << 64 | u128::from(edition);
    DeviceUid(number.to_be_bytes())
}

/// From which commit on a shard's commits are of another turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// The first commit of the turn.
    pub from: u64,
    /// The turn; never used twice in a history.
    pub turn: u64,
}

/// The turns of one shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turns {
    /// Turns that were ever begun: the next one has this number.
    pub begun: u64,
    /// Those that count, in order; the first begins at commit 1.
    pub list: Vec<Turn>,
}

impl Turns {
    /// As text without spaces; [`Turns::parse`] reads it.
    #[must_use]
    pub fn to_text(&self) -> String {
        let list: Vec<String> = self.list.iter().map(|turn| format!("{}:{}", turn.from, turn.turn)).collect();
        format!("{}@{}", self.begun, list.join(","))
    }

    /// Reads what [`Turns::to_text`] wrote.
    ///
    /// # Errors
    /// When it is not that.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let turn = |text: &str| {
            let (from, turn) = text.split_once(':').context("a turn is from:turn")?;
            Ok(Turn { from: from.parse()?, turn: turn.parse()? })
        };
        let (begun, list) = text.split_once('@').context("a shard is begun@turns")?;
        let list = list.split(',').map(turn).collect::<anyhow::Result<_>>()?;
        Ok(Self { begun: begun.parse()?, list })
    }

    /// The turn of a commit.
    fn at(&self, commit: u64) -> u64 {
        self.list.iter().rfind(|turn| turn.from <= commit).map_or(0, |turn| turn.turn)
    }

    /// Up to where both are the same.
    fn common(&self, other: &Self) -> u64 {
        let differs = |turn: &&Turn| self.at(turn.from) != other.at(turn.from);
        let first = self.list.iter().chain(&other.list).filter(differs).map(|turn| turn.from).min();
        first.map_or(u64::MAX, |from| from.saturating_sub(1))
    }
}

/// All that was ever sent to a store, as far as it counts: what a crash took and nobody saw is not in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct History {
    /// What everything follows from.
    pub seed: u64,
    /// By shard.
    pub shards: Vec<Turns>,
}

impl History {
    /// Nothing was sent yet.
    #[must_use]
    pub fn new(seed: u64, shards: u16) -> Self {
        let turns = Turns { begun: 1, list: vec![Turn { from: 1, turn: 0 }] };
        Self { seed, shards: vec![turns; usize::from(shards)] }
    }

    /// After a crash: shard `n` stands at `commits[n]`, and what is sent from now on is of a new turn.
    #[must_use]
    pub fn crashed(&self, commits: &[u64]) -> Self {
        let mut next = self.clone();
        for (shard, commits) in (0u16..).zip(commits) {
            next.turned(shard, *commits);
        }
        next
    }

    /// From now on, what one shard is sent after `commits` commits is of a new turn.
    pub fn turned(&mut self, shard: u16, commits: u64) {
        if let Some(turns) = self.shards.get_mut(usize::from(shard)) {
            turns.list.retain(|turn| turn.from <= commits);
            turns.list.push(Turn { from: commits + 1, turn: turns.begun });
            turns.begun += 1;
        }
    }

    /// The batch that is the next commit of the state's shard; the state is as after it.
    pub fn advance(&self, state: &mut State) -> Vec<Op> {
        let next = state.commits + 1;
        let turns = self.shards.get(usize::from(state.shard)).map(|turns| turns.list.as_slice());
        let turn =
            turns.unwrap_or_default().iter().rfind(|turn| turn.from <= next).map_or(0, |turn| turn.turn);
        state.advance(Chance::of(&[self.seed, u64::from(state.shard), next, turn]))
    }

    /// The same seed, with other turns of one shard.
    #[must_use]
    pub fn with(&self, shard: u16, turns: &Turns) -> Self {
        let mut other = self.clone();
        if let Some(mine) = other.shards.get_mut(usize::from(shard)) {
            mine.clone_from(turns);
        }
        other
    }

    /// As text, one line; [`History::parse`] reads it.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = self.seed.to_string();
        for turns in &self.shards {
            text.push('/');
            text.push_str(&turns.to_text());
        }
        text
    }

    /// Reads what [`History::to_text`] wrote.
    ///
    /// # Errors
    /// When it is not that.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let mut parts = text.trim().split('/');
        let seed = parts.next().unwrap_or_default().parse().context("a history begins with its seed")?;
        Ok(Self { seed, shards: parts.map(Turns::parse).collect::<anyhow::Result<_>>()? })
    }
}

/// A shard's states along a history, worked out once and kept in steps.
#[derive(Debug)]
pub struct Timeline {
    history: History,
    kept: Vec<State>,
}

/// Commits between two states that are kept.
const STEP: u64 = 8;

impl Timeline {
    /// The states of one shard.
    #[must_use]
    pub fn new(history: History, shard: u16) -> Self {
        Self { history, kept: vec![State::empty(shard)] }
    }

    /// Goes along another history from where it differs.
    pub fn follow(&mut self, history: &History) {
        let shard = self.kept.first().map_or(0, |state| usize::from(state.shard));
        let common = match (self.history.shards.get(shard), history.shards.get(shard)) {
            (Some(mine), Some(other)) if self.history.seed == history.seed => mine.common(other),
            _ => 0,
        };
        self.kept.retain(|state| state.commits <= common);
        self.history.clone_from(history);
    }

    /// The turns it goes along.
    #[must_use]
    pub fn turns(&self) -> Option<&Turns> {
        let shard = self.kept.first().map_or(0, |state| usize::from(state.shard));
        self.history.shards.get(shard)
    }

    /// The state after `commits` commits, the last of which was of other turns.
    pub fn at_in(&mut self, commits: u64, turns: &Turns) -> State {
        if commits == 0 {
            return self.at(0);
        }
        let mut state = self.at(commits - 1);
        self.history.with(state.shard, turns).advance(&mut state);
        state
    }

    /// The state after `commits` commits.
    pub fn at(&mut self, commits: u64) -> State {
        let step = usize::try_from(commits / STEP).unwrap_or(usize::MAX);
        while self.kept.len() <= step {
            let Some(last) = self.kept.last() else { break };
            let next = self.after(last.clone(), last.commits + STEP);
            self.kept.push(next);
        }
        let from = self.kept.get(step.min(self.kept.len().saturating_sub(1))).cloned();
        self.after(from.unwrap_or_else(|| State::empty(0)), commits)
    }

    fn after(&self, mut state: State, commits: u64) -> State {
        while state.commits < commits {
            self.history.advance(&mut state);
        }
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_named_by_its_history_and_count() {
        let history = History::new(7, 2);
        let mut timeline = Timeline::new(history.clone(), 1);
        let later = timeline.at(37);
        assert_eq!(later.commits, 37);
        assert_eq!(Timeline::new(history.clone(), 1).at(37), later);
        assert_ne!(Timeline::new(History::new(8, 2), 1).at(37), later);
        assert!(later.conversations.values().any(|c| c.head.seq > Seq::ZERO));
    }

    #[test]
    fn after_a_crash_the_same_numbers_hold_other_things() {
        let history = History::new(7, 1);
        let crashed = history.crashed(&[20]);
        let (mut before, mut after) = (Timeline::new(history, 0), Timeline::new(crashed.clone(), 0));
        assert_eq!(before.at(20), after.at(20));
        assert_ne!(before.at(21), after.at(21));
        // A turn that is gone is never begun again.
        assert_ne!(crashed.crashed(&[10]).shards, crashed.shards);
        assert_eq!(crashed.crashed(&[10]).shards[0].list.last(), Some(&Turn { from: 11, turn: 2 }));
    }

    #[test]
    fn a_timeline_follows_another_history_from_where_it_differs() {
        let history = History::new(7, 1);
        let crashed = history.crashed(&[21]);
        let mut timeline = Timeline::new(history, 0);
        timeline.at(50);
        timeline.follow(&crashed);
        assert_eq!(timeline.at(45), Timeline::new(crashed.clone(), 0).at(45));
        let void = crashed.shards[0].clone();
        let again = crashed.crashed(&[30]);
        let mut timeline = Timeline::new(again, 0);
        assert_ne!(timeline.at(31), timeline.at_in(31, &void));
        assert_eq!(timeline.at_in(31, &void), Timeline::new(crashed, 0).at(31));
    }

    #[test]
    fn a_history_comes_back_from_its_text() {
        let history = History::new(7, 2).crashed(&[3, 0]).crashed(&[1, 9]);
        assert_eq!(History::parse(&history.to_text()).unwrap(), history);
        assert!(History::parse("7/1:2").is_err());
    }
}
