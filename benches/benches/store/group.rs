//! Producers that each wait for their ack before they send again, and the loop that commits for them as a gateway's shard
//! does: it takes what is waiting, and has one commit in flight.
//!
//! Everything but the committing thread runs on one thread, as in a gateway with one core for its shard.

use std::{
    fs::File,
    io::Write as _,
    path::Path,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use fulmar_benches::meter::{Samples, process_cpu};
use fulmar_store::{EngineKind, ShardWriter, Store};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
};

use crate::{
    cell::Measured,
    floor::put_record,
    load::{self, CONVERSATIONS, Load, bodies},
};

/// Sends that may wait for the loop, as in the gateway.
const QUEUE_MAX: usize = 4_096;

/// One send.
struct Send {
    turn: usize,
    ack: oneshot::Sender<()>,
}

/// What commits.
trait Commit {
    async fn commit(&mut self, turns: &[Send]) -> anyhow::Result<()>;
}

struct OverTheStore {
    writer: ShardWriter,
    load: Load,
    ops: Vec<fulmar_store::Op>,
}

impl Commit for OverTheStore {
    async fn commit(&mut self, sends: &[Send]) -> anyhow::Result<()> {
        self.ops.clear();
        for send in sends {
            let op = self.load.append(send.turn)?;
            self.ops.push(op);
        }
        self.writer.commit(&self.ops).await?;
        Ok(())
    }
}

/// A bare file on a thread of its own, so that its syncs hold nobody up.
struct OverAFile {
    bytes: SyncSender<(Vec<u8>, oneshot::Sender<std::io::Result<()>>)>,
    bodies: Vec<bytes::Bytes>,
    written: u64,
}

impl Commit for OverAFile {
    async fn commit(&mut self, sends: &[Send]) -> anyhow::Result<()> {
        let mut buffer = Vec::new();
        for _ in sends {
            let at = usize::try_from(self.written)? % self.bodies.len();
            self.written += 1;
            put_record(&mut buffer, self.written, self.bodies.get(at).context("a payload")?);
        }
        let (reply, answer) = oneshot::channel();
        self.bytes.try_send((buffer, reply)).ok().context("the file's thread is gone")?;
        Ok(answer.await??)
    }
}

/// The floor: the same loop over a bare file.
pub(crate) fn over_a_file(folder: &Path, producers: usize, time: Duration) -> anyhow::Result<Measured> {
    let file = File::create(folder.join("log"))?;
    let (bytes, queue) = sync_channel(1);
    let thread = std::thread::spawn(move || append(file, &queue));
    let commit = OverAFile { bytes, bodies: bodies(), written: 0 };
    let (mut figures, commits) = load::runtime()?.block_on(run(commit, producers, time))?;
    thread.join().ok().context("the file's thread panicked")?;
    figures.set("syncs", commits as f64 / figures.get("records"));
    Ok(figures)
}

fn append(mut file: File, queue: &Receiver<(Vec<u8>, oneshot::Sender<std::io::Result<()>>)>) {
    while let Ok((bytes, reply)) = queue.recv() {
        // Nobody waits when the measurement is over.
        let _ = reply.send(file.write_all(&bytes).and_then(|()| file.sync_data()));
    }
}

pub(crate) fn over_the_store(
    engine: EngineKind,
    folder: &Path,
    producers: usize,
    time: Duration,
) -> anyhow::Result<Measured> {
    let store = Store::open(folder, &load::options(engine, 1))?;
    let (mut writer, reader) = load::shards(&store)?.pop().context("a shard")?;
    let runtime = load::runtime()?;
    let load = runtime.block_on(Load::prepare(&mut writer, &reader, CONVERSATIONS))?;
    let before = load::stats(&store)?;
    let (mut figures, _) =
        runtime.block_on(run(OverTheStore { writer, load, ops: Vec::new() }, producers, time))?;
    let after = load::stats(&store)?;
    let records = figures.get("records");
    figures.set("barriers", (after.barriers - before.barriers) as f64 / records);
    let background = after.background_syncs - before.background_syncs;
    figures.set("syncs", (after.barriers - before.barriers + background) as f64 / records);
    figures.set("waited", (after.settle_behind - before.settle_behind) as f64);
    drop(reader);
    store.close()?;
    Ok(figures)
}

/// Lets the producers send for `time`; returns their figures and how many commits there were.
async fn run(mut commit: impl Commit, producers: usize, time: Duration) -> anyhow::Result<(Measured, u64)> {
    let (sender, mut queue) = mpsc::channel::<Send>(QUEUE_MAX);
    let (cpu, begin) = (process_cpu(), Instant::now());
    let mut tasks = JoinSet::new();
    for number in 0..producers {
        let sender = sender.clone();
        tasks.spawn(async move {
            let turn = number % usize::try_from(CONVERSATIONS).unwrap_or(1);
            let mut acks = Samples::default();
            while begin.elapsed() < time {
                let (ack, acked) = oneshot::channel();
                let at = Instant::now();
                if sender.send(Send { turn, ack }).await.is_err() || acked.await.is_err() {
                    break;
                }
                acks.add_us(at.elapsed());
            }
            acks
        });
    }
    drop(sender);
    let mut commits = 0;
    let mut batch = Vec::with_capacity(QUEUE_MAX);
    while queue.recv_many(&mut batch, QUEUE_MAX).await > 0 {
        commit.commit(&batch).await?;
        commits += 1;
        for send in batch.drain(..) {
            // Every producer waits for its ack.
            let _ = send.ack.send(());
        }
    }
    let took = begin.elapsed();
    let mut all = Samples::default();
    while let Some(acks) = tasks.join_next().await {
        all.append(&acks?);
    }
    let mut figures = Measured::default();
    figures.set("records", all.len() as f64);
    figures.set("rate", all.len() as f64 / took.as_secs_f64());
    figures.set("p50", all.median());
    figures.set("p99", all.quantile(0.99));
    figures.set("cpu", (process_cpu() - cpu).as_secs_f64() * 1e6 / all.len() as f64);
    figures.set("group", all.len() as f64 / commits as f64);
    Ok((figures, commits))
}
