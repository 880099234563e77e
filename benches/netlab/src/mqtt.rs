//! As much MQTT 3.1.1 as the work takes: connect, subscribe, publish with QoS 1, acknowledge; over TLS 1.3 and TCP.
//!
//! - Made to be good to the broker: no Nagle delay, one write per packet, any number of messages in flight, no
//!   keep-alive traffic, no database behind it.
//! - It does not reconnect: a connection that ends fails the cell. (200 ms of darkness end none.)
//! - Packets from the broker are bounded, and what can't be read is an error.

use std::{collections::HashMap, net::SocketAddr, path::Path, sync::Arc};

use anyhow::{Context as _, bail};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
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

/// Largest packet taken from a broker: many times what is sent here.
const PACKET_BYTES_MAX: usize = 64 * 1024;

/// How long a broker may take to let somebody in.
const PATIENCE: Duration = Duration::from_secs(20);

/// A packet from the broker, as far as the work needs to tell them apart.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Packet {
    Connected { code: u8 },
    Subscribed { code: u8 },
    Published { id: Option<u16>, payload: Bytes },
    Acked { id: u16 },
    Other,
}

fn put_packet(kind: u8, body: &[u8], to: &mut BytesMut) {
    to.put_u8(kind);
    let mut length = body.len();
    loop {
        let low = u8::try_from(length & 0x7f).unwrap_or_default();
        length >>= 7;
        to.put_u8(if length == 0 { low } else { low | 0x80 });
        if length == 0 {
            break;
        }
    }
    to.put_slice(body);
}

fn put_text(text: &str, to: &mut Vec<u8>) {
    let length = u16::try_from(text.len()).unwrap_or(u16::MAX);
    to.put_u16(length);
    to.extend(text.bytes().take(length.into()));
}

fn connect(client: &str) -> BytesMut {
    let mut body = Vec::new();
    put_text("MQTT", &mut body);
    // Version 3.1.1, a clean session, no keep-alive.
    body.extend([4, 0b10, 0, 0]);
    put_text(client, &mut body);
    let mut packet = BytesMut::new();
    put_packet(0x10, &body, &mut packet);
    packet
}

fn subscribe(topic: &str) -> BytesMut {
    let mut body = vec![0, 1];
    put_text(topic, &mut body);
    body.push(1);
    let mut packet = BytesMut::new();
    put_packet(0x82, &body, &mut packet);
    packet
}

fn publish(topic: &str, id: u16, payload: &[u8]) -> BytesMut {
    let mut body = Vec::new();
    put_text(topic, &mut body);
    body.put_u16(id);
    body.extend(payload);
    let mut packet = BytesMut::new();
    put_packet(0x32, &body, &mut packet);
    packet
}

fn acknowledge(id: u16) -> BytesMut {
    let mut packet = BytesMut::new();
    put_packet(0x40, &id.to_be_bytes(), &mut packet);
    packet
}

/// Takes the first whole packet off `bytes`; `None`: more must come.
fn take_packet(bytes: &mut BytesMut) -> anyhow::Result<Option<Packet>> {
    let Some(&kind) = bytes.first() else { return Ok(None) };
    let mut length = 0;
    let mut header = 1;
    loop {
        let Some(&byte) = bytes.get(header) else { return Ok(None) };
        anyhow::ensure!(header <= 4, "a packet's length has no end");
        length |= usize::from(byte & 0x7f) << (7 * (header - 1));
        header += 1;
        if byte & 0x80 == 0 {
            break;
        }
    }
    anyhow::ensure!(length <= PACKET_BYTES_MAX, "a packet of {length} bytes");
    if bytes.len() < header + length {
        return Ok(None);
    }
    bytes.advance(header);
    let mut body = bytes.split_to(length).freeze();
    let short = "a packet ends too early";
    let packet = match kind >> 4 {
        2 => Packet::Connected { code: *body.get(1).context(short)? },
        9 => Packet::Subscribed { code: *body.get(2).context(short)? },
        4 => Packet::Acked { id: body.try_get_u16().context(short)? },
        3 => {
            let topic = usize::from(body.try_get_u16().context(short)?);
            anyhow::ensure!(topic <= body.len(), "{short}");
            body.advance(topic);
            let id = match kind & 0b110 {
                0 => None,
                _ => Some(body.try_get_u16().context(short)?),
            };
            Packet::Published { id, payload: body }
        }
        _ => Packet::Other,
    };
    Ok(Some(packet))
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
        client.write(&connect(name)).await?;
        match client.read().await? {
            Packet::Connected { code: 0 } => Ok(client),
            other => bail!("the broker answered a CONNECT with {other:?}"),
        }
    }

    async fn subscribe(&mut self, topic: &str) -> anyhow::Result<()> {
        self.write(&subscribe(topic)).await?;
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
                client.write(&publish(topic, id, &payload(log.pair(), planned.index))).await?;
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
                    client.write(&acknowledge(id)).await?;
                }
            }
            other => bail!("the broker told a receiver {other:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_as_the_standard_shows_them() {
        assert_eq!(&connect("ab")[..], b"\x10\x0e\x00\x04MQTT\x04\x02\x00\x00\x00\x02ab");
        assert_eq!(&subscribe("a/b")[..], b"\x82\x08\x00\x01\x00\x03a/b\x01");
        assert_eq!(&publish("a", 10, b"hi")[..], b"\x32\x07\x00\x01a\x00\x0ahi");
        assert_eq!(&acknowledge(0x1234)[..], b"\x40\x02\x12\x34");
        let long = publish("a", 1, &[7; 200]);
        assert_eq!(&long[..3], &[0x32, 0xcd, 0x01]);
    }

    #[test]
    fn what_the_broker_says_is_read_piece_by_piece() {
        let mut said = BytesMut::from(&b"\x20\x02\x00\x00\x90\x03\x00\x01\x01\x40\x02\x00\x07"[..]);
        said.extend(publish("p/1", 9, &[5; 128]));
        said.extend(b"\x30\x04\x00\x01ax\xd0\x00");
        let mut bytes = BytesMut::new();
        let mut seen = Vec::new();
        for byte in said {
            bytes.put_u8(byte);
            while let Some(packet) = take_packet(&mut bytes).unwrap() {
                seen.push(packet);
            }
        }
        let want = [
            Packet::Connected { code: 0 },
            Packet::Subscribed { code: 1 },
            Packet::Acked { id: 7 },
            Packet::Published { id: Some(9), payload: Bytes::from_static(&[5; 128]) },
            Packet::Published { id: None, payload: Bytes::from_static(b"x") },
            Packet::Other,
        ];
        assert_eq!(seen, want);
        assert!(bytes.is_empty());
    }

    #[test]
    fn what_can_not_be_read_is_an_error() {
        for bad in [
            &b"\x30\xff\xff\xff\xff\xff"[..],
            b"\x30\xff\xff\xff\x7f",
            b"\x20\x01\x00",
            b"\x90\x02\x00\x01",
            b"\x40\x01\x00",
            b"\x30\x02\x00\x09",
            b"\x32\x03\x00\x01a",
        ] {
            assert!(take_packet(&mut BytesMut::from(bad)).is_err(), "{bad:?}");
        }
    }
}
