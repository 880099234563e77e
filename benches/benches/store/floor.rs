//! The floors: what the disk, and each engine, take for the same records without a store around them.
//!
//! - A file: the bytes of a record appended, one `write` and one `fdatasync` per commit.
//! - sled: one insert per record, then `flush` and an `fdatasync` of its file (`flush` alone loses records in a power cut).
//! - fjall: one insert per record, then its own synced persist.

use std::{
    fs::File,
    io::Write as _,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bytes::Bytes;
use fulmar_benches::meter::{Samples, disk_bytes, process_cpu, resident_of};
use fulmar_store::EngineKind;

use crate::{
    cell::Measured,
    load::{HEADER_BYTES, PAYLOAD_BYTES, bodies},
};

/// Bytes the engines may cache, as the store tells them.
const CACHE_BYTES: u64 = 16 << 20;

/// Commits of one thread.
pub(crate) struct Commits {
    pub(crate) records: u64,
    pub(crate) took: Duration,
    pub(crate) each: Samples,
}

/// Puts the bytes of a record behind others.
pub(crate) fn put_record(buffer: &mut Vec<u8>, number: u64, body: &[u8]) {
    buffer.extend_from_slice(&number.to_be_bytes());
    buffer.extend_from_slice(&[0; HEADER_BYTES - 16]);
    buffer.extend_from_slice(&(body.len() as u64).to_be_bytes());
    buffer.extend_from_slice(body);
}

/// Bare files.
pub(crate) fn file(folder: &Path, batch: usize, shards: u16, time: Duration) -> anyhow::Result<Measured> {
    let bodies = bodies();
    let cpu = process_cpu();
    let threads: Vec<anyhow::Result<Commits>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..shards)
            .map(|shard| {
                let (path, bodies) = (folder.join(format!("log-{shard}")), &bodies);
                scope.spawn(move || one_file(&path, bodies, batch, time))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| anyhow::bail!("panicked")))
            .collect()
    });
    let cpu = process_cpu() - cpu;
    figures(threads, cpu, folder)
}

fn one_file(path: &Path, bodies: &[Bytes], batch: usize, time: Duration) -> anyhow::Result<Commits> {
    let mut file = File::create(path)?;
    let mut buffer = Vec::with_capacity(batch * (PAYLOAD_BYTES + HEADER_BYTES));
    commits(bodies, batch, time, |bodies| {
        buffer.clear();
        for (number, body) in bodies {
            put_record(&mut buffer, number, body);
        }
        file.write_all(&buffer)?;
        Ok(file.sync_data()?)
    })
}

/// A bare engine.
pub(crate) fn engine(
    engine: EngineKind,
    folder: &Path,
    batch: usize,
    time: Duration,
) -> anyhow::Result<Measured> {
    let bodies = bodies();
    match engine {
        EngineKind::Sled => {
            let database = sled::Config::new()
                .path(folder)
                .cache_capacity(CACHE_BYTES)
                .flush_every_ms(Some(500))
                .open()?;
            let file = File::open(folder.join("db"))?;
            let cpu = process_cpu();
            let made = commits(&bodies, batch, time, |bodies| {
                for (number, body) in bodies {
                    database.insert(number.to_be_bytes(), body.as_ref())?;
                }
                database.flush()?;
                Ok(file.sync_data()?)
            });
            drop(database);
            figures(vec![made], process_cpu() - cpu, folder)
        }
        EngineKind::Fjall => {
            let database =
                fjall::Database::builder(folder).cache_size(CACHE_BYTES).worker_threads(1).open()?;
            let rows = database.keyspace("rows", fjall::KeyspaceCreateOptions::default)?;
            let cpu = process_cpu();
            let made = commits(&bodies, batch, time, |bodies| {
                for (number, body) in bodies {
                    rows.insert(number.to_be_bytes(), body.as_ref())?;
                }
                Ok(database.persist(fjall::PersistMode::SyncData)?)
            });
            drop((rows, database));
            figures(vec![made], process_cpu() - cpu, folder)
        }
        EngineKind::Memory => anyhow::bail!("there is no floor for memory"),
    }
}

/// Commits for `time`, each of the next numbered bodies.
fn commits<'a>(
    bodies: &'a [Bytes],
    batch: usize,
    time: Duration,
    mut commit: impl FnMut(&mut dyn Iterator<Item = (u64, &'a Bytes)>) -> anyhow::Result<()>,
) -> anyhow::Result<Commits> {
    let mut each = Samples::default();
    let mut records = 0u64;
    let begin = Instant::now();
    while begin.elapsed() < time {
        let at = Instant::now();
        let skip = usize::try_from(records)? % bodies.len();
        commit(&mut (records + 1..).zip(bodies.iter().cycle().skip(skip)).take(batch))?;
        records += batch as u64;
        each.add_us(at.elapsed());
    }
    Ok(Commits { records, took: begin.elapsed(), each })
}

/// The figures of the committing threads of a process, whose files lie in `folder`.
pub(crate) fn figures(
    threads: Vec<anyhow::Result<Commits>>,
    cpu: Duration,
    folder: &Path,
) -> anyhow::Result<Measured> {
    let (mut records, mut rate, mut all) = (0u64, 0.0, Samples::default());
    for thread in threads {
        let thread = thread.context("a committing thread")?;
        records += thread.records;
        rate += thread.records as f64 / thread.took.as_secs_f64();
        all.append(&thread.each);
    }
    let per = records.max(1) as f64;
    let mut figures = Measured::default();
    figures.set("records", records as f64);
    figures.set("rate", rate);
    figures.set("cpu", cpu.as_secs_f64() * 1e6 / per);
    figures.set("p50", all.median());
    figures.set("p99", all.quantile(0.99));
    figures.set("disk", disk_bytes(folder)? as f64 / per);
    figures.set("rss", resident_of(std::process::id())? as f64);
    Ok(figures)
}
