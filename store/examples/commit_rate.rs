//! How fast a shard commits, beside a bare file that is appended to and synced: `cargo run --release -p fulmar-store
//! --example commit_rate [folder]`. The folder's file system decides what a sync costs; the ratio is what counts.
#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a tool that prints figures, or fails loudly")]

use std::{
    fs::File,
    io::Write,
    path::Path,
    time::{Duration, Instant},
};

use bytes::Bytes;
use fulmar_protocol::id::{ConversationId, DeviceId, Epoch, Pseq, Seq, ShardId, UnixMillis, UserId};
use fulmar_store::{Limits, Op, Record, RecordKind, ShardReader, Store, StoreOptions};

const PAYLOAD: usize = 200;
const CONVERSATIONS: u64 = 100;
const PATIENCE: Duration = Duration::from_secs(3);

fn main() {
    let folder = std::env::args().nth(1).map_or_else(std::env::temp_dir, Into::into);
    let folder = tempfile::tempdir_in(folder).unwrap();
    println!(
        "{:<36} {:>10} {:>9} {:>9} {:>9} {:>8} {:>7}",
        "", "records/s", "p50 us", "p99 us", "cpu us/r", "syncs/r", "B/rec"
    );
    for (per_commit, commits) in [(1, 20_000), (64, 4_000)] {
        // Each at most so many commits, and at most so long: a slow disk is no reason to wait all day.
        for _ in 0..3 {
            file(folder.path(), per_commit, commits);
            store(&folder.path().join("store"), per_commit, commits, true);
        }
    }
    reads(&folder.path().join("store"));
    store(&folder.path().join("store"), 64, 4_000, false);
    open("dropped store", &folder.path().join("store")).close().unwrap();
}

fn cpu() -> Duration {
    // utime and stime of the process, in ticks of 10 ms.
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |n: usize| fields.get(n).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
    Duration::from_millis((ticks(11) + ticks(12)) * 10)
}

fn report(
    what: &str,
    per_commit: usize,
    times: &mut [Duration],
    all: Duration,
    cpu: Duration,
    syncs: u64,
    disk: u64,
) {
    times.sort_unstable();
    let records = (times.len() * per_commit) as f64;
    let at = |q: usize| times.get(times.len() * q / 100).map_or(0.0, |t| t.as_secs_f64() * 1e6);
    println!(
        "{:<36} {:>10.0} {:>9.1} {:>9.1} {:>9.2} {:>8.3} {:>7.0}",
        format!("{what}, {per_commit} per commit"),
        records / all.as_secs_f64(),
        at(50),
        at(99),
        cpu.as_secs_f64() * 1e6 / records,
        syncs as f64 / records,
        disk as f64 / records,
    );
}

fn file(folder: &Path, per_commit: usize, commits: usize) {
    let path = folder.join("bare");
    let mut file = File::create(&path).unwrap();
    let block = vec![7u8; (PAYLOAD + 26) * per_commit];
    let (began, used) = (Instant::now(), cpu());
    let mut times: Vec<Duration> = (0..commits)
        .take_while(|_| began.elapsed() < PATIENCE)
        .map(|_| {
            let at = Instant::now();
            file.write_all(&block).unwrap();
            file.sync_data().unwrap();
            at.elapsed()
        })
        .collect();
    let disk = file.metadata().unwrap().len();
    let syncs = times.len() as u64;
    report("bare file + fdatasync", per_commit, &mut times, began.elapsed(), cpu() - used, syncs, disk);
    std::fs::remove_file(path).unwrap();
}

fn conversation(n: u64) -> ConversationId {
    ConversationId::new(ShardId::new(0).unwrap().number(n + 1).unwrap()).unwrap()
}

/// Commits into a new folder at `path`.
fn store(path: &Path, per_commit: usize, commits: usize, close: bool) {
    if path.exists() {
        std::fs::remove_dir_all(path).unwrap();
    }
    let options = StoreOptions { shards: 1, ..StoreOptions::default() };
    let store = Store::open(path, &options).unwrap();
    let shard = ShardId::new(0).unwrap();
    let (mut writer, _) = store.shard(shard).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let payload = Bytes::from(vec![7; PAYLOAD]);
    let mut sent = 0u64;
    let (began, used) = (Instant::now(), cpu());
    let mut times: Vec<Duration> = (0..commits)
        .take_while(|_| began.elapsed() < PATIENCE)
        .map(|_| {
            let batch: Vec<Op> = (0..per_commit)
                .map(|_| {
                    let (c, n) = (sent % CONVERSATIONS, sent / CONVERSATIONS + 1);
                    sent += 1;
                    Op::Append {
                        conversation: conversation(c),
                        record: Record {
                            seq: Seq::new(n).unwrap(),
                            kind: RecordKind::Message,
                            sender: UserId::new(256 * (c + 1)).unwrap(),
                            device: DeviceId::FIRST,
                            epoch: Epoch::FIRST,
                            pseq: Pseq::new(n).unwrap(),
                            time: UnixMillis::new(1_700_000_000_000 + n).unwrap(),
                            count: n,
                            target: None,
                            ttl: None,
                            more: false,
                            silent: false,
                            payload: payload.clone(),
                        },
                    }
                })
                .collect();
            let at = Instant::now();
            runtime.block_on(writer.commit(&batch)).unwrap();
            at.elapsed()
        })
        .collect();
    let (all, used) = (began.elapsed(), cpu() - used);
    let stats = store.stats(shard).unwrap();
    report("store over sled", per_commit, &mut times, all, used, stats.barriers, stats.disk_bytes);
    if close {
        store.close().unwrap();
    }
}

fn open(what: &str, path: &Path) -> Store {
    let began = Instant::now();
    let store = Store::open(path, &StoreOptions::default()).unwrap();
    let took = began.elapsed().as_secs_f64() * 1e3;
    let stats = store.stats(ShardId::new(0).unwrap()).unwrap();
    let what = format!("open a {what}");
    println!(
        "{what:<36} {took:>10.2} ms, {} commits replayed, {} MiB",
        stats.replayed,
        stats.disk_bytes >> 20
    );
    store
}

fn reads(path: &Path) {
    let store = open("closed store", path);
    let reader = store.reader(ShardId::new(0).unwrap()).unwrap();
    let each = |what: &str, read: &dyn Fn(&ShardReader, ConversationId)| {
        for (warmth, rounds) in [("cold", 1), ("warm", 200)] {
            let began = Instant::now();
            for _ in 0..rounds {
                for c in 0..CONVERSATIONS {
                    read(&reader, conversation(c));
                }
            }
            let per = began.elapsed().as_secs_f64() * 1e6 / (rounds * CONVERSATIONS) as f64;
            println!("{:<36} {per:>10.2} us", format!("{what}, {warmth}"));
        }
    };
    each("head", &|reader, c| assert!(reader.head(c).unwrap().is_some()));
    let page = Limits { records: 50, bytes: 1 << 20 };
    each("last 50 records", &|reader, c| {
        assert_eq!(reader.records_before(c, Seq::new(1 << 40).unwrap(), page).unwrap().len(), 50);
    });
}
