//! As much MQTT 3.1.1 as the work takes: connect, subscribe, publish with QoS 1, acknowledge; over TLS 1.3 and TCP.
//!
//! - Made to be good to the broker: no Nagle delay, one write per packet, any number of messages in flight, no
//!   keep-alive traffic, no database behind it.
//! - It does not reconnect: a connection that ends fails the cell. (200 ms of darkness end none.)
//!
//! Not here: how packets are written (`fulmar_benches::mqtt`).

use std::{collections::HashMap, net::SocketAddr, path::Path, sync::Arc};

use anyhow::{Context as _, bail};
use bytes::BytesMut;
use fulmar_benches::mqtt::{Packet, acknowledge, connect, publish, subscribe, take_packet};
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::{Duration, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{
    measure::Log,
    plan::{Planned, payload},
};

/// How long a broker may take to let somebody in.
const PATIENCE: Duration = Duration::from_secs(20);

fn made(make: impl FnOnce(&mut BytesMut)) -> BytesMut {
    let mut packet = BytesMut::new();
    make(&mut packet);
    packet
}

/// A connection to the broker.
#[derive(Debug)]
struct Client {
    stream: TlsStream<TcpStream>,
    bytes: BytesMut,
}

impl Client {
    async fn connect(broker: SocketAddr, tls: &TlsConnector, name: &str) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(broker).await.context("TCP")?;
        stream.set_nodelay(true)?;
        let server = ServerName::IpAddress(broker.ip().into());
        let stream = tls.connect(server, stream).await.context("TLS")?;
        let mut client = Self { stream, bytes: BytesMut::new() };
        client.write(&made(|to| connect(name, true, to))).await?;
        match client.read().await? {
            Packet::Connected { code: 0, .. } => Ok(client),
            other => bail!("the broker answered a CONNECT with {other:?}"),
        }
    }

    async fn subscribe(&mut self, topic: &str) -> anyhow::Result<()> {
        self.write(&made(|to| subscribe(topic, to))).await?;
        match self.read().await? {
            Packet::Subscribed { code: 1 } => Ok(()),
            other => bail!("the broker answered a SUBSCRIBE with {other:?}"),
        }
    }

    async fn write(&mut self, packet: &[u8]) -> anyhow::Result<()> {
        self.stream.write_all(packet).await?;
        Ok(self.stream.flush().await?)
    }

    /// Nothing is lost when the future is dropped.
    async fn read(&mut self) -> anyhow::Result<Packet> {
        loop {
            if let Some(packet) = take_packet(&mut self.bytes)? {
                return Ok(packet);
            }
            anyhow::ensure!(
                self.stream.read_buf(&mut self.bytes).await? > 0,
                "the broker ended the connection"
            );
        }
    }
}

/// A sender and its receiver.
#[derive(Debug)]
pub(crate) struct Pair {
    talker: Client,
    listener: Client,
    topic: String,
}

/// Connects all pairs, several at a time.
///
/// # Errors
/// One was not let in.
pub(crate) async fn connect_all(
    broker: SocketAddr,
    certificate: &Path,
    pairs: u32,
) -> anyhow::Result<Vec<Pair>> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(certificate).context("the broker's certificate")?)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tls = TlsConnector::from(Arc::new(config));
    let mut connecting = JoinSet::new();
    for number in 0..pairs {
        let tls = tls.clone();
        connecting.spawn(async move {
            let topic = format!("p/{number}");
            let both = async {
                let mut listener = Client::connect(broker, &tls, &format!("listener-{number}")).await?;
                listener.subscribe(&topic).await?;
                let talker = Client::connect(broker, &tls, &format!("talker-{number}")).await?;
                anyhow::Ok((talker, listener))
            };
            let (talker, listener) = timeout(PATIENCE, both).await.context("the broker is silent")??;
            anyhow::Ok((number, Pair { talker, listener, topic }))
        });
    }
    let mut connected = Vec::new();
    while let Some(pair) = connecting.join_next().await {
        connected.push(pair??);
    }
    connected.sort_by_key(|(number, _)| *number);
    Ok(connected.into_iter().map(|(_, pair)| pair).collect())
}

impl Pair {
    /// Sends and receives until it is dropped.
    pub(crate) async fn play(self, plan: Vec<Planned>, log: Arc<Log>) {
        let talking = talk(self.talker, &self.topic, &plan, &log);
        let listening = listen(self.listener, &log);
        if let Err(error) = tokio::try_join!(talking, listening) {
            log.failed(&format!("{error:#}"));
        }
    }
}

async fn talk(mut client: Client, topic: &str, plan: &[Planned], log: &Log) -> anyhow::Result<()> {
    let mut left = plan.iter();
    let mut next = left.next();
    let mut in_flight: HashMap<u16, u32> = HashMap::new();
    let mut id = 0u16;
    loop {
        let due = next.map(|planned| tokio::time::Instant::from_std(log.zero().instant() + planned.due));
        tokio::select! {
            () = tokio::time::sleep_until(due.unwrap_or_else(tokio::time::Instant::now)), if due.is_some() => {
                let Some(planned) = next else { continue };
                // 0 is no packet id.
                id = id.checked_add(1).unwrap_or(1);
                in_flight.insert(id, planned.index);
                log.handed(planned.index);
                let payload = payload(log.pair(), planned.index);
                client.write(&made(|to| publish(topic, id, &payload, to))).await?;
                next = left.next();
            }
            packet = client.read() => match packet? {
                Packet::Acked { id } => {
                    if let Some(index) = in_flight.remove(&id) {
                        log.acked(index);
                    }
                }
                other => bail!("the broker told a sender {other:?}"),
            },
        }
    }
}

async fn listen(mut client: Client, log: &Log) -> anyhow::Result<()> {
    loop {
        match client.read().await? {
            Packet::Published { id, payload } => {
                log.read(&payload, None);
                if let Some(id) = id {
                    client.write(&made(|to| acknowledge(id, to))).await?;
                }
            }
            other => bail!("the broker told a receiver {other:?}"),
        }
    }
}
