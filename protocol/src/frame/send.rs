//! SEND and SEND_ACK.

use bytes::{BufMut, Bytes, BytesMut};

use super::{Body, Fields, RecordKind, put_varint, varint_len};
use crate::{
    error::DecodeError,
    id::{ConversationId, Pseq, Seq, UnixMillis},
    limit::{ENTRIES_PER_FRAME_MAX, SEND_PAYLOAD_BYTES_MAX},
};

const KIND: u64 = 1;
const REFERENCE: u64 = 1 << 1;
const TTL: u64 = 1 << 2;
const MORE: u64 = 1 << 3;
const SILENT: u64 = 1 << 4;
const CANCEL: u64 = 1 << 5;
const CONTINUES: u64 = 1 << 6;
const FLAGS: u64 = KIND | REFERENCE | TTL | MORE | SILENT | CANCEL | CONTINUES;

/// A client's change of a conversation: a message, an edit, a recall or a reaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Send {
    /// What it is; [`RecordKind::sendable`] kinds only.
    pub kind: RecordKind,
    /// Where it goes.
    pub conversation: ConversationId,
    /// Its number in the lane of sending, from 1.
    pub pseq: Pseq,
    /// The newest record of the conversation the sender had seen.
    pub seen: Seq,
    /// The record an edit, recall, reaction or reply refers to.
    pub reference: Option<Seq>,
    /// Seconds after which the message is of no use, counted by the gateway from its arrival.
    pub ttl: Option<u32>,
    /// More pieces of the same body follow under the next pseqs.
    pub more: bool,
    /// A piece of the body that the send before it in this lane began or went on with.
    pub continues: bool,
    /// Not counted as unread.
    pub silent: bool,
    /// A tombstone: if this pseq was not stored yet it never will be; if it was, it is acked as usual.
    pub cancel: bool,
    /// The business's bytes, opaque to the gateway.
    pub payload: Bytes,
}

impl Send {
    fn flags(&self) -> u64 {
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        bit(self.kind != RecordKind::Message, KIND)
            | bit(self.reference.is_some(), REFERENCE)
            | bit(self.ttl.is_some(), TTL)
            | bit(self.more, MORE)
            | bit(self.continues, CONTINUES)
            | bit(self.silent, SILENT)
            | bit(self.cancel, CANCEL)
    }
}

impl Body for Send {
    fn decode(fields: &mut Fields<'_>) -> Result<Self, DecodeError> {
        let flags = fields.varint("flags")?;
        if flags & !FLAGS != 0 {
            return Err(DecodeError::BadValue { field: "flags" });
        }
        let conversation = fields.id("conversation")?;
        let pseq: Pseq = fields.id("pseq")?;
        if pseq == Pseq::ZERO {
            return Err(DecodeError::BadValue { field: "pseq" });
        }
        let seen = fields.id("seen")?;
        let kind = if flags & KIND == 0 { RecordKind::Message } else { RecordKind::decode(fields)? };
        if !kind.sendable() || (flags & KIND != 0 && kind == RecordKind::Message) {
            return Err(DecodeError::BadValue { field: "kind" });
        }
        let reference = if flags & REFERENCE == 0 { None } else { Some(fields.id("reference")?) };
        let ttl = if flags & TTL == 0 { None } else { Some(fields.u32("ttl")?) };
        let payload = fields.rest("payload", SEND_PAYLOAD_BYTES_MAX)?;
        Ok(Self {
            kind,
            conversation,
            pseq,
            seen,
            reference,
            ttl,
            more: flags & MORE != 0,
            continues: flags & CONTINUES != 0,
            silent: flags & SILENT != 0,
            cancel: flags & CANCEL != 0,
            payload,
        })
    }

    fn len(&self) -> usize {
        varint_len(self.flags())
            + varint_len(self.conversation.get())
            + varint_len(self.pseq.get())
            + varint_len(self.seen.get())
            + usize::from(self.kind != RecordKind::Message)
            + self.reference.map_or(0, |seq| varint_len(seq.get()))
            + self.ttl.map_or(0, |ttl| varint_len(ttl.into()))
            + self.payload.len()
    }

    fn encode(&self, out: &mut BytesMut) {
        put_varint(out, self.flags());
        put_varint(out, self.conversation.get());
        put_varint(out, self.pseq.get());
        put_varint(out, self.seen.get());
        if self.kind != RecordKind::Message {
            put_varint(out, self.kind.number());
        }
        if let Some(reference) = self.reference {
            put_varint(out, reference.get());
        }
        if let Some(ttl) = self.ttl {
            put_varint(out, ttl.into());
        }
        out.put_slice(&self.payload);
    }
}

/// Consecutive pseqs that got consecutive seqs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AckRun {
    /// How many, at least 1.
    pub count: u32,
    /// Seq of the first; [`Seq::ZERO`] when these numbers were consumed without a record (refused or cancelled).
    pub base: Seq,
}

/// Sends of one conversation that are on disk. Everything up to `up_to` is settled; `runs` says how the last of them
/// were. A number that is covered and not named was answered before, or to an earlier connection: a client that still
/// waits for it sends it again, and gets an answer that names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SendAck {
    /// The conversation.
    pub conversation: ConversationId,
    /// The last pseq that is settled.
    pub up_to: Pseq,
    /// When they were stored: the time of every record that is named.
    pub time: UnixMillis,
    /// The seqs of the last pseqs, in order, ending with `up_to`. Empty: all of it was settled so long ago that the
    /// gateway does not remember how.
    pub runs: Vec<AckRun>,
}

impl Body for SendAck {
    fn decode(fields: &mut Fields<'_>) -> Result<Self, DecodeError> {
        let conversation = fields.id("conversation")?;
        let up_to: Pseq = fields.id("up to")?;
        let time = fields.id("time")?;
        let count = fields.count("runs", ENTRIES_PER_FRAME_MAX)?;
        let mut runs = Vec::with_capacity(count);
        let mut covered = 0u64;
        for _ in 0..count {
            let run = AckRun { count: fields.u32("run")?, base: fields.id("base")? };
            covered += u64::from(run.count);
            if run.count == 0 || covered > up_to.get() {
                return Err(DecodeError::BadValue { field: "run" });
            }
            runs.push(run);
        }
        Ok(Self { conversation, up_to, time, runs })
    }

    fn len(&self) -> usize {
        varint_len(self.conversation.get())
            + varint_len(self.up_to.get())
            + varint_len(self.time.get())
            + varint_len(self.runs.len() as u64)
            + self
                .runs
                .iter()
                .map(|run| varint_len(run.count.into()) + varint_len(run.base.get()))
                .sum::<usize>()
    }

    fn encode(&self, out: &mut BytesMut) {
        put_varint(out, self.conversation.get());
        put_varint(out, self.up_to.get());
        put_varint(out, self.time.get());
        put_varint(out, self.runs.len() as u64);
        for run in &self.runs {
            put_varint(out, run.count.into());
            put_varint(out, run.base.get());
        }
    }
}
