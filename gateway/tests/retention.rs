//! What clients see when the oldest records of a conversation go: where it begins now, and an explicit gap for whoever
//! was not that far.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that finds something wrong stops there"
)]

mod support;

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    time::Duration,
};

use fulmar_client::{Client, ClientEvent, Options, Trust};
use fulmar_gateway::config::{Config, retention::Keep};
use fulmar_protocol::{
    close::RefusalCode,
    frame::{OpenTarget, RecordKind, Send as SendFrame},
    id::{ConversationId, Pseq, Seq},
    service::{CreateGroup, GroupCreated, Method},
};
use support::{Phone, Running, config, token};

const BODY: usize = 8_000;

/// Groups keep 64 KiB: eight messages of [`BODY`]. Direct conversations keep everything.
fn groups_keep_little(folder: &Path) -> Config {
    let mut config = config(folder);
    config.listen.http_address = Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
    config.retention.group_bytes = Keep::at(64 << 10);
    config.retention.sweep_s = 1;
    config
}

fn large(n: u32) -> String {
    format!("{n:0BODY$}")
}

async fn say(phone: &mut Phone, conversation: ConversationId, texts: impl IntoIterator<Item = String>) {
    for text in texts {
        while !phone.has_room() {
            phone.step(Duration::from_millis(20)).await;
        }
        phone.send(conversation, text);
    }
    phone.until(|phone| phone.unacked() == 0).await;
}

async fn group(owner: &mut Phone, members: &[&str]) -> ConversationId {
    let members = members.iter().map(|name| (*name).to_owned()).collect();
    let create = CreateGroup { name: "climbers".to_owned(), members };
    let GroupCreated { conversation } = owner.call(Method::CreateGroup, &create).await.unwrap();
    conversation
}

fn low(phone: &Phone, conversation: ConversationId) -> u64 {
    let heads = phone.heads.iter().filter(|head| head.conversation == conversation);
    heads.map(|head| head.low.get()).max().unwrap_or_default()
}

/// Seqs in the order in which they were handed out, a gap as its bounds.
fn covered(phone: &Phone, conversation: ConversationId) -> Vec<(u64, u64)> {
    let records = phone.received.get(&conversation).into_iter().flatten();
    let records = records.map(|record| (record.seq.get(), record.seq.get()));
    let gaps = phone.gaps.iter().filter(|(of, ..)| *of == conversation);
    let mut covered: Vec<_> = records.chain(gaps.map(|(_, from, to)| (from.get(), to.get()))).collect();
    covered.sort_unstable();
    covered
}

fn assert_whole(phone: &Phone, conversation: ConversationId, head: u64) {
    let mut next = 1;
    for (from, to) in covered(phone, conversation) {
        assert_eq!(from, next, "{}: neither a record nor a gap", phone.name);
        next = to + 1;
    }
    assert_eq!(next, head + 1, "{}", phone.name);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_beyond_the_bytes_goes_and_everybody_is_told() {
    let parent = tempfile::tempdir().unwrap();
    let settings = groups_keep_little(&parent.path().join("data"));
    let gateway = Running::start(settings.clone()).await;
    let phone = |name: &str| Phone::new(name, &gateway.folder, gateway.address);
    let (mut alice, mut bob, mut away) = (phone("alice"), phone("bob"), phone("bob"));
    alice.go_online().await;
    bob.go_online().await;
    away.go_online().await;
    let direct = alice.direct("bob").await;
    let climbers = group(&mut alice, &["bob"]).await;
    say(&mut alice, climbers, (1..=4).map(large)).await;
    away.until(|away| away.messages(climbers).len() == 4).await;
    away.work(Duration::from_millis(200)).await;
    away.disconnect();
    say(&mut alice, climbers, (5..=30).map(large)).await;
    say(&mut alice, direct, (1..=30).map(large)).await;
    bob.until(|bob| bob.messages(climbers).len() + bob.messages(direct).len() >= 38).await;

    // 31 records, the last eight of which fit.
    bob.until(|bob| low(bob, climbers) == 24).await;
    alice.until(|alice| low(alice, climbers) == 24).await;
    // Counted when the sweep hears of it, which may be after the clients did.
    while gateway.metric("fulmar_retention_records_total").await < 23.0 {
        bob.step(Duration::from_millis(20)).await;
    }
    assert_eq!(gateway.metric("fulmar_retention_records_total").await, 23.0);
    assert_eq!(bob.open(OpenTarget::Number(climbers)).await.low, Seq::new(24).unwrap());
    assert_eq!((bob.open(OpenTarget::Number(direct)).await.low, low(&bob, direct)), (Seq::FIRST, 0));
    bob.until(|bob| bob.messages(direct).len() == 30).await;
    assert_whole(&bob, climbers, 31);

    // Who was not that far learns what it will never have.
    away.go_online().await;
    away.until(|away| away.messages(climbers).len() >= 12).await;
    let seq = |n| Seq::new(n).unwrap();
    assert_eq!(away.gaps, [(climbers, seq(6), seq(23))]);
    assert_whole(&away, climbers, 31);
    let mut fresh = phone("bob");
    fresh.go_online().await;
    fresh.until(|fresh| fresh.messages(climbers).len() >= 8 && fresh.messages(direct).len() >= 30).await;
    assert_eq!(fresh.gaps, [(climbers, seq(1), seq(23))]);
    assert_whole(&fresh, climbers, 31);

    // What is gone can't be referred to, and blocks nothing.
    let reply = SendFrame {
        kind: RecordKind::Reaction,
        conversation: climbers,
        pseq: Pseq::FIRST,
        seen: Seq::ZERO,
        reference: Some(seq(10)),
        ttl: None,
        more: false,
        continues: false,
        silent: false,
        cancel: false,
        payload: "+1".into(),
    };
    alice.send_frame(reply);
    alice.until(|alice| alice.unacked() == 0).await;
    assert_eq!(alice.refused.last().unwrap().code, RefusalCode::UnknownReference);
    say(&mut alice, climbers, ["after all".to_owned()]).await;
    bob.until(|bob| bob.messages(climbers).last().is_some_and(|text| text == "after all")).await;

    gateway.stop().await;
    let gateway = Running::start(settings).await;
    let mut bob = Phone::new("bob", &gateway.folder, gateway.address);
    bob.go_online().await;
    assert!(bob.open(OpenTarget::Number(climbers)).await.low >= seq(24), "it stays gone");
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_too_old_goes_even_if_nothing_is_left() {
    let parent = tempfile::tempdir().unwrap();
    let mut settings = config(&parent.path().join("data"));
    settings.apps[0].retention_age = Keep::at(2_000);
    settings.retention.sweep_s = 1;
    settings.retention.clock_settle_s = 1;
    let gateway = Running::start(settings).await;
    let mut alice = Phone::new("alice", &gateway.folder, gateway.address);
    let mut bob = Phone::new("bob", &gateway.folder, gateway.address);
    alice.go_online().await;
    bob.go_online().await;
    let conversation = alice.direct("bob").await;
    say(&mut alice, conversation, ["one".to_owned()]).await;
    bob.until(|bob| bob.messages(conversation).len() == 1).await;
    bob.work(Duration::from_millis(200)).await;
    bob.disconnect();
    say(&mut alice, conversation, (2..=5).map(|n| n.to_string())).await;
    alice.until(|alice| low(alice, conversation) == 7).await;

    // Six records, all gone: bob is told so without waiting for the next one.
    bob.go_online().await;
    bob.until(|bob| !bob.gaps.is_empty()).await;
    assert_eq!(bob.gaps, [(conversation, Seq::new(3).unwrap(), Seq::new(6).unwrap())]);
    say(&mut alice, conversation, ["new".to_owned()]).await;
    bob.until(|bob| bob.messages(conversation).len() == 2).await;
    assert_whole(&bob, conversation, 7);
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_falls_behind_while_the_log_gets_shorter_gets_a_gap() {
    let parent = tempfile::tempdir().unwrap();
    let gateway = Running::start(groups_keep_little(&parent.path().join("data"))).await;
    let mut alice = Phone::new("alice", &gateway.folder, gateway.address);
    let mut slow = Phone::narrow("slow", &gateway.folder, gateway.address);
    alice.go_online().await;
    slow.go_online().await;
    let climbers = group(&mut alice, &["slow"]).await;
    slow.until(|slow| slow.received.contains_key(&climbers)).await;
    // Nobody takes anything out of the slow one's streams: what it is owed waits at the gateway, as a position.
    let huge = |n: u32| format!("{n:015000}");
    say(&mut alice, climbers, (1..=150).map(huge)).await;
    alice.until(|alice| low(alice, climbers) >= 145).await;
    slow.until(|slow| slow.messages(climbers).last().is_some_and(|text| *text == huge(150))).await;
    // Found out when there was room for more.
    let behind = gateway.metric("fulmar_fell_behind_total").await;
    assert!(behind >= 1.0, "it was not slow enough");
    assert!(!slow.gaps.is_empty() && slow.connects == 1 && slow.errors.is_empty(), "{}", slow.describe());
    assert_whole(&slow, climbers, 151);
    say(&mut alice, climbers, ["live".to_owned()]).await;
    slow.until(|slow| slow.messages(climbers).last().is_some_and(|text| text == "live")).await;
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_application_is_told_of_the_gap_once() {
    let parent = tempfile::tempdir().unwrap();
    let gateway = Running::start(groups_keep_little(&parent.path().join("data"))).await;
    let mut alice = Phone::new("alice", &gateway.folder, gateway.address);
    alice.go_online().await;
    let options = || {
        let database = parent.path().join("bob.db");
        Options::new(database, gateway.address.to_string(), "localhost", token(&gateway.folder, "bob"))
            .trust(Trust::CertificateFile(gateway.folder.join("tls/cert.pem")))
    };
    let bob = Client::connect(options()).await.unwrap();
    assert!(bob.state().live().await);
    let climbers = group(&mut alice, &["bob"]).await;
    let mut messages = bob.messages();
    say(&mut alice, climbers, ["seen".to_owned()]).await;
    while messages.next().await.unwrap().text() != "seen" {}
    messages.done();
    bob.close().await.unwrap();
    drop((messages, bob));

    say(&mut alice, climbers, (1..=30).map(large)).await;
    alice.until(|alice| low(alice, climbers) >= 25).await;
    let begins = low(&alice, climbers);
    for round in 0..2 {
        let bob = Client::connect(options()).await.unwrap();
        let (mut events, mut messages) = (bob.events(), bob.messages());
        assert!(bob.state().live().await);
        if round == 0 {
            let gap = async {
                loop {
                    if let ClientEvent::Gap { conversation, from, to } = events.next().await.unwrap() {
                        return (conversation, from.get(), to.get());
                    }
                }
            };
            assert_eq!(
                tokio::time::timeout(Duration::from_secs(10), gap).await,
                Ok((climbers, 3, begins - 1))
            );
            let mut seqs = Vec::new();
            while seqs.last() != Some(&32) {
                let next = tokio::time::timeout(Duration::from_secs(10), messages.next()).await;
                seqs.push(next.expect("the rest comes").unwrap().seq.get());
            }
            assert_eq!(seqs, (begins..=32).collect::<Vec<_>>());
            messages.done();
        } else {
            say(&mut alice, climbers, ["later".to_owned()]).await;
            let next = tokio::time::timeout(Duration::from_secs(10), messages.next()).await;
            assert_eq!(next.expect("it comes").unwrap().text(), "later", "nothing again");
            messages.done();
            let again = tokio::time::timeout(Duration::from_millis(300), async {
                loop {
                    if let ClientEvent::Gap { .. } = events.next().await.unwrap() {
                        return;
                    }
                }
            });
            assert!(again.await.is_err(), "the gap was told before");
        }
        bob.close().await.unwrap();
    }
    gateway.stop().await;
}
