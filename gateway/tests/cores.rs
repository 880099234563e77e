//! Several cores, each with an endpoint of its own, on one address: whoever moves stays with its core, everybody is told of a
//! drain, a shard that rests is looked at by whoever asks it, and who was connected to a process that was killed is told by the next, whatever number of cores that has.

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
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use fulmar_gateway::config::{Cores, Durability};
use fulmar_protocol::{
    id::ConversationId,
    service::{CreateGroup, GroupCreated, Method},
};
use fulmar_transport::Kind;
use support::{Phone, Running, config};
use tokio::{net::UdpSocket, sync::watch, task::JoinHandle};

const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// What stands between a phone and the gateway, and forgets which port it used.
struct Nat {
    address: SocketAddr,
    renewed: watch::Sender<u32>,
    task: JoinHandle<()>,
}

impl Nat {
    async fn to(gateway: SocketAddr) -> Self {
        let inside = UdpSocket::bind(ANY_PORT).await.unwrap();
        let address = inside.local_addr().unwrap();
        let (renewed, mut renew) = watch::channel(0);
        let task = tokio::spawn(async move {
            let mut phone = None;
            loop {
                let outside = UdpSocket::bind(ANY_PORT).await.unwrap();
                outside.connect(gateway).await.unwrap();
                let (mut up, mut down) = ([0; 2_048], [0; 2_048]);
                loop {
                    tokio::select! {
                        biased;
                        changed = renew.changed() => match changed {
                            Ok(()) => break,
                            Err(_) => return,
                        },
                        Ok((bytes, from)) = inside.recv_from(&mut up) => {
                            phone = Some(from);
                            let _ = outside.send(&up[..bytes]).await;
                        }
                        Ok(bytes) = outside.recv(&mut down) => if let Some(phone) = phone {
                            let _ = inside.send_to(&down[..bytes], phone).await;
                        }
                    }
                }
            }
        });
        Self { address, renewed, task }
    }

    fn renew(&self) {
        self.renewed.send_modify(|times| *times += 1);
    }
}

impl Drop for Nat {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn say_and_hear(phones: &mut [Phone], group: ConversationId, said: &mut usize, what: &str) {
    for phone in phones.iter_mut() {
        phone.send(group, format!("{}: {what}", phone.name));
    }
    *said += phones.len();
    let deadline = Instant::now() + Duration::from_secs(60);
    while phones.iter().any(|phone| phone.messages(group).len() < *said || phone.unacked() > 0) {
        for phone in phones.iter_mut() {
            assert!(Instant::now() < deadline, "{what}: {}", phone.describe());
            assert!(phone.is_connected(), "{what}: {}: {:?}", phone.name, phone.ended);
            phone.step(Duration::from_millis(1)).await;
        }
    }
    let order = phones[0].messages(group);
    assert!(phones.iter().all(|phone| phone.messages(group) == order), "{what}: one order for everybody");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_survive_new_ports_and_a_drain_reaches_every_core() {
    const PHONES: usize = 24;
    let parent = tempfile::tempdir().unwrap();
    let mut config = config(&parent.path().join("data"));
    config.listen.cores = Cores::Exactly(4);
    config.listen.http_address = Some(ANY_PORT);
    // They know how late they are, and are never as late as that.
    config.limits.core_wait_ms = 60_000;
    let gateway = Running::start(config).await;
    let cores = if cfg!(target_os = "linux") { 4.0 } else { 1.0 };
    assert!((gateway.metric("fulmar_cores").await - cores).abs() < 0.5);

    let mut nats = Vec::new();
    let mut phones = Vec::new();
    for n in 0..PHONES {
        let nat = Nat::to(gateway.address).await;
        let mut phone = Phone::new(&format!("phone{n}"), &gateway.folder, nat.address);
        phone.go_online().await;
        phones.push(phone);
        nats.push(nat);
    }
    let members = phones[1..].iter().map(|phone| phone.name.clone()).collect();
    let group: GroupCreated =
        phones[0].call(Method::CreateGroup, &CreateGroup { name: "all".to_owned(), members }).await.unwrap();
    let group = group.conversation;
    for core in 0..4 {
        let open = gateway.labelled("fulmar_core_open_share", &core.to_string()).await;
        assert!(cfg!(not(target_os = "linux")) || open >= 1.0, "core {core} refuses sends: {open}");
        let some = gateway.labelled("fulmar_core_connections", &core.to_string()).await;
        assert!(cfg!(not(target_os = "linux")) || some > 0.5, "nobody is served by core {core}");
    }

    let mut said = 0;
    say_and_hear(&mut phones, group, &mut said, "before").await;
    for round in 1..=3 {
        // The address changes on the way, and nobody knows.
        for nat in &nats {
            nat.renew();
        }
        say_and_hear(&mut phones, group, &mut said, &format!("behind a new port, {round}")).await;
        // The phone itself moves, and takes another connection id.
        for phone in &phones {
            phone.move_to_another_port();
        }
        say_and_hear(&mut phones, group, &mut said, &format!("moved, {round}")).await;
    }
    assert!(phones.iter().all(|phone| phone.connects == 1));
    let handshakes = gateway.metric("fulmar_connections_accepted_total").await;
    assert!((handshakes - PHONES as f64).abs() < 0.5, "{handshakes} connections for {PHONES} phones");

    gateway.drain();
    let deadline = Instant::now() + Duration::from_secs(30);
    while phones.iter().any(|phone| phone.goaways == 0) {
        for phone in &mut phones {
            assert!(Instant::now() < deadline, "{} is not told of the drain", phone.name);
            phone.step(Duration::from_millis(1)).await;
        }
    }
    // All but one: cores that are empty wait for the others, and turn away whoever comes.
    for phone in &mut phones[1..] {
        phone.disconnect();
    }
    let mut late = Phone::new("late", &gateway.folder, gateway.address);
    for _ in 0..8 {
        assert!(!late.connect().await);
        let why = late.ended.as_ref().map(ToString::to_string).unwrap_or_default();
        // QUIC's CONNECTION_REFUSED.
        assert!(why.contains("0x2"), "{why}");
    }
    drop(phones);
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn byte_streams_are_served_by_cores_too() {
    let parent = tempfile::tempdir().unwrap();
    let mut config = config(&parent.path().join("data"));
    config.listen.cores = Cores::Exactly(3);
    let gateway = Running::start(config).await;
    let mut phones = Vec::new();
    for (n, kind) in [Kind::Tls, Kind::WebSocket, Kind::Quic].into_iter().cycle().take(9).enumerate() {
        let mut phone = Phone::new(&format!("phone{n}"), &gateway.folder, gateway.address).by(kind);
        phone.go_online().await;
        phones.push(phone);
    }
    let members = phones[1..].iter().map(|phone| phone.name.clone()).collect();
    let group: GroupCreated =
        phones[0].call(Method::CreateGroup, &CreateGroup { name: "all".to_owned(), members }).await.unwrap();
    let mut said = 0;
    for round in 0..5 {
        say_and_hear(&mut phones, group.conversation, &mut said, &format!("round {round}")).await;
    }
    drop(phones);
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_that_rests_is_looked_at_by_the_core_that_asks_it() {
    const MESSAGES: usize = 60;
    for (cores, visits) in [(Cores::Exactly(2), cfg!(target_os = "linux")), (Cores::Shared, false)] {
        let parent = tempfile::tempdir().unwrap();
        let mut config = config(&parent.path().join("data"));
        config.listen.cores = cores;
        config.listen.http_address = Some(ANY_PORT);
        // A commit that waits for a slow disk is not for a core.
        config.data.durability = Durability::Process;
        let gateway = Running::start(config).await;
        let mut phones = Vec::new();
        for name in ["ada", "bob"] {
            let mut phone = Phone::new(name, &gateway.folder, gateway.address);
            phone.go_online().await;
            phones.push(phone);
        }
        let direct = phones[0].direct("bob").await;
        let mut said = 0;
        say_and_hear(&mut phones, direct, &mut said, "it is loaded").await;
        let before = gateway.metric("fulmar_shard_visits_total").await;
        for n in 0..MESSAGES {
            phones[0].send(direct, format!("message {n}"));
            said += 1;
            phones[0].until(|phone| phone.unacked() == 0).await;
        }
        phones[1].until(|phone| phone.messages(direct).len() == said).await;
        let made = gateway.metric("fulmar_shard_visits_total").await - before;
        // Others' work on this machine may make a core impatient, and a shard wake for its own reasons.
        assert!(if visits { made > MESSAGES as f64 / 4.0 } else { made < 0.5 }, "{cores:?}: {made} visits");
        drop(phones);
        gateway.stop().await;
    }
}

struct Process(Child);

impl Process {
    fn start(folder: &std::path::Path, address: SocketAddr, cores: &str) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_fulmar"))
            .args(["serve", "--http", "off", "--log", "error", "--cores", cores, "--listen"])
            .args([&address.to_string(), "--data"])
            .arg(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_process_s_clients_are_told_by_the_next_with_any_cores() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("data");
    let address = std::net::UdpSocket::bind(ANY_PORT).unwrap().local_addr().unwrap();
    let mut process = Process::start(&folder, address, "4");
    let deadline = Instant::now() + Duration::from_secs(120);
    while !folder.join("tls/cert.pem").exists() || !folder.join("keys/dev.pem").exists() {
        assert!(Instant::now() < deadline, "the gateway does not start");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut phones: Vec<Phone> = (0..8).map(|n| Phone::new(&format!("phone{n}"), &folder, address)).collect();
    let mut notes: Vec<ConversationId> = Vec::new();
    for (next, listed) in [("3", false), ("4", true), ("shared", false), ("2", true), ("1", false)] {
        for phone in &mut phones {
            phone.welcome = None;
            while !phone.connect().await {
                assert!(Instant::now() < deadline, "{}: {:?}", phone.name, phone.ended);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            phone.until(|phone| phone.welcome.is_some()).await;
        }
        if notes.is_empty() {
            for phone in &mut phones {
                notes.push(phone.direct("somebody").await);
            }
        }
        if listed {
            // The header, and a record each: they are told without asking.
            let bytes = 32 + 64 * phones.len() as u64;
            while std::fs::metadata(folder.join("live.connections")).map_or(0, |file| file.len()) < bytes {
                assert!(Instant::now() < deadline, "nobody is noted");
                phones[0].step(Duration::from_millis(20)).await;
            }
        } else {
            // With an id that is in no list.
            for phone in &mut phones {
                phone.move_to_another_port();
                phone.work(Duration::from_millis(20)).await;
            }
        }
        process.kill();
        if !listed {
            // Told as the answer to what they send, and in no other way.
            let _ = std::fs::remove_file(folder.join("live.connections"));
        }
        process = Process::start(&folder, address, next);
        if !listed {
            for (phone, conversation) in phones.iter_mut().zip(&notes) {
                phone.send(*conversation, "x".repeat(600));
            }
        }
        while phones.iter().any(Phone::is_connected) {
            for phone in &mut phones {
                assert!(Instant::now() < deadline, "{next} cores: {}", phone.describe());
                phone.step(Duration::from_millis(1)).await;
            }
        }
        for phone in &phones {
            let ended = phone.ended.as_ref().map(ToString::to_string).unwrap_or_default();
            assert!(ended.contains("reset"), "{next} cores: {}: {ended}", phone.name);
        }
    }
}
