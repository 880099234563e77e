//! A client of an MQTT broker: publishes and receives with QoS 1, acknowledges what it receives in the write that comes next.
//!
//! Not here: packets (`fulmar_benches::mqtt`), reconnecting (`client`).

use anyhow::bail;
use fulmar_benches::mqtt::{Packet, acknowledge, connect, publish, subscribe, take_packet};

use crate::{client::Seen, wire::Wire};

/// Unacked PUBLISHes at the most: there are 65 535 numbers for them.
const UNACKED_MAX: u32 = 60_000;

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Mqtt {
    wire: Wire,
    id: u16,
    unacked: u32,
}

impl Mqtt {
    /// Connects; whether the broker knew the session.
    ///
    /// # Errors
    /// It was not let in.
    pub(crate) async fn connect(mut wire: Wire, name: &str, clean: bool) -> anyhow::Result<(Self, bool)> {
        connect(name, clean, &mut wire.output);
        let mut client = Self { wire, id: 0, unacked: 0 };
        match client.packet().await? {
            Packet::Connected { code: 0, present } => Ok((client, present)),
            other => bail!("the broker answered a CONNECT with {other:?}"),
        }
    }

    /// Subscribes with QoS 1.
    ///
    /// # Errors
    /// It was not granted.
    pub(crate) async fn subscribe(&mut self, topic: &str) -> anyhow::Result<()> {
        subscribe(topic, &mut self.wire.output);
        match self.packet().await? {
            Packet::Subscribed { code: 1 } => Ok(()),
            other => bail!("the broker answered a SUBSCRIBE with {other:?}"),
        }
    }

    async fn packet(&mut self) -> anyhow::Result<Packet> {
        loop {
            if let Some(packet) = take_packet(&mut self.wire.input)? {
                return Ok(packet);
            }
            self.wire.more().await?;
        }
    }

    /// Queues a message; it leaves in [`Self::next`]. The number it is acked by, `None`: no room now.
    pub(crate) fn post(&mut self, topic: &str, payload: &[u8]) -> Option<u64> {
        if self.unacked >= UNACKED_MAX {
            return None;
        }
        // 0 is no number.
        self.id = self.id.checked_add(1).unwrap_or(1);
        self.unacked += 1;
        publish(topic, self.id, payload, &mut self.wire.output);
        Some(self.id.into())
    }

    /// What happens next.
    ///
    /// # Errors
    /// The connection ended, or the broker broke the protocol.
    pub(crate) async fn next(&mut self) -> anyhow::Result<Seen> {
        Ok(match self.packet().await? {
            Packet::Published { id, payload } => {
                if let Some(id) = id {
                    acknowledge(id, &mut self.wire.output);
                }
                Seen::Message(payload)
            }
            Packet::Acked { id } => {
                self.unacked = self.unacked.saturating_sub(1);
                Seen::Acked(id.into())
            }
            _ => Seen::Nothing,
        })
    }
}
