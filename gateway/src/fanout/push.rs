//! The step from a committed record to the sessions that are here: one encoding, one lock per session; and who of them gets
//! it as it comes ([`goes_inline`]).

use std::sync::Arc;

use fulmar_protocol::{
    frame::{Deliver, Frame, Origin},
    id::UnixMillis,
};

use super::{
    owed::Owed,
    ring::{Ring, RingEntry},
};

/// Encodes `record` once (twice when it has an origin that only the sender's own devices are told), puts it into the
/// ring and tells `sessions`; answers how many. `inline`: see [`Owed::publish`].
pub fn push<'a>(
    ring: &Arc<Ring>,
    record: Deliver,
    origin: Option<Origin>,
    time: UnixMillis,
    sessions: impl IntoIterator<Item = &'a Arc<Owed>>,
    inline: bool,
) -> usize {
    let (conversation, seq, sender) = (record.conversation, record.seq, record.sender);
    let own_frame = origin
        .filter(|_| record.origin.is_none())
        .map(|origin| Frame::Deliver(Deliver { origin: Some(origin), ..record.clone() }).to_bytes());
    let frame = Frame::Deliver(record).to_bytes();
    ring.push(RingEntry { seq, sender, time, frame, own_frame });
    let mut told = 0;
    for session in sessions {
        session.publish(conversation, seq, ring, inline);
        told += 1;
    }
    told
}

/// Whether everybody who is here gets a conversation's records as they come; if not, only those who have it open. `inline`: as it
/// was before. Not at every member to and fro: what was too large stays so down to nine tenths of `max`.
#[must_use]
pub const fn goes_inline(inline: bool, members: usize, max: usize) -> bool {
    if inline { members <= max } else { members < max - max / 10 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_at_the_bound_does_not_change_at_every_member() {
        for (inline, members, want) in [
            (true, 1, true),
            (true, 100, true),
            (true, 101, false),
            (false, 101, false),
            (false, 100, false),
            (false, 90, false),
            (false, 89, true),
            (true, 89, true),
            (true, 95, true),
        ] {
            assert_eq!(goes_inline(inline, members, 100), want, "{inline} {members}");
        }
        // The smallest bound.
        assert!(!goes_inline(true, 2, 1) && !goes_inline(false, 1, 1) && goes_inline(false, 0, 1));
    }
}
