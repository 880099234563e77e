//! Commits through the store's public API, on as many threads as there are shards.
//!
//! - CPU is the whole process's until everything written is settled and merged and the engine has come to rest: what is put
//!   off while commits go on is paid for as well.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use fulmar_benches::meter::{Samples, disk_bytes, process_cpu, resident_of};
use fulmar_store::{EngineKind, ShardReader, ShardWriter, Store};

use crate::{
    cell::Measured,
    floor::{Commits, figures},
    load::{self, CONVERSATIONS, Load},
};

/// How long nothing may change before everything counts as settled and merged: longer than sled's flusher sleeps.
const REST: Duration = Duration::from_millis(1_200);

/// How long to wait for it at most.
const PATIENCE: Duration = Duration::from_secs(120);

/// Commits of `batch` records for `time`, then waits until all of it is settled and merged.
pub(crate) fn through_the_store(
    engine: EngineKind,
    folder: &Path,
    batch: usize,
    shards: u16,
    time: Duration,
) -> anyhow::Result<Measured> {
    let store = Store::open(folder, &load::options(engine, shards))?;
    let mut prepared = Vec::new();
    for (mut writer, reader) in load::shards(&store)? {
        let load = load::runtime()?.block_on(Load::prepare(&mut writer, &reader, CONVERSATIONS))?;
        prepared.push((writer, reader, load));
    }
    let before = load::stats(&store)?;
    let (cpu, begin) = (process_cpu(), Instant::now());
    let threads: Vec<anyhow::Result<Commits>> = std::thread::scope(|scope| {
        let threads: Vec<_> = prepared
            .iter_mut()
            .map(|(writer, _, load)| scope.spawn(move || commits(writer, load, batch, time)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| anyhow::bail!("panicked")))
            .collect()
    });
    let (busy, committing) = (begin.elapsed(), process_cpu() - cpu);
    let behind = load::stats(&store)?;
    let resident = resident_of(std::process::id())?;
    let resting = rest(&store, folder)?;
    let after = load::stats(&store)?;
    let mut figures = figures(threads, process_cpu() - cpu, folder)?;

    let records = figures.get("records").max(1.0);
    figures.set("rss", resident as f64);
    figures.set("cpu committing", committing.as_secs_f64() * 1e6 / records);
    figures.set("rate settled", records / (busy + resting).as_secs_f64());
    figures.set("barriers", (behind.barriers - before.barriers) as f64 / records);
    let background = after.background_syncs - before.background_syncs;
    figures.set("syncs", (after.barriers - before.barriers + background) as f64 / records);
    figures.set("waited", (behind.settle_behind - before.settle_behind) as f64);
    figures.set("merges", after.merges as f64);
    figures.set("segments", after.segments as f64);
    figures.set("segment bytes", after.segment_bytes as f64 / records);
    figures.set("index bytes", after.index_bytes as f64 / records);
    for (_, reader, load) in &prepared {
        verify(reader, load)?;
    }
    drop(prepared);
    store.close()?;
    drop(store);
    if engine != EngineKind::Memory {
        figures.set("disk closed", disk_bytes(folder)? as f64 / records);
    }
    Ok(figures)
}

/// So many commits, and the store closed behind them.
pub(crate) fn steps(commits: u64, batch: usize) -> anyhow::Result<Measured> {
    let store = Store::open("unused", &load::options(EngineKind::Memory, 1))?;
    let (mut writer, reader) = load::shards(&store)?.pop().context("a shard")?;
    let runtime = load::runtime()?;
    let mut load = runtime.block_on(Load::prepare(&mut writer, &reader, CONVERSATIONS))?;
    let mut ops = Vec::with_capacity(batch);
    for _ in 0..commits {
        ops.clear();
        load.fill(&mut ops, batch)?;
        runtime.block_on(writer.commit(&ops))?;
    }
    verify(&reader, &load)?;
    store.close()?;
    let mut figures = Measured::default();
    figures.set("records", load.written() as f64);
    Ok(figures)
}

fn commits(
    writer: &mut ShardWriter,
    load: &mut Load,
    batch: usize,
    time: Duration,
) -> anyhow::Result<Commits> {
    let runtime = load::runtime()?;
    let mut each = Samples::default();
    let mut ops = Vec::with_capacity(batch);
    let before = load.written();
    let begin = Instant::now();
    while begin.elapsed() < time {
        ops.clear();
        load.fill(&mut ops, batch)?;
        let at = Instant::now();
        runtime.block_on(writer.commit(&ops))?;
        each.add_us(at.elapsed());
    }
    Ok(Commits { records: load.written() - before, took: begin.elapsed(), each })
}

/// Waits until everything is settled and nothing changes any more, on disk neither; returns how long that took.
pub(crate) fn rest(store: &Store, folder: &Path) -> anyhow::Result<Duration> {
    let begin = Instant::now();
    let look = || anyhow::Ok((load::stats(store)?, disk_now(folder)?));
    let (mut seen, mut since) = (look()?, Instant::now());
    while seen.0.overlay_commits > 0 || since.elapsed() < REST {
        anyhow::ensure!(begin.elapsed() < PATIENCE, "the store does not come to rest: {:?}", seen.0);
        pause(Duration::from_millis(20));
        let now = look()?;
        if now != seen {
            (seen, since) = (now, Instant::now());
        }
    }
    Ok(since.duration_since(begin))
}

/// Disk use of a folder whose files come and go: looks again when one went while it was looked at.
pub(crate) fn disk_now(folder: &Path) -> anyhow::Result<u64> {
    const LOOKS: usize = 100;
    for _ in 1..LOOKS {
        if let Ok(bytes) = disk_bytes(folder) {
            return Ok(bytes);
        }
    }
    Ok(disk_bytes(folder)?)
}

#[expect(clippy::disallowed_methods, reason = "no runtime waits on this thread")]
pub(crate) fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// Every conversation ends where it was written to.
fn verify(reader: &ShardReader, load: &Load) -> anyhow::Result<()> {
    for (conversation, head) in load.heads() {
        let found = reader.head(*conversation)?.map_or(0, |head| head.seq.get());
        anyhow::ensure!(found == *head, "conversation {conversation} ends at {found} instead of {head}");
    }
    Ok(())
}
