//! Messages through a real gateway over real QUIC: order, acks, catch-up, groups, refusals, receipts, drain.

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

use fulmar_protocol::{
    close::RefusalCode,
    frame::{Event, EventKind, OpenTarget, RecordKind, Resumption, Send as SendFrame},
    id::{ConversationId, Pseq, Seq, UserId},
    service::{
        ChangeMembers, ConversationPage, CreateGroup, Devices, GroupCreated, ListConversations, ListMembers,
        MemberPage, MembersChanged, Method, Role,
    },
};
use support::{Phone, Running, config};

async fn world(names: &[&str]) -> (tempfile::TempDir, Running, Vec<Phone>) {
    let parent = tempfile::tempdir().unwrap();
    let gateway = Running::start(config(&parent.path().join("data"))).await;
    let mut phones = Vec::new();
    for name in names {
        let mut phone = Phone::new(name, &gateway.folder, gateway.address);
        phone.go_online().await;
        phones.push(phone);
    }
    (parent, gateway, phones)
}

fn texts(range: std::ops::RangeInclusive<u32>) -> Vec<String> {
    range.map(|n| format!("message {n}")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_is_acked_delivered_and_echoed_in_order() {
    let (_parent, gateway, mut phones) = world(&["alice", "bob"]).await;
    let (mut bob, mut alice) = (phones.pop().unwrap(), phones.pop().unwrap());
    let conversation = alice.direct("bob").await;
    assert_eq!(bob.direct("alice").await, conversation, "both find the same conversation");
    for text in texts(1..=200) {
        while !alice.has_room() {
            alice.step(Duration::from_millis(20)).await;
        }
        alice.send(conversation, text);
    }
    alice.until(|alice| alice.unacked() == 0 && alice.messages(conversation).len() == 200).await;
    bob.until(|bob| bob.messages(conversation).len() == 200).await;
    assert_eq!(bob.messages(conversation), texts(1..=200));
    assert_eq!(alice.messages(conversation), texts(1..=200), "the sender's own echo");
    for n in 1..=200u64 {
        let acked = alice.acked[&(conversation, Pseq::new(n).unwrap())];
        assert!(
            acked.is_none_or(|seq| seq == Seq::new(n + 1).unwrap()),
            "record 1 is the conversation's beginning"
        );
    }
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_was_away_catches_up_however_far_behind() {
    let (_parent, gateway, mut phones) = world(&["alice", "bob"]).await;
    let (mut bob, mut alice) = (phones.pop().unwrap(), phones.pop().unwrap());
    let conversation = alice.direct("bob").await;
    bob.until(|bob| bob.received.contains_key(&conversation)).await;
    for (away, from, to) in
        [("a little", 1, 20), ("beyond the ring", 21, 620), ("beyond the backlog", 621, 2_200)]
    {
        // Cursors are kept by the gateway before it matters that they are.
        bob.work(Duration::from_millis(100)).await;
        bob.disconnect();
        for text in texts(from..=to) {
            while !alice.has_room() {
                alice.step(Duration::from_millis(20)).await;
            }
            alice.send(conversation, text);
        }
        alice.until(|alice| alice.unacked() == 0).await;
        bob.go_online().await;
        assert_ne!(bob.welcome.as_ref().unwrap().resumption, Resumption::Fresh, "{away}");
        bob.until(|bob| bob.messages(conversation).len() >= to as usize).await;
        assert_eq!(bob.messages(conversation), texts(1..=to), "{away}");
        alice.send(conversation, format!("live after {away}"));
        alice.until(|alice| alice.unacked() == 0).await;
        // Not part of the numbered texts: taken out again below.
        bob.until(|bob| bob.messages(conversation).last().is_some_and(|text| text.starts_with("live"))).await;
        bob.received.get_mut(&conversation).unwrap().pop();
    }
    assert_eq!(bob.gaps, []);
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_keeps_everything_and_tickets_and_epochs_hold() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("data");
    let mut settings = config(&folder);
    let gateway = Running::start(settings.clone()).await;
    settings.listen.address = gateway.address;
    let mut alice = Phone::new("alice", &folder, gateway.address);
    let mut bob = Phone::new("bob", &folder, gateway.address);
    alice.go_online().await;
    let conversation = alice.direct("bob").await;
    alice.send(conversation, "one");
    alice.until(|alice| alice.unacked() == 0).await;
    let epoch = alice.welcome.as_ref().unwrap().epoch;
    gateway.stop().await;
    alice.disconnect();
    alice.send(conversation, "two, queued while nobody was there");

    let gateway = Running::start(settings).await;
    assert!(!alice.is_connected());
    alice.go_online().await;
    assert_eq!(alice.welcome.as_ref().unwrap().epoch, epoch);
    alice.until(|alice| alice.unacked() == 0).await;
    bob.go_online().await;
    bob.until(|bob| bob.messages(conversation).len() == 2).await;
    assert_eq!(bob.messages(conversation), ["one", "two, queued while nobody was there"]);
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_have_members_pages_roles_and_unread() {
    let (_parent, gateway, mut phones) = world(&["owner", "ann", "ben"]).await;
    let (mut ben, mut ann, mut owner) = (phones.pop().unwrap(), phones.pop().unwrap(), phones.pop().unwrap());
    let create = CreateGroup { name: "climbers".to_owned(), members: vec!["ann".to_owned()] };
    let GroupCreated { conversation } = owner.call(Method::CreateGroup, &create).await.unwrap();
    let again: GroupCreated = owner.call(Method::CreateGroup, &create).await.unwrap();
    assert_eq!(again.conversation, conversation, "calling again finds the same group");
    let taken = ann.call::<GroupCreated>(Method::CreateGroup, &create).await;
    assert_eq!(taken, Err(RefusalCode::NameTaken));
    let first_page = ListMembers { conversation, after: UserId::default() };
    let stranger = ben.call::<MemberPage>(Method::ListMembers, &first_page).await;
    assert_eq!(stranger, Err(RefusalCode::UnknownConversation), "who is no member learns nothing");
    let not_allowed = ann
        .call::<MembersChanged>(
            Method::AddMembers,
            &ChangeMembers { conversation, members: vec!["ben".to_owned()] },
        )
        .await;
    assert_eq!(not_allowed, Err(RefusalCode::NotAllowed));

    for round in 0..3 {
        let members: Vec<String> = (0..60).map(|n| format!("member-{round}-{n}")).collect();
        let added: MembersChanged =
            owner.call(Method::AddMembers, &ChangeMembers { conversation, members }).await.unwrap();
        assert_eq!(added.changed, 60);
    }
    let (mut after, mut listed, mut pages) = (UserId::default(), Vec::new(), 0);
    loop {
        let page: MemberPage =
            ann.call(Method::ListMembers, &ListMembers { conversation, after }).await.unwrap();
        assert_eq!(page.total, 182);
        pages += 1;
        after = page.members.last().unwrap().user;
        listed.extend(page.members);
        if !page.more {
            break;
        }
    }
    assert_eq!((listed.len(), pages > 1), (182, true));
    let entry = |name: &str| listed.iter().find(|member| member.name == name).unwrap();
    assert_eq!((entry("owner").role, entry("ann").role), (Role::Owner, Role::Member));
    assert_eq!((entry("ann").online, entry("member-0-0").online), (true, false));

    let added: MembersChanged = owner
        .call(
            Method::AddMembers,
            &ChangeMembers { conversation, members: vec!["ben".to_owned(), "ann".to_owned()] },
        )
        .await
        .unwrap();
    assert_eq!(added.changed, 1, "ann was a member before");
    for n in 1..=5 {
        owner.send(conversation, format!("hello {n}"));
    }
    owner.until(|owner| owner.unacked() == 0).await;
    ben.until(|ben| ben.messages(conversation).len() == 5).await;
    let joined = ben.received[&conversation].first().unwrap();
    assert_eq!((joined.kind, joined.seq), (RecordKind::Joined, added.seq), "ben sees it from its joining on");
    let list = ListConversations { after: ConversationId::default() };
    let page: ConversationPage = ben.call(Method::ListConversations, &list).await.unwrap();
    assert_eq!(
        page.conversations.iter().map(|entry| (entry.name.as_str(), entry.unread)).collect::<Vec<_>>(),
        [("climbers", 5)]
    );
    let head = page.conversations[0].head;
    let now = ben.now();
    ben.half().mark(conversation, head.prev(), now);
    // A mark is not answered: it shows when it was carried out.
    let mut unread = 5;
    for _ in 0..200 {
        ben.work(Duration::from_millis(50)).await;
        let page: ConversationPage = ben.call(Method::ListConversations, &list).await.unwrap();
        unread = page.conversations[0].unread;
        if unread != 5 {
            break;
        }
    }
    assert_eq!(unread, 1);
    let own: ConversationPage = owner.call(Method::ListConversations, &list).await.unwrap();
    assert_eq!(own.conversations[0].unread, 0, "own messages are not unread");

    let removed: MembersChanged = owner
        .call(Method::RemoveMembers, &ChangeMembers { conversation, members: vec!["ben".to_owned()] })
        .await
        .unwrap();
    assert_eq!(removed.changed, 1);
    ben.until(|ben| ben.received[&conversation].last().is_some_and(|record| record.kind == RecordKind::Left))
        .await;
    owner.send(conversation, "without ben");
    owner.until(|owner| owner.unacked() == 0).await;
    ann.until(|ann| ann.messages(conversation).len() == 6).await;
    ben.send(conversation, "still here?");
    ben.until(|ben| !ben.refused.is_empty()).await;
    assert_eq!(ben.refused[0].code, RefusalCode::NotAMember);
    assert_eq!(ben.messages(conversation).len(), 5);
    let page: ConversationPage = ben.call(Method::ListConversations, &list).await.unwrap();
    assert_eq!(page.conversations, []);
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_say_which_and_do_not_block_what_follows() {
    let (_parent, gateway, mut phones) = world(&["alice", "bob"]).await;
    let (mut bob, mut alice) = (phones.pop().unwrap(), phones.pop().unwrap());
    let conversation = alice.direct("bob").await;
    let base = SendFrame {
        kind: RecordKind::Message,
        conversation,
        pseq: Pseq::FIRST,
        seen: Seq::ZERO,
        reference: None,
        ttl: None,
        more: false,
        continues: false,
        silent: false,
        cancel: false,
        payload: bytes::Bytes::from_static(b"x"),
    };
    alice.send_frame(SendFrame { ttl: Some(0), ..base.clone() });
    alice.send_frame(SendFrame {
        kind: RecordKind::Edit,
        reference: Some(Seq::new(99).unwrap()),
        ..base.clone()
    });
    alice.send_frame(SendFrame { cancel: true, ..base.clone() });
    alice.send(conversation, "goes through");
    alice.until(|alice| alice.unacked() == 0 && alice.refused.len() == 3).await;
    let codes: Vec<_> = alice.refused.iter().map(|refused| refused.code).collect();
    assert_eq!(codes, [RefusalCode::Expired, RefusalCode::UnknownReference, RefusalCode::Cancelled]);
    bob.until(|bob| bob.messages(conversation) == ["goes through"]).await;

    // An edit of somebody else's message, after it was committed.
    let message = bob.received[&conversation].last().unwrap().seq;
    bob.send_frame(SendFrame { kind: RecordKind::Edit, reference: Some(message), ..base.clone() });
    bob.send_frame(SendFrame { kind: RecordKind::Reaction, reference: Some(message), ..base });
    bob.until(|bob| bob.unacked() == 0 && bob.refused.len() == 1).await;
    assert_eq!(bob.refused[0].code, RefusalCode::NotAllowed);
    alice
        .until(|alice| alice.received[&conversation].last().is_some_and(|r| r.kind == RecordKind::Reaction))
        .await;

    let nowhere = ConversationId::new(256 * 77_777).unwrap();
    alice.send(nowhere, "to nobody");
    alice.until(|alice| alice.refused.len() == 4).await;
    assert_eq!(alice.refused[3].code, RefusalCode::UnknownConversation);
    let now = alice.now();
    alice.half().open(OpenTarget::Group("no such group".to_owned()), false, now);
    alice.until(|alice| !alice.errors.is_empty()).await;
    assert_eq!(alice.errors[0].code, RefusalCode::UnknownConversation);
    let now = alice.now();
    alice.half().open(OpenTarget::Direct("bad\nname".to_owned()), false, now);
    alice.until(|alice| alice.errors.len() == 2).await;
    assert_eq!(alice.errors[1].code, RefusalCode::BadName);
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn receipts_and_typing_reach_the_other_side_and_devices_are_listed() {
    let (_parent, gateway, mut phones) = world(&["alice", "bob"]).await;
    let (mut bob, mut alice) = (phones.pop().unwrap(), phones.pop().unwrap());
    let conversation = alice.direct("bob").await;
    // On screen: what the others have come to is told at once.
    let (now, opened) = (alice.now(), alice.opened.len());
    alice.half().open(OpenTarget::Number(conversation), true, now);
    alice.until(|alice| alice.opened.len() > opened).await;
    let pseq = alice.send(conversation, "did you get this?");
    alice.until(|alice| alice.unacked() == 0).await;
    bob.until(|bob| bob.messages(conversation).len() == 1).await;
    let seq = bob.received[&conversation].last().unwrap().seq;
    bob.work(Duration::from_millis(50)).await;
    alice.until(|alice| alice.receipts.iter().any(|receipt| receipt.recv == seq)).await;
    let now = bob.now();
    bob.half().mark(conversation, seq, now);
    bob.work(Duration::from_millis(50)).await;
    alice.until(|alice| alice.receipts.iter().any(|receipt| receipt.read == seq)).await;
    assert!(alice.acked.contains_key(&(conversation, pseq)));
    let now = bob.now();
    let typing = Event {
        conversation,
        kind: EventKind::Typing,
        sender: UserId::default(),
        number: 1,
        ttl_ms: 3_000,
        payload: bytes::Bytes::new(),
    };
    bob.half().event(typing, now);
    bob.work(Duration::from_millis(50)).await;
    alice.until(|alice| !alice.events.is_empty()).await;
    assert_eq!(Some(alice.events[0].sender), bob.welcome.as_ref().map(|welcome| welcome.user));

    let mut tablet = Phone::new("alice", &gateway.folder, gateway.address);
    tablet.go_online().await;
    tablet.until(|tablet| tablet.messages(conversation).len() == 1).await;
    let devices: Devices = tablet.call(Method::MyDevices, &()).await.unwrap();
    assert_eq!(devices.devices.iter().filter(|device| device.online).count(), 2);
    assert_eq!(devices.devices.iter().filter(|device| device.this).count(), 1);
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_says_goaway_and_loses_nothing() {
    let (_parent, gateway, mut phones) = world(&["alice", "bob"]).await;
    let (mut bob, mut alice) = (phones.pop().unwrap(), phones.pop().unwrap());
    let conversation = alice.direct("bob").await;
    for text in texts(1..=50) {
        alice.send(conversation, text);
    }
    gateway.drain();
    alice.until(|alice| alice.goaways > 0 && alice.unacked() == 0).await;
    bob.until(|bob| bob.goaways > 0 && bob.messages(conversation).len() == 50).await;
    let mut late = Phone::new("late", &gateway.folder, gateway.address);
    assert!(!late.connect().await, "who comes now is sent away");
    alice.disconnect();
    bob.disconnect();
    gateway.stop().await;
}
