//! What the SDK weighs in an app: the size of the smallest one, and its memory at work.
//!
//! - The app is the SDK's example `pocket`, built with the profile `small`; the gateway and who writes to the app are built for
//!   development, as every other command does.
//! - Memory is what Linux says of the process (`/proc`): resident in all, and pages of no file, which no system can take back without
//!   killing the app or swapping.
//!
//! Not here: bars; the targets name none.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use crate::run::{Workspace, ask, run};
use crate::tool;

/// Time for each build; everything of the app is optimised as a whole.
const BUILD_LIMIT: Duration = Duration::from_secs(60 * 60);

/// Time for whatever is waited for.
const WAIT_MAX: Duration = Duration::from_secs(120);

/// How long the app rests before its memory is looked at.
const REST: Duration = Duration::from_secs(5);

/// Messages the app is sent.
const MESSAGES: u64 = 1_000;

/// Lines of the app that wait; it is not held up by who measures it for longer than they take.
const LINES_WAITING_MAX: usize = 64;

/// What SQLite is built with by default and the SDK uses nothing of: full-text search, trees of rectangles, statistics of columns,
/// loading of extensions. An app that wants them leaves this out.
const SQLITE_WITHOUT: &str = "-USQLITE_ENABLE_FTS3 -USQLITE_ENABLE_FTS3_PARENTHESIS -USQLITE_ENABLE_FTS5 \
    -USQLITE_ENABLE_RTREE -USQLITE_ENABLE_STAT4 -USQLITE_ENABLE_DBSTAT_VTAB -USQLITE_ENABLE_LOAD_EXTENSION \
    -DSQLITE_OMIT_LOAD_EXTENSION";

/// A program that ends with this.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Memory of a process, in KiB.
struct Memory {
    resident: u64,
    own: u64,
}

/// Builds the app, runs it against a gateway on loopback, and says what it weighs.
///
/// # Errors
/// Something can't be built or started, or what is waited for does not come.
pub(crate) fn measure(workspace: &Workspace) -> anyhow::Result<String> {
    tool::ensure_compilers(workspace)?;
    let app = build(workspace)?;
    let place = workspace.target().join("footprint");
    if place.exists() {
        fs::remove_dir_all(&place).context("what the last run left can't be removed")?;
    }
    fs::create_dir_all(&place)?;
    let debug = workspace.target().join("debug");
    let gateway = debug.join("fulmar");
    let data = place.join("data");
    let address = UdpSocket::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?.local_addr()?.to_string();
    let log = File::create(place.join("gateway.log"))?;
    let mut serve = workspace.command(&gateway);
    serve.args(["serve", "--http", "off", "--log", "warn", "--listen", &address, "--data"]).arg(&data);
    let serve = serve.stdout(log.try_clone()?).stderr(log).spawn().context("the gateway can't be started")?;
    let _serve = Running(serve);
    let certificate = data.join("tls/cert.pem");
    until("the gateway", || certificate.exists() && data.join("keys/dev.pem").exists())?;

    let token = |user: &str| {
        let mut command = workspace.command(&gateway);
        let told = ask(command.args(["token", "--user", user, "--data"]).arg(&data));
        told.map(|token| token.trim().to_owned()).with_context(|| format!("no token for {user}"))
    };
    let mut pocket = workspace.command(&app);
    pocket.arg(&address).arg(&certificate).arg(token("pocket")?).arg(place.join("pocket.db"));
    let mut pocket = Running(pocket.stdout(Stdio::piped()).spawn().context("the app can't be started")?);
    let lines = lines_of(&mut pocket.0)?;
    hear(&lines, "live")?;
    let connected = memory(&pocket.0)?;
    rest(REST);
    let idle = memory(&pocket.0)?;
    let mut firehose = workspace.command(debug.join("examples/firehose"));
    firehose.arg(&address).arg(&certificate).arg(token("firehose")?).args(["pocket", &MESSAGES.to_string()]);
    ensure!(run(&mut firehose, WAIT_MAX, |_| ())?, "messages could not be sent");
    hear(&lines, &MESSAGES.to_string())?;
    let received = memory(&pocket.0)?;
    rest(REST);
    let later = memory(&pocket.0)?;

    let size = fs::metadata(&app)?.len();
    let mut text = format!("app, stripped                    {:>8.2} MiB\n", size as f64 / 1_048_576.0);
    text += "memory                           resident      of no file\n";
    for (when, memory) in [
        ("connected".to_owned(), connected),
        (format!("idle for {} s", REST.as_secs()), idle),
        (format!("{MESSAGES} messages received"), received),
        (format!("idle for {} s after them", REST.as_secs()), later),
    ] {
        text += &format!("{when:<32}{:>6.1} MiB{:>11.1} MiB\n", mib(memory.resident), mib(memory.own));
    }
    Ok(text)
}

/// No runtime runs here whose worker this could hold up.
fn rest(time: Duration) {
    let began = Instant::now();
    while let Some(left) = time.checked_sub(began.elapsed()).filter(|left| !left.is_zero()) {
        thread::park_timeout(left);
    }
}

fn mib(kib: u64) -> f64 {
    kib as f64 / 1_024.0
}

/// The app's file.
fn build(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    let mut small =
        workspace.cargo(["build", "--package", "fulmar-client", "--example", "pocket", "--profile", "small"]);
    small.env("LIBSQLITE3_FLAGS", SQLITE_WITHOUT);
    ensure!(run(&mut small, BUILD_LIMIT, |_| ())?, "the app can't be built");
    let mut gateway = workspace.cargo(["build", "--package", "fulmar-gateway"]);
    ensure!(run(&mut gateway, BUILD_LIMIT, |_| ())?, "the gateway can't be built");
    let mut firehose = workspace.cargo(["build", "--package", "fulmar-client", "--example", "firehose"]);
    ensure!(run(&mut firehose, BUILD_LIMIT, |_| ())?, "the sender can't be built");
    Ok(workspace.target().join("small/examples/pocket"))
}

fn lines_of(child: &mut Child) -> anyhow::Result<Receiver<String>> {
    let output = child.stdout.take().context("an app without output")?;
    let (sender, lines) = sync_channel(LINES_WAITING_MAX);
    thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    Ok(lines)
}

/// Waits until the app says `word`.
fn hear(lines: &Receiver<String>, word: &str) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        let left = WAIT_MAX.saturating_sub(began.elapsed());
        let line = lines.recv_timeout(left).with_context(|| format!("the app never said {word:?}"))?;
        if line == word {
            return Ok(());
        }
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) -> anyhow::Result<()> {
    let began = Instant::now();
    while !done() {
        ensure!(began.elapsed() < WAIT_MAX, "{what} does not start");
        rest(Duration::from_millis(20));
    }
    Ok(())
}

fn memory(child: &Child) -> anyhow::Result<Memory> {
    let file = Path::new("/proc").join(child.id().to_string()).join("smaps_rollup");
    let text = fs::read_to_string(&file).context("this system does not tell the memory of a process")?;
    let of = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse().ok());
        kib.with_context(|| format!("{} does not tell {name}", file.display()))
    };
    Ok(Memory { resident: of("Rss")?, own: of("Anonymous")? })
}
