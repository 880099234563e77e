//! One cell of the table: a lab, a peer, a network, and what came of it. Runs inside the clients' namespace and
//! answers with one line of JSON.

use std::{
    io::{Read as _, Write as _},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use fulmar_client::{Client, TransportKind};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use crate::{
    fulmar,
    lab::{self, Lab},
    link::{Counts, Weather},
    measure::{self, Curve, Figures, Log, Zero},
    mqtt,
    plan::{self, Condition, Peer},
};

/// Between everybody being connected and the first message.
const BREATH: Duration = Duration::from_millis(500);

/// How long clients may take to be connected by what is to be measured.
const SETTLE_MAX: Duration = Duration::from_secs(60);

/// How often it is looked whether everything has come.
const LOOK: Duration = Duration::from_millis(50);

/// How often it is tried to remove the server's folder.
const REMOVALS_MAX: u32 = 10;

/// What is to be measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Spec {
    /// Who.
    pub(crate) peer: Peer,
    /// On which network, by name.
    pub(crate) condition: String,
    /// Senders; as many receivers.
    pub(crate) pairs: u32,
    /// Seconds that do not count.
    pub(crate) warm_up_s: u64,
    /// Seconds that count.
    pub(crate) seconds: u64,
    /// Seconds to wait for the last messages.
    pub(crate) drain_s: u64,
    /// Of schedule and wire.
    pub(crate) seed: u64,
    /// Round trip, ms.
    pub(crate) rtt_ms: u64,
    /// TCP's congestion control, unless the machine's own.
    pub(crate) congestion: Option<String>,
    /// Log filter of clients and gateway, if they shall tell.
    pub(crate) trace: Option<String>,
    /// Keep every message, not the slowest only.
    pub(crate) samples: bool,
    /// Where servers put their files; removed by whoever made it.
    pub(crate) folder: PathBuf,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// The pairs' figures.
    pub(crate) figures: Figures,
    /// What the wire did while it was bad, up and down.
    pub(crate) wire: [Counts; 2],
    /// How late the wire handed packets over.
    pub(crate) wire_late: Curve,
    /// The machine's load before and after, over a minute.
    pub(crate) load: [f64; 2],
    /// TCP's congestion control as it really was.
    pub(crate) congestion: String,
    /// Connections that were made anew after the wire turned bad; `None`: the peer's client does not reconnect.
    pub(crate) reconnects: Option<u64>,
    /// SDK clients by how they were connected at the end; `None`: the peer has none.
    pub(crate) transports: Option<Transports>,
    /// Messages of the warm-up and those that count.
    pub(crate) messages: u64,
}

/// How many clients were connected by what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Transports {
    pub(crate) quic: u32,
    pub(crate) tls: u32,
    pub(crate) websocket: u32,
    /// Not connected just then.
    pub(crate) none: u32,
}

impl Transports {
    fn of(clients: &[Client]) -> Self {
        let mut counted = Self::default();
        for client in clients {
            let count = match client.transport() {
                Some(TransportKind::Quic) => &mut counted.quic,
                Some(TransportKind::Tls) => &mut counted.tls,
                Some(TransportKind::WebSocket) => &mut counted.websocket,
                _ => &mut counted.none,
            };
            *count += 1;
        }
        counted
    }
}

/// Measures and prints the outcome.
///
/// # Errors
/// The lab could not be set up, or a client failed.
pub(crate) fn run(argument: &str) -> anyhow::Result<()> {
    let spec: Spec = serde_json::from_str(argument)?;
    // Whoever started this holds the other end; when it is gone, nobody waits for the figures or tidies up.
    let folder = spec.folder.clone();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        // The server still runs and may make a file meanwhile.
        let _ = (0..REMOVALS_MAX).find(|_| std::fs::remove_dir_all(&folder).is_ok());
        std::process::exit(1);
    });
    if let Some(filter) = &spec.trace {
        let filter = tracing_subscriber::EnvFilter::try_new(filter)?;
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    }
    let condition = Condition::named(&spec.condition).context("no such network")?;
    let weather = Weather {
        rtt: Duration::from_millis(spec.rtt_ms),
        condition,
        seed: spec.seed,
        udp: spec.peer.has_udp(),
    };
    let log = spec.trace.as_deref().unwrap_or("warn");
    let lab = Lab::start(spec.peer, &spec.folder, weather, spec.congestion.as_deref(), log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let outcome = runtime.block_on(measure(&spec, &lab));
    runtime.shutdown_background();
    drop(lab);
    let mut line = serde_json::to_string(&outcome?)?;
    line.push('\n');
    Ok(std::io::stdout().write_all(line.as_bytes())?)
}

async fn measure(spec: &Spec, lab: &Lab) -> anyhow::Result<Outcome> {
    let address = lab::address(spec.peer);
    let mut sdk_clients = Vec::new();
    let mut playing = JoinSet::new();
    let (warm_up, counted) = (Duration::from_secs(spec.warm_up_s), Duration::from_secs(spec.seconds));
    let load_before = load();

    // Everybody is connected before the wire turns bad: the same start for all peers.
    let players = match spec.peer {
        Peer::FulmarQuic | Peer::FulmarTls => {
            Players::Fulmar(fulmar::connect_all(&address.to_string(), &spec.folder, spec.pairs).await?)
        }
        Peer::MosquittoTls => {
            let certificate = lab::broker_certificate(&spec.folder);
            Players::Mqtt(mqtt::connect_all(address, &certificate, spec.pairs).await?)
        }
    };
    if let Players::Fulmar(pairs) = &players {
        sdk_clients.extend(pairs.iter().flat_map(fulmar::Pair::clients));
        settle(&sdk_clients, spec.peer).await?;
    }
    let connections_before = connections(&sdk_clients);
    let zero = Zero::ahead(BREATH);
    lab.wire.turn_bad(zero.instant());
    let before = lab.wire.counts();
    let plans: Vec<_> = (0..spec.pairs)
        .map(|pair| {
            let plan = plan::schedule(spec.seed, pair, warm_up, counted);
            (Arc::new(Log::new(pair, zero, &plan)), plan)
        })
        .collect();
    let messages = plans.iter().map(|(_, plan)| u64::try_from(plan.len()).unwrap_or_default()).sum();
    let logs: Vec<_> = plans.iter().map(|(log, _)| Arc::clone(log)).collect();
    match players {
        Players::Fulmar(pairs) => {
            for (pair, (log, plan)) in pairs.into_iter().zip(plans) {
                playing.spawn(pair.play(plan, log));
            }
        }
        Players::Mqtt(pairs) => {
            for (pair, (log, plan)) in pairs.into_iter().zip(plans) {
                playing.spawn(pair.play(plan, log));
            }
        }
    }

    let last = warm_up + counted;
    let at_the_latest = last + Duration::from_secs(spec.drain_s);
    loop {
        tokio::time::sleep(LOOK).await;
        let elapsed = zero.elapsed();
        if elapsed >= at_the_latest || (elapsed > last && logs.iter().all(|log| log.is_over())) {
            break;
        }
    }
    let wire = lab.wire.counts();
    playing.shutdown().await;
    let kept = if spec.samples { usize::MAX } else { measure::SLOWEST };
    let figures = measure::figures(logs.iter().map(|log| &**log), zero.elapsed(), kept)?;
    let ([up, down], [up_before, down_before]) = (wire, before);
    Ok(Outcome {
        figures,
        wire: [up.since(up_before), down.since(down_before)],
        wire_late: Curve::of(&lab.wire.late()),
        load: [load_before, load()],
        congestion: lab.congestion.clone(),
        reconnects: spec.peer.is_fulmar().then(|| connections(&sdk_clients) - connections_before),
        transports: spec.peer.is_fulmar().then(|| Transports::of(&sdk_clients)),
        messages,
    })
}

fn connections(clients: &[Client]) -> u64 {
    clients.iter().map(|client| client.traffic().connections).sum()
}

/// Waits until all clients are connected by what is to be measured: where a handshake was slow, another way won the race
/// and is left again by the SDK itself.
async fn settle(clients: &[Client], peer: Peer) -> anyhow::Result<()> {
    let begin = tokio::time::Instant::now();
    loop {
        let by = Transports::of(clients);
        let elsewhere = if peer.has_udp() { by.tls + by.websocket } else { by.quic };
        if elsewhere + by.none == 0 {
            return Ok(());
        }
        anyhow::ensure!(
            begin.elapsed() < SETTLE_MAX,
            "clients are not connected by what is to be measured: {by:?}"
        );
        tokio::time::sleep(LOOK).await;
    }
}

/// Everybody who talks.
#[derive(Debug)]
enum Players {
    Fulmar(Vec<fulmar::Pair>),
    Mqtt(Vec<mqtt::Pair>),
}

/// Processes that want the processor, over the last minute.
fn load() -> f64 {
    std::fs::read_to_string("/proc/loadavg")
        .ok()
        .and_then(|text| text.split_whitespace().next()?.parse().ok())
        .unwrap_or(f64::NAN)
}
