//! Any valid frame, with the side and channel it may come from.

use fulmar_protocol::{
    close::{CloseCode, RefusalCode, Retry},
    frame::{
        Ack, AckRun, Auth, AuthProof, Block, Bytes8, Call, CallStatus, Channel, ConversationClass, Cursors,
        Deliver, Error, Event, EventKind, Frame, Goaway, Head, Heads, Hello, Kicked, Limits, Mark,
        NetworkHint, NetworkKind, Open, OpenTarget, Opened, Origin, Ping, Pong, Pull, Receipt, Receipts,
        RecordKind, Reply, Resumption, Send, SendAck, SendRefused, Side, Welcome, WireTime,
    },
    id::{DeviceClass, DeviceUid, FolderId, Pseq, Seq, UnixMillis},
    limit::{EVENT_PAYLOAD_BYTES_MAX, LANES_MAX, SEND_PAYLOAD_BYTES_MAX},
};

use super::source::Source;

/// Any valid frame.
pub(crate) fn frame(s: &mut Source<'_>) -> Frame {
    let index = s.below(Frame::TABLE.len());
    numbered(Frame::TABLE.get(index).map_or(0, |(number, ..)| *number), s)
}

/// Any valid frame of this type; a PING for a number no frame has.
pub(crate) fn numbered(number: u64, s: &mut Source<'_>) -> Frame {
    match number {
        0x02 => Frame::Hello(hello(s)),
        0x04 => Frame::Welcome(welcome(s)),
        0x06 => Frame::Auth(Auth { token: s.text(2048) }),
        0x08 => Frame::Cursors(Cursors { last: s.flag(), entries: s.list(256, |s| (s.id(), s.id())) }),
        0x0a => Frame::Open(Open { id: s.some_id(), target: target(s), on_screen: s.flag() }),
        0x0c => Frame::Opened(Opened {
            id: s.id(),
            conversation: s.id(),
            class: class(s),
            name: s.text(128),
            peer: s.id(),
            head: s.id(),
            count: s.wide(),
            low: s.id(),
            joined: s.id(),
            read: s.id(),
            last_pseq: s.id(),
        }),
        0x0e => Frame::Send(send(s)),
        0x10 => Frame::SendAck(send_ack(s)),
        0x12 => Frame::SendRefused(SendRefused {
            conversation: s.id(),
            pseq: s.some_id(),
            code: refusal(s),
            expected: s.id(),
            retry_after_ms: s.narrow(),
        }),
        0x14 => Frame::Deliver(deliver(s)),
        0x16 => Frame::Block(block(s)),
        0x18 => Frame::Heads(Heads {
            entries: s.list(256, |s| Head {
                conversation: s.id(),
                head: s.id(),
                count: s.varint(),
                low: s.id(),
            }),
        }),
        0x1a => Frame::Ack(Ack { entries: s.list(256, |s| (s.id(), s.id())) }),
        0x1c => Frame::Mark(Mark { conversation: s.id(), read: s.id() }),
        0x1d => Frame::Receipts(Receipts {
            entries: s.list(256, |s| Receipt {
                conversation: s.id(),
                user: s.id(),
                recv: s.id(),
                read: s.id(),
            }),
        }),
        0x1e => Frame::Pull(Pull {
            id: s.some_id(),
            conversation: s.id(),
            from: s.id(),
            to: s.id(),
            limit: 1 + s.narrow() % 4096,
            newest: s.flag(),
        }),
        0x20 => Frame::Call(Call {
            service: s.id(),
            method: s.narrow(),
            id: s.id(),
            deadline_ms: s.narrow(),
            body: s.payload(4032),
        }),
        0x22 => {
            let status = match s.below(2) {
                0 => CallStatus::Ok,
                _ => CallStatus::Refused(refusal(s)),
            };
            Frame::Reply(Reply { id: s.id(), status, body: s.payload(4032) })
        }
        0x25 => Frame::Event(event(s)),
        0x28 => Frame::Pong(Pong { id: s.varint(), time_ms: s.varint(), server_time: s.id() }),
        0x2a => Frame::Goaway(Goaway {
            code: CloseCode::from_code(s.narrow()),
            deadline_ms: s.narrow(),
            spread_ms: s.narrow(),
            addresses: s.list(8, |s| s.text(128)),
            text: s.text(512),
        }),
        0x2c => Frame::Kicked(Kicked { class_epoch: s.id(), by: s.text(512), time: s.id() }),
        0x2e => Frame::Error(Error {
            code: refusal(s),
            refers: s.id(),
            retry: match s.below(4) {
                0 => Retry::Never,
                1 => Retry::Same,
                2 => Retry::OtherNode,
                _ => Retry::AfterAuth,
            },
            retry_after_ms: s.narrow(),
            text: s.text(512),
        }),
        _ => Frame::Ping(Ping {
            id: s.varint(),
            time_ms: s.varint(),
            flags: s.varint(),
            padding: u16::from(s.byte()),
        }),
    }
}

/// Where a frame may come from: every (side, channel) the table allows.
pub(crate) fn allowed(frame: &Frame) -> Vec<(Side, Channel)> {
    everywhere().filter(|(side, channel)| frame.check_channel(*side, *channel).is_ok()).collect()
}

/// Every (side, channel).
pub(crate) fn everywhere() -> impl Iterator<Item = (Side, Channel)> {
    const CHANNELS: [Channel; 5] =
        [Channel::Control, Channel::Uplink, Channel::Lane(1), Channel::Backlog, Channel::Datagram];
    [Side::Client, Side::Gateway].into_iter().flat_map(|side| CHANNELS.map(|channel| (side, channel)))
}

fn refusal(s: &mut Source<'_>) -> RefusalCode {
    match s.below(2) {
        0 => RefusalCode::ALL.get(s.below(RefusalCode::ALL.len())).copied().unwrap_or(RefusalCode::Busy),
        _ => RefusalCode::from_code(s.narrow().max(1)),
    }
}

fn hello(s: &mut Source<'_>) -> Hello {
    Hello {
        minor: s.byte(),
        features: s.wide(),
        auth: if s.flag() {
            AuthProof::Token(s.text(2048))
        } else {
            AuthProof::Ticket(Bytes8(s.payload(256).to_vec()))
        },
        device: DeviceUid(core::array::from_fn(|_| s.byte())),
        class: match s.below(5) {
            0 => DeviceClass::Phone,
            1 => DeviceClass::Tablet,
            2 => DeviceClass::Desktop,
            3 => DeviceClass::Web,
            _ => DeviceClass::Bot,
        },
        epoch: s.id(),
        cursor_digest: s.wide(),
        changed: s.list(256, |s| (s.id(), s.id())),
        network: NetworkHint {
            kind: match s.below(4) {
                0 => NetworkKind::Unknown,
                1 => NetworkKind::Wifi,
                2 => NetworkKind::Cellular,
                _ => NetworkKind::Wired,
            },
            rtt_ms: s.narrow(),
        },
    }
}

/// Any WELCOME.
pub(crate) fn welcome(s: &mut Source<'_>) -> Welcome {
    Welcome {
        minor: s.byte(),
        features: s.wide(),
        session: s.id(),
        ticket: Bytes8(s.payload(256).to_vec()),
        user: s.id(),
        device: s.id(),
        epoch: s.id(),
        class_epoch: s.id(),
        server_time: s.id(),
        lanes: 1 + s.byte() % LANES_MAX,
        limits: Limits {
            send_payload_bytes: s.narrow(),
            inflight_per_conversation: u16::from(s.byte()),
            inflight_per_producer: u16::from(s.byte()),
            calls_inflight: u16::from(s.byte()),
        },
        keepalive_ms: (s.narrow(), s.narrow()),
        resumption: match s.below(3) {
            0 => Resumption::Resumed,
            1 => Resumption::NeedCursors,
            _ => Resumption::Fresh,
        },
        addresses: s.list(8, |s| s.text(128)),
        folder: (s.below(2) == 1).then(|| FolderId([s.byte(); 16])),
    }
}

fn class(s: &mut Source<'_>) -> ConversationClass {
    match s.below(3) {
        0 => ConversationClass::Group,
        1 => ConversationClass::Direct,
        _ => ConversationClass::Broadcast,
    }
}

fn target(s: &mut Source<'_>) -> OpenTarget {
    match s.below(4) {
        0 => OpenTarget::Number(s.id()),
        1 => OpenTarget::Direct(s.text(128)),
        2 => OpenTarget::Broadcast(s.text(128)),
        _ => OpenTarget::Group(s.text(128)),
    }
}

/// Any SEND.
pub(crate) fn send(s: &mut Source<'_>) -> Send {
    let sendable: Vec<RecordKind> = RecordKind::ALL.into_iter().filter(|kind| kind.sendable()).collect();
    Send {
        kind: sendable.get(s.below(sendable.len())).copied().unwrap_or_default(),
        conversation: s.id(),
        pseq: s.some_id(),
        seen: s.id(),
        reference: s.flag().then(|| s.id()),
        ttl: s.flag().then(|| s.narrow()),
        more: s.flag(),
        continues: s.flag(),
        silent: s.flag(),
        cancel: s.flag(),
        payload: s.payload(SEND_PAYLOAD_BYTES_MAX),
    }
}

fn send_ack(s: &mut Source<'_>) -> SendAck {
    let runs = s.list(256, |s| AckRun { count: 1 + s.narrow() % 300, base: s.id() });
    let covered: u64 = runs.iter().map(|run| u64::from(run.count)).sum();
    SendAck {
        conversation: s.id(),
        up_to: Pseq::new(s.varint().max(covered)).expect("a varint"),
        time: s.id(),
        runs,
    }
}

/// Any EVENT.
pub(crate) fn event(s: &mut Source<'_>) -> Event {
    Event {
        conversation: s.id(),
        kind: match s.below(3) {
            0 => EventKind::Typing,
            1 => EventKind::Presence,
            _ => EventKind::Custom(s.narrow().max(16)),
        },
        sender: s.id(),
        number: s.varint(),
        ttl_ms: s.narrow(),
        payload: s.payload(EVENT_PAYLOAD_BYTES_MAX),
    }
}

/// Any DELIVER.
pub(crate) fn deliver(s: &mut Source<'_>) -> Deliver {
    let time = if s.flag() { WireTime::Full(s.id()) } else { WireTime::Short(s.narrow() % (1 << 30)) };
    record(s, time)
}

fn record(s: &mut Source<'_>, time: WireTime) -> Deliver {
    Deliver {
        kind: RecordKind::ALL.get(s.below(8)).copied().unwrap_or_default(),
        conversation: s.id(),
        seq: s.some_id(),
        sender: s.id(),
        time,
        origin: s.flag().then(|| Origin { device: s.id(), epoch: s.id(), pseq: s.id() }),
        reference: s.flag().then(|| s.id()),
        ttl: s.flag().then(|| s.narrow()),
        more: s.flag(),
        continues: s.flag(),
        silent: s.flag(),
        payload: s.payload(SEND_PAYLOAD_BYTES_MAX / 8),
    }
}

/// Any BLOCK; it fits its channel.
pub(crate) fn block(s: &mut Source<'_>) -> Block {
    let conversation = s.id();
    let first: Seq = s.some_id();
    // Far from the end of the numbers, so that a whole block fits behind it.
    let first = Seq::new(first.get().min(1 << 60)).expect("fits");
    let mut size = 0;
    let mut records = Vec::new();
    for mut record in s.list(200, |s| {
        let time = UnixMillis::new(1_700_000_000_000 + s.varint() % (1 << 50)).expect("fits");
        record(s, WireTime::Full(time))
    }) {
        size += Block::record_len_max(&record);
        if size + Block::HEADER_LEN_MAX > fulmar_protocol::limit::BLOCK_BYTES_MAX {
            break;
        }
        record.conversation = conversation;
        record.seq = first.saturating_add(records.len() as u64);
        records.push(record);
    }
    Block { pull: s.id(), last: s.flag(), conversation, low: s.id(), head: s.id(), first, records }
}
