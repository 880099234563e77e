//! The bytes of every frame, pinned. Who changes one of these lines changes the protocol.
//!
//! `docs/wire.md` explains the same examples field by field.

use bytes::Bytes;
use fulmar_protocol::{
    close::{CloseCode, RefusalCode, Retry},
    frame::{
        Ack, AckRun, Auth, AuthProof, Block, Bytes8, Call, CallStatus, Channel, ConversationClass, Cursors,
        Decoder, Deliver, Error, Event, EventKind, Frame, Goaway, Head, Heads, Hello, Kicked, Limits, Mark,
        NetworkHint, NetworkKind, Open, OpenTarget, Opened, Origin, Ping, Pong, Pull, Receipt, Receipts,
        RecordKind, Reply, Resumption, Send, SendAck, SendRefused, Welcome, WireTime,
    },
    id::{DeviceClass, DeviceUid, FolderId, UnixMillis},
};

fn n<T: TryFrom<u64>>(number: u64) -> T {
    T::try_from(number).ok().expect("small")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn send() -> Send {
    Send {
        kind: RecordKind::Message,
        conversation: n(300),
        pseq: n(7),
        seen: n(41),
        reference: None,
        ttl: None,
        more: false,
        continues: false,
        silent: false,
        cancel: false,
        payload: Bytes::from_static(b"hi"),
    }
}

fn deliver() -> Deliver {
    Deliver {
        kind: RecordKind::Message,
        conversation: n(300),
        seq: n(42),
        sender: n(513),
        time: WireTime::Short(5),
        origin: None,
        reference: None,
        ttl: None,
        more: false,
        continues: false,
        silent: false,
        payload: Bytes::from_static(b"hi"),
    }
}

/// Name, frame, and its bytes; a space parts the fields.
#[expect(clippy::too_many_lines, reason = "a table")]
fn golden() -> Vec<(&'static str, Frame, &'static str)> {
    let time: UnixMillis = n(1_790_000_000_000);
    let welcome = |folder| {
        Frame::Welcome(Welcome {
            minor: 0,
            features: 5,
            session: n(9),
            ticket: Bytes8(vec![0xee, 0xff]),
            user: n(513),
            device: n(1),
            epoch: n(2),
            class_epoch: n(3),
            server_time: time,
            lanes: 4,
            limits: Limits::default(),
            keepalive_ms: (15_000, 120_000),
            resumption: Resumption::Resumed,
            addresses: vec!["g2:443".to_owned()],
            folder,
        })
    };
    vec![
        (
            "length | type | minor | features 5 | token, 3 bytes | \"jwt\" | device uid | class desktop | epoch 2 | digest | \
             one changed cursor | conversation 300 | seq 41 | Wi-Fi | rtt 60",
            Frame::Hello(Hello {
                minor: 0,
                features: 5,
                auth: AuthProof::Token("jwt".to_owned()),
                device: DeviceUid([0xab; 16]),
                class: DeviceClass::Desktop,
                epoch: n(2),
                cursor_digest: 0x1234,
                changed: vec![(n(300), n(41))],
                network: NetworkHint { kind: NetworkKind::Wifi, rtt_ms: 60 },
            }),
            "22 02 00 05 00 03 6a7774 abababababababababababababababab 02 02 b424 01 ac02 29 01 3c",
        ),
        (
            "the same with a ticket of two bytes",
            Frame::Hello(Hello {
                minor: 0,
                features: 5,
                auth: AuthProof::Ticket(Bytes8(vec![0xee, 0xff])),
                device: DeviceUid([0xab; 16]),
                class: DeviceClass::Phone,
                epoch: n(0),
                cursor_digest: 0,
                changed: Vec::new(),
                network: NetworkHint::default(),
            }),
            "1d 02 00 05 01 02 eeff abababababababababababababababab 00 00 00 00 00 00",
        ),
        (
            "length | type | minor | features | session 9 | ticket | user 513 | device 1 | epoch 2 | class epoch 3 | server time | \
             lanes | limits: payload 16384, 64, 256, 32 | keepalive 15000 to 120000 | resumed | one address",
            welcome(None),
            "28 04 00 05 09 02 eeff 8104 01 02 03 80d8c1a28c34 04 808001 40 8002 20 9875 c0a907 00 01 06 67323a343433",
        ),
        (
            "the same | extension 1: the data folder",
            welcome(Some(FolderId([0xcd; 16]))),
            "3a 04 00 05 09 02 eeff 8104 01 02 03 80d8c1a28c34 04 808001 40 8002 20 9875 c0a907 00 01 06 67323a343433 01 10 cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd",
        ),
        ("length | type | token", Frame::Auth(Auth { token: "jwt".to_owned() }), "05 06 03 6a7774"),
        (
            "length | type | last | two entries | 300: 41 | 556: 1",
            Frame::Cursors(Cursors { last: true, entries: vec![(n(300), n(41)), (n(556), n(1))] }),
            "09 08 01 02 412c 29 422c 01",
        ),
        (
            "length | type | id 1 | direct | \"bob\" | on screen",
            Frame::Open(Open { id: n(1), target: OpenTarget::Direct("bob".to_owned()), on_screen: true }),
            "08 0a 01 01 03 626f62 01",
        ),
        (
            "length | type | id 2 | broadcast | \"news\" | not on screen",
            Frame::Open(Open {
                id: n(2),
                target: OpenTarget::Broadcast("news".to_owned()),
                on_screen: false,
            }),
            "09 0a 02 03 04 6e657773 00",
        ),
        (
            "length | type | id 1 | conversation 300 | direct | \"bob\" | peer 770 | head 42 | count 40 | low 1 | joined 1 | read 41 | last pseq 7",
            Frame::Opened(Opened {
                id: n(1),
                conversation: n(300),
                class: ConversationClass::Direct,
                name: "bob".to_owned(),
                peer: n(770),
                head: n(42),
                count: 40,
                low: n(1),
                joined: n(1),
                read: n(41),
                last_pseq: n(7),
            }),
            "11 0c 01 ac02 01 03 626f62 8206 2a 28 01 01 29 07",
        ),
        (
            "length | type | flags | conversation 300 | pseq 7 | seen 41 | \"hi\"",
            Frame::Send(send()),
            "08 0e 00 412c 07 29 6869",
        ),
        (
            "length | type | flags: kind, reference, ttl, more, silent | conversation | pseq | seen | edit | reference 40 | ttl 60 | \"hi\"",
            Frame::Send(Send {
                kind: RecordKind::Edit,
                reference: Some(n(40)),
                ttl: Some(60),
                more: true,
                silent: true,
                ..send()
            }),
            "0b 0e 1f 412c 07 29 01 28 3c 6869",
        ),
        (
            "length | type | flags: more, continues | conversation | pseq | seen | \"hi\"",
            Frame::Send(Send { more: true, continues: true, ..send() }),
            "09 0e 4048 412c 07 29 6869",
        ),
        (
            "length | type | flag: cancel | conversation | pseq | seen",
            Frame::Send(Send { cancel: true, payload: Bytes::new(), ..send() }),
            "06 0e 20 412c 07 29",
        ),
        (
            "length | type | conversation 300 | up to 9 | time | two runs | 2 from 42 | 1 without a record",
            Frame::SendAck(SendAck {
                conversation: n(300),
                up_to: n(9),
                time,
                runs: vec![AckRun { count: 2, base: n(42) }, AckRun { count: 1, base: n(0) }],
            }),
            "11 10 412c 09 c00001a0c4506c00 02 02 2a 01 00",
        ),
        (
            "length | type | conversation 300 | pseq 7 | not a member | expected 8 | retry after 0",
            Frame::SendRefused(SendRefused {
                conversation: n(300),
                pseq: n(7),
                code: RefusalCode::NotAMember,
                expected: n(8),
                retry_after_ms: 0,
            }),
            "07 12 ac02 07 02 08 00",
        ),
        (
            "length | type | flags | conversation 300 | seq 42 | sender 513 | time 5 | \"hi\"",
            Frame::Deliver(deliver()),
            "0a 14 00 412c 2a 4201 05 6869",
        ),
        (
            "length | type | flags: origin, reference, full time, kind, ttl | conversation | seq | sender | time | reaction | \
             device 1, epoch 2, pseq 7 | reference 40 | ttl 60 | \"hi\"",
            Frame::Deliver(Deliver {
                kind: RecordKind::Reaction,
                time: WireTime::Full(time),
                origin: Some(Origin { device: n(1), epoch: n(2), pseq: n(7) }),
                reference: Some(n(40)),
                ttl: Some(60),
                ..deliver()
            }),
            "17 14 2f 412c 2a 4201 c00001a0c4506c00 03 010207 28 3c 6869",
        ),
        (
            "length | type | flags: origin, more, continues | conversation 300 | seq 42 | sender 513 | time 5 | device 1, epoch 2, pseq 7 | \"hi\"",
            Frame::Deliver(Deliver {
                origin: Some(Origin { device: n(1), epoch: n(2), pseq: n(7) }),
                more: true,
                continues: true,
                ..deliver()
            }),
            "0e 14 4091 412c 2a 4201 05 010207 6869",
        ),
        (
            "length | type | pull 3 | flag: last | conversation 300 | low 1 | head 43 | first 42 | base time | two records | \
             length 6: flags, sender 513, delta 0, \"hi\" | length 8: flag origin, sender, delta +1000 ms, device 1, epoch 2, pseq 7",
            Frame::Block(Block {
                pull: n(3),
                last: true,
                conversation: n(300),
                low: n(1),
                head: n(43),
                first: n(42),
                records: vec![
                    Deliver { time: WireTime::Full(time), ..deliver() },
                    Deliver {
                        seq: n(43),
                        time: WireTime::Full(n(time.get() + 1_000)),
                        origin: Some(Origin { device: n(1), epoch: n(2), pseq: n(7) }),
                        payload: Bytes::new(),
                        ..deliver()
                    },
                ],
            }),
            "21 16 03 01 412c 01 2b 2a c00001a0c4506c00 02 06 00 4201 00 6869 08 01 4201 47d0 010207",
        ),
        (
            "length | type | one entry | conversation 300 | head 42 | count 40 | low 1",
            Frame::Heads(Heads {
                entries: vec![Head { conversation: n(300), head: n(42), count: 40, low: n(1) }],
            }),
            "07 18 01 412c 2a 28 01",
        ),
        (
            "length | type | one entry | 300: 42",
            Frame::Ack(Ack { entries: vec![(n(300), n(42))] }),
            "05 1a 01 412c 2a",
        ),
        (
            "length | type | conversation 300 | read 42",
            Frame::Mark(Mark { conversation: n(300), read: n(42) }),
            "04 1c 412c 2a",
        ),
        (
            "length | type | one entry | conversation 300 | user 770 | received 42 | read 41",
            Frame::Receipts(Receipts {
                entries: vec![Receipt { conversation: n(300), user: n(770), recv: n(42), read: n(41) }],
            }),
            "08 1d 01 412c 4302 2a 29",
        ),
        (
            "length | type | id 3 | conversation 300 | from 1 | to 42 | limit 50 | newest",
            Frame::Pull(Pull {
                id: n(3),
                conversation: n(300),
                from: n(1),
                to: n(42),
                limit: 50,
                newest: true,
            }),
            "08 1e 03 412c 01 2a 32 01",
        ),
        (
            "length | type | service 0 | method 5 | id 4 | deadline 5000 | body",
            Frame::Call(Call {
                service: n(0),
                method: 5,
                id: n(4),
                deadline_ms: 5_000,
                body: Bytes::from_static(&[0]),
            }),
            "07 20 00 05 04 5388 00",
        ),
        (
            "length | type | id 4 | ok | body",
            Frame::Reply(Reply { id: n(4), status: CallStatus::Ok, body: Bytes::from_static(&[0, 0]) }),
            "05 22 04 00 0000",
        ),
        (
            "length | type | id 4 | not allowed | a text",
            Frame::Reply(Reply {
                id: n(4),
                status: CallStatus::Refused(RefusalCode::NotAllowed),
                body: Bytes::from_static(b"no"),
            }),
            "05 22 04 03 6e6f",
        ),
        (
            "length | type | conversation 300 | typing | sender 0 | number 1 | ttl 6000",
            Frame::Event(Event {
                conversation: n(300),
                kind: EventKind::Typing,
                sender: n(0),
                number: 1,
                ttl_ms: 6_000,
                payload: Bytes::new(),
            }),
            "08 25 412c 01 00 01 5770",
        ),
        (
            "length | type | id 1 | time 1000 | flag: nudge",
            Frame::Ping(Ping { id: 1, time_ms: 1_000, flags: 1, padding: 0 }),
            "05 26 01 43e8 01",
        ),
        (
            "length | type | id 2 | time 1000 | flag: nudge | three bytes of padding",
            Frame::Ping(Ping { id: 2, time_ms: 1_000, flags: 1, padding: 3 }),
            "08 26 02 43e8 01 000000",
        ),
        (
            "length | type | id 1 | time 1000 | server time",
            Frame::Pong(Pong { id: 1, time_ms: 1_000, server_time: time }),
            "0c 28 01 43e8 c00001a0c4506c00",
        ),
        (
            "length | type | draining | deadline 20000 | spread 5000 | one address | a text",
            Frame::Goaway(Goaway {
                code: CloseCode::Draining,
                deadline_ms: 20_000,
                spread_ms: 5_000,
                addresses: vec!["g2:443".to_owned()],
                text: "bye".to_owned(),
            }),
            "13 2a 01 a09c01 8827 01 06 67323a343433 03 627965",
        ),
        (
            "length | type | class epoch 4 | by | time",
            Frame::Kicked(Kicked { class_epoch: n(4), by: "phone".to_owned(), time }),
            "0e 2c 04 05 70686f6e65 80d8c1a28c34",
        ),
        (
            "length | type | unknown conversation | refers to 1 | never | retry after 0 | a text",
            Frame::Error(Error {
                code: RefusalCode::UnknownConversation,
                refers: n(1),
                retry: Retry::Never,
                retry_after_ms: 0,
                text: "no".to_owned(),
            }),
            "08 2e 01 01 00 00 02 6e6f",
        ),
    ]
}

#[test]
fn bytes_are_pinned() {
    let mut wrong = String::new();
    for (fields, frame, want) in golden() {
        let bytes = frame.to_bytes();
        if hex(&bytes) != want.replace(' ', "") {
            wrong.push_str(&format!("{}: {fields}\n  is   {}\n  want {want}\n", frame.name(), hex(&bytes)));
        }
        let mut decoder = Decoder::new(usize::MAX);
        decoder.push(bytes);
        assert_eq!(decoder.next(), Ok(Some(frame)));
    }
    assert!(wrong.is_empty(), "\n{wrong}");
}

#[test]
fn every_frame_has_a_golden_sample() {
    let sampled: Vec<u64> = golden().iter().map(|(_, frame, _)| frame.number()).collect();
    for (number, name, _) in Frame::TABLE {
        assert!(sampled.contains(number), "{name} has no sample");
    }
}

#[test]
fn stream_headers_are_pinned() {
    for (channel, want) in [
        (Channel::Control, "0000"),
        (Channel::Uplink, "0100"),
        (Channel::Lane(3), "0203"),
        (Channel::Backlog, "0300"),
    ] {
        let mut out = Vec::new();
        channel.header().unwrap().encode(&mut out);
        assert_eq!(hex(&out), want);
    }
}

/// Ordinary numbers: the millionth conversation and user of a shard, ten thousandth message.
#[test]
fn headers_are_as_small_as_promised() {
    let payload = Bytes::from(vec![b'x'; 100]);
    let send = Frame::Send(Send {
        conversation: n(1_000_000 * 256 + 7),
        pseq: n(9_999),
        seen: n(9_999),
        payload: payload.clone(),
        ..send()
    });
    assert!(send.encoded_len() - 100 <= 14, "SEND header is {}", send.encoded_len() - 100);
    let deliver = Frame::Deliver(Deliver {
        conversation: n(1_000_000 * 256 + 7),
        seq: n(9_999),
        sender: n(1_000_000 * 256 + 7),
        time: WireTime::short(n(1_790_000_000_000)),
        payload,
        ..deliver()
    });
    assert!(deliver.encoded_len() - 100 <= 18, "DELIVER header is {}", deliver.encoded_len() - 100);
}

/// The page for those who write their own client says the same.
#[test]
fn the_page_on_the_wire_shows_these_bytes() {
    let page = include_str!("../../docs/wire.md");
    for (_, frame, want) in golden() {
        assert!(page.contains(want), "docs/wire.md lacks {} {want}", frame.name());
    }
    for (number, name, _) in Frame::TABLE {
        let row = page.lines().find(|line| line.starts_with(&format!("| {number:02x} |")));
        let shown = row.map(|row| row.to_lowercase().replace('_', ""));
        assert!(
            shown.is_some_and(|row| row.contains(&name.to_lowercase())),
            "docs/wire.md lacks a row of {name}"
        );
    }
}

/// Prints the samples, for fuzz seeds: `cargo test -p fulmar-protocol -- --ignored samples --nocapture`.
#[test]
#[ignore = "prints"]
fn samples() {
    for (fields, frame, _) in golden() {
        println!("{}\t{}\t{fields}", frame.name(), hex(&frame.to_bytes()));
    }
}
