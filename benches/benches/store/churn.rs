//! Retention under writing: the newest records of each conversation stay, and many times as many are written.
//!
//! - Live bytes are counted, not measured: the bytes of the records that are kept, and of the rows of each conversation.
//! - The marks (`Op::Low`) move eight times per turnover, for all conversations, as a gateway's retention does in its rounds;
//!   finding out where to is left out, it is known here.
//! - Disk use is what the file system has allocated, at the end of each turnover while writing goes on at full speed, and in
//!   the end at rest.

use std::{path::Path, time::Instant};

use anyhow::Context as _;
use fulmar_benches::meter::{disk_bytes, process_cpu};
use fulmar_protocol::id::Seq;
use fulmar_store::{EngineKind, Op, Store};

use crate::{
    cell::Measured,
    load::{self, Load, RECORD_BYTES},
    write::{disk_now, rest},
};

const MARKS_PER_TURNOVER: u64 = 8;
/// Large, so that a slow disk's syncs do not make it a measurement of them.
const BATCH: usize = 1_024;
const MARKS_AT_ONCE: usize = 1_000;

/// Bytes of a conversation's rows, keys and checksums included: name 33, conversation 40, head 30, read cursor 24, and the
/// lane of its one producer, which remembers 64 sends: 165.
const ROWS_BYTES: u64 = 292;

pub(crate) fn measure(
    engine: EngineKind,
    folder: &Path,
    conversations: u64,
    keep: u64,
    turnovers: u64,
) -> anyhow::Result<Measured> {
    let store = Store::open(folder, &load::options(engine, 1))?;
    let (mut writer, reader) = load::shards(&store)?.pop().context("a shard")?;
    let runtime = load::runtime()?;
    let mut load = runtime.block_on(Load::prepare(&mut writer, &reader, conversations))?;
    let live_records = conversations * keep;
    let live = (live_records * RECORD_BYTES as u64 + conversations * ROWS_BYTES) as f64;
    let mut figures = Measured::default();
    figures.set("live", live);
    let (cpu, begin) = (process_cpu(), Instant::now());
    let mut worst = 0.0f64;
    let mut ops = Vec::new();
    // The first turnover only fills.
    for turnover in 0..=turnovers {
        for part in 1..=MARKS_PER_TURNOVER {
            let until = live_records * turnover + live_records * part / MARKS_PER_TURNOVER;
            while load.written() < until {
                ops.clear();
                load.fill(&mut ops, BATCH)?;
                runtime.block_on(writer.commit(&ops))?;
            }
            let heads = load.heads().to_vec();
            for some in heads.chunks(MARKS_AT_ONCE) {
                ops.clear();
                for (conversation, head) in some {
                    let seq = Seq::new(*head).context("seq")?;
                    ops.push(Op::Read { conversation: *conversation, user: load.user(), seq });
                    let low = head.saturating_sub(keep);
                    if low > 0 {
                        let (low, count) = (Seq::new(low).context("seq")?, low);
                        ops.push(Op::Low { conversation: *conversation, low, count });
                    }
                }
                runtime.block_on(writer.commit(&ops))?;
            }
        }
        let ratio = disk_now(folder)? as f64 / live;
        figures.set(format!("turnover {turnover:02}"), ratio);
        if turnover > 0 {
            worst = worst.max(ratio);
        }
    }
    let took = begin.elapsed();
    figures.set("worst", worst);
    rest(&store, folder)?;
    let stats = load::stats(&store)?;
    figures.set("rest", disk_bytes(folder)? as f64 / live);
    figures.set("rest log", stats.log_bytes as f64 / live);
    figures.set("rest segments", stats.segment_bytes as f64 / live);
    figures.set("rest index", stats.index_bytes as f64 / live);
    figures.set("merges", stats.merges as f64);
    figures.set("waited", stats.settle_behind as f64);
    figures.set("written", load.written() as f64 * RECORD_BYTES as f64);
    figures.set("rate", load.written() as f64 / took.as_secs_f64());
    figures.set("cpu", (process_cpu() - cpu).as_secs_f64() * 1e6 / load.written() as f64);
    drop((writer, reader));
    store.close()?;
    drop(store);
    figures.set("closed", disk_bytes(folder)? as f64 / live);
    Ok(figures)
}
