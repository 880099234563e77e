//! Work whose instructions are counted: `cargo xtask instructions`.
//!
//! - A group on a clean network in virtual time. Everything follows from the seed, so a processor does the same each time.
//! - Run under callgrind, whose profile tells what runs inside of `turn_of_a_phone` from the rest: the gateway, its half of QUIC, the
//!   runtime and the simulated network. The kernel is not there.
//! - Who wants the cost of a delivery runs it twice, with more and with fewer messages, and divides the difference.
//!
//! Not here: counting, and bars (`xtask`).

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use fulmar_client::Conversation;
use fulmar_sim::net::{Delay, Impairment, Path};
use fulmar_sim::{Phone, Sim, World};
use tokio::sync::{Semaphore, mpsc};

/// A group in virtual time, for counting instructions
#[derive(Clone, Copy, Debug, Parser)]
struct Args {
    /// How messages come
    #[arg(long, value_enum)]
    work: Work,
    /// Members that read
    #[arg(long, value_name = "N", default_value_t = 40)]
    readers: u32,
    /// Messages
    #[arg(long, value_name = "N", default_value_t = 32)]
    messages: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Work {
    /// One at a time, 100 ms apart
    Lone,
    /// Sixteen at once
    Gathered,
}

/// Messages of [`Work::Gathered`] that are sent at once.
const TOGETHER: u32 = 16;

/// Bytes of a message.
const PAYLOAD_BYTES: usize = 128;

/// Time between two messages, or two dozen.
const APART: Duration = Duration::from_millis(100);

const SEED: u64 = 5;

fn main() -> ExitCode {
    let args = Args::parse();
    match run(args) {
        Ok(deliveries) => {
            let told = writeln!(std::io::stdout(), "{deliveries}");
            if told.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("instructions: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Gives how many deliveries there were.
fn run(args: Args) -> anyhow::Result<u64> {
    let way = Impairment { delay: Delay::fixed(Duration::from_millis(1)), ..Impairment::default() };
    World::new(SEED)
        .path(Path { up: way.clone(), down: way })
        .run(async move |sim| live(sim, args).await)
        .value
}

async fn live(sim: &Sim, args: Args) -> anyhow::Result<u64> {
    let deliveries = u64::from(args.readers) * u64::from(args.messages);
    // Everybody counts here what they read; the world ends when all have everything.
    let read = Arc::new(Semaphore::new(0));
    let names: Vec<String> = (0..args.readers).map(|n| format!("reader-{n}")).collect();
    for name in &names {
        let (here, known) = tokio::sync::oneshot::channel();
        let phone = sim.phone(name);
        phone.run(reads(phone.clone(), args.messages, here, Arc::clone(&read)));
        known.await.with_context(|| format!("{name} is not connected"))?;
    }
    let (say, said) = mpsc::channel(1);
    let (ready, created) = tokio::sync::oneshot::channel();
    let writer = sim.phone("writer");
    writer.run(writes(writer.clone(), names, said, ready));
    created.await.context("there is no group")?;
    let mut left = args.messages;
    while left > 0 {
        sim.sleep(APART).await;
        let now = if args.work == Work::Gathered { left.min(TOGETHER) } else { 1 };
        say.send(now).await.ok().context("the writer is gone")?;
        left -= now;
    }
    let all = u32::try_from(deliveries).context("fewer deliveries, please")?;
    let _all = read.acquire_many(all).await?;
    Ok(deliveries)
}

/// A reader's life.
async fn reads(phone: Phone, messages: u32, here: tokio::sync::oneshot::Sender<()>, read: Arc<Semaphore>) {
    let Ok(client) = phone.connect().await else { return };
    let mut inbox = client.messages();
    if !client.state().live().await {
        return;
    }
    let _ = here.send(());
    let mut left = messages;
    while left > 0 {
        let Some(message) = inbox.next().await else { return };
        if message.payload.len() == PAYLOAD_BYTES {
            left -= 1;
            read.add_permits(1);
        }
    }
    // The client stays until the world ends.
    std::future::pending::<()>().await;
}

/// The writer's life.
async fn writes(
    phone: Phone,
    members: Vec<String>,
    mut said: mpsc::Receiver<u32>,
    ready: tokio::sync::oneshot::Sender<()>,
) {
    let Ok(client) = phone.connect().await else { return };
    let members: Vec<&str> = members.iter().map(String::as_str).collect();
    let Ok(group) = client.create_group("all", &members).await else { return };
    let _ = ready.send(());
    while let Some(messages) = said.recv().await {
        for _ in 0..messages {
            if send(&group).await.is_err() {
                return;
            }
        }
    }
}

async fn send(group: &Conversation) -> Result<(), fulmar_client::Error> {
    group.send(vec![7; PAYLOAD_BYTES]).await.map(drop)
}
