//! A record: one entry of a conversation's log, and its bytes on disk.
//!
//! - Bytes are canonical for format 1: `kind flags seq time sender count [device epoch pseq] [target] [ttl] len payload crc`.
//! - The checksum covers the conversation's number as well, so a record that turns up elsewhere is damage.
//! - [`Record::decode`] checks everything before it returns; what it returns was written by [`Record::encode`].
//!
//! Not here: where records lie (`shard::block`), who may send them (the gateway), the wire (`fulmar_protocol`).

use std::ops::Range;

use bytes::Bytes;
use fulmar_protocol::id::{ConversationId, DeviceId, Epoch, Pseq, Seq, UnixMillis, UserId};

use crate::codec::{Cursor, Malformed, put_varint};

/// What a record does to its conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RecordKind {
    /// A message of a member.
    Message = 1,
    /// Replaces the payload of the message `target`.
    Edit = 2,
    /// Takes the message `target` back.
    Recall = 3,
    /// Reacts to the message `target`.
    Reaction = 4,
    /// The conversation began.
    Created = 5,
    /// `sender` joined, or was added (payload: the gateway's).
    Joined = 6,
    /// `sender` left, or was removed.
    Left = 7,
    /// Something the system has to say.
    Notice = 8,
}

impl RecordKind {
    /// The kind with this number; `None` for numbers format 1 does not know.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Message,
            2 => Self::Edit,
            3 => Self::Recall,
            4 => Self::Reaction,
            5 => Self::Created,
            6 => Self::Joined,
            7 => Self::Left,
            8 => Self::Notice,
            _ => return None,
        })
    }
}

/// One entry of a conversation's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Position in the conversation's log; contiguous from 1.
    pub seq: Seq,
    /// What it does.
    pub kind: RecordKind,
    /// Who it is from, or about (joined, left).
    pub sender: UserId,
    /// The sender's device; [`DeviceId::ZERO`] if no device sent it, then `epoch` and `pseq` are zero too.
    pub device: DeviceId,
    /// The producer's incarnation.
    pub epoch: Epoch,
    /// Position in the producer's lane; zero if the record takes no place in one.
    pub pseq: Pseq,
    /// When the shard took it.
    pub time: UnixMillis,
    /// How many messages a person would count as unread lie in the log up to and including this record.
    pub count: u64,
    /// The record it edits, recalls, reacts or replies to.
    pub target: Option<Seq>,
    /// Seconds after `time` for which it is worth delivering.
    pub ttl: Option<u32>,
    /// Its body goes on in the next record of the same producer.
    pub more: bool,
    /// It goes on with the body of the record before it of the same producer.
    pub continues: bool,
    /// Delivered without a notification.
    pub silent: bool,
    /// What the sender wrote; opaque, at most [`RECORD_PAYLOAD_BYTES_MAX`].
    pub payload: Bytes,
}

/// Payload bytes of one record; the wire's limit of one SEND.
pub const RECORD_PAYLOAD_BYTES_MAX: usize = fulmar_protocol::limit::SEND_PAYLOAD_BYTES_MAX;

/// Bytes of an encoded record besides its payload, every number at its widest.
pub const RECORD_HEADER_BYTES_MAX: usize = 2 + 4 * 9 + 3 * 9 + 9 + 5 + 3 + CRC_BYTES;

/// Bytes of the smallest encoded record: kind, flags, four numbers, length, checksum.
pub(crate) const RECORD_BYTES_MIN: usize = 2 + 4 + 1 + CRC_BYTES;

const CRC_BYTES: usize = 4;

const MORE: u8 = 1 << 0;
const SILENT: u8 = 1 << 1;
const HAS_PRODUCER: u8 = 1 << 2;
const HAS_TARGET: u8 = 1 << 3;
const HAS_TTL: u8 = 1 << 4;
const CONTINUES: u8 = 1 << 5;
const FLAGS_KNOWN: u8 = MORE | SILENT | HAS_PRODUCER | HAS_TARGET | HAS_TTL | CONTINUES;

impl Record {
    /// Appends the record's bytes for the log of `conversation`.
    pub fn encode(&self, conversation: ConversationId, out: &mut Vec<u8>) {
        let start = out.len();
        let has_producer =
            self.device != DeviceId::ZERO || self.epoch != Epoch::ZERO || self.pseq != Pseq::ZERO;
        let mut flags = 0;
        for (set, bit) in [
            (self.more, MORE),
            (self.continues, CONTINUES),
            (self.silent, SILENT),
            (has_producer, HAS_PRODUCER),
            (self.target.is_some(), HAS_TARGET),
            (self.ttl.is_some(), HAS_TTL),
        ] {
            if set {
                flags |= bit;
            }
        }
        out.push(self.kind as u8);
        out.push(flags);
        put_varint(out, self.seq.get());
        put_varint(out, self.time.get());
        put_varint(out, self.sender.get());
        put_varint(out, self.count);
        if has_producer {
            put_varint(out, self.device.get());
            put_varint(out, self.epoch.get());
            put_varint(out, self.pseq.get());
        }
        if let Some(target) = self.target {
            put_varint(out, target.get());
        }
        if let Some(ttl) = self.ttl {
            put_varint(out, u64::from(ttl));
        }
        put_varint(out, self.payload.len() as u64);
        out.extend_from_slice(&self.payload);
        let crc = checksum(conversation, out.get(start..).unwrap_or_default());
        out.extend_from_slice(&crc.to_le_bytes());
    }

    /// Reads one record of `conversation` from the start of `bytes`, and says how many bytes it took. The payload
    /// shares `bytes`.
    ///
    /// # Errors
    /// Anything that [`Record::encode`] does not write, a wrong checksum above all.
    pub fn decode(conversation: ConversationId, bytes: &Bytes) -> Result<(Self, usize), Malformed> {
        let (mut record, payload, taken) = Self::walk(bytes)?;
        let covered = bytes.get(..payload.end).ok_or(Malformed("record"))?;
        let crc = bytes.get(payload.end..taken).ok_or(Malformed("record checksum"))?;
        if crc != checksum(conversation, covered).to_le_bytes() {
            return Err(Malformed("record checksum"));
        }
        record.payload = bytes.slice(payload);
        Ok((record, taken))
    }

    /// How many bytes the record at the start of `bytes` takes. The checksum is not looked at.
    pub(crate) fn measure(bytes: &[u8]) -> Result<usize, Malformed> {
        Self::walk(bytes).map(|(_, _, taken)| taken)
    }

    /// Reads all fields but the payload: the record without it, where the payload lies, and the bytes of the whole.
    fn walk(bytes: &[u8]) -> Result<(Self, Range<usize>, usize), Malformed> {
        let mut at = Cursor::new(bytes);
        let kind = RecordKind::from_number(at.u8("record kind")?).ok_or(Malformed("record kind"))?;
        let flags = at.u8("record flags")?;
        if flags & !FLAGS_KNOWN != 0 {
            return Err(Malformed("record flags"));
        }
        let seq = at.number("record seq")?;
        let time = at.number("record time")?;
        let sender = at.number("record sender")?;
        let count = at.varint("record count")?;
        let (device, epoch, pseq) = if flags & HAS_PRODUCER != 0 {
            (at.number("record device")?, at.number("record epoch")?, at.number("record pseq")?)
        } else {
            (DeviceId::ZERO, Epoch::ZERO, Pseq::ZERO)
        };
        let target = if flags & HAS_TARGET != 0 { Some(at.number("record target")?) } else { None };
        let ttl = if flags & HAS_TTL != 0 {
            Some(u32::try_from(at.varint("record ttl")?).map_err(|_| Malformed("record ttl"))?)
        } else {
            None
        };
        let length = at.length("record payload length")?;
        if length > RECORD_PAYLOAD_BYTES_MAX {
            return Err(Malformed("record payload length"));
        }
        let payload_at = at.at();
        at.take(length, "record payload")?;
        let payload = payload_at..at.at();
        at.take(CRC_BYTES, "record checksum")?;
        let record = Self {
            seq,
            kind,
            sender,
            device,
            epoch,
            pseq,
            time,
            count,
            target,
            ttl,
            more: flags & MORE != 0,
            continues: flags & CONTINUES != 0,
            silent: flags & SILENT != 0,
            payload: Bytes::new(),
        };
        Ok((record, payload, at.at()))
    }

    /// Bytes it takes in memory and, about, on disk.
    #[must_use]
    pub fn weight(&self) -> usize {
        self.payload.len() + 64
    }
}

fn checksum(conversation: ConversationId, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&conversation.get().to_be_bytes()), bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use fulmar_protocol::limit::VARINT_MAX;
    use proptest::prelude::*;

    use super::*;

    fn conversation(n: u64) -> ConversationId {
        ConversationId::new(n).unwrap()
    }

    prop_compose! {
        pub(crate) fn any_record()(
            seq in 1..=VARINT_MAX, kind in 1u8..=8, sender in 0..=VARINT_MAX, producer in any::<Option<(u32, u32, u32)>>(),
            time in 0..=VARINT_MAX, count in any::<u64>(), target in proptest::option::of(0..=VARINT_MAX),
            ttl in any::<Option<u32>>(), more in any::<bool>(), continues in any::<bool>(),
            silent in any::<bool>(),
            payload in proptest::collection::vec(any::<u8>(), 0..300),
        ) -> Record {
            let (device, epoch, pseq) = producer.unwrap_or_default();
            Record {
                seq: Seq::new(seq).unwrap(),
                kind: RecordKind::from_number(kind).unwrap(),
                sender: UserId::new(sender).unwrap(),
                device: DeviceId::new(u64::from(device)).unwrap(),
                epoch: Epoch::new(u64::from(epoch)).unwrap(),
                pseq: Pseq::new(u64::from(pseq)).unwrap(),
                time: UnixMillis::new(time).unwrap(),
                count,
                target: target.map(|n| Seq::new(n).unwrap()),
                ttl,
                more,
                continues,
                silent,
                payload: payload.into(),
            }
        }
    }

    proptest! {
        #[test]
        fn a_record_comes_back(record in any_record(), in_conversation in 0..=VARINT_MAX) {
            let mut bytes = Vec::new();
            record.encode(conversation(in_conversation), &mut bytes);
            let length = bytes.len();
            prop_assert!(length <= record.payload.len() + RECORD_HEADER_BYTES_MAX);
            bytes.extend_from_slice(b"the next one");
            let (back, taken) = Record::decode(conversation(in_conversation), &bytes.into()).unwrap();
            prop_assert_eq!(back, record);
            prop_assert_eq!(taken, length);
        }

        #[test]
        fn one_changed_byte_is_noticed(record in any_record(), at in any::<prop::sample::Index>(), flip in 1u8..) {
            let mut bytes = Vec::new();
            record.encode(conversation(7), &mut bytes);
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert!(Record::decode(conversation(7), &bytes.into()).is_err());
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Record::decode(conversation(7), &bytes.into());
        }
    }

    #[test]
    fn bytes_are_pinned() {
        let record = Record {
            seq: Seq::new(300).unwrap(),
            kind: RecordKind::Message,
            sender: UserId::new(257).unwrap(),
            device: DeviceId::new(1).unwrap(),
            epoch: Epoch::new(2).unwrap(),
            pseq: Pseq::new(3).unwrap(),
            time: UnixMillis::new(1_700_000_000_000).unwrap(),
            count: 299,
            target: Some(Seq::new(5).unwrap()),
            ttl: Some(60),
            more: true,
            continues: false,
            silent: false,
            payload: Bytes::from_static(b"hi"),
        };
        let mut bytes = Vec::new();
        record.encode(conversation(256), &mut bytes);
        assert_eq!(crate::hex(&bytes), GOLDEN);
        let mut continued = Vec::new();
        Record { continues: true, ..record.clone() }.encode(conversation(256), &mut continued);
        assert_eq!(crate::hex(&continued), GOLDEN_CONTINUED);
        let mut elsewhere = Vec::new();
        record.encode(conversation(512), &mut elsewhere);
        assert!(
            Record::decode(conversation(256), &elsewhere.into()).is_err(),
            "a record of another conversation"
        );
    }

    // kind flags | seq 300 | time | sender 257 | count 299 | device epoch pseq | target | ttl | length "hi" | crc32c
    const GOLDEN: &str = "011dac0280d095ffbc318102ab02010203053c026869da4f16da";
    const GOLDEN_CONTINUED: &str = "013dac0280d095ffbc318102ab02010203053c0268698b84b57e";
}
