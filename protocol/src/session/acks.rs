//! Settled sends on their way into SEND_ACK frames.
//!
//! - Acks of one conversation that come between two polls leave as one frame of runs, if they are of one time: the client
//!   makes its own records from them.
//! - Within a conversation frames leave in the order in which sends were settled, refusals included.
//!
//! Not here: when a send is settled (the shard's commit).

use std::collections::BTreeMap;

use crate::{
    frame::{AckRun, SendAck},
    id::{ConversationId, Pseq, Seq, UnixMillis},
    limit::ENTRIES_PER_FRAME_MAX,
};

/// Acks that have not left, at most one frame per conversation.
#[derive(Debug, Default)]
pub(super) struct PendingAcks {
    frames: BTreeMap<ConversationId, SendAck>,
}

impl PendingAcks {
    /// One send is on disk, or its number is used up (`seq` zero). Returns a frame that must leave before this ack
    /// can be kept.
    pub(super) fn acked(
        &mut self,
        conversation: ConversationId,
        pseq: Pseq,
        seq: Seq,
        time: UnixMillis,
    ) -> Option<SendAck> {
        let Some(frame) = self.frames.get_mut(&conversation) else {
            self.frames.insert(conversation, first(conversation, pseq, seq, time));
            return None;
        };
        let covered: u64 = frame.runs.iter().map(|run| u64::from(run.count)).sum();
        if pseq <= frame.up_to && pseq.get() + covered > frame.up_to.get() {
            return None;
        }
        let recorded = frame.runs.iter().any(|run| run.base != Seq::ZERO);
        if frame.up_to.next() == Some(pseq) && (frame.time == time || !recorded || seq == Seq::ZERO) {
            if !recorded {
                frame.time = frame.time.max(time);
            }
            let room = frame.runs.len() < ENTRIES_PER_FRAME_MAX;
            if let Some(run) = frame.runs.last_mut().filter(|run| continues(**run, seq)) {
                run.count += 1;
                frame.up_to = pseq;
                return None;
            }
            if room {
                frame.runs.push(AckRun { count: 1, base: seq });
                frame.up_to = pseq;
                return None;
            }
        }
        Some(core::mem::replace(frame, first(conversation, pseq, seq, time)))
    }

    /// Everything up to `up_to` is settled, which records the numbers got is not known. Returns as [`Self::acked`].
    pub(super) fn settled(
        &mut self,
        conversation: ConversationId,
        up_to: Pseq,
        time: UnixMillis,
    ) -> Option<SendAck> {
        if self.frames.get(&conversation).is_some_and(|frame| frame.up_to >= up_to) {
            return None;
        }
        self.frames.insert(conversation, SendAck { conversation, up_to, time, runs: Vec::new() })
    }

    /// The frame of one conversation, to be followed by something about the same conversation.
    pub(super) fn take(&mut self, conversation: ConversationId) -> Option<SendAck> {
        self.frames.remove(&conversation)
    }

    /// Any frame.
    pub(super) fn pop(&mut self) -> Option<SendAck> {
        self.frames.pop_first().map(|(_, frame)| frame)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.frames.clear();
    }
}

fn first(conversation: ConversationId, pseq: Pseq, seq: Seq, time: UnixMillis) -> SendAck {
    SendAck { conversation, up_to: pseq, time, runs: vec![AckRun { count: 1, base: seq }] }
}

/// Whether the next pseq with this seq belongs to the run.
fn continues(run: AckRun, seq: Seq) -> bool {
    if run.count == u32::MAX {
        return false;
    }
    if run.base == Seq::ZERO { seq == Seq::ZERO } else { run.base.saturating_add(run.count.into()) == seq }
}

/// The (pseq, seq) pairs a frame names, ascending; [`Seq::ZERO`] for numbers without a record.
pub(super) fn pairs(ack: &SendAck) -> impl Iterator<Item = (Pseq, Seq)> + '_ {
    let covered: u64 = ack.runs.iter().map(|run| u64::from(run.count)).sum();
    let mut pseq = ack.up_to.get().saturating_sub(covered);
    ack.runs.iter().flat_map(|run| (0..run.count).map(move |index| (*run, index))).filter_map(
        move |(run, index)| {
            pseq += 1;
            let seq = if run.base == Seq::ZERO { Seq::ZERO } else { run.base.saturating_add(index.into()) };
            Some((Pseq::new(pseq)?, seq))
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn c(n: u64) -> ConversationId {
        ConversationId::new(n).unwrap()
    }

    fn collect(acks: &[(u64, u64)]) -> Vec<(u64, Vec<(u32, u64)>)> {
        let mut pending = PendingAcks::default();
        let mut frames = Vec::new();
        for (pseq, seq) in acks {
            let (pseq, seq) = (Pseq::new(*pseq).unwrap(), Seq::new(*seq).unwrap());
            frames.extend(pending.acked(c(1), pseq, seq, UnixMillis::default()));
        }
        frames.extend(pending.pop());
        assert!(pending.is_empty());
        for frame in &frames {
            let named: Vec<_> = pairs(frame).map(|(p, s)| (p.get(), s.get())).collect();
            assert!(named.iter().all(|pair| acks.contains(pair)), "{named:?}");
        }
        frames
            .into_iter()
            .map(|f| (f.up_to.get(), f.runs.iter().map(|r| (r.count, r.base.get())).collect()))
            .collect()
    }

    #[test]
    fn runs_merge() {
        for (acks, want) in [
            (vec![(1, 10), (2, 11), (3, 12)], vec![(3, vec![(3, 10)])]),
            (vec![(1, 10), (2, 12), (3, 13)], vec![(3, vec![(1, 10), (2, 12)])]),
            (vec![(1, 10), (2, 0), (3, 0), (4, 11)], vec![(4, vec![(1, 10), (2, 0), (1, 11)])]),
            (vec![(5, 10), (6, 11), (5, 10), (6, 11)], vec![(6, vec![(2, 10)])]),
            (vec![(5, 10), (3, 8)], vec![(5, vec![(1, 10)]), (3, vec![(1, 8)])]),
            (vec![(5, 10), (9, 20)], vec![(5, vec![(1, 10)]), (9, vec![(1, 20)])]),
        ] {
            assert_eq!(collect(&acks), want, "{acks:?}");
        }
    }

    #[test]
    fn records_of_two_times_are_acked_in_two_frames() {
        let mut pending = PendingAcks::default();
        let (p, s, at) =
            (|n| Pseq::new(n).unwrap(), |n| Seq::new(n).unwrap(), |n| UnixMillis::new(n).unwrap());
        assert_eq!(pending.acked(c(1), p(1), s(0), at(3)), None);
        assert_eq!(pending.acked(c(1), p(2), s(10), at(5)), None);
        assert_eq!(pending.acked(c(1), p(3), s(11), at(5)), None);
        assert_eq!(pending.acked(c(1), p(4), s(0), at(7)), None, "without a record the time means nothing");
        let first = pending.acked(c(1), p(5), s(12), at(6)).unwrap();
        let second = pending.pop().unwrap();
        let seen = [&first, &second].map(|ack| (ack.up_to.get(), ack.time.get(), ack.runs.len()));
        assert_eq!(seen, [(4, 5, 3), (5, 6, 1)]);
    }

    #[test]
    fn a_frame_never_has_more_runs_than_it_may() {
        let acks: Vec<_> = (1..=600).map(|n| (n, n * 2)).collect();
        let frames = collect(&acks);
        assert_eq!(frames.iter().map(|(_, runs)| runs.len()).collect::<Vec<_>>(), [256, 256, 88]);
        assert_eq!(frames.iter().map(|(up_to, _)| *up_to).collect::<Vec<_>>(), [256, 512, 600]);
    }

    #[test]
    fn settling_without_seqs_covers_what_was_pending() {
        let mut pending = PendingAcks::default();
        let p = |n| Pseq::new(n).unwrap();
        assert_eq!(pending.settled(c(1), p(4), UnixMillis::default()), None);
        assert_eq!(pending.settled(c(1), p(3), UnixMillis::default()), None);
        let frame = pending.take(c(1)).unwrap();
        assert_eq!((frame.up_to, frame.runs.len()), (p(4), 0));
        assert_eq!(pairs(&frame).count(), 0);
    }
}
