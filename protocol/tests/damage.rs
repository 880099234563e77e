//! Round trips, grease, cut and flipped bytes, and frames where they may not be.

use bytes::{Bytes, BytesMut};
use fulmar_protocol::{
    close::CloseCode,
    error::{DecodeError, Violation},
    frame::{Ack, Channel, Decoder, Frame, Side, StreamHeader, WireTime},
    id::{ConversationId, DeviceClass, DeviceUid, Seq, UnixMillis},
    limit::{CONTROL_FRAME_BYTES_MAX, LANES_MAX, VARINT_MAX},
    session::{
        client::{Client, ClientConfig, Restored},
        gateway::{Gateway, GatewayConfig},
    },
};
use proptest::prelude::*;

use crate::world::{
    frames::{allowed, everywhere, frame, numbered},
    source::Source,
};

fn frames() -> impl Strategy<Value = Frame> {
    proptest::collection::vec(any::<u8>(), 0..600).prop_map(|bytes| frame(&mut Source::new(&bytes)))
}

fn decode_all(bytes: Bytes, limit: usize) -> Result<Vec<Frame>, DecodeError> {
    let mut decoder = Decoder::new(limit);
    decoder.push(bytes);
    let mut frames = Vec::new();
    while let Some(frame) = decoder.next()? {
        frames.push(frame);
    }
    Ok(frames)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_frame_comes_back_as_it_was(frame in frames()) {
        let bytes = frame.to_bytes();
        prop_assert_eq!(bytes.len(), frame.encoded_len());
        prop_assert_eq!(decode_all(bytes, usize::MAX), Ok(vec![frame]));
    }

    #[test]
    fn grease_is_skipped(frame in frames(), seed in any::<u64>()) {
        let mut bytes = BytesMut::new();
        frame.encode_greased(&mut bytes, seed);
        frame.encode_greased(&mut bytes, seed.rotate_left(17));
        prop_assert_eq!(decode_all(bytes.freeze(), usize::MAX), Ok(vec![frame.clone(), frame]));
    }

    #[test]
    fn bytes_may_come_in_any_pieces(
        frames in proptest::collection::vec(frames(), 1..6),
        cuts in proptest::collection::vec(1..200usize, 1..40),
    ) {
        let mut bytes = BytesMut::new();
        for frame in &frames {
            frame.encode(&mut bytes);
        }
        let mut bytes = bytes.freeze();
        let mut decoder = Decoder::new(usize::MAX);
        let mut got = Vec::new();
        let mut cuts = cuts.into_iter().cycle();
        while !bytes.is_empty() {
            decoder.push(bytes.split_to(cuts.next().unwrap().min(bytes.len())));
            while let Some(frame) = decoder.next().unwrap() {
                got.push(frame);
            }
        }
        prop_assert_eq!(got, frames);
        prop_assert_eq!(decoder.buffered(), 0);
    }

    /// Damage is refused, or reads as another valid frame; what was read can be written.
    #[test]
    fn damaged_bytes_never_panic(frame in frames(), flips in proptest::collection::vec((any::<u16>(), 0..8u8), 1..6)) {
        let mut bytes = frame.to_bytes().to_vec();
        for (at, bit) in flips {
            let at = usize::from(at) % bytes.len();
            bytes[at] ^= 1 << bit;
        }
        if let Ok(frames) = decode_all(bytes.into(), 1 << 20) {
            for frame in frames {
                prop_assert_eq!(decode_all(frame.to_bytes(), usize::MAX), Ok(vec![frame]));
            }
        }
    }

    #[test]
    fn noise_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut decoder = Decoder::new(CONTROL_FRAME_BYTES_MAX);
        decoder.push(bytes.into());
        while let Ok(Some(_)) = decoder.next() {}
        prop_assert!(decoder.buffered() <= 300);
    }
}

/// One frame of each type, with something in every field.
fn one_of_each() -> Vec<Frame> {
    let bytes: Vec<u8> = (0..4_000u32).map(|n| u8::try_from(n * 7 % 251).unwrap() | 1).collect();
    Frame::TABLE.iter().map(|(number, ..)| numbered(*number, &mut Source::new(&bytes))).collect()
}

#[test]
fn a_frame_cut_anywhere_fails_or_is_another_frame() {
    for frame in one_of_each() {
        let whole = frame.to_bytes();
        let mut decoder = Decoder::new(usize::MAX);
        decoder.push(whole.slice(..whole.len() - 1));
        assert_eq!(decoder.next(), Ok(None), "{}: the length says that more comes", frame.name());
        // The same with a length that fits what is left.
        let header = whole.len() - inner(&whole).len();
        for cut in header..whole.len() {
            match Frame::decode(whole.slice(header..cut)) {
                Ok(Some(other)) => assert_ne!(other, frame, "cut at {cut}"),
                Ok(None) => panic!("{} cut at {cut} reads as a frame to be skipped", frame.name()),
                Err(error) => assert_eq!(error.close_code(), CloseCode::Malformed, "cut at {cut}"),
            }
        }
    }
}

/// Type and body of the first frame.
fn inner(bytes: &Bytes) -> Bytes {
    let (len, header) = fulmar_protocol::frame::peek_varint(bytes).unwrap();
    bytes.slice(header..header + usize::try_from(len).unwrap())
}

#[test]
fn every_bit_of_every_frame_may_flip() {
    for frame in one_of_each() {
        let whole = inner(&frame.to_bytes());
        for bit in 0..whole.len().min(600) * 8 {
            let mut bytes = whole.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            if let Ok(Some(other)) = Frame::decode(bytes.into()) {
                assert_ne!((&other, other.number()), (&frame, frame.number() + 1));
            }
        }
    }
}

#[test]
fn unknown_frames_are_skipped_or_refused_by_their_parity() {
    for (number, want) in [(0x41u64, true), (0x3f, true), (0x40, false), (0x3e, false), (0x00, false)] {
        let mut bytes = BytesMut::new();
        fulmar_protocol::frame::put_varint(&mut bytes, number);
        bytes.extend_from_slice(b"whatever");
        let got = Frame::decode(bytes.freeze());
        if want {
            assert_eq!(got, Ok(None), "{number:#x}");
        } else {
            assert_eq!(got, Err(DecodeError::UnknownFrame(number)));
            assert_eq!(got.unwrap_err().close_code(), CloseCode::UnknownFrame);
        }
    }
}

#[test]
fn a_length_beyond_the_channels_limit_is_refused_before_its_bytes_come() {
    for (_, channel) in everywhere() {
        let limit = channel.frame_limit();
        let mut bytes = BytesMut::new();
        fulmar_protocol::frame::put_varint(&mut bytes, limit as u64 + 1);
        let mut decoder = Decoder::new(limit);
        decoder.push(bytes.freeze());
        let error = decoder.next().unwrap_err();
        assert_eq!(error, DecodeError::TooLarge { length: limit as u64 + 1, limit });
        assert_eq!(error.close_code(), CloseCode::TooLarge);
    }
}

#[test]
fn trailing_bytes_are_refused() {
    for frame in one_of_each() {
        // A payload, padding, or extensions take what is left.
        let open_end = matches!(frame.name(), "Send" | "Deliver" | "Event" | "Call" | "Reply" | "Ping");
        let mut bytes = inner(&frame.to_bytes()).to_vec();
        bytes.push(0x21);
        assert_eq!(Frame::decode(bytes.into()).is_ok(), open_end, "{}", frame.name());
    }
}

/// The table of `docs/wire.md`: who may send what where.
#[test]
fn every_frame_on_every_side_and_channel() {
    use Channel::{Backlog, Control, Datagram, Lane, Uplink};
    use Side::{Client as C, Gateway as G};
    let want: &[(&str, &[(Side, Channel)])] = &[
        ("Hello", &[(C, Control)]),
        ("Welcome", &[(G, Control)]),
        ("Auth", &[(C, Control)]),
        ("Cursors", &[(C, Control)]),
        ("Open", &[(C, Control)]),
        ("Opened", &[(G, Control)]),
        ("Send", &[(C, Uplink), (C, Datagram)]),
        ("SendAck", &[(G, Control), (G, Datagram)]),
        ("SendRefused", &[(G, Control)]),
        ("Deliver", &[(G, Lane(1)), (G, Backlog), (G, Datagram)]),
        ("Block", &[(G, Backlog)]),
        ("Heads", &[(G, Control)]),
        ("Ack", &[(C, Control)]),
        ("Mark", &[(C, Uplink)]),
        ("Receipts", &[(G, Control)]),
        ("Pull", &[(C, Control)]),
        ("Call", &[(C, Control), (G, Control)]),
        ("Reply", &[(C, Control), (G, Control)]),
        ("Event", &[(C, Control), (C, Datagram), (G, Control), (G, Datagram)]),
        ("Ping", &[(C, Control), (G, Control)]),
        ("Pong", &[(C, Control), (G, Control)]),
        ("Goaway", &[(G, Control)]),
        ("Kicked", &[(G, Control)]),
        ("Error", &[(G, Control)]),
    ];
    let frames = one_of_each();
    assert_eq!(
        frames.iter().map(Frame::name).collect::<Vec<_>>(),
        want.iter().map(|w| w.0).collect::<Vec<_>>()
    );
    for (frame, (name, places)) in frames.iter().zip(want) {
        assert_eq!(allowed(frame), *places, "{name}");
        for (side, channel) in everywhere() {
            if !places.contains(&(side, channel)) {
                let error = frame.check_channel(side, channel).unwrap_err();
                assert_eq!(error.close_code(), CloseCode::OutOfState);
            }
        }
    }
}

/// A half that is given a frame of the wrong side or channel closes with the right code and goes silent.
#[test]
fn halves_close_on_frames_that_may_not_be() {
    use fulmar_protocol::session::{client, gateway};
    let now = core::time::Duration::from_secs(1);
    for frame in one_of_each() {
        for (side, channel) in everywhere() {
            if frame.check_channel(Side::Client, channel).is_err() && side == Side::Client {
                let mut half = Gateway::new(GatewayConfig::default(), now);
                let violation = half.handle(channel, frame.clone(), now).unwrap_err();
                assert!(matches!(violation, Violation::WrongChannel { .. }));
                let Some(gateway::Output::Close { code, .. }) = half.poll_output() else {
                    panic!("{frame:?}")
                };
                assert_eq!(code, CloseCode::OutOfState);
                assert_eq!(half.handle(channel, frame.clone(), now), Ok(()), "ignored from now on");
                assert_eq!(half.poll_output(), None);
            }
            if frame.check_channel(Side::Gateway, channel).is_err() && side == Side::Gateway {
                let config = ClientConfig::new(DeviceUid([1; 16]), DeviceClass::Phone);
                let mut half = Client::new(config, Restored::default());
                let auth = fulmar_protocol::frame::AuthProof::Token(String::new());
                half.connect(auth, Default::default(), now);
                let violation = half.handle(channel, frame.clone(), now).unwrap_err();
                assert!(matches!(violation, Violation::WrongChannel { .. }));
                let last = core::iter::from_fn(|| half.poll_output()).last();
                assert_eq!(last, Some(client::Output::Close(CloseCode::OutOfState)));
            }
        }
    }
}

#[test]
fn streams_are_known_by_their_header() {
    for (kind, index, want) in [
        (0, 0, Some(Channel::Control)),
        (1, 0, Some(Channel::Uplink)),
        (2, 0, Some(Channel::Lane(0))),
        (2, u64::from(LANES_MAX) - 1, Some(Channel::Lane(LANES_MAX - 1))),
        (2, u64::from(LANES_MAX), None),
        (2, u64::MAX >> 2, None),
        (3, 0, Some(Channel::Backlog)),
        (0, 1, None),
        (3, 1, None),
        (4, 0, None),
    ] {
        let got = StreamHeader { kind, index }.channel();
        assert_eq!(got.ok(), want, "{kind} {index}");
        if let Err(violation) = got {
            assert_eq!(violation.close_code(), CloseCode::BadStream);
        }
        if let Some(channel) = want {
            assert_eq!(channel.header(), Some(StreamHeader { kind, index }));
        }
    }
}

#[test]
fn times_survive_the_short_form() {
    let now = UnixMillis::new(1_790_000_000_000).unwrap();
    for back in [0, 1, 1_000, WireTime::SHORT_AGE_MS_MAX] {
        for ahead in [0, 5_000, 86_400_000] {
            let time = UnixMillis::new(now.get() - back + ahead).unwrap();
            assert_eq!(WireTime::short(time).expand(now), time);
        }
    }
}

#[test]
fn the_largest_frames_fit_their_channels() {
    let bytes = [255u8; 60_000];
    for (number, name, _) in Frame::TABLE {
        if matches!(
            *name,
            "Hello" | "Cursors" | "Ack" | "Heads" | "Receipts" | "SendAck" | "Goaway" | "Block"
        ) {
            // Lists: whoever builds them splits them (`Ack::split`), or has few entries.
            continue;
        }
        let frame = numbered(*number, &mut Source::new(&bytes));
        for (_, channel) in allowed(&frame) {
            if matches!((*name, channel), ("Send" | "Deliver", Channel::Datagram)) {
                continue;
            }
            let len = inner(&frame.to_bytes()).len();
            assert!(len <= channel.frame_limit(), "{name}: {len} on {channel:?}");
        }
    }
    let widest = (ConversationId::new(VARINT_MAX).unwrap(), Seq::new(VARINT_MAX).unwrap());
    let frames: Vec<Frame> = Ack::split(&[widest; 1_000]).map(Frame::Ack).collect();
    assert_eq!(frames.len(), 4);
    for frame in frames {
        assert!(inner(&frame.to_bytes()).len() <= CONTROL_FRAME_BYTES_MAX);
    }
}
