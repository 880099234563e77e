//! The gateway killed with -9 under load, again and again: every acked message is in the log once, in order per
//! producer, and every member gets all of it.
//!
//! `FULMAR_CRASH_ROUNDS` sets the number of kills (20 without it).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "a test that finds something wrong stops there"
)]

mod support;

use std::{
    collections::{BTreeMap, HashMap},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use fulmar_protocol::{
    frame::RecordKind,
    id::{ConversationId, Seq},
    service::{CreateGroup, GroupCreated, Method},
};
use support::Phone;

const PHONES: usize = 6;

struct Killable(Child);

impl Killable {
    fn start(folder: &Path, address: SocketAddr) -> Self {
        let log = folder.with_extension("log");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(log).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_fulmar"))
            .args(["serve", "--http", "off", "--log", "error", "--listen", &address.to_string(), "--data"])
            .arg(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Self(child)
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    fn is_running(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Killable {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_port() -> SocketAddr {
    UdpSocket::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap().local_addr().unwrap()
}

async fn connect_patiently(phone: &mut Phone) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !phone.connect().await {
        assert!(
            Instant::now() < deadline,
            "{}: the gateway does not come back: {:?}",
            phone.name,
            phone.ended
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// How long a phone believes in a connection on which it waits for something. QUIC's own probes back off without a
/// bound, and may miss every moment at which a gateway that is killed again and again is there.
const SILENCE_MAX: Duration = Duration::from_secs(1);

/// Works until `done`, connecting again where that is needed.
async fn until(phone: &mut Phone, what: &str, done: impl Fn(&Phone) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done(phone) {
        assert!(Instant::now() < deadline, "{what}: {}", phone.describe());
        if phone.is_connected() && phone.silence() > SILENCE_MAX {
            phone.disconnect();
        }
        if !phone.is_connected() {
            connect_patiently(phone).await;
        }
        phone.step(Duration::from_millis(20)).await;
    }
}

/// Sends to all its conversations while `sending`, then goes on until everything is settled and `enough` says so.
async fn live(
    mut phone: Phone,
    conversations: Vec<ConversationId>,
    sending: Arc<AtomicBool>,
    acked: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
) -> Phone {
    let mut count = 0u64;
    while !stop.load(Ordering::Relaxed) {
        if phone.is_connected() && phone.unacked() > 0 && phone.silence() > SILENCE_MAX {
            phone.disconnect();
        }
        if !phone.is_connected() {
            connect_patiently(&mut phone).await;
        }
        if sending.load(Ordering::Relaxed) && phone.unacked() < 8 {
            for conversation in &conversations {
                count += 1;
                let text = format!("{} {count}", phone.name);
                phone.send(*conversation, text);
            }
        }
        let before = phone.acked.len();
        phone.step(Duration::from_millis(5)).await;
        acked.fetch_add((phone.acked.len() - before) as u64, Ordering::Relaxed);
    }
    phone
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acked_messages_survive_kill_9() {
    let rounds: u32 = std::env::var("FULMAR_CRASH_ROUNDS").ok().map_or(20, |rounds| rounds.parse().unwrap());
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("data");
    let address = free_port();
    let mut gateway = Killable::start(&folder, address);
    while !folder.join("tls/cert.pem").exists() || !folder.join("keys").exists() {
        assert!(gateway.is_running(), "the gateway starts");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;

    let mut phones = Vec::new();
    for n in 0..PHONES {
        let mut phone = Phone::new(&format!("phone-{n}"), &folder, address);
        connect_patiently(&mut phone).await;
        phone.until(|phone| phone.welcome.is_some()).await;
        phones.push(phone);
    }
    let members = (1..PHONES).map(|n| format!("phone-{n}")).collect();
    let create = CreateGroup { name: "everybody".to_owned(), members };
    let GroupCreated { conversation: group } = phones[0].call(Method::CreateGroup, &create).await.unwrap();
    let mut conversations: Vec<Vec<ConversationId>> = vec![vec![group]; PHONES];
    for n in (0..PHONES).step_by(2) {
        let direct = phones[n].direct(&format!("phone-{}", n + 1)).await;
        conversations[n].push(direct);
        conversations[n + 1].push(direct);
    }

    let (sending, stop) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
    let acked = Arc::new(AtomicU64::new(0));
    let tasks: Vec<_> = phones
        .into_iter()
        .zip(conversations.clone())
        .map(|(phone, conversations)| {
            tokio::spawn(live(
                phone,
                conversations,
                Arc::clone(&sending),
                Arc::clone(&acked),
                Arc::clone(&stop),
            ))
        })
        .collect();

    let mut seed = [0u8; 8];
    getrandom::fill(&mut seed).unwrap();
    let mut random = u64::from_le_bytes(seed) | 1;
    let mut quiet_rounds = 0;
    for round in 0..rounds {
        let before = acked.load(Ordering::Relaxed);
        // xorshift: only spreads the kills, nothing depends on it.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        tokio::time::sleep(Duration::from_millis(100 + random % 500)).await;
        // Each fourth is killed wherever it is, opening included; the others when they have acked something, however
        // long a busy machine takes to come that far.
        let patience = Instant::now() + Duration::from_secs(if round % 4 == 0 { 0 } else { 10 });
        while acked.load(Ordering::Relaxed) == before && Instant::now() < patience {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(
            gateway.is_running(),
            "round {round}: the gateway ended by itself: {}",
            std::fs::read_to_string(folder.with_extension("log")).unwrap_or_default()
        );
        gateway.kill();
        quiet_rounds += u32::from(acked.load(Ordering::Relaxed) == before);
        gateway = Killable::start(&folder, address);
    }
    assert!(
        quiet_rounds <= rounds / 2,
        "{quiet_rounds} of {rounds} rounds acked nothing: the load did not come through"
    );

    // Calm: everything that was sent is settled, everybody has everything.
    sending.store(false, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(4)).await;
    let mut last = acked.load(Ordering::Relaxed);
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = acked.load(Ordering::Relaxed);
        if now == last {
            break;
        }
        last = now;
    }
    stop.store(true, Ordering::Relaxed);
    let mut phones = Vec::new();
    for task in tasks {
        phones.push(task.await.unwrap());
    }
    for phone in &mut phones {
        until(phone, "sends are settled", |phone| phone.unacked() == 0).await;
        assert!(phone.refused.is_empty(), "{}: {:?}", phone.name, phone.refused);
    }
    check(&mut phones, &conversations).await;
    eprintln!(
        "{rounds} kills, {} messages acked, none lost, doubled or out of order",
        acked.load(Ordering::Relaxed)
    );
}

async fn check(phones: &mut [Phone], conversations: &[Vec<ConversationId>]) {
    // What every producer sent, in order, by conversation.
    let mut sent: HashMap<(ConversationId, String), Vec<String>> = HashMap::new();
    for phone in phones.iter() {
        let mut in_order: BTreeMap<_, _> = BTreeMap::new();
        for ((conversation, pseq), payload) in &phone.sent {
            assert!(
                phone.acked.contains_key(&(*conversation, *pseq)),
                "{}: {pseq} was never acked",
                phone.name
            );
            in_order.insert((*conversation, *pseq), String::from_utf8(payload.to_vec()).unwrap());
        }
        for ((conversation, _), text) in in_order {
            sent.entry((conversation, phone.name.clone())).or_default().push(text);
        }
    }
    let mut records: HashMap<(ConversationId, Seq), bytes::Bytes> = HashMap::new();
    for (n, phone) in phones.iter_mut().enumerate() {
        for conversation in &conversations[n] {
            let total: usize =
                sent.iter().filter(|((of, _), _)| of == conversation).map(|(_, texts)| texts.len()).sum();
            until(phone, "everything arrives", |phone| phone.messages(*conversation).len() >= total).await;
            let received = &phone.received[conversation];
            for (at, record) in received.iter().enumerate() {
                assert_eq!(record.seq.get(), at as u64 + 1, "{}: a gap or a repetition", phone.name);
                let known =
                    records.entry((*conversation, record.seq)).or_insert_with(|| record.payload.clone());
                assert_eq!(*known, record.payload, "{}: {} is another message here", phone.name, record.seq);
            }
            let mut by_sender: HashMap<String, Vec<String>> = HashMap::new();
            for record in received.iter().filter(|record| record.kind == RecordKind::Message) {
                let text = String::from_utf8(record.payload.to_vec()).unwrap();
                let name = text.split_once(' ').unwrap().0.to_owned();
                by_sender.entry(name).or_default().push(text);
            }
            for (name, texts) in by_sender {
                assert_eq!(texts, sent[&(*conversation, name.clone())], "{}: what {name} sent", phone.name);
            }
        }
        // An ack names the record that holds exactly what was sent.
        for ((conversation, pseq), seq) in &phone.acked {
            if let Some(seq) = seq {
                assert_eq!(records[&(*conversation, *seq)], phone.sent[&(*conversation, *pseq)]);
            }
        }
    }
}

/// A phone that only listens has nothing to send by which it would find out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_only_listens_is_told_that_its_gateway_was_killed() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("data");
    let address = free_port();
    let mut gateway = Killable::start(&folder, address);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !folder.join("tls/cert.pem").exists() || !folder.join("keys/dev.pem").exists() {
        assert!(gateway.is_running() && Instant::now() < deadline, "the gateway does not start");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut phone = Phone::new("alice", &folder, address);
    connect_patiently(&mut phone).await;
    phone.until(|phone| phone.welcome.is_some()).await;
    // Noted a moment later: the header, and one record.
    let live = folder.join("live.connections");
    while std::fs::metadata(&live).map_or(0, |file| file.len()) < 96 {
        assert!(Instant::now() < deadline, "nobody is noted");
        phone.step(Duration::from_millis(20)).await;
    }
    gateway.kill();
    let mut gateway = Killable::start(&folder, address);
    // Well before its next PING.
    let told = Instant::now() + Duration::from_secs(12);
    while phone.is_connected() {
        assert!(gateway.is_running() && Instant::now() < told, "{}", phone.describe());
        phone.step(Duration::from_millis(20)).await;
    }
    let ended = phone.ended.as_ref().map(ToString::to_string).unwrap_or_default();
    assert!(ended.contains("reset"), "{ended}");
    connect_patiently(&mut phone).await;
}
