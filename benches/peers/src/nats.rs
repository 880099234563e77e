//! A client of NATS, and as much of JetStream's interface as the work takes.
//!
//! - Without JetStream nothing is acked: who publishes hears nothing more of it.
//! - With it, a message is published with an address for the answer, which is the ack; receivers have a push consumer each, whose messages
//!   they acknowledge.
//! - What the server says is bounded, and what can't be read is an error.

use anyhow::{Context as _, bail, ensure};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use serde_json::{Value, json};

use crate::{client::Seen, wire::Wire};

/// The longest line taken from a server, and the longest message.
const LINE_BYTES_MAX: usize = 64 * 1024;

/// The one stream with all messages.
const STREAM: &str = "PEERS";

/// What clients publish to begins so; the rest is theirs.
pub(crate) const SUBJECTS: &str = "m";

/// How a push consumer's messages are addressed: the name of the consumer follows.
const DELIVERED: &str = "d";

/// Number of the subscription whose messages are for us to read, and of the one with answers.
const MESSAGES: u64 = 1;
const ANSWERS: u64 = 2;

/// What the server says, as far as it needs to be told apart.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Said {
    Message { subscription: u64, subject: String, reply: Option<String>, payload: Bytes },
    Ping,
    Pong,
    Error(String),
    Other,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Nats {
    wire: Wire,
    /// Where answers to this client go; empty without JetStream.
    inbox: String,
    number: u64,
}

impl Nats {
    /// Connects; with `jetstream`, publishing is acked.
    ///
    /// # Errors
    /// It was not let in.
    pub(crate) async fn connect(wire: Wire, name: &str, jetstream: bool) -> anyhow::Result<Self> {
        let inbox = if jetstream { format!("_INBOX.{name}") } else { String::new() };
        let mut client = Self { wire, inbox, number: 0 };
        let hello = json!({
            "verbose": false, "pedantic": false, "tls_required": true, "name": name, "lang": "rust", "version": "1",
            "protocol": 1, "echo": true,
        });
        client.line(&format!("CONNECT {hello}"));
        if jetstream {
            client.line(&format!("SUB {}.* {ANSWERS}", client.inbox));
        }
        client.settle().await?;
        Ok(client)
    }

    fn line(&mut self, line: &str) {
        self.wire.output.put_slice(line.as_bytes());
        self.wire.output.put_slice(b"\r\n");
    }

    /// Waits until the server has taken what was said before.
    async fn settle(&mut self) -> anyhow::Result<()> {
        self.line("PING");
        loop {
            match self.said().await? {
                Said::Pong => return Ok(()),
                Said::Error(error) => bail!("the server said: {error}"),
                Said::Ping => self.line("PONG"),
                _ => {}
            }
        }
    }

    /// Receives what is published to `topic`, from now on.
    ///
    /// # Errors
    /// The server refused.
    pub(crate) async fn subscribe(&mut self, topic: &str) -> anyhow::Result<()> {
        self.line(&format!("SUB {SUBJECTS}.{topic} {MESSAGES}"));
        self.settle().await
    }

    /// Receives what the consumer `name` has for us, now and from now on.
    ///
    /// # Errors
    /// The server refused.
    pub(crate) async fn attach(&mut self, name: &str) -> anyhow::Result<()> {
        self.line(&format!("SUB {DELIVERED}.{name} {MESSAGES}"));
        self.settle().await
    }

    /// Makes the stream.
    ///
    /// # Errors
    /// The server refused.
    pub(crate) async fn make_stream(&mut self) -> anyhow::Result<()> {
        let body = json!({
            "name": STREAM, "subjects": [format!("{SUBJECTS}.>")], "storage": "file", "retention": "limits", "num_replicas": 1,
            "max_consumers": -1,
        });
        self.ask(&format!("$JS.API.STREAM.CREATE.{STREAM}"), &body).await
    }

    /// Makes a durable push consumer of `topic`, called `name`, and attaches to it.
    ///
    /// # Errors
    /// The server refused.
    pub(crate) async fn make_consumer(&mut self, name: &str, topic: &str) -> anyhow::Result<()> {
        let body = json!({ "stream_name": STREAM, "config": {
            "durable_name": name, "deliver_subject": format!("{DELIVERED}.{name}"), "filter_subject": format!("{SUBJECTS}.{topic}"),
            "ack_policy": "explicit", "deliver_policy": "new", "max_ack_pending": 65_536,
        }});
        self.ask(&format!("$JS.API.CONSUMER.DURABLE.CREATE.{STREAM}.{name}"), &body).await?;
        self.attach(name).await
    }

    async fn ask(&mut self, subject: &str, body: &Value) -> anyhow::Result<()> {
        let body = body.to_string();
        self.number += 1;
        let line = format!("PUB {subject} {}.{} {}", self.inbox, self.number, body.len());
        self.line(&line);
        self.line(&body);
        loop {
            match self.said().await? {
                Said::Message { subscription: ANSWERS, payload, .. } => {
                    let answer: Value =
                        serde_json::from_slice(&payload).context("the answer can't be read")?;
                    ensure!(answer.get("error").is_none(), "{subject}: {answer}");
                    return Ok(());
                }
                Said::Error(error) => bail!("the server said: {error}"),
                Said::Ping => self.line("PONG"),
                _ => {}
            }
        }
    }

    /// Queues a message; it leaves in [`Self::next`]. The number it is acked by, if it is.
    pub(crate) fn post(&mut self, topic: &str, payload: &[u8]) -> u64 {
        self.number += 1;
        let line = if self.inbox.is_empty() {
            format!("PUB {SUBJECTS}.{topic} {}", payload.len())
        } else {
            format!("PUB {SUBJECTS}.{topic} {}.{} {}", self.inbox, self.number, payload.len())
        };
        self.line(&line);
        self.wire.output.put_slice(payload);
        self.wire.output.put_slice(b"\r\n");
        self.number
    }

    /// What happens next.
    ///
    /// # Errors
    /// The connection ended, or the server said that something is wrong.
    pub(crate) async fn next(&mut self) -> anyhow::Result<Seen> {
        Ok(match self.said().await? {
            Said::Message { subscription: ANSWERS, subject, payload, .. } => {
                ensure!(
                    !payload.windows(7).any(|word| word == b"\"error\""),
                    "a message was refused: {payload:?}"
                );
                let number = subject.rsplit('.').next().and_then(|number| number.parse().ok());
                Seen::Acked(number.context("an ack without a number")?)
            }
            Said::Message { reply, payload, .. } => {
                if let Some(reply) = reply {
                    self.line(&format!("PUB {reply} 4"));
                    self.line("+ACK");
                }
                Seen::Message(payload)
            }
            Said::Error(error) => bail!("the server said: {error}"),
            Said::Ping => {
                self.line("PONG");
                Seen::Nothing
            }
            Said::Pong | Said::Other => Seen::Nothing,
        })
    }

    async fn said(&mut self) -> anyhow::Result<Said> {
        loop {
            if let Some(said) = take(&mut self.wire.input)? {
                return Ok(said);
            }
            self.wire.more().await?;
        }
    }
}

/// Takes the first whole thing off `bytes`; `None`: more must come.
fn take(bytes: &mut BytesMut) -> anyhow::Result<Option<Said>> {
    let Some(end) = bytes.windows(2).take(LINE_BYTES_MAX).position(|two| two == b"\r\n") else {
        ensure!(bytes.len() < LINE_BYTES_MAX, "a line has no end");
        return Ok(None);
    };
    let line = bytes.get(..end).unwrap_or_default();
    let line = core::str::from_utf8(line).context("a line that is no text")?;
    let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
    let has_headers = word.eq_ignore_ascii_case("HMSG");
    if !has_headers && !word.eq_ignore_ascii_case("MSG") {
        let said = match word {
            word if word.eq_ignore_ascii_case("PING") => Said::Ping,
            word if word.eq_ignore_ascii_case("PONG") => Said::Pong,
            "-ERR" => Said::Error(rest.to_owned()),
            _ => Said::Other,
        };
        bytes.advance(end + 2);
        return Ok(Some(said));
    }
    // MSG subject subscription [reply] bytes, or HMSG subject subscription [reply] header-bytes bytes.
    let words: Vec<&str> = rest.split_ascii_whitespace().collect();
    let short = "a MSG without its numbers";
    let total: usize = words.last().context(short)?.parse().context(short)?;
    ensure!(total <= LINE_BYTES_MAX, "a message of {total} bytes");
    let fixed = if has_headers { 4 } else { 3 };
    let header: usize =
        if has_headers { words.iter().rev().nth(1).context(short)?.parse().context(short)? } else { 0 };
    ensure!(words.len() >= fixed && header <= total, "{short}");
    let subject = (*words.first().context(short)?).to_owned();
    let subscription = words.get(1).context(short)?.parse().context(short)?;
    let reply = if words.len() > fixed { words.get(2).map(|reply| (*reply).to_owned()) } else { None };
    if bytes.len() < end + 2 + total + 2 {
        return Ok(None);
    }
    bytes.advance(end + 2);
    let mut payload = bytes.split_to(total).freeze();
    bytes.advance(2);
    payload.advance(header);
    Ok(Some(Said::Message { subscription, subject, reply, payload }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(reply: Option<&str>, payload: &'static [u8]) -> Said {
        let reply = reply.map(str::to_owned);
        Said::Message {
            subscription: 7,
            subject: "m.a".to_owned(),
            reply,
            payload: Bytes::from_static(payload),
        }
    }

    #[test]
    fn what_the_server_says_is_read_piece_by_piece() {
        let said = b"INFO {}\r\nMSG m.a 7 2\r\nhi\r\nPING\r\nMSG m.a 7 $JS.ACK.x 0\r\n\r\nHMSG m.a 7 r 12 15\r\nNATS/1.0\r\n\r\nabc\r\n\
                     +OK\r\nPONG\r\n-ERR 'no'\r\n";
        let mut bytes = BytesMut::new();
        let mut seen = Vec::new();
        for byte in said {
            bytes.put_u8(*byte);
            while let Some(said) = take(&mut bytes).unwrap() {
                seen.push(said);
            }
        }
        let want = [
            Said::Other,
            message(None, b"hi"),
            Said::Ping,
            message(Some("$JS.ACK.x"), b""),
            message(Some("r"), b"abc"),
            Said::Other,
            Said::Pong,
            Said::Error("'no'".to_owned()),
        ];
        assert_eq!(seen, want);
        assert!(bytes.is_empty());
    }

    #[test]
    fn what_can_not_be_read_is_an_error() {
        for bad in [
            &b"MSG\r\n"[..],
            b"MSG a 1\r\n",
            b"MSG a x 1\r\n",
            b"MSG a 1 99999999\r\n",
            b"HMSG a 1 9 3\r\n",
            b"HMSG a 1 3\r\n",
            b"\xff\xfe\r\n",
        ] {
            assert!(take(&mut BytesMut::from(bad)).is_err(), "{bad:?}");
        }
        assert!(take(&mut BytesMut::from(&[b'a'; LINE_BYTES_MAX][..])).is_err());
    }
}
