//! From what the apps wrote down to a history that can be judged.
//!
//! - A message counts as queued when the SDK said so, or when it came up anywhere later. One that the app was killed
//!   with before the SDK had answered may be there or not.
//! - An app that is killed may be told the same thing again: the same end of a send, the same message under the same
//!   arrival. That is one telling; another end, or another message, is a complaint.
//! - Arrivals rise: what comes new comes behind everything that came before.
//!
//! Not here: the promises (`fulmar_badnet::checker`).

use std::collections::{BTreeMap, BTreeSet, HashMap};

use fulmar_badnet::{
    SimTime,
    history::{Client, Conversation, Event, History, Tag},
};

use crate::log::{End, Entry, Line};

/// What one app wrote down.
#[derive(Clone, Debug)]
pub(crate) struct Account {
    pub(crate) client: Client,
    pub(crate) lines: Vec<Line>,
    /// The numbers of the conversations it sends to, in the order of its list.
    pub(crate) to: Vec<u64>,
}

/// A conversation and who is in it from its first record on.
#[derive(Clone, Debug)]
pub(crate) struct Room {
    pub(crate) number: u64,
    pub(crate) members: Vec<Client>,
}

/// All accounts put together.
#[derive(Debug, Default)]
pub(crate) struct Evidence {
    pub(crate) history: History,
    /// What no history is needed for to see that it is wrong.
    pub(crate) complaints: Vec<String>,
    /// Things that were told more than once.
    pub(crate) told_again: u64,
    /// Messages that were killed with before the SDK had answered, and never came up.
    pub(crate) never_kept: u64,
}

/// Ranks of what happened at the same nanosecond.
type Timed = (u64, u8, Event);

/// Puts the accounts together.
pub(crate) fn put_together(accounts: &[Account], rooms: &[Room]) -> Evidence {
    let mut evidence = Evidence::default();
    let users: HashMap<u64, Client> = accounts
        .iter()
        .flat_map(|account| account.lines.iter().map(|(_, entry)| (*entry, account.client)))
        .filter_map(|(entry, client)| match entry {
            Entry::User(user) => Some((user, client)),
            _ => None,
        })
        .collect();
    let places: HashMap<(u64, u64), Tag> = accounts
        .iter()
        .flat_map(|account| &account.lines)
        .filter_map(|(_, entry)| match entry {
            Entry::Got { conversation, seq, tag, .. } => Some(((*conversation, *seq), *tag)),
            _ => None,
        })
        .collect();
    let seqs: HashMap<Tag, u64> = places.iter().map(|((_, seq), tag)| (*tag, *seq)).collect();
    let mut events: Vec<Timed> = Vec::new();
    for room in rooms {
        for client in &room.members {
            let conversation = Conversation(room.number);
            events.push((0, 0, Event::Joined { client: *client, conversation, first: 1 }));
        }
    }
    for account in accounts {
        let mut teller =
            Teller { account, places: &places, seqs: &seqs, users: &users, evidence: &mut evidence };
        teller.sends(&mut events);
        teller.messages(&mut events);
    }
    events.sort_by_key(|(at, rank, _)| (*at, *rank));
    for (at, _, event) in events {
        evidence.history.record(SimTime::from_nanos(at), event);
    }
    evidence
}

struct Teller<'a> {
    account: &'a Account,
    places: &'a HashMap<(u64, u64), Tag>,
    seqs: &'a HashMap<Tag, u64>,
    users: &'a HashMap<u64, Client>,
    evidence: &'a mut Evidence,
}

impl Teller<'_> {
    fn complain(&mut self, what: &str) {
        self.evidence.complaints.push(format!("{}: {what}", self.account.client));
    }

    /// What became of the account's own messages.
    fn sends(&mut self, events: &mut Vec<Timed>) {
        let client = self.account.client;
        let mut counters: HashMap<u64, u64> = HashMap::new();
        let (mut kept, mut denied) = (BTreeSet::new(), BTreeSet::new());
        for (_, entry) in &self.account.lines {
            match entry {
                Entry::Kept { counter, id } | Entry::Listed { counter, id } => {
                    kept.insert(*counter);
                    if counters.insert(*id, *counter).is_some_and(|before| before != *counter) {
                        self.complain(&format!("send {id} names two messages"));
                    }
                }
                Entry::NotKept { counter } => {
                    denied.insert(*counter);
                }
                _ => {}
            }
        }
        let mut ends: BTreeMap<u64, (u64, End)> = BTreeMap::new();
        for (at, entry) in &self.account.lines {
            let Entry::Ended { id, conversation, end } = *entry else { continue };
            if let End::Refused(code) = end {
                self.complain(&format!("send {id} was refused with code {code:#x}"));
            }
            // The app was killed before it knew the id: where the message stands says which one it is.
            let by_place = || match end {
                End::Acked(seq) => self.places.get(&(conversation, seq)).filter(|tag| tag.client == client),
                _ => None,
            };
            let Some(counter) = counters.get(&id).copied().or_else(|| by_place().map(|tag| tag.counter))
            else {
                continue;
            };
            kept.insert(counter);
            let seq = self.seqs.get(&Tag { client, counter }).copied();
            let end = if end == End::Acked(0) { End::Acked(seq.unwrap_or(0)) } else { end };
            match ends.get(&counter) {
                Some((_, before)) if *before == end => self.evidence.told_again += 1,
                Some((_, before)) => {
                    let before = *before;
                    self.complain(&format!("message {counter} ended as {before:?} and as {end:?}"));
                }
                None => {
                    ends.insert(counter, (*at, end));
                }
            }
        }
        for (at, entry) in &self.account.lines {
            let Entry::Intent { counter, to, digest } = *entry else { continue };
            let tag = Tag { client, counter };
            if denied.contains(&counter) {
                if self.seqs.contains_key(&tag) {
                    self.complain(&format!("message {counter} was not queued, and came up"));
                }
                continue;
            }
            if !kept.contains(&counter) && !self.seqs.contains_key(&tag) {
                self.evidence.never_kept += 1;
                continue;
            }
            let Some(number) = self.account.to.get(to) else {
                self.complain("a conversation nobody knows");
                continue;
            };
            let conversation = Conversation(*number);
            events.push((*at, 1, Event::Queued { client, conversation, tag, digest }));
            match ends.get(&counter) {
                Some((at, End::Acked(seq))) => {
                    events.push((*at, 3, Event::Acked { client, conversation, tag, seq: *seq }));
                }
                Some((at, End::Refused(_))) => events.push((*at, 3, Event::Refused { client, tag })),
                Some((at, End::Expired)) => events.push((*at, 3, Event::Expired { client, tag })),
                None => {}
            }
        }
    }

    /// What the account was handed out, and how its connection fared.
    fn messages(&mut self, events: &mut Vec<Timed>) {
        let client = self.account.client;
        let mut arrivals: BTreeMap<u64, Entry> = BTreeMap::new();
        for (at, entry) in &self.account.lines {
            let event = match *entry {
                Entry::Got { conversation, seq, sender, tag, digest, .. } => {
                    let conversation = Conversation(conversation);
                    let sender = self.users.get(&sender).copied().unwrap_or(Client(u32::MAX));
                    Event::Delivered { client, conversation, seq, sender, tag, digest }
                }
                Entry::Notice { conversation, seq, .. } => {
                    Event::Notice { client, conversation: Conversation(conversation), seq }
                }
                Entry::Gap { conversation, from, to } => {
                    Event::GapTold { client, conversation: Conversation(conversation), from, to }
                }
                Entry::Live => Event::Connected { client },
                Entry::Begun => Event::Disconnected { client },
                _ => continue,
            };
            if let Entry::Got { arrival, .. } | Entry::Notice { arrival, .. } = *entry {
                match arrivals.get(&arrival) {
                    Some(before) if before == entry => {
                        self.evidence.told_again += 1;
                        continue;
                    }
                    Some(_) => {
                        self.complain(&format!("arrival {arrival} is two messages"));
                    }
                    None if arrivals.last_key_value().is_some_and(|(last, _)| *last > arrival) => {
                        self.complain(&format!("arrival {arrival} came behind a later one"));
                    }
                    None => {}
                }
                arrivals.insert(arrival, *entry);
            }
            events.push((*at, 2, event));
        }
    }
}

#[cfg(test)]
mod tests {
    use fulmar_badnet::{
        checker::{Rules, check},
        history::Digest,
    };

    use super::*;

    const A: Client = Client(1);
    const B: Client = Client(0);

    fn tag(counter: u64) -> Tag {
        Tag { client: A, counter }
    }

    fn intent(counter: u64) -> Entry {
        Entry::Intent { counter, to: 0, digest: Digest(counter) }
    }

    fn got(arrival: u64, seq: u64, counter: u64) -> Entry {
        let digest = Digest(counter);
        Entry::Got { arrival, conversation: 7, seq, sender: 11, tag: tag(counter), digest }
    }

    fn acked(id: u64, seq: u64) -> Entry {
        Entry::Ended { id, conversation: 7, end: End::Acked(seq) }
    }

    /// A run of one phone and a peer; the phone sends messages 1 and 2.
    fn good() -> (Vec<Entry>, Vec<Entry>) {
        let kept = |counter| Entry::Kept { counter, id: 100 + counter };
        let phone = vec![
            Entry::Begun,
            Entry::User(11),
            Entry::Live,
            intent(1),
            kept(1),
            intent(2),
            kept(2),
            acked(101, 1),
            acked(102, 2),
            got(1, 1, 1),
            got(2, 2, 2),
        ];
        (phone, vec![Entry::User(12), Entry::Live, got(1, 1, 1), got(2, 2, 2)])
    }

    fn judged(phone: Vec<Entry>, peer: Vec<Entry>) -> (Evidence, Vec<&'static str>) {
        let account = |client, entries: Vec<Entry>, offset: u64| Account {
            client,
            lines: (0u64..).map(|n| 10 * n + offset).zip(entries).collect(),
            to: vec![7],
        };
        let rooms = [Room { number: 7, members: vec![A, B] }];
        let evidence = put_together(&[account(A, phone, 1), account(B, peer, 1_000)], &rooms);
        let rules = Rules { echoes: true, ..Rules::default() };
        let kinds = check(&evidence.history, &rules).by_kind.into_keys().collect();
        (evidence, kinds)
    }

    #[test]
    fn a_good_run_is_good() {
        let (phone, peer) = good();
        let (evidence, kinds) = judged(phone, peer);
        assert_eq!((kinds, evidence.complaints, evidence.told_again), (vec![], vec![], 0));
    }

    #[test]
    fn what_a_kill_excuses_is_excused() {
        let (mut phone, peer) = good();
        // The same told again after a restart; an intent that was never answered; an end told to nobody's id.
        phone.extend([Entry::Begun, Entry::Live, got(2, 2, 2), acked(102, 2), acked(102, 0), intent(3)]);
        // A message whose answer the app did not live to see, and which was queued.
        let answer = phone.iter().position(|entry| matches!(entry, Entry::Kept { counter: 1, .. })).unwrap();
        phone.remove(answer);
        let (evidence, kinds) = judged(phone, peer);
        assert_eq!((kinds, evidence.complaints), (vec![], vec![]));
        assert_eq!((evidence.told_again, evidence.never_kept), (3, 1));
    }

    #[test]
    fn each_broken_promise_is_seen() {
        type Break = fn(&mut Vec<Entry>, &mut Vec<Entry>);
        let cases: [(&str, Break, &str); 9] = [
            (
                "an end that was never told",
                |phone, _| phone.retain(|entry| *entry != acked(102, 2)),
                "unresolved",
            ),
            ("a message that is lost", |_, peer| peer.truncate(3), "lost"),
            ("an own message that does not come back", |phone, _| phone.truncate(10), "lost"),
            ("a message that is stored twice", |phone, _| phone.push(got(3, 3, 2)), "two-positions"),
            ("an end that changes", |phone, _| phone.push(acked(102, 9)), ""),
            ("an arrival that changes", |phone, _| phone.push(got(2, 3, 3)), ""),
            ("an arrival that goes back", |phone, _| phone.insert(9, got(2, 2, 2)), ""),
            (
                "a refusal",
                |phone, _| phone[8] = Entry::Ended { id: 102, conversation: 7, end: End::Refused(9) },
                "refused-appeared",
            ),
            ("a phone that is not connected", |phone, _| phone.push(Entry::Begun), "not-connected"),
        ];
        for (what, break_it, kind) in cases {
            let (mut phone, mut peer) = good();
            break_it(&mut phone, &mut peer);
            let (evidence, kinds) = judged(phone, peer);
            if kind.is_empty() {
                assert!(!evidence.complaints.is_empty(), "{what}");
            } else {
                assert!(kinds.contains(&kind), "{what}: {kinds:?}");
            }
        }
    }
}
