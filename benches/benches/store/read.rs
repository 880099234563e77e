//! Heads and newest pages of 1 000 conversations.
//!
//! - Cold: the first time after the store was opened, with none of its files in the page cache; the time a caller waits.
//! - Warm: once more; CPU of the reading thread.

use std::{path::Path, time::Instant};

use anyhow::Context as _;
use fulmar_benches::meter::{Samples, resident_of, thread_cpu};
use fulmar_protocol::id::{ConversationId, Seq};
use fulmar_store::{EngineKind, Limits, ShardReader, Store};

use crate::{
    cell::Measured,
    life::forget,
    load::{self, Load},
    write::rest,
};

const CONVERSATIONS: u64 = 1_000;
const RECORDS_EACH: u64 = 200;
const PAGE: u64 = 50;
const WARM_ROUNDS: u32 = 20;

pub(crate) fn measure(engine: EngineKind, folder: &Path) -> anyhow::Result<Measured> {
    let options = load::options(engine, 1);
    let heads = {
        let store = Store::open(folder, &options)?;
        let (mut writer, reader) = load::shards(&store)?.pop().context("a shard")?;
        let runtime = load::runtime()?;
        let mut load = runtime.block_on(Load::prepare(&mut writer, &reader, CONVERSATIONS))?;
        let mut ops = Vec::new();
        while load.written() < CONVERSATIONS * RECORDS_EACH {
            ops.clear();
            load.fill(&mut ops, 64)?;
            runtime.block_on(writer.commit(&ops))?;
        }
        rest(&store, folder)?;
        drop((writer, reader));
        store.close()?;
        load.heads().to_vec()
    };
    let store = Store::open(folder, &options)?;
    let (_, reader) = load::shards(&store)?.pop().context("a shard")?;
    let mut figures = Measured::default();
    for (name, read) in [("head", head as fn(&_, _) -> _), ("page", page)] {
        forget(folder)?;
        let mut cold = Samples::default();
        for (conversation, last) in &heads {
            let at = Instant::now();
            let found = read(&reader, *conversation)?;
            cold.add_us(at.elapsed());
            anyhow::ensure!(found == *last, "{name} of {conversation}: {found} instead of {last}");
        }
        figures.set(format!("{name} cold"), cold.median());
        figures.set(format!("{name} cold p99"), cold.quantile(0.99));
        let at = thread_cpu();
        for _ in 0..WARM_ROUNDS {
            for (conversation, _) in &heads {
                read(&reader, *conversation)?;
            }
        }
        let reads = f64::from(WARM_ROUNDS) * CONVERSATIONS as f64;
        figures.set(format!("{name} warm"), (thread_cpu() - at).as_secs_f64() * 1e6 / reads);
    }
    figures.set("rss", resident_of(std::process::id())? as f64);
    drop(reader);
    store.close()?;
    Ok(figures)
}

/// The seq where a conversation ends.
fn head(reader: &ShardReader, conversation: ConversationId) -> anyhow::Result<u64> {
    Ok(reader.head(conversation)?.context("no head")?.seq.get())
}

/// The last seq of a conversation's newest page, which is full.
fn page(reader: &ShardReader, conversation: ConversationId) -> anyhow::Result<u64> {
    let limits = Limits { records: usize::try_from(PAGE)?, bytes: usize::MAX };
    let before = Seq::new(RECORDS_EACH + 1).context("seq")?;
    let page = reader.records_before(conversation, before, limits)?;
    anyhow::ensure!(page.len() as u64 == PAGE, "a page of {}", page.len());
    Ok(page.last().context("no record")?.seq.get())
}
