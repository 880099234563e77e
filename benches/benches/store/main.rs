//! The log, format 2: the store through its public API beside a bare appended file and the bare engines, on the same disk, in
//! the same run, one measurement after the other, each in a process of its own.
//!
//! `cargo build --release -p fulmar-faultdisk`, then `cargo bench -p fulmar-benches --bench store -- --help`. The library makes
//! syncs slower; it is looked for beside the bench and in the folder above, so both need the same target folder.
//!
//! Not here: how each thing is measured (the modules), what came out (`RESULTS.md`).

mod cell;
mod churn;
mod floor;
mod group;
mod life;
mod load;
mod read;
mod write;

use std::{path::PathBuf, time::Duration};

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use fulmar_benches::{command::Flags, report::Report};

use cell::{Cell, Measured};
use load::RECORD_BYTES;

/// The log through the store's public API, beside a bare file and the bare engines.
#[derive(Clone, Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// Only this engine, instead of sled and fjall
    #[arg(long, value_name = "sled|fjall|memory")]
    engine: Option<String>,
    /// Only these parts; separated by commas
    #[arg(long, value_enum, value_delimiter = ',')]
    part: Vec<Part>,
    /// Microseconds that each sync takes more, one grouped measurement for each
    #[arg(long, value_name = "MICROSECONDS", value_delimiter = ',', default_value = "0,1000,5000,10000")]
    sync_delay: Vec<u64>,
    /// Count instructions per record instead of measuring anything (needs valgrind)
    #[arg(long)]
    instructions: bool,
    /// What a process of its own measures
    #[arg(long, hide = true)]
    cell: Option<String>,
}

/// A part of the measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Commits of 1, 64 and 1 024 records
    Commit,
    /// Heads and newest pages, cold and warm
    Read,
    /// Opening after a kill, after a close, and without the index
    Open,
    /// Producers that wait for their acks, on slower and slower disks
    Group,
    /// Retention while 20 times the live records are written
    Churn,
    /// Four shards at once
    Shards,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if let Some(cell) = &arguments.cell {
        return cell::play(cell);
    }
    let flags = &arguments.flags;
    let mut bench = Bench { arguments: &arguments, report: Report::new("store", flags.quick) };
    let load = load_average();
    if arguments.instructions {
        bench.instructions()?;
    } else {
        for part in [Part::Commit, Part::Shards, Part::Read, Part::Open, Part::Group, Part::Churn] {
            if arguments.part.is_empty() || arguments.part.contains(&part) {
                eprintln!("measuring: {part:?}");
                match part {
                    Part::Commit => bench.commit(),
                    Part::Shards => bench.shards(),
                    Part::Read => bench.read(),
                    Part::Open => bench.open(),
                    Part::Group => bench.group(),
                    Part::Churn => bench.churn(),
                }?;
            }
        }
        bench.report.note(
            "CPU is the whole process's, settling, merging and the engine's own threads included, until all of it is at rest",
        );
        bench.report.note(format!(
            "payloads of {} bytes; floors write {RECORD_BYTES} per record",
            load::PAYLOAD_BYTES
        ));
    }
    bench.report.note(format!("load of the machine: {load} in the beginning, {} in the end", load_average()));
    bench.report.finish(flags.json.as_deref())?;
    Ok(())
}

fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("unknown").to_owned()
}

struct Bench<'a> {
    arguments: &'a Arguments,
    report: Report,
}

impl Bench<'_> {
    fn engines(&self) -> Vec<String> {
        match &self.arguments.engine {
            Some(engine) => vec![engine.clone()],
            None => vec!["sled".to_owned(), "fjall".to_owned()],
        }
    }

    /// The engines that have files.
    fn on_disk(&self) -> Vec<String> {
        self.engines().into_iter().filter(|engine| engine != "memory").collect()
    }

    fn quick(&self) -> bool {
        self.arguments.flags.quick
    }

    /// Measures once in a fresh folder.
    fn measure(&self, cell: impl Fn(PathBuf) -> Cell) -> anyhow::Result<Measured> {
        let folder = self.arguments.flags.fresh_folder()?;
        cell(folder.path().to_owned()).run()
    }

    /// The instructions of a record, start and end of the process taken out.
    fn instructions(&mut self) -> anyhow::Result<()> {
        let batch = 64;
        let (few, many) = (500, 2_000);
        let count = |commits| Cell::Steps { commits, batch }.instructions();
        let (least, most) = (count(few)?, count(many)?);
        let records = ((many - few) * batch as u64) as f64;
        let (all, sha) = ((most.0 - least.0) / records, (most.1 - least.1) / records);
        self.report.record("64 per commit, memory: instructions", "per record", all);
        self.report.record("… without SHA-256", "per record", all - sha);
        self.report.note(
            "counted by callgrind, all threads, with the bench's own making of records; valgrind's processor has no \
             instructions for SHA-256, which are a tenth of the time on one that has",
        );
        Ok(())
    }

    fn commit(&mut self) -> anyhow::Result<()> {
        let (rounds, millis) = if self.quick() { (1, 1_500) } else { (3, 2_000) };
        let engines = self.engines();
        for batch in [1usize, 64, 1_024] {
            let mut files = Vec::new();
            let mut bare = vec![Vec::new(); engines.len()];
            let mut stores = vec![Vec::new(); engines.len()];
            for _ in 0..rounds {
                files.push(self.measure(|folder| Cell::File { folder, batch, shards: 1, millis })?);
                for (place, engine) in engines.iter().enumerate() {
                    if engine != "memory" {
                        let one = self.measure(|folder| Cell::Engine {
                            engine: engine.clone(),
                            folder,
                            batch,
                            millis,
                        })?;
                        bare.get_mut(place).context("a place")?.push(one);
                    }
                    let one = self.measure(|folder| Cell::Store {
                        engine: engine.clone(),
                        folder,
                        batch,
                        shards: 1,
                        millis,
                    })?;
                    stores.get_mut(place).context("a place")?.push(one);
                }
            }
            let file = Measured::medians(&files);
            for (engine, (bare, stores)) in engines.iter().zip(bare.iter().zip(&stores)) {
                self.report_commits(engine, batch, &file, bare, &Measured::medians(stores));
            }
        }
        let time = Duration::from_millis(millis);
        self.report.note(format!("commits: medians of {rounds} rounds of {time:?}, in turns"));
        self.report.note(
            "syncs: all of the process's for the store, the settling thread's and the engine's included; \
             a commit waits for one",
        );
        Ok(())
    }

    fn report_commits(
        &mut self,
        engine: &str,
        batch: usize,
        file: &Measured,
        bare: &[Measured],
        store: &Measured,
    ) {
        let report = &mut self.report;
        let name = |what: &str| format!("{engine}, {batch} per commit: {what}");
        let beside = |report: &mut Report, what: &str, unit, key: &str| {
            report.beside(name(what), unit, store.get(key), ("file", file.get(key)));
        };
        beside(report, "rate", "records/s", "rate");
        if batch == 64 {
            let rate = store.get("rate");
            report.bar("≥ 0.40 × file", rate >= 0.4 * file.get("rate"));
            report.record(name("rate again"), "records/s", rate);
            report.bar("≥ 110 k/s", rate >= 110_000.0);
        }
        report.record(name("rate until settled"), "records/s", store.get("rate settled"));
        beside(report, "commit p50", "µs", "p50");
        if batch == 1 {
            report.bar("≤ 2.5 × file", store.get("p50") <= 2.5 * file.get("p50"));
        }
        beside(report, "commit p99", "µs", "p99");
        beside(report, "CPU", "µs/record", "cpu");
        if batch == 64 {
            report.bar("≤ 10 µs", store.get("cpu") <= 10.0);
        }
        report.record(name("CPU while committing"), "µs/record", store.get("cpu committing"));
        beside(report, "disk at rest", "bytes/record", "disk");
        if !bare.is_empty() {
            let bare = Measured::medians(bare);
            for (what, unit, key) in [
                ("rate", "records/s", "rate"),
                ("CPU", "µs/record", "cpu"),
                ("disk at rest", "bytes/record", "disk"),
            ] {
                report.beside(name(what), unit, store.get(key), (format!("bare {engine}"), bare.get(key)));
            }
            report.beside(
                name("RSS"),
                "MiB",
                mib(store.get("rss")),
                (format!("bare {engine}"), mib(bare.get("rss"))),
            );
        }
        report.record(name("disk closed"), "bytes/record", store.get("disk closed"));
        report.record(name("… of it index"), "bytes/record", store.get("index bytes"));
        report.record(name("syncs commits waited for"), "per record", store.get("barriers"));
        report.record(name("syncs"), "per record", store.get("syncs"));
        report.record(name("waits for settling"), "", store.get("waited"));
        report.record(name("merges"), "", store.get("merges"));
    }

    fn shards(&mut self) -> anyhow::Result<()> {
        const SHARDS: u16 = 4;
        const BATCH: usize = 64;
        let millis = self.arguments.flags.pick(4_000, 1_500);
        let file = self.measure(|folder| Cell::File { folder, batch: BATCH, shards: SHARDS, millis })?;
        for engine in self.engines() {
            let store = self.measure(|folder| Cell::Store {
                engine: engine.clone(),
                folder,
                batch: BATCH,
                shards: SHARDS,
                millis,
            })?;
            let name = |what: &str| format!("{engine}, {SHARDS} shards, {BATCH} per commit: {what}");
            for (what, unit, key) in [
                ("rate", "records/s", "rate"),
                ("commit p50", "µs", "p50"),
                ("commit p99", "µs", "p99"),
                ("CPU", "µs/record", "cpu"),
                ("disk at rest", "bytes/record", "disk"),
            ] {
                self.report.beside(
                    name(what),
                    unit,
                    store.get(key),
                    (format!("{SHARDS} files"), file.get(key)),
                );
            }
            self.report.record(name("RSS"), "MiB", mib(store.get("rss")));
            self.report.record(name("syncs"), "per record", store.get("syncs"));
        }
        Ok(())
    }

    fn read(&mut self) -> anyhow::Result<()> {
        for engine in self.on_disk() {
            let read = self.measure(|folder| Cell::Read { engine: engine.clone(), folder })?;
            let report = &mut self.report;
            let name = |what: &str| format!("{engine}, 1 000 conversations: {what}");
            report.record(name("last 50, warm"), "µs CPU", read.get("page warm"));
            report.bar("≤ 40 µs", read.get("page warm") <= 40.0);
            report.record(name("last 50, cold, p50"), "µs", read.get("page cold"));
            report.record(name("last 50, cold, p99"), "µs", read.get("page cold p99"));
            report.record(name("head, warm"), "µs CPU", read.get("head warm"));
            report.bar("≤ 1 µs", read.get("head warm") <= 1.0);
            report.record(name("head, cold, p50"), "µs", read.get("head cold"));
            report.record(name("head, cold, p99"), "µs", read.get("head cold p99"));
            report.record(name("RSS"), "MiB", mib(read.get("rss")));
        }
        self.report.note("cold: the first read after opening, none of the store's files in the page cache");
        Ok(())
    }

    fn open(&mut self) -> anyhow::Result<()> {
        let sizes: &[u64] = if self.quick() { &[1_000_000] } else { &[1_000_000, 5_000_000] };
        for engine in self.on_disk() {
            for records in sizes.iter().copied() {
                let folder = self.arguments.flags.fresh_folder()?;
                let at = || folder.path().to_owned();
                let filling = Cell::Fill { engine: engine.clone(), folder: at(), records }.start()?;
                // In the middle of its writing, wherever that is.
                write::pause(Duration::from_millis(700));
                filling.kill()?;
                let opened = |cold| Cell::Open { engine: engine.clone(), folder: at(), records, cold }.run();
                let killed = opened(false)?;
                let closed = opened(true)?;
                std::fs::remove_dir_all(folder.path().join("shard-000").join("index"))?;
                let rebuilt = opened(true)?;
                let millions = records / 1_000_000;
                for (after, figures, is_bound) in [
                    ("after kill -9", killed, true),
                    ("after a close, cold", closed, true),
                    ("without its index, cold", rebuilt, true),
                ] {
                    let name = |what: &str| format!("{engine}, {millions} M records, open {after}: {what}");
                    self.report.record(name("time"), "s", figures.get("seconds"));
                    self.report.record(name("time"), "s/GiB", figures.get("per gib"));
                    if is_bound {
                        self.report.bar("≤ 1 s/GiB", figures.get("per gib") <= 1.0);
                    }
                    self.report.record(name("CPU"), "s/GiB", figures.get("cpu per gib"));
                    self.report.record(name("folder"), "GiB", figures.get("gib"));
                    self.report.record(name("commits replayed"), "", figures.get("replayed"));
                    self.report.record(name("RSS"), "MiB", mib(figures.get("rss")));
                }
            }
        }
        Ok(())
    }

    fn group(&mut self) -> anyhow::Result<()> {
        let millis = self.arguments.flags.pick(2_000, 1_500);
        let engines = self.on_disk();
        for delay in &self.arguments.sync_delay {
            let time = Duration::from_micros(*delay);
            for producers in [64, 256, 1_024] {
                let measure = |engine: Option<String>| {
                    let folder = self.arguments.flags.fresh_folder()?;
                    let at = folder.path().to_owned();
                    Cell::Group { engine, folder: at, producers, millis }.run_delayed(folder.path(), time)
                };
                let file = measure(None)?;
                for engine in &engines {
                    let store = measure(Some(engine.clone()))?;
                    let name =
                        |what: &str| format!("{engine}, sync + {time:?}, {producers} producers: {what}");
                    for (what, unit, key) in [
                        ("rate", "records/s", "rate"),
                        ("ack p50", "µs", "p50"),
                        ("ack p99", "µs", "p99"),
                        ("records per commit", "", "group"),
                        ("syncs", "per record", "syncs"),
                        ("CPU", "µs/record", "cpu"),
                    ] {
                        self.report.beside(name(what), unit, store.get(key), ("file", file.get(key)));
                    }
                    self.report.record(name("syncs commits waited for"), "per record", store.get("barriers"));
                }
            }
        }
        self.report.note(
            "producers: each waits for its ack before it sends again; file: the same loop over a bare file",
        );
        Ok(())
    }

    fn churn(&mut self) -> anyhow::Result<()> {
        let turnovers = 20;
        // Live: 64 MiB of records, or 20 000 conversations of four records.
        let records = self.arguments.flags.pick(64 << 20, 8 << 20) / RECORD_BYTES as u64;
        for engine in self.on_disk() {
            let bar = if engine == "sled" { 2.5 } else { 2.0 };
            for (conversations, keep) in [
                (load::CONVERSATIONS, records / load::CONVERSATIONS),
                (self.arguments.flags.pick(20_000, 5_000), 4),
            ] {
                let churn = self.measure(|folder| Cell::Churn {
                    engine: engine.clone(),
                    folder,
                    conversations,
                    keep,
                    turnovers,
                })?;
                let report = &mut self.report;
                let name = |what: &str| format!("{engine}, {conversations} × {keep} records kept: {what}");
                report.record(name("live"), "MiB", mib(churn.get("live")));
                report.record(name("written"), "MiB", mib(churn.get("written")));
                for turnover in [1, 5, 10, 15, 20] {
                    let figure = churn.get(&format!("turnover {turnover:02}"));
                    report.record(name(&format!("disk after turnover {turnover}")), "× live", figure);
                }
                report.record(name("disk after any turnover, worst"), "× live", churn.get("worst"));
                report.bar(format!("≤ {bar} ×"), churn.get("worst") <= bar);
                report.record(name("disk at rest"), "× live", churn.get("rest"));
                report.bar(format!("≤ {bar} ×"), churn.get("rest") <= bar);
                for part in ["log", "segments", "index"] {
                    report.record(
                        name(&format!("… of it {part}")),
                        "× live",
                        churn.get(&format!("rest {part}")),
                    );
                }
                report.record(name("disk closed"), "× live", churn.get("closed"));
                report.record(name("rate"), "records/s", churn.get("rate"));
                report.record(name("CPU"), "µs/record", churn.get("cpu"));
                report.record(name("merges"), "", churn.get("merges"));
                report.record(name("waits for settling"), "", churn.get("waited"));
            }
        }
        self.report.note("live: bytes of the kept records and of the conversations' rows, counted; disk: what the file system \
             allocated, log files of about 16 MiB included");
        Ok(())
    }
}

fn mib(bytes: f64) -> f64 {
    bytes / f64::from(1 << 20)
}
