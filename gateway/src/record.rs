//! A stored record as it travels. Pure; used where records are published and where they are read back.

use fulmar_protocol::{
    frame::{self, Deliver, Origin, WireTime},
    id::{ConversationId, Pseq},
};
use fulmar_store::{ConversationClass, Record, RecordKind};

/// A record as it travels: without its origin, but for pieces of bodies, which nobody could put together without it.
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
        origin: if record.more || record.continues { origin(record) } else { None },
        reference: record.target,
        ttl: record.ttl,
        more: record.more,
        continues: record.continues,
        silent: record.silent,
        payload: record.payload.clone(),
    }
}

/// What kind of conversation it is, as that travels.
#[must_use]
pub const fn class(class: ConversationClass) -> frame::ConversationClass {
    match class {
        ConversationClass::Direct => frame::ConversationClass::Direct,
        ConversationClass::Group => frame::ConversationClass::Group,
        ConversationClass::Broadcast => frame::ConversationClass::Broadcast,
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

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use fulmar_protocol::id::{DeviceId, Epoch, Seq, UnixMillis, UserId};

    use super::*;

    #[test]
    fn only_pieces_of_bodies_tell_everybody_which_device_sent_them() {
        let whole = Record {
            seq: Seq::new(9).unwrap(),
            kind: RecordKind::Message,
            sender: UserId::new(257).unwrap(),
            device: DeviceId::new(2).unwrap(),
            epoch: Epoch::new(3).unwrap(),
            pseq: Pseq::new(4).unwrap(),
            time: UnixMillis::new(5).unwrap(),
            count: 1,
            target: None,
            ttl: None,
            more: false,
            continues: false,
            silent: false,
            payload: Bytes::from_static(b"hi"),
        };
        let wire =
            |record: &Record| to_wire(ConversationId::new(256).unwrap(), record, WireTime::Full(record.time));
        assert_eq!(wire(&whole).origin, None);
        for (more, continues) in [(true, false), (true, true), (false, true)] {
            let piece = Record { more, continues, ..whole.clone() };
            let sent = wire(&piece);
            assert_eq!((sent.more, sent.continues), (more, continues));
            assert_eq!(sent.origin, origin(&piece));
            assert!(
                sent.origin.is_some_and(|origin| origin.pseq == piece.pseq && origin.device == piece.device)
            );
        }
    }
}
