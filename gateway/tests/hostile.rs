//! What a stranger or a broken client may send: the right close code, no panic, and nobody else notices.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "a test that finds something wrong stops there"
)]

mod support;

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use fulmar_protocol::{
    close::{CloseCode, RefusalCode},
    frame::{
        AuthProof, Channel, Frame, Hello, NetworkHint, Ping, Pong, RecordKind, Send as SendFrame, grease,
        put_varint,
    },
    id::{ConversationId, DeviceClass, DeviceUid, Epoch, Pseq, Seq},
    limit::{CONTROL_FRAME_BYTES_MAX, SEND_PAYLOAD_BYTES_MAX},
    version::Features,
};
use support::{Phone, Running, SERVER_NAME, config, endpoint, token};

fn hello(token: &str) -> Frame {
    Frame::Hello(Hello {
        minor: 0,
        features: Features::OURS.without(Features::ACKS_ARE_ECHOES).0,
        auth: AuthProof::Token(token.to_owned()),
        device: DeviceUid([7; 16]),
        class: DeviceClass::Phone,
        epoch: Epoch::ZERO,
        cursor_digest: 0,
        changed: Vec::new(),
        network: NetworkHint::default(),
    })
}

fn with_header(channel: Channel, frames: &[&[u8]]) -> Bytes {
    let mut out = BytesMut::new();
    channel.header().unwrap().encode(&mut out);
    frames.iter().for_each(|frame| out.put_slice(frame));
    out.freeze()
}

fn send_frame(pseq: u64) -> Frame {
    Frame::Send(SendFrame {
        kind: RecordKind::Message,
        conversation: ConversationId::new(256).unwrap(),
        pseq: Pseq::new(pseq).unwrap(),
        seen: Seq::ZERO,
        reference: None,
        ttl: None,
        more: false,
        continues: false,
        silent: false,
        cancel: false,
        payload: Bytes::from_static(b"x"),
    })
}

/// What is written where, and how the gateway must close.
struct Case {
    name: &'static str,
    control: Bytes,
    uplink: Option<Bytes>,
    datagram: Option<Bytes>,
    want: CloseCode,
}

fn cases(token: &str) -> Vec<Case> {
    let good = hello(token).to_bytes();
    let ping = Frame::Ping(Ping { id: 1, time_ms: 1, flags: 0, padding: 0 }).to_bytes();
    let pong = Frame::Pong(Pong { id: 1, time_ms: 1, server_time: Default::default() }).to_bytes();
    let sized = |len: u64| {
        let mut out = BytesMut::new();
        put_varint(&mut out, len);
        out.freeze()
    };
    let control = |frames: &[&[u8]]| with_header(Channel::Control, frames);
    let case = |name, control, want| Case { name, control, uplink: None, datagram: None, want };
    let mut greased = BytesMut::new();
    grease(&mut greased, 12_345);
    let mut huge_send = BytesMut::new();
    put_varint(&mut huge_send, SEND_PAYLOAD_BYTES_MAX as u64 + 4_096);
    vec![
        case(
            "a frame longer than the channel takes",
            control(&[&sized(CONTROL_FRAME_BYTES_MAX as u64 + 1)]),
            CloseCode::TooLarge,
        ),
        case("a length of 2^62 - 1", control(&[&sized((1 << 62) - 1)]), CloseCode::TooLarge),
        case(
            "an unknown frame that must be understood",
            control(&[&good, &[2, 0x7f, 0xfe][..]]),
            CloseCode::UnknownFrame,
        ),
        case("an empty frame", control(&[&[0][..]]), CloseCode::Malformed),
        case("a HELLO of noise", control(&[&[5, 2, 0xff, 0xff, 0xff, 0xff][..]]), CloseCode::Malformed),
        case("a PING before the HELLO", control(&[&ping]), CloseCode::OutOfState),
        case("a second HELLO", control(&[&good, &good]), CloseCode::OutOfState),
        case("a frame of the gateway's", control(&[&good, &pong]), CloseCode::OutOfState),
        case(
            "skippable noise and then a SEND on the control stream",
            control(&[&good, &greased, &send_frame(1).to_bytes()]),
            CloseCode::OutOfState,
        ),
        case("a lane opened by the client", with_header(Channel::Lane(0), &[&good]), CloseCode::BadStream),
        case("a stream of a kind that does not exist", Bytes::from_static(&[9, 0]), CloseCode::BadStream),
        Case {
            uplink: Some(with_header(Channel::Uplink, &[&huge_send])),
            ..case("a SEND that is too large", control(&[&good]), CloseCode::TooLarge)
        },
        Case {
            uplink: Some(with_header(Channel::Uplink, &[&ping])),
            ..case("a PING on the uplink", control(&[&good]), CloseCode::OutOfState)
        },
        Case {
            uplink: Some(with_header(Channel::Backlog, &[])),
            ..case("a backlog opened by the client", control(&[&good]), CloseCode::BadStream)
        },
        Case {
            datagram: Some(Bytes::from_static(&[3, 0x25, 0xff])),
            ..case("a datagram that is cut", control(&[&good]), CloseCode::Malformed)
        },
        case("a bad token", control(&[&hello("not.a.token").to_bytes()]), CloseCode::AuthFailed),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_bad_input_is_answered_with_its_code_and_harms_nobody() {
    let parent = tempfile::tempdir().unwrap();
    let gateway = Running::start(config(&parent.path().join("data"))).await;
    let mut alice = Phone::new("alice", &gateway.folder, gateway.address);
    let mut bob = Phone::new("bob", &gateway.folder, gateway.address);
    alice.go_online().await;
    bob.go_online().await;
    let conversation = alice.direct("bob").await;
    let endpoint = endpoint(&gateway.folder);
    let token = token(&gateway.folder, "mallory");
    for (n, case) in cases(&token).into_iter().enumerate() {
        let quic = endpoint.connect(gateway.address, SERVER_NAME).unwrap().await.unwrap();
        let (mut control, _answers) = quic.open_bi().await.unwrap();
        control.write_all(&case.control).await.unwrap();
        if let Some(bytes) = case.uplink {
            let mut uplink = quic.open_uni().await.unwrap();
            // The gateway may have closed the connection already: what counts is the code.
            let _ = uplink.write_all(&bytes).await;
            std::mem::forget(uplink);
        }
        if let Some(bytes) = case.datagram {
            tokio::time::sleep(Duration::from_millis(200)).await;
            quic.send_datagram(bytes).unwrap();
        }
        let closed = tokio::time::timeout(Duration::from_secs(5), quic.closed()).await;
        match closed.unwrap_or_else(|_| panic!("{}: not closed", case.name)) {
            quinn::ConnectionError::ApplicationClosed(close) => {
                let code = CloseCode::from_code(u32::try_from(close.error_code.into_inner()).unwrap());
                assert_eq!(code, case.want, "{}: {}", case.name, String::from_utf8_lossy(&close.reason));
            }
            other => panic!("{}: ended with {other:?}", case.name),
        }
        alice.send(conversation, format!("still fine after {n}"));
        alice.until(|alice| alice.unacked() == 0).await;
        bob.until(|bob| bob.messages(conversation).len() == n + 1).await;
    }
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_proof_says_which_and_whether_to_retry() {
    let parent = tempfile::tempdir().unwrap();
    let gateway = Running::start(config(&parent.path().join("data"))).await;
    let other = tempfile::tempdir().unwrap();
    let foreign = token(&other.path().join("data"), "alice");
    for (proof, want) in [("garbage", RefusalCode::BadToken), (foreign.as_str(), RefusalCode::UnknownKey)] {
        let mut phone = Phone::new("alice", &gateway.folder, gateway.address);
        phone.set_token(proof.to_owned());
        assert!(phone.connect().await);
        phone.until(|phone| !phone.errors.is_empty()).await;
        assert_eq!((phone.errors[0].code, phone.errors[0].retry), (want, want.retry()), "{proof}");
    }
    gateway.stop().await;
}
