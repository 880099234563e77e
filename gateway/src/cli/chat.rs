//! `fulmar chat`: a chat on a terminal, over the SDK like any app.
//!
//! - On the machine of a gateway that runs with its own certificate and development key, a name is all it needs;
//!   elsewhere it takes an address, a token and a certificate.
//! - Its database stays: history, what was not sent yet, and where it was.
//! - Where input or output is no terminal, it works line by line.

mod command;
mod core;
mod lines;
mod model;
mod screen;

use std::io::{self, IsTerminal as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use clap::Args;
use fulmar_client::{Client, ConversationClass, DeviceClass, Error, Options, Trust};
use fulmar_protocol::id::UnixMillis;

use self::core::Core;
use super::ConfigArgs;
use crate::config::{Config, DEMO_APP};
use crate::data_folder::open_dev_key;
use crate::identity::token::{Mint, mint};

const EXAMPLES: &str = "\
Examples:
  fulmar serve                       in one terminal; then
  fulmar chat alice --with bob       in a second one
  fulmar chat bob --with alice       and in a third one

  fulmar chat carol --server chat.example.org:4433 --token \"$TOKEN\" --certificate ca.pem
  echo \"deployed\" | fulmar chat robot --group ops      line by line, for scripts

Inside: /help lists the commands. Marks of your messages: … queued, › sent, ✓ stored, ✓✓ delivered, and green
when read.";

/// How long the token is good for that the chat makes for itself, in seconds.
const TOKEN_TTL_S: u64 = 24 * 60 * 60;

/// Flags of `fulmar chat`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ChatArgs {
    /// Who you are
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Talk with this user
    #[arg(short, long, value_name = "USER", conflicts_with_all = ["group", "broadcast"])]
    pub with: Option<String>,
    /// Talk in this group
    #[arg(short, long, value_name = "GROUP", conflicts_with = "broadcast")]
    pub group: Option<String>,
    /// Open this broadcast; who may send there is in the gateway's configuration
    #[arg(short, long, value_name = "NAME")]
    pub broadcast: Option<String>,
    /// Line by line, also on a terminal
    #[arg(long)]
    pub plain: bool,
    /// The gateway [default: the one of the data folder, on this machine]
    #[arg(short, long, value_name = "HOST:PORT", help_heading = "Gateway")]
    pub server: Option<String>,
    /// The name in its certificate [default: the host; localhost for the data folder's]
    #[arg(long, value_name = "HOST", help_heading = "Gateway")]
    pub server_name: Option<String>,
    /// A token for NAME [default: one is made with the data folder's development key]
    #[arg(
        long,
        value_name = "TOKEN",
        env = "FULMAR_CHAT_TOKEN",
        hide_env_values = true,
        help_heading = "Gateway"
    )]
    pub token: Option<String>,
    /// File with the certificate to trust [default: the data folder's]
    #[arg(long, value_name = "FILE", help_heading = "Gateway")]
    pub certificate: Option<PathBuf>,
    /// The app
    #[arg(short, long, value_name = "APP", default_value = DEMO_APP, help_heading = "Gateway")]
    pub app: String,
    /// File of messages and what is not sent yet [default: NAME's in the data folder, or in ~/.local/share/fulmar]
    #[arg(long, value_name = "FILE", help_heading = "Gateway")]
    pub database: Option<PathBuf>,
    /// Where the configuration is.
    #[command(flatten)]
    pub config: ConfigArgs,
}

/// Runs the chat until the user leaves.
///
/// # Errors
/// One line: what is missing to connect, the database is in use, or the terminal can't be used.
pub fn run(args: &ChatArgs) -> anyhow::Result<ExitCode> {
    let options = options(args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .thread_name("fulmar-chat")
        .build()
        .context("the runtime can't be started")?;
    let ended = runtime.block_on(Box::pin(chat(args, options)));
    // The thread that reads keys or lines may be waiting for one.
    runtime.shutdown_background();
    ended
}

async fn chat(args: &ChatArgs, options: Options) -> anyhow::Result<ExitCode> {
    let client = match Client::connect(options).await {
        Ok(client) => client,
        Err(Error::DatabaseInUse) => {
            bail!("{} is chatting already: leave that chat, or give this one its own --database", args.name)
        }
        Err(error) => return Err(error.into()),
    };
    let mut core = Core::new(client, &args.name);
    for (name, class) in [
        (&args.with, ConversationClass::Direct),
        (&args.group, ConversationClass::Group),
        (&args.broadcast, ConversationClass::Broadcast),
    ] {
        if let Some(name) = name {
            core.open(name, class).await?;
        }
    }
    let terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
    match terminal && !args.plain {
        true => screen::run(core).await,
        false => lines::run(core).await,
    }
}

/// Everything the client needs, from the flags or from the data folder.
fn options(args: &ChatArgs) -> anyhow::Result<Options> {
    let local = Local::find(args)?;
    let (server, host) = match (&args.server, &local) {
        (Some(server), _) => {
            let (host, port) = server.rsplit_once(':').unwrap_or((server, ""));
            if host.is_empty() || port.parse::<u16>().is_err() {
                bail!("--server {server:?}: expected a host and port, such as chat.example.org:4433");
            }
            (server.clone(), host.trim_matches(['[', ']']).to_owned())
        }
        (None, Some(local)) => (local.address.to_string(), "localhost".to_owned()),
        (None, None) => bail!("which gateway? Give its address with --server"),
    };
    let certificate = match (&args.certificate, &local) {
        (Some(certificate), _) => certificate.clone(),
        (None, Some(local)) => local.certificate.clone(),
        (None, None) => bail!("the gateway's certificate is missing: give it with --certificate"),
    };
    let token = match (&args.token, &local) {
        (Some(token), _) => token.clone(),
        (None, Some(local)) => local.token(args)?,
        (None, None) => bail!("a token for {} is missing: give it with --token", args.name),
    };
    let database = match &args.database {
        Some(path) => path.clone(),
        None => database(args, local.as_ref(), &server)?,
    };
    let server_name = args.server_name.clone().unwrap_or(host);
    Ok(Options::new(database, server, server_name, token)
        .trust(Trust::CertificateFile(certificate))
        .class(DeviceClass::Desktop))
}

/// A gateway's data folder on this machine.
struct Local {
    config: Config,
    address: SocketAddr,
    certificate: PathBuf,
}

impl Local {
    /// `None` when everything that it would tell was given by flags.
    fn find(args: &ChatArgs) -> anyhow::Result<Option<Self>> {
        let told = args.server.is_some() && args.token.is_some() && args.certificate.is_some();
        if told && args.config.data.is_none() {
            return Ok(None);
        }
        let config = args.config.load(Vec::new())?;
        let certificate =
            config.tls.certificate.clone().unwrap_or_else(|| config.data.path.join("tls/cert.pem"));
        if !certificate.exists() && args.certificate.is_none() {
            bail!(
                "no gateway has run in {}: start `fulmar serve` there first, name its folder with --data, or give \
                 --server, --token and --certificate",
                config.data.path.display()
            );
        }
        let mut address = config.listen.address;
        if address.ip().is_unspecified() {
            address.set_ip(match address {
                SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
                SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
            });
        }
        Ok(Some(Self { config, address, certificate }))
    }

    fn token(&self, args: &ChatArgs) -> anyhow::Result<String> {
        let Some(app) = self.config.app(&args.app).filter(|app| app.dev_key) else {
            bail!("no token for app {:?} can be made here: give one with --token", args.app)
        };
        let key = open_dev_key(&self.config.data.path)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the system clock is not set")?;
        let now = u64::try_from(now.as_millis()).ok().and_then(UnixMillis::new);
        let now = now.context("the system clock is beyond the end of time")?;
        let mint_args = Mint { app: &app.name, issuer: &app.issuer, user: &args.name, ttl_s: TOKEN_TTL_S };
        Ok(mint(&key, mint_args, now)?)
    }
}

/// Where the messages are kept: beside the gateway whose they are, or in the user's own folder.
fn database(args: &ChatArgs, local: Option<&Local>, server: &str) -> anyhow::Result<PathBuf> {
    let mut file = file_name(&args.name);
    if args.app != DEMO_APP {
        file = format!("{}-{file}", file_name(&args.app));
    }
    let folder = match local {
        Some(local) => local.config.data.path.join("chat"),
        None => {
            file = format!("{}-{file}", file_name(server));
            let home = std::env::var_os("XDG_DATA_HOME")
                .map(PathBuf::from)
                .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".local/share")));
            home.context("there is no HOME to keep messages in: say where with --database")?.join("fulmar")
        }
    };
    std::fs::create_dir_all(&folder).with_context(|| {
        format!("{} can't be made: say where to keep messages with --database", folder.display())
    })?;
    Ok(folder.join(format!("{file}.db")))
}

/// A name as part of a file name: what is not a plain letter, digit, dot, dash or underscore becomes its code.
fn file_name(name: &str) -> String {
    let mut file = String::new();
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => file.push(char::from(byte)),
            b'.' if !file.is_empty() => file.push('.'),
            other => file.push_str(&format!("%{other:02x}")),
        }
    }
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_files_of_their_own() {
        let names = ["alice", "../alice", "..", "a b", "a%20b", "ünder", "Alice", "a.b"];
        let files: std::collections::BTreeSet<_> = names.iter().map(|name| file_name(name)).collect();
        assert_eq!(files.len(), names.len());
        assert!(files.iter().all(|file| !file.contains('/') && !file.starts_with('.')), "{files:?}");
    }
}
