//! `fulmar inspect`: says what frames some bytes are, field by field, and where they stop making sense.
//!
//! Nothing is trusted: the bytes may come from anywhere, of any length.

use std::fmt;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use bytes::{Buf as _, Bytes};
use clap::Args;
use fulmar_protocol::frame::{Channel, Frame, Side, StreamHeader, peek_varint};

const EXAMPLES: &str = "\
Examples:
  fulmar inspect 04260102 00                a frame as hexadecimal digits; blanks,
                                            colons and 0x do not matter
  fulmar inspect --file capture.bin         digits, or the bytes themselves
  xxd -p capture.bin | fulmar inspect -     standard input
  fulmar inspect --stream --file lane.bin   a whole stream: kind and index first

Exit code 1 if the bytes are no frames: what could be read is shown, then where
it failed.";

/// Bytes that are read at most.
const INPUT_BYTES_MAX: u64 = 64 << 20;

/// Flags of `fulmar inspect`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct InspectArgs {
    /// Hexadecimal digits, or "-" for standard input
    #[arg(value_name = "HEX", required_unless_present = "file")]
    pub hex: Vec<String>,
    /// A file, of digits or of the bytes themselves
    #[arg(short, long, value_name = "FILE", conflicts_with = "hex")]
    pub file: Option<PathBuf>,
    /// The bytes start with the header of a stream
    #[arg(short, long)]
    pub stream: bool,
    /// Print one object with all frames, and the error if there is one
    #[arg(long)]
    pub json: bool,
}

/// Decodes and prints.
///
/// # Errors
/// The input can't be read, or holds no digits.
pub fn run(args: &InspectArgs) -> anyhow::Result<ExitCode> {
    let bytes = input(args)?;
    let inspected = inspect(bytes, args.stream);
    let text = if args.json { inspected.to_json().to_string() } else { inspected.to_string() };
    super::answer(&text)?;
    Ok(ExitCode::from(u8::from(inspected.failure.is_some())))
}

fn input(args: &InspectArgs) -> anyhow::Result<Bytes> {
    if let Some(path) = &args.file {
        let file =
            std::fs::File::open(path).with_context(|| format!("{} can't be opened", path.display()))?;
        return of_file(file, path);
    }
    if let [only] = args.hex.as_slice()
        && only == "-"
    {
        return of_file(io::stdin().lock(), Path::new("standard input"));
    }
    let text = args.hex.join(" ");
    match digits(&text) {
        Ok(bytes) if bytes.is_empty() => {
            bail!("there are no digits: give some, or --file, or - for standard input")
        }
        Ok(bytes) => Ok(bytes.into()),
        Err(at) => bail!("{text:?} is not hexadecimal at character {at}: give pairs of 0-9 and a-f"),
    }
}

/// Digits if it is all digits, else the bytes themselves.
fn of_file(from: impl io::Read, path: &Path) -> anyhow::Result<Bytes> {
    let mut bytes = Vec::new();
    let read = from.take(INPUT_BYTES_MAX + 1).read_to_end(&mut bytes);
    read.with_context(|| format!("{} can't be read", path.display()))?;
    if bytes.len() as u64 > INPUT_BYTES_MAX {
        bail!("{} is larger than {} MiB: cut a piece out of it", path.display(), INPUT_BYTES_MAX >> 20);
    }
    let text = std::str::from_utf8(&bytes).ok().filter(|text| !text.trim().is_empty());
    match text.and_then(|text| digits(text).ok()) {
        Some(digits) => Ok(digits.into()),
        None => Ok(bytes.into()),
    }
}

/// Pairs of digits; between pairs, blanks and `: , -` and a leading `0x` do not matter. The error is the place of the
/// first character that is something else, counted from 1.
fn digits(text: &str) -> Result<Vec<u8>, usize> {
    let mut bytes = Vec::with_capacity(text.len() / 2);
    let mut high: Option<u8> = None;
    let mut before = ' ';
    for (at, c) in text.chars().enumerate() {
        match (c.to_digit(16).and_then(|d| u8::try_from(d).ok()), high) {
            (Some(low), Some(first)) => {
                bytes.push(first << 4 | low);
                high = None;
            }
            (Some(digit), None) => high = Some(digit),
            (None, Some(0)) if c == 'x' && before == '0' => high = None,
            (None, None) if c.is_whitespace() || matches!(c, ':' | ',' | '-') => {}
            (None, _) => return Err(at + 1),
        }
        before = c;
    }
    match high {
        None => Ok(bytes),
        Some(_) => Err(text.chars().count()),
    }
}

/// What was found.
#[derive(Debug, Default)]
struct Inspected {
    header: Option<(StreamHeader, String)>,
    frames: Vec<Found>,
    failure: Option<Failure>,
}

/// One frame.
#[derive(Debug)]
struct Found {
    offset: usize,
    bytes: usize,
    number: u64,
    /// `None`: an unknown odd type, which a peer skips.
    frame: Option<Frame>,
}

/// Where and why reading stopped.
#[derive(Debug, PartialEq, Eq)]
struct Failure {
    offset: usize,
    what: String,
}

fn inspect(mut rest: Bytes, stream: bool) -> Inspected {
    let mut inspected = Inspected::default();
    let total = rest.len();
    let fail = |offset: usize, what: String| Some(Failure { offset, what });
    if stream {
        let header = peek_varint(&rest).and_then(|(kind, kind_len)| {
            let (index, index_len) = peek_varint(rest.get(kind_len..)?)?;
            Some((StreamHeader { kind, index }, kind_len + index_len))
        });
        let Some((header, len)) = header else {
            inspected.failure = fail(total, "the stream ends inside its header".to_owned());
            return inspected;
        };
        let channel = match header.channel() {
            Ok(Channel::Lane(index)) => format!("lane {index}"),
            Ok(channel) => channel.name().to_owned(),
            Err(violation) => {
                inspected.failure =
                    fail(0, format!("kind {} index {}: {violation}", header.kind, header.index));
                return inspected;
            }
        };
        inspected.header = Some((header, channel));
        rest.advance(len);
    }
    while !rest.is_empty() {
        let offset = total - rest.len();
        let Some((length, header)) = peek_varint(&rest) else {
            inspected.failure = fail(offset, "the bytes end inside a frame's length".to_owned());
            return inspected;
        };
        let (number, name) = match rest.get(header..).and_then(peek_varint) {
            Some((number, _)) => (number, name_of(number)),
            None => (0, "?"),
        };
        let left = rest.len() - header;
        let body = match usize::try_from(length) {
            Ok(body) if body <= left => body,
            _ => {
                inspected.failure = fail(
                    offset,
                    format!(
                        "a frame of {length} bytes (type {number:#04x}, {name}), but only {left} are left"
                    ),
                );
                return inspected;
            }
        };
        rest.advance(header);
        match Frame::decode(rest.split_to(body)) {
            Ok(frame) => inspected.frames.push(Found { offset, bytes: header + body, number, frame }),
            Err(error) => {
                let what = format!("a frame of {length} bytes (type {number:#04x}, {name}): {error}");
                inspected.failure = fail(offset, what);
                return inspected;
            }
        }
    }
    inspected
}

fn name_of(number: u64) -> &'static str {
    match Frame::TABLE.iter().find(|(known, _, _)| *known == number) {
        Some((_, name, _)) => name,
        None if number % 2 == 1 => "unknown, to be skipped",
        None => "unknown",
    }
}

/// Who may send a frame, and where: `client on uplink or datagram`.
fn where_it_may_come(frame: &Frame) -> String {
    let channels = [Channel::Control, Channel::Uplink, Channel::Lane(0), Channel::Backlog, Channel::Datagram];
    let mut sides = Vec::new();
    for (side, name) in [(Side::Client, "client"), (Side::Gateway, "gateway")] {
        let allowed: Vec<&str> = channels
            .into_iter()
            .filter(|c| frame.check_channel(side, *c).is_ok())
            .map(Channel::name)
            .collect();
        if !allowed.is_empty() {
            sides.push(format!("{name} on {}", allowed.join(" or ")));
        }
    }
    sides.join(", ")
}

/// Name and value of each field, in the frame's order.
fn fields(frame: &Frame) -> Vec<(String, String)> {
    let debug = format!("{frame:?}");
    // `Send(Send { kind: Message, … })`: what stands between the outermost braces.
    let inner = debug
        .split_once('{')
        .and_then(|(_, rest)| rest.rsplit_once('}'))
        .map_or("", |(inner, _)| inner.trim());
    let mut fields: Vec<(String, String)> = split_outermost(inner)
        .into_iter()
        .filter_map(|field| field.split_once(": "))
        .map(|(name, value)| (name.trim().to_owned(), bare_numbers(value.trim())))
        .collect();
    if let Some(payload) = payload_of(frame)
        && !payload.is_empty()
    {
        let text = match std::str::from_utf8(payload) {
            Ok(text) => format!("{} bytes, as text: {text:?}", payload.len()),
            Err(_) => format!("{} bytes, not text", payload.len()),
        };
        fields.push(("(payload)".to_owned(), text));
    }
    fields
}

fn payload_of(frame: &Frame) -> Option<&Bytes> {
    match frame {
        Frame::Send(send) => Some(&send.payload),
        Frame::Deliver(deliver) => Some(&deliver.payload),
        Frame::Event(event) => Some(&event.payload),
        Frame::Call(call) => Some(&call.body),
        Frame::Reply(reply) => Some(&reply.body),
        _ => None,
    }
}

/// Cuts at commas that stand in no bracket and no string.
fn split_outermost(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut depth, mut in_string, mut escaped, mut start) = (0_usize, false, false, 0);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if in_string => escaped = true,
            '"' => in_string = !in_string,
            _ if in_string => {}
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                parts.extend(text.get(start..at));
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.extend(text.get(start..).filter(|part| !part.trim().is_empty()));
    parts
}

/// `ConversationId(1025)` is shown as `1025`, also within lists; strings stay as they are.
fn bare_numbers(value: &str) -> String {
    let mut shown = String::with_capacity(value.len());
    let (mut in_string, mut escaped) = (false, false);
    let mut rest = value;
    while let Some(c) = rest.chars().next() {
        if !in_string
            && c.is_ascii_uppercase()
            && let Some((name, tail)) = rest.split_once('(')
            && name.chars().all(|c| c.is_ascii_alphanumeric())
            && let Some((number, tail)) = tail.split_once(')')
            && !number.is_empty()
            && number.chars().all(|c| c.is_ascii_digit())
            && name != "Some"
        {
            shown.push_str(number);
            rest = tail;
            continue;
        }
        match c {
            _ if escaped => escaped = false,
            '\\' if in_string => escaped = true,
            '"' => in_string = !in_string,
            _ => {}
        }
        shown.push(c);
        rest = rest.get(c.len_utf8()..).unwrap_or_default();
    }
    shown
}

impl fmt::Display for Inspected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((header, channel)) = &self.header {
            writeln!(f, "stream of kind {} index {}: {channel}\n", header.kind, header.index)?;
        }
        for (i, found) in self.frames.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            let Found { offset, bytes, number, frame } = found;
            let Some(frame) = frame else {
                writeln!(f, "offset {offset}: unknown type {number:#04x}, {bytes} bytes, to be skipped")?;
                continue;
            };
            let early = if frame.replayable() { "; may ride in 0-RTT" } else { "" };
            let name = frame.name();
            writeln!(
                f,
                "offset {offset}: {name} ({number:#04x}), {bytes} bytes; {}{early}",
                where_it_may_come(frame)
            )?;
            let fields = fields(frame);
            let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
            for (name, value) in fields {
                writeln!(f, "    {name:width$}  {value}")?;
            }
        }
        if let Some(Failure { offset, what }) = &self.failure {
            if !self.frames.is_empty() {
                writeln!(f)?;
            }
            writeln!(f, "offset {offset}: can't be read: {what}")?;
        }
        Ok(())
    }
}

impl Inspected {
    fn to_json(&self) -> serde_json::Value {
        let frames: Vec<_> = self
            .frames
            .iter()
            .map(|found| {
                let fields: serde_json::Map<_, _> = found
                    .frame
                    .iter()
                    .flat_map(fields)
                    .map(|(name, value)| (name, serde_json::Value::String(value)))
                    .collect();
                serde_json::json!({
                    "offset": found.offset,
                    "bytes": found.bytes,
                    "type": found.number,
                    "name": name_of(found.number),
                    "fields": fields,
                })
            })
            .collect();
        let failure =
            self.failure.as_ref().map(|f| serde_json::json!({ "offset": f.offset, "what": f.what }));
        let stream = self.header.as_ref().map(|(header, channel)| {
            serde_json::json!({ "kind": header.kind, "index": header.index, "channel": channel })
        });
        serde_json::json!({ "stream": stream, "frames": frames, "error": failure })
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use fulmar_protocol::frame::{Ping, RecordKind, Send};
    use fulmar_protocol::id::{ConversationId, Pseq, Seq};

    use super::*;

    fn send() -> Frame {
        Frame::Send(Send {
            kind: RecordKind::Message,
            conversation: ConversationId::new(1025).unwrap(),
            pseq: Pseq::new(7).unwrap(),
            seen: Seq::new(3).unwrap(),
            reference: None,
            ttl: None,
            more: false,
            continues: false,
            silent: false,
            cancel: false,
            payload: Bytes::from_static("grüß, (dich) \"{du}\"".as_bytes()),
        })
    }

    #[test]
    fn frames_are_shown_field_by_field() {
        let mut bytes = BytesMut::new();
        send().encode(&mut bytes);
        let second = bytes.len();
        Frame::Ping(Ping { id: 5, time_ms: 6, flags: 0, padding: 0 }).encode(&mut bytes);
        let text = inspect(bytes.freeze(), false).to_string();
        for line in [
            "offset 0: Send (0x0e), ".to_owned(),
            "client on uplink or datagram; may ride in 0-RTT".to_owned(),
            "    conversation  1025\n".to_owned(),
            "    pseq          7\n".to_owned(),
            "    reference     None\n".to_owned(),
            "    (payload)     21 bytes, as text: \"grüß, (dich) \\\"{du}\\\"\"\n".to_owned(),
            format!("\noffset {second}: Ping (0x26), "),
            "client on control, gateway on control\n".to_owned(),
            "    time_ms  6\n".to_owned(),
        ] {
            assert!(text.contains(&line), "{line:?} is missing in\n{text}");
        }
        assert!(!text.contains("can't be read"), "{text}");
    }

    #[test]
    fn it_says_where_the_bytes_stop_making_sense() {
        let whole = send().to_bytes();
        let len = whole.len();
        for (bytes, stream, want) in [
            (whole.slice(..len - 1), false, format!("offset 0: can't be read: a frame of {} bytes (type 0x0e, Send), but only {} are left\n", len - 1, len - 2)),
            (Bytes::from_static(&[2, 0x7e, 0]), false, "offset 0: can't be read: a frame of 2 bytes (type 0x3e00, unknown): unknown frame type 0x3e00 must be understood\n".to_owned()),
            (Bytes::from_static(&[0x40]), false, "offset 0: can't be read: the bytes end inside a frame's length\n".to_owned()),
            (Bytes::from_static(&[9, 0]), true, "offset 0: can't be read: kind 9 index 0: stream: unknown kind of stream\n".to_owned()),
            (Bytes::from_static(&[1]), true, "offset 1: can't be read: the stream ends inside its header\n".to_owned()),
            (Bytes::from_static(&[1, 0]), true, "stream of kind 1 index 0: uplink\n\n".to_owned()),
            (Bytes::from_static(&[2, 3]), true, "stream of kind 2 index 3: lane 3\n\n".to_owned()),
            (Bytes::from_static(&[3, 0x40, 0x7f, 1]), false, "offset 0: unknown type 0x7f, 4 bytes, to be skipped\n".to_owned()),
        ] {
            assert_eq!(inspect(bytes.clone(), stream).to_string(), want, "{bytes:?}");
        }
        let mut two = BytesMut::from(&whole[..]);
        two.extend_from_slice(&[1, 0x0e]);
        let inspected = inspect(two.freeze(), false);
        assert_eq!(inspected.frames.len(), 1);
        let failure = inspected.failure.unwrap();
        assert_eq!(failure.offset, len);
        assert!(
            failure.what.starts_with("a frame of 1 bytes (type 0x0e, Send): the frame ends inside "),
            "{failure:?}"
        );
    }

    #[test]
    fn digits_are_read_however_they_are_written() {
        for (text, want) in [
            ("0326", Ok(vec![3, 0x26])),
            ("0x03 0x26", Ok(vec![3, 0x26])),
            ("03:26\n0A-ff", Ok(vec![3, 0x26, 10, 255])),
            ("", Ok(Vec::new())),
            ("0x", Ok(Vec::new())),
            ("03 2", Err(4)),
            ("03 2 6", Err(5)),
            ("03 zz", Err(4)),
        ] {
            assert_eq!(digits(text), want, "{text:?}");
        }
    }

    #[test]
    fn any_bytes_can_be_inspected() {
        let whole = send().to_bytes();
        for at in 0..whole.len() {
            for value in [0, 1, 0x3f, 0x40, 0x7f, 0x80, 0xff] {
                let mut bytes = BytesMut::from(&whole[..]);
                bytes[at] = value;
                for stream in [false, true] {
                    let inspected = inspect(bytes.clone().freeze(), stream);
                    assert!(!inspected.to_string().is_empty());
                    assert!(inspected.to_json().is_object());
                }
            }
        }
    }

    #[test]
    fn the_object_names_fields_and_errors() {
        let mut bytes = BytesMut::from(&send().to_bytes()[..]);
        bytes.extend_from_slice(&[0x40]);
        let offset = bytes.len() - 1;
        let object = inspect(bytes.freeze(), false).to_json();
        assert_eq!(object["frames"][0]["name"], "Send");
        assert_eq!(object["frames"][0]["fields"]["conversation"], "1025");
        assert_eq!(object["error"]["offset"], offset);
    }
}
