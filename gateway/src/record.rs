//! A stored record as it travels. Pure; used where records are published and where they are read back.

use fulmar_protocol::{
    frame::{self, Deliver, Origin, WireTime},
    id::{ConversationId, Pseq},
};
use fulmar_store::{Record, RecordKind};

/// A record as it travels, without its origin.
#[must_use]
pub fn to_wire(conversation: ConversationId, record: &Record, time: WireTime) -> Deliver {
    Deliver {
        kind: match record.kind {
            RecordKind::Message => frame::RecordKind::Message,
            RecordKind::Edit => frame::RecordKind::Edit,
            RecordKind::Recall => frame::RecordKind::Recall,
            RecordKind::Reaction => frame::RecordKind::Reaction,
            RecordKind::Created => frame::RecordKind::Created,
            RecordKind::Joined => frame::RecordKind::Joined,
            RecordKind::Left => frame::RecordKind::Left,
            RecordKind::Notice => frame::RecordKind::Notice,
        },
        conversation,
        seq: record.seq,
        sender: record.sender,
        time,
        origin: None,
        reference: record.target,
        ttl: record.ttl,
        more: record.more,
        silent: record.silent,
        payload: record.payload.clone(),
    }
}

/// Where a client's record came from; `None` for records the gateway made.
#[must_use]
pub fn origin(record: &Record) -> Option<Origin> {
    (record.pseq != Pseq::ZERO).then_some(Origin {
        device: record.device,
        epoch: record.epoch,
        pseq: record.pseq,
    })
}
