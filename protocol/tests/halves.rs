//! Each half by itself, on the rules that are easy to get wrong.

use core::time::Duration;

use bytes::Bytes;
use fulmar_protocol::{
    close::{CloseCode, RefusalCode},
    error::Violation,
    frame::{
        Ack, AckRun, AuthProof, CallStatus, Channel, Deliver, Error, Frame, Goaway, Hello, Kicked, Limits,
        NetworkHint, OpenTarget, Origin, Ping, Pong, RecordKind, Resumption, Send, SendAck, SendRefused,
        Welcome, WireTime,
    },
    id::{DeviceClass, DeviceUid, Epoch, UnixMillis},
    limit::{FIRST_FLIGHT_FRAMES_MAX, FIRST_FLIGHT_SENDS_MAX},
    session::{
        client::{self, Client, ClientConfig, Restored},
        gateway::{self, Gateway, GatewayConfig},
        state::{ClientState, GatewayState},
    },
    version::Features,
};

const NOW: Duration = Duration::from_secs(10);
const TIME: u64 = 1_790_000_000_000;

fn n<T: TryFrom<u64>>(number: u64) -> T {
    T::try_from(number).ok().expect("small")
}

fn hello(epoch: u64) -> Hello {
    Hello {
        minor: 0,
        features: 0,
        auth: AuthProof::Token("t".to_owned()),
        device: DeviceUid([1; 16]),
        class: DeviceClass::Phone,
        epoch: n(epoch),
        cursor_digest: 0,
        changed: Vec::new(),
        network: NetworkHint::default(),
    }
}

fn welcome(epoch: u64, resumption: Resumption) -> Welcome {
    Welcome {
        minor: 0,
        features: 0,
        session: n(1),
        ticket: Default::default(),
        user: n(257),
        device: n(1),
        epoch: n(epoch),
        class_epoch: n(1),
        server_time: n(TIME),
        lanes: 4,
        limits: Limits::default(),
        keepalive_ms: (15_000, 120_000),
        resumption,
        addresses: Vec::new(),
        folder: None,
    }
}

fn send(pseq: u64) -> Send {
    Send {
        kind: RecordKind::Message,
        conversation: n(300),
        pseq: n(pseq),
        seen: n(0),
        reference: None,
        ttl: None,
        more: false,
        continues: false,
        silent: false,
        cancel: false,
        payload: Bytes::from_static(b"hi"),
    }
}

fn deliver(seq: u64, origin: Option<Origin>) -> Frame {
    Frame::Deliver(Deliver {
        kind: RecordKind::Message,
        conversation: n(300),
        seq: n(seq),
        sender: n(257),
        time: WireTime::short(n(TIME)),
        origin,
        reference: None,
        ttl: None,
        more: false,
        continues: false,
        silent: false,
        payload: Bytes::new(),
    })
}

fn said(half: &mut Gateway) -> Vec<gateway::Output> {
    core::iter::from_fn(|| half.poll_output()).collect()
}

fn put_out(half: &mut Client) -> Vec<client::Output> {
    core::iter::from_fn(|| half.poll_output()).collect()
}

/// Names of the frames a half transmits.
fn left(half: &mut Client) -> Vec<&'static str> {
    put_out(half)
        .iter()
        .filter_map(|output| match output {
            client::Output::Transmit(_, frame) => Some(frame.name()),
            _ => None,
        })
        .collect()
}

fn client(restored: Restored) -> Client {
    Client::new(ClientConfig::new(DeviceUid([1; 16]), DeviceClass::Phone), restored)
}

fn connect(half: &mut Client) {
    half.connect(AuthProof::Token("t".to_owned()), NetworkHint::default(), NOW);
}

fn take(half: &mut Client, frame: Frame) {
    half.handle(Channel::Control, frame, NOW).unwrap();
}

/// A client under epoch 1, welcomed, with nothing to say.
fn live() -> Client {
    let mut half = client(Restored { epoch: Epoch::FIRST, device: Some(n(1)), ..Restored::default() });
    connect(&mut half);
    take(&mut half, Frame::Welcome(welcome(1, Resumption::Resumed)));
    put_out(&mut half);
    half
}

// ---- The gateway's half ----

#[test]
fn a_first_flight_waits_for_the_drivers_verdict_and_comes_out_in_order() {
    let mut half = Gateway::new(GatewayConfig::default(), NOW);
    half.handle(Channel::Uplink, Frame::Send(send(1)), NOW).unwrap();
    half.handle(Channel::Control, Frame::Hello(hello(1)), NOW).unwrap();
    half.handle(Channel::Uplink, Frame::Send(send(2)), NOW).unwrap();
    half.handle(Channel::Control, Frame::Ack(Ack { entries: Vec::new() }), NOW).unwrap();
    let out = said(&mut half);
    assert!(
        matches!(&out[..], [gateway::Output::Authenticate(hello)] if hello.epoch == Epoch::FIRST),
        "{out:?}"
    );
    half.welcome(welcome(1, Resumption::Resumed), NOW);
    let out = said(&mut half);
    assert!(
        matches!(
            &out[..],
            [
                gateway::Output::Transmit(Frame::Welcome(_)),
                gateway::Output::Send(first),
                gateway::Output::Send(second),
                gateway::Output::Ack(_)
            ] if first.pseq.get() == 1 && second.pseq.get() == 2
        ),
        "{out:?}"
    );
}

#[test]
fn a_stranger_makes_the_gateway_hold_no_more_than_a_first_flight() {
    let mut half = Gateway::new(GatewayConfig::default(), NOW);
    for pseq in 0..FIRST_FLIGHT_FRAMES_MAX as u64 {
        half.handle(Channel::Uplink, Frame::Send(send(pseq + 1)), NOW).unwrap();
    }
    let violation = half.handle(Channel::Uplink, Frame::Send(send(999)), NOW).unwrap_err();
    assert_eq!(violation.close_code(), CloseCode::WindowExceeded);
    let mut half = Gateway::new(GatewayConfig::default(), NOW);
    let big = Send { payload: vec![0; 16_000].into(), ..send(1) };
    let refused = (0..5).find(|_| half.handle(Channel::Uplink, Frame::Send(big.clone()), NOW).is_err());
    assert_eq!(refused, Some(3), "48 KiB");
}

#[test]
fn what_may_not_be_replayed_waits_for_the_welcome() {
    let mut half = Gateway::new(GatewayConfig::default(), NOW);
    half.handle(Channel::Control, Frame::Hello(hello(1)), NOW).unwrap();
    let ping = Frame::Ping(Ping { id: 1, time_ms: 0, flags: 0, padding: 0 });
    let violation = half.handle(Channel::Control, ping, NOW).unwrap_err();
    assert_eq!(violation, Violation::OutOfState { frame: "Ping", state: "authenticating" });
    assert!(matches!(
        said(&mut half).last(),
        Some(gateway::Output::Close { code: CloseCode::OutOfState, .. })
    ));
    assert_eq!(half.state(), GatewayState::Closed);
}

/// A gateway that has welcomed a client of this epoch under epoch 2.
fn active(epoch: u64) -> Gateway {
    let mut half = Gateway::new(GatewayConfig::default(), NOW);
    half.handle(Channel::Control, Frame::Hello(hello(epoch)), NOW).unwrap();
    half.welcome(welcome(2, Resumption::Resumed), NOW);
    said(&mut half);
    half
}

#[test]
fn sends_of_another_epoch_are_dropped() {
    for (epoch, want) in [(2, 1), (1, 0), (0, 1)] {
        let mut half = active(epoch);
        half.handle(Channel::Uplink, Frame::Send(send(1)), NOW).unwrap();
        assert_eq!(said(&mut half).len(), want, "HELLO under {epoch}, WELCOME under 2");
    }
}

#[test]
fn acks_between_two_polls_leave_together_and_after_what_was_refused_before_them() {
    let mut half = active(2);
    for pseq in 1..=4 {
        half.acked(n(300), n(pseq), n(10 + pseq), n(TIME));
    }
    let refused = SendRefused {
        conversation: n(300),
        pseq: n(5),
        code: RefusalCode::NotAMember,
        expected: n(6),
        retry_after_ms: 0,
    };
    half.refused(refused);
    half.acked(n(300), n(6), n(15), n(TIME));
    let ack = |up_to, count, base| {
        gateway::Output::Transmit(Frame::SendAck(SendAck {
            conversation: n(300),
            up_to: n(up_to),
            time: n(TIME),
            runs: vec![AckRun { count, base: n(base) }],
        }))
    };
    let refused = gateway::Output::Transmit(Frame::SendRefused(refused));
    assert_eq!(said(&mut half), [ack(4, 4, 11), refused, ack(6, 1, 15)]);
}

#[test]
fn the_answer_to_a_copy_leaves_in_a_datagram_too() {
    let mut half = active(2);
    half.handle(Channel::Datagram, Frame::Send(send(1)), NOW).unwrap();
    half.handle(Channel::Uplink, Frame::Send(send(1)), NOW).unwrap();
    assert_eq!(said(&mut half), [gateway::Output::Send(send(1)), gateway::Output::Send(send(1))]);
    half.acked(n(300), n(1), n(9), n(TIME));
    half.acked(n(300), n(1), n(9), n(TIME));
    let frame = Frame::SendAck(ack(1, 9));
    let want = [gateway::Output::Datagram(frame.clone()), gateway::Output::Transmit(frame)];
    assert_eq!(said(&mut half), want, "once each");
    // What has no record may have been refused: the control stream says why.
    half.handle(Channel::Datagram, Frame::Send(send(2)), NOW).unwrap();
    half.acked(n(300), n(2), n(0), n(TIME));
    assert_eq!(
        said(&mut half),
        [gateway::Output::Send(send(2)), gateway::Output::Transmit(Frame::SendAck(ack(2, 0)))]
    );
}

#[test]
fn a_pong_follows_what_came_before_its_ping() {
    let mut half = active(2);
    half.handle(Channel::Control, Frame::Ack(Ack { entries: vec![(n(300), n(4))] }), NOW).unwrap();
    let later = NOW + Duration::from_millis(1_500);
    half.handle(Channel::Control, Frame::Ping(Ping { id: 7, time_ms: 3, flags: 1, padding: 0 }), later)
        .unwrap();
    let out = said(&mut half);
    let pong = Pong { id: 7, time_ms: 3, server_time: n(TIME + 1_500) };
    assert!(matches!(&out[0], gateway::Output::Ack(_)), "{out:?}");
    assert_eq!(out[1..], [gateway::Output::Transmit(Frame::Pong(pong)), gateway::Output::Flush]);
}

#[test]
fn silence_a_missing_hello_and_a_drain_end() {
    for (step, want) in [(0, CloseCode::HelloTimeout), (1, CloseCode::IdleTimeout), (2, CloseCode::Draining)]
    {
        let mut half = if step == 0 { Gateway::new(GatewayConfig::default(), NOW) } else { active(2) };
        if step == 2 {
            let goaway = Goaway {
                code: CloseCode::Draining,
                deadline_ms: 5_000,
                spread_ms: 0,
                addresses: Vec::new(),
                text: String::new(),
            };
            half.drain(goaway, NOW);
            half.handle(Channel::Uplink, Frame::Send(send(1)), NOW).unwrap();
        }
        let at = half.poll_timeout().unwrap();
        half.handle_timeout(at - Duration::from_millis(1));
        assert_ne!(half.state(), GatewayState::Closed);
        half.handle_timeout(at);
        let out = said(&mut half);
        assert!(matches!(out.last(), Some(gateway::Output::Close { code, .. }) if *code == want), "{out:?}");
        assert_eq!(half.poll_timeout(), None);
    }
}

#[test]
fn the_refused_and_the_kicked_are_told_before_the_close() {
    let mut half = Gateway::new(GatewayConfig::default(), NOW);
    half.handle(Channel::Control, Frame::Hello(hello(0)), NOW).unwrap();
    said(&mut half);
    let code = RefusalCode::TokenExpired;
    let error = Error { code, refers: n(0), retry: code.retry(), retry_after_ms: 0, text: "old".to_owned() };
    half.reject(error, CloseCode::AuthFailed, NOW);
    let out = said(&mut half);
    assert!(
        matches!(
            &out[..],
            [
                gateway::Output::Transmit(Frame::Error(_)),
                gateway::Output::Close { code: CloseCode::AuthFailed, .. }
            ]
        ),
        "{out:?}"
    );
    let mut half = active(2);
    half.acked(n(300), n(1), n(1), n(TIME));
    half.kick(Kicked { class_epoch: n(2), by: "phone".to_owned(), time: n(TIME) });
    let names: Vec<_> = said(&mut half)
        .into_iter()
        .map(|output| if let gateway::Output::Transmit(frame) = output { frame.name() } else { "close" })
        .collect();
    assert_eq!(names, ["SendAck", "Kicked", "close"]);
}

// ---- The client's half ----

#[test]
fn a_first_flight_is_bounded_and_the_rest_follows_the_welcome() {
    let unacked = (1..=50).map(send).collect();
    let mut half = client(Restored { epoch: Epoch::FIRST, unacked, ..Restored::default() });
    connect(&mut half);
    half.call(n(0), 1, Bytes::new(), Duration::ZERO, NOW);
    let first = left(&mut half);
    assert_eq!(first[0], "Hello");
    assert_eq!(first[1..].iter().filter(|name| **name == "Send").count(), FIRST_FLIGHT_SENDS_MAX);
    assert_eq!(first.len(), 1 + FIRST_FLIGHT_SENDS_MAX, "no call before the WELCOME");
    take(&mut half, Frame::Welcome(welcome(1, Resumption::Resumed)));
    let second = left(&mut half);
    assert_eq!(second.iter().filter(|name| **name == "Send").count(), 50 - FIRST_FLIGHT_SENDS_MAX);
    assert!(second.contains(&"Call"));
}

#[test]
fn a_session_goes_over_to_a_connection_on_which_its_first_flight_was_said_before() {
    let mut half = live();
    for pseq in 1..=3 {
        half.send(send(pseq), NOW).unwrap();
    }
    assert_eq!(left(&mut half), ["Send", "Send", "Send"]);
    let flight = half.prepare(AuthProof::ticket(&[1]), NetworkHint::default());
    let names: Vec<_> = flight.iter().map(|(_, frame)| frame.name()).collect();
    assert_eq!(names, ["Hello", "Send", "Send", "Send"]);
    assert_eq!((put_out(&mut half), half.phase()), (Vec::new(), ClientState::Live), "nothing changes by it");
    // Meanwhile, on the connection there is: one is answered, one taken back, one new.
    take(&mut half, Frame::SendAck(ack(1, 7)));
    half.send(Send { cancel: true, payload: Bytes::new(), ..send(2) }, NOW).unwrap();
    half.send(send(4), NOW).unwrap();
    put_out(&mut half);
    half.switch(&flight, NOW);
    let said: Vec<_> = put_out(&mut half)
        .into_iter()
        .filter_map(|output| match output {
            client::Output::Transmit(_, Frame::Send(send)) => Some((send.pseq.get(), send.cancel)),
            _ => None,
        })
        .collect();
    assert_eq!(said, [(2, true), (4, false)], "what was not said");
    take(&mut half, Frame::Welcome(welcome(1, Resumption::Resumed)));
    take(&mut half, Frame::SendAck(SendAck { up_to: n(4), ..ack(1, 7) }));
    assert!(half.phase() == ClientState::Live, "all of it had left");
}

#[test]
fn without_an_epoch_nothing_is_sent_before_the_welcome() {
    let mut half = client(Restored { unacked: vec![send(1)], ..Restored::default() });
    connect(&mut half);
    assert_eq!(left(&mut half), ["Hello"]);
    take(&mut half, Frame::Welcome(welcome(5, Resumption::Fresh)));
    let out = put_out(&mut half);
    assert!(
        out.contains(&client::Output::NewEpoch { epoch: n(5), unsettled: Vec::new(), folder: None }),
        "{out:?}"
    );
    assert!(out.contains(&client::Output::Transmit(Channel::Uplink, Frame::Send(send(1)))), "{out:?}");
}

#[test]
fn another_epoch_ends_the_connection_and_forgets_every_send() {
    let mut half = client(Restored { epoch: Epoch::FIRST, unacked: vec![send(4)], ..Restored::default() });
    connect(&mut half);
    put_out(&mut half);
    take(&mut half, Frame::Welcome(welcome(2, Resumption::Resumed)));
    let want = [
        client::Output::NewEpoch { epoch: n(2), unsettled: vec![(n(300), n(4))], folder: None },
        client::Output::Close(CloseCode::Done),
    ];
    assert_eq!(put_out(&mut half), want);
    assert_eq!((half.unacked(), half.phase()), (0, ClientState::Closing));
    half.disconnected(NOW);
    half.send(send(1), NOW).unwrap();
    connect(&mut half);
    assert_eq!(left(&mut half), ["Hello", "Send"]);
}

#[test]
fn an_echo_settles_only_a_send_of_its_own_device_and_epoch() {
    for (device, epoch, pseq, want) in [(1, 1, 1, 0), (2, 1, 1, 1), (1, 9, 1, 1), (1, 1, 2, 1)] {
        let mut half = live();
        half.send(send(1), NOW).unwrap();
        let origin = Origin { device: n(device), epoch: n(epoch), pseq: n(pseq) };
        half.handle(Channel::Lane(0), deliver(1, Some(origin)), NOW).unwrap();
        assert_eq!(half.unacked(), want, "{origin:?}");
    }
}

#[test]
fn a_cursor_is_dirty_until_something_sent_after_its_ack_is_answered() {
    let mut half = live();
    half.handle(Channel::Lane(0), deliver(1, None), NOW).unwrap();
    assert!(left(&mut half).is_empty());
    assert_eq!(half.poll_timeout().map(|at| at > NOW + Duration::from_secs(1)), Some(true), "nothing to ack");
    half.ping(NOW);
    half.committed(n(300), n(1), NOW);
    take(&mut half, Frame::Pong(Pong { id: 1, time_ms: 0, server_time: UnixMillis::default() }));
    assert_eq!(half.dirty().count(), 1, "that PING was before the ACK");
    assert_eq!(left(&mut half), ["Ping", "Ack"]);
    half.ping(NOW);
    take(&mut half, Frame::Pong(Pong { id: 2, time_ms: 0, server_time: UnixMillis::default() }));
    assert_eq!(half.dirty().count(), 0);

    half.committed(n(300), n(2), NOW);
    half.disconnected(NOW);
    put_out(&mut half);
    connect(&mut half);
    let out = put_out(&mut half);
    let client::Output::Transmit(_, Frame::Hello(hello)) = &out[0] else { panic!("{out:?}") };
    assert_eq!(hello.changed, [(n(300), n(2))]);
    take(&mut half, Frame::Welcome(welcome(1, Resumption::Resumed)));
    assert_eq!(half.dirty().count(), 0, "the digests are equal, so the gateway took it");
}

#[test]
fn too_many_changed_cursors_stay_at_home_until_they_are_asked_for() {
    let cursors: Vec<_> = (1..=600).map(|number| (n(256 * number), n(7))).collect();
    let dirty = cursors.iter().map(|(conversation, _)| *conversation).collect();
    let mut half = client(Restored { epoch: Epoch::FIRST, cursors, dirty, ..Restored::default() });
    connect(&mut half);
    let out = put_out(&mut half);
    let client::Output::Transmit(_, Frame::Hello(hello)) = &out[0] else { panic!("{out:?}") };
    assert!(hello.changed.is_empty() && hello.cursor_digest != 0);
    take(&mut half, Frame::Welcome(welcome(1, Resumption::NeedCursors)));
    let (mut entries, mut last) = (0, Vec::new());
    for output in put_out(&mut half) {
        if let client::Output::Transmit(_, Frame::Cursors(cursors)) = output {
            entries += cursors.entries.len();
            last.push(cursors.last);
        }
    }
    assert_eq!((entries, last), (600, vec![false, false, true]));
}

#[test]
fn cursors_that_were_never_told_are_told_first() {
    let mut half = live();
    // Told, but nothing says yet that the gateway has them.
    for number in 1..=600 {
        half.committed(n(256 * number), n(7), NOW);
    }
    half.handle_timeout(NOW + ms(400));
    put_out(&mut half);
    half.committed(n(256 * 601), n(9), NOW + ms(410));
    half.disconnected(NOW + ms(420));
    connect(&mut half);
    let out = put_out(&mut half);
    let client::Output::Transmit(_, Frame::Hello(hello)) = &out[0] else { panic!("{out:?}") };
    assert_eq!(hello.changed.first(), Some(&(n(256 * 601), n(9))));
    assert!(hello.changed.len() > 100 && Frame::Hello(hello.clone()).encoded_len() <= 4_096);
}

#[test]
fn a_lone_record_is_acknowledged_at_once_and_what_keeps_coming_together() {
    let mut half = live();
    let at = |n| NOW + ms(n);
    half.committed(n(300), n(1), NOW);
    assert_eq!(left(&mut half), ["Ack"]);
    half.committed(n(300), n(2), at(10));
    half.committed(n(300), n(16), at(20));
    assert!(left(&mut half).is_empty());
    assert_eq!(half.poll_timeout(), Some(at(100)), "100 ms after the last one");
    half.committed(n(300), n(17), at(30));
    assert_eq!(left(&mut half), ["Ack"], "sixteen records");
    half.committed(n(300), n(18), at(40));
    half.send(send(1), at(50)).unwrap();
    assert_eq!(left(&mut half), ["Ack", "Send"]);
    half.committed(n(300), n(19), at(60));
    half.handle_timeout(at(150));
    assert_eq!(left(&mut half), ["Ack"]);
    half.committed(n(300), n(20), at(250));
    assert_eq!(left(&mut half), ["Ack"], "a pause is over");
}

#[test]
fn what_comes_densely_is_acknowledged_more_rarely() {
    let mut half = live();
    // A record every 40 ms: the first at once, then what came within 100 ms, then within 400 ms; and so on while it lasts.
    let mut acks = Vec::new();
    for number in 1..=35 {
        let now = NOW + ms(40 * number);
        while let Some(at) = half.poll_timeout().filter(|at| *at <= now) {
            half.handle_timeout(at);
            if left(&mut half).contains(&"Ack") {
                acks.push((at - NOW).as_millis());
            }
        }
        half.committed(n(300), n(number), now);
        if left(&mut half).contains(&"Ack") {
            acks.push((now - NOW).as_millis());
        }
    }
    assert_eq!(acks, [40, 140, 540, 940, 1_340]);
    half.handle_timeout(NOW + ms(1_740));
    assert_eq!(left(&mut half), ["Ack"], "of two records");
    half.committed(n(300), n(36), NOW + ms(2_000));
    assert!(left(&mut half).is_empty());
    half.handle_timeout(NOW + ms(2_140));
    assert_eq!(left(&mut half), ["Ack"], "of one");
    half.committed(n(300), n(37), NOW + ms(2_200));
    half.handle_timeout(NOW + ms(2_240));
    assert_eq!(left(&mut half), ["Ack"], "it is over");
    // Many at once are one arrival, and what was not acknowledged on an earlier connection is none.
    half.committed(n(300), n(47), NOW + ms(3_000));
    assert_eq!(left(&mut half), ["Ack"]);
    half.committed(n(300), n(48), NOW + ms(3_050));
    assert_eq!(half.poll_timeout().unwrap(), NOW + ms(3_100));
    half.disconnected(NOW + ms(3_060));
    connect(&mut half);
    take(&mut half, Frame::Welcome(welcome(1, Resumption::Resumed)));
    half.handle_timeout(NOW + ms(3_100));
    left(&mut half);
    half.committed(n(300), n(49), NOW + ms(4_000));
    assert_eq!(left(&mut half), ["Ack"]);
    half.committed(n(300), n(50), NOW + ms(4_010));
    assert_eq!(half.poll_timeout().unwrap(), NOW + ms(4_100));
}

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// A client whose gateway takes copies, and which knows that an answer takes 100 ms.
fn hedging() -> Client {
    let config = ClientConfig {
        initial_rtt: Some(ms(100)),
        ..ClientConfig::new(DeviceUid([1; 16]), DeviceClass::Phone)
    };
    let restored = Restored { epoch: Epoch::FIRST, device: Some(n(1)), ..Restored::default() };
    let mut half = Client::new(config, restored);
    connect(&mut half);
    take(
        &mut half,
        Frame::Welcome(Welcome { features: Features::OURS.0, ..welcome(1, Resumption::Resumed) }),
    );
    put_out(&mut half);
    half
}

/// Frames a half sends in datagrams.
fn datagrams(half: &mut Client) -> Vec<Frame> {
    let datagram = |output| match output {
        client::Output::Transmit(Channel::Datagram, frame) => Some(frame),
        _ => None,
    };
    put_out(half).into_iter().filter_map(datagram).collect()
}

fn ack(pseq: u64, seq: u64) -> SendAck {
    SendAck {
        conversation: n(300),
        up_to: n(pseq),
        time: n(TIME),
        runs: vec![AckRun { count: 1, base: n(seq) }],
    }
}

/// Records a half hands out: their seqs and payloads.
fn handed(half: &mut Client) -> Vec<Deliver> {
    let record = |output| match output {
        client::Output::Deliver(deliver) => Some(deliver),
        _ => None,
    };
    put_out(half).into_iter().filter_map(record).collect()
}

#[test]
fn an_ack_brings_the_own_record_that_was_sent() {
    let mut half = hedging();
    let sent = Send { reference: Some(n(1)), more: true, silent: true, ttl: Some(9), ..send(1) };
    half.send(sent.clone(), NOW).unwrap();
    half.send(send(2), NOW).unwrap();
    half.committed(n(300), n(7), NOW);
    put_out(&mut half);
    // 9 is of somebody else, and not here yet.
    take(
        &mut half,
        Frame::SendAck(SendAck {
            up_to: n(2),
            runs: vec![AckRun { count: 1, base: n(8) }, AckRun { count: 1, base: n(10) }],
            ..ack(1, 8)
        }),
    );
    let own = Deliver {
        kind: RecordKind::Message,
        conversation: n(300),
        seq: n(8),
        sender: n(257),
        time: WireTime::Full(n(TIME)),
        origin: Some(Origin { device: n(1), epoch: n(1), pseq: n(1) }),
        reference: Some(n(1)),
        ttl: Some(9),
        more: true,
        continues: false,
        silent: true,
        payload: sent.payload,
    };
    assert_eq!(handed(&mut half), [own]);
    half.handle(Channel::Lane(0), deliver(9, None), NOW).unwrap();
    let seqs: Vec<u64> = handed(&mut half).iter().map(|record| record.seq.get()).collect();
    assert_eq!(seqs, [9, 10]);
    // The echo that comes all the same (another attempt of the race, a resume) is nothing new.
    let origin = Origin { device: n(1), epoch: n(1), pseq: n(2) };
    half.handle(Channel::Lane(0), deliver(10, Some(origin)), NOW).unwrap();
    assert_eq!(handed(&mut half), []);
}

#[test]
fn own_records_are_acknowledged_when_something_else_leaves() {
    let mut half = hedging();
    half.committed(n(300), n(7), NOW);
    put_out(&mut half);
    for (pseq, seq) in [(1, 8), (2, 9)] {
        half.send(send(pseq), NOW + ms(1_000 * pseq)).unwrap();
        take(&mut half, Frame::SendAck(ack(pseq, seq)));
        put_out(&mut half);
        half.committed(n(300), n(seq), NOW + ms(1_000 * pseq + 100));
        assert_eq!(left(&mut half), [""; 0], "nobody waits for it");
    }
    half.send(send(3), NOW + ms(5_000)).unwrap();
    assert_eq!(left(&mut half), ["Send"]);
    assert_eq!(half.dirty().collect::<Vec<_>>(), [n(300)], "the next HELLO would tell");
    half.handle(Channel::Lane(0), deliver(10, None), NOW).unwrap();
    half.committed(n(300), n(10), NOW + ms(6_000));
    assert_eq!(left(&mut half), ["Ack"], "a record of somebody else is acknowledged at once");
    take(&mut half, Frame::SendAck(ack(3, 11)));
    half.committed(n(300), n(11), NOW + ms(7_000));
    put_out(&mut half);
    half.ping(NOW + ms(9_000));
    assert_eq!(left(&mut half), ["Ack", "Ping"]);
}

#[test]
fn a_send_that_was_taken_back_too_late_is_asked_for() {
    let mut half = hedging();
    half.committed(n(300), n(7), NOW);
    half.send(send(1), NOW).unwrap();
    half.send(Send { cancel: true, payload: Bytes::new(), ..send(1) }, NOW).unwrap();
    put_out(&mut half);
    take(&mut half, Frame::SendAck(ack(1, 8)));
    let said = put_out(&mut half);
    assert!(said.iter().any(|output| matches!(output, client::Output::Acked { .. })), "{said:?}");
    assert!(
        said.iter().any(
            |output| matches!(output, client::Output::Transmit(_, Frame::Pull(pull)) if pull.from == n(8))
        ),
        "{said:?}"
    );
    assert!(!said.iter().any(|output| matches!(output, client::Output::Deliver(_))), "{said:?}");
}

#[test]
fn an_origin_of_another_user_settles_nothing() {
    let mut half = hedging();
    half.send(send(1), NOW).unwrap();
    let origin = Some(Origin { device: n(1), epoch: n(1), pseq: n(1) });
    let Frame::Deliver(piece) = deliver(1, origin) else { unreachable!("a DELIVER") };
    let others = Frame::Deliver(Deliver { sender: n(513), more: true, ..piece });
    half.handle(Channel::Lane(0), others, NOW).unwrap();
    assert_eq!(half.unacked(), 1);
    half.handle(Channel::Lane(0), deliver(2, origin), NOW).unwrap();
    assert_eq!(half.unacked(), 0);
}

#[test]
fn a_lone_send_whose_answer_is_overdue_leaves_twice_more_in_datagrams() {
    let mut half = hedging();
    assert_eq!((half.rtt(), half.overdue_after()), (Some(ms(100)), Some(ms(150))));
    half.send(send(1), NOW).unwrap();
    assert_eq!(datagrams(&mut half), []);
    for (at, want) in
        [(149, vec![]), (150, vec![send(1)]), (299, vec![]), (300, vec![send(1)]), (900, vec![])]
    {
        half.handle_timeout(NOW + ms(at));
        let want: Vec<_> = want.into_iter().map(Frame::Send).collect();
        assert_eq!(datagrams(&mut half), want, "after {at} ms");
    }
    take(&mut half, Frame::SendAck(ack(1, 9)));
    assert_eq!((half.unacked(), half.hedged()), (0, 2));
}

#[test]
fn a_send_is_not_hedged_when_it_was_answered_or_refused_or_the_gateway_or_a_datagram_does_not_take_it() {
    let busy = SendRefused {
        conversation: n(300),
        pseq: n(1),
        code: RefusalCode::Busy,
        expected: n(1),
        retry_after_ms: 5_000,
    };
    let origin = Origin { device: n(1), epoch: n(1), pseq: n(1) };
    let large = Send { payload: vec![0; 1_150].into(), ..send(1) };
    for (send, answer) in [
        (send(1), Some((Channel::Control, Frame::SendAck(ack(1, 9))))),
        (send(1), Some((Channel::Datagram, Frame::SendAck(ack(1, 9))))),
        (send(1), Some((Channel::Control, Frame::SendRefused(busy)))),
        (send(1), Some((Channel::Lane(0), deliver(1, Some(origin))))),
        (large, None),
    ] {
        let mut half = hedging();
        half.send(send, NOW).unwrap();
        let what = format!("{answer:?}");
        if let Some((channel, frame)) = answer {
            half.handle(channel, frame, NOW + ms(100)).unwrap();
        }
        half.handle_timeout(NOW + ms(1_000));
        assert_eq!(datagrams(&mut half), [], "{what}");
    }
    let mut old = live();
    old.send(send(1), NOW).unwrap();
    old.handle_timeout(NOW + ms(9_000));
    assert_eq!(datagrams(&mut old), [], "this gateway did not say that it takes copies");
}

#[test]
fn an_ack_that_overtakes_settles_only_what_it_names() {
    let mut half = hedging();
    half.committed(n(300), n(6), NOW);
    for pseq in 1..=3 {
        half.send(send(pseq), NOW).unwrap();
    }
    put_out(&mut half);
    half.handle(Channel::Datagram, Frame::SendAck(ack(3, 9)), NOW + ms(100)).unwrap();
    assert_eq!(half.unacked(), 2);
    assert_eq!(left(&mut half), [""; 0], "the acks of 1 and 2 are on their way");
    assert!(half.overdue_after() <= Some(ms(150)));
    half.handle(Channel::Control, Frame::SendAck(SendAck { up_to: n(2), ..ack(2, 8) }), NOW + ms(110))
        .unwrap();
    half.handle_timeout(NOW + ms(180));
    assert!(left(&mut half).contains(&"Send"), "1 is covered and not named: it asks again");
}

#[test]
fn a_record_in_a_datagram_is_handed_out_once_and_in_its_place() {
    let mut half = hedging();
    let handed = |half: &mut Client| {
        let seq = |output| match output {
            client::Output::Deliver(record) => Some(record.seq.get()),
            _ => None,
        };
        put_out(half).into_iter().filter_map(seq).collect::<Vec<u64>>()
    };
    let mut come =
        |channel, seq, at| half.handle(channel, deliver(seq, None), NOW + ms(at)).map(|()| handed(&mut half));
    assert_eq!(come(Channel::Lane(0), 1, 0), Ok(vec![1]));
    assert_eq!(come(Channel::Datagram, 3, 100), Ok(vec![]), "2 is still on its lane");
    assert_eq!(come(Channel::Lane(0), 2, 300), Ok(vec![2, 3]), "and nobody pulled it");
    assert_eq!(come(Channel::Lane(0), 3, 310), Ok(vec![]));
    assert_eq!(come(Channel::Datagram, 4, 400), Ok(vec![4]));
}

#[test]
fn a_nudge_from_a_new_address_is_padded() {
    let mut half = live();
    half.nudge(false, NOW);
    half.nudge(true, NOW);
    let sizes: Vec<_> = put_out(&mut half)
        .into_iter()
        .map(|output| match output {
            client::Output::Transmit(Channel::Control, Frame::Ping(ping)) => {
                (ping.flags, Frame::Ping(ping).encoded_len())
            }
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(matches!(sizes[..], [(1, 0..=20), (1, 1_000..=1_020)]), "{sizes:?}");
}

#[test]
fn a_lost_connection_repeats_opens_and_gives_calls_back() {
    let mut half = live();
    let opened = half.open(OpenTarget::Direct("bob".to_owned()), false, NOW);
    let called = half.call(n(0), 1, Bytes::new(), Duration::ZERO, NOW);
    assert_eq!(left(&mut half), ["Open", "Call"]);
    half.disconnected(NOW);
    let out = put_out(&mut half);
    assert!(
        matches!(&out[..], [client::Output::Replied(reply)]
            if reply.id == called && reply.status == CallStatus::Refused(RefusalCode::ConnectionLost)),
        "{out:?}"
    );
    connect(&mut half);
    let again = put_out(&mut half).into_iter().find_map(|output| match output {
        client::Output::Transmit(_, Frame::Open(open)) => Some(open.id),
        _ => None,
    });
    assert_eq!(again, Some(opened));
}

#[test]
fn a_call_ends_at_its_deadline() {
    let mut half = live();
    let id = half.call(n(0), 1, Bytes::new(), Duration::from_secs(2), NOW);
    put_out(&mut half);
    assert_eq!(half.poll_timeout(), Some(NOW + Duration::from_secs(2)));
    half.handle_timeout(NOW + Duration::from_secs(2));
    let out = put_out(&mut half);
    assert!(
        matches!(&out[..], [client::Output::Replied(reply)]
            if reply.id == id && reply.status == CallStatus::Refused(RefusalCode::DeadlineExceeded)),
        "{out:?}"
    );
}

#[test]
fn silence_is_asked_about_and_then_ends_the_connection() {
    let mut half = live();
    let at = half.poll_timeout().unwrap();
    assert_eq!(at, NOW + Duration::from_secs(30));
    half.handle_timeout(at);
    assert_eq!(left(&mut half), ["Ping"]);
    let at = half.poll_timeout().unwrap();
    half.handle_timeout(at);
    assert_eq!(put_out(&mut half), [client::Output::Close(CloseCode::IdleTimeout)]);
}

#[test]
fn an_ack_of_what_never_left_is_a_lie() {
    let mut half = live();
    half.send(send(1), NOW).unwrap();
    let ack = SendAck { conversation: n(300), up_to: n(2), time: n(TIME), runs: Vec::new() };
    assert_eq!(half.handle(Channel::Control, Frame::SendAck(ack), NOW), Err(Violation::BadAck));
    assert_eq!(put_out(&mut half).pop(), Some(client::Output::Close(CloseCode::BadAck)));
}

#[test]
fn records_are_taken_before_the_welcome_and_other_frames_are_not() {
    let mut half = client(Restored { epoch: Epoch::FIRST, ..Restored::default() });
    connect(&mut half);
    put_out(&mut half);
    half.handle(Channel::Lane(0), deliver(1, None), NOW).unwrap();
    assert!(matches!(&put_out(&mut half)[..], [client::Output::Deliver(_)]));
    let ack = SendAck { conversation: n(300), up_to: n(1), time: n(TIME), runs: Vec::new() };
    let violation = half.handle(Channel::Control, Frame::SendAck(ack), NOW).unwrap_err();
    assert_eq!(violation.close_code(), CloseCode::OutOfState);
}
