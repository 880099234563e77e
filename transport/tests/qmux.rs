//! The multiplexer alone: bytes as they are, rules one by one, and two halves under any schedule.

#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "the fuzz target's entry")]
mod world;

use bytes::{BufMut, Bytes, BytesMut};
use fulmar_transport::qmux::{
    Close, Config, Direction, Ended, Event, Frame, Mux, Parameters, RECORD_BYTES, ReadError, Side, StreamId,
    VARINT_MAX, Violation, WriteError, get_varint, put_varint, varint_len,
};
use proptest::prelude::*;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Bytes {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect::<Vec<u8>>()
        .into()
}

fn record(frames: &[Frame]) -> Bytes {
    let mut body = BytesMut::new();
    frames.iter().for_each(|frame| frame.encode(&mut body));
    let mut out = BytesMut::new();
    put_varint(&mut out, body.len() as u64);
    out.put(body);
    out.freeze()
}

/// Frames of everything `mux` has to say now.
fn said(mux: &mut Mux) -> Vec<Frame> {
    let mut frames = Vec::new();
    while let Some(mut bytes) = mux.transmit(usize::MAX) {
        let len = get_varint(&mut bytes).unwrap();
        assert_eq!(len, bytes.len() as u64);
        while let Some(frame) = Frame::decode(&mut bytes).unwrap() {
            frames.push(frame);
        }
    }
    frames
}

/// Both halves after their parameters have met.
fn met(client: Config, server: Config) -> (Mux, Mux) {
    let (mut client, mut server) = (Mux::new(Side::Client, client), Mux::new(Side::Server, server));
    pump(&mut client, &mut server);
    (client, server)
}

fn pump(a: &mut Mux, b: &mut Mux) {
    loop {
        let (to_b, to_a) = (a.transmit(usize::MAX), b.transmit(usize::MAX));
        if to_a.is_none() && to_b.is_none() {
            return;
        }
        if let Some(bytes) = to_b {
            b.receive(bytes).unwrap()
        }
        if let Some(bytes) = to_a {
            a.receive(bytes).unwrap()
        }
    }
}

fn write(mux: &mut Mux, id: StreamId, bytes: &[u8]) -> usize {
    mux.write(id, &mut Bytes::copy_from_slice(bytes)).unwrap()
}

/// A stream of the client's, as the server's peer would name it.
fn stream(number: u64) -> StreamId {
    let mut bytes = BytesMut::new();
    for value in [0x05, number, 0] {
        put_varint(&mut bytes, value);
    }
    match Frame::decode(&mut bytes.freeze()).unwrap() {
        Some(Frame::StopSending { id, .. }) => id,
        other => panic!("{other:?}"),
    }
}

const QUIET: Config = Config {
    streams_bidi: 2,
    streams_uni: 3,
    stream_window: 1_000,
    window: 1_500,
    send_buffer: 10_000,
    datagrams_in: 1_000,
    datagrams_out: 1_000,
    datagram_size: 600,
    idle_timeout_ms: 0,
    assumed: None,
};

#[test]
fn integers_are_those_of_rfc_9000() {
    // Appendix A.1 of the RFC.
    for (value, bytes) in [
        (151_288_809_941_952_652, "c2197c5eff14e88c"),
        (494_878_333, "9d7f3e7d"),
        (15_293, "7bbd"),
        (37, "25"),
    ] {
        let mut out = BytesMut::new();
        put_varint(&mut out, value);
        assert_eq!(hex(&out), bytes);
        assert_eq!(out.len(), varint_len(value));
        assert_eq!(get_varint(&mut out.freeze()), Some(value));
        let cut = unhex(bytes);
        assert_eq!(get_varint(&mut cut.slice(..cut.len() - 1)), None);
    }
    assert_eq!(get_varint(&mut unhex("4025")), Some(37), "a longer form");
}

#[test]
fn frames_have_their_bytes() {
    let data = Bytes::from_static(b"hi");
    let reason = Bytes::from_static(b"why");
    for (frame, bytes) in [
        (Frame::ResetStream { id: stream(4), code: 9, final_size: 300 }, "04 04 09 412c"),
        (Frame::StopSending { id: stream(0), code: 7 }, "05 00 07"),
        (Frame::Stream { id: stream(2), offset: 0, fin: false, data: data.clone() }, "0a 02 02 6869"),
        (Frame::Stream { id: stream(2), offset: 64, fin: true, data: data.clone() }, "0f 02 4040 02 6869"),
        (Frame::MaxData(1_000_000), "10 800f4240"),
        (Frame::MaxStreamData { id: stream(3), max: 70_000 }, "11 03 80011170"),
        (Frame::MaxStreams { direction: Direction::Bi, max: 3 }, "12 03"),
        (Frame::MaxStreams { direction: Direction::Uni, max: 4 }, "13 04"),
        (Frame::Close(Close { application: false, code: 10, reason: reason.clone() }), "1c 0a 00 03 776879"),
        (Frame::Close(Close { application: true, code: 5, reason }), "1d 05 03 776879"),
        (Frame::Datagram(data), "31 02 6869"),
        (Frame::Ping(1), "f48c67529ef8c7bd 01"),
        (Frame::Pong(1), "f48c67529ef8c7be 01"),
        (Frame::Parameters(Parameters::default()), "ff5153300d0a0d0a 00"),
    ] {
        let mut out = BytesMut::new();
        frame.encode(&mut out);
        assert_eq!(out, unhex(bytes), "{frame:?} is {}", hex(&out));
        let mut back = out.freeze();
        assert_eq!(Frame::decode(&mut back).unwrap(), Some(frame));
        assert_eq!(Frame::decode(&mut back).unwrap(), None);
    }
    for (bytes, frame) in [
        (
            "08 02 6869",
            Frame::Stream { id: stream(2), offset: 0, fin: false, data: Bytes::from_static(b"hi") },
        ),
        ("0000 30 6869", Frame::Datagram(Bytes::from_static(b"hi"))),
        ("14 05", Frame::Blocked(None)),
        ("15 02 05", Frame::Blocked(Some(stream(2)))),
        ("16 05", Frame::Blocked(None)),
        ("17 05", Frame::Blocked(None)),
    ] {
        assert_eq!(Frame::decode(&mut unhex(bytes)).unwrap(), Some(frame), "{bytes}");
    }
}

#[test]
fn the_first_record_of_a_connection_has_its_bytes() {
    let mut mux = Mux::new(Side::Client, QUIET);
    let id = mux.open(Direction::Bi);
    assert!(id.is_err(), "nothing is known of the peer");
    let first = mux.transmit(usize::MAX).unwrap();
    let want =
        "23 ff5153300d0a0d0a 1a 04 02 45dc 05 02 43e8 06 02 43e8 07 02 43e8 08 01 02 09 01 03 20 02 425d";
    assert_eq!(hex(&first), hex(&unhex(want)));
    assert_eq!(mux.transmit(usize::MAX), None);
}

#[test]
fn bytes_that_are_no_frame_are_refused() {
    for bytes in [
        "01",                           // PING of QUIC
        "02 00 00 00 00",               // ACK
        "06 00 00",                     // CRYPTO
        "07 01 00",                     // NEW_TOKEN
        "1e",                           // HANDSHAKE_DONE
        "21",                           // unknown
        "0a 02 05 6869",                // longer than the record
        "0e 02 ffffffffffffffff 01 68", // beyond the largest offset
        "12 d000000000000001",          // more streams than there can be
        "04 04 09",                     // cut
        "1c 00 00 05 61",               // a reason that is cut
        "31 03 6869",
        "40",
    ] {
        assert_eq!(Frame::decode(&mut unhex(bytes)), Err(Violation::FrameEncoding), "{bytes}");
    }
    for parameters in [
        "02 10 00000000000000000000000000000000", // stateless_reset_token
        "04 01 05 04 01 05",                      // twice
        "04 02 05",                               // cut
        "04 02 0505",                             // longer than its number
        "08 08 d000000000000001",                 // more streams than there can be
        "c571c59429cd0845 02 4400",               // records smaller than everybody takes
    ] {
        let body = unhex(parameters);
        let mut frame = BytesMut::from(&unhex("ff5153300d0a0d0a")[..]);
        put_varint(&mut frame, body.len() as u64);
        frame.put(body);
        assert_eq!(Frame::decode(&mut frame.freeze()), Err(Violation::TransportParameters), "{parameters}");
    }
    let unknown = unhex("ff5153300d0a0d0a 05 4abc 02 abcd");
    assert_eq!(Frame::decode(&mut unknown.clone()).unwrap(), Some(Frame::Parameters(Parameters::default())));
}

#[test]
fn who_breaks_a_rule_is_closed_with_its_code() {
    let parameters = Frame::Parameters(Parameters::default());
    let data = |id, offset, len, fin| Frame::Stream { id, offset, fin, data: Bytes::from(vec![0; len]) };
    let reset = |id, final_size| Frame::ResetStream { id, code: 0, final_size };
    // Streams 0, 4: bidirectional of the client; 2, 6, 10, 14: its unidirectional ones; 1, 3: the server's own.
    let cases: Vec<(&str, Vec<Frame>, Violation)> = vec![
        ("nothing before the parameters", vec![Frame::Ping(1)], Violation::TransportParameters),
        ("parameters twice", vec![parameters.clone(), parameters.clone()], Violation::TransportParameters),
        ("a gap", vec![data(stream(2), 1, 1, false)], Violation::Protocol),
        ("again", vec![data(stream(2), 0, 5, false), data(stream(2), 0, 5, false)], Violation::Protocol),
        ("too much on a stream", vec![data(stream(2), 0, 1_001, false)], Violation::FlowControl),
        (
            "too much in all",
            vec![data(stream(2), 0, 1_000, false), data(stream(6), 0, 501, false)],
            Violation::FlowControl,
        ),
        ("a reset beyond the window", vec![reset(stream(2), 1_001)], Violation::FlowControl),
        ("too many streams", vec![data(stream(14), 0, 1, false)], Violation::StreamLimit),
        ("a stream of ours that is none", vec![data(stream(1), 0, 1, false)], Violation::StreamState),
        ("data on a stream of ours", vec![data(stream(3), 0, 1, false)], Violation::StreamState),
        (
            "a window for a stream we read",
            vec![Frame::MaxStreamData { id: stream(2), max: 9 }],
            Violation::StreamState,
        ),
        (
            "stopping what we read",
            vec![Frame::StopSending { id: stream(2), code: 0 }],
            Violation::StreamState,
        ),
        (
            "after the end",
            vec![data(stream(2), 0, 1, true), data(stream(2), 1, 1, false)],
            Violation::FinalSize,
        ),
        (
            "an end before the end",
            vec![data(stream(2), 0, 5, false), reset(stream(2), 4)],
            Violation::FinalSize,
        ),
        ("another end", vec![data(stream(2), 0, 5, true), reset(stream(2), 6)], Violation::FinalSize),
        ("two resets", vec![reset(stream(2), 4), reset(stream(2), 4)], Violation::FinalSize),
        (
            "a datagram that is too large",
            vec![Frame::Datagram(Bytes::from(vec![0; 601]))],
            Violation::Protocol,
        ),
        ("a pong to no ping", vec![Frame::Pong(1)], Violation::Protocol),
    ];
    for (name, mut frames, want) in cases {
        let mut mux = Mux::new(Side::Server, QUIET);
        if want != Violation::TransportParameters {
            frames.insert(0, parameters.clone());
        }
        assert_eq!(mux.receive(record(&frames)), Err(want), "{name}");
        assert_eq!(mux.ended(), Some(&Ended::Violated(want)), "{name}");
        let last = said(&mut mux).pop().unwrap();
        assert!(
            matches!(&last, Frame::Close(Close { application: false, code, .. }) if *code == want.code()),
            "{name}: {last:?}"
        );
        assert!(!mux.wants_transmit(), "{name}");
        assert_eq!(
            mux.receive(record(&[Frame::Ping(1)])),
            Ok(()),
            "{name}: what comes later is not looked at"
        );
        assert_eq!(mux.buffered(), 0, "{name}");
    }
    for (name, bytes) in [
        ("an empty record", "00"),
        ("a record that is too large", "80 00 3fff"),
        ("rubbish", "ffffffffffffffff"),
    ] {
        let mut mux = Mux::new(Side::Server, QUIET);
        assert!(mux.receive(unhex(bytes)).is_err(), "{name}");
    }
}

#[test]
fn a_stream_goes_there_and_back() {
    let (mut client, mut server) = met(QUIET, QUIET);
    let id = client.open(Direction::Bi).unwrap();
    assert_eq!((id.get(), id.opener(), id.direction(), id.number()), (0, Side::Client, Direction::Bi, 0));
    assert_eq!(write(&mut client, id, b"ping"), 4);
    pump(&mut client, &mut server);
    assert_eq!(server.accept(Direction::Bi), Ok(id));
    assert!(server.accept(Direction::Bi).is_err());
    assert_eq!(server.read(id, 3), Ok(Some(Bytes::from_static(b"pin"))));
    assert_eq!(server.read(id, 3), Ok(Some(Bytes::from_static(b"g"))));
    assert_eq!(server.read(id, 3), Err(ReadError::Blocked));
    assert_eq!(write(&mut server, id, b"pong"), 4);
    server.finish(id).unwrap();
    assert_eq!(server.finish(id), Err(WriteError::Closed));
    assert_eq!(server.stopped(id), None);
    pump(&mut client, &mut server);
    assert_eq!(server.stopped(id), Some(None), "it was handed over");
    assert_eq!(client.read(id, 100), Ok(Some(Bytes::from_static(b"pong"))));
    assert_eq!(client.read(id, 100), Ok(None));
    assert_eq!(client.read(id, 100), Err(ReadError::Closed));
    client.release_send(id);
    pump(&mut client, &mut server);
    assert_eq!(server.read(id, 100), Ok(None));
    // The stream is over on both sides: another may be opened.
    for _ in 0..20 {
        let id = client.open(Direction::Bi).unwrap();
        client.release_send(id);
        pump(&mut client, &mut server);
        assert_eq!(server.accept(Direction::Bi), Ok(id));
        assert_eq!(server.read(id, 1), Ok(None));
        server.release_send(id);
        pump(&mut client, &mut server);
        assert_eq!(client.read(id, 1), Ok(None));
        pump(&mut client, &mut server);
    }
    assert_eq!((client.buffered(), server.buffered()), (0, 0));
}

#[test]
fn streams_are_opened_when_the_peer_allows_it() {
    let (mut client, mut server) = met(QUIET, QUIET);
    let ids: Vec<StreamId> = std::iter::from_fn(|| client.open(Direction::Uni).ok()).collect();
    assert_eq!(ids.len(), 3);
    while client.poll_event().is_some() {}
    for id in &ids {
        write(&mut client, *id, b"x");
        client.finish(*id).unwrap();
    }
    pump(&mut client, &mut server);
    assert!(client.open(Direction::Uni).is_err(), "nobody has read them");
    for id in &ids {
        assert_eq!(server.accept(Direction::Uni), Ok(*id));
        server.read(*id, 9).unwrap();
        assert_eq!(server.read(*id, 9), Ok(None));
    }
    pump(&mut client, &mut server);
    assert_eq!(client.poll_event(), Some(Event::Available(Direction::Uni)));
    assert!(client.open(Direction::Uni).is_ok());
}

#[test]
fn windows_hold_and_open_again() {
    let (mut client, mut server) = met(QUIET, QUIET);
    let (a, b) = (client.open(Direction::Uni).unwrap(), client.open(Direction::Uni).unwrap());
    assert_eq!(write(&mut client, a, &[1; 20_000]), 10_000, "the send buffer");
    assert_eq!(client.write(a, &mut Bytes::from_static(b"x")), Err(WriteError::Blocked));
    write(&mut client, b, &[2; 2_000]);
    pump(&mut client, &mut server);
    assert_eq!(server.buffered(), 1_500, "the connection's window");
    let (mut of_a, mut of_b) = (0, 0);
    for _ in 0..100 {
        of_a += server.read(a, 400).ok().flatten().map_or(0, |bytes| bytes.len());
        of_b += server.read(b, 400).ok().flatten().map_or(0, |bytes| bytes.len());
        pump(&mut client, &mut server);
    }
    assert_eq!((of_a, of_b), (10_000, 2_000));
    assert_eq!(client.poll_event(), Some(Event::Available(Direction::Bi)));
    assert!(std::iter::from_fn(|| client.poll_event()).any(|event| event == Event::Writable(a)));
}

#[test]
fn the_higher_priority_goes_first_and_equals_take_turns() {
    let wide = Config { stream_window: 100_000, window: 1_000_000, send_buffer: 100_000, ..QUIET };
    let (mut client, _server) = met(wide, wide);
    let [backlog, one, two] = [(); 3].map(|()| client.open(Direction::Uni).unwrap());
    client.set_priority(backlog, -1).unwrap();
    client.set_priority(one, 2).unwrap();
    client.set_priority(two, 2).unwrap();
    write(&mut client, backlog, &[0; 50_000]);
    let order = |mux: &mut Mux| -> Vec<StreamId> {
        let mut bytes = mux.transmit(usize::MAX).unwrap();
        let _ = get_varint(&mut bytes);
        let frames = std::iter::from_fn(|| Frame::decode(&mut bytes).unwrap());
        frames
            .filter_map(|frame| if let Frame::Stream { id, .. } = frame { Some(id) } else { None })
            .collect()
    };
    assert_eq!(order(&mut client), [backlog]);
    write(&mut client, one, &[1; 40_000]);
    write(&mut client, two, b"live");
    assert_eq!(order(&mut client), [one], "a record is full");
    assert_eq!(order(&mut client), [two, one]);
    assert_eq!(order(&mut client), [one], "and no backlog beside it");
    assert_eq!(order(&mut client), [backlog]);
    write(&mut client, one, &[1; 20_000]);
    client.set_priority(backlog, 5).unwrap();
    assert_eq!(order(&mut client), [backlog]);
    client.set_priority(backlog, -5).unwrap();
    assert_eq!(order(&mut client), [one]);
    assert_eq!(order(&mut client), [one]);
    let before = client.buffered();
    assert_eq!(order(&mut client), [backlog]);
    assert!(before - client.buffered() < 4_096, "a piece that does not hold up others for long");
}

#[test]
fn a_stream_can_be_given_up_from_both_ends() {
    let (mut client, mut server) = met(QUIET, QUIET);
    let [a, b] = [(); 2].map(|()| client.open(Direction::Uni).unwrap());
    write(&mut client, a, &[1; 900]);
    write(&mut client, b, &[1; 600]);
    pump(&mut client, &mut server);
    server.accept(Direction::Uni).unwrap();
    server.accept(Direction::Uni).unwrap();
    client.reset(a, 33).unwrap();
    assert_eq!(client.write(a, &mut Bytes::from_static(b"x")), Err(WriteError::Closed));
    server.stop(b, 44).unwrap();
    assert_eq!(server.stop(b, 44), Err(ReadError::Closed));
    pump(&mut client, &mut server);
    assert_eq!(server.read(a, 10), Err(ReadError::Reset(33)));
    assert_eq!(client.write(b, &mut Bytes::from_static(b"x")), Err(WriteError::Stopped(44)));
    assert_eq!(client.stopped(b), Some(Some(44)));
    client.release_send(b);
    pump(&mut client, &mut server);
    assert_eq!((client.buffered(), server.buffered()), (0, 0));
    // The window of what was thrown away is there again, and so are the streams.
    let c = client.open(Direction::Uni).unwrap();
    let d = client.open(Direction::Uni).unwrap();
    write(&mut client, c, &[1; 1_000]);
    write(&mut client, d, &[1; 500]);
    pump(&mut client, &mut server);
    assert_eq!(server.buffered(), 1_500);
}

#[test]
fn datagrams_go_first_and_the_oldest_is_dropped() {
    let (mut client, mut server) = met(QUIET, QUIET);
    assert_eq!(client.max_datagram_size(), Some(600));
    assert!(!client.send_datagram(Bytes::from(vec![0; 601])));
    let id = client.open(Direction::Uni).unwrap();
    write(&mut client, id, b"x");
    for n in 0..5u8 {
        assert!(client.send_datagram(Bytes::from(vec![n; 300])));
    }
    assert_eq!(client.datagrams_dropped(), 2);
    let frames = said(&mut client);
    assert!(
        matches!(&frames[..], [Frame::Datagram(first), .., Frame::Stream { .. }] if first[0] == 2),
        "{frames:?}"
    );
    server.receive(record(&frames)).unwrap();
    for n in 2..5u8 {
        assert_eq!(server.read_datagram().unwrap(), vec![n; 300]);
    }
    assert_eq!(server.read_datagram(), None);
    let (mut deaf, mut other) = met(Config { datagram_size: 0, ..QUIET }, QUIET);
    assert_eq!(other.max_datagram_size(), None);
    assert!(!other.send_datagram(Bytes::new()));
    assert_eq!(deaf.receive(record(&[Frame::Datagram(Bytes::new())])), Err(Violation::Protocol));
}

#[test]
fn what_is_assumed_can_be_used_at_once_and_must_be_true() {
    let assumed = Parameters {
        max_data: 1_000,
        max_stream_data_bidi_remote: 500,
        max_stream_data_uni: 500,
        max_streams_bidi: 1,
        max_streams_uni: 1,
        ..Parameters::default()
    };
    let eager = Config { assumed: Some(assumed), ..QUIET };
    let mut client = Mux::new(Side::Client, eager);
    let id = client.open(Direction::Bi).unwrap();
    write(&mut client, id, &[1; 900]);
    let first = said(&mut client);
    assert!(
        matches!(&first[..], [Frame::Parameters(_), Frame::Stream { data, .. }] if data.len() == 500),
        "{first:?}"
    );
    let mut server = Mux::new(Side::Server, QUIET);
    server.receive(record(&first)).unwrap();
    pump(&mut client, &mut server);
    assert_eq!(server.buffered(), 900, "the rest came when the parameters had");
    let mut client = Mux::new(Side::Client, eager);
    let mut stingy = Mux::new(Side::Server, Config { streams_uni: 0, ..QUIET });
    let parameters = stingy.transmit(usize::MAX).unwrap();
    assert_eq!(client.receive(parameters), Err(Violation::TransportParameters));
}

#[test]
fn pings_are_answered_once_and_timeouts_are_the_shorter() {
    let (mut client, mut server) =
        met(Config { idle_timeout_ms: 5_000, ..QUIET }, Config { idle_timeout_ms: 3_000, ..QUIET });
    assert_eq!((client.idle_timeout_ms(), server.idle_timeout_ms()), (Some(3_000), Some(3_000)));
    while client.poll_event().is_some() {}
    assert_eq!(client.ping(), 1);
    pump(&mut client, &mut server);
    assert_eq!(client.poll_event(), Some(Event::Pong(1)));
    let pings: Vec<Frame> = (1..=100).map(Frame::Ping).collect();
    server.receive(record(&pings)).unwrap();
    assert_eq!(said(&mut server), [Frame::Pong(100)], "a flood has one answer");
}

#[test]
fn a_close_is_the_last_word() {
    let (mut client, mut server) = met(QUIET, QUIET);
    let id = client.open(Direction::Uni).unwrap();
    write(&mut client, id, b"unsaid");
    client.close(VARINT_MAX, Bytes::from(vec![b'a'; 5_000]));
    client.close(1, Bytes::new());
    let mut bytes = client.transmit(usize::MAX).unwrap();
    let _ = get_varint(&mut bytes);
    let Some(Frame::Close(close)) = Frame::decode(&mut bytes).unwrap() else { panic!() };
    assert_eq!((close.application, close.code, close.reason.len()), (true, VARINT_MAX, 1_024));
    assert_eq!(client.transmit(usize::MAX), None);
    server.receive(record(&[Frame::Close(close.clone()), Frame::Pong(9)])).unwrap();
    assert_eq!(server.ended(), Some(&Ended::Remotely(close)));
    assert!(!server.wants_transmit());
}

#[test]
fn single_bytes_are_put_together_and_cost_no_list() {
    let (mut client, mut server) = met(
        Config { stream_window: 5_000, window: 5_000, ..QUIET },
        Config { stream_window: 5_000, window: 5_000, ..QUIET },
    );
    let id = client.open(Direction::Uni).unwrap();
    for n in 0..1_000u32 {
        write(&mut client, id, &n.to_be_bytes()[3..]);
        pump(&mut client, &mut server);
    }
    server.accept(Direction::Uni).unwrap();
    let mut all = Vec::new();
    while let Ok(Some(bytes)) = server.read(id, 300) {
        all.extend_from_slice(&bytes);
    }
    assert_eq!(all, (0..1_000u32).map(|n| n.to_be_bytes()[3]).collect::<Vec<u8>>());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn two_halves_deliver_everything_once_and_in_order(bytes in prop::collection::vec(any::<u8>(), 0..4_000)) {
        world::pair(&bytes);
    }

    #[test]
    fn a_hostile_peer_gets_a_violation_and_no_memory(bytes in prop::collection::vec(any::<u8>(), 0..2_000)) {
        world::hostile(&bytes);
    }

    #[test]
    fn records_can_be_cut_anywhere(cuts in prop::collection::vec(1usize..3_000, 1..50), len in 1usize..40_000) {
        let wide = Config { stream_window: 100_000, window: 100_000, send_buffer: 100_000, ..QUIET };
        let (mut client, mut server) = met(wide, wide);
        let id = client.open(Direction::Uni).unwrap();
        write(&mut client, id, &vec![7; len]);
        let mut bytes: BytesMut = std::iter::from_fn(|| client.transmit(usize::MAX)).flatten().collect();
        let mut cuts = cuts.into_iter().cycle();
        while !bytes.is_empty() {
            let cut = cuts.next().unwrap_or(1).min(bytes.len());
            server.receive(bytes.split_to(cut).freeze()).unwrap();
            prop_assert!(server.buffered() <= len + RECORD_BYTES + 8);
        }
        prop_assert_eq!(server.buffered(), len);
    }
}
