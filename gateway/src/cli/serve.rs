//! `fulmar serve`: reads the settings, prepares the process, runs the gateway, and sees that it leaves.
//!
//! - The first SIGTERM or Ctrl-C starts the drain; the second, or the drain's deadline, ends the process at once.
//! - Ending at once loses nothing that was acknowledged: that is on disk.
//!
//! Not here: the gateway ([`crate::gateway`]).

use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;

use super::ConfigArgs;
use crate::config::{self, Assignment, Config, LogFormat};
use crate::drain::{self, Drain};
use crate::gateway::Gateway;
use crate::telemetry;

/// Threads for what is done beside connections: pages, retention, signals.
const BESIDE_CORES: usize = 2;

/// Exit code when the gateway was ended before it had finished leaving.
const CUT_OFF: u8 = 3;

const EXAMPLES: &str = "\
Examples:
  fulmar serve                                       all defaults
  fulmar serve -d /srv/fulmar -l [::]:443            elsewhere
  fulmar serve -c /etc/fulmar.toml                   as configured
  fulmar serve --log info,fulmar_gateway=debug       more to read
  fulmar serve --print-config > fulmar.toml          every setting, documented

At first start the data folder is made, with a self-signed certificate, keys,
and an app \"demo\" whose users come from `fulmar token`. SIGTERM or Ctrl-C lets
everybody leave in order (drain.deadline_s); the second one ends at once.
SIGHUP reads the certificate again.";

/// Flags of `fulmar serve`.
#[derive(Debug, Default, Args)]
#[command(after_help = EXAMPLES)]
pub struct ServeArgs {
    /// Address for QUIC (UDP) and TLS (TCP), instead of listen.address [default: 0.0.0.0:4433] [env: FULMAR_LISTEN_ADDRESS]
    #[arg(short, long, value_name = "ADDRESS", help_heading = "Listening")]
    pub listen: Option<String>,
    /// Cores that serve connections: auto, 1 to 64, or shared, instead of listen.cores [default: auto] [env: FULMAR_LISTEN_CORES]
    #[arg(long, value_name = "CORES", help_heading = "Listening")]
    pub cores: Option<String>,
    /// TCP address of /metrics, /healthz and /readyz, or "off" [default: 127.0.0.1:4480] [env: FULMAR_LISTEN_HTTP_ADDRESS]
    #[arg(long, value_name = "ADDRESS", help_heading = "Listening")]
    pub http: Option<String>,
    /// What to log, instead of log.filter [default: info] [env: FULMAR_LOG_FILTER]
    #[arg(long, value_name = "FILTER", help_heading = "Logging")]
    pub log: Option<String>,
    /// How lines look: text or json [default: text] [env: FULMAR_LOG_FORMAT]
    #[arg(long, value_name = "FORMAT", help_heading = "Logging")]
    pub log_format: Option<String>,
    /// Print every setting with its meaning, unit and default, and exit
    #[arg(long, help_heading = "Configuration")]
    pub print_config: bool,
    /// Read the configuration, say whether it is good, and exit
    #[arg(long, conflicts_with = "print_config", help_heading = "Configuration")]
    pub check_config: bool,
    /// Where the configuration is.
    #[command(flatten)]
    pub config: ConfigArgs,
}

impl ServeArgs {
    /// The configuration with these flags on top.
    ///
    /// # Errors
    /// One line that says which value will not do.
    pub fn load(&self) -> Result<Config, config::ConfigError> {
        let flags = [
            ("--listen", "listen", "address", &self.listen),
            ("--cores", "listen", "cores", &self.cores),
            ("--http", "listen", "http_address", &self.http),
            ("--log", "log", "filter", &self.log),
            ("--log-format", "log", "format", &self.log_format),
        ];
        let set = |(flag, section, key, value): (&str, &str, &str, &Option<String>)| {
            value.as_ref().map(|value| Assignment::flag(flag, section, key, value))
        };
        self.config.load(flags.into_iter().filter_map(set).collect())
    }
}

/// How the gateway ended.
enum End {
    ByItself(anyhow::Result<()>),
    SecondSignal,
    Deadline,
}

/// Runs the gateway until it is told to leave.
///
/// # Errors
/// One line: the configuration, the data folder, an address, or a failure while it ran.
pub fn run(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    if args.print_config {
        super::answer(&config::documented())?;
        return Ok(ExitCode::SUCCESS);
    }
    let config = args.load()?;
    if args.check_config {
        super::answer("the configuration is good")?;
        return Ok(ExitCode::SUCCESS);
    }
    telemetry::start(&config.log)?;
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if config.listen.cores.count().is_some() {
        // Connections have threads of their own.
        runtime.worker_threads(BESIDE_CORES);
    }
    let runtime =
        runtime.enable_all().thread_name("fulmar").build().context("the runtime can't be started")?;
    let end = runtime.block_on(until_the_end(config));
    // Tasks that are left have had their time.
    runtime.shutdown_background();
    let cut = |why: &str| {
        eprintln!(
            "fulmar: ended {why}; what was acknowledged is on disk, the rest is sent again by its devices"
        );
        Ok(ExitCode::from(CUT_OFF))
    };
    match end? {
        End::ByItself(Ok(())) => Ok(ExitCode::SUCCESS),
        End::ByItself(Err(e)) => Err(e),
        End::SecondSignal => cut("at once, at the second signal"),
        End::Deadline => cut("at the drain's deadline"),
    }
}

async fn until_the_end(config: Config) -> anyhow::Result<End> {
    // Connections get most of the time, closing the log the rest: together they keep the deadline.
    let whole = config.drain.deadline();
    let for_closing = whole / 6;
    let (trigger, drain) = drain::drain(whole.saturating_sub(for_closing));
    let mut ending = drain.clone();
    let deadline = async move {
        let draining = ending.started().await;
        tokio::time::sleep_until(draining.deadline + for_closing).await;
    };
    let end = tokio::select! {
        // On the heap: the gateway's future is large.
        result = Box::pin(serve(config, drain)) => End::ByItself(result),
        signal = drain::watch_signals(trigger) => {
            signal.context("signals can't be waited for")?;
            End::SecondSignal
        }
        () = deadline => End::Deadline,
    };
    Ok(end)
}

async fn serve(config: Config, drain: Drain) -> anyhow::Result<()> {
    let format = config.log.format;
    let app = config.apps.iter().find(|app| app.dev_key).map(|app| app.name.clone());
    let data = config.data.path.clone();
    let gateway = Gateway::start(config).await?;
    let reach = Reach {
        address: gateway.address(),
        http: gateway.http_address(),
        data: &data,
        certificate: gateway.certificate().path(),
        fingerprint: gateway.certificate().fingerprint(),
        app: app.as_deref(),
        first_start: gateway.first_start(),
    };
    let http = reach.http.map(tracing::field::display);
    tracing::info!(address = %reach.address, http, fingerprint = %reach.fingerprint, "listening");
    if format == LogFormat::Text {
        eprintln!("{reach}");
    }
    gateway.run(drain).await
}

/// How to reach a gateway that listens.
struct Reach<'a> {
    address: SocketAddr,
    http: Option<SocketAddr>,
    data: &'a Path,
    certificate: &'a Path,
    fingerprint: String,
    /// An app that takes the tokens of `fulmar token`.
    app: Option<&'a str>,
    first_start: bool,
}

impl fmt::Display for Reach<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f)?;
        if self.first_start {
            writeln!(f, "  First start: {} has a fresh certificate and keys.", self.data.display())?;
        }
        writeln!(f, "  Clients      {} (QUIC, UDP)", self.address)?;
        writeln!(f, "  Certificate  {}", self.certificate.display())?;
        writeln!(f, "               SHA-256 {}", self.fingerprint)?;
        if let Some(http) = self.http {
            writeln!(f, "  Pages        http://{http}/ (metrics, healthz, readyz)")?;
        }
        if let Some(app) = self.app {
            let mut flags = String::new();
            if self.data != Path::new(config::DATA_FOLDER) {
                flags.push_str(&format!(" --data {}", self.data.display()));
            }
            if app != config::DEMO_APP {
                flags.push_str(&format!(" --app {app}"));
            }
            writeln!(f, "  A token      fulmar token{flags} --user alice")?;
        }
        writeln!(f, "  Stop         Ctrl-C, or SIGTERM to process {}", std::process::id())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_how_to_connect() {
        let reach = Reach {
            address: SocketAddr::from(([127, 0, 0, 1], 4433)),
            http: Some(SocketAddr::from(([127, 0, 0, 1], 4480))),
            data: Path::new("/srv/f"),
            certificate: Path::new("/srv/f/tls/cert.pem"),
            fingerprint: "00ff".to_owned(),
            app: Some("acme"),
            first_start: true,
        };
        let want = format!(
            "\n  First start: /srv/f has a fresh certificate and keys.\n  Clients      127.0.0.1:4433 (QUIC, UDP)\n  \
             Certificate  /srv/f/tls/cert.pem\n               SHA-256 00ff\n  Pages        http://127.0.0.1:4480/ \
             (metrics, healthz, readyz)\n  A token      fulmar token --data /srv/f --app acme --user alice\n  Stop         \
             Ctrl-C, or SIGTERM to process {}\n",
            std::process::id()
        );
        assert_eq!(reach.to_string(), want);
        let plain = Reach {
            http: None,
            data: Path::new(config::DATA_FOLDER),
            app: Some(config::DEMO_APP),
            first_start: false,
            ..reach
        }
        .to_string();
        assert!(plain.contains("fulmar token --user alice") && !plain.contains("Pages"), "{plain}");
    }

    #[test]
    fn flags_stand_for_settings() {
        let folder = tempfile::tempdir().unwrap();
        let args = ServeArgs {
            listen: Some("127.0.0.1:0".to_owned()),
            http: Some("off".to_owned()),
            log: Some("warn".to_owned()),
            log_format: Some("json".to_owned()),
            config: ConfigArgs { data: Some(folder.path().to_owned()), ..ConfigArgs::default() },
            ..ServeArgs::default()
        };
        let config = args.load().unwrap();
        assert_eq!(config.listen.address.to_string(), "127.0.0.1:0");
        assert_eq!(config.listen.http_address, None);
        assert_eq!(config.log.filter, "warn");
        assert_eq!(config.log.format, LogFormat::Json);
        let bad = ServeArgs { log_format: Some("xml".to_owned()), ..args };
        assert_eq!(
            bad.load().unwrap_err().to_string(),
            "flag --log-format: log.format = \"xml\": expected \"text\" or \"json\""
        );
    }
}
