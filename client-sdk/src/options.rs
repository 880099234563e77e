//! What a client is made from.

use std::{future::Future, path::PathBuf, pin::Pin, sync::Arc};

use fulmar_protocol::{frame::NetworkHint, id::DeviceClass};

use crate::platform::{Platform, System};

/// Where the client keeps its outbox, cursors and messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Database {
    /// A SQLite file, made when there is none. One per user and device: it *is* the device to the gateway.
    File(PathBuf),
    /// In memory: everything is forgotten with the client, and the next one is a new device.
    Memory,
}

/// A database in memory, see [`Database::Memory`].
#[must_use]
pub const fn in_memory() -> Database {
    Database::Memory
}

impl From<&str> for Database {
    fn from(path: &str) -> Self {
        Self::File(path.into())
    }
}

impl From<String> for Database {
    fn from(path: String) -> Self {
        Self::File(path.into())
    }
}

impl From<&std::path::Path> for Database {
    fn from(path: &std::path::Path) -> Self {
        Self::File(path.into())
    }
}

impl From<PathBuf> for Database {
    fn from(path: PathBuf) -> Self {
        Self::File(path)
    }
}

/// What a promise of the database survives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// Sends and received messages are synced to the disk before they count (`synchronous = FULL` in WAL mode). One
    /// sync covers all that waits at that time.
    #[default]
    PowerLoss,
    /// They survive a killed app, but a power cut may take the last moments back (`synchronous = NORMAL`): messages
    /// are then received twice, and a send whose number was used already is refused as a conflict.
    AppKill,
}

/// Whose certificates the client believes. There is no way to believe all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// The certificates (CAs, or the gateway's own self-signed one) in this PEM or DER file.
    CertificateFile(PathBuf),
    /// The same, from memory: PEM or DER bytes.
    Certificate(Vec<u8>),
}

/// A future the app gives to the SDK.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;
type Provider = dyn Fn() -> BoxFuture<Result<String, Box<dyn std::error::Error + Send + Sync>>> + Send + Sync;

/// The business's proof of who the user is.
#[derive(Clone)]
pub enum Token {
    /// One token for as long as the client lives.
    Fixed(String),
    /// Asked whenever a token is needed: at the first connect, when a ticket is not accepted, when one expired.
    Provider(Arc<Provider>),
}

impl Token {
    /// A token from an async closure.
    ///
    /// ```
    /// let token = fulmar_client::Token::provider(|| async {
    ///     Ok("a JWT fetched from your own back end".to_owned())
    /// });
    /// # let _ = token;
    /// ```
    #[must_use]
    pub fn provider<F, R>(provider: F) -> Self
    where
        F: Fn() -> R + Send + Sync + 'static,
        R: Future<Output = Result<String, Box<dyn std::error::Error + Send + Sync>>> + Send + 'static,
    {
        Self::Provider(Arc::new(move || Box::pin(provider())))
    }
}

impl std::fmt::Debug for Token {
    /// Never prints the secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fixed(token) => write!(f, "Fixed({} bytes)", token.len()),
            Self::Provider(_) => f.write_str("Provider"),
        }
    }
}

impl From<&str> for Token {
    fn from(token: &str) -> Self {
        Self::Fixed(token.to_owned())
    }
}

impl From<String> for Token {
    fn from(token: String) -> Self {
        Self::Fixed(token)
    }
}

/// Everything [`crate::Client::connect`] needs.
#[derive(Clone, Debug)]
pub struct Options {
    pub(crate) database: Database,
    pub(crate) durability: Durability,
    pub(crate) addresses: Vec<String>,
    pub(crate) server_name: String,
    pub(crate) token: Token,
    pub(crate) trust: Option<Trust>,
    pub(crate) class: DeviceClass,
    pub(crate) network: NetworkHint,
    pub(crate) network_name: String,
    pub(crate) platform: Arc<dyn Platform>,
}

impl Options {
    /// A client of the gateway at `address` (`host:port`), whose certificate is for `server_name`.
    #[must_use]
    pub fn new(
        database: impl Into<Database>,
        address: impl Into<String>,
        server_name: impl Into<String>,
        token: impl Into<Token>,
    ) -> Self {
        Self {
            database: database.into(),
            durability: Durability::default(),
            addresses: vec![address.into()],
            server_name: server_name.into(),
            token: token.into(),
            trust: None,
            class: DeviceClass::default(),
            network: NetworkHint::default(),
            network_name: String::new(),
            platform: Arc::new(System::default()),
        }
    }

    /// Whose certificates to believe. Without it no connection succeeds.
    #[must_use]
    pub fn trust(mut self, trust: Trust) -> Self {
        self.trust = Some(trust);
        self
    }

    /// What kind of device this is; a phone unless said.
    #[must_use]
    pub const fn class(mut self, class: DeviceClass) -> Self {
        self.class = class;
        self
    }

    /// What stored things survive; a power cut unless said.
    #[must_use]
    pub const fn durability(mut self, durability: Durability) -> Self {
        self.durability = durability;
        self
    }

    /// Another address of the gateway; they are raced in this order. The gateway may name more.
    #[must_use]
    pub fn address(mut self, address: impl Into<String>) -> Self {
        self.addresses.push(address.into());
        self
    }

    /// What is known of the network at the start.
    #[must_use]
    pub const fn network(mut self, network: NetworkHint) -> Self {
        self.network = network;
        self
    }

    /// What the operating system calls the network at the start (SSID, operator). What the client learns of a network
    /// (round trip, keepalive, blocked UDP) is kept under a hash of it; the name itself is neither kept nor sent.
    #[must_use]
    pub fn network_name(mut self, name: impl Into<String>) -> Self {
        self.network_name = name.into();
        self
    }

    /// What the client stands on; the operating system unless said.
    #[must_use]
    pub fn platform(mut self, platform: Arc<dyn Platform>) -> Self {
        self.platform = platform;
        self
    }
}
