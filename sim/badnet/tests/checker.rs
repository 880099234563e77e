//! The checker refuses what is broken and accepts what is not.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::time::Duration;

use fulmar_badnet::Rng;
use fulmar_badnet::Share;
use fulmar_badnet::SimTime;
use fulmar_badnet::checker::{Report, Rules, check};
use fulmar_badnet::history::{Client, Conversation, Digest, Event, History, Tag};
use proptest::prelude::{ProptestConfig, prop_assert, proptest};

const ALICE: Client = Client(1);
const BOB: Client = Client(2);
const CAROL: Client = Client(3);
const MALLORY: Client = Client(9);
const ROOM: Conversation = Conversation(7);
const OTHER_ROOM: Conversation = Conversation(8);

fn tag(client: Client, counter: u64) -> Tag {
    Tag { client, counter }
}

fn digest(tag: Tag) -> Digest {
    Digest::of(&tag.stamp(b"text"))
}

fn joined(client: Client, conversation: Conversation) -> Event {
    Event::Joined { client, conversation, first: 1 }
}

fn queued(tag: Tag) -> Event {
    Event::Queued { client: tag.client, conversation: ROOM, tag, digest: digest(tag) }
}

fn acked(tag: Tag, seq: u64) -> Event {
    Event::Acked { client: tag.client, conversation: ROOM, tag, seq }
}

fn delivered(client: Client, tag: Tag, seq: u64) -> Event {
    Event::Delivered { client, conversation: ROOM, seq, sender: tag.client, tag, digest: digest(tag) }
}

fn read(client: Client, of: Client, upto: u64) -> Event {
    Event::Read { client, of, conversation: ROOM, upto }
}

/// Three members, four messages, one kill, one reconnect.
fn good() -> Vec<Event> {
    let [a1, a2, b1, a3] = [tag(ALICE, 1), tag(ALICE, 2), tag(BOB, 1), tag(ALICE, 3)];
    vec![
        joined(ALICE, ROOM),
        joined(BOB, ROOM),
        joined(CAROL, ROOM),
        joined(MALLORY, OTHER_ROOM),
        Event::GatewayStarted,
        Event::Connected { client: ALICE },
        Event::Connected { client: BOB },
        queued(a1),
        queued(a2),
        acked(a1, 1),
        delivered(BOB, a1, 1),
        delivered(CAROL, a1, 1),
        queued(b1),
        delivered(CAROL, a2, 2),
        acked(b1, 3),
        Event::GatewayKilled,
        Event::Disconnected { client: ALICE },
        Event::GatewayStarted,
        Event::Connected { client: ALICE },
        acked(a2, 2),
        delivered(BOB, a2, 2),
        read(BOB, BOB, 1),
        read(ALICE, BOB, 1),
        queued(a3),
        delivered(ALICE, b1, 3),
        delivered(CAROL, b1, 3),
        acked(a3, 4),
        delivered(BOB, a3, 4),
        read(BOB, BOB, 4),
        delivered(CAROL, a3, 4),
    ]
}

fn judged(events: &[Event], rules: Rules) -> Report {
    check(&events.iter().copied().collect(), &rules)
}

fn place(events: &[Event], event: Event) -> usize {
    events.iter().position(|known| *known == event).unwrap()
}

#[test]
fn a_good_history_is_accepted_and_counted() {
    let report = judged(&good(), Rules { dense: true, ..Rules::default() });
    assert!(report.holds(), "{report:?}");
    let counters = report.counters;
    assert_eq!((counters.sent, counters.acked, counters.delivered, counters.due), (4, 4, 8, 8));
    assert_eq!((counters.duplicates, counters.out_of_order, counters.lost), (0, 0, 0));
    assert_eq!((counters.reconnects, counters.gateway_kills), (1, 1));
}

type Break = fn(&mut Vec<Event>);

/// What is broken, how, and the kind of breach that must be found.
#[rustfmt::skip]
const BROKEN: &[(&str, &str, Break)] = &[
    ("an acked message never arrives", "lost", |h| h.retain(|e| *e != delivered(CAROL, tag(ALICE, 3), 4))),
    ("an acked message is passed over", "lost", |h| h.retain(|e| *e != delivered(CAROL, tag(ALICE, 2), 2))),
    ("acked, and nobody ever got it", "lost", |h| h.extend([queued(tag(BOB, 2)), acked(tag(BOB, 2), 5)])),
    ("a stored message skips one member", "skipped", |h| {
        h.retain(|e| *e != acked(tag(ALICE, 2), 2) && *e != delivered(BOB, tag(ALICE, 2), 2));
    }),
    ("the same delivery twice", "doubled", |h| h.push(delivered(CAROL, tag(ALICE, 3), 4))),
    ("the same delivery again much later", "doubled", |h| h.push(delivered(CAROL, tag(ALICE, 1), 1))),
    ("a retry was stored a second time", "doubled", |h| {
        h.extend([delivered(BOB, tag(ALICE, 3), 5), delivered(CAROL, tag(ALICE, 3), 5)]);
    }),
    ("a retry has two positions", "two-positions", |h| h.push(delivered(BOB, tag(ALICE, 3), 5))),
    ("deliveries swapped", "out-of-order", |h| {
        let (one, two) = (place(h, delivered(CAROL, tag(BOB, 1), 3)), place(h, delivered(CAROL, tag(ALICE, 2), 2)));
        h.swap(one, two);
    }),
    ("sends of one producer swapped in the log", "send-order", |h| {
        h.extend([queued(tag(CAROL, 1)), queued(tag(CAROL, 2)), acked(tag(CAROL, 2), 5), acked(tag(CAROL, 1), 6)]);
        for client in [ALICE, BOB] {
            h.extend([delivered(client, tag(CAROL, 2), 5), delivered(client, tag(CAROL, 1), 6)]);
        }
    }),
    ("a later send of another producer stands before an acked one", "before-acked", |h| {
        h.extend([queued(tag(ALICE, 4)), acked(tag(ALICE, 4), 6), queued(tag(BOB, 2)), acked(tag(BOB, 2), 5)]);
        h.extend([delivered(CAROL, tag(BOB, 2), 5), delivered(CAROL, tag(ALICE, 4), 6)]);
        h.extend([delivered(BOB, tag(ALICE, 4), 6), delivered(ALICE, tag(BOB, 2), 5)]);
    }),
    ("two messages at one position, seen by two readers", "position-shared", |h| {
        let at = place(h, delivered(CAROL, tag(ALICE, 3), 4));
        h[at] = delivered(CAROL, tag(BOB, 2), 4);
        h.insert(at, queued(tag(BOB, 2)));
        h.push(acked(tag(BOB, 2), 5));
    }),
    ("a position is used again after the kill", "position-shared", |h| {
        h.extend([queued(tag(BOB, 2)), acked(tag(BOB, 2), 1)]);
    }),
    ("a notice where others have a message", "position-shared", |h| {
        let at = place(h, delivered(CAROL, tag(ALICE, 3), 4));
        h[at] = Event::Notice { client: CAROL, conversation: ROOM, seq: 4 };
    }),
    ("the ack tells another position than the readers have", "two-positions", |h| {
        let at = place(h, acked(tag(ALICE, 3), 4));
        h[at] = acked(tag(ALICE, 3), 5);
    }),
    ("something nobody sent", "not-sent", |h| h.push(delivered(CAROL, tag(ALICE, 77), 5))),
    ("an ack for what was never sent", "not-sent", |h| h.push(acked(tag(ALICE, 77), 5))),
    ("delivered before it was sent", "not-sent", |h| {
        let at = place(h, queued(tag(ALICE, 3)));
        let event = h.remove(at);
        h.push(event);
    }),
    ("the payload was altered", "altered", |h| {
        let at = place(h, delivered(CAROL, tag(ALICE, 3), 4));
        let (sender, tag) = (ALICE, tag(ALICE, 3));
        h[at] = Event::Delivered { client: CAROL, conversation: ROOM, seq: 4, sender, tag, digest: Digest::of(b"other") };
    }),
    ("the sender was altered", "wrong-sender", |h| {
        let at = place(h, delivered(CAROL, tag(ALICE, 3), 4));
        let (sender, tag) = (BOB, tag(ALICE, 3));
        h[at] = Event::Delivered { client: CAROL, conversation: ROOM, seq: 4, sender, tag, digest: digest(tag) };
    }),
    ("somebody sends in another's name", "wrong-sender", |h| {
        let tag = tag(ALICE, 50);
        h.push(Event::Queued { client: BOB, conversation: ROOM, tag, digest: digest(tag) });
    }),
    ("the message comes up in another conversation", "wrong-conversation", |h| {
        let (sender, tag) = (ALICE, tag(ALICE, 3));
        h.push(Event::Delivered { client: MALLORY, conversation: OTHER_ROOM, seq: 1, sender, tag, digest: digest(tag) });
    }),
    ("a stranger gets it", "not-member", |h| h.push(delivered(MALLORY, tag(ALICE, 3), 4))),
    ("who has left still gets it", "not-member", |h| {
        let at = place(h, acked(tag(BOB, 1), 3));
        h.insert(at, Event::Left { client: CAROL, conversation: ROOM, last: 3 });
    }),
    ("who joined later gets what was before", "not-member", |h| {
        let at = place(h, joined(CAROL, ROOM));
        h[at] = Event::Joined { client: CAROL, conversation: ROOM, first: 2 };
    }),
    ("a stranger's message is stored", "sender-not-member", |h| {
        h.extend([queued(tag(MALLORY, 1)), acked(tag(MALLORY, 1), 5)]);
        h.extend([ALICE, BOB, CAROL].map(|client| delivered(client, tag(MALLORY, 1), 5)));
    }),
    ("a refused message is delivered", "refused-appeared", |h| {
        h.extend([queued(tag(BOB, 2)), Event::Refused { client: BOB, tag: tag(BOB, 2) }]);
        h.extend([ALICE, CAROL].map(|client| delivered(client, tag(BOB, 2), 5)));
    }),
    ("a delivered message expires", "refused-appeared", |h| {
        let at = place(h, acked(tag(ALICE, 3), 4));
        h.remove(at);
        h.push(Event::Expired { client: ALICE, tag: tag(ALICE, 3) });
    }),
    ("acked twice", "resolved-twice", |h| h.push(acked(tag(ALICE, 3), 4))),
    ("acked and then refused", "resolved-twice", |h| h.push(Event::Refused { client: ALICE, tag: tag(ALICE, 3) })),
    ("another client is told the outcome", "outcome-elsewhere", |h| {
        let at = place(h, acked(tag(ALICE, 3), 4));
        h[at] = Event::Acked { client: BOB, conversation: ROOM, tag: tag(ALICE, 3), seq: 4 };
    }),
    ("position zero", "position-zero", |h| h.push(Event::Notice { client: BOB, conversation: ROOM, seq: 0 })),
    ("an own read cursor goes back", "read-went-back", |h| h.push(read(BOB, BOB, 3))),
    ("another's read cursor goes back", "read-went-back", |h| h.push(read(ALICE, BOB, 0))),
    ("a read cursor beyond the head", "read-beyond-head", |h| h.push(read(ALICE, BOB, 5))),
    ("deliveries after the kick", "after-kick", |h| {
        let at = place(h, acked(tag(ALICE, 3), 4));
        h.insert(at, Event::Kicked { client: CAROL });
    }),
    ("acks after the kick", "after-kick", |h| {
        let at = place(h, acked(tag(ALICE, 3), 4));
        h.insert(at, Event::Kicked { client: ALICE });
    }),
    ("a kicked client comes back by itself", "after-kick", |h| {
        h.extend([Event::Kicked { client: BOB }, Event::Connected { client: BOB }]);
    }),
    ("what a kicked client queues reaches others", "after-kick", |h| {
        let late = tag(BOB, 2);
        h.extend([Event::Kicked { client: BOB }, queued(late), delivered(ALICE, late, 5), delivered(CAROL, late, 5)]);
        h.extend([Event::LoggedIn { client: BOB }, acked(late, 5)]);
    }),
    ("a message without an outcome", "unresolved", |h| h.push(queued(tag(BOB, 2)))),
    ("delivered and never acked", "unresolved", |h| h.retain(|e| *e != acked(tag(ALICE, 3), 4))),
    ("a client stays away", "not-connected", |h| h.push(Event::Disconnected { client: BOB })),
    ("a gap is told without a reason", "gap-told", |h| {
        h.push(Event::GapTold { client: BOB, conversation: ROOM, from: 5, to: 9 });
    }),
    ("one tag for two messages", "tag-reused", |h| h.push(queued(tag(BOB, 1)))),
];

#[test]
fn every_broken_history_is_refused_for_its_reason() {
    assert!(BROKEN.len() >= 20);
    for (what, kind, damage) in BROKEN {
        let mut events = good();
        damage(&mut events);
        let report = judged(&events, Rules::default());
        assert!(report.by_kind.contains_key(kind), "{what}: {:?}", report.by_kind);
        let history: History = events.into_iter().collect();
        assert!(report.explain(&history).contains(kind), "{what}");
        assert_eq!(report.violations_total(), report.violations.len() as u64);
    }
}

#[test]
fn the_three_zeros_count_what_they_say() {
    for (damage, want) in [
        ((|h| h.retain(|e| *e != delivered(CAROL, tag(ALICE, 3), 4))) as Break, (0, 0, 1)),
        (|h| h.push(delivered(CAROL, tag(ALICE, 1), 1)), (1, 0, 0)),
        (|h| h.swap(11, 13), (0, 1, 0)),
    ] {
        let mut events = good();
        damage(&mut events);
        let counters = judged(&events, Rules::default()).counters;
        assert_eq!((counters.duplicates, counters.out_of_order, counters.lost), want);
    }
}

#[test]
fn the_evidence_is_the_two_events_that_contradict() {
    let mut events = good();
    let first = place(&events, delivered(CAROL, tag(ALICE, 1), 1));
    let second = events.len();
    events.push(delivered(CAROL, tag(ALICE, 1), 1));
    let report = judged(&events, Rules::default());
    let found = &report.violations[0];
    assert_eq!((found.against, found.event), (Some(first), Some(second)));
    let history: History = events.into_iter().collect();
    let text = report.explain(&history);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "promise 6, doubled: client 3 got conversation 7, seq 1, a second time");
    assert!(lines[1].starts_with("    event 11, ") && lines[2].starts_with("    event 30, "), "{text}");
}

#[test]
fn rules_change_what_is_expected() {
    let unfinished = &good()[..14];
    let open = Rules { converged: false, ..Rules::default() };
    let report = judged(unfinished, open);
    assert!(report.holds(), "{report:?}");
    assert_eq!((report.counters.pending, report.counters.due), (1, 4));
    assert!(!judged(unfinished, Rules::default()).holds());
    // A hole that was passed over is no matter of patience.
    let mut passed = good();
    passed.retain(|e| *e != delivered(CAROL, tag(ALICE, 2), 2));
    assert!(judged(&passed, open).by_kind.contains_key("lost"));
    // Own messages back, where that is promised.
    let echoes = Rules { echoes: true, ..Rules::default() };
    assert!(judged(&good(), echoes).by_kind.contains_key("lost"));
    let mut echoed = good();
    let at = place(&echoed, delivered(ALICE, tag(BOB, 1), 3));
    echoed.insert(at, delivered(ALICE, tag(ALICE, 2), 2));
    echoed.insert(at, delivered(ALICE, tag(ALICE, 1), 1));
    echoed.push(delivered(ALICE, tag(ALICE, 3), 4));
    echoed.insert(place(&echoed, delivered(BOB, tag(ALICE, 3), 4)), delivered(BOB, tag(BOB, 1), 3));
    let report = judged(&echoed, echoes);
    assert!(report.holds(), "{report:?}");
    assert_eq!(report.counters.echoed, 4);
    // A position nobody can explain, where every one has to be.
    let mut sparse = good();
    sparse.extend([queued(tag(BOB, 2)), acked(tag(BOB, 2), 9)]);
    sparse.extend([ALICE, CAROL].map(|client| delivered(client, tag(BOB, 2), 9)));
    assert!(judged(&sparse, Rules::default()).holds());
    let dense = Rules { dense: true, ..Rules::default() };
    assert_eq!(judged(&sparse, dense).by_kind, BTreeMap::from([("unexplained", 1)]));
    // A gap that was told.
    let mut old = good();
    old.retain(|e| *e != delivered(CAROL, tag(ALICE, 1), 1));
    old.insert(9, Event::GapTold { client: CAROL, conversation: ROOM, from: 1, to: 1 });
    assert!(!judged(&old, Rules::default()).holds());
    assert!(judged(&old, Rules { gaps_excused: true, ..Rules::default() }).holds());
    // However long the gap is.
    let mut endless = good();
    endless.push(Event::GapTold { client: BOB, conversation: ROOM, from: 5, to: u64::MAX - 1 });
    endless.push(Event::Notice { client: BOB, conversation: ROOM, seq: u64::MAX });
    assert!(judged(&endless, Rules { gaps_excused: true, dense: true, ..Rules::default() }).holds());
    // What was queued without a session leaves with the next one.
    let mut back = good();
    let late = tag(BOB, 2);
    back.extend([Event::Kicked { client: BOB }, queued(late), Event::LoggedIn { client: BOB }]);
    back.extend([delivered(ALICE, late, 5), acked(late, 5), delivered(CAROL, late, 5)]);
    assert!(judged(&back, Rules::default()).holds(), "{:?}", judged(&back, Rules::default()));
    // Nothing more is expected of who is gone.
    let mut gone = good();
    gone.retain(|e| *e != delivered(CAROL, tag(ALICE, 3), 4));
    gone.extend([Event::Gone { client: CAROL }, Event::Disconnected { client: CAROL }]);
    assert!(judged(&gone, Rules::default()).holds());
}

#[test]
fn a_history_with_holes_is_no_evidence() {
    let mut history = History::bounded(10);
    for event in good() {
        history.record(SimTime::START, event);
    }
    let open = Rules { converged: false, ..Rules::default() };
    assert!(check(&history, &open).by_kind.contains_key("incomplete"));
}

#[test]
fn a_flood_of_one_kind_does_not_hide_another() {
    let mut events = good();
    events.extend((0..5_000).map(|_| delivered(BOB, tag(ALICE, 1), 1)));
    events.push(read(BOB, BOB, 1));
    let report = judged(&events, Rules::default());
    assert_eq!(report.by_kind, BTreeMap::from([("doubled", 5_000), ("read-went-back", 1)]));
    assert_eq!(report.violations.len(), 101);
}

/// A run of a gateway that keeps every promise, in a random interleaving.
fn correct_run(seed: u64, steps: usize) -> Vec<Event> {
    let mut rng = Rng::new(seed);
    let mut run =
        Run { events: Vec::new(), rooms: Vec::new(), counters: BTreeMap::new(), online: BTreeMap::new() };
    let clients = rng.between(2, 7);
    for client in 1..=clients {
        run.set_online(client_of(client), true);
    }
    for room in 0..rng.between(1, 4) {
        let mut members: Vec<Client> = (1..=clients).map(client_of).collect();
        rng.shuffle(&mut members);
        members.truncate(usize::try_from(rng.between(2, clients)).unwrap());
        let mut state = Room { number: Conversation(100 + room), ..Room::default() };
        for client in members {
            run.events.push(joined(client, state.number));
            state.members.push(Member { client, next: 1, last: None, read: 0, seen_reads: BTreeMap::new() });
        }
        run.rooms.push(state);
    }
    for _ in 0..steps {
        run.step(&mut rng, clients);
    }
    run.settle();
    run.events
}

fn client_of(number: u64) -> Client {
    Client(u32::try_from(number).unwrap())
}

struct Run {
    events: Vec<Event>,
    rooms: Vec<Room>,
    counters: BTreeMap<Client, u64>,
    online: BTreeMap<Client, bool>,
}

struct Room {
    number: Conversation,
    members: Vec<Member>,
    /// `None` is a notice.
    log: Vec<Option<Tag>>,
    /// Queued and not yet decided about, per sender in order.
    outboxes: BTreeMap<Client, Vec<Tag>>,
    /// Decided about and not yet told: `None` is refused.
    outcomes: Vec<(Tag, Option<u64>)>,
}

impl Default for Room {
    fn default() -> Self {
        let (number, members, log) = (Conversation(0), Vec::new(), Vec::new());
        Self { number, members, log, outboxes: BTreeMap::new(), outcomes: Vec::new() }
    }
}

struct Member {
    client: Client,
    next: u64,
    last: Option<u64>,
    read: u64,
    seen_reads: BTreeMap<Client, u64>,
}

impl Run {
    fn set_online(&mut self, client: Client, online: bool) {
        if self.online.insert(client, online) != Some(online) {
            self.events.push(if online {
                Event::Connected { client }
            } else {
                Event::Disconnected { client }
            });
        }
    }

    fn step(&mut self, rng: &mut Rng, clients: u64) {
        let room_at = usize::try_from(rng.below(self.rooms.len() as u64)).unwrap();
        let member_at = usize::try_from(rng.below(self.rooms[room_at].members.len() as u64)).unwrap();
        let client = self.rooms[room_at].members[member_at].client;
        let active = self.rooms[room_at].members[member_at].last.is_none();
        match rng.below(100) {
            0..20 if active => {
                let room = &mut self.rooms[room_at];
                let counter = self.counters.entry(client).or_default();
                *counter += 1;
                let tag = tag(client, *counter);
                self.events.push(Event::Queued {
                    client,
                    conversation: room.number,
                    tag,
                    digest: digest(tag),
                });
                room.outboxes.entry(client).or_default().push(tag);
            }
            20..40 => self.rooms[room_at].decide(client, rng.chance(Share::percent(5))),
            40..60 => self.tell(room_at, rng),
            60..85 => self.deliver(room_at, member_at, rng.chance(Share::percent(50))),
            85..88 => self.rooms[room_at].log.push(None),
            88..93 => self.mark(room_at, member_at, rng),
            93..96 => self.set_online(client, rng.chance(Share::percent(50))),
            96..97 => self.events.extend([Event::GatewayKilled, Event::GatewayStarted]),
            97..98 => self.join(room_at, client_of(rng.between(1, clients))),
            98..99 if self.rooms[room_at].members.len() > 2 => self.leave(room_at, member_at),
            _ => {}
        }
    }

    fn tell(&mut self, room_at: usize, rng: &mut Rng) {
        let room = &mut self.rooms[room_at];
        if room.outcomes.is_empty() {
            return;
        }
        let at = usize::try_from(rng.below(room.outcomes.len() as u64)).unwrap();
        let (tag, seq) = room.outcomes.remove(at);
        let (client, conversation) = (tag.client, room.number);
        self.events.push(match seq {
            Some(seq) => Event::Acked { client, conversation, tag, seq },
            None => Event::Refused { client, tag },
        });
    }

    fn deliver(&mut self, room_at: usize, member_at: usize, shown: bool) {
        let room = &mut self.rooms[room_at];
        let (conversation, member) = (room.number, &mut room.members[member_at]);
        let seq = member.next;
        let Some(entry) = room.log.get(usize::try_from(seq).unwrap() - 1) else { return };
        if member.last.is_some_and(|last| seq > last) {
            return;
        }
        member.next += 1;
        let client = member.client;
        match *entry {
            Some(tag) if tag.client != client || shown => {
                let (sender, digest) = (tag.client, digest(tag));
                self.events.push(Event::Delivered { client, conversation, seq, sender, tag, digest });
            }
            None if shown => self.events.push(Event::Notice { client, conversation, seq }),
            _ => {}
        }
    }

    fn mark(&mut self, room_at: usize, member_at: usize, rng: &mut Rng) {
        let room = &mut self.rooms[room_at];
        let conversation = room.number;
        let known: Vec<(Client, u64)> =
            room.members.iter().map(|member| (member.client, member.read)).collect();
        // A cursor stays within positions that somebody saw as a message.
        let head = room.log.iter().rposition(Option::is_some).map_or(0, |at| at as u64 + 1);
        let member = &mut room.members[member_at];
        let client = member.client;
        member.read = rng.between(member.read, (member.next - 1).min(head).max(member.read));
        self.events.push(Event::Read { client, of: client, conversation, upto: member.read });
        if let Some((of, read)) = rng.pick(&known).copied()
            && of != client
        {
            let seen = member.seen_reads.entry(of).or_default();
            *seen = rng.between(*seen, read);
            self.events.push(Event::Read { client, of, conversation, upto: *seen });
        }
    }

    fn join(&mut self, room_at: usize, client: Client) {
        let room = &mut self.rooms[room_at];
        if room.members.iter().any(|member| member.client == client) {
            return;
        }
        // The join is a record of its own.
        room.log.push(None);
        let first = room.log.len() as u64;
        self.events.push(Event::Joined { client, conversation: room.number, first });
        let (last, read, seen_reads) = (None, 0, BTreeMap::new());
        room.members.push(Member { client, next: first, last, read, seen_reads });
    }

    fn leave(&mut self, room_at: usize, member_at: usize) {
        let room = &mut self.rooms[room_at];
        let client = room.members[member_at].client;
        let empty = room.outboxes.get(&client).is_none_or(Vec::is_empty);
        if room.members[member_at].last.is_none() && empty {
            room.log.push(None);
            let last = room.log.len() as u64;
            room.members[member_at].last = Some(last);
            self.events.push(Event::Left { client, conversation: room.number, last });
        }
    }

    /// The calm at the end.
    fn settle(&mut self) {
        for client in self.online.keys().copied().collect::<Vec<_>>() {
            self.set_online(client, true);
        }
        for room_at in 0..self.rooms.len() {
            for client in self.rooms[room_at].outboxes.keys().copied().collect::<Vec<_>>() {
                while !self.rooms[room_at].outboxes[&client].is_empty() {
                    self.rooms[room_at].decide(client, false);
                }
            }
            let mut rng = Rng::new(1);
            while !self.rooms[room_at].outcomes.is_empty() {
                self.tell(room_at, &mut rng);
            }
            for member_at in 0..self.rooms[room_at].members.len() {
                for _ in 0..=self.rooms[room_at].log.len() {
                    self.deliver(room_at, member_at, false);
                }
            }
        }
    }
}

impl Room {
    fn decide(&mut self, client: Client, refuse: bool) {
        let Some(outbox) = self.outboxes.get_mut(&client) else { return };
        if outbox.is_empty() {
            return;
        }
        let tag = outbox.remove(0);
        if refuse {
            self.outcomes.push((tag, None));
        } else {
            self.log.push(Some(tag));
            self.outcomes.push((tag, Some(self.log.len() as u64)));
        }
    }
}

/// Damages a correct run; `None` when it has nothing that could be damaged in this way.
fn mutate(events: &mut Vec<Event>, kind: u64, rng: &mut Rng) -> Option<&'static str> {
    let of = |wanted: fn(&Event) -> bool, rng: &mut Rng, events: &[Event]| {
        let all: Vec<usize> = (0..events.len()).filter(|at| wanted(&events[*at])).collect();
        rng.pick(&all).copied()
    };
    let foreign =
        |event: &Event| matches!(event, Event::Delivered { client, tag, .. } if *client != tag.client);
    let any_delivered = |event: &Event| matches!(event, Event::Delivered { .. });
    let ack = |event: &Event| matches!(event, Event::Acked { .. });
    let later = |at: usize, rng: &mut Rng, events: &[Event]| {
        usize::try_from(rng.between(at as u64 + 1, events.len() as u64)).unwrap()
    };
    match kind {
        0 => {
            let at = of(foreign, rng, events)?;
            events.remove(at);
            Some("a delivery removed")
        }
        1 => {
            let at = of(any_delivered, rng, events)?;
            let event = events[at];
            events.insert(later(at, rng, events), event);
            Some("a delivery repeated")
        }
        2 => {
            let at = of(any_delivered, rng, events)?;
            let Event::Delivered { client, conversation, .. } = events[at] else { return None };
            let next = (at + 1..events.len()).find(|next| {
                matches!(events[*next], Event::Delivered { client: c, conversation: v, .. } if c == client && v == conversation)
            })?;
            events.swap(at, next);
            Some("two deliveries swapped")
        }
        3 => {
            let at = of(|event| matches!(event, Event::Queued { .. }), rng, events)?;
            events.remove(at);
            Some("a send removed")
        }
        4 => {
            let at = of(ack, rng, events)?;
            events.remove(at);
            Some("an ack removed")
        }
        5 => {
            let at = of(any_delivered, rng, events)?;
            if let Event::Delivered { digest, .. } = &mut events[at] {
                digest.0 ^= 1 << rng.below(64);
            }
            Some("a payload altered")
        }
        6 => {
            let at = of(foreign, rng, events)?;
            if let Event::Delivered { seq, .. } = &mut events[at] {
                *seq = if rng.chance(Share::percent(50)) {
                    *seq + rng.between(1, 3)
                } else {
                    seq.saturating_sub(1)
                };
            }
            Some("a delivery at another position")
        }
        7 => {
            let at = of(ack, rng, events)?;
            let Event::Acked { client, tag, .. } = events[at] else { return None };
            // Somebody else must have got it: with nobody else there, a refusal would be true.
            let got = |e: &Event| matches!(e, Event::Delivered { tag: t, .. } if *t == tag);
            events.iter().any(got).then_some(())?;
            events[at] = Event::Refused { client, tag };
            Some("a stored message refused")
        }
        8 => {
            let at = of(ack, rng, events)?;
            let event = events[at];
            events.insert(later(at, rng, events), event);
            Some("an ack repeated")
        }
        9 => {
            let at = of(any_delivered, rng, events)?;
            let mut event = events[at];
            if let Event::Delivered { client, .. } = &mut event {
                *client = MALLORY;
            }
            events.insert(later(at, rng, events), event);
            Some("a delivery to a stranger")
        }
        10 => {
            let at = of(any_delivered, rng, events)?;
            if let Event::Delivered { sender, .. } = &mut events[at] {
                sender.0 += 1;
            }
            Some("a sender altered")
        }
        11 => {
            let at = of(|event| matches!(event, Event::Read { upto, .. } if *upto > 0), rng, events)?;
            let mut event = events[at];
            if let Event::Read { upto, .. } = &mut event {
                *upto -= 1;
            }
            events.insert(at + 1, event);
            Some("a read cursor moved back")
        }
        12 => {
            let at = of(|event| matches!(event, Event::Read { .. }), rng, events)?;
            if let Event::Read { upto, .. } = &mut events[at] {
                *upto += 1_000_000;
            }
            Some("a read cursor beyond the head")
        }
        13 => {
            let at = of(any_delivered, rng, events)?;
            if let Event::Delivered { conversation, .. } = &mut events[at] {
                conversation.0 += 1_000;
            }
            Some("a delivery in another conversation")
        }
        14 => {
            let at = of(|event| matches!(event, Event::Connected { .. }), rng, events)?;
            let Event::Connected { client } = events[at] else { return None };
            events.push(Event::Disconnected { client });
            Some("a client stays away")
        }
        15 => {
            let at = of(any_delivered, rng, events)?;
            let Event::Delivered { client, .. } = events[at] else { return None };
            events.insert(at, Event::Kicked { client });
            Some("a kick before a delivery")
        }
        16 => {
            let at = of(any_delivered, rng, events)?;
            let Event::Delivered { tag, .. } = events[at] else { return None };
            let sent = events.iter().position(|e| matches!(e, Event::Queued { tag: t, .. } if *t == tag))?;
            let event = events.remove(at);
            events.insert(sent, event);
            Some("a delivery before its send")
        }
        17 => {
            // Two messages of one sender exchange their places, for everybody.
            let at = of(ack, rng, events)?;
            let Event::Acked { client, conversation, tag: one, .. } = events[at] else { return None };
            let two = events.iter().find_map(|e| match e {
                Event::Acked { client: c, conversation: v, tag, .. }
                    if *c == client && *v == conversation && *tag != one =>
                {
                    Some(*tag)
                }
                _ => None,
            })?;
            for event in events.iter_mut() {
                if let Event::Acked { tag, .. } = event {
                    *tag = exchanged(*tag, one, two);
                }
                if let Event::Delivered { tag, digest: payload, .. } = event {
                    *tag = exchanged(*tag, one, two);
                    *payload = digest(*tag);
                }
            }
            Some("two sends of one sender exchanged")
        }
        _ => {
            let at = of(foreign, rng, events)?;
            if let Event::Delivered { tag, .. } = &mut events[at] {
                tag.counter += 1_000_000;
            }
            Some("a delivery of what nobody sent")
        }
    }
}

fn exchanged(tag: Tag, one: Tag, two: Tag) -> Tag {
    if tag == one {
        two
    } else if tag == two {
        one
    } else {
        tag
    }
}

const MUTATIONS: u64 = 19;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn correct_runs_are_accepted_and_mutated_ones_refused(seed: u64, steps in 20usize..600) {
        let events = correct_run(seed, steps);
        let report = judged(&events, Rules::default());
        let history: History = events.iter().copied().collect();
        prop_assert!(report.holds(), "{}", report.explain(&history));
        prop_assert!(report.counters.delivered == report.counters.due);
        let prefix = &events[..events.len() / 2];
        let open = Rules { converged: false, ..Rules::default() };
        let report = judged(prefix, open);
        prop_assert!(report.holds(), "half a run: {:?}", report.violations);
        let mut rng = Rng::new(seed).fork(1);
        for kind in 0..MUTATIONS {
            let mut mutated = events.clone();
            let Some(what) = mutate(&mut mutated, kind, &mut rng) else { continue };
            prop_assert!(!judged(&mutated, Rules::default()).holds(), "accepted with {what}");
        }
    }
}

#[test]
fn every_mutation_is_met() {
    let mut met = std::collections::BTreeSet::new();
    for seed in 0..20 {
        let events = correct_run(seed, 400);
        for kind in 0..MUTATIONS {
            let mut mutated = events.clone();
            if mutate(&mut mutated, kind, &mut Rng::new(seed)).is_some() {
                met.insert(kind);
                assert!(!judged(&mutated, Rules::default()).holds());
            }
        }
    }
    assert_eq!(met.len() as u64, MUTATIONS);
}

#[test]
fn a_million_events_are_judged() {
    let mut history = History::new();
    let mut record = |event| history.record(SimTime::START, event);
    for client in [ALICE, BOB, CAROL] {
        record(joined(client, ROOM));
    }
    for n in 1..=250_000 {
        let tag = tag(ALICE, n);
        for event in [queued(tag), acked(tag, n), delivered(BOB, tag, n), delivered(CAROL, tag, n)] {
            record(event);
        }
    }
    let report = check(&history, &Rules { dense: true, ..Rules::default() });
    assert!(report.holds());
    assert_eq!(report.counters.delivered, 500_000);
}

/// Any event with numbers from the edges.
fn wild_event(rng: &mut Rng) -> Event {
    let numbers = [0, 1, 2, 3, 7, u64::MAX - 1, u64::MAX];
    let mut number = || rng.pick(&numbers).copied().unwrap_or(0);
    let client = Client(u32::try_from(number() % 4).unwrap_or(0));
    let of = Client(u32::try_from(number() % 4).unwrap_or(0));
    let conversation = Conversation(number() % 3);
    let (seq, other, counter) = (number(), number(), number());
    let (tag, digest) = (tag(of, counter), Digest(number()));
    match rng.below(17) {
        0..2 => Event::Joined { client, conversation, first: seq },
        2 => Event::Left { client, conversation, last: seq },
        3..6 => Event::Queued { client: of, conversation, tag, digest },
        6..8 => Event::Acked { client: of, conversation, tag, seq },
        8 => Event::Refused { client, tag },
        9..12 => Event::Delivered { client, conversation, seq, sender: of, tag, digest },
        12 => Event::Notice { client, conversation, seq },
        13 => Event::GapTold { client, conversation, from: seq, to: other },
        14 => Event::Read { client, of, conversation, upto: seq },
        15 => Event::Kicked { client },
        _ => Event::Gone { client },
    }
}

#[test]
fn what_is_kept_is_not_gone_before_its_time() {
    let kept = Rules { gaps_excused: true, kept_for: Some(Duration::from_secs(10)), ..Rules::default() };
    let told = |after_ms: u64, to: u64| {
        let mut history = History::new();
        for event in good() {
            if event != delivered(CAROL, tag(ALICE, 1), 1) {
                history.record(SimTime::START, event);
            }
        }
        let gap = Event::GapTold { client: CAROL, conversation: ROOM, from: 1, to };
        history.record(SimTime::from_millis(after_ms), gap);
        check(&history, &kept)
    };
    assert!(told(10_000, 1).holds());
    assert_eq!(told(9_999, 1).by_kind, BTreeMap::from([("gone-too-soon", 1)]));
    assert!(!told(0, u64::MAX).holds());
    assert!(told(0, 0).by_kind.contains_key("lost"), "a gap of nothing excuses nothing");
}

proptest! {
    #[test]
    fn nonsense_is_judged_without_a_panic(seed: u64, len in 0usize..300) {
        let mut rng = Rng::new(seed);
        let events: Vec<Event> = (0..len).map(|_| wild_event(&mut rng)).collect();
        let rules = Rules {
            converged: rng.chance(Share::percent(50)),
            echoes: rng.chance(Share::percent(50)),
            dense: rng.chance(Share::percent(50)),
            gaps_excused: rng.chance(Share::percent(50)),
            kept_for: rng.chance(Share::percent(50)).then_some(Duration::from_secs(1)),
        };
        let report = judged(&events, rules);
        prop_assert!(report.holds() == (report.violations_total() == 0));
        prop_assert!(report == judged(&events, rules), "the same history is judged the same");
    }
}
