//! A message that is lost alone, between real clients and a real gateway: the copy in a datagram brings it.

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
    time::Duration,
};

use fulmar_badnet::{
    Path, Share,
    net::{Delay, Impairment, Loss},
    proxy::{self, FlowReport, Proxy},
};
use fulmar_protocol::{
    frame::{Frame, OpenTarget, RecordKind, Send},
    id::{ConversationId, Pseq, Seq},
};
use support::{Phone, Running, config};

/// Half a round trip: long enough that a busy machine is quick beside it.
const ONE_WAY: Duration = Duration::from_millis(100);

fn path(up: Loss, down: Loss) -> Path {
    let way = |loss| Impairment { delay: Delay::fixed(ONE_WAY), loss, ..Impairment::default() };
    Path { up: way(up), down: way(down) }
}

fn everything() -> Loss {
    Loss::random(Share::ALL)
}

struct World {
    _parent: tempfile::TempDir,
    gateway: Running,
    proxy: Proxy,
    phones: Vec<Phone>,
    conversation: ConversationId,
}

impl World {
    /// Two phones that know what a round trip takes.
    async fn new() -> Self {
        let parent = tempfile::tempdir().unwrap();
        let mut config = config(&parent.path().join("data"));
        config.listen.http_address = Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        let gateway = Running::start(config).await;
        let settings = proxy::Config::towards(gateway.address).path(path(Loss::default(), Loss::default()));
        let proxy = Proxy::start(settings).unwrap();
        let mut phones = Vec::new();
        for name in ["alice", "bob"] {
            let mut phone = Phone::new(name, &gateway.folder, proxy.addr());
            phone.go_online().await;
            // An answer that waits here until somebody looks would be taken for a slow one.
            while phone.half().rtt().is_none() {
                phone.step(Duration::from_millis(5)).await;
            }
            phones.push(phone);
        }
        let [alice, bob] = &mut phones[..] else { panic!("two") };
        let greeted = bob.until(|bob| !bob.received.is_empty());
        let (conversation, ()) = tokio::join!(alice.direct("bob"), greeted);
        // On screen: no receipt waits, to leave in the middle of what is tried.
        for phone in &mut phones {
            let (now, opened) = (phone.now(), phone.opened.len());
            phone.half().open(OpenTarget::Number(conversation), true, now);
            phone.until(|phone| phone.opened.len() > opened).await;
        }
        let mut world = Self { _parent: parent, gateway, proxy, phones, conversation };
        for n in 0..6 {
            world.say(&format!("warm {n}"));
            world.settle(n + 1).await;
        }
        world
    }

    fn say(&mut self, text: &str) {
        self.phones[0].send(self.conversation, text.to_owned());
    }

    async fn work(&mut self) {
        for phone in &mut self.phones {
            phone.step(Duration::from_millis(5)).await;
        }
    }

    /// Until so many messages are acked and read, and what follows from them has come to rest.
    async fn settle(&mut self, messages: usize) {
        let until = std::time::Instant::now() + Duration::from_secs(20);
        while self.phones[0].acked.len() < messages
            || self.phones.iter().any(|phone| phone.messages(self.conversation).len() < messages)
        {
            assert!(
                std::time::Instant::now() < until,
                "{:?}",
                self.phones.iter().map(Phone::describe).collect::<Vec<_>>()
            );
            self.work().await;
        }
        // The transport's last acknowledgement, which it holds back for a while, included.
        let rest = std::time::Instant::now() + 4 * ONE_WAY + Duration::from_millis(100);
        while std::time::Instant::now() < rest {
            self.work().await;
        }
    }

    fn flow(&self, phone: usize) -> FlowReport {
        let port = self.phones[phone].port();
        self.proxy.flows().into_iter().find(|flow| flow.client.port() == port).expect("it has sent something")
    }

    /// Says something while nothing gets through one way, until that has taken one packet.
    async fn lose(&mut self, text: &str, phone: usize, up: bool) {
        let flow = self.flow(phone);
        let (lost, fine) = (everything(), Loss::default());
        let bad = if up { path(lost, fine) } else { path(fine, lost) };
        self.proxy.set_flow_path(flow.flow, bad).unwrap();
        let taken = |flow: FlowReport| if up { flow.up.lost } else { flow.down.lost };
        let before = taken(flow);
        // The proxy does what it is told before it takes the next packet, but it has to be told first.
        tokio::time::sleep(Duration::from_millis(20)).await;
        self.say(text);
        let until = std::time::Instant::now() + Duration::from_secs(20);
        while taken(self.flow(phone)) == before {
            assert!(std::time::Instant::now() < until, "nothing was lost");
            self.work().await;
        }
        self.proxy.set_flow_path(flow.flow, path(Loss::default(), Loss::default())).unwrap();
    }

    async fn copies(&self, direction: &str) -> f64 {
        self.gateway.labelled("fulmar_hedges_total", direction).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_send_that_is_lost_alone_comes_in_a_datagram() {
    let mut world = World::new().await;
    assert!(world.phones[0].half().rtt() >= Some(2 * ONE_WAY));
    let (before, repeated) =
        (world.copies("up").await, world.gateway.metric("fulmar_sends_repeated_total").await);
    let hedged = world.phones[0].half().hedged();
    world.lose("lost on its way up", 0, true).await;
    world.settle(7).await;
    assert!(world.phones[0].half().hedged() > hedged, "the phone sent a copy");
    assert!(world.copies("up").await > before, "it came");
    assert!(world.copies("ack").await >= 1.0, "and was answered in its own way");
    // Both copies are the same send: the log has it once, whichever was first.
    assert_eq!(
        world.phones[1].messages(world.conversation).last().map(String::as_str),
        Some("lost on its way up")
    );
    assert_eq!(world.gateway.metric("fulmar_sends_accepted_total").await, 7.0);
    assert!(world.gateway.metric("fulmar_sends_repeated_total").await > repeated);
    world.gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_is_lost_alone_comes_in_a_datagram() {
    let mut world = World::new().await;
    let before = world.copies("down").await;
    world.lose("lost on its way down", 1, false).await;
    world.settle(7).await;
    assert!(world.copies("down").await > before, "the gateway sent a copy");
    let messages = world.phones[1].messages(world.conversation);
    assert_eq!(messages.len(), 7, "once");
    assert_eq!(messages.last().map(String::as_str), Some("lost on its way down"));
    world.gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_overtakes_waits_for_what_was_sent_before_it() {
    let mut world = World::new().await;
    let conversation = world.conversation;
    let send = |pseq: u64, text: &'static str| Send {
        kind: RecordKind::Message,
        conversation,
        pseq: Pseq::new(pseq).unwrap(),
        seen: Seq::ZERO,
        reference: None,
        ttl: None,
        more: false,
        continues: false,
        silent: false,
        cancel: false,
        payload: text.into(),
    };
    // The third of three comes first, twice, and long before the others.
    let third = Frame::Send(send(9, "third"));
    world.phones[0].datagram(&third);
    world.phones[0].datagram(&third);
    let until = std::time::Instant::now() + 4 * ONE_WAY;
    while std::time::Instant::now() < until {
        world.work().await;
    }
    assert_eq!(world.phones[1].messages(conversation).len(), 6, "it waits");
    for text in ["first", "second", "third"] {
        world.say(text);
    }
    world.settle(9).await;
    assert_eq!(world.phones[0].refused, [], "nobody was told to try again");
    assert_eq!(world.phones[1].messages(conversation)[6..], ["first", "second", "third"]);
    assert_eq!(world.gateway.metric("fulmar_sends_accepted_total").await, 9.0, "each is stored once");
    assert!(world.gateway.metric("fulmar_sends_repeated_total").await >= 1.0);
    world.gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_path_that_loses_nothing_no_copies_leave() {
    let mut world = World::new().await;
    for n in 6..12 {
        world.say(&format!("message {n}"));
        world.settle(n + 1).await;
    }
    // A machine that stands still for a moment looks like a loss.
    let copies = world.copies("up").await + world.copies("down").await;
    assert!(copies <= 6.0, "{copies} copies of 36 frames");
    world.gateway.stop().await;
}
