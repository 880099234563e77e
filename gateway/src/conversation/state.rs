//! What a shard knows of one loaded conversation, and every decision about it. Pure: the clock is an argument, records
//! that are referred to are looked up by the caller.
//!
//! - `head` runs ahead of the disk by what is in the shard's uncommitted batches; when one fails the whole state is
//!   thrown away and loaded again. While the log can't be written nothing is decided, so nothing runs ahead.
//! - Seqs are contiguous, times never go back, `count` counts what a person would count as unread.
//! - A refusal by policy uses its pseq up, so that it can't block what follows.

use std::collections::{HashMap, HashSet, hash_map::Entry};

use bytes::Bytes;
use fulmar_protocol::{
    close::RefusalCode,
    frame,
    id::{AppId, ConversationId, DeviceId, Epoch, Producer, Pseq, Seq, UnixMillis, UserId},
    producer::{Decision, Lane, fingerprint},
    service::Roster,
};
use fulmar_store::{
    ConversationClass, ConversationMeta, Head, LaneState, Listed, Member, Op, PendingLink, Record,
    RecordKind, Role,
};

use crate::broadcasts::{READER, WRITER};

/// A loaded conversation.
#[derive(Debug)]
pub struct State {
    id: ConversationId,
    meta: ConversationMeta,
    head: Head,
    members: HashMap<UserId, Member>,
    /// Who writes, where everybody of the app reads.
    writers: Option<HashSet<UserId>>,
    lanes: HashMap<(UserId, DeviceId), Lane>,
    /// How far members have read and received; only kept for conversations with receipts.
    progress: HashMap<UserId, Progress>,
}

/// How far one member has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The furthest any device has received.
    pub recv: Seq,
    /// The furthest the user has read.
    pub read: Seq,
}

/// The decision about a send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// New: put the record into the batch; ack and publish it once it is on disk.
    Append(Record),
    /// Settled before as this record ([`Seq::ZERO`]: used up without one; `None`: further back than is remembered).
    Again(Option<Seq>),
    /// Sends before it are missing.
    Early {
        /// The number that must come next.
        expected: Pseq,
    },
    /// Refused for good under a number that is now used up: put `op` into the batch, answer once it is on disk.
    Consumed {
        /// Why.
        code: RefusalCode,
        /// Takes note of the number.
        op: Op,
    },
    /// Refused, and nothing changes.
    Refused {
        /// Why.
        code: RefusalCode,
        /// The number that must come next.
        expected: Pseq,
    },
}

/// A decided change of members, ready to be committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MembersChange {
    /// The record that says so.
    pub record: Record,
    /// Everything to commit, the record included.
    pub ops: Vec<Op>,
    /// Steps owed to the users' shards.
    pub links: Vec<PendingLink>,
    /// Who joined.
    pub joined: Vec<UserId>,
    /// Who left.
    pub left: Vec<UserId>,
}

/// A conversation that did not exist before, ready to be committed.
#[derive(Debug)]
pub struct Creation {
    /// Its state.
    pub state: State,
    /// Its first record and everything else to commit.
    pub change: MembersChange,
}

impl State {
    /// A conversation as the log knows it.
    #[must_use]
    pub fn load(
        id: ConversationId,
        meta: ConversationMeta,
        head: Head,
        members: impl IntoIterator<Item = (UserId, Member)>,
    ) -> Self {
        let members = members.into_iter().collect();
        Self { id, meta, head, members, writers: None, lanes: HashMap::new(), progress: HashMap::new() }
    }

    /// Everybody of its app reads it, and these write: it is a broadcast.
    pub fn open_to_all(&mut self, writers: HashSet<UserId>) {
        self.writers = Some(writers);
    }

    /// Whether everybody of its app reads it.
    #[must_use]
    pub const fn is_open_to_all(&self) -> bool {
        self.writers.is_some()
    }

    /// A new conversation made by `owner`, with its first members (the owner among them).
    #[must_use]
    pub fn create(
        id: ConversationId,
        meta: ConversationMeta,
        owner: UserId,
        members: &[(UserId, String)],
        now: UnixMillis,
    ) -> Creation {
        let mut state = Self::load(id, meta.clone(), Head::default(), []);
        let mut change = state.change_members(RecordKind::Created, owner, members, &[], now);
        change.ops.insert(0, Op::NameConversation { conversation: id, row: meta });
        Creation { state, change }
    }

    /// Its number.
    #[must_use]
    pub const fn id(&self) -> ConversationId {
        self.id
    }

    /// What it is.
    #[must_use]
    pub const fn meta(&self) -> &ConversationMeta {
        &self.meta
    }

    /// How far it has come, uncommitted records included.
    #[must_use]
    pub const fn head(&self) -> &Head {
        &self.head
    }

    /// Who is in it.
    pub fn members(&self) -> impl ExactSizeIterator<Item = UserId> + '_ {
        self.members.keys().copied()
    }

    /// How many are in it; of a broadcast nobody knows.
    #[must_use]
    pub fn member_count(&self) -> usize {
        if self.is_open_to_all() { usize::MAX } else { self.members.len() }
    }

    /// The membership of `user`, who is of the conversation's app.
    #[must_use]
    pub fn member(&self, user: UserId) -> Option<&Member> {
        match &self.writers {
            None => self.members.get(&user),
            Some(writers) if writers.contains(&user) => Some(&WRITER),
            Some(_) => Some(&READER),
        }
    }

    /// Whether the lane of a device is known; if not, [`Self::restore_lane`] it before [`Self::send`].
    #[must_use]
    pub fn knows_lane(&self, user: UserId, device: DeviceId) -> bool {
        self.lanes.contains_key(&(user, device))
    }

    /// What the log knows of a lane.
    pub fn restore_lane(&mut self, user: UserId, device: DeviceId, lane: Option<LaneState>) {
        if let Entry::Vacant(entry) = self.lanes.entry((user, device)) {
            entry.insert(match lane {
                Some(lane) => {
                    let recent = lane.recent.into_iter().map(|(pseq, seq)| (pseq, seq, 0));
                    Lane::restore(lane.epoch, lane.last, recent)
                }
                None => Lane::new(Epoch::ZERO),
            });
        }
    }

    /// The last settled pseq of a producer, 0 when it has sent nothing in this epoch.
    #[must_use]
    pub fn last_pseq(&self, producer: Producer) -> Pseq {
        match self.lanes.get(&(producer.user, producer.device)) {
            Some(lane) if lane.epoch() == producer.epoch => lane.last(),
            _ => Pseq::ZERO,
        }
    }

    /// Decides a send. `referred` is the record `send.reference` names, if it names one and there is one, or why it
    /// can't be had. `closed`: the log can't be written now, and this is why; what was settled before is told all the
    /// same.
    pub fn send(
        &mut self,
        producer: Producer,
        send: &frame::Send,
        referred: Result<Option<&Record>, RefusalCode>,
        closed: Option<RefusalCode>,
        now: UnixMillis,
    ) -> Verdict {
        let key = (producer.user, producer.device);
        let print = fingerprint(send);
        let lane = self.lanes.entry(key).or_insert_with(|| Lane::new(producer.epoch));
        let expected = lane.last().saturating_add(1);
        match lane.offer(producer.epoch, send.pseq, print) {
            Decision::Append => {
                if let Some(code) = closed {
                    return Verdict::Refused { code, expected: send.pseq };
                }
            }
            Decision::Again { seq } => return Verdict::Again(seq),
            Decision::Early { expected } => return Verdict::Early { expected },
            Decision::Conflict => return Verdict::Refused { code: RefusalCode::Conflict, expected },
            Decision::Stale { .. } => return Verdict::Refused { code: RefusalCode::StaleEpoch, expected },
        }
        if let Err(code) = self.permit(producer.user, send, referred) {
            if let Some(lane) = self.lanes.get_mut(&key) {
                lane.consumed(send.pseq);
            }
            let op = Op::Refuse {
                conversation: self.id,
                user: producer.user,
                device: producer.device,
                epoch: producer.epoch,
                pseq: send.pseq,
            };
            return Verdict::Consumed { code, op };
        }
        let Some(seq) = self.head.seq.next() else {
            return Verdict::Refused { code: RefusalCode::StorageFull, expected };
        };
        let kind = match send.kind {
            frame::RecordKind::Edit => RecordKind::Edit,
            frame::RecordKind::Recall => RecordKind::Recall,
            frame::RecordKind::Reaction => RecordKind::Reaction,
            _ => RecordKind::Message,
        };
        let counts = kind == RecordKind::Message && !send.silent && !send.more;
        let record = Record {
            seq,
            kind,
            sender: producer.user,
            device: producer.device,
            epoch: producer.epoch,
            pseq: send.pseq,
            time: now.max(self.head.time),
            count: self.head.count + u64::from(counts),
            target: send.reference,
            ttl: send.ttl,
            more: send.more,
            continues: send.continues,
            silent: send.silent,
            // The payload is a slice of the receive buffer: a copy lets that go.
            payload: Bytes::copy_from_slice(&send.payload),
        };
        self.advance(&record);
        if let Some(lane) = self.lanes.get_mut(&key) {
            lane.appended(send.pseq, seq, print);
        }
        Verdict::Append(record)
    }

    fn permit(
        &self,
        user: UserId,
        send: &frame::Send,
        referred: Result<Option<&Record>, RefusalCode>,
    ) -> Result<(), RefusalCode> {
        let member = self.member(user).ok_or(RefusalCode::NotAMember)?;
        if self.writers.as_ref().is_some_and(|writers| !writers.contains(&user)) {
            return Err(RefusalCode::NotAllowed);
        }
        if send.cancel {
            return Err(RefusalCode::Cancelled);
        }
        if send.ttl == Some(0) {
            return Err(RefusalCode::Expired);
        }
        if send.kind.refers() && send.reference.is_none() {
            return Err(RefusalCode::UnknownReference);
        }
        if send.reference.is_some() {
            let referred = referred?.ok_or(RefusalCode::UnknownReference)?;
            let own = referred.sender == user;
            match send.kind {
                frame::RecordKind::Edit if !own => return Err(RefusalCode::NotAllowed),
                frame::RecordKind::Recall if !own && member.role < Role::Admin => {
                    return Err(RefusalCode::NotAllowed);
                }
                frame::RecordKind::Edit | frame::RecordKind::Recall
                    if referred.kind != RecordKind::Message =>
                {
                    return Err(RefusalCode::UnknownReference);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Decides that `by` adds and removes members. `Ok(None)`: nothing would change.
    ///
    /// # Errors
    /// Why not.
    pub fn change(
        &mut self,
        by: UserId,
        add: &[(UserId, String)],
        remove: &[(UserId, String)],
        members_max: usize,
        now: UnixMillis,
    ) -> Result<Option<MembersChange>, RefusalCode> {
        let member = *self.member(by).ok_or(RefusalCode::NotAMember)?;
        let only_self = add.is_empty() && remove.iter().all(|(user, _)| *user == by);
        if self.meta.class != ConversationClass::Group || (member.role < Role::Admin && !only_self) {
            return Err(RefusalCode::NotAllowed);
        }
        let add = distinct(add, |user| !self.members.contains_key(user));
        let remove = distinct(remove, |user| self.members.contains_key(user));
        if remove.iter().any(|(user, _)| {
            *user != by && self.members.get(user).is_some_and(|other| other.role >= member.role)
        }) {
            return Err(RefusalCode::NotAllowed);
        }
        if self.members.len() + add.len() > members_max {
            return Err(RefusalCode::GroupFull);
        }
        if add.is_empty() && remove.is_empty() {
            return Ok(None);
        }
        let kind = if add.is_empty() { RecordKind::Left } else { RecordKind::Joined };
        Ok(Some(self.change_members(kind, by, &add, &remove, now)))
    }

    fn change_members(
        &mut self,
        kind: RecordKind,
        by: UserId,
        add: &[(UserId, String)],
        remove: &[(UserId, String)],
        now: UnixMillis,
    ) -> MembersChange {
        let named = if add.is_empty() { remove } else { add };
        let payload =
            fulmar_protocol::service::encode(&Roster { users: named.to_vec() }).unwrap_or_else(|| {
                // More names than a payload should carry: the members are in the member rows all the same.
                Bytes::new()
            });
        let record = Record {
            seq: self.head.seq.saturating_add(1),
            kind,
            sender: by,
            device: DeviceId::ZERO,
            epoch: Epoch::ZERO,
            pseq: Pseq::ZERO,
            time: now.max(self.head.time),
            count: self.head.count,
            target: None,
            ttl: None,
            more: false,
            continues: false,
            silent: true,
            payload,
        };
        self.advance(&record);
        let mut change = MembersChange {
            record: record.clone(),
            ops: vec![Op::Append { conversation: self.id, record: record.clone() }],
            links: Vec::new(),
            joined: Vec::new(),
            left: Vec::new(),
        };
        for (user, _) in add {
            let created = kind == RecordKind::Created;
            let role = if created && *user == by && self.meta.class == ConversationClass::Group {
                Role::Owner
            } else {
                Role::Member
            };
            let member = Member { role, joined: record.seq, since: record.time };
            self.members.insert(*user, member);
            change.ops.push(Op::Member { conversation: self.id, user: *user, row: Some(member) });
            change.joined.push(*user);
            change.links.push(PendingLink {
                conversation: self.id,
                user: *user,
                listed: Some(Listed {
                    joined: record.seq,
                    cleared: Seq::ZERO,
                    muted: false,
                    changed: record.time,
                }),
            });
        }
        for (user, _) in remove {
            self.members.remove(user);
            self.progress.remove(user);
            change.ops.push(Op::Member { conversation: self.id, user: *user, row: None });
            change.left.push(*user);
            change.links.push(PendingLink { conversation: self.id, user: *user, listed: None });
        }
        change.ops.extend(change.links.iter().copied().map(Op::Link));
        change
    }

    fn advance(&mut self, record: &Record) {
        self.head.seq = record.seq;
        self.head.count = record.count;
        self.head.time = record.time;
    }

    /// Records up to and including `low` are gone from the log. Never moves back.
    pub fn trimmed(&mut self, low: Seq, count: u64) {
        if low > self.head.low {
            self.head.low = low;
            self.head.low_count = count;
        }
    }

    /// What is known of a member's progress before anything is reported of it.
    pub fn restore_progress(&mut self, user: UserId, progress: Progress) {
        let known = self.progress.entry(user).or_default();
        known.recv = known.recv.max(progress.recv);
        known.read = known.read.max(progress.read);
    }

    /// A member's own record was stored: it has that, if it had all before, which is no news to anybody.
    pub fn sent(&mut self, user: UserId, seq: Seq) {
        if let Some(known) = self.progress.get_mut(&user).filter(|known| known.recv.next() == Some(seq)) {
            known.recv = seq;
        }
    }

    /// The progress of a member.
    #[must_use]
    pub fn progress(&self, user: UserId) -> Option<Progress> {
        self.progress.get(&user).copied()
    }

    /// A member has come further: returns its progress when that is news. Never beyond the head, never back.
    pub fn progressed(&mut self, user: UserId, recv: Seq, read: Seq) -> Option<Progress> {
        self.member(user)?;
        let (recv, read) = (recv.min(self.head.seq), read.min(self.head.seq));
        let known = self.progress.entry(user).or_default();
        let before = *known;
        known.read = known.read.max(read);
        known.recv = known.recv.max(recv).max(known.read);
        (*known != before).then_some(*known)
    }
}

fn distinct(users: &[(UserId, String)], wanted: impl Fn(&UserId) -> bool) -> Vec<(UserId, String)> {
    let mut out: Vec<(UserId, String)> = Vec::with_capacity(users.len());
    for (user, name) in users {
        if wanted(user) && !out.iter().any(|(known, _)| known == user) {
            out.push((*user, name.clone()));
        }
    }
    out
}

/// The name under which the direct conversation of two users is found: the two numbers, smaller first.
#[must_use]
pub fn direct_name(a: UserId, b: UserId) -> String {
    format!("{}:{}", a.min(b), a.max(b))
}

/// The other one of a direct conversation, by its name.
#[must_use]
pub fn direct_peer(name: &str, user: UserId) -> Option<UserId> {
    let (a, b) = name.split_once(':')?;
    let parse = |number: &str| number.parse().ok().and_then(UserId::new);
    let (a, b) = (parse(a)?, parse(b)?);
    if user == a { Some(b) } else { (user == b).then_some(a) }
}

/// A fresh meta row.
#[must_use]
pub fn meta(
    app: AppId,
    class: ConversationClass,
    name: String,
    creator: UserId,
    created: UnixMillis,
) -> ConversationMeta {
    ConversationMeta { app, class, name, creator, created }
}

#[cfg(test)]
mod tests {
    use fulmar_protocol::id::DeviceId;

    use super::*;

    fn at(millis: u64) -> UnixMillis {
        UnixMillis::new(millis).unwrap()
    }

    fn alice() -> (UserId, String) {
        (UserId::new(257).unwrap(), "alice".to_owned())
    }

    fn group() -> State {
        let meta = meta(AppId::of("demo"), ConversationClass::Group, "g".to_owned(), alice().0, at(1_000));
        State::create(ConversationId::new(256).unwrap(), meta, alice().0, &[alice()], at(1_000)).state
    }

    fn message(pseq: u64) -> (Producer, frame::Send) {
        let producer = Producer { user: alice().0, device: DeviceId::FIRST, epoch: Epoch::FIRST };
        let send = frame::Send {
            kind: frame::RecordKind::Message,
            conversation: ConversationId::new(256).unwrap(),
            pseq: Pseq::new(pseq).unwrap(),
            seen: Seq::ZERO,
            reference: None,
            ttl: None,
            more: false,
            continues: false,
            silent: false,
            cancel: false,
            payload: Bytes::from_static(b"hi"),
        };
        (producer, send)
    }

    fn appended(verdict: Verdict) -> Record {
        match verdict {
            Verdict::Append(record) => record,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_record_s_time_never_goes_back_whatever_the_clock_does() {
        let mut state = group();
        let mut times = vec![state.head().time.get()];
        for (pseq, now) in [(1, 5_000), (2, 4_000), (3, 9_000_000_000), (4, 6_000), (5, 9_000_000_001)] {
            let (producer, send) = message(pseq);
            times.push(appended(state.send(producer, &send, Ok(None), None, at(now))).time.get());
        }
        let bob = (UserId::new(513).unwrap(), "bob".to_owned());
        let change = state.change(alice().0, &[bob], &[], 100, at(7_000)).unwrap().unwrap();
        times.push(change.record.time.get());
        assert_eq!(times, [1_000, 5_000, 5_000, 9_000_000_000, 9_000_000_000, 9_000_000_001, 9_000_000_001]);
    }

    #[test]
    fn while_the_log_is_closed_nothing_is_decided_but_what_is_settled_is_told() {
        let mut state = group();
        let (producer, first) = message(1);
        let record = appended(state.send(producer, &first, Ok(None), None, at(2_000)));
        let head = *state.head();
        let closed = Some(RefusalCode::StorageFull);
        let (_, second) = message(2);
        for _ in 0..2 {
            let verdict = state.send(producer, &second, Ok(None), closed, at(3_000));
            assert_eq!(
                verdict,
                Verdict::Refused { code: RefusalCode::StorageFull, expected: Pseq::new(2).unwrap() }
            );
            // Not even what would be refused for good uses a number up.
            let cancel = frame::Send { cancel: true, ..second.clone() };
            let verdict = state.send(producer, &cancel, Ok(None), closed, at(3_000));
            assert!(
                matches!(verdict, Verdict::Refused { code: RefusalCode::StorageFull, .. }),
                "{verdict:?}"
            );
            let verdict = state.send(producer, &first, Ok(None), closed, at(3_000));
            assert_eq!(verdict, Verdict::Again(Some(record.seq)));
        }
        // A producer that lost its database is not taken for the present one either.
        let newer = Producer { epoch: Epoch::new(2).unwrap(), ..producer };
        let verdict = state.send(newer, &first, Ok(None), closed, at(3_000));
        assert!(matches!(verdict, Verdict::Refused { code: RefusalCode::StorageFull, .. }), "{verdict:?}");
        assert_eq!((*state.head(), state.last_pseq(producer)), (head, Pseq::FIRST));
        let next = appended(state.send(producer, &second, Ok(None), None, at(4_000)));
        assert_eq!(next.seq, record.seq.next().unwrap());
    }

    #[test]
    fn a_reference_that_is_damaged_is_refused_for_good_and_blocks_nothing() {
        let mut state = group();
        let (producer, send) = message(1);
        let edit = frame::Send { kind: frame::RecordKind::Edit, reference: Some(Seq::FIRST), ..send };
        let verdict = state.send(producer, &edit, Err(RefusalCode::Damaged), None, at(2_000));
        assert!(matches!(verdict, Verdict::Consumed { code: RefusalCode::Damaged, .. }), "{verdict:?}");
        let (producer, next) = message(2);
        appended(state.send(producer, &next, Ok(None), None, at(2_000)));
    }
}
