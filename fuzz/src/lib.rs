//! Bodies of the fuzz targets: functions of a string of bytes that panic when a promise is broken.
//!
//! The targets in `fuzz_targets/` call them; `tests/corpus.rs` replays the committed seeds on every toolchain.
//! What the bytes mean is decided by the same code the property tests of `fulmar-protocol` (`world`) and of
//! `fulmar-transport` (`streams`) use.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a target reports by panicking"
)]

#[path = "../../protocol/tests/world/mod.rs"]
#[expect(dead_code, reason = "the planted faults are for the property tests")]
mod world;

#[path = "../../transport/tests/world/mod.rs"]
mod streams;

mod session;

use bytes::{Bytes, BytesMut};
use fulmar_protocol::{
    close::CloseCode,
    error::DecodeError,
    frame::{Channel, Decoder, Frame, StreamHeader},
};

pub use session::session_ops;

use crate::world::{frames, pair::World, source::Source};

/// Bytes of a stream, in the pieces the first bytes choose: decoding never panics, holds no more than a frame, and what
/// it reads can be written and read again.
pub fn frame_decode(bytes: &[u8]) {
    let mut s = Source::new(bytes.get(..4).unwrap_or_default());
    let channel = match s.below(5) {
        0 => Channel::Control,
        1 => Channel::Uplink,
        2 => Channel::Lane(0),
        3 => Channel::Backlog,
        _ => Channel::Datagram,
    };
    let piece = 1 + s.below(64) * s.below(64);
    let mut rest = Bytes::copy_from_slice(bytes.get(4..).unwrap_or_default());
    let mut decoder = Decoder::new(channel.frame_limit());
    if s.flag() {
        decoder.push(rest.split_to(piece.min(rest.len())));
        if let (Some(kind), Some(index)) = (decoder.next_varint(), decoder.next_varint()) {
            let _ = StreamHeader { kind, index }.channel().map_err(|violation| violation.close_code());
        }
    }
    let mut total = decoder.buffered() + usize::try_from(decoder.offset()).unwrap();
    loop {
        match decoder.next() {
            Ok(Some(frame)) => {
                let again = frame.to_bytes();
                assert_eq!(again.len(), frame.encoded_len());
                let mut decoder = Decoder::new(usize::MAX);
                decoder.push(again);
                assert_eq!(decoder.next(), Ok(Some(frame)), "what was read can be written");
                continue;
            }
            Ok(None) => {}
            Err(error) => {
                let want = match error {
                    DecodeError::TooLarge { .. } => CloseCode::TooLarge,
                    DecodeError::UnknownFrame(number) => {
                        assert!(number % 2 == 0, "odd frames are skipped");
                        CloseCode::UnknownFrame
                    }
                    _ => CloseCode::Malformed,
                };
                assert_eq!(error.close_code(), want);
                return;
            }
        }
        assert!(decoder.buffered() <= channel.frame_limit() + 8 + piece, "no more than a frame is held");
        assert_eq!(decoder.offset() + decoder.buffered() as u64, total as u64, "no byte is lost or invented");
        if rest.is_empty() {
            return;
        }
        let next = rest.split_to(piece.min(rest.len()));
        total += next.len();
        decoder.push(next);
    }
}

/// Any frames: they come back as they were, greased or not, however the bytes are cut.
pub fn frame_round_trip(bytes: &[u8]) {
    let mut s = Source::new(bytes);
    let mut sent = Vec::new();
    let mut stream = BytesMut::new();
    while !s.is_empty() && sent.len() < 16 {
        let frame = frames::frame(&mut s);
        assert!(!frames::allowed(&frame).is_empty(), "every frame has its place");
        frame.encode_greased(&mut stream, s.wide());
        let start = stream.len();
        frame.encode(&mut stream);
        assert_eq!(stream.len() - start, frame.encoded_len());
        sent.push(frame.clone());
        sent.push(frame);
    }
    let mut stream = stream.freeze();
    let piece = 1 + stream.len() / 7;
    let mut decoder = Decoder::new(usize::MAX);
    let mut got: Vec<Frame> = Vec::new();
    while !stream.is_empty() {
        decoder.push(stream.split_to(piece.min(stream.len())));
        while let Some(frame) = decoder.next().expect("own bytes can be read") {
            got.push(frame);
        }
    }
    assert_eq!(got, sent);
    assert_eq!(decoder.buffered(), 0);
}

/// A schedule for clients, a gateway, a log and the links between them: see `world::pair`.
pub fn session_pair(bytes: &[u8]) {
    World::run(bytes, None);
}

/// Runs `target` on every file named on the command line.
///
/// # Errors
/// A file can't be read.
pub fn replay(target: fn(&[u8])) -> std::io::Result<()> {
    for path in std::env::args_os().skip(1) {
        target(&std::fs::read(path)?);
    }
    Ok(())
}

/// Choices for two halves of a connection over a byte stream, or for one half and a peer that sends anything: everything
/// arrives once and in order, windows and bounds hold, and whoever breaks a rule is closed with its code.
pub fn qmux(bytes: &[u8]) {
    streams::qmux(bytes);
}
