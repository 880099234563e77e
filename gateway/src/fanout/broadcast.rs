//! Who is told of a broadcast's record, and when: everybody of an app who is here, by and by.
//!
//! - A record is told to those who were here when it was committed. Whoever comes later finds it by the resume.
//! - So many at a time ([`SLICE`]). The next leave when most of the last have taken theirs, and after as long again: between two
//!   slices the cores have all their time for chat, and a broadcast takes about half of them, however fast they are.
//! - What is published meanwhile is told in the next round, in one go. So a round is all there is to remember, and no
//!   broadcast has a queue.
//!
//! One per shard, for the broadcasts it owns; sessions of other apps cost nothing. Time is an argument: since the shard's start. Not here:
//! what a connection does with what it is owed ([`super::owed`]), who may publish (`conversation`).

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use fulmar_protocol::id::{AppId, ConversationId, Seq};
use tracing::debug;

use super::{owed::Owed, ring::Ring};

/// Sessions that are told at once.
pub const SLICE: usize = 64;

/// Between two looks at whether a slice was taken.
const LOOK: Duration = Duration::from_millis(1);

/// How long a slice may take before it is left alone: some of its connections don't get through.
const PATIENCE: Duration = Duration::from_millis(100);

/// Records that wait for the next round and are told apart by who was here when they came; beyond it who came in between may be
/// told of one more than it lacks, and ignores it.
const MARKS_MAX: usize = 1_024;

/// Everybody of an app who is here.
#[derive(Debug, Default)]
struct Audience {
    arrivals: u64,
    /// By connection: how many had arrived before it.
    here: BTreeMap<u64, (u64, Arc<Owed>)>,
    broadcasts: Vec<ConversationId>,
}

/// Who had arrived by then is told from this record on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    arrivals: u64,
    first: Seq,
}

#[derive(Debug)]
struct Round {
    marks: Vec<Mark>,
    last: Seq,
    ring: Arc<Ring>,
    began: Duration,
    told: usize,
    /// The next connection that is looked at.
    next: u64,
}

#[derive(Debug)]
struct Telling {
    app: AppId,
    round: Option<Round>,
    /// What is told in the next round: to whom from where on, and up to where.
    waiting: Vec<Mark>,
    last: Seq,
    ring: Option<Arc<Ring>>,
    /// The slice that is on its way, and since when.
    slice: Vec<Arc<Owed>>,
    left: Duration,
    due: Duration,
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct Broadcasting {
    audiences: HashMap<AppId, Audience>,
    /// In the order of their numbers: a simulated world repeats itself.
    tellings: BTreeMap<ConversationId, Telling>,
}

impl Broadcasting {
    /// A broadcast of `app` is served here. Sessions that arrive from now on are told of it.
    pub fn serve(&mut self, app: AppId, conversation: ConversationId) {
        let audience = self.audiences.entry(app).or_default();
        if !audience.broadcasts.contains(&conversation) {
            audience.broadcasts.push(conversation);
        }
        self.tellings.entry(conversation).or_insert_with(|| Telling {
            app,
            round: None,
            waiting: Vec::new(),
            last: Seq::ZERO,
            ring: None,
            slice: Vec::new(),
            left: Duration::ZERO,
            due: Duration::ZERO,
        });
    }

    /// The broadcasts of an app that are served here: who arrives may lack something in each.
    #[must_use]
    pub fn of(&self, app: AppId) -> &[ConversationId] {
        self.audiences.get(&app).map_or(&[], |audience| &audience.broadcasts)
    }

    /// A session arrived.
    pub fn arrive(&mut self, session: &Arc<Owed>) {
        if let Some(audience) = self.audiences.get_mut(&session.app) {
            audience.here.insert(session.connection, (audience.arrivals, Arc::clone(session)));
            audience.arrivals += 1;
        }
    }

    /// A session left.
    pub fn depart(&mut self, session: &Owed) {
        if let Some(audience) = self.audiences.get_mut(&session.app) {
            audience.here.remove(&session.connection);
        }
    }

    /// A record was committed and is in `ring`. `false`: no such broadcast is served here.
    pub fn published(&mut self, conversation: ConversationId, seq: Seq, ring: &Arc<Ring>) -> bool {
        let Some(telling) = self.tellings.get_mut(&conversation) else { return false };
        let arrivals = self.audiences.get(&telling.app).map_or(0, |audience| audience.arrivals);
        let full = telling.waiting.len() >= MARKS_MAX;
        match telling.waiting.last_mut() {
            Some(mark) if mark.arrivals == arrivals => {}
            Some(mark) if full => mark.arrivals = arrivals,
            _ => telling.waiting.push(Mark { arrivals, first: seq }),
        }
        telling.last = seq;
        telling.ring = Some(Arc::clone(ring));
        true
    }

    /// When [`Self::tell`] has something to do; `None`: not before something is published.
    #[must_use]
    pub fn due(&self) -> Option<Duration> {
        self.tellings.values().filter(|telling| telling.is_busy()).map(|telling| telling.due).min()
    }

    /// Tells the next who are due, of each broadcast; answers how many.
    pub fn tell(&mut self, now: Duration) -> usize {
        let mut told = 0;
        for (conversation, telling) in &mut self.tellings {
            if telling.is_busy()
                && telling.due <= now
                && let Some(audience) = self.audiences.get(&telling.app)
            {
                told += telling.tell(*conversation, audience, now);
            }
        }
        told
    }
}

impl Telling {
    fn is_busy(&self) -> bool {
        self.round.is_some() || !self.waiting.is_empty()
    }

    fn tell(&mut self, conversation: ConversationId, audience: &Audience, now: Duration) -> usize {
        if !self.slice.is_empty() {
            let took = now.saturating_sub(self.left);
            let waiting = self.slice.iter().filter(|session| session.waiting() > 0).count();
            if waiting * 4 > self.slice.len() && took < PATIENCE {
                self.due = now + LOOK;
                return 0;
            }
            self.slice.clear();
            self.due = now + took;
            if !took.is_zero() {
                return 0;
            }
        }
        let round = self.round.take().or_else(|| {
            let (marks, ring) = (std::mem::take(&mut self.waiting), self.ring.take()?);
            Some(Round { marks, last: self.last, ring, began: now, told: 0, next: 0 })
        });
        let Some(mut round) = round else { return 0 };
        let mut looked_at = 0;
        for (connection, (arrived, session)) in audience.here.range(round.next..).take(SLICE) {
            looked_at += 1;
            round.next = connection.saturating_add(1);
            if let Some(mark) = round.marks.iter().find(|mark| *arrived < mark.arrivals) {
                session.publish_from(conversation, mark.first, round.last, &round.ring);
                self.slice.push(Arc::clone(session));
            }
        }
        (self.left, self.due) = (now, now + LOOK);
        let told = self.slice.len();
        round.told += told;
        if looked_at == SLICE {
            self.round = Some(round);
        } else {
            let (up_to, took) = (round.last, now.saturating_sub(round.began));
            debug!(%conversation, %up_to, connections = round.told, ?took, "everybody here was told");
        }
        told
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use fulmar_protocol::id::{DeviceId, UnixMillis, UserId};

    use super::*;
    use crate::fanout::ring::{RingEntry, RingLimits};

    fn conversation() -> ConversationId {
        ConversationId::new(256).unwrap()
    }

    fn seq(n: u64) -> Seq {
        Seq::new(n).unwrap()
    }

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn session(app: &str, connection: u64) -> Arc<Owed> {
        let user = UserId::new(256 * (connection + 1)).unwrap();
        Arc::new(Owed::new(user, DeviceId::FIRST, connection, 100).of_app(AppId::of(app)))
    }

    struct World {
        broadcasting: Broadcasting,
        ring: Arc<Ring>,
    }

    impl World {
        fn new() -> Self {
            let mut broadcasting = Broadcasting::default();
            broadcasting.serve(AppId::of("acme"), conversation());
            Self { broadcasting, ring: Arc::new(Ring::new(RingLimits { records: 64, bytes: 1 << 20 })) }
        }

        fn come(&mut self, connections: impl Iterator<Item = u64>) -> Vec<Arc<Owed>> {
            let here: Vec<_> = connections.map(|connection| session("acme", connection)).collect();
            here.iter().for_each(|session| self.broadcasting.arrive(session));
            here
        }

        fn publish(&mut self, n: u64) {
            self.ring.push(RingEntry {
                seq: seq(n),
                sender: UserId::new(999).unwrap(),
                time: UnixMillis::new(1).unwrap(),
                frame: Bytes::from(vec![u8::try_from(n).unwrap()]),
                own_frame: None,
            });
            assert!(self.broadcasting.published(conversation(), seq(n), &self.ring));
        }

        /// Tells everybody, who take theirs at once.
        fn finish(&mut self, mut now: Duration, here: &[&[Arc<Owed>]]) -> Vec<Vec<u8>> {
            let mut got = vec![Vec::new(); here.iter().map(|some| some.len()).sum()];
            for _ in 0..10_000 {
                let Some(due) = self.broadcasting.due() else { return got };
                now = now.max(due);
                self.broadcasting.tell(now);
                for (session, got) in here.iter().copied().flatten().zip(&mut got) {
                    got.extend(take(session));
                }
            }
            panic!("it never ends");
        }
    }

    fn take(session: &Owed) -> Vec<u8> {
        let mut got = Vec::new();
        while let Some(taken) = session.take_live(1 << 20, UnixMillis::new(1).unwrap()) {
            got.extend(taken.frames.iter().map(|frame| frame[0]));
        }
        got
    }

    #[test]
    fn everybody_of_the_app_is_told_in_slices_that_wait_for_each_other() {
        let mut world = World::new();
        let here = world.come(0..2 * SLICE as u64 + 20);
        let stranger = session("other", 7_000);
        world.broadcasting.arrive(&stranger);
        assert_eq!((world.broadcasting.due(), world.broadcasting.of(AppId::of("other"))), (None, &[][..]));
        world.publish(1);
        let told = |from: usize| here.iter().skip(from).filter(|session| session.waiting() > 0).count();
        assert_eq!(world.broadcasting.tell(ms(10)), SLICE);
        assert_eq!(told(0), SLICE, "no more at once");
        // Nobody has taken anything: the next wait, and are looked after again a little later.
        assert_eq!((world.broadcasting.due(), world.broadcasting.tell(ms(11))), (Some(ms(11)), 0));
        here.iter().take(SLICE - 10).for_each(|session| assert_eq!(take(session), [1]));
        // Most have after 8 ms: the next leave after as long again.
        assert_eq!((world.broadcasting.tell(ms(18)), world.broadcasting.due()), (0, Some(ms(26))));
        assert_eq!(world.broadcasting.tell(ms(26)), SLICE);
        // These never take theirs: after a while the others have their turn.
        assert_eq!((world.broadcasting.tell(ms(125)), told(SLICE)), (0, SLICE));
        assert_eq!((world.broadcasting.tell(ms(126)), world.broadcasting.due()), (0, Some(ms(226))));
        assert_eq!(world.broadcasting.tell(ms(226)), 20);
        assert_eq!(world.broadcasting.due(), None);
        assert_eq!(told(2 * SLICE), 20);
        assert_eq!(stranger.waiting(), 0);
    }

    #[test]
    fn a_record_is_told_to_those_who_were_here_and_once() {
        let mut world = World::new();
        let early = world.come(1_000..1_300);
        world.publish(1);
        world.broadcasting.tell(ms(0));
        // 2 and 3 come while 1 is being told, and people with them: some before the others in the order of telling.
        let between = world.come(500..510);
        world.publish(2);
        let late = world.come(2_000..2_010);
        world.publish(3);
        let last = world.come(400..405);
        world.broadcasting.depart(&early[299]);
        let got = world.finish(ms(1), &[&early, &between, &late, &last]);
        for (at, got) in got.iter().enumerate() {
            let want: &[u8] = match at {
                299 => &[],
                0..300 => &[1, 2, 3],
                300..310 => &[2, 3],
                310..320 => &[3],
                _ => &[],
            };
            assert_eq!(got, want, "{at}");
        }
    }

    #[test]
    fn what_waits_for_the_next_round_is_bounded() {
        let mut world = World::new();
        let first = world.come(0..1);
        world.publish(1);
        for n in 0..3 * MARKS_MAX as u64 {
            let _ = world.come(10 + n..11 + n);
            assert!(world.broadcasting.published(conversation(), seq(2 + n), &world.ring));
        }
        let telling = &world.broadcasting.tellings[&conversation()];
        assert_eq!(telling.waiting.len(), MARKS_MAX);
        assert_eq!(telling.waiting.last().unwrap().arrivals, 1 + 3 * MARKS_MAX as u64, "nobody is left out");
        drop(first);
    }
}
