//! Packets of MQTT 3.1.1, as far as clients that measure a broker need them: connect, subscribe, publish with QoS 1, acknowledge.
//!
//! - Packets from the broker are bounded, and what can't be read is an error.
//!
//! Not here: connections (`fulmar-netlab` and `fulmar-peers` have their own).

use anyhow::Context as _;
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

/// Largest packet taken from a broker: many times what is sent here.
const PACKET_BYTES_MAX: usize = 64 * 1024;

/// A packet from the broker, as far as the work needs to tell them apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Packet {
    /// CONNACK.
    Connected {
        /// Whether the broker knows the session from before.
        present: bool,
        /// 0: let in.
        code: u8,
    },
    /// SUBACK of one topic.
    Subscribed {
        /// The QoS that was granted; 0x80: none.
        code: u8,
    },
    /// PUBLISH.
    Published {
        /// What to acknowledge; `None` with QoS 0.
        id: Option<u16>,
        /// What was published.
        payload: Bytes,
    },
    /// PUBACK.
    Acked {
        /// Of which PUBLISH.
        id: u16,
    },
    /// Anything else.
    Other,
}

/// Writes a packet of `length` bytes after its header.
fn put_header(kind: u8, mut length: usize, to: &mut BytesMut) {
    to.put_u8(kind);
    loop {
        let low = u8::try_from(length & 0x7f).unwrap_or_default();
        length >>= 7;
        to.put_u8(if length == 0 { low } else { low | 0x80 });
        if length == 0 {
            break;
        }
    }
}

/// Writes a text of up to 65 535 bytes; what is beyond is cut off.
fn put_text(text: &str, to: &mut BytesMut) {
    let length = u16::try_from(text.len()).unwrap_or(u16::MAX);
    to.put_u16(length);
    to.put_slice(text.as_bytes().get(..usize::from(length)).unwrap_or_default());
}

/// Seconds after which who was silent must say something: the most there is. Not every broker takes 0, which means never.
const KEEP_ALIVE_S: u16 = u16::MAX;

/// A CONNECT. A session that is not `clean` outlives the connection.
pub fn connect(client: &str, clean: bool, to: &mut BytesMut) {
    put_header(0x10, 12 + client.len(), to);
    put_text("MQTT", to);
    to.put_slice(&[4, if clean { 0b10 } else { 0 }]);
    to.put_u16(KEEP_ALIVE_S);
    put_text(client, to);
}

/// A SUBSCRIBE with QoS 1.
pub fn subscribe(topic: &str, to: &mut BytesMut) {
    put_header(0x82, 5 + topic.len(), to);
    to.put_u16(1);
    put_text(topic, to);
    to.put_u8(1);
}

/// A PUBLISH with QoS 1; `id` is not 0.
pub fn publish(topic: &str, id: u16, payload: &[u8], to: &mut BytesMut) {
    put_header(0x32, 4 + topic.len() + payload.len(), to);
    put_text(topic, to);
    to.put_u16(id);
    to.put_slice(payload);
}

/// A PUBACK.
pub fn acknowledge(id: u16, to: &mut BytesMut) {
    to.put_slice(&[0x40, 2]);
    to.put_u16(id);
}

/// Takes the first whole packet off `bytes`; `None`: more must come.
///
/// # Errors
/// It is too large, or ends before it should.
pub fn take_packet(bytes: &mut BytesMut) -> anyhow::Result<Option<Packet>> {
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
        2 => {
            let present = *body.first().context(short)? & 1 == 1;
            Packet::Connected { present, code: *body.get(1).context(short)? }
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_as_the_standard_shows_them() {
        let made = |make: &dyn Fn(&mut BytesMut)| {
            let mut packet = BytesMut::new();
            make(&mut packet);
            packet
        };
        assert_eq!(&made(&|to| connect("ab", false, to))[9..10], b"\x00");
        assert_eq!(
            &made(&|to| connect("ab", true, to))[..],
            b"\x10\x0e\x00\x04MQTT\x04\x02\xff\xff\x00\x02ab"
        );
        assert_eq!(&made(&|to| subscribe("a/b", to))[..], b"\x82\x08\x00\x01\x00\x03a/b\x01");
        assert_eq!(&made(&|to| publish("a", 10, b"hi", to))[..], b"\x32\x07\x00\x01a\x00\x0ahi");
        assert_eq!(&made(&|to| acknowledge(0x1234, to))[..], b"\x40\x02\x12\x34");
        let long = made(&|to| publish("a", 1, &[7; 200], to));
        assert_eq!(&long[..3], &[0x32, 0xcd, 0x01]);
    }

    #[test]
    fn what_the_broker_says_is_read_piece_by_piece() {
        let mut said = BytesMut::from(&b"\x20\x02\x00\x00\x90\x03\x00\x01\x01\x40\x02\x00\x07"[..]);
        publish("p/1", 9, &[5; 128], &mut said);
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
            Packet::Connected { present: false, code: 0 },
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
