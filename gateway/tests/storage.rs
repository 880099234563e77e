//! What clients and operators see of a log that can't be written: refused before an ack, nothing lost and nothing twice
//! afterwards, everything else as usual, and no restart.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that finds something wrong stops there"
)]

mod support;

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use fulmar_gateway::{config::Config, conversation::shard::CommitLog};
use fulmar_protocol::{
    close::RefusalCode,
    frame::OpenTarget,
    id::{ConversationId, ShardId},
    service::{ConversationPage, CreateGroup, GroupCreated, ListConversations, Method},
};
use fulmar_store::{CommitError, Op, ReadError, ShardWriter};
use support::{Phone, Running, config};

/// What is wrong with the disk: decides about a batch, given how many there were.
type Trouble = Box<dyn FnMut(usize, &[Op]) -> Option<CommitError> + Send>;

/// The disk of all shards.
#[derive(Clone, Default)]
struct Disk {
    trouble: Arc<Mutex<Option<Trouble>>>,
    refused: Arc<AtomicUsize>,
    commits: Arc<AtomicUsize>,
}

impl Disk {
    fn has(&self, trouble: impl FnMut(usize, &[Op]) -> Option<CommitError> + Send + 'static) {
        *self.trouble.lock().unwrap() = Some(Box::new(trouble));
    }

    fn is_full(&self) {
        self.has(|_, _| Some(CommitError::Full { reason: "0 bytes are left".to_owned() }));
    }

    fn is_well(&self) {
        *self.trouble.lock().unwrap() = None;
    }

    fn refused(&self) -> usize {
        self.refused.load(Ordering::SeqCst)
    }

    fn log(&self) -> impl Fn(ShardId, ShardWriter) -> Writer + 'static {
        let disk = self.clone();
        move |_, writer| Writer { writer, disk: disk.clone() }
    }
}

struct Writer {
    writer: ShardWriter,
    disk: Disk,
}

impl CommitLog for Writer {
    async fn commit(&mut self, batch: &[Op]) -> Result<(), CommitError> {
        let number = self.disk.commits.fetch_add(1, Ordering::SeqCst);
        let trouble = self.disk.trouble.lock().unwrap().as_mut().and_then(|decide| decide(number, batch));
        match trouble {
            Some(error) => {
                self.disk.refused.fetch_add(1, Ordering::SeqCst);
                Err(error)
            }
            None => self.writer.commit(batch).await.map(|_| ()),
        }
    }
}

fn with_pages(folder: &Path) -> Config {
    let mut config = config(folder);
    config.listen.http_address = Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
    config
}

fn texts(from: u32, to: u32) -> Vec<String> {
    (from..=to).map(|n| format!("message {n}")).collect()
}

/// Every message once and in order, and seqs without a hole: nothing that was refused has left a trace.
fn is_whole(phone: &Phone, conversation: ConversationId, want: &[String]) {
    assert_eq!(phone.messages(conversation), want);
    let seqs: Vec<u64> = phone.received[&conversation].iter().map(|record| record.seq.get()).collect();
    assert_eq!(seqs, (1..=seqs.len() as u64).collect::<Vec<_>>());
    assert_eq!(phone.gaps, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_refuses_before_the_ack_and_goes_on_by_itself() {
    let parent = tempfile::tempdir().unwrap();
    let disk = Disk::default();
    let gateway = Running::start_with(with_pages(&parent.path().join("data")), disk.log()).await;
    let mut alice = Phone::new("alice", &gateway.folder, gateway.address);
    let mut bob = Phone::new("bob", &gateway.folder, gateway.address);
    alice.go_online().await;
    bob.go_online().await;
    let conversation = alice.direct("bob").await;
    for text in texts(1, 10) {
        alice.send(conversation, text);
    }
    alice.until(|alice| alice.unacked() == 0).await;
    bob.until(|bob| bob.messages(conversation).len() == 10).await;
    bob.work(Duration::from_millis(300)).await;
    assert_eq!(gateway.metric("fulmar_storage_writable").await, 2.0, "two shards");

    disk.is_full();
    for text in texts(11, 20) {
        alice.send(conversation, text);
    }
    while disk.refused() == 0 {
        alice.step(Duration::from_millis(20)).await;
    }
    alice.work(Duration::from_millis(500)).await;
    assert_eq!(alice.unacked(), 10, "no ack");
    assert_eq!(alice.refused, [], "and no refusal for good");
    assert!(gateway.metric("fulmar_storage_refusals_total").await >= 1.0);
    assert_eq!(gateway.metric("fulmar_sends_accepted_total").await, 10.0);
    let (status, health) = gateway.page("/healthz").await;
    assert!(status == 503 && health.contains("refuses writes, reads go on: the disk is full"), "{health}");
    assert!(gateway.metric("fulmar_storage_writable").await < 2.0);

    // Whoever is known comes and goes, and reads.
    bob.disconnect();
    bob.go_online().await;
    assert_eq!(bob.open(OpenTarget::Number(conversation)).await.head.get(), 11);
    let list = ListConversations { after: ConversationId::default() };
    let page: ConversationPage = bob.call(Method::ListConversations, &list).await.unwrap();
    assert_eq!(page.conversations.len(), 1);
    assert_eq!(bob.messages(conversation).len(), 10, "nothing of what was refused is seen");
    // What has to be written is refused, and says why.
    let create = CreateGroup { name: "climbers".to_owned(), members: vec![] };
    let refused = bob.call::<GroupCreated>(Method::CreateGroup, &create).await;
    assert_eq!(refused, Err(RefusalCode::StorageFull));
    let mut carol = Phone::new("carol", &gateway.folder, gateway.address);
    assert!(carol.connect().await);
    carol.until(|carol| !carol.errors.is_empty()).await;
    assert_eq!(carol.errors[0].code, RefusalCode::StorageFull);
    assert!(carol.errors[0].retry_after_ms > 0 && carol.welcome.is_none());

    disk.is_well();
    alice.until(|alice| alice.unacked() == 0 && alice.messages(conversation).len() == 20).await;
    bob.until(|bob| bob.messages(conversation).len() == 20).await;
    is_whole(&bob, conversation, &texts(1, 20));
    is_whole(&alice, conversation, &texts(1, 20));
    let GroupCreated { .. } = bob.call(Method::CreateGroup, &create).await.unwrap();
    carol.go_online().await;
    // The shard nobody writes to finds out by itself.
    while gateway.metric("fulmar_storage_writable").await < 2.0 {
        bob.work(Duration::from_millis(100)).await;
    }
    assert_eq!(gateway.page("/healthz").await, (200, "ok\n".to_owned()));
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_fails_now_and_then_loses_and_doubles_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let disk = Disk::default();
    let gateway = Running::start_with(config(&parent.path().join("data")), disk.log()).await;
    let mut alice = Phone::new("alice", &gateway.folder, gateway.address);
    let mut bob = Phone::new("bob", &gateway.folder, gateway.address);
    alice.go_online().await;
    bob.go_online().await;
    let conversation = alice.direct("bob").await;
    let mut left = 6;
    disk.has(move |number, batch| {
        let sends = batch.iter().any(|op| matches!(op, Op::Append { .. }));
        let fails = left > 0 && sends && number % 3 == 0;
        left -= usize::from(fails);
        fails.then(|| CommitError::Unavailable { reason: "an input/output error".to_owned() })
    });
    let want = texts(1, 60);
    for text in want.chunks(5) {
        for text in text {
            alice.send(conversation, text.clone());
            bob.send(conversation, format!("to {text}"));
        }
        alice.work(Duration::from_millis(100)).await;
        bob.work(Duration::from_millis(100)).await;
    }
    let all = |phone: &Phone| phone.unacked() == 0 && phone.messages(conversation).len() == 120;
    for _ in 0..4 {
        if !(all(&alice) && all(&bob)) {
            alice.work(Duration::from_millis(700)).await;
            bob.work(Duration::from_millis(700)).await;
        }
    }
    alice.until(all).await;
    bob.until(all).await;
    assert!(disk.refused() > 0, "no commit was refused: nothing was tried");
    for phone in [&alice, &bob] {
        let from = |prefix: bool| -> Vec<String> {
            let messages = phone.messages(conversation).into_iter();
            messages.filter(|text| text.starts_with("to ") == prefix).collect()
        };
        assert_eq!(from(false), want, "{}", phone.name);
        assert_eq!(from(true), want.iter().map(|text| format!("to {text}")).collect::<Vec<_>>());
        let seqs: Vec<u64> = phone.received[&conversation].iter().map(|record| record.seq.get()).collect();
        assert_eq!(seqs, (1..=121).collect::<Vec<_>>(), "no seq is burnt");
    }
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_conversation_is_refused_alone() {
    let parent = tempfile::tempdir().unwrap();
    let disk = Disk::default();
    // One shard: both conversations share its batches.
    let mut settings = with_pages(&parent.path().join("data"));
    settings.data.shards = 1;
    let gateway = Running::start_with(settings, disk.log()).await;
    let mut alice = Phone::new("alice", &gateway.folder, gateway.address);
    alice.go_online().await;
    let (ill, well) = (alice.direct("bob").await, alice.direct("carol").await);
    disk.has(move |_, batch| {
        let hit =
            batch.iter().any(|op| matches!(op, Op::Append { conversation, .. } if *conversation == ill));
        hit.then(|| {
            CommitError::Read(ReadError::Damaged {
                shard: ShardId::new(0).unwrap(),
                conversation: Some(ill),
                seq: None,
                what: "a head".to_owned(),
            })
        })
    });
    for text in texts(1, 20) {
        alice.send(ill, text.clone());
        alice.send(well, text);
    }
    alice.until(|alice| alice.messages(well).len() == 20 && alice.unacked() == 20).await;
    assert!(alice.acked.keys().all(|(conversation, _)| *conversation == well));
    assert_eq!(alice.refused, [], "it can be repaired: nothing is refused for good");
    assert!(disk.refused() > 0);
    assert_eq!(gateway.metric("fulmar_storage_writable").await, 1.0, "the disk is well");
    assert_eq!(gateway.page("/healthz").await.0, 200);

    disk.is_well();
    // A new connection sends everything again, without the long wait it was told.
    alice.disconnect();
    alice.go_online().await;
    alice.until(|alice| alice.unacked() == 0 && alice.messages(ill).len() == 20).await;
    is_whole(&alice, ill, &texts(1, 20));
    is_whole(&alice, well, &texts(1, 20));
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_that_could_not_follow_follows_when_the_disk_is_well_again() {
    let parent = tempfile::tempdir().unwrap();
    let disk = Disk::default();
    let gateway = Running::start_with(config(&parent.path().join("data")), disk.log()).await;
    let mut alice = Phone::new("alice", &gateway.folder, gateway.address);
    let mut bob = Phone::new("bob", &gateway.folder, gateway.address);
    alice.go_online().await;
    bob.go_online().await;
    // The conversations come to be, but nobody's list can be written.
    disk.has(|_, batch| {
        let list = batch.iter().any(|op| matches!(op, Op::Listed { .. }));
        list.then(|| CommitError::Unavailable { reason: "an input/output error".to_owned() })
    });
    let conversation = alice.direct("bob").await;
    let list = ListConversations { after: ConversationId::default() };
    let page: ConversationPage = bob.call(Method::ListConversations, &list).await.unwrap();
    assert_eq!(page.conversations, []);
    disk.is_well();
    let mut page = page;
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while page.conversations.is_empty() {
        assert!(std::time::Instant::now() < deadline, "the list never followed");
        alice.work(Duration::from_millis(100)).await;
        page = bob.call(Method::ListConversations, &list).await.unwrap();
    }
    assert_eq!(page.conversations[0].conversation, conversation);
    gateway.stop().await;
}

/// The real thing: a file takes the space the log keeps free.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn space_that_is_taken_and_given_back() {
    const MIB: u64 = 1 << 20;
    let parent = tempfile::tempdir().unwrap();
    let space = rustix::fs::statvfs(parent.path()).unwrap();
    let free = space.f_bavail * space.f_frsize / MIB;
    // Half the distance is room for whatever else goes on on this disk.
    let margin = (free / 8).min(512);
    let mut settings = with_pages(&parent.path().join("data"));
    settings.data.reserve_mib = free - margin;
    let gateway = Running::start(settings).await;
    let mut alice = Phone::new("alice", &gateway.folder, gateway.address);
    alice.go_online().await;
    let conversation = alice.direct("bob").await;
    alice.send(conversation, "there is room");
    alice.until(|alice| alice.unacked() == 0).await;

    let path = parent.path().join("taken");
    let file = std::fs::File::create(&path).unwrap();
    let taken = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 2 * margin * MIB);
    if taken.is_err() {
        // Not every file system can set space aside without writing it.
        return gateway.stop().await;
    }
    let mut sent = vec!["there is room".to_owned()];
    while gateway.metric("fulmar_storage_refusals_total").await == 0.0 {
        assert!(sent.len() < 2_000, "it was never found full");
        sent.push(format!("message {}", sent.len()));
        alice.send(conversation, sent.last().unwrap().clone());
        alice.work(Duration::from_millis(10)).await;
        while alice.unacked() > 0 && gateway.metric("fulmar_storage_refusals_total").await == 0.0 {
            alice.step(Duration::from_millis(10)).await;
        }
    }
    assert!(alice.unacked() > 0 && gateway.page("/healthz").await.0 == 503);
    drop(file);
    std::fs::remove_file(path).unwrap();
    alice.until(|alice| alice.unacked() == 0 && alice.messages(conversation).len() == sent.len()).await;
    is_whole(&alice, conversation, &sent);
    assert_eq!(gateway.page("/healthz").await, (200, "ok\n".to_owned()));
    gateway.stop().await;
}

/// The binary on a small disk of its own, in a mount namespace where the system lets it have one.
struct OnASmallDisk {
    child: Child,
    /// The data folder, as it is seen from outside.
    folder: PathBuf,
    address: SocketAddr,
}

impl OnASmallDisk {
    fn start(mib: u32) -> Option<(Self, tempfile::TempDir)> {
        let parent = tempfile::tempdir().unwrap();
        let data = parent.path().join("data");
        std::fs::create_dir(&data).unwrap();
        let probe = Command::new("unshare")
            .args(["-Urm", "sh", "-c", "mount -t tmpfs tmpfs \"$1\"", "sh"])
            .arg(&data)
            .output();
        if !probe.is_ok_and(|probe| probe.status.success()) {
            return None;
        }
        let script = "mount -t tmpfs -o size=\"$3\"m,mode=700 tmpfs \"$1\" || exit\n\
                      exec \"$2\" serve --data \"$1\" --listen 127.0.0.1:0 --http off --log-format json \
                      --set data.reserve_mib=0 --set data.shards=1";
        let mut child = Command::new("unshare")
            .args(["-Urm", "sh", "-c", script, "sh"])
            .arg(&data)
            .arg(env!("CARGO_BIN_EXE_fulmar"))
            .arg(mib.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = lines.find_map(|line| {
            let line: serde_json::Value = serde_json::from_str(&line.ok()?).ok()?;
            (line["message"] == "listening").then(|| line["address"].as_str().unwrap().parse().unwrap())
        });
        // Whatever else it says is of no interest, but must not fill the pipe.
        std::thread::spawn(move || lines.for_each(drop));
        let address = address.expect("it listens");
        let folder = Path::new("/proc")
            .join(child.id().to_string())
            .join("root")
            .join(data.strip_prefix("/").unwrap());
        Some((Self { child, folder, address }, parent))
    }

    fn fill(&self) -> PathBuf {
        let path = self.folder.join("taken");
        let mut file = std::fs::File::create(&path).unwrap();
        for bytes in [1 << 16, 1 << 9, 1] {
            while file.write_all(&vec![7; bytes]).is_ok() {}
        }
        path
    }
}

impl Drop for OnASmallDisk {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_space_left_on_the_device_in_the_middle_of_the_log() {
    // Where there are no namespaces this can't be had.
    let Some((gateway, _parent)) = OnASmallDisk::start(64) else { return };
    let mut alice = Phone::new("alice", &gateway.folder, gateway.address);
    let mut bob = Phone::new("bob", &gateway.folder, gateway.address);
    alice.go_online().await;
    bob.go_online().await;
    let conversation = alice.direct("bob").await;
    let mut sent = Vec::new();
    for round in 0..3 {
        for n in 0..20 {
            sent.push(format!("round {round} message {n}"));
            alice.send(conversation, sent.last().unwrap().clone());
        }
        alice.until(|alice| alice.unacked() == 0).await;
        let taken = gateway.fill();
        // More than what the log has written ahead.
        for n in 0..40 {
            sent.push(format!("round {round} large {n:012000}"));
            alice.send(conversation, sent.last().unwrap().clone());
        }
        alice.work(Duration::from_millis(700)).await;
        assert!(alice.unacked() > 0 && alice.refused.is_empty(), "{}", alice.describe());
        // Reads go on.
        bob.disconnect();
        bob.go_online().await;
        bob.open(OpenTarget::Number(conversation)).await;
        std::fs::remove_file(taken).unwrap();
        alice.until(|alice| alice.unacked() == 0).await;
    }
    alice.until(|alice| alice.messages(conversation).len() == sent.len()).await;
    bob.until(|bob| bob.messages(conversation).len() == sent.len()).await;
    is_whole(&alice, conversation, &sent);
    is_whole(&bob, conversation, &sent);
}
