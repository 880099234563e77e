//! The step from a committed record to the sessions that are here: one encoding, one lock per session.

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
