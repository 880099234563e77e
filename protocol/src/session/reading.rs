//! Where a client is in each conversation, and how it gets to the head.
//!
//! - `committed <= delivered <= head`: the application has it on disk, was handed it, and what is known to exist.
//! - Records are handed out once and in order; a hole is either filled or handed out as a gap with its bounds.
//! - Records that came before their predecessors wait, bounded per conversation and in all. What does not fit is
//!   dropped and pulled again: `head` remembers that it exists.
//! - Who is behind and hears nothing for a while pulls; who is told of a head pulls at once, page after page. A page
//!   that brings nothing ends it until there is news, so a gateway can't make a client ask for ever.
//!
//! Not here: ACKs (`client`), pulls of the application (`request`).

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use core::time::Duration;

use super::{client::Output, digest::CursorDigest};
use crate::{
    frame::{Block, Deliver, Head, Pull},
    id::{ConversationId, RequestId, Seq},
    limit::PULLS_INFLIGHT_MAX,
};

/// Records of one page.
const PAGE: u32 = 256;

/// The half's own pulls in flight; the others are the application's.
const OWN_PULLS_INFLIGHT_MAX: usize = PULLS_INFLIGHT_MAX / 2;

/// Fields of a record beside its payload, for the bound on bytes.
const RECORD_OVERHEAD: usize = 128;

/// One conversation.
#[derive(Debug, Default)]
struct Reader {
    committed: Seq,
    delivered: Seq,
    head: Seq,
    /// Records beyond `delivered + 1`.
    early: BTreeMap<Seq, Deliver>,
    /// When to pull unless something comes.
    stalled_at: Option<Duration>,
    pulling: Option<RequestId>,
}

impl Reader {
    fn is_behind(&self) -> bool {
        self.head > self.delivered
    }
}

/// A pull of the half's own.
#[derive(Debug)]
struct OwnPull {
    conversation: ConversationId,
    /// What it was to bring first.
    from: Seq,
    /// What it must bring next.
    next: Seq,
    /// Something was brought.
    fruitful: bool,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Readers {
    all: BTreeMap<ConversationId, Reader>,
    digest: CursorDigest,
    early_bytes: usize,
    records_max: usize,
    bytes_max: usize,
    stall_after: Duration,
    behind: BTreeSet<ConversationId>,
    stalled: BTreeSet<(Duration, ConversationId)>,
    /// Conversations to be pulled as soon as there is room.
    wanted: BTreeSet<ConversationId>,
    /// On screen: pulled before the others.
    on_screen: Option<ConversationId>,
    pulls: BTreeMap<RequestId, OwnPull>,
}

impl Readers {
    pub(super) fn new(
        cursors: impl IntoIterator<Item = (ConversationId, Seq)>,
        records_max: usize,
        bytes_max: usize,
        stall_after: Duration,
    ) -> Self {
        let mut readers = Self {
            all: BTreeMap::new(),
            digest: CursorDigest::default(),
            early_bytes: 0,
            records_max,
            bytes_max,
            stall_after,
            behind: BTreeSet::new(),
            stalled: BTreeSet::new(),
            wanted: BTreeSet::new(),
            on_screen: None,
            pulls: BTreeMap::new(),
        };
        for (conversation, seq) in cursors {
            readers.committed(conversation, seq);
        }
        readers
    }

    pub(super) fn digest(&self) -> CursorDigest {
        self.digest
    }

    /// Committed cursors that are not zero.
    pub(super) fn cursors(&self) -> impl Iterator<Item = (ConversationId, Seq)> + '_ {
        self.all
            .iter()
            .filter(|(_, reader)| reader.committed > Seq::ZERO)
            .map(|(conversation, reader)| (*conversation, reader.committed))
    }

    pub(super) fn cursor(&self, conversation: ConversationId) -> Seq {
        self.all.get(&conversation).map_or(Seq::ZERO, |reader| reader.committed)
    }

    /// Moves the committed cursor; returns by how much.
    pub(super) fn committed(&mut self, conversation: ConversationId, seq: Seq) -> u64 {
        let reader = self.all.entry(conversation).or_default();
        let before = reader.committed;
        if seq <= before {
            return 0;
        }
        reader.committed = seq;
        self.digest.moved(conversation, before, seq);
        if seq > reader.delivered {
            reader.delivered = seq;
            reader.head = reader.head.max(seq);
            self.drop_early(conversation);
        }
        seq.since(before)
    }

    fn drop_early(&mut self, conversation: ConversationId) {
        let Some(reader) = self.all.get_mut(&conversation) else { return };
        while let Some(first) = reader.early.first_entry() {
            if *first.key() > reader.delivered {
                break;
            }
            self.early_bytes -= size(&first.remove());
        }
    }

    /// The conversation the user looks at.
    pub(super) fn show(&mut self, conversation: ConversationId) {
        self.on_screen = Some(conversation);
    }

    /// A record came.
    pub(super) fn record(&mut self, deliver: Deliver, now: Duration, outputs: &mut VecDeque<Output>) {
        let conversation = deliver.conversation;
        let reader = self.all.entry(conversation).or_default();
        reader.head = reader.head.max(deliver.seq);
        self.take(deliver, outputs);
        self.settle(conversation, now);
        self.ask_where_it_starts(conversation);
    }

    /// A conversation never heard of starts somewhere: with its first record, or where retention or our joining says.
    /// Which is not to be guessed from what comes first, for channels overtake each other.
    fn ask_where_it_starts(&mut self, conversation: ConversationId) {
        if self.all.get(&conversation).is_some_and(|reader| reader.delivered == Seq::ZERO) {
            self.want(conversation);
        }
    }

    /// A block of the gateway's own catch-up came.
    pub(super) fn block(&mut self, block: Block, now: Duration, outputs: &mut VecDeque<Output>) {
        let conversation = block.conversation;
        let reader = self.all.entry(conversation).or_default();
        reader.head = reader.head.max(block.head);
        self.skip_to(conversation, block.low.prev().min(block.head.max(block.first.prev())), outputs);
        for record in block.records {
            if let Some(reader) = self.all.get_mut(&conversation) {
                reader.head = reader.head.max(record.seq);
            }
            self.take(record, outputs);
        }
        self.settle(conversation, now);
        self.ask_where_it_starts(conversation);
    }

    /// A block of a pull came. `false`: not one of the half's own.
    pub(super) fn pulled(&mut self, block: Block, now: Duration, outputs: &mut VecDeque<Output>) -> bool {
        let Some(pull) = self.pulls.get_mut(&block.pull) else { return false };
        let conversation = pull.conversation;
        if block.conversation != conversation {
            return true;
        }
        let next = pull.next;
        let last = block.last;
        let end = block.records.last().map(|record| record.seq);
        pull.fruitful |= end.is_some();
        if let Some(end) = end.and_then(Seq::next) {
            pull.next = pull.next.max(end);
        }
        let id = block.pull;
        // We asked for everything from `next` on: what the answer leaves out is gone.
        if end.is_some() && block.first > next {
            self.skip_to(conversation, block.first.prev(), outputs);
        }
        self.block(block, now, outputs);
        if last {
            self.ended(id, now, outputs);
        }
        true
    }

    /// The pull is over; goes on with the next page, or gives up until there is news.
    fn ended(&mut self, id: RequestId, now: Duration, outputs: &mut VecDeque<Output>) {
        let Some(pull) = self.pulls.remove(&id) else { return };
        let Some(reader) = self.all.get_mut(&pull.conversation) else { return };
        reader.pulling = None;
        if !reader.is_behind() {
            return self.settle(pull.conversation, now);
        }
        // Who got further meanwhile asked for something else than what is missing now.
        if pull.fruitful || reader.delivered >= pull.from {
            return self.want(pull.conversation);
        }
        // Nothing there up to what waits: the rest is handed out behind a gap, or the head was never reached.
        match reader.early.keys().next().copied() {
            Some(first) => {
                self.skip_to(pull.conversation, first.prev(), outputs);
                self.advance(pull.conversation, outputs);
                self.settle(pull.conversation, now);
            }
            None => {
                reader.head = reader.delivered;
                self.settle(pull.conversation, now);
            }
        }
    }

    /// The gateway refused the pull. `retry`: try again when stalled; else give up until there is news.
    /// `None`: not one of the half's own.
    pub(super) fn refused(&mut self, id: RequestId, retry: Option<Duration>, now: Duration) -> Option<()> {
        let pull = self.pulls.remove(&id)?;
        let reader = self.all.get_mut(&pull.conversation)?;
        reader.pulling = None;
        if let Some(after) = retry {
            self.stall(pull.conversation, now + after.max(self.stall_after));
        } else {
            reader.head = reader.delivered;
            let early = core::mem::take(&mut reader.early);
            self.early_bytes -= early.values().map(size).sum::<usize>();
            self.settle(pull.conversation, now);
        }
        Some(())
    }

    /// The gateway says how far a conversation has come.
    pub(super) fn head(&mut self, head: Head, now: Duration) {
        let reader = self.all.entry(head.conversation).or_default();
        reader.head = reader.head.max(head.head);
        self.settle(head.conversation, now);
        self.want(head.conversation);
    }

    /// Takes one record: hands it out, keeps it for later, or drops it.
    fn take(&mut self, deliver: Deliver, outputs: &mut VecDeque<Output>) {
        let conversation = deliver.conversation;
        let Some(reader) = self.all.get_mut(&conversation) else { return };
        if deliver.seq <= reader.delivered {
            return;
        }
        if deliver.seq.prev() == reader.delivered {
            reader.delivered = deliver.seq;
            reader.head = reader.head.max(deliver.seq);
            outputs.push_back(Output::Deliver(deliver));
            return self.advance(conversation, outputs);
        }
        let bytes = size(&deliver);
        if reader.early.contains_key(&deliver.seq) {
            return;
        }
        // The furthest is of least use.
        while reader.early.len() >= self.records_max || self.early_bytes + bytes > self.bytes_max {
            match reader.early.last_entry() {
                Some(furthest) if *furthest.key() > deliver.seq => {
                    self.early_bytes -= size(&furthest.remove());
                }
                _ => return,
            }
        }
        self.early_bytes += bytes;
        reader.early.insert(deliver.seq, deliver);
    }

    /// Hands out what follows what was delivered.
    fn advance(&mut self, conversation: ConversationId, outputs: &mut VecDeque<Output>) {
        self.drop_early(conversation);
        let Some(reader) = self.all.get_mut(&conversation) else { return };
        while let Some(first) = reader.early.first_entry() {
            if first.key().prev() != reader.delivered {
                break;
            }
            let deliver = first.remove();
            self.early_bytes -= size(&deliver);
            reader.delivered = deliver.seq;
            outputs.push_back(Output::Deliver(deliver));
        }
    }

    /// Nothing up to `to` can be had but what is here: hands out the rest as gaps.
    fn skip_to(&mut self, conversation: ConversationId, to: Seq, outputs: &mut VecDeque<Output>) {
        loop {
            self.advance(conversation, outputs);
            let Some(reader) = self.all.get_mut(&conversation) else { return };
            if reader.delivered >= to {
                return;
            }
            let from = reader.delivered.saturating_add(1);
            let until = reader.early.keys().next().map_or(to, |first| first.prev().min(to));
            reader.delivered = until;
            reader.head = reader.head.max(until);
            outputs.push_back(Output::Gap { conversation, from, to: until });
        }
    }

    /// Brings the bookkeeping of one conversation up to date after something came for it.
    fn settle(&mut self, conversation: ConversationId, now: Duration) {
        let Some(reader) = self.all.get_mut(&conversation) else { return };
        if reader.is_behind() {
            self.behind.insert(conversation);
            if reader.pulling.is_none() && !self.wanted.contains(&conversation) {
                self.stall(conversation, now + self.stall_after);
            }
        } else {
            self.behind.remove(&conversation);
            self.wanted.remove(&conversation);
            self.unstall(conversation);
        }
    }

    fn stall(&mut self, conversation: ConversationId, at: Duration) {
        self.unstall(conversation);
        if let Some(reader) = self.all.get_mut(&conversation) {
            reader.stalled_at = Some(at);
            self.stalled.insert((at, conversation));
        }
    }

    fn unstall(&mut self, conversation: ConversationId) {
        if let Some(reader) = self.all.get_mut(&conversation)
            && let Some(at) = reader.stalled_at.take()
        {
            self.stalled.remove(&(at, conversation));
        }
    }

    /// Pulls the conversation when there is room, if it is behind.
    fn want(&mut self, conversation: ConversationId) {
        self.unstall(conversation);
        if self.all.get(&conversation).is_some_and(|reader| reader.is_behind() && reader.pulling.is_none()) {
            self.wanted.insert(conversation);
        }
    }

    /// The next conversation to pull, if there is room for a pull; `id` is used up when there is one.
    pub(super) fn next_pull(&mut self, id: impl FnOnce() -> RequestId) -> Option<Pull> {
        if self.pulls.len() >= OWN_PULLS_INFLIGHT_MAX {
            return None;
        }
        let conversation = self
            .on_screen
            .filter(|shown| self.wanted.contains(shown))
            .or_else(|| self.wanted.first().copied())?;
        self.wanted.remove(&conversation);
        let reader = self.all.get_mut(&conversation)?;
        let id = id();
        let from = reader.delivered.saturating_add(1);
        let until = reader.early.keys().next().map_or(reader.head, |first| first.prev().min(reader.head));
        let pull = Pull { id, conversation, from, to: until.max(from), limit: PAGE, newest: false };
        reader.pulling = Some(id);
        self.pulls.insert(id, OwnPull { conversation, from: pull.from, next: pull.from, fruitful: false });
        Some(pull)
    }

    pub(super) fn handle_timeout(&mut self, now: Duration) {
        while let Some(&(at, conversation)) = self.stalled.first() {
            if at > now {
                break;
            }
            self.want(conversation);
        }
    }

    pub(super) fn next_timeout(&self) -> Option<Duration> {
        self.stalled.first().map(|(at, _)| *at)
    }

    /// A connection is welcomed: the gateway will catch us up, and who stays behind pulls.
    pub(super) fn welcomed(&mut self, now: Duration) {
        for conversation in self.behind.clone() {
            self.settle(conversation, now);
        }
    }

    /// The connection is gone, and what was pulled with it.
    pub(super) fn disconnected(&mut self) {
        for pull in core::mem::take(&mut self.pulls).into_values() {
            if let Some(reader) = self.all.get_mut(&pull.conversation) {
                reader.pulling = None;
            }
        }
        self.wanted.clear();
        for (_, conversation) in core::mem::take(&mut self.stalled) {
            if let Some(reader) = self.all.get_mut(&conversation) {
                reader.stalled_at = None;
            }
        }
    }

    /// Records and bytes that wait for their predecessors.
    #[cfg(test)]
    fn waiting(&self) -> (usize, usize) {
        (self.all.values().map(|reader| reader.early.len()).sum(), self.early_bytes)
    }
}

fn size(deliver: &Deliver) -> usize {
    deliver.payload.len() + RECORD_OVERHEAD
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{
        frame::{RecordKind, WireTime},
        id::UserId,
    };

    const NOW: Duration = Duration::from_secs(5);
    const STALL: Duration = Duration::from_secs(1);

    fn c() -> ConversationId {
        ConversationId::new(300).unwrap()
    }

    fn s(n: u64) -> Seq {
        Seq::new(n).unwrap()
    }

    fn record(seq: u64) -> Deliver {
        Deliver {
            kind: RecordKind::Message,
            conversation: c(),
            seq: s(seq),
            sender: UserId::new(7).unwrap(),
            time: WireTime::Short(0),
            origin: None,
            reference: None,
            ttl: None,
            more: false,
            continues: false,
            silent: false,
            payload: Bytes::from_static(b"0123456789"),
        }
    }

    fn block(pull: u64, low: u64, head: u64, seqs: core::ops::RangeInclusive<u64>, last: bool) -> Block {
        Block {
            pull: RequestId::new(pull).unwrap(),
            last,
            conversation: c(),
            low: s(low),
            head: s(head),
            first: s(*seqs.start()),
            records: seqs.map(record).collect(),
        }
    }

    fn readers(cursor: u64) -> Readers {
        Readers::new([(c(), s(cursor))], 8, 4_096, STALL)
    }

    /// Deliveries as `7`, gaps as `-3-5`.
    fn said(outputs: &mut VecDeque<Output>) -> String {
        let said: Vec<String> = outputs
            .drain(..)
            .map(|output| match output {
                Output::Deliver(deliver) => deliver.seq.to_string(),
                Output::Gap { from, to, .. } => format!("-{from}-{to}"),
                other => format!("{other:?}"),
            })
            .collect();
        said.join(" ")
    }

    fn pull(readers: &mut Readers, id: u64) -> Option<(u64, u64)> {
        readers.next_pull(|| RequestId::new(id).unwrap()).map(|pull| (pull.from.get(), pull.to.get()))
    }

    #[test]
    fn records_come_out_once_and_in_order() {
        let (mut readers, mut out) = (readers(4), VecDeque::new());
        for seq in [6, 5, 5, 7, 3, 10, 9, 6, 8, 10] {
            readers.record(record(seq), NOW, &mut out);
        }
        assert_eq!(said(&mut out), "5 6 7 8 9 10");
        assert_eq!((readers.waiting(), readers.next_timeout()), ((0, 0), None));
    }

    #[test]
    fn who_is_behind_and_hears_nothing_pulls() {
        let (mut readers, mut out) = (readers(4), VecDeque::new());
        readers.record(record(7), NOW, &mut out);
        assert_eq!(pull(&mut readers, 1), None, "the missing ones may be on their way");
        readers.handle_timeout(NOW + STALL);
        assert_eq!(pull(&mut readers, 1), Some((5, 6)));
        assert!(readers.pulled(block(1, 1, 7, 5..=6, true), NOW, &mut out));
        assert_eq!(said(&mut out), "5 6 7");
        assert_eq!((pull(&mut readers, 2), readers.next_timeout()), (None, None));
    }

    #[test]
    fn a_head_is_pulled_page_after_page_and_merges_with_what_is_live() {
        let (mut readers, mut out) = (readers(4), VecDeque::new());
        readers.head(Head { conversation: c(), head: s(12), count: 12, low: s(1) }, NOW);
        assert_eq!(pull(&mut readers, 1), Some((5, 12)));
        readers.record(record(13), NOW, &mut out);
        assert!(readers.pulled(block(1, 1, 13, 5..=8, false), NOW, &mut out));
        assert!(readers.pulled(block(1, 1, 13, 9..=10, true), NOW, &mut out));
        assert_eq!(said(&mut out), "5 6 7 8 9 10");
        assert_eq!(pull(&mut readers, 2), Some((11, 12)));
        assert!(readers.pulled(block(2, 1, 13, 11..=12, true), NOW, &mut out));
        assert_eq!(said(&mut out), "11 12 13");
        assert_eq!(pull(&mut readers, 3), None);
    }

    #[test]
    fn what_does_not_fit_is_dropped_and_pulled() {
        let (mut readers, mut out) = (readers(0), VecDeque::new());
        for seq in 2..=40 {
            readers.record(record(seq), NOW, &mut out);
        }
        assert_eq!(readers.waiting().0, 8);
        assert_eq!(pull(&mut readers, 1), Some((1, 1)));
        assert!(readers.pulled(block(1, 1, 40, 1..=1, true), NOW, &mut out));
        assert_eq!(said(&mut out), "1 2 3 4 5 6 7 8 9");
        assert_eq!(pull(&mut readers, 2), Some((10, 40)));
        assert!(readers.pulled(block(2, 1, 40, 10..=40, true), NOW, &mut out));
        assert!(said(&mut out).ends_with("39 40"));
    }

    #[test]
    fn what_is_gone_is_said() {
        let (mut readers, mut out) = (readers(4), VecDeque::new());
        readers.head(Head { conversation: c(), head: s(12), count: 12, low: s(10) }, NOW);
        readers.record(record(7), NOW, &mut out);
        assert_eq!(pull(&mut readers, 1), Some((5, 6)));
        let empty = Block { records: Vec::new(), ..block(1, 10, 12, 5..=5, true) };
        assert!(readers.pulled(empty, NOW, &mut out));
        assert_eq!(said(&mut out), "-5-6 7 -8-9");
        assert_eq!(pull(&mut readers, 2), Some((10, 12)));
    }

    #[test]
    fn a_conversation_never_heard_of_starts_where_the_backlog_or_a_pull_says() {
        let (mut readers, mut out) = (readers(0), VecDeque::new());
        readers.record(record(40), NOW, &mut out);
        assert_eq!(pull(&mut readers, 1), Some((1, 39)));
        readers.block(block(0, 38, 40, 38..=39, true), NOW, &mut out);
        assert_eq!(said(&mut out), "-1-37 38 39 40");

        let (mut readers, mut out) = (self::readers(0), VecDeque::new());
        readers.block(block(0, 1, 9, 5..=8, true), NOW, &mut out);
        assert_eq!(said(&mut out), "", "1 to 4 are on another channel");
        assert_eq!(pull(&mut readers, 1), Some((1, 4)));
        assert!(readers.pulled(block(1, 1, 9, 3..=4, true), NOW, &mut out));
        assert_eq!(said(&mut out), "-1-2 3 4 5 6 7 8", "the answer to a question from 1 on starts at 3");

        let (mut readers, mut out) = (self::readers(0), VecDeque::new());
        readers.record(record(40), NOW, &mut out);
        assert_eq!(pull(&mut readers, 1), Some((1, 39)));
        let nothing = Block { records: Vec::new(), ..block(1, 40, 40, 1..=1, true) };
        assert!(readers.pulled(nothing, NOW, &mut out));
        assert_eq!(said(&mut out), "-1-39 40");

        let (mut readers, mut out) = (self::readers(0), VecDeque::new());
        readers.record(record(1), NOW, &mut out);
        assert_eq!((said(&mut out), pull(&mut readers, 1)), ("1".to_owned(), None));
    }

    #[test]
    fn a_fruitless_pull_is_not_repeated_until_there_is_news() {
        let (mut readers, mut out) = (readers(4), VecDeque::new());
        readers.head(Head { conversation: c(), head: s(9), count: 9, low: s(1) }, NOW);
        assert!(pull(&mut readers, 1).is_some());
        let nothing = Block { records: Vec::new(), ..block(1, 1, 9, 5..=5, true) };
        assert!(readers.pulled(nothing, NOW, &mut out));
        assert_eq!((pull(&mut readers, 2), readers.next_timeout()), (None, None));
        readers.record(record(10), NOW, &mut out);
        readers.handle_timeout(NOW + STALL);
        assert_eq!(pull(&mut readers, 2), Some((5, 9)));
        assert!(readers.refused(RequestId::new(2).unwrap(), None, NOW).is_some());
        assert_eq!((readers.waiting(), readers.next_timeout()), ((0, 0), None));
        assert_eq!(said(&mut out), "", "nothing is handed out across an unexplained hole");
    }

    /// Found by the schedules of `tests/pair.rs`.
    #[test]
    fn an_empty_answer_says_nothing_of_what_was_not_asked() {
        let (mut readers, mut out) = (readers(0), VecDeque::new());
        readers.record(record(4), NOW, &mut out);
        assert_eq!(pull(&mut readers, 1), Some((1, 3)));
        readers.block(block(0, 4, 9, 4..=5, true), NOW, &mut out);
        readers.record(record(9), NOW, &mut out);
        assert_eq!(said(&mut out), "-1-3 4 5");
        let nothing = Block { records: Vec::new(), ..block(1, 4, 9, 4..=4, true) };
        assert!(readers.pulled(nothing, NOW, &mut out));
        assert_eq!((said(&mut out), pull(&mut readers, 2)), (String::new(), Some((6, 8))));
    }

    #[test]
    fn after_a_new_connection_who_is_still_behind_pulls() {
        let (mut readers, mut out) = (readers(4), VecDeque::new());
        readers.head(Head { conversation: c(), head: s(9), count: 9, low: s(1) }, NOW);
        assert!(pull(&mut readers, 1).is_some());
        readers.disconnected();
        assert!(!readers.pulled(block(1, 1, 9, 5..=9, true), NOW, &mut out), "answers of the old connection");
        assert_eq!(readers.next_timeout(), None);
        readers.welcomed(NOW);
        assert_eq!(pull(&mut readers, 2), None, "the gateway catches us up by itself");
        readers.handle_timeout(NOW + STALL);
        assert_eq!(pull(&mut readers, 2), Some((5, 9)));
    }
}
