//! A folder that is filled, killed, opened, closed, opened again, and opened without its index.

use std::{
    fs::File,
    io::{self, Write as _},
    path::Path,
    time::Instant,
};

use anyhow::Context as _;
use fulmar_benches::meter::{disk_bytes, process_cpu, resident_of};
use fulmar_protocol::id::ShardId;
use fulmar_store::{EngineKind, Store};
use rustix::fs::{Advice, fadvise};

use crate::{
    cell::Measured,
    load::{self, CONVERSATIONS, Load},
};

/// Records per commit while the folder is filled, and afterwards until the process is killed.
const FILL_BATCH: usize = 1_024;
const KILL_BATCH: usize = 64;

/// Writes `records` records, prints a line, and writes on until the process is killed.
pub(crate) fn fill(engine: EngineKind, folder: &Path, records: u64) -> anyhow::Result<Measured> {
    let store = Store::open(folder, &load::options(engine, 1))?;
    let (mut writer, reader) = load::shards(&store)?.pop().context("a shard")?;
    let runtime = load::runtime()?;
    let mut load = runtime.block_on(Load::prepare(&mut writer, &reader, CONVERSATIONS))?;
    let mut ops = Vec::new();
    let mut said = false;
    loop {
        let batch = if said { KILL_BATCH } else { FILL_BATCH };
        ops.clear();
        load.fill(&mut ops, batch)?;
        runtime.block_on(writer.commit(&ops))?;
        if load.written() >= records && !said {
            said = true;
            writeln!(io::stdout().lock(), "filled")?;
        }
        anyhow::ensure!(load.written() < 4 * records + 10_000_000, "nobody killed this process");
    }
}

/// Opens a folder with at least `records` records, and closes it.
pub(crate) fn open(engine: EngineKind, folder: &Path, records: u64, cold: bool) -> anyhow::Result<Measured> {
    if cold {
        forget(folder)?;
    }
    let bytes = disk_bytes(folder)? as f64;
    let (cpu, begin) = (process_cpu(), Instant::now());
    let store = Store::open(folder, &load::options(engine, 1))?;
    let (seconds, cpu) = (begin.elapsed().as_secs_f64(), (process_cpu() - cpu).as_secs_f64());
    let resident = resident_of(std::process::id())?;

    let reader = store.reader(ShardId::new(0).context("a shard")?)?;
    let mut found = 0;
    for (conversation, _) in reader.conversations(None, usize::MAX)? {
        found += reader.head(conversation)?.context("no head")?.seq.get();
    }
    anyhow::ensure!(found >= records, "{found} records are left of {records}");
    let gib = bytes / f64::from(1 << 30);
    let mut figures = Measured::default();
    figures.set("seconds", seconds);
    figures.set("cpu", cpu);
    figures.set("gib", gib);
    figures.set("per gib", seconds / gib);
    figures.set("cpu per gib", cpu / gib);
    figures.set("replayed", load::stats(&store)?.replayed as f64);
    figures.set("records", found as f64);
    figures.set("rss", resident as f64);
    drop(reader);
    store.close()?;
    Ok(figures)
}

/// Writes what the files below a folder still owe the disk, and drops them from the page cache.
pub(crate) fn forget(folder: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.metadata()?.is_dir() {
            forget(&entry.path())?;
        } else {
            let file = File::open(entry.path())?;
            file.sync_all()?;
            fadvise(&file, 0, None, Advice::DontNeed)?;
        }
    }
    Ok(())
}
