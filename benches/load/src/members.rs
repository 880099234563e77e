//! What a join and a page of members cost at different sizes of a group: one phone, one call at a time.
//!
//! Not here: messages (`crowd`).

use std::{fmt::Write as _, io::Write as _, path::Path, time::Instant};

use anyhow::Context as _;
use fulmar_benches::{
    bare,
    phone::{Phone, Tokens},
    times::{Times, spoken},
};
use fulmar_protocol::id::UserId;

use crate::{plan::absent_user, server::Server};

/// How often each is done.
const TIMES: u32 = 200;

/// What one kind of call came to.
struct Cost {
    times: Times,
    /// CPU of the gateway for each, µs.
    cpu: f64,
}

/// Measures groups of these sizes, each with a gateway of its own.
///
/// # Errors
/// The gateway did not come up, or refused something.
pub(crate) fn measure(gateway: Option<&Path>, config: Option<&Path>, sizes: &[u32]) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut text = format!(
        "\n  {:<10}{:>12}{:>14}{:>12}{:>12}{:>14}{:>14}{:>12}{:>12}{:>14}\n",
        "members",
        "made in",
        "µs a member",
        "join p50",
        "p99",
        "CPU µs",
        "page p50",
        "p99",
        "CPU µs",
        "of the middle"
    );
    for size in sizes {
        let scratch = tempfile::tempdir()?;
        let server = Server::start(gateway, scratch.path(), config)?;
        let row = runtime.block_on(of_size(&server, scratch.path(), *size))?;
        text += &row;
        eprintln!("members: {size} done");
    }
    std::io::stdout().lock().write_all(text.as_bytes())?;
    Ok(())
}

async fn of_size(server: &Server, folder: &Path, size: u32) -> anyhow::Result<String> {
    let endpoint = bare::client_endpoint(folder)?;
    let token = Tokens::of(folder)?.mint("owner")?;
    let mut phone = Phone::connect(&endpoint, server.address(), token, 1).await?;
    let (before, began) = (server.read()?, Instant::now());
    let names: Vec<String> = (0..size.saturating_sub(1)).map(absent_user).collect();
    let group = phone.create_group("members", &names).await?;
    let making = began.elapsed();
    let made = server.read()?.cpu.saturating_sub(before.cpu);
    let mut joined = 0;
    let join = cost(server, &mut phone, async |phone: &mut Phone| {
        joined += 1;
        phone.add_members(group, &[format!("joining-{joined}")]).await
    });
    let join = join.await?;
    // Where the middle is: numbers are in no order that is known here.
    let (mut after, mut seen) = (UserId::default(), 0);
    while seen < size as usize / 2 {
        let page = phone.members(group, after).await?;
        after = page.members.last().context("a page is empty")?.user;
        seen += page.members.len();
    }
    let first = cost(server, &mut phone, async |phone: &mut Phone| {
        phone.members(group, UserId::default()).await.map(drop)
    });
    let first = first.await?;
    let middle =
        cost(server, &mut phone, async |phone: &mut Phone| phone.members(group, after).await.map(drop));
    let middle = middle.await?;
    let mut row = String::new();
    let _ = writeln!(
        row,
        "  {size:<10}{:>12}{:>14.1}{:>12}{:>12}{:>14.0}{:>14}{:>12}{:>12.0}{:>14.0}",
        spoken(making),
        made.as_secs_f64() * 1e6 / f64::from(size),
        spoken(join.times.quantile(0.5)),
        spoken(join.times.quantile(0.99)),
        join.cpu,
        spoken(first.times.quantile(0.5)),
        spoken(first.times.quantile(0.99)),
        first.cpu,
        middle.cpu,
    );
    Ok(row)
}

/// Does something [`TIMES`] times.
async fn cost(
    server: &Server,
    phone: &mut Phone,
    mut call: impl AsyncFnMut(&mut Phone) -> anyhow::Result<()>,
) -> anyhow::Result<Cost> {
    let before = server.read()?;
    let mut times = Times::default();
    for _ in 0..TIMES {
        let began = Instant::now();
        call(phone).await?;
        times.add(began.elapsed());
    }
    let used = server.read()?.cpu.saturating_sub(before.cpu);
    Ok(Cost { times, cpu: used.as_secs_f64() * 1e6 / f64::from(TIMES) })
}
