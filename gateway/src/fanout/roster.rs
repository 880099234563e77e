//! Which sessions are here, in which loaded conversations they are, and what changes for devices while they are away.
//!
//! - A device has a seat from its login until it has been away for too long. A conversation's roster lists the seats of its
//!   members; it is filled once when the conversation is loaded, and kept up to date as seats and members come and go. So
//!   an arrival costs nothing per conversation when the device's seat is still there.
//! - What is published while nobody sits there leaves a mark on the seat: this conversation changed. When the device comes
//!   back, the marks, what its last session had not acknowledged, and its user's large conversations are all that can
//!   have changed for it ([`Roster::arrive`]). **Whatever it lacks is among them**; most of it, if not all, it lacks.
//! - In a large conversation (many members) a message would cost a mark for each member who is away. There only seats with a
//!   session are listed.
//! - What is kept for who is away is bounded in time and in all ([`AwayLimits`]). Whoever is over a bound, or was never here,
//!   is told that nothing is known: then every conversation of its user is looked at.
//!
//! One per shard, owned by the shard's thread. Time is an argument: since the shard's start. Not here: who is a member
//! (`conversation::state`), what a conversation's head is, and whether a device lacks it (`receipt::resume`).

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use fulmar_protocol::{
    id::{ConversationId, DeviceId, Seq, ShardId, UserId},
    session::digest::CursorDigest,
};

use super::owed::Owed;

/// Bounds of what one shard keeps for devices that are away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AwayLimits {
    /// How long a seat is kept.
    pub lasts: Duration,
    /// Bytes of all that is kept, about; beyond it those who have been away for longest are forgotten.
    pub bytes: usize,
    /// Marks of one seat; beyond it nothing is known of it.
    pub marks: usize,
    /// Members above which a conversation counts as large.
    pub members: usize,
}

/// What a seat costs, about: itself, its entries in maps and rosters.
pub const SEAT_BYTES: usize = 512;

/// What a mark costs, about.
pub const MARK_BYTES: usize = 24;

/// Entries of rosters that are looked at in one go to forget who was away for too long; the rest has its turn a moment later.
const FORGET_WORK_MAX: usize = 20_000;

/// Why something that was kept for a device that is away is forgotten.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forgotten {
    /// It was away for too long.
    pub expired: u64,
    /// Too much is kept in all.
    pub full: u64,
    /// Too many conversations changed for it.
    pub marks: u64,
}

type SeatId = usize;

#[derive(Debug)]
struct Seat {
    user: UserId,
    device: DeviceId,
    /// The device's session; while it moves from one connection to another there are more.
    session: Option<Arc<Owed>>,
    more: Vec<Arc<Owed>>,
    /// Conversations that may have changed for the device since its marks were begun.
    marks: HashSet<ConversationId>,
    /// What the device lacks is among the marks and what its sessions have to say.
    known: bool,
    /// Its place in the queue of those who are away.
    away: Option<u64>,
    /// Over the cursors that are known of the device (on its user's shard).
    digest: Option<CursorDigest>,
    /// How often one of these cursors has moved.
    moves: u64,
}

impl Seat {
    fn sessions(&self) -> impl Iterator<Item = &Arc<Owed>> {
        self.session.iter().chain(&self.more)
    }

    const fn is_taken(&self) -> bool {
        self.session.is_some()
    }
}

#[derive(Debug, Default)]
struct Present {
    seats: Vec<SeatId>,
    large: bool,
}

/// A user's loaded conversations.
#[derive(Debug, Default)]
struct Memberships {
    small: HashSet<ConversationId>,
    large: HashSet<ConversationId>,
}

/// See the module's text.
#[derive(Debug)]
pub struct Roster {
    shard: ShardId,
    limits: AwayLimits,
    seats: Vec<Option<Seat>>,
    free: Vec<SeatId>,
    of_user: HashMap<UserId, Vec<SeatId>>,
    present: HashMap<ConversationId, Present>,
    loaded: HashMap<UserId, Memberships>,
    /// Who is away, in the order in which they left.
    away: BTreeMap<u64, (SeatId, Duration)>,
    left: u64,
    marks: usize,
    forgotten: Forgotten,
}

impl Roster {
    /// Of a shard in which nobody is.
    #[must_use]
    pub fn new(shard: ShardId, limits: AwayLimits) -> Self {
        Self {
            shard,
            limits,
            seats: Vec::new(),
            free: Vec::new(),
            of_user: HashMap::new(),
            present: HashMap::new(),
            loaded: HashMap::new(),
            away: BTreeMap::new(),
            left: 0,
            marks: 0,
            forgotten: Forgotten::default(),
        }
    }

    /// A session arrived. Answers in which conversations of this shard its device may lack something; in all others it
    /// lacks nothing. `None`: nothing is known of it.
    pub fn arrive(&mut self, session: &Arc<Owed>) -> Option<Vec<ConversationId>> {
        let id = self.seat_of(session.user, session.device);
        let shard = self.shard;
        let seat = self.seats.get_mut(id)?.as_mut()?;
        let lacks = Self::lacks(shard, seat);
        if let Some(place) = seat.away.take() {
            self.away.remove(&place);
        }
        let first = !seat.is_taken();
        match &seat.session {
            None => seat.session = Some(Arc::clone(session)),
            Some(_) => seat.more.push(Arc::clone(session)),
        }
        let large = self.loaded.get(&session.user).map(|loaded| &loaded.large);
        if first {
            for conversation in large.into_iter().flatten() {
                self.present.entry(*conversation).or_default().seats.push(id);
            }
        }
        let mut lacks = lacks?;
        lacks.extend(large.into_iter().flatten());
        Some(lacks.into_iter().collect())
    }

    fn lacks(shard: ShardId, seat: &Seat) -> Option<HashSet<ConversationId>> {
        let mut published = HashSet::new();
        for session in seat.sessions() {
            let (caught_up, unfinished) = session.unfinished(shard);
            if caught_up {
                return Some(unfinished.into_iter().collect());
            }
            published.extend(unfinished);
        }
        seat.known.then(|| {
            published.extend(&seat.marks);
            published
        })
    }

    /// A session left.
    pub fn depart(&mut self, session: &Owed, now: Duration) {
        let seats = self.of_user.get(&session.user);
        let found = seats.into_iter().flatten().copied().find(|id| {
            self.seat(*id)
                .is_some_and(|seat| seat.sessions().any(|here| here.connection == session.connection))
        });
        let Some(id) = found else { return };
        let shard = self.shard;
        let Some(seat) = self.seats.get_mut(id).and_then(Option::as_mut) else { return };
        if seat.session.as_ref().is_some_and(|here| here.connection == session.connection) {
            seat.session = seat.more.pop();
        } else {
            seat.more.retain(|here| here.connection != session.connection);
        }
        let (caught_up, unfinished) = session.unfinished(shard);
        self.marks -= seat.marks.len();
        if caught_up {
            // It knew all of what the device lacked when it came.
            seat.known = true;
            seat.marks = unfinished.into_iter().collect();
        } else if seat.known {
            seat.marks.extend(unfinished);
        }
        if seat.marks.len() > self.limits.marks {
            Self::too_many(seat, &mut self.forgotten);
        }
        self.marks += seat.marks.len();
        if seat.is_taken() {
            return;
        }
        for conversation in self.loaded.get(&session.user).map(|loaded| &loaded.large).into_iter().flatten() {
            if let Some(present) = self.present.get_mut(conversation) {
                present.seats.retain(|here| *here != id);
            }
        }
        self.is_away(id, now);
        self.shed();
    }

    /// A device was let in; its session may follow. It has a seat from now on.
    pub fn expect(&mut self, user: UserId, device: DeviceId, now: Duration) {
        let id = self.seat_of(user, device);
        if self.seat(id).is_some_and(|seat| !seat.is_taken() && seat.away.is_none()) {
            self.is_away(id, now);
            self.shed();
        }
    }

    /// Forgets what was kept for a device: it has lost its state.
    pub fn start_over(&mut self, user: UserId, device: DeviceId) {
        if let Some(seat) = self.find(user, device) {
            seat.known = false;
            seat.digest = None;
            seat.moves += 1;
            let marks = std::mem::take(&mut seat.marks).len();
            self.marks -= marks;
        }
    }

    /// The digest over the cursors that are known of a device, if it is kept, and how often they have moved.
    #[must_use]
    pub fn digest(&self, user: UserId, device: DeviceId) -> (Option<CursorDigest>, u64) {
        let seat = self
            .of_user
            .get(&user)
            .into_iter()
            .flatten()
            .find_map(|id| self.seat(*id).filter(|seat| seat.device == device));
        seat.map_or((None, 0), |seat| (seat.digest, seat.moves))
    }

    /// Keeps the digest of a device's cursors, if none has moved since they had moved `moves` times.
    pub fn keep_digest(&mut self, user: UserId, device: DeviceId, digest: CursorDigest, moves: u64) {
        if let Some(seat) = self.find(user, device).filter(|seat| seat.moves == moves) {
            seat.digest = Some(digest);
        }
    }

    /// A cursor that is known of a device has moved.
    pub fn cursor_moved(
        &mut self,
        user: UserId,
        device: DeviceId,
        conversation: ConversationId,
        from: Seq,
        to: Seq,
    ) {
        if let Some(seat) = self.find(user, device) {
            seat.moves += 1;
            if let Some(digest) = &mut seat.digest {
                digest.moved(conversation, from, to);
            }
        }
    }

    /// What is known of a device's cursors is no longer what its acks said.
    pub fn forget_digest(&mut self, user: UserId, device: DeviceId) {
        if let Some(seat) = self.find(user, device) {
            seat.moves += 1;
            seat.digest = None;
        }
    }

    /// A conversation was loaded: these are its members.
    pub fn load(&mut self, conversation: ConversationId, members: impl ExactSizeIterator<Item = UserId>) {
        let large = members.len() > self.limits.members;
        let mut seats = Vec::new();
        for user in members {
            let loaded = self.loaded.entry(user).or_default();
            if large {
                loaded.large.insert(conversation)
            } else {
                loaded.small.insert(conversation)
            };
            seats.extend(self.of_user.get(&user).into_iter().flatten().copied());
        }
        if large {
            seats.retain(|id| self.seat(*id).is_some_and(Seat::is_taken));
        }
        self.present.insert(conversation, Present { seats, large });
    }

    /// A conversation was put away.
    pub fn unload(&mut self, conversation: ConversationId, members: impl IntoIterator<Item = UserId>) {
        let large = self.present.remove(&conversation).is_some_and(|present| present.large);
        for user in members {
            self.forget(user, conversation);
            if large {
                // It may have changed for who is away, and is no longer among those to be looked at in any case.
                self.mark_user(user, conversation);
            }
        }
        self.shed();
    }

    /// A user became a member of a loaded conversation.
    pub fn join(&mut self, conversation: ConversationId, user: UserId) {
        let present = self.present.entry(conversation).or_default();
        let loaded = self.loaded.entry(user).or_default();
        let new =
            if present.large { loaded.large.insert(conversation) } else { loaded.small.insert(conversation) };
        if new {
            let seats = self.of_user.get(&user).into_iter().flatten().copied();
            let large = present.large;
            present.seats.extend(seats.filter(|id| {
                !large || self.seats.get(*id).and_then(Option::as_ref).is_some_and(Seat::is_taken)
            }));
        }
    }

    /// A user is no longer a member of a loaded conversation.
    pub fn leave(&mut self, conversation: ConversationId, user: UserId) {
        self.forget(user, conversation);
        let seats = self.of_user.get(&user).map_or(&[][..], Vec::as_slice);
        if let Some(present) = self.present.get_mut(&conversation) {
            present.seats.retain(|id| !seats.contains(id));
        }
    }

    /// The members of a loaded conversation have changed: it may be a large one now, or no longer. Not at every member to
    /// and fro: it stays large down to nine tenths of the bound.
    pub fn resize(&mut self, conversation: ConversationId, members: impl ExactSizeIterator<Item = UserId>) {
        let Some(present) = self.present.get_mut(&conversation) else { return };
        let count = members.len();
        if !present.large && count > self.limits.members {
            present.large = true;
            let seats = &self.seats;
            present.seats.retain(|id| seats.get(*id).and_then(Option::as_ref).is_some_and(Seat::is_taken));
            for user in members {
                let loaded = self.loaded.entry(user).or_default();
                loaded.small.remove(&conversation);
                loaded.large.insert(conversation);
            }
        } else if present.large && count < self.limits.members - self.limits.members / 10 {
            present.large = false;
            let mut away = Vec::new();
            for user in members {
                let loaded = self.loaded.entry(user).or_default();
                loaded.large.remove(&conversation);
                loaded.small.insert(conversation);
                let seats = self.of_user.get(&user).into_iter().flatten().copied();
                away.extend(seats.filter(|id| {
                    self.seats.get(*id).and_then(Option::as_ref).is_some_and(|seat| !seat.is_taken())
                }));
            }
            present.seats.extend(&away);
            for id in away {
                self.mark(id, conversation);
            }
            self.shed();
        }
    }

    /// The sessions to tell of a record of `conversation`.
    pub fn present(&self, conversation: ConversationId) -> impl Iterator<Item = &Arc<Owed>> {
        let seats = self.present.get(&conversation).map_or(&[][..], |present| &present.seats);
        seats.iter().filter_map(|id| self.seat(*id)).flat_map(Seat::sessions)
    }

    /// Who is here in a conversation, or has been until lately, together.
    #[must_use]
    pub fn seats(&self, conversation: ConversationId) -> usize {
        self.present.get(&conversation).map_or(0, |present| present.seats.len())
    }

    /// A record of `conversation` was published: who is away has something to look at.
    pub fn mark_away(&mut self, conversation: ConversationId) {
        if self.away.is_empty() {
            return;
        }
        let Some(present) = self.present.get_mut(&conversation) else { return };
        let seats = std::mem::take(&mut present.seats);
        for id in &seats {
            self.mark(*id, conversation);
        }
        if let Some(present) = self.present.get_mut(&conversation) {
            present.seats = seats;
        }
        self.shed();
    }

    /// The sessions of `user`.
    pub fn sessions(&self, user: UserId) -> impl Iterator<Item = &Arc<Owed>> {
        let seats = self.of_user.get(&user).into_iter().flatten();
        seats.filter_map(|id| self.seat(*id)).flat_map(Seat::sessions)
    }

    /// Forgets some of those who have been away for too long. To be called now and then.
    pub fn expire(&mut self, now: Duration) {
        let mut work = 0;
        while work < FORGET_WORK_MAX {
            let Some((place, (id, since))) = self.away.first_key_value().map(|(place, away)| (*place, *away))
            else {
                return;
            };
            if now.saturating_sub(since) < self.limits.lasts {
                return;
            }
            self.away.remove(&place);
            self.forgotten.expired += 1;
            work += 1 + self.take_away(id);
        }
    }

    /// Devices that are away and have a seat, and the marks of all seats.
    #[must_use]
    pub fn kept(&self) -> (usize, usize) {
        (self.away.len(), self.marks)
    }

    /// What was forgotten since the last call.
    pub fn take_forgotten(&mut self) -> Forgotten {
        std::mem::take(&mut self.forgotten)
    }

    fn seat(&self, id: SeatId) -> Option<&Seat> {
        self.seats.get(id)?.as_ref()
    }

    fn find(&mut self, user: UserId, device: DeviceId) -> Option<&mut Seat> {
        let id = *self.of_user.get(&user)?.iter().find(|id| {
            self.seats.get(**id).and_then(Option::as_ref).is_some_and(|seat| seat.device == device)
        })?;
        self.seats.get_mut(id)?.as_mut()
    }

    /// The seat of a device, which may be a new one.
    fn seat_of(&mut self, user: UserId, device: DeviceId) -> SeatId {
        let known = self.of_user.get(&user).into_iter().flatten().copied();
        let known = known.into_iter().find(|id| self.seat(*id).is_some_and(|seat| seat.device == device));
        if let Some(known) = known {
            return known;
        }
        let seat = Seat {
            user,
            device,
            session: None,
            more: Vec::new(),
            marks: HashSet::new(),
            known: false,
            away: None,
            digest: None,
            moves: 0,
        };
        let id = match self.free.pop() {
            Some(id) => id,
            None => {
                self.seats.push(None);
                self.seats.len() - 1
            }
        };
        if let Some(place) = self.seats.get_mut(id) {
            *place = Some(seat);
        }
        self.of_user.entry(user).or_default().push(id);
        for conversation in self.loaded.get(&user).map(|loaded| &loaded.small).into_iter().flatten() {
            self.present.entry(*conversation).or_default().seats.push(id);
        }
        id
    }

    fn is_away(&mut self, id: SeatId, now: Duration) {
        if let Some(seat) = self.seats.get_mut(id).and_then(Option::as_mut) {
            self.left += 1;
            seat.away = Some(self.left);
            self.away.insert(self.left, (id, now));
        }
    }

    fn mark_user(&mut self, user: UserId, conversation: ConversationId) {
        for id in self.of_user.get(&user).cloned().unwrap_or_default() {
            self.mark(id, conversation);
        }
    }

    /// Marks a conversation on a seat nobody sits on.
    fn mark(&mut self, id: SeatId, conversation: ConversationId) {
        let Some(seat) = self.seats.get_mut(id).and_then(Option::as_mut) else { return };
        if seat.is_taken() || !seat.known || !seat.marks.insert(conversation) {
            return;
        }
        self.marks += 1;
        if seat.marks.len() > self.limits.marks {
            self.marks -= seat.marks.len();
            Self::too_many(seat, &mut self.forgotten);
        }
    }

    fn too_many(seat: &mut Seat, forgotten: &mut Forgotten) {
        seat.marks = HashSet::new();
        seat.known = false;
        forgotten.marks += 1;
    }

    /// Forgets those who have been away for longest while too much is kept.
    fn shed(&mut self) {
        while self.away.len() * SEAT_BYTES + self.marks * MARK_BYTES > self.limits.bytes
            && let Some((_, (id, _))) = self.away.pop_first()
        {
            self.forgotten.full += 1;
            let _ = self.take_away(id);
        }
    }

    /// Takes a seat away; answers how many entries of rosters were looked at for that.
    fn take_away(&mut self, id: SeatId) -> usize {
        let Some(seat) = self.seats.get_mut(id).and_then(Option::take) else { return 0 };
        self.marks -= seat.marks.len();
        self.free.push(id);
        if let Some(seats) = self.of_user.get_mut(&seat.user) {
            seats.retain(|other| *other != id);
            if seats.is_empty() {
                self.of_user.remove(&seat.user);
            }
        }
        let Some(loaded) = self.loaded.get(&seat.user) else { return 0 };
        let mut looked_at = 0;
        // In large ones it has no place: nobody sits there.
        for conversation in &loaded.small {
            if let Some(present) = self.present.get_mut(conversation) {
                looked_at += present.seats.len();
                present.seats.retain(|other| *other != id);
            }
        }
        looked_at
    }

    fn forget(&mut self, user: UserId, conversation: ConversationId) {
        if let Some(loaded) = self.loaded.get_mut(&user) {
            loaded.small.remove(&conversation);
            loaded.large.remove(&conversation);
            if loaded.small.is_empty() && loaded.large.is_empty() {
                self.loaded.remove(&user);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use fulmar_protocol::frame::Head;

    use super::*;
    use crate::fanout::ring::{Ring, RingLimits};

    const LIMITS: AwayLimits = AwayLimits { lasts: at(60), bytes: 1 << 20, marks: 100, members: 20 };

    const fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn user(n: u64) -> UserId {
        UserId::new(n * 256).unwrap()
    }

    fn conversation(n: u64) -> ConversationId {
        ConversationId::new(n * 256).unwrap()
    }

    fn session(n: u64, connection: u64) -> Arc<Owed> {
        Arc::new(Owed::new(user(n), DeviceId::FIRST, connection, 10))
    }

    fn roster(limits: AwayLimits) -> Roster {
        Roster::new(ShardId::new(0).unwrap(), limits)
    }

    fn present(roster: &Roster, n: u64) -> Vec<u64> {
        let mut here: Vec<u64> = roster.present(conversation(n)).map(|s| s.connection).collect();
        here.sort_unstable();
        here
    }

    fn publish(roster: &mut Roster, n: u64, seq: u64) {
        let ring = Arc::new(Ring::new(RingLimits { records: 4, bytes: 1_000 }));
        for session in roster.present(conversation(n)) {
            session.publish(conversation(n), Seq::new(seq).unwrap(), &ring, true);
        }
        roster.mark_away(conversation(n));
    }

    fn arrive(roster: &mut Roster, session: &Arc<Owed>) -> Option<Vec<u64>> {
        let mut lacks: Vec<u64> = roster.arrive(session)?.into_iter().map(|c| c.get() / 256).collect();
        lacks.sort_unstable();
        Some(lacks)
    }

    fn members(of: impl IntoIterator<Item = u64>) -> std::vec::IntoIter<UserId> {
        of.into_iter().map(user).collect::<Vec<_>>().into_iter()
    }

    #[test]
    fn presence_follows_arrivals_members_and_loading() {
        let (c1, c2) = (conversation(1), conversation(2));
        let mut roster = roster(AwayLimits { lasts: Duration::ZERO, ..LIMITS });
        let (a, b, b2) = (session(1, 10), session(2, 20), session(2, 21));
        roster.arrive(&a);
        roster.load(c1, members([1, 2]));
        assert_eq!(present(&roster, 1), [10]);
        roster.arrive(&b);
        roster.arrive(&b2);
        assert_eq!(present(&roster, 1), [10, 20, 21]);
        roster.load(c2, members([1]));
        roster.join(c2, user(2));
        roster.join(c2, user(2));
        assert_eq!(present(&roster, 2), [10, 20, 21], "joining twice changes nothing");
        roster.leave(c1, user(2));
        assert_eq!(present(&roster, 1), [10]);
        roster.depart(&b, at(0));
        assert_eq!(present(&roster, 2), [10, 21]);
        roster.unload(c2, [user(1), user(2)]);
        assert_eq!(present(&roster, 2), [0u64; 0]);
        roster.depart(&a, at(0));
        roster.depart(&b2, at(0));
        roster.expire(at(0));
        assert!(roster.of_user.is_empty() && present(&roster, 1).is_empty());
        assert_eq!(roster.free.len(), roster.seats.len());
    }

    #[test]
    fn who_comes_back_is_told_what_may_have_changed_and_nothing_else() {
        let mut roster = roster(LIMITS);
        for n in 1..=50 {
            roster.load(conversation(n), members([1, 2]));
        }
        let first = session(1, 10);
        assert_eq!(arrive(&mut roster, &first), None, "never here before");
        publish(&mut roster, 7, 1);
        publish(&mut roster, 8, 1);
        first.acked(&[(conversation(8), Seq::FIRST)]);
        first.caught_up();
        roster.depart(&first, at(1));
        publish(&mut roster, 9, 1);
        publish(&mut roster, 9, 2);
        let second = session(1, 11);
        assert_eq!(arrive(&mut roster, &second), Some(vec![7, 9]), "8 was acked");
        assert_eq!(roster.kept().0, 0);
        // It is gone before it was told what it lacks.
        publish(&mut roster, 10, 1);
        roster.depart(&second, at(2));
        let third = session(1, 12);
        assert_eq!(arrive(&mut roster, &third), Some(vec![7, 9, 10]));
        // A connection that takes over from one that is still there.
        let head =
            Head { conversation: conversation(9), head: Seq::new(2).unwrap(), count: 2, low: Seq::FIRST };
        third.resume(conversation(9), Seq::FIRST, false, head);
        third.caught_up();
        let fourth = session(1, 13);
        assert_eq!(arrive(&mut roster, &fourth), Some(vec![9]), "of 7 and 10 it had everything");
        assert_eq!(present(&roster, 3), [12, 13]);
    }

    #[test]
    fn large_conversations_are_looked_at_in_any_case_and_leave_no_marks() {
        let mut roster = roster(LIMITS);
        roster.load(conversation(1), members(1..=21));
        roster.load(conversation(2), members(1..=20));
        let first = session(1, 10);
        roster.arrive(&first);
        assert_eq!((present(&roster, 1), present(&roster, 2)), (vec![10], vec![10]));
        first.caught_up();
        roster.depart(&first, at(0));
        for seq in 1..5 {
            publish(&mut roster, 1, seq);
        }
        assert_eq!(roster.kept(), (1, 0));
        let second = session(1, 11);
        assert_eq!(arrive(&mut roster, &second), Some(vec![1]));
        assert_eq!(present(&roster, 1), [11]);
        second.caught_up();
        roster.depart(&second, at(0));
        // What goes out of memory, or shrinks, while somebody is away is looked at once more.
        roster.unload(conversation(1), members(1..=21));
        roster.join(conversation(2), user(21));
        roster.resize(conversation(2), members(1..=21));
        roster.resize(conversation(2), members(1..=18));
        assert_eq!(roster.kept(), (1, 1), "still large: 18 is nine tenths of 20");
        for gone in 18..=21 {
            roster.leave(conversation(2), user(gone));
        }
        roster.resize(conversation(2), members(1..=17));
        assert_eq!(roster.kept(), (1, 2));
        assert_eq!(arrive(&mut roster, &session(1, 12)), Some(vec![1, 2]));
    }

    #[test]
    fn what_is_kept_is_bounded_in_time_marks_and_bytes() {
        let limits = AwayLimits { marks: 3, bytes: 4 * SEAT_BYTES, ..LIMITS };
        let mut roster = roster(limits);
        for n in 1..=9 {
            roster.load(conversation(n), members(1..=9));
        }
        for n in 1..=4 {
            let session = session(n, n);
            roster.arrive(&session);
            session.caught_up();
            roster.depart(&session, at(n));
        }
        assert_eq!(roster.kept(), (4, 0));
        publish(&mut roster, 1, 1);
        assert_eq!(roster.kept(), (3, 3), "the first had to go");
        assert_eq!(roster.take_forgotten(), Forgotten { full: 1, ..Forgotten::default() });
        assert_eq!(arrive(&mut roster, &session(1, 11)), None);
        roster.expire(at(62));
        assert_eq!(roster.take_forgotten(), Forgotten { expired: 1, ..Forgotten::default() });
        assert_eq!(arrive(&mut roster, &session(2, 12)), None);
        for n in 2..=4 {
            publish(&mut roster, n, 1);
        }
        assert_eq!(roster.take_forgotten(), Forgotten { marks: 2, ..Forgotten::default() });
        assert_eq!(arrive(&mut roster, &session(3, 13)), None);
        assert_eq!(roster.kept(), (1, 0));
    }

    #[test]
    fn a_digest_follows_its_cursors_or_is_forgotten() {
        let mut roster = roster(LIMITS);
        let (user, device, seq) = (user(1), DeviceId::FIRST, |n| Seq::new(n).unwrap());
        assert_eq!(roster.digest(user, device), (None, 0));
        roster.expect(user, device, at(0));
        roster.cursor_moved(user, device, conversation(1), Seq::ZERO, seq(1));
        roster.keep_digest(user, device, CursorDigest::default(), 0);
        assert_eq!(roster.digest(user, device), (None, 1), "one has moved since it was made");
        let of = |cursors: &[(u64, u64)]| {
            CursorDigest::of(cursors.iter().map(|(c, s)| (conversation(*c), seq(*s))))
        };
        roster.keep_digest(user, device, of(&[(1, 1)]), 1);
        roster.cursor_moved(user, device, conversation(1), seq(1), seq(4));
        roster.cursor_moved(user, device, conversation(2), Seq::ZERO, seq(9));
        assert_eq!(roster.digest(user, device).0, Some(of(&[(2, 9), (1, 4)])));
        roster.forget_digest(user, device);
        assert_eq!(roster.digest(user, device).0, None);
        roster.expire(at(60));
        assert_eq!(roster.digest(user, device), (None, 0));
    }
}
