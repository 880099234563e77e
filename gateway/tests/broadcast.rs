//! Broadcasts: everybody of an app reads them, now or later, each record once; only those who are named write; and chat
//! goes on meanwhile.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "support/shard.rs"]
mod lone_shard;
mod support;

use std::{collections::HashSet, path::Path, sync::Arc, time::Duration};

use fulmar_gateway::{
    broadcasts::{Broadcast, Broadcasts},
    config::{AppConfig, BroadcastConfig, Config},
    conversation::Command,
    data_folder::DataFolder,
    fanout::owed::Settled,
    identity::token::{Mint, mint},
};
use fulmar_protocol::{
    close::RefusalCode,
    frame::{ConversationClass, OpenTarget},
    id::{AppId, ConversationId, Pseq, Seq, UserId},
    service::{
        ChangeMembers, ConversationPage, ListConversations, ListMembers, MemberPage, MembersChanged, Method,
    },
};
use lone_shard::LoneShard;
use support::{Phone, Running, config, unix_now};

const OTHER: &str = "other";

/// Two apps; the first has news, written by alice.
fn with_news(folder: &Path) -> Config {
    let mut config = config(folder);
    let news = BroadcastConfig { name: "news".to_owned(), senders: vec!["alice".to_owned()] };
    config.apps[0].broadcasts = vec![news];
    config.apps.push(AppConfig { name: OTHER.to_owned(), dev_key: true, ..AppConfig::default() });
    config
}

fn other_app(name: &str, gateway: &Running) -> Phone {
    let mut phone = Phone::new(name, &gateway.folder, gateway.address);
    let folder = DataFolder::prepare(&gateway.folder, &[]).unwrap();
    let issuer = AppConfig::default().issuer;
    let token = Mint { app: OTHER, issuer: &issuer, user: name, ttl_s: 3_600 };
    phone.set_token(mint(&folder.dev_key, token, unix_now()).unwrap());
    phone
}

/// The phones leave before it does, so that it waits for nobody.
async fn stop(gateway: Running, phones: &mut [&mut Phone]) {
    phones.iter_mut().for_each(|phone| phone.disconnect());
    gateway.stop().await;
}

async fn say(phone: &mut Phone, conversation: ConversationId, texts: &[&str]) {
    let before = phone.acked.len();
    for text in texts {
        phone.send(conversation, (*text).to_owned());
    }
    phone.until(|phone| phone.acked.len() == before + texts.len()).await;
}

async fn reads(phone: &mut Phone, news: ConversationId, texts: &[&str]) {
    phone.until(|phone| phone.messages(news).len() >= texts.len()).await;
    phone.work(Duration::from_millis(150)).await;
    assert_eq!(phone.messages(news), texts, "{}", phone.name);
}

async fn list(phone: &mut Phone) -> ConversationPage {
    let after = ConversationId::default();
    phone.call(Method::ListConversations, &ListConversations { after }).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_of_the_app_reads_it_now_or_later_and_once() {
    let parent = tempfile::tempdir().unwrap();
    let settings = with_news(&parent.path().join("data"));
    let gateway = Running::start(settings.clone()).await;
    let phone = |name: &str| Phone::new(name, &gateway.folder, gateway.address);
    let (mut alice, mut bob, mut carol) = (phone("alice"), phone("bob"), phone("carol"));
    let mut eve = other_app("eve", &gateway);
    for phone in [&mut alice, &mut bob, &mut carol, &mut eve] {
        phone.go_online().await;
    }
    let opened = alice.open(OpenTarget::Broadcast("news".to_owned())).await;
    let news = opened.conversation;
    assert_eq!((opened.class, opened.name.as_str()), (ConversationClass::Broadcast, "news"));
    say(&mut alice, news, &["one", "two", "three"]).await;
    reads(&mut bob, news, &["one", "two", "three"]).await;
    reads(&mut carol, news, &["one", "two", "three"]).await;

    // Who never was here before, and who was away for a while.
    let mut dave = phone("dave");
    dave.go_online().await;
    reads(&mut dave, news, &["one", "two", "three"]).await;
    // He comes and goes without anything new first, so that nothing but the gateway knows that there may be something now.
    for _ in 0..2 {
        bob.disconnect();
        bob.go_online().await;
        bob.work(Duration::from_millis(300)).await;
    }
    bob.disconnect();
    say(&mut alice, news, &["four", "five"]).await;
    bob.go_online().await;
    reads(&mut bob, news, &["one", "two", "three", "four", "five"]).await;
    reads(&mut carol, news, &["one", "two", "three", "four", "five"]).await;

    // It is on everybody's list, with what is unread.
    let page = list(&mut bob).await;
    let entry = page.conversations.iter().find(|entry| entry.conversation == news).expect("it is listed");
    let summary = (entry.class, entry.name.as_str(), entry.unread, entry.head.get());
    assert_eq!(
        summary,
        (ConversationClass::Broadcast, "news", 5, 6),
        "the first record says that it was made"
    );
    let now = bob.now();
    bob.half().mark(news, entry.head, now);
    bob.work(Duration::from_millis(300)).await;
    assert_eq!(list(&mut bob).await.conversations[0].unread, 0);
    assert_eq!(list(&mut eve).await.conversations, []);

    // Over a restart: cursors are known, and only what is new comes.
    carol.work(Duration::from_millis(300)).await;
    stop(gateway, &mut [&mut alice, &mut bob, &mut carol, &mut dave, &mut eve]).await;
    let gateway = Running::start(settings).await;
    for phone in [&mut alice, &mut bob, &mut carol] {
        phone.meet(gateway.address);
    }
    alice.go_online().await;
    carol.go_online().await;
    say(&mut alice, news, &["six"]).await;
    bob.go_online().await;
    let all = ["one", "two", "three", "four", "five", "six"];
    reads(&mut bob, news, &all).await;
    reads(&mut carol, news, &all).await;
    for phone in [&bob, &carol] {
        let seqs: Vec<u64> = phone.received[&news].iter().map(|record| record.seq.get()).collect();
        assert_eq!(seqs, [1, 2, 3, 4, 5, 6, 7], "{}: each once, in order", phone.name);
    }
    assert!(!eve.received.contains_key(&news) && eve.heads.is_empty(), "another app hears nothing");
    stop(gateway, &mut [&mut alice, &mut bob, &mut carol]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_not_named_only_reads_and_another_app_does_not_even_know() {
    let parent = tempfile::tempdir().unwrap();
    let settings = with_news(&parent.path().join("data"));
    let gateway = Running::start(settings.clone()).await;
    let phone = |name: &str| Phone::new(name, &gateway.folder, gateway.address);
    let (mut alice, mut bob) = (phone("alice"), phone("bob"));
    let mut eve = other_app("eve", &gateway);
    for phone in [&mut alice, &mut bob, &mut eve] {
        phone.go_online().await;
    }
    let news = alice.open(OpenTarget::Broadcast("news".to_owned())).await.conversation;
    say(&mut alice, news, &["one"]).await;
    reads(&mut bob, news, &["one"]).await;

    bob.send(news, "me too");
    bob.until(|bob| bob.refused.len() == 1).await;
    assert_eq!((bob.refused[0].code, bob.refused[0].pseq), (RefusalCode::NotAllowed, Pseq::FIRST));
    let direct = bob.direct("alice").await;
    say(&mut bob, direct, &["what I wanted to say"]).await;
    let add = ChangeMembers { conversation: news, members: vec!["bob".to_owned()] };
    let changed: Result<MembersChanged, _> = alice.call(Method::AddMembers, &add).await;
    assert_eq!(changed.map(|_| ()), Err(RefusalCode::NotAllowed));
    let members = ListMembers { conversation: news, after: UserId::default() };
    let page: Result<MemberPage, _> = bob.call(Method::ListMembers, &members).await;
    assert_eq!(page.map(|_| ()), Err(RefusalCode::NotAllowed), "who else reads is nobody's business");

    let now = eve.now();
    eve.half().open(OpenTarget::Broadcast("news".to_owned()), false, now);
    eve.half().open(OpenTarget::Number(news), false, now);
    eve.half().pull(news, Seq::FIRST, Seq::new(9).unwrap(), 10, false, now);
    eve.until(|eve| eve.errors.len() >= 2).await;
    assert!(
        eve.errors.iter().all(|error| error.code == RefusalCode::UnknownConversation),
        "{:?}",
        eve.errors
    );
    eve.send(news, "hello?");
    eve.until(|eve| eve.refused.len() == 1).await;
    assert_eq!(eve.refused[0].code, RefusalCode::UnknownConversation);
    assert!(!eve.received.contains_key(&news));
    stop(gateway, &mut [&mut alice, &mut bob, &mut eve]).await;

    // Taken out of the configuration it is served to nobody; put back, it is what it was.
    let gateway = Running::start(Config { apps: config(&settings.data.path).apps, ..settings.clone() }).await;
    let mut late = Phone::new("bob", &gateway.folder, gateway.address);
    late.go_online().await;
    let now = late.now();
    late.half().open(OpenTarget::Number(news), false, now);
    late.until(|late| late.errors.len() == 1).await;
    late.work(Duration::from_millis(200)).await;
    assert!(!late.received.contains_key(&news));
    stop(gateway, &mut [&mut late]).await;
    let gateway = Running::start(settings).await;
    late.meet(gateway.address);
    late.go_online().await;
    reads(&mut late, news, &["one"]).await;
    stop(gateway, &mut [&mut late]).await;
}

#[tokio::test]
async fn chat_of_the_same_shard_does_not_wait_until_everybody_is_told() {
    let app = AppId::of("demo");
    let shard = LoneShard::start(lone_shard::limits(), |writer| writer);
    let (owner, bob) = (shard.user(app, "owner").await, shard.user(app, "bob").await);
    let name = "news".to_owned();
    let made = shard.handle.ask(|answer| Command::Broadcast { app, name: name.clone(), owner, answer });
    let news = made.await.unwrap();
    let mut broadcasts = Broadcasts::default();
    broadcasts.insert(news, Broadcast { app, name, writers: HashSet::from([owner]) });
    shard.handle.send(Command::Broadcasts(Arc::new(broadcasts))).await.unwrap();
    let members = [(owner, "owner".to_owned()), (bob, "bob".to_owned())];
    let chat = shard.group(app, "few", members.into_iter()).await;

    // Nobody of them ever takes what it is owed, so that each slice of them is waited for.
    let mut readers = Vec::new();
    for number in 0..3_000 {
        readers.push(shard.arrive(app, UserId::new(256 * (1_000 + number)).unwrap(), number).await);
    }
    let session = shard.arrive(app, owner, 1_000_000).await;
    let told = || readers.iter().filter(|reader| reader.waiting() > 0).count();
    shard.send(&session, app, news, 1, "hear, hear").await;
    let mut acked = 0;
    for pseq in 1..=20 {
        shard.send(&session, app, chat, pseq, "hi").await;
        while acked < 1 + pseq {
            session.control_due().await;
            let settled = session.take_control().settled;
            assert!(settled.iter().all(|settled| matches!(settled, Settled::Acked { .. })), "{settled:?}");
            acked += settled.len() as u64;
        }
    }
    assert!(told() < readers.len(), "twenty messages went by while they were told");
    while told() < readers.len() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    drop(shard.handle);
    assert!(shard.worker.ended().await);
}
