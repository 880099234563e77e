//! The log: records of 200 bytes through the store's public API, beside a bare appended file and bare sled.
//!
//! All three are durable at return, on the same disk, in turns. CPU is the whole process's: the thread that commits,
//! the one that settles, and sled's own.

use std::{
    fs::File,
    io::Write as _,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bytes::Bytes;
use fulmar_benches::{
    command::Flags,
    meter::{Samples, disk_bytes, process_cpu, thread_cpu},
    payload::Payloads,
    report::Report,
};
use fulmar_protocol::id::{AppId, ConversationId, DeviceId, Epoch, Pseq, Seq, UnixMillis, UserId};
use fulmar_store::{
    ConversationClass, ConversationMeta, Limits, Op, Record, RecordKind, ShardReader, ShardWriter, Store,
    StoreOptions, User,
};

const RECORD_BYTES: usize = 200;

/// Conversations the records are spread over.
const CONVERSATIONS: usize = 100;

fn main() -> anyhow::Result<()> {
    let flags = Flags::read();
    let rounds = flags.pick(5, 1);
    let time = Duration::from_millis(flags.pick(3_000, 700));
    let mut report = Report::new("commit", flags.quick);
    let mut payloads = Payloads::new(flags.seed);
    let bodies: Vec<Bytes> = (0..1_024).map(|_| payloads.body(RECORD_BYTES)).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;

    for batch in [1usize, 64, 1_024] {
        let [mut file, mut sled, mut store] = [(); 3].map(|()| Rounds::default());
        let (mut syncs, mut last, mut head) = (Samples::default(), Samples::default(), Samples::default());
        for _ in 0..rounds {
            let folder = flags.fresh_folder()?;
            file.add(appended_file(&folder.path().join("log"), &bodies, batch, time)?);
            let folder = flags.fresh_folder()?;
            sled.add(bare_sled(folder.path(), &bodies, batch, time)?);
            let folder = flags.fresh_folder()?;
            let (round, reads) = runtime.block_on(through_the_store(folder.path(), &bodies, batch, time))?;
            store.add(round);
            syncs.add(reads.syncs_per_record);
            last.add(reads.last_fifty_us);
            head.add(reads.head_us);
        }
        let rate = (store.rate.median(), file.rate.median(), sled.rate.median());
        report.beside(format!("{batch} per commit: rate"), "records/s", rate.0, ("file", rate.1));
        if batch == 64 {
            let met = rate.0 >= 110_000.0;
            let far = rate.0 >= 0.4 * rate.1;
            report.bar(format!("≥ 110 k/s: {}; then ≥ 0.40 × file", if met { "met" } else { "MISSED" }), far);
        }
        report.beside(format!("{batch} per commit: rate"), "records/s", rate.0, ("sled", rate.2));
        let cpu = store.cpu_us.median();
        report.beside(format!("{batch} per commit: CPU"), "µs/record", cpu, ("file", file.cpu_us.median()));
        if batch == 64 {
            report.bar("≤ 10 µs", cpu <= 10.0);
        }
        report.beside(format!("{batch} per commit: CPU"), "µs/record", cpu, ("sled", sled.cpu_us.median()));
        let p50 = (store.p50_us.median(), file.p50_us.median());
        report.beside(format!("{batch} per commit: p50"), "µs", p50.0, ("file", p50.1));
        if batch == 1 {
            report.bar("≤ 2.5 × file", p50.0 <= 2.5 * p50.1);
        }
        report.beside(
            format!("{batch} per commit: p99"),
            "µs",
            store.p99_us.median(),
            ("file", file.p99_us.median()),
        );
        let disk = (store.disk.median(), file.disk.median(), sled.disk.median());
        report.beside(format!("{batch} per commit: disk"), "bytes/record", disk.0, ("file", disk.1));
        report.beside(format!("{batch} per commit: disk"), "bytes/record", disk.0, ("sled", disk.2));
        report.record(format!("{batch} per commit: barriers"), "per record", syncs.median());
        if batch == 64 {
            report.record("last 50 of a conversation, warm", "µs CPU", last.median());
            report.bar("≤ 40 µs", last.median() <= 40.0);
            report.record("head of a conversation, warm", "µs CPU", head.median());
            report.bar("≤ 1 µs", head.median() <= 1.0);
        }
    }
    report.note(format!(
        "{RECORD_BYTES}-byte payloads over {CONVERSATIONS} conversations, one shard, durable at return; medians of {rounds} \
         rounds of {time:?}, engines in turns"
    ));
    report.note("a barrier is one fdatasync that an acknowledged commit waited for, counted by the store");
    report.finish(flags.json.as_deref())?;
    Ok(())
}

/// One engine's figures of one round.
struct Round {
    records: u64,
    elapsed: Duration,
    cpu: Duration,
    commits: Samples,
    disk: u64,
}

/// One engine's figures over the rounds.
#[derive(Default)]
struct Rounds {
    rate: Samples,
    cpu_us: Samples,
    p50_us: Samples,
    p99_us: Samples,
    disk: Samples,
}

impl Rounds {
    fn add(&mut self, round: Round) {
        let records = round.records.max(1) as f64;
        self.rate.add(records / round.elapsed.as_secs_f64());
        self.cpu_us.add(round.cpu.as_secs_f64() * 1e6 / records);
        self.p50_us.add(round.commits.median());
        self.p99_us.add(round.commits.quantile(0.99));
        self.disk.add(round.disk as f64 / records);
    }
}

/// The floor: a header of 26 bytes and the body appended to a file, one write and one `fdatasync` per commit.
fn appended_file(path: &Path, bodies: &[Bytes], batch: usize, time: Duration) -> anyhow::Result<Round> {
    let mut file = File::create(path)?;
    let mut buffer = Vec::with_capacity(batch * (RECORD_BYTES + 26));
    let mut commits = Samples::default();
    let (begin, cpu) = (Instant::now(), process_cpu());
    let mut records = 0u64;
    while begin.elapsed() < time {
        let at = Instant::now();
        buffer.clear();
        for body in bodies.iter().cycle().skip(usize::try_from(records)? % bodies.len()).take(batch) {
            records += 1;
            buffer.extend_from_slice(&records.to_be_bytes());
            buffer.extend_from_slice(&[0; 10]);
            buffer.extend_from_slice(&(body.len() as u64).to_be_bytes());
            buffer.extend_from_slice(body);
        }
        file.write_all(&buffer)?;
        file.sync_data()?;
        commits.add_us(at.elapsed());
    }
    let (elapsed, cpu) = (begin.elapsed(), process_cpu() - cpu);
    Ok(Round { records, elapsed, cpu, commits, disk: std::fs::metadata(path)?.len() })
}

/// The other floor: single inserts, `flush`, and `fdatasync` of the file, per commit.
fn bare_sled(path: &Path, bodies: &[Bytes], batch: usize, time: Duration) -> anyhow::Result<Round> {
    let db = sled::Config::new().path(path).cache_capacity(16 << 20).flush_every_ms(None).open()?;
    let file = File::open(path.join("db"))?;
    let mut commits = Samples::default();
    let (begin, cpu) = (Instant::now(), process_cpu());
    let mut records = 0u64;
    while begin.elapsed() < time {
        let at = Instant::now();
        for body in bodies.iter().cycle().skip(usize::try_from(records)? % bodies.len()).take(batch) {
            records += 1;
            db.insert(records.to_be_bytes(), body.as_ref())?;
        }
        db.flush()?;
        file.sync_data()?;
        commits.add_us(at.elapsed());
    }
    let (elapsed, cpu) = (begin.elapsed(), process_cpu() - cpu);
    drop(db);
    Ok(Round { records, elapsed, cpu, commits, disk: disk_bytes(path)? })
}

/// What reading costs, and how often the disk was waited for.
struct Reads {
    syncs_per_record: f64,
    last_fifty_us: f64,
    head_us: f64,
}

/// One conversation being written.
struct Writing {
    conversation: ConversationId,
    next: u64,
}

async fn through_the_store(
    path: &Path,
    bodies: &[Bytes],
    batch: usize,
    time: Duration,
) -> anyhow::Result<(Round, Reads)> {
    let options = StoreOptions { shards: 1, ..StoreOptions::default() };
    let store = Store::open(path.join("store"), &options)?;
    let app = AppId::of("bench");
    let shard = store.shard_of_user(app, "writer");
    let (mut writer, reader) = store.shard(shard)?;
    let (user, mut writing) = prepare(app, &mut writer, &reader).await?;

    let mut commits = Samples::default();
    let barriers = store.stats(shard)?.barriers;
    let (begin, cpu) = (Instant::now(), process_cpu());
    let mut records = 0u64;
    let mut ops = Vec::with_capacity(batch);
    while begin.elapsed() < time {
        ops.clear();
        for body in bodies.iter().cycle().skip(usize::try_from(records)? % bodies.len()).take(batch) {
            let turn = usize::try_from(records)? % writing.len();
            let at = writing.get_mut(turn).context("a conversation")?;
            records += 1;
            ops.push(append(at, user, body.clone())?);
        }
        let at = Instant::now();
        writer.commit(&ops).await?;
        commits.add_us(at.elapsed());
    }
    let elapsed = begin.elapsed();
    let syncs_per_record = (store.stats(shard)?.barriers - barriers) as f64 / records as f64;
    let reads = read(&reader, &writing, syncs_per_record)?;
    drop((writer, reader));
    // What is not settled yet is paid for as well.
    store.close()?;
    drop(store);
    let cpu = process_cpu() - cpu - reads.1;
    let round = Round { records, elapsed, cpu, commits, disk: disk_bytes(path)? };
    Ok((round, reads.0))
}

async fn prepare(
    app: AppId,
    writer: &mut ShardWriter,
    reader: &ShardReader,
) -> anyhow::Result<(UserId, Vec<Writing>)> {
    let user = reader.allocate_user().context("no more users")?;
    let created = UnixMillis::default();
    let mut ops = vec![Op::NameUser { user, row: User { app, name: "writer".to_owned(), created } }];
    let mut writing = Vec::new();
    for number in 0..CONVERSATIONS {
        let conversation = reader.allocate_conversation().context("no more conversations")?;
        let (class, name) = (ConversationClass::Group, format!("group {number}"));
        ops.push(Op::NameConversation {
            conversation,
            row: ConversationMeta { app, class, name, creator: user, created },
        });
        writing.push(Writing { conversation, next: 0 });
    }
    writer.commit(&ops).await?;
    Ok((user, writing))
}

fn append(at: &mut Writing, sender: UserId, payload: Bytes) -> anyhow::Result<Op> {
    at.next += 1;
    let record = Record {
        seq: Seq::new(at.next).context("seq")?,
        kind: RecordKind::Message,
        sender,
        device: DeviceId::FIRST,
        epoch: Epoch::FIRST,
        pseq: Pseq::new(at.next).context("pseq")?,
        time: UnixMillis::new(1_800_000_000_000 + at.next).context("time")?,
        count: at.next,
        target: None,
        ttl: None,
        more: false,
        silent: false,
        payload,
    };
    Ok(Op::Append { conversation: at.conversation, record })
}

/// Reads every conversation's newest records and head again and again; what it took, and what one read takes.
fn read(
    reader: &ShardReader,
    writing: &[Writing],
    syncs_per_record: f64,
) -> anyhow::Result<(Reads, Duration)> {
    const TIMES: u64 = 20;
    let whole = thread_cpu();
    let limits = Limits { records: 50, bytes: usize::MAX };
    let reads = TIMES as f64 * writing.len() as f64;
    let mut last = Duration::ZERO;
    let mut found = 0;
    // The first pass warms what the second measures.
    for _ in 0..2 {
        let at = thread_cpu();
        for _ in 0..TIMES {
            for at in writing {
                let before = Seq::new(at.next + 1).context("seq")?;
                found += reader.records_before(at.conversation, before, limits)?.len();
            }
        }
        last = thread_cpu() - at;
    }
    let expected = writing.iter().map(|at| at.next.min(50) * TIMES * 2).sum::<u64>();
    anyhow::ensure!(found as u64 == expected, "{found} records were read instead of {expected}");
    let at = thread_cpu();
    for _ in 0..TIMES {
        for at in writing {
            let head = reader.head(at.conversation)?.context("no head")?;
            anyhow::ensure!(head.seq.get() == at.next, "the head is elsewhere");
        }
    }
    let head = thread_cpu() - at;
    let us = |time: Duration| time.as_secs_f64() * 1e6 / reads;
    Ok((Reads { syncs_per_record, last_fifty_us: us(last), head_us: us(head) }, thread_cpu() - whole))
}
