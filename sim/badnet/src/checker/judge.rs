//! The two passes of the checker.
//!
//! - The first pass walks the events in order and settles what order settles: who knew what when.
//! - The second pass walks what the first one collected (messages, readers, positions) and settles what should have
//!   come. Maps that are walked are ordered, so equal histories give equal reports.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use super::{Breach, KEPT_PER_KIND, Report, Rules, Violation};
use crate::history::{Client, Conversation, Digest, Event, History, Tag};
use crate::time::SimTime;

/// Index of an event in the history.
type At = usize;

pub(super) fn judge(history: &History, rules: &Rules) -> Report {
    let mut judge = Judge { rules: *rules, ..Judge::default() };
    for (at, record) in history.records().iter().enumerate() {
        judge.now = record.at;
        judge.take(at, record.event);
    }
    if history.missed() > 0 {
        judge.hold(Breach::Incomplete { missed: history.missed() }, None, None);
    }
    judge.conclude();
    judge.report
}

#[derive(Default)]
struct Judge {
    rules: Rules,
    /// When the event happened that is being taken in.
    now: SimTime,
    report: Report,
    messages: Vec<Message>,
    by_tag: HashMap<Tag, usize>,
    places: BTreeMap<Conversation, Place>,
    readers: BTreeMap<(Conversation, Client), Reader>,
    /// Deliveries of a message at another position than its own.
    strays: HashMap<(Client, Tag), At>,
    reads: HashMap<(Client, Client, Conversation), (u64, At)>,
    connected: BTreeMap<Client, (bool, At)>,
    kicked: BTreeMap<Client, At>,
    gone: BTreeSet<Client>,
}

struct Message {
    tag: Tag,
    conversation: Conversation,
    digest: Digest,
    queued: At,
    queued_at: SimTime,
    /// The highest position acked in the conversation when the message was queued.
    floor: Option<(u64, At)>,
    seq: Option<(u64, At)>,
    outcome: Option<(Outcome, At)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Acked,
    /// Refused or expired.
    Never,
}

#[derive(Default)]
struct Place {
    slots: BTreeMap<u64, (Tag, At)>,
    notices: BTreeMap<u64, At>,
    acked: Option<(u64, At)>,
    /// The last position that is known from memberships.
    named: u64,
    read: Option<(u64, Client, At)>,
}

impl Place {
    fn head(&self) -> u64 {
        let last = |seq: Option<u64>| seq.unwrap_or(0);
        last(self.slots.keys().next_back().copied())
            .max(last(self.notices.keys().next_back().copied()))
            .max(self.named)
    }
}

#[derive(Default)]
struct Reader {
    /// (first, last) of each membership; open ones have no last.
    memberships: Vec<(u64, Option<u64>)>,
    /// What came in order, rising.
    had: Vec<(u64, At)>,
    /// What came late.
    late: BTreeMap<u64, At>,
    /// Gaps that were told: first, last, and when.
    told: Vec<(u64, u64, At, SimTime)>,
}

impl Reader {
    /// When the position came first.
    fn came(&self, seq: u64) -> Option<At> {
        let in_order = self.had.binary_search_by_key(&seq, |(had, _)| *had).ok();
        let in_order = in_order.and_then(|index| self.had.get(index)).map(|(_, at)| *at);
        in_order.or_else(|| self.late.get(&seq).copied())
    }

    fn covers(&self, seq: u64) -> bool {
        self.memberships.iter().any(|(first, last)| *first <= seq && last.is_none_or(|last| seq <= last))
    }

    /// The end of the gap that was told around the position.
    fn told_upto(&self, seq: u64) -> Option<u64> {
        self.told.iter().filter(|(from, to, ..)| (*from..=*to).contains(&seq)).map(|(_, to, ..)| *to).max()
    }
}

impl Judge {
    fn hold(&mut self, breach: Breach, event: Option<At>, against: Option<At>) {
        let count = self.report.by_kind.entry(breach.kind()).or_default();
        *count += 1;
        if *count <= KEPT_PER_KIND {
            self.report.violations.push(Violation { breach, event, against });
        }
    }

    fn take(&mut self, at: At, event: Event) {
        match event {
            Event::Joined { client, conversation, first } => self.joined(conversation, client, first),
            Event::Left { client, conversation, last } => self.left(conversation, client, last),
            Event::Queued { client, conversation, tag, digest } => {
                self.queued(at, client, conversation, tag, digest);
            }
            Event::Acked { client, conversation, tag, seq } => self.acked(at, client, conversation, tag, seq),
            Event::Refused { client, tag } => {
                if self.outcome(at, client, tag, Outcome::Never) {
                    self.report.counters.refused += 1;
                }
            }
            Event::Expired { client, tag } => {
                if self.outcome(at, client, tag, Outcome::Never) {
                    self.report.counters.expired += 1;
                }
            }
            Event::Delivered { client, conversation, seq, sender, tag, digest } => {
                self.delivered(at, client, conversation, seq, sender, tag, digest);
            }
            Event::Notice { client, conversation, seq } => self.notice(at, client, conversation, seq),
            Event::GapTold { client, conversation, from, to } => {
                if !self.rules.gaps_excused {
                    self.hold(Breach::GapTold { reader: client, conversation, from }, Some(at), None);
                }
                let told = (from, to, at, self.now);
                self.readers.entry((conversation, client)).or_default().told.push(told);
            }
            Event::Read { client, of, conversation, upto } => self.read(at, client, of, conversation, upto),
            Event::Connected { client } => {
                self.active(at, client);
                if self.connected.insert(client, (true, at)).is_some() {
                    self.report.counters.reconnects += 1;
                }
            }
            Event::Disconnected { client } => {
                self.connected.insert(client, (false, at));
            }
            Event::Kicked { client } => {
                self.kicked.insert(client, at);
            }
            Event::LoggedIn { client } => {
                self.kicked.remove(&client);
            }
            Event::Gone { client } => {
                self.gone.insert(client);
            }
            Event::GatewayKilled => self.report.counters.gateway_kills += 1,
            Event::GatewayStarted => {}
        }
    }

    fn joined(&mut self, conversation: Conversation, client: Client, first: u64) {
        let place = self.places.entry(conversation).or_default();
        place.named = place.named.max(first.saturating_sub(1));
        let reader = self.readers.entry((conversation, client)).or_default();
        match reader.memberships.last_mut() {
            // Told twice of one membership.
            Some((known, None)) => *known = first.min(*known),
            _ => reader.memberships.push((first, None)),
        }
    }

    fn left(&mut self, conversation: Conversation, client: Client, last: u64) {
        let place = self.places.entry(conversation).or_default();
        place.named = place.named.max(last);
        let reader = self.readers.entry((conversation, client)).or_default();
        if let Some((_, open @ None)) = reader.memberships.last_mut() {
            *open = Some(last);
        }
    }

    fn queued(&mut self, at: At, client: Client, conversation: Conversation, tag: Tag, digest: Digest) {
        if let Some(known) = self.by_tag.get(&tag).and_then(|known| self.messages.get(*known)) {
            let first = known.queued;
            self.hold(Breach::TagReused { tag }, Some(at), Some(first));
            return;
        }
        if tag.client != client {
            self.hold(Breach::WrongSender { tag, sender: client }, Some(at), None);
        }
        let floor = self.places.entry(conversation).or_default().acked;
        self.by_tag.insert(tag, self.messages.len());
        self.messages.push(Message {
            tag,
            conversation,
            digest,
            queued: at,
            queued_at: self.now,
            floor,
            seq: None,
            outcome: None,
        });
        self.report.counters.sent += 1;
    }

    fn acked(&mut self, at: At, client: Client, conversation: Conversation, tag: Tag, seq: u64) {
        self.active(at, client);
        let first = self.outcome(at, client, tag, Outcome::Acked);
        if first {
            self.report.counters.acked += 1;
        }
        self.locate(at, conversation, tag, seq);
        let place = self.places.entry(conversation).or_default();
        if place.acked.is_none_or(|(highest, _)| highest < seq) {
            place.acked = Some((seq, at));
        }
    }

    /// Whether this is the message's first outcome.
    fn outcome(&mut self, at: At, client: Client, tag: Tag, outcome: Outcome) -> bool {
        let Some(message) = self.by_tag.get(&tag).and_then(|known| self.messages.get_mut(*known)) else {
            self.hold(Breach::NotSent { tag }, Some(at), None);
            return false;
        };
        let before = message.outcome;
        if before.is_none() {
            message.outcome = Some((outcome, at));
        }
        let (queued, seq) = (message.queued, message.seq);
        if client != tag.client {
            self.hold(Breach::OutcomeElsewhere { tag, client }, Some(at), Some(queued));
        }
        if let Some((_, earlier)) = before {
            self.hold(Breach::ResolvedTwice { tag }, Some(at), Some(earlier));
        }
        if let (Outcome::Never, Some((_, seen))) = (outcome, seq) {
            self.hold(Breach::RefusedAppeared { tag }, Some(at), Some(seen));
        }
        before.is_none()
    }

    /// Notes that the message is at the position; both must be news or agree with what is known. Returns the
    /// message's own position when this is another one.
    fn locate(&mut self, at: At, conversation: Conversation, tag: Tag, seq: u64) -> Option<u64> {
        if seq == 0 {
            self.hold(Breach::PositionZero { conversation }, Some(at), None);
            return None;
        }
        let slots = &mut self.places.entry(conversation).or_default().slots;
        let (first, seen) = *slots.entry(seq).or_insert((tag, at));
        if first != tag {
            let shared = Breach::PositionShared { conversation, seq, first: Some(first), then: Some(tag) };
            self.hold(shared, Some(at), Some(seen));
        }
        let message = self.by_tag.get(&tag).and_then(|known| self.messages.get_mut(*known))?;
        if message.conversation != conversation {
            let queued = message.queued;
            self.hold(Breach::WrongConversation { tag, conversation }, Some(at), Some(queued));
            return None;
        }
        let (floor, outcome, queued) = (message.floor, message.outcome, message.queued);
        match message.seq {
            None => message.seq = Some((seq, at)),
            Some((own, seen)) if own != seq => {
                self.hold(Breach::TwoPositions { tag, first: own, then: seq }, Some(at), Some(seen));
                return Some(own);
            }
            Some(_) => return None,
        }
        if let Some((acked, acked_at)) = floor
            && seq <= acked
        {
            self.hold(Breach::BeforeAcked { tag, seq, acked }, Some(at), Some(acked_at));
            self.report.counters.out_of_order += 1;
        }
        if let Some((Outcome::Never, refused)) = outcome {
            self.hold(Breach::RefusedAppeared { tag }, Some(at), Some(refused));
        }
        // What was queued before may have left while the session lasted.
        if let Some(kicked) = self.kicked.get(&tag.client).copied()
            && kicked < queued
        {
            self.hold(Breach::AfterKick { client: tag.client }, Some(at), Some(kicked));
        }
        None
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one event")]
    fn delivered(
        &mut self,
        at: At,
        client: Client,
        conversation: Conversation,
        seq: u64,
        sender: Client,
        tag: Tag,
        digest: Digest,
    ) {
        self.active(at, client);
        match self.by_tag.get(&tag).and_then(|known| self.messages.get(*known)) {
            None => self.hold(Breach::NotSent { tag }, Some(at), None),
            Some(message) => {
                let (queued, sent) = (message.queued, message.digest);
                if sent != digest {
                    self.hold(Breach::Altered { tag }, Some(at), Some(queued));
                }
                if sender != tag.client {
                    self.hold(Breach::WrongSender { tag, sender }, Some(at), Some(queued));
                }
            }
        }
        let own_position = self.locate(at, conversation, tag, seq);
        let doubled = own_position.and_then(|own| {
            let stray = self.strays.insert((client, tag), at);
            stray.or_else(|| self.readers.get(&(conversation, client))?.came(own))
        });
        if self.arrived(at, client, conversation, seq, doubled) {
            if tag.client == client {
                self.report.counters.echoed += 1;
            } else {
                self.report.counters.delivered += 1;
            }
        }
    }

    fn notice(&mut self, at: At, client: Client, conversation: Conversation, seq: u64) {
        self.active(at, client);
        if seq == 0 {
            self.hold(Breach::PositionZero { conversation }, Some(at), None);
        } else {
            self.places.entry(conversation).or_default().notices.entry(seq).or_insert(at);
        }
        self.arrived(at, client, conversation, seq, None);
    }

    /// Whether this is new to the reader. `doubled` is when the same message came at another position.
    fn arrived(
        &mut self,
        at: At,
        client: Client,
        conversation: Conversation,
        seq: u64,
        doubled: Option<At>,
    ) -> bool {
        let reader = self.readers.entry((conversation, client)).or_default();
        let highest = reader.had.last().copied();
        let came = reader.came(seq);
        let after = highest.filter(|(highest, _)| seq < *highest);
        match after {
            _ if came.is_some() => {}
            Some(_) => {
                reader.late.insert(seq, at);
            }
            None => reader.had.push((seq, at)),
        }
        if let Some(first) = came.or(doubled) {
            self.report.counters.duplicates += 1;
            self.hold(Breach::Doubled { reader: client, conversation, seq }, Some(at), Some(first));
            return false;
        }
        if let Some((after, seen)) = after {
            self.report.counters.out_of_order += 1;
            self.hold(Breach::OutOfOrder { reader: client, conversation, seq, after }, Some(at), Some(seen));
        }
        true
    }

    fn read(&mut self, at: At, client: Client, of: Client, conversation: Conversation, upto: u64) {
        let before = self.reads.insert((client, of, conversation), (upto, at));
        if let Some((from, seen)) = before
            && upto < from
        {
            self.hold(Breach::ReadWentBack { of, conversation, from, to: upto }, Some(at), Some(seen));
        }
        let place = self.places.entry(conversation).or_default();
        if place.read.is_none_or(|(highest, _, _)| highest < upto) {
            place.read = Some((upto, of, at));
        }
    }

    fn active(&mut self, at: At, client: Client) {
        if let Some(kicked) = self.kicked.get(&client).copied() {
            self.hold(Breach::AfterKick { client }, Some(at), Some(kicked));
        }
    }

    fn conclude(&mut self) {
        self.conclude_messages();
        let places = std::mem::take(&mut self.places);
        for (conversation, place) in &places {
            self.conclude_place(*conversation, place);
        }
        let mut unexplained = BTreeSet::new();
        for ((conversation, client), reader) in std::mem::take(&mut self.readers) {
            let Some(place) = places.get(&conversation) else {
                // Not even a membership: only a gap was told.
                continue;
            };
            self.conclude_reader(conversation, client, &reader, place);
            if self.rules.dense {
                unexplained.extend(first_unexplained(&reader, place).map(|seq| (conversation, seq)));
            }
        }
        for (conversation, seq) in unexplained {
            self.hold(Breach::Unexplained { conversation, seq }, None, None);
        }
        if self.rules.converged {
            for (client, (connected, at)) in std::mem::take(&mut self.connected) {
                if !connected && !self.is_excused(client) {
                    self.hold(Breach::NotConnected { client }, Some(at), None);
                }
            }
        }
    }

    /// Nothing more is expected of the client.
    fn is_excused(&self, client: Client) -> bool {
        self.gone.contains(&client) || self.kicked.contains_key(&client)
    }

    fn conclude_messages(&mut self) {
        // Per lane: the highest position so far in the order of sending.
        let mut lanes: HashMap<(Client, Conversation), (u64, Tag, At)> = HashMap::new();
        let messages = std::mem::take(&mut self.messages);
        for message in &messages {
            let Message { tag, conversation, queued, seq, outcome, .. } = *message;
            if let Some((seq, at)) = seq {
                let lane = (tag.client, conversation);
                match lanes.get(&lane).copied() {
                    Some((highest, earlier, seen)) if seq < highest => {
                        self.report.counters.out_of_order += 1;
                        self.hold(
                            Breach::SendOrder { earlier, later: tag, conversation },
                            Some(at),
                            Some(seen),
                        );
                    }
                    _ => {
                        lanes.insert(lane, (seq, tag, at));
                    }
                }
                let member =
                    self.readers.get(&(conversation, tag.client)).is_some_and(|reader| reader.covers(seq));
                if !member {
                    self.hold(Breach::SenderNotMember { tag, conversation, seq }, Some(at), Some(queued));
                }
            }
            if outcome.is_none() && self.rules.converged && !self.is_excused(tag.client) {
                self.hold(Breach::Unresolved { tag }, None, Some(queued));
            }
        }
        self.messages = messages;
    }

    fn was_acked(&self, tag: Tag) -> bool {
        let message = self.by_tag.get(&tag).and_then(|known| self.messages.get(*known));
        message.is_some_and(|message| matches!(message.outcome, Some((Outcome::Acked, _))))
    }

    fn conclude_place(&mut self, conversation: Conversation, place: &Place) {
        for (seq, at) in &place.notices {
            if let Some((tag, seen)) = place.slots.get(seq) {
                let shared =
                    Breach::PositionShared { conversation, seq: *seq, first: Some(*tag), then: None };
                self.hold(shared, Some(*at), Some(*seen));
            }
        }
        // Before the calm the last positions may be known to nobody but their sender's SDK.
        let head = place.head();
        if let Some((upto, of, at)) = place.read
            && self.rules.converged
            && upto > head
        {
            self.hold(Breach::ReadBeyondHead { of, conversation, upto, head }, Some(at), None);
        }
    }

    fn conclude_reader(
        &mut self,
        conversation: Conversation,
        client: Client,
        reader: &Reader,
        place: &Place,
    ) {
        for (seq, at) in reader.had.iter().map(|(seq, at)| (seq, at)).chain(&reader.late) {
            if !reader.covers(*seq) {
                self.hold(Breach::NotMember { reader: client, conversation, seq: *seq }, Some(*at), None);
            }
        }
        if let Some(kept_for) = self.rules.kept_for {
            self.gone_too_soon(conversation, client, reader, place, kept_for);
        }
        let waits = self.rules.converged && !self.is_excused(client);
        let mut had = reader.had.iter().peekable();
        for (seq, (tag, seen)) in &place.slots {
            if !reader.covers(*seq) {
                continue;
            }
            while had.next_if(|(had, _)| had < seq).is_some() {}
            let own = tag.client == client;
            let here = had.peek().is_some_and(|(had, _)| had == seq) || reader.late.contains_key(seq);
            if !own && (here || waits || had.peek().is_some() || !self.rules.converged) {
                self.report.counters.due += 1;
            }
            if here
                || (own && !self.rules.echoes)
                || (self.rules.gaps_excused && reader.told_upto(*seq).is_some())
            {
                continue;
            }
            let passed_by = had.peek().map(|(_, at)| *at);
            if passed_by.is_none() && !waits {
                if !own && !self.rules.converged {
                    self.report.counters.pending += 1;
                }
                continue;
            }
            self.report.counters.lost += 1;
            let (tag, seq) = (*tag, *seq);
            let breach = if self.was_acked(tag) {
                Breach::Lost { reader: client, tag, conversation, seq }
            } else {
                Breach::Skipped { reader: client, tag, conversation, seq }
            };
            self.hold(breach, passed_by, Some(*seen));
        }
    }
}

impl Judge {
    /// Holds it against the run when a gap covers what was queued less than `kept_for` before it was told.
    fn gone_too_soon(
        &mut self,
        conversation: Conversation,
        client: Client,
        reader: &Reader,
        place: &Place,
        kept_for: Duration,
    ) {
        for (from, to, at, told_at) in reader.told.iter().copied().filter(|(from, to, ..)| from <= to) {
            let young = place.slots.range(from..=to).find_map(|(seq, (tag, _))| {
                let message = self.messages.get(*self.by_tag.get(tag)?)?;
                let young = told_at.since(message.queued_at) < kept_for && reader.covers(*seq);
                young.then_some((*seq, message.queued))
            });
            if let Some((seq, queued)) = young {
                let breach = Breach::GoneTooSoon { reader: client, conversation, seq };
                self.hold(breach, Some(at), Some(queued));
            }
        }
    }
}

/// The first position of each membership that nobody saw, below the last one the reader got.
fn first_unexplained(reader: &Reader, place: &Place) -> impl Iterator<Item = u64> {
    let highest = reader.had.last().map_or(0, |(seq, _)| *seq);
    reader.memberships.iter().filter_map(move |(first, last)| {
        let end = last.unwrap_or(u64::MAX).min(highest);
        let mut expected = (*first).max(1);
        if expected > end {
            return None;
        }
        // Each step passes a known position or a whole gap that was told, however far the numbers are apart.
        while expected <= end {
            if place.slots.contains_key(&expected) || place.notices.contains_key(&expected) {
                expected = expected.checked_add(1)?;
            } else {
                let Some(to) = reader.told_upto(expected) else { return Some(expected) };
                expected = to.checked_add(1)?;
            }
        }
        None
    })
}
