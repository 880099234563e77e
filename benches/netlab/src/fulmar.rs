//! The pairs as the SDK's clients of a gateway.
//!
//! - Each client is a device of its own with a database in memory, its own socket and its own connection.
//! - Both ends have the conversation on screen, as two people who talk do.
//! - The receiver's time is when the message comes out of [`Messages::next`]: stored in the client's database and handed
//!   to the app.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use fulmar_client::{Client, Conversation, Messages, Options, Trust, in_memory};
use fulmar_gateway::{
    config::{DEMO_APP, DEV_ISSUER},
    data_folder::{DevKey, open_dev_key},
    identity::token::{Mint, mint},
};
use fulmar_protocol::id::UnixMillis;
use tokio::{task::JoinSet, time::timeout};

use crate::{
    measure::Log,
    plan::{Planned, payload},
};

/// How long a client may take until it is live.
const PATIENCE: Duration = Duration::from_secs(20);

/// A sender and its receiver.
#[derive(Debug)]
pub(crate) struct Pair {
    talker: Client,
    to: Conversation,
    listener: Client,
    messages: Messages,
}

/// Connects all pairs, several at a time.
///
/// # Errors
/// One was not let in.
pub(crate) async fn connect_all(address: &str, folder: &Path, pairs: u32) -> anyhow::Result<Vec<Pair>> {
    let key = Arc::new(open_dev_key(folder)?);
    let mut connecting = JoinSet::new();
    for number in 0..pairs {
        let (key, address, folder) = (Arc::clone(&key), address.to_owned(), folder.to_owned());
        connecting.spawn(async move {
            let both = pair(&key, &address, &folder, number);
            let pair = timeout(PATIENCE, both).await.context("the gateway is silent")??;
            anyhow::Ok((number, pair))
        });
    }
    let mut connected = Vec::new();
    while let Some(pair) = connecting.join_next().await {
        connected.push(pair??);
    }
    connected.sort_by_key(|(number, _)| *number);
    Ok(connected.into_iter().map(|(_, pair)| pair).collect())
}

async fn pair(key: &DevKey, address: &str, folder: &Path, number: u32) -> anyhow::Result<Pair> {
    let (talks, listens) = (format!("talker-{number}"), format!("listener-{number}"));
    let listener = client(key, address, folder, &listens).await?;
    let talker = client(key, address, folder, &talks).await?;
    let to = talker.direct(&listens).await?;
    to.on_screen().await?;
    listener.direct(&talks).await?.on_screen().await?;
    let messages = listener.messages();
    Ok(Pair { talker, to, listener, messages })
}

async fn client(key: &DevKey, address: &str, folder: &Path, user: &str) -> anyhow::Result<Client> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
    let now = UnixMillis::new(u64::try_from(now)?).context("the clock is beyond the end of time")?;
    let token = mint(key, Mint { app: DEMO_APP, issuer: DEV_ISSUER, user, ttl_s: 3_600 }, now)?;
    let options = Options::new(in_memory(), address, "localhost", token)
        .trust(Trust::CertificateFile(folder.join("tls/cert.pem")));
    let client = Client::connect(options).await?;
    let mut states = client.state();
    anyhow::ensure!(states.live().await, "{user} was refused: {:?}", states.current());
    Ok(client)
}

impl Pair {
    /// Sends and receives until it is dropped.
    pub(crate) async fn play(self, plan: Vec<Planned>, log: Arc<Log>) {
        let Self { talker, to, listener, messages } = self;
        let talking = talk(&to, &plan, &log);
        let listening = listen(messages, &log);
        if let Err(error) = tokio::try_join!(talking, listening) {
            log.failed(&format!(
                "{error:#}, {:?}, {:?}",
                talker.state().current(),
                listener.state().current()
            ));
        }
    }

    /// Looks at how often the two connected, when all is over.
    pub(crate) fn clients(&self) -> [Client; 2] {
        [self.talker.clone(), self.listener.clone()]
    }
}

async fn talk(to: &Conversation, plan: &[Planned], log: &Arc<Log>) -> anyhow::Result<()> {
    let mut acks = JoinSet::new();
    for planned in plan {
        let due = log.zero().instant() + planned.due;
        tokio::time::sleep_until(tokio::time::Instant::from_std(due)).await;
        log.handed(planned.index);
        let handle = to.send(payload(log.pair(), planned.index)).await?;
        let (log, index) = (Arc::clone(log), planned.index);
        acks.spawn(async move {
            handle.acked().await?;
            log.acked(index);
            anyhow::Ok(())
        });
        // Those that have come need not be kept.
        while let Some(acked) = acks.try_join_next() {
            acked??;
        }
    }
    while let Some(acked) = acks.join_next().await {
        acked??;
    }
    Ok(())
}

async fn listen(mut messages: Messages, log: &Log) -> anyhow::Result<()> {
    while let Some(message) = messages.next().await {
        if !message.own && message.kind == fulmar_client::RecordKind::Message {
            log.read(&message.payload, Some(message.time.get()));
        }
    }
    anyhow::bail!("the receiver's messages ended")
}
