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

/// Encodes `record` once (twice when it has an origin, which only the sender's own devices see), puts it into the
/// ring and tells `sessions`. `inline`: see [`Owed::publish`].
pub fn push(
    ring: &Arc<Ring>,
    record: Deliver,
    origin: Option<Origin>,
    time: UnixMillis,
    sessions: &[Arc<Owed>],
    inline: bool,
) {
    let (conversation, seq, sender) = (record.conversation, record.seq, record.sender);
    let own_frame =
        origin.map(|origin| Frame::Deliver(Deliver { origin: Some(origin), ..record.clone() }).to_bytes());
    let frame = Frame::Deliver(Deliver { origin: None, ..record }).to_bytes();
    ring.push(RingEntry { seq, sender, time, frame, own_frame });
    for session in sessions {
        session.publish(conversation, seq, ring, inline);
    }
}
