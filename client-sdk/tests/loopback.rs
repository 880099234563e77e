//! The client against a scripted gateway over real QUIC on loopback.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking, its gateway too"
)]

mod scripted;

use std::time::Duration;

use fulmar_client::{
    Client, CloseReason, ConnectionState, Database, Error, Messages, OfflineReason, Options, Received,
    RecordKind, RefusalCode, SendError, SendStatus, Seq, in_memory,
};
use fulmar_protocol::{close::CloseCode, id::FolderId};
use scripted::{Road, Scripted};

/// Long enough for anything that works; only what hangs takes it.
const PATIENCE: Duration = Duration::from_secs(30);

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("it hangs")
}

async fn client_with(gateway: &Scripted, database: impl Into<Database>, user: &str) -> Client {
    let options = Options::new(database, gateway.address.to_string(), "localhost", user);
    Client::connect(options.trust(gateway.trust())).await.unwrap()
}

async fn client(gateway: &Scripted, user: &str) -> Client {
    client_with(gateway, in_memory(), user).await
}

async fn texts(messages: &mut Messages, count: usize) -> Vec<String> {
    let mut texts = Vec::new();
    while texts.len() < count {
        let Received { payload, .. } = soon(messages.next()).await.expect("the stream goes on");
        texts.push(String::from_utf8(payload.to_vec()).unwrap());
    }
    texts
}

fn numbered(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|index| format!("message {index}")).collect()
}

#[test]
fn handles_go_everywhere() {
    fn everywhere<T: Send + Sync + 'static>() {}
    everywhere::<Client>();
    everywhere::<fulmar_client::Conversation>();
    everywhere::<fulmar_client::SendHandle>();
    everywhere::<Messages>();
}

#[tokio::test]
async fn a_message_is_acked_and_arrives() {
    let gateway = Scripted::start().await;
    let (alice, bob) = (client(&gateway, "alice").await, client(&gateway, "bob").await);
    assert!(soon(bob.state().live()).await);
    let handle = alice.direct("bob").await.unwrap().send("hello").await.unwrap();
    assert_eq!(soon(handle.acked()).await, Ok(Seq::FIRST));
    let mut messages = bob.messages();
    let received = soon(messages.next()).await.unwrap();
    assert_eq!((&received.payload[..], received.own, received.seq), (&b"hello"[..], false, Seq::FIRST));
    assert_eq!(received.kind, RecordKind::Message);
    let name = soon(bob.name_of(received.sender)).await.unwrap();
    assert_eq!(name.as_deref(), Some("alice"));
    let own = soon(alice.messages().next()).await.unwrap();
    assert!(own.own && own.this_device, "{own:?}");
    soon(handle.delivered()).await.unwrap();
    assert_eq!(handle.status(), SendStatus::Delivered);
    assert_eq!(alice.conversations().await.unwrap()[0].name, "bob");
    assert!(alice.traffic().sent_bytes > 0);
    drop(handle);
    alice.close().await.unwrap();
    assert_eq!(alice.state().current(), ConnectionState::Closed { reason: CloseReason::Requested });
    assert!(alice.outbox().await.unwrap().is_empty(), "what the app saw is forgotten");
    bob.close().await.unwrap();
    assert!(messages.next().await.is_none());
}

#[tokio::test]
async fn what_was_queued_offline_leaves_in_order_and_once_over_cuts() {
    let gateway = Scripted::start().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("alice.db");
    {
        // Nobody listens there.
        let options =
            Options::new(file.as_path(), "127.0.0.1:9", "localhost", "alice").trust(gateway.trust());
        let alice = Client::connect(options).await.unwrap();
        let bob = alice.direct("bob").await.unwrap();
        for text in numbered(0..100) {
            bob.send(text).await.unwrap();
        }
        alice.close().await.unwrap();
    }
    gateway.faults(|faults| faults.cut_before_ack = 3);
    let alice = client_with(&gateway, file.as_path(), "alice").await;
    let waiting = alice.outbox().await.unwrap();
    assert_eq!(waiting.len(), 100);
    let bob = alice.direct("bob").await.unwrap();
    for text in numbered(100..200) {
        bob.send(text).await.unwrap();
    }
    for (index, entry) in waiting.iter().enumerate() {
        assert_eq!(&entry.payload[..], numbered(index..index + 1)[0].as_bytes());
        soon(entry.handle.acked()).await.unwrap();
    }
    let receiver = client(&gateway, "bob").await;
    assert_eq!(texts(&mut receiver.messages(), 200).await, numbered(0..200));
    let number = soon(bob.resolved()).await.unwrap();
    assert_eq!(gateway.log(number).len(), 200, "each is stored once");
    assert!(gateway.connections() >= 5, "it was cut and came again");
}

#[tokio::test]
async fn the_receiver_gets_each_message_once_over_cuts_and_restarts() {
    let gateway = Scripted::start().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("bob.db");
    let alice = client(&gateway, "alice").await;
    let to_bob = alice.direct("bob").await.unwrap();
    let mut got = Vec::new();
    for round in 0..5 {
        let bob = client_with(&gateway, file.as_path(), "bob").await;
        let mut messages = bob.messages();
        for text in numbered(round * 20..round * 20 + 20) {
            to_bob.send(text).await.unwrap();
            if round % 2 == 1 {
                gateway.cut(CloseCode::Internal);
            }
        }
        got.extend(texts(&mut messages, 20).await);
        messages.done();
        bob.close().await.unwrap();
    }
    assert_eq!(got, numbered(0..100));
}

#[tokio::test]
async fn a_large_body_travels_in_pieces_and_arrives_whole() {
    let gateway = Scripted::start().await;
    let (alice, bob) = (client(&gateway, "alice").await, client(&gateway, "bob").await);
    let body: Vec<u8> = (0..300_000u32).map(|index| (index % 251) as u8).collect();
    let to_bob = alice.direct("bob").await.unwrap();
    let handle = to_bob.send(body.clone()).await.unwrap();
    let after = to_bob.send("after").await.unwrap();
    let pieces = 300_000u64.div_ceil(16 * 1024);
    assert_eq!(soon(handle.acked()).await.unwrap().get(), pieces);
    assert_eq!(soon(after.acked()).await.unwrap().get(), pieces + 1);
    let mut messages = bob.messages();
    let received = soon(messages.next()).await.unwrap();
    assert_eq!((received.seq.get(), received.payload == body), (pieces, true));
    assert_eq!(soon(messages.next()).await.unwrap().text(), "after");
    let unread = soon(bob.conversations()).await.unwrap()[0].unread;
    assert_eq!(unread, 2, "a body counts once");
    let too_large = to_bob.send(vec![0; 8 * 1024 * 1024 + 1]).await;
    assert!(matches!(too_large, Err(Error::BodyTooLarge { .. })));
}

#[tokio::test]
async fn refusals_end_the_send_and_not_the_lane() {
    let gateway = Scripted::start().await;
    let alice = client(&gateway, "alice").await;
    let ghost = alice.direct("ghost").await.unwrap();
    let lost = ghost.send("anybody?").await.unwrap();
    assert_eq!(soon(lost.acked()).await, Err(SendError::Refused(RefusalCode::UnknownUser)));
    assert!(matches!(soon(ghost.resolved()).await, Err(Error::Refused { .. })));
    let bob = alice.direct("bob").await.unwrap();
    soon(bob.send("first").await.unwrap().acked()).await.unwrap();
    gateway.faults(|faults| faults.refuse_sends = true);
    let refused = bob.send("second").await.unwrap();
    assert_eq!(soon(refused.acked()).await, Err(SendError::Refused(RefusalCode::NotAllowed)));
    gateway.faults(|faults| faults.refuse_sends = false);
    assert_eq!(soon(bob.send("third").await.unwrap().acked()).await.unwrap().get(), 2);
}

#[tokio::test]
async fn a_road_that_goes_dark_is_noticed_and_left() {
    let gateway = Scripted::start().await;
    let road = Road::to(&gateway).await;
    let options = Options::new(in_memory(), road.address.to_string(), "localhost", "alice");
    let alice = Client::connect(options.trust(gateway.trust())).await.unwrap();
    let bob = alice.direct("bob").await.unwrap();
    soon(bob.send("before").await.unwrap().acked()).await.unwrap();
    assert!(soon(alice.state().live()).await);
    road.dark(true);
    let waiting = bob.send("meanwhile").await.unwrap();
    let mut states = alice.state();
    let mut seen = Vec::new();
    while !matches!(seen.last(), Some(ConnectionState::Connecting)) {
        seen.push(soon(states.next()).await.unwrap());
    }
    assert!(seen.contains(&ConnectionState::Suspect), "{seen:?}");
    road.dark(false);
    soon(waiting.acked()).await.unwrap();
    assert_eq!(gateway.log(bob.number().unwrap()).len(), 2);
}

#[tokio::test]
async fn who_only_waits_notices_a_dark_road_too() {
    let gateway = Scripted::start().await;
    let road = Road::to(&gateway).await;
    let options = Options::new(in_memory(), road.address.to_string(), "localhost", "bob");
    let bob = Client::connect(options.trust(gateway.trust())).await.unwrap();
    let alice = client(&gateway, "alice").await;
    let to_bob = alice.direct("bob").await.unwrap();
    to_bob.send("one").await.unwrap();
    let mut messages = bob.messages();
    assert_eq!(texts(&mut messages, 1).await, ["one"]);
    assert!(soon(bob.state().live()).await);
    road.dark(true);
    to_bob.send("two").await.unwrap();
    let mut states = bob.state();
    while soon(states.next()).await.unwrap() != ConnectionState::Connecting {}
    road.dark(false);
    assert_eq!(texts(&mut messages, 1).await, ["two"]);
}

#[tokio::test]
async fn a_connection_that_is_closed_is_made_again() {
    let gateway = Scripted::start().await;
    let alice = client(&gateway, "alice").await;
    let bob = alice.direct("bob").await.unwrap();
    soon(bob.send("before").await.unwrap().acked()).await.unwrap();
    gateway.faults(|faults| faults.mute = true);
    gateway.cut(CloseCode::Internal);
    let waiting = bob.send("meanwhile").await.unwrap();
    let mut states = alice.state();
    loop {
        if let ConnectionState::Offline { reason, retry_in } = soon(states.next()).await.unwrap() {
            assert!(retry_in.is_some());
            assert!(!matches!(reason, OfflineReason::Suspended));
            break;
        }
    }
    gateway.faults(|faults| faults.mute = false);
    soon(waiting.acked()).await.unwrap();
}

#[tokio::test]
async fn attempts_that_nobody_answers_cost_what_they_send() {
    let gateway = Scripted::start().await;
    gateway.faults(|faults| faults.mute = true);
    let alice = client(&gateway, "alice").await;
    let mut states = alice.state();
    // A race in which nobody answers, and the wait after it.
    soon(async {
        while !matches!(states.next().await.unwrap(), ConnectionState::Offline { retry_in: Some(wait), .. } if wait > Duration::ZERO) {}
    })
    .await;
    let traffic = alice.traffic();
    assert_eq!(traffic.connections, 0);
    // The first packet of a handshake has 1 200 bytes at least, and there were several attempts.
    assert!(traffic.sent_bytes >= 3 * 1_200, "{traffic:?}");
}

#[tokio::test]
async fn a_goaway_is_followed_by_the_next_connection() {
    let gateway = Scripted::start().await;
    let alice = client(&gateway, "alice").await;
    let bob = alice.direct("bob").await.unwrap();
    soon(bob.send("one").await.unwrap().acked()).await.unwrap();
    let before = gateway.connections();
    gateway.say_goaway();
    soon(async {
        while gateway.connections() == before {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    soon(bob.send("two").await.unwrap().acked()).await.unwrap();
    assert!(soon(alice.state().live()).await);
}

#[tokio::test]
async fn terminal_answers_end_the_client() {
    let gateway = Scripted::start().await;
    let nobody = client(&gateway, "nobody").await;
    assert!(!soon(nobody.state().live()).await);
    let closed = |reason| ConnectionState::Closed { reason };
    assert_eq!(nobody.state().current(), closed(CloseReason::Refused(RefusalCode::BadToken)));
    let kicked = client(&gateway, "alice").await;
    assert!(soon(kicked.state().live()).await);
    gateway.cut(CloseCode::Kicked);
    let mut states = kicked.state();
    while soon(states.next()).await.unwrap() != closed(CloseReason::Kicked(String::new())) {}
    let refused = kicked.direct("bob").await.unwrap().send("late").await;
    assert!(matches!(refused, Err(Error::Closed)));
}

#[tokio::test]
async fn a_gateway_with_another_data_folder_ends_the_client_before_anything_is_sent_there() {
    let gateway = Scripted::start().await;
    gateway.move_to(FolderId([1; 16]));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("alice.db");
    let alice = client_with(&gateway, path.clone(), "alice").await;
    let bob = alice.direct("bob").await.unwrap();
    soon(bob.send("here").await.unwrap().acked()).await.unwrap();
    gateway.move_to(FolderId([2; 16]));
    gateway.faults(|faults| faults.mute = true);
    gateway.cut(CloseCode::Internal);
    bob.send("there").await.unwrap();
    gateway.faults(|faults| faults.mute = false);
    let ended = ConnectionState::Closed { reason: CloseReason::OtherGateway };
    let mut states = alice.state();
    while soon(states.next()).await.unwrap() != ended {}
    assert!(gateway.is_untouched(), "nothing was sent under numbers that mean something else there");
    alice.close().await.unwrap();
    drop((alice, bob));
    // Nor does it when the app was restarted.
    let again = client_with(&gateway, path.clone(), "alice").await;
    let mut states = again.state();
    while soon(states.next()).await.unwrap() != ended {}
    assert!(gateway.is_untouched());
}

#[tokio::test]
async fn a_ticket_that_is_refused_gives_way_to_the_token() {
    let gateway = Scripted::start().await;
    let alice = client(&gateway, "alice").await;
    assert!(soon(alice.state().live()).await);
    gateway.faults(|faults| faults.refuse_tickets = true);
    gateway.cut(CloseCode::Internal);
    let bob = alice.direct("bob").await.unwrap();
    soon(bob.send("again").await.unwrap().acked()).await.unwrap();
}

#[tokio::test]
async fn another_epoch_numbers_what_waits_anew() {
    let gateway = Scripted::start().await;
    let alice = client(&gateway, "alice").await;
    let bob = alice.direct("bob").await.unwrap();
    for text in numbered(0..3) {
        soon(bob.send(text).await.unwrap().acked()).await.unwrap();
    }
    gateway.forget_devices();
    gateway.cut(CloseCode::Internal);
    let handles = [bob.send("message 3").await.unwrap(), bob.send("message 4").await.unwrap()];
    for handle in &handles {
        soon(handle.acked()).await.unwrap();
    }
    let number = soon(bob.resolved()).await.unwrap();
    assert_eq!(gateway.log(number), numbered(0..5));
}

#[tokio::test]
async fn a_suspended_client_says_nothing_until_it_is_resumed() {
    let gateway = Scripted::start().await;
    let alice = client(&gateway, "alice").await;
    assert!(soon(alice.state().live()).await);
    alice.suspend().await.unwrap();
    let mut states = alice.state();
    let suspended = ConnectionState::Offline { reason: OfflineReason::Suspended, retry_in: None };
    while soon(states.next()).await.unwrap() != suspended {}
    let handle = alice.direct("bob").await.unwrap().send("later").await.unwrap();
    assert_eq!(handle.status(), SendStatus::Queued);
    handle.cancel().await.unwrap();
    assert_eq!(handle.status(), SendStatus::Expired, "it had no number yet");
    alice.resume().await.unwrap();
    assert!(soon(states.live()).await);
}

#[tokio::test]
async fn read_marks_reach_the_gateway_also_from_offline() {
    let gateway = Scripted::start().await;
    let (alice, bob) = (client(&gateway, "alice").await, client(&gateway, "bob").await);
    soon(alice.direct("bob").await.unwrap().send("read me").await.unwrap().acked()).await.unwrap();
    let received = soon(bob.messages().next()).await.unwrap();
    bob.suspend().await.unwrap();
    bob.conversation(received.conversation).mark_read(received.seq).await.unwrap();
    bob.resume().await.unwrap();
    soon(async {
        while gateway.read("bob", received.conversation) != Some(received.seq) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    let history = bob.conversation(received.conversation).history(None, 10).await.unwrap();
    assert_eq!((history.len(), &history[0].payload), (1, &received.payload));
}
