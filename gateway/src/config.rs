//! The gateway's settings: one strict TOML file, then environment variables, then flags.
//!
//! - Every setting has a documented unit, default and bound; `fulmar serve --print-config` prints them all.
//! - A value that will not do is refused in one line that says where it stands, what it is, and what is expected.
//! - Relations between settings are checked once, here; whoever receives a [`Config`] may rely on them.
//!
//! Not here: reading the files that settings name (keys, certificates), and making the data folder
//! ([`crate::data_folder`]).

pub mod retention;
pub mod setting;
pub mod source;

use std::collections::HashSet;
use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::time::Duration;

use fulmar_protocol::limit;
use toml::Value;

pub use self::source::{Assignment, ConfigError, Origin};

use self::retention::{Keep, KeepAge, KeepBytes};
use self::setting::{KeyDoc, OneOf, Refusal, Section, Setting, Where, section, words};
use self::source::{File, Origins, Sections};

/// Name of the configuration file in a data folder; it is read when no other is named.
pub const FILE_NAME: &str = "fulmar.toml";

/// The data folder unless another is named.
pub const DATA_FOLDER: &str = "fulmar-data";

/// The app there is when the file configures none: for trying things out.
pub const DEMO_APP: &str = "demo";

/// The issuer of tokens made by `fulmar token`, unless the app names another.
pub const DEV_ISSUER: &str = "fulmar-dev";

/// Broadcasts an app may have: everybody of the app reads each.
pub const BROADCASTS_MAX: usize = 16;

/// What serves connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cores {
    /// As many cores as the process may use, at most [`CORES_AUTO_MAX`].
    Auto,
    /// As many.
    Exactly(u16),
    /// One endpoint, whose connections move between the threads of one runtime.
    Shared,
}

/// Cores that are taken without being asked for. Each is a thread that may be busy all the time, and shards need some too.
pub const CORES_AUTO_MAX: u16 = 16;

/// Cores that can be asked for.
pub const CORES_MAX: u16 = 64;

impl Cores {
    /// How many cores serve with a thread of their own; `None`: all of one endpoint's connections share the threads of one
    /// runtime.
    #[must_use]
    pub fn count(self) -> Option<u16> {
        match self {
            Self::Auto => {
                let there = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
                Some(u16::try_from(there).unwrap_or(u16::MAX).min(CORES_AUTO_MAX))
            }
            Self::Exactly(cores) => Some(cores),
            Self::Shared => None,
        }
    }
}

impl Setting for Cores {
    fn read(value: &Value) -> Option<Self> {
        let number = match value.as_str() {
            Some("auto") => return Some(Self::Auto),
            Some("shared") => return Some(Self::Shared),
            // From the environment or a flag.
            Some(text) => text.parse().ok()?,
            None => u16::try_from(value.as_integer()?).ok()?,
        };
        (1..=CORES_MAX).contains(&number).then_some(Self::Exactly(number))
    }

    fn write(&self) -> Value {
        match self {
            Self::Auto => Value::String("auto".to_owned()),
            Self::Exactly(cores) => Value::Integer((*cores).into()),
            Self::Shared => Value::String("shared".to_owned()),
        }
    }
}

section! {
    /// Where the gateway is reached.
    ListenConfig = "listen" {
        /// Address for QUIC (UDP), and for TLS and WebSocket (TCP) if listen.tcp is on.
        address: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 4433)),
            "an address and port, such as \"0.0.0.0:4433\" or \"[::]:4433\"";
        /// Also accept TLS and WebSocket on the same port by TCP: true or false. For clients whose network blocks UDP.
        tcp: bool = true, "true or false";
        /// Cores that serve connections, each with an endpoint and a thread of its own: "auto" (as many as the process may
        /// use, at most 16), a number from 1 to 64, or "shared" (one endpoint on threads that share the work). More than one
        /// need Linux; elsewhere one serves.
        cores: Cores = Cores::Auto, "\"auto\", a number from 1 to 64, or \"shared\"";
        /// Addresses (host:port) clients are told to try as well, best first; at most 8. Empty: only the one
        /// they came by.
        public_addresses: Vec<String> = Vec::new(),
            Where("a list of at most 8 texts such as [\"chat.example.org:4433\"]", |list: &Vec<String>| {
                list.len() <= limit::ADDRESSES_MAX && list.iter().all(|a| is_host_and_port(a))
            });
        /// TCP address for /metrics, /healthz and /readyz, or "off". It has no authentication: keep it private.
        http_address: Option<SocketAddr> = Some(SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 4480))),
            "an address and port, such as \"127.0.0.1:4480\", or \"off\"";
    }
}

words! {
    /// What keeps the index of the log. The log itself is the store's own files with any of them.
    Engine {
        /// Sled, one database per shard.
        Sled = "sled",
        /// Fjall, one database per shard.
        Fjall = "fjall",
        /// Nothing survives the process: for tests and demonstrations.
        Memory = "memory",
    }
}

words! {
    /// What must have happened before a send is acknowledged.
    Durability {
        /// What is acked survives power loss.
        Power = "power" was "synced",
        /// What is acked survives kill -9; a power cut may lose the newest.
        Process = "process" was "buffered",
    }
}

section! {
    /// The data folder and the log in it.
    DataConfig = "data" {
        /// Folder of the log, certificate and keys; made at first start if its parent exists.
        path: PathBuf = PathBuf::from(DATA_FOLDER), "a path such as \"/var/lib/fulmar\"";
        /// Shards of the log, each one writer with its own thread. Fixed when the data folder is made: one that
        /// exists keeps its count.
        shards: u16 = 4, 1..=256;
        /// What keeps the index of the log: "sled" or "fjall", which the data folder was made with, or "memory" (no
        /// folder; nothing survives the process).
        engine: Engine = Engine::Sled, OneOf(Engine::WORDS);
        /// When a send is acked: "power" (what is acked survives power loss) or "process" (what is acked survives
        /// kill -9; a power cut may lose the newest).
        durability: Durability = Durability::Power, OneOf(Durability::WORDS);
        /// Memory for the engine's own cache, in MiB, over all shards.
        engine_cache_mib: u64 = 64, 8..=65_536;
        /// Memory for the newest records of conversations, in MiB, over all shards.
        tail_cache_mib: u64 = 64, 1..=65_536;
        /// Free disk space in MiB below which sends are refused, so that the log can still be repaired and read.
        reserve_mib: u64 = 64, 0..=1_048_576;
    }
}

/// A public key that signs tokens of an app.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyFile {
    /// The `kid` in the token's header.
    pub kid: String,
    /// PEM file with the Ed25519 public key (`BEGIN PUBLIC KEY`).
    pub file: PathBuf,
}

impl Setting for Vec<KeyFile> {
    fn read(value: &Value) -> Option<Self> {
        let key = |entry: &Value| {
            let table = entry.as_table()?;
            let kid = table.get("kid")?.as_str()?;
            let file = table.get("file")?.as_str()?;
            let known = table.len() == 2 && !kid.is_empty() && kid.len() <= 64 && !file.is_empty();
            known.then(|| KeyFile { kid: kid.to_owned(), file: PathBuf::from(file) })
        };
        value.as_array()?.iter().map(key).collect()
    }

    fn write(&self) -> Value {
        let key = |key: &KeyFile| {
            let mut table = toml::Table::new();
            table.insert("kid".to_owned(), Value::String(key.kid.clone()));
            table.insert("file".to_owned(), Value::String(key.file.display().to_string()));
            Value::Table(table)
        };
        Value::Array(self.iter().map(key).collect())
    }
}

/// A broadcast of an app: everybody of the app reads it, some write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BroadcastConfig {
    /// Its name. It names the broadcast's data for good.
    pub name: String,
    /// Users who may send there.
    pub senders: Vec<String>,
}

impl Setting for Vec<BroadcastConfig> {
    fn read(value: &Value) -> Option<Self> {
        let broadcast = |entry: &Value| {
            let table = entry.as_table()?;
            let name = table.get("name")?.as_str()?;
            let senders =
                table.get("senders")?.as_array()?.iter().map(|name| Some(name.as_str()?.to_owned()));
            let senders = senders.collect::<Option<Vec<_>>>()?;
            let known = table.len() == 2 && is_name(name) && senders.iter().all(|name| is_name(name));
            known.then(|| BroadcastConfig { name: name.to_owned(), senders })
        };
        value.as_array()?.iter().map(broadcast).collect()
    }

    fn write(&self) -> Value {
        let broadcast = |broadcast: &BroadcastConfig| {
            let mut table = toml::Table::new();
            table.insert("name".to_owned(), Value::String(broadcast.name.clone()));
            let senders = broadcast.senders.iter().cloned().map(Value::String).collect();
            table.insert("senders".to_owned(), Value::Array(senders));
            Value::Table(table)
        };
        Value::Array(self.iter().map(broadcast).collect())
    }
}

section! {
    /// An app (tenant). Write `[[app]]`, once per app; without any there is one called "demo" that accepts the tokens
    /// of `fulmar token`.
    AppConfig = "app" {
        /// Its name: the `aud` of its tokens. It names the app's data for good.
        name: String = String::new(),
            Where("a name of 1 to 128 bytes without control characters", |name: &String| is_name(name));
        /// The `iss` its tokens must carry.
        issuer: String = DEV_ISSUER.to_owned(),
            Where("the text that tokens carry as \"iss\"", |issuer: &String| is_name(issuer));
        /// Public keys (Ed25519) its tokens are signed with; both the old and the new one while you rotate. The file
        /// is relative to this one: [{ kid = "2026-01", file = "acme-2026-01.pem" }].
        keys: Vec<KeyFile> = Vec::new(),
            "a list such as [{ kid = \"2026-01\", file = \"acme.pem\" }]";
        /// Accept tokens made by `fulmar token` too: true or false. Never in production.
        dev_key: bool = false, "true or false";
        /// Whether anybody with a valid token is a user. If false, only users that were named before are let in.
        open_users: bool = true, "true or false";
        /// What everybody of the app reads, whoever is here at once and the others when they come: names, and the users who
        /// may send there: [{ name = "news", senders = ["newsroom"] }]. One that is taken out is no longer served; its
        /// records stay.
        broadcasts: Vec<BroadcastConfig> = Vec::new(),
            "a list such as [{ name = \"news\", senders = [\"newsroom\"] }]";
        /// How long this app's records are kept, instead of retention.age.
        retention_age: KeepAge = Keep::Inherit, KeepAge::EXPECTED;
        /// Bytes of records this app's conversations keep each, instead of retention.bytes.
        retention_bytes: KeepBytes = Keep::Inherit, KeepBytes::EXPECTED;
        /// The age for this app's direct conversations only.
        retention_direct_age: KeepAge = Keep::Inherit, KeepAge::EXPECTED;
        /// The bytes for this app's direct conversations only.
        retention_direct_bytes: KeepBytes = Keep::Inherit, KeepBytes::EXPECTED;
        /// The age for this app's groups only.
        retention_group_age: KeepAge = Keep::Inherit, KeepAge::EXPECTED;
        /// The bytes for this app's groups only.
        retention_group_bytes: KeepBytes = Keep::Inherit, KeepBytes::EXPECTED;
    }
}

section! {
    /// How much of a conversation is kept. What is beyond goes, oldest first; readers are told where a conversation
    /// begins now. The narrowest setting that is not "inherit" counts: the app's for the class, the app's, the class's
    /// here, then age and bytes.
    RetentionConfig = "retention" {
        /// How long records are kept: a number with s, m, h or d, or "forever".
        age: KeepAge = Keep::Everything, Where(KeepAge::EXPECTED_AT_ROOT, |keep: &KeepAge| *keep != Keep::Inherit);
        /// Bytes of records a conversation keeps, its newest ones: a number with KiB, MiB or GiB, or "unlimited".
        bytes: KeepBytes = Keep::Everything,
            Where(KeepBytes::EXPECTED_AT_ROOT, |keep: &KeepBytes| *keep != Keep::Inherit);
        /// The age for direct conversations.
        direct_age: KeepAge = Keep::Inherit, KeepAge::EXPECTED;
        /// The bytes for direct conversations.
        direct_bytes: KeepBytes = Keep::Inherit, KeepBytes::EXPECTED;
        /// The age for groups.
        group_age: KeepAge = Keep::Inherit, KeepAge::EXPECTED;
        /// The bytes for groups.
        group_bytes: KeepBytes = Keep::Inherit, KeepBytes::EXPECTED;
        /// Seconds from the start of one sweep over a shard's conversations to the next.
        sweep_s: u64 = 3_600, 1..=2_592_000;
        /// Conversations a shard's sweep looks at per second. It rests while the shard is busy.
        conversations_per_second: u32 = 100, 1..=100_000;
        /// Seconds for which the system clock must have gone evenly, at the start and after any jump, before anything
        /// goes by its age: a clock that is wrong for a moment takes nothing away.
        clock_settle_s: u64 = 3_600, 1..=2_592_000;
    }
}

section! {
    /// Old records in an object store: compressed, slower to read, and read by the same requests.
    ColdConfig = "cold" {
        /// Where they go: "file:///srv/fulmar-cold" (a folder that exists), or "s3://bucket/prefix" if this program was
        /// built with the feature s3 (credentials, region and endpoint: the AWS_* variables). Empty: they stay. What went
        /// there can only be read while this is set.
        url: String = String::new(),
            Where("empty, \"file:///a/folder\", or with the feature s3 \"s3://bucket/prefix\"", |url: &String| {
                let place = url.strip_prefix("file:///").or_else(|| url.strip_prefix("s3://"));
                url.is_empty() || place.is_some_and(|place| !place.is_empty())
            });
        /// Records older than this go there: a number with s, m, h or d.
        after: KeepAge = Keep::at(30 * 86_400_000),
            Where("a time such as \"30d\" or \"12h\" (s, m, h, d)", |after: &KeepAge| after.limit().is_some());
        /// MiB of records, before they are compressed, that are worth an object of their own.
        object_mib: u64 = 16, 1..=1_024;
        /// Memory for what was read there, in MiB, over all shards.
        cache_mib: u64 = 32, 1..=65_536;
    }
}

section! {
    /// Tokens and tickets.
    AuthConfig = "auth" {
        /// Seconds by which clocks of token issuers may differ from ours.
        leeway_s: u64 = 30, 0..=600;
        /// Seconds a session ticket is good for after it was issued. Resuming renews it; it never outlives the
        /// token it was issued for.
        ticket_lifetime_s: u64 = 604_800, 60..=7_776_000;
        /// Verified tokens that are remembered, so that attempts which race each other cost one signature check. Who comes back
        /// later has a ticket.
        token_cache: u64 = 4_096, 0..=16_777_216;
    }
}

section! {
    /// Bounds that protect the gateway and everybody else from one peer.
    LimitsConfig = "limits" {
        /// Connections held at once; above, new ones are refused until some leave.
        connections: usize = 60_000, 1..=10_000_000;
        /// Connections of one IP address. Mobile carriers put thousands of phones behind one.
        connections_per_address: usize = 8_192, 1..=10_000_000;
        /// Handshakes in progress at once; above, attempts are refused.
        handshakes: usize = 4_096, 1..=1_000_000;
        /// Handshakes in progress above which an unknown address must first prove that it is its own (one more
        /// round trip for it, no state for us).
        handshakes_before_retry: usize = 1_024, 0..=1_000_000;
        /// Handshakes in progress of one IP address.
        handshakes_per_address: usize = 512, 1..=1_000_000;
        /// Milliseconds an accepted connection has to finish its handshake and say HELLO.
        hello_timeout_ms: u64 = 10_000, 100..=120_000;
        /// Seconds for which it is kept, for a device that went away, in which conversations something changes meanwhile. If
        /// it comes back by then, its resume costs what changed; later, a look at each conversation of its user. 0: never.
        away_s: u64 = 3_600, 0..=604_800;
        /// MiB that may take in all, about; beyond it the devices that left first are forgotten.
        away_mib: u64 = 64, 0..=65_536;
        /// Conversations that are kept as changed for one device, in each shard; beyond it everything is looked at.
        away_conversations: usize = 1_024, 1..=1_000_000;
        /// Members above which a conversation is not kept as changed for each device that is away, but looked at whenever
        /// a device of a member comes back.
        away_members: usize = 500, 1..=1_000_000;
        /// Milliseconds a send may have to wait for its turn at the log while more come than can be written. What would wait for
        /// longer is refused before anything is decided about it, and comes again after a time it is told.
        send_wait_ms: u32 = 100, 5..=60_000;
        /// Milliseconds packets may wait for a core to read them before it lets a part of its connections send at a time, in turns, and
        /// refuses the others' sends with a time to come again (docs/operations.md). 0: never, so that they wait for seconds.
        core_wait_ms: u32 = 100, 0..=60_000;
        /// Open files the process asks the system for at start, as far as the hard limit allows. QUIC connections share
        /// one; the log takes some per shard.
        open_files: u64 = 8_192, 256..=1_048_576;
    }
}

section! {
    /// QUIC. The defaults suit many idle phones, not bulk transfer.
    TransportConfig = "transport" {
        /// Milliseconds without any packet after which a connection is gone. Clients ping more often than that.
        idle_timeout_ms: u32 = 180_000, 5_000..=3_600_000;
        /// Bytes a client may have in flight to us on one stream.
        stream_window_bytes: u32 = 131_072, 32_768..=16_777_216;
        /// Bytes a client may have in flight to us on all its streams.
        connection_window_bytes: u32 = 262_144, 65_536..=67_108_864;
        /// Bytes we keep for retransmission to one client at the most; a reader that is this far behind is read from the log.
        send_window_bytes: u64 = 196_608, 32_768..=67_108_864;
        /// The same for a client that acknowledges nothing. One that does is allowed more: twice the bytes it acknowledges in a
        /// second.
        send_window_least_bytes: u64 = 32_768, 16_384..=67_108_864;
        /// Bidirectional streams a client may open; one is used.
        bidi_streams: u32 = 2, 1..=64;
        /// Unidirectional streams a client may open; one is used.
        uni_streams: u32 = 4, 1..=64;
        /// Downlink lanes offered to a client: a lost packet delays only its lane.
        lanes: u8 = limit::LANES_DEFAULT, 1..=limit::LANES_MAX;
        /// Bytes of received datagrams that may wait to be read.
        datagram_receive_bytes: usize = 16_384, 2_048..=1_048_576;
        /// Bytes of datagrams that may wait to be sent; the oldest are dropped.
        datagram_send_bytes: usize = 16_384, 2_048..=1_048_576;
        /// Round trip assumed before one was measured, in milliseconds.
        initial_rtt_ms: u32 = 200, 10..=3_000;
        /// UDP payload bytes sent before anything is known of the path.
        initial_mtu: u16 = 1_200, 1_200..=9_000;
        /// Probe for larger packets. Off by default: messages are small, and probes slow down a change of path.
        mtu_discovery: bool = false, "true or false";
        /// Let the system cut large sends into packets (GSO).
        segmentation_offload: bool = true, "true or false";
        /// Packets a client may receive before it must acknowledge, if it can do that (ACK frequency); 0: QUIC's own 2.
        ack_threshold: u32 = 10, 0..=100;
        /// Stateless resets sent per second at most: how fast phones learn that the gateway was restarted.
        resets_per_second: u32 = 5_000, 1..=1_000_000;
        /// Keepalive range offered to clients: the shortest interval, in seconds.
        keepalive_min_s: u32 = 15, 1..=3_600;
        /// Keepalive range offered to clients: the longest interval, in seconds. Below the idle timeout.
        keepalive_max_s: u32 = 120, 1..=3_600;
    }
}

section! {
    /// Delivery to whoever is online.
    FanoutConfig = "fanout" {
        /// Encoded frames a conversation keeps for its readers; who is further behind reads from the log.
        ring_frames: usize = 256, 16..=65_536;
        /// Bytes a conversation keeps for its readers at most.
        ring_bytes: usize = 262_144, 32_768..=67_108_864;
        /// Members up to which everybody online gets messages as they come; above, those who do not have the
        /// conversation open are told its head once per `head_interval_ms`, until there are less than nine tenths.
        inline_members_max: u64 = 10_000, 1..=1_000_000;
        /// Milliseconds between two heads of one large conversation.
        head_interval_ms: u64 = 1_000, 50..=60_000;
        /// Bytes gathered into one write to one lane.
        gather_bytes: usize = 16_384, 1_200..=1_048_576;
    }
}

section! {
    /// Receipts: who has got and read what.
    ReceiptsConfig = "receipts" {
        /// Members up to which a conversation shows receipts of each other.
        members_max: u64 = 64, 0..=10_000;
        /// Milliseconds after which a device's received-cursor is written down. The device's own is the truth.
        persist_ms: u64 = 5_000, 100..=600_000;
    }
}

section! {
    /// Leaving: after SIGTERM or Ctrl-C.
    DrainConfig = "drain" {
        /// Seconds after which the process ends whatever is left.
        deadline_s: u64 = 30, 1..=600;
        /// Seconds over which clients are asked to spread their departure.
        spread_s: u64 = 10, 0..=600;
    }
}

words! {
    /// How log lines look.
    LogFormat {
        /// For people.
        Text = "text",
        /// For machines: one object per line.
        Json = "json",
    }
}

section! {
    /// What is logged, to standard error.
    LogConfig = "log" {
        /// Filter in the syntax of tracing: a level, or levels by target and span. Follow one conversation with
        /// "info,fulmar_gateway[{conversation=1025}]=trace".
        filter: String = "info".to_owned(),
            Where("a filter such as \"info\" or \"info,fulmar_gateway=debug\"", |filter: &String| {
                tracing_subscriber::EnvFilter::try_new(filter).is_ok()
            });
        /// How lines look: "text" or "json".
        format: LogFormat = LogFormat::Text, "\"text\" or \"json\"";
        /// Seconds for which a repeated complaint about hostile input is only counted.
        repeat_s: u64 = 10, 1..=3_600;
    }
}

section! {
    /// The certificate, and resuming.
    TlsConfig = "tls" {
        /// PEM file with the certificate chain. Empty: a self-signed one in the data folder, made at first start.
        certificate: Option<PathBuf> = None, "a path, or \"\" for the self-signed one in the data folder";
        /// PEM file with the private key. Empty: the one that belongs to the self-signed certificate.
        key: Option<PathBuf> = None, "a path, or \"\" for the self-signed one in the data folder";
        /// More names for the self-signed certificate, beside localhost and this host's name.
        names: Vec<String> = Vec::new(),
            Where("a list of host names or addresses such as [\"chat.example.org\"]", |list: &Vec<String>| {
                list.iter().all(|n| is_host(n))
            });
        /// TLS sessions remembered for 0-RTT. Larger than twice the connections, or phones can't resume.
        sessions: usize = 131_072, 0..=16_777_216;
        /// Session tickets sent per handshake; each is good once, and a client that races attempts uses two.
        tickets: usize = 2, 0..=8;
        /// Seconds between two looks at whether the certificate file changed. SIGHUP looks at once. 0: never.
        reload_s: u64 = 60, 0..=86_400;
    }
}

/// Everything that can be set, checked.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Config {
    /// `[listen]`
    pub listen: ListenConfig,
    /// `[data]`
    pub data: DataConfig,
    /// `[[app]]`; never empty after loading.
    pub apps: Vec<AppConfig>,
    /// `[auth]`
    pub auth: AuthConfig,
    /// `[limits]`
    pub limits: LimitsConfig,
    /// `[transport]`
    pub transport: TransportConfig,
    /// `[fanout]`
    pub fanout: FanoutConfig,
    /// `[receipts]`
    pub receipts: ReceiptsConfig,
    /// `[retention]`
    pub retention: RetentionConfig,
    /// `[cold]`
    pub cold: ColdConfig,
    /// `[drain]`
    pub drain: DrainConfig,
    /// `[log]`
    pub log: LogConfig,
    /// `[tls]`
    pub tls: TlsConfig,
}

macro_rules! sections {
    ($($field:ident : $ty:ty),* $(,)?) => {
        impl Sections for Config {
            fn names() -> Vec<&'static str> {
                vec![$(<$ty as Section>::NAME),*]
            }

            fn keys(section: &str) -> Option<Vec<KeyDoc>> {
                match section {
                    $( stringify!($field) => Some(<$ty as Section>::keys()), )*
                    _ => None,
                }
            }

            fn set(&mut self, section: &str, key: &str, value: &Value) -> Option<Result<(), Refusal>> {
                match section {
                    $( stringify!($field) => Some(self.$field.set(key, value)), )*
                    _ => None,
                }
            }
        }

        /// The whole file with every default and its documentation. It reads back as the defaults.
        #[must_use]
        pub fn documented() -> String {
            let mut text = String::from(HEADER);
            $( document::<$ty>(&mut text); )*
            document_app(&mut text);
            text
        }
    };
}
sections!(
    listen: ListenConfig,
    data: DataConfig,
    auth: AuthConfig,
    limits: LimitsConfig,
    transport: TransportConfig,
    fanout: FanoutConfig,
    receipts: ReceiptsConfig,
    retention: RetentionConfig,
    cold: ColdConfig,
    drain: DrainConfig,
    log: LogConfig,
    tls: TlsConfig,
);

const HEADER: &str = "\
# Configuration of the Fulmar gateway, with every setting at its default.
#
# Later wins: default, this file, environment (FULMAR_<SECTION>_<KEY>, such as FULMAR_LISTEN_ADDRESS), flags
# (--set section.key=value). Unknown sections and keys are refused. Without --config, the gateway reads
# fulmar.toml in its data folder if there is one.
";

fn document<S: Section>(text: &mut String) {
    let _ = writeln!(text);
    for line in S::DOC {
        let _ = writeln!(text, "#{line}");
    }
    let _ = writeln!(text, "[{}]", S::NAME);
    document_keys(text, &S::keys(), "");
}

fn document_app(text: &mut String) {
    let _ = writeln!(text);
    for line in AppConfig::DOC {
        let _ = writeln!(text, "#{line}");
    }
    let _ = writeln!(text, "# [[app]]");
    document_keys(text, &AppConfig::keys(), "# ");
}

fn document_keys(text: &mut String, keys: &[KeyDoc], mark: &str) {
    for key in keys {
        for line in key.doc {
            let _ = writeln!(text, "#{line}");
        }
        let bounds = match key.default {
            Value::Integer(_) => format!(" # {}", key.expects),
            _ => String::new(),
        };
        let _ = writeln!(text, "{mark}{} = {}{bounds}", key.name, key.default);
    }
}

impl Config {
    /// The defaults with the `demo` app, in this data folder.
    #[must_use]
    pub fn in_folder(path: impl Into<PathBuf>) -> Self {
        let mut config = Self { apps: vec![demo_app()], ..Self::default() };
        config.data.path = path.into();
        config
    }

    /// Reads the file, the process's environment and the flags.
    ///
    /// Without `file`, the data folder's own is read if there is one.
    ///
    /// # Errors
    /// One line that says which value will not do, and what would.
    pub fn load(file: Option<&Path>, flags: &[Assignment]) -> Result<Self, ConfigError> {
        let environment = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        let environment: Vec<(String, String)> = environment.collect();
        let path = match file {
            Some(path) => Some(path.to_owned()),
            None => {
                // Which folder it is may itself be set by a variable or flag, but not by the file in it.
                let mut early = Self::default();
                early.assign(&environment, flags, &mut Origins::new())?;
                Some(early.data.path.join(FILE_NAME)).filter(|path| path.exists())
            }
        };
        let text = match &path {
            Some(path) => Some(std::fs::read_to_string(path).map_err(|e| unreadable(path, &e))?),
            None => None,
        };
        Self::assemble(path.as_deref().zip(text.as_deref()), &environment, flags)
    }

    /// The same from parts that are at hand: the file's name and text, the environment, the flags.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn assemble(
        file: Option<(&Path, &str)>,
        environment: &[(String, String)],
        flags: &[Assignment],
    ) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        let mut origins = Origins::new();
        if let Some((path, text)) = file {
            let mut apps = Vec::new();
            File::new(path, text).apply(&mut config, &mut apps, &mut origins)?;
            config.apps = apps;
            config.resolve_paths(path, &origins);
        }
        config.assign(environment, flags, &mut origins)?;
        if config.apps.is_empty() {
            config.apps.push(demo_app());
        }
        config.check(&origins)?;
        Ok(config)
    }

    fn assign(
        &mut self,
        environment: &[(String, String)],
        flags: &[Assignment],
        origins: &mut Origins,
    ) -> Result<(), ConfigError> {
        for assignment in source::assignments_of_environment::<Self>(environment).iter().chain(flags) {
            source::assign(self, origins, assignment)?;
        }
        Ok(())
    }

    /// Paths in a file are relative to it, so that it means the same from every working directory.
    fn resolve_paths(&mut self, file: &Path, origins: &Origins) {
        let folder = file.parent().unwrap_or_else(|| Path::new(""));
        let resolve = |path: &mut PathBuf| *path = folder.join(&*path);
        if origins.contains_key("data.path") {
            resolve(&mut self.data.path);
        }
        self.tls.certificate.iter_mut().chain(self.tls.key.iter_mut()).for_each(resolve);
        self.apps.iter_mut().flat_map(|app| &mut app.keys).for_each(|key| resolve(&mut key.file));
    }

    /// Relations between settings.
    fn check(&self, origins: &Origins) -> Result<(), ConfigError> {
        let fail = |place: &str, what: String| {
            let origin = origins.get(place).cloned().unwrap_or(Origin::Default);
            Err(ConfigError::new(origin, format!("{place} {what}")))
        };
        let mut names = HashSet::new();
        for (i, app) in self.apps.iter().enumerate() {
            let place = format!("app[{i}]");
            if app.name.is_empty() {
                return fail(&place, "has no name: add name = \"…\", the \"aud\" of its tokens".to_owned());
            }
            if !names.insert(&app.name) {
                let place = format!("{place}.name");
                return fail(&place, format!("= {:?} is taken by an app above: give it another", app.name));
            }
            if app.keys.is_empty() && !app.dev_key {
                let what = format!(
                    "({:?}) accepts nobody: list its public keys in keys = […], or set dev_key = true to try it out",
                    app.name
                );
                return fail(&place, what);
            }
            let mut kids = HashSet::new();
            if let Some(twice) = app.keys.iter().find(|key| !kids.insert(&key.kid)) {
                let place = format!("{place}.keys");
                return fail(&place, format!("has kid {:?} twice: every key needs its own", twice.kid));
            }
            let place = format!("{place}.broadcasts");
            let mut broadcasts = HashSet::new();
            if let Some(twice) = app.broadcasts.iter().find(|broadcast| !broadcasts.insert(&broadcast.name)) {
                return fail(&place, format!("has {:?} twice: list its senders in one entry", twice.name));
            }
            if let Some(mute) = app.broadcasts.iter().find(|broadcast| broadcast.senders.is_empty()) {
                return fail(&place, format!("lets nobody send to {:?}: name its senders", mute.name));
            }
            if app.broadcasts.len() > BROADCASTS_MAX {
                return fail(
                    &place,
                    format!("are more than {BROADCASTS_MAX}: use groups for what not all read"),
                );
            }
        }
        let transport = &self.transport;
        if transport.stream_window_bytes > transport.connection_window_bytes {
            let what = format!(
                "= {} is above transport.connection_window_bytes = {}: lower it or raise the other",
                transport.stream_window_bytes, transport.connection_window_bytes
            );
            return fail("transport.stream_window_bytes", what);
        }
        if transport.keepalive_min_s > transport.keepalive_max_s {
            let what = format!(
                "= {} is above transport.keepalive_max_s = {}: lower it or raise the other",
                transport.keepalive_min_s, transport.keepalive_max_s
            );
            return fail("transport.keepalive_min_s", what);
        }
        if u64::from(transport.keepalive_max_s) * 1_000 >= u64::from(transport.idle_timeout_ms) {
            let what = format!(
                "= {} is not below transport.idle_timeout_ms = {}: idle phones would be dropped between two pings",
                transport.keepalive_max_s, transport.idle_timeout_ms
            );
            return fail("transport.keepalive_max_s", what);
        }
        if transport.send_window_least_bytes > transport.send_window_bytes {
            let what = format!(
                "= {} is above transport.send_window_bytes = {}: nobody is allowed more than that",
                transport.send_window_least_bytes, transport.send_window_bytes
            );
            return fail("transport.send_window_least_bytes", what);
        }
        if self.limits.handshakes_before_retry > self.limits.handshakes {
            let what = format!(
                "= {} is above limits.handshakes = {}: addresses would never be asked to prove themselves",
                self.limits.handshakes_before_retry, self.limits.handshakes
            );
            return fail("limits.handshakes_before_retry", what);
        }
        if self.fanout.ring_bytes < 2 * limit::LANE_FRAME_BYTES_MAX {
            let what = format!(
                "= {} is below {}: two frames of the largest size must fit",
                self.fanout.ring_bytes,
                2 * limit::LANE_FRAME_BYTES_MAX
            );
            return fail("fanout.ring_bytes", what);
        }
        if self.data.engine == Engine::Memory && !self.cold.url.is_empty() {
            let what = "is set, and data.engine = \"memory\" keeps nothing: leave one of them out".to_owned();
            return fail("cold.url", what);
        }
        match (&self.tls.certificate, &self.tls.key) {
            (Some(_), None) => fail(
                "tls.certificate",
                "is set but tls.key is not: name the file of its private key".to_owned(),
            ),
            (None, Some(_)) => {
                fail("tls.key", "is set but tls.certificate is not: name the file of its chain".to_owned())
            }
            _ => Ok(()),
        }
    }

    /// The app of that name.
    #[must_use]
    pub fn app(&self, name: &str) -> Option<&AppConfig> {
        self.apps.iter().find(|app| app.name == name)
    }
}

impl TransportConfig {
    /// `idle_timeout_ms` as a duration.
    #[must_use]
    pub fn idle_timeout(&self) -> Duration {
        Duration::from_millis(u64::from(self.idle_timeout_ms))
    }
}

impl DrainConfig {
    /// `deadline_s` as a duration.
    #[must_use]
    pub fn deadline(&self) -> Duration {
        Duration::from_secs(self.deadline_s)
    }
}

fn demo_app() -> AppConfig {
    AppConfig { name: DEMO_APP.to_owned(), dev_key: true, ..AppConfig::default() }
}

fn unreadable(path: &Path, error: &std::io::Error) -> ConfigError {
    let what = match error.kind() {
        std::io::ErrorKind::NotFound => {
            "there is no such file: leave out --config to use the defaults, or write one with \
             `fulmar serve --print-config`"
                .to_owned()
        }
        std::io::ErrorKind::InvalidData => "it is not UTF-8 text: TOML must be".to_owned(),
        std::io::ErrorKind::IsADirectory => {
            format!("it is a folder: name the file, such as {FILE_NAME} in it")
        }
        _ => format!("it can't be read ({error}): check its owner and permissions"),
    };
    ConfigError::new(Origin::File(path.to_owned(), 0), what)
}

/// Whether a user, app or issuer may be called so.
#[must_use]
pub fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= limit::NAME_BYTES_MAX && !name.chars().any(char::is_control)
}

fn is_host(host: &str) -> bool {
    let host_char = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '*');
    !host.is_empty() && host.len() <= 253 && host.chars().all(host_char)
}

fn is_host_and_port(address: &str) -> bool {
    match address.rsplit_once(':') {
        Some((host, port)) => {
            let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
            is_host(host) && port.parse::<u16>().is_ok_and(|port| port > 0)
        }
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, String> {
        Config::assemble(Some((Path::new("/etc/f.toml"), text)), &[], &[]).map_err(|e| e.to_string())
    }

    #[test]
    fn the_documented_file_is_the_default() {
        let text = documented();
        assert_eq!(read(&text), Ok(Config::in_folder("/etc/fulmar-data")));
        for line in text.lines().filter(|l| l.contains(" = ") && !l.starts_with('#')) {
            assert!(line.len() <= 160, "{line}");
        }
        let app = text.split_once("# [[app]]").unwrap().1.replace("\n# ", "\n");
        let app = format!("[[app]]\n{}", app.replace("name = \"\"", "name = \"x\"\ndev_key = true"));
        let app: String = app
            .lines()
            .filter(|l| l.starts_with('[') || l.split(' ').nth(1) == Some("="))
            .filter(|l| *l != "dev_key = false")
            .map(|l| format!("{l}\n"))
            .collect();
        assert_eq!(read(&app).map(|c| c.apps.len()), Ok(1), "{app}");
    }

    #[test]
    fn every_key_says_what_it_is() {
        let mut sections: Vec<_> =
            Config::names().into_iter().map(|s| (s, Config::keys(s).unwrap())).collect();
        sections.push(("app", AppConfig::keys()));
        for (section, keys) in sections {
            for key in keys {
                assert!(key.doc.concat().len() > 15, "{section}.{} is not documented", key.name);
                let unit_needed = key.name.ends_with("_ms") || key.name.ends_with("_s");
                let doc = key.doc.concat().to_lowercase();
                assert!(!unit_needed || doc.contains("seconds"), "{section}.{} has no unit", key.name);
                assert!(!key.name.contains("bytes") || doc.contains("bytes"), "{section}.{}", key.name);
            }
        }
    }

    #[test]
    fn bad_files_are_refused_in_one_sentence() {
        let good_app = "[[app]]\nname = \"a\"\ndev_key = true\n";
        for (text, want) in [
            (
                "[listen]\nadress = \"0.0.0.0:1\"",
                "/etc/f.toml:2: [listen] has no key \"adress\"; did you mean \"address\"?",
            ),
            (
                "[drain]\nwhatever = 1",
                "/etc/f.toml:2: [drain] has no key \"whatever\"; its keys are deadline_s, spread_s",
            ),
            ("\n[lisen]\n", "/etc/f.toml:2: there is no section [lisen]; did you mean [listen]?"),
            (
                "[zzz]\n",
                "/etc/f.toml:1: there is no section [zzz]; sections are listen, data, auth, limits, transport, fanout, \
                 receipts, retention, cold, drain, log, tls, app",
            ),
            (
                "[listen]\naddress = \"localhost\"",
                "/etc/f.toml:2: listen.address = \"localhost\": expected an address and port, such as \
                 \"0.0.0.0:4433\" or \"[::]:4433\"",
            ),
            (
                "[listen]\npublic_addresses = [\"here\"]",
                "/etc/f.toml:2: listen.public_addresses = [\"here\"]: expected a list of at most 8 texts such as \
                 [\"chat.example.org:4433\"]",
            ),
            ("[data]\nshards = 0", "/etc/f.toml:2: data.shards = 0: expected a number from 1 to 256"),
            (
                "[data]\nshards = \"four\"",
                "/etc/f.toml:2: data.shards = \"four\": expected a number from 1 to 256",
            ),
            ("[data]\nshards = 2.5", "/etc/f.toml:2: data.shards = 2.5: expected a number from 1 to 256"),
            ("[data]\nshards = 99999999999999999999", "/etc/f.toml:2: data.shards: the number is too large"),
            (
                "[data]\nengine = \"slad\"",
                "/etc/f.toml:2: data.engine = \"slad\": expected \"sled\", \"fjall\" or \"memory\"",
            ),
            (
                "[data]\ndurability = \"synced\"",
                "/etc/f.toml:2: data.durability = \"synced\": this is called \"power\" now, write that",
            ),
            (
                "[data]\ndurability = \"buffered\"",
                "/etc/f.toml:2: data.durability = \"buffered\": this is called \"process\" now, write that",
            ),
            (
                "[data]\ndurability = \"ephemeral\"",
                "/etc/f.toml:2: data.durability = \"ephemeral\": expected \"power\" or \"process\"",
            ),
            (
                "[retention]\nage = \"90\"",
                "/etc/f.toml:2: retention.age = \"90\": expected a time such as \"90d\" or \"12h\" (s, m, h, d), or \
                 \"forever\"",
            ),
            (
                "[retention]\nbytes = 1000000",
                "/etc/f.toml:2: retention.bytes = 1000000: expected a size of at least 64 KiB such as \"64 MiB\" (KiB, \
                 MiB, GiB), or \"unlimited\"",
            ),
            (
                "[retention]\ngroup_age = \"never\"",
                "/etc/f.toml:2: retention.group_age = \"never\": expected a time such as \"90d\" or \"12h\" (s, m, h, d), \
                 \"forever\" or \"inherit\"",
            ),
            (
                "[cold]\nurl = \"/srv/cold\"",
                "/etc/f.toml:2: cold.url = \"/srv/cold\": expected empty, \"file:///a/folder\", or with the feature s3 \
                 \"s3://bucket/prefix\"",
            ),
            (
                "[cold]\nafter = \"forever\"",
                "/etc/f.toml:2: cold.after = \"forever\": expected a time such as \"30d\" or \"12h\" (s, m, h, d)",
            ),
            (
                "[cold]\nurl = \"file:///srv/cold\"\n[data]\nengine = \"memory\"",
                "/etc/f.toml:2: cold.url is set, and data.engine = \"memory\" keeps nothing: leave one of them out",
            ),
            (
                "[log]\nfilter = \"x=loud\"",
                "/etc/f.toml:2: log.filter = \"x=loud\": expected a filter such as \"info\" or \
                 \"info,fulmar_gateway=debug\"",
            ),
            (
                "address = \"0.0.0.0:1\"",
                "/etc/f.toml:1: \"address\" stands outside any section; put it under [listen]",
            ),
            (
                "listen = 5",
                "/etc/f.toml:1: listen is a section: write [listen] on a line of its own, its keys below",
            ),
            ("[app]\nname = \"a\"", "/etc/f.toml:1: [app] may be there several times: write [[app]]"),
            (
                "[[app]]\ndev_key = true",
                "/etc/f.toml:1: app[0] has no name: add name = \"…\", the \"aud\" of its tokens",
            ),
            (
                "[[app]]\nname = \"a\"",
                "/etc/f.toml:1: app[0] (\"a\") accepts nobody: list its public keys in keys = […], or set dev_key = \
                 true to try it out",
            ),
            (
                &format!("{good_app}{good_app}"),
                "/etc/f.toml:5: app[1].name = \"a\" is taken by an app above: give it another",
            ),
            (
                "[[app]]\nname = \"a\\u0007\"",
                "/etc/f.toml:2: app[0].name = \"a\\u0007\": expected a name of 1 to 128 bytes without control characters",
            ),
            (
                "[[app]]\nname = \"a\"\nkeys = [{ kid = \"1\", path = \"x\" }]",
                "/etc/f.toml:3: app[0].keys = [{ kid = \"1\", path = \"x\" }]: expected a list such as [{ kid = \
                 \"2026-01\", file = \"acme.pem\" }]",
            ),
            (
                "[[app]]\nname = \"a\"\nkeys = [{ kid = \"1\", file = \"x\" }, { kid = \"1\", file = \"y\" }]",
                "/etc/f.toml:3: app[0].keys has kid \"1\" twice: every key needs its own",
            ),
            (
                "[[app]]\nname = \"a\"\ndev_key = true\nbroadcasts = [{ name = \"n\" }]",
                "/etc/f.toml:4: app[0].broadcasts = [{ name = \"n\" }]: expected a list such as [{ name = \"news\", \
                 senders = [\"newsroom\"] }]",
            ),
            (
                "[[app]]\nname = \"a\"\ndev_key = true\nbroadcasts = [{ name = \"n\", senders = [] }]",
                "/etc/f.toml:4: app[0].broadcasts lets nobody send to \"n\": name its senders",
            ),
            (
                "[[app]]\nname = \"a\"\ndev_key = true\nbroadcasts = [{ name = \"n\", senders = [\"x\"] }, \
                 { name = \"n\", senders = [\"y\"] }]",
                "/etc/f.toml:4: app[0].broadcasts has \"n\" twice: list its senders in one entry",
            ),
            (
                "[[app]]\nname = \"a\"\nopen_user = true",
                "/etc/f.toml:3: [app] has no key \"open_user\"; did you mean \"open_users\"?",
            ),
            (
                "[transport]\nstream_window_bytes = 1000000",
                "/etc/f.toml:2: transport.stream_window_bytes = 1000000 is above transport.connection_window_bytes = \
                 262144: lower it or raise the other",
            ),
            (
                "[transport]\nkeepalive_max_s = 300",
                "/etc/f.toml:2: transport.keepalive_max_s = 300 is not below transport.idle_timeout_ms = 180000: idle \
                 phones would be dropped between two pings",
            ),
            (
                "[transport]\nkeepalive_min_s = 130",
                "/etc/f.toml:2: transport.keepalive_min_s = 130 is above transport.keepalive_max_s = 120: lower it or \
                 raise the other",
            ),
            (
                "[limits]\nhandshakes = 10",
                "default: limits.handshakes_before_retry = 1024 is above limits.handshakes = 10: addresses would never \
                 be asked to prove themselves",
            ),
            (
                "[fanout]\nring_bytes = 32768",
                "/etc/f.toml:2: fanout.ring_bytes = 32768 is below 32960: two frames of the largest size must fit",
            ),
            (
                "[tls]\ncertificate = \"c.pem\"",
                "/etc/f.toml:2: tls.certificate is set but tls.key is not: name the file of its private key",
            ),
            (
                "[tls]\nkey = \"c.pem\"",
                "/etc/f.toml:2: tls.key is set but tls.certificate is not: name the file of its chain",
            ),
            (
                "[listen]\naddress = ",
                "/etc/f.toml:2: not TOML: string values must be quoted, expected literal string; `fulmar serve \
                 --print-config` shows a whole file",
            ),
            (
                "[log]\nfilter = \"a\"\nfilter = \"b\"",
                "/etc/f.toml:3: not TOML: duplicate key; `fulmar serve --print-config` shows a whole file",
            ),
        ] {
            assert_eq!(read(text), Err(want.to_owned()), "for\n{text}");
        }
    }

    #[test]
    fn the_environment_overrides_the_file_and_flags_override_both() {
        let file = "[data]\nshards = 2\ntail_cache_mib = 100\n[drain]\ndeadline_s = 5\n";
        let env = [
            ("FULMAR_DATA_TAIL_CACHE_MIB", "200"),
            ("FULMAR_DRAIN_DEADLINE_S", "6"),
            ("FULMAR_LISTEN_PUBLIC_ADDRESSES", "a.example:1, [::1]:2"),
            ("FULMAR_TRANSPORT_MTU_DISCOVERY", "true"),
            ("FULMAR_SERVER", "belongs to another command"),
            ("PATH", "/bin"),
        ];
        let env = env.map(|(k, v)| (k.to_owned(), v.to_owned()));
        let flags = [
            Assignment::set("drain.deadline_s=7").unwrap(),
            Assignment::flag("--data", "data", "path", "here"),
        ];
        let config = Config::assemble(Some((Path::new("/etc/f.toml"), file)), &env, &flags).unwrap();
        assert_eq!((config.data.shards, config.data.tail_cache_mib, config.drain.deadline_s), (2, 200, 7));
        assert_eq!(config.listen.public_addresses, ["a.example:1", "[::1]:2"]);
        assert!(config.transport.mtu_discovery);
        assert_eq!(config.data.path, Path::new("here"));
        assert_eq!(config.apps, [demo_app()]);
    }

    #[test]
    fn bad_variables_and_flags_are_named() {
        let env = |name: &str, text: &str| {
            let env = [(name.to_owned(), text.to_owned())];
            Config::assemble(None, &env, &[]).unwrap_err().to_string()
        };
        let set = |text: &str| match Assignment::set(text) {
            Ok(flag) => Config::assemble(None, &[], &[flag]).unwrap_err().to_string(),
            Err(e) => e.to_string(),
        };
        for (got, want) in [
            (
                env("FULMAR_LISTEN_ADRESS", "x"),
                "environment variable FULMAR_LISTEN_ADRESS: [listen] has no key \"adress\"; did you mean \"address\"?",
            ),
            (
                env("FULMAR_DATA_SHARDS", "many"),
                "environment variable FULMAR_DATA_SHARDS: data.shards = \"many\": expected a number from 1 to 256",
            ),
            (
                env("FULMAR_LISTEN_HTTP_ADDRESS", "no"),
                "environment variable FULMAR_LISTEN_HTTP_ADDRESS: listen.http_address = \"no\": expected an address and \
                 port, such as \"127.0.0.1:4480\", or \"off\"",
            ),
            (
                set("data.shards=0"),
                "flag --set data.shards: data.shards = 0: expected a number from 1 to 256",
            ),
            (set("dta.shards=1"), "flag --set dta.shards: there is no section [dta]; did you mean [data]?"),
            (
                set("data"),
                "flag --set: \"data\": expected section.key=value, such as --set fanout.ring_frames=512",
            ),
        ] {
            assert_eq!(got, want);
        }
    }

    #[test]
    fn a_file_that_can_not_be_read_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("none.toml");
        let binary = folder.path().join("binary.toml");
        std::fs::write(&binary, [0xff, 0xfe]).unwrap();
        for (path, want) in [
            (
                missing,
                "there is no such file: leave out --config to use the defaults, or write one with `fulmar serve \
                 --print-config`",
            ),
            (binary, "it is not UTF-8 text: TOML must be"),
            (folder.path().to_owned(), "it is a folder: name the file, such as fulmar.toml in it"),
        ] {
            let error = Config::load(Some(&path), &[]).unwrap_err();
            assert_eq!(error.to_string(), format!("{}: {want}", path.display()));
        }
    }

    #[test]
    fn the_data_folder_s_own_file_is_found() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE_NAME), "[data]\ntail_cache_mib = 77\n").unwrap();
        let flag = Assignment::flag("--data", "data", "path", folder.path().display().to_string());
        assert_eq!(Config::load(None, &[flag]).unwrap().data.tail_cache_mib, 77);
    }

    #[test]
    fn paths_are_relative_to_the_file() {
        let text = "[data]\npath = \"d\"\n[tls]\ncertificate = \"c.pem\"\nkey = \"/k.pem\"\n[[app]]\nname = \"a\"\n\
                    keys = [{ kid = \"1\", file = \"a.pem\" }]";
        let config = read(text).unwrap();
        assert_eq!(config.data.path, Path::new("/etc/d"));
        assert_eq!(config.tls.certificate.as_deref(), Some(Path::new("/etc/c.pem")));
        assert_eq!(config.tls.key.as_deref(), Some(Path::new("/k.pem")));
        assert_eq!(config.apps.first().unwrap().keys.first().unwrap().file, Path::new("/etc/a.pem"));
    }
}
