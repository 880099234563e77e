//! One connection: streams and datagrams on one side, frames on the other.
//!
//! - Each stream has one decoder, which holds one frame at the most; each stream that is written has one buffer, whose
//!   size is bounded by what the session half lets leave.
//! - Reading can be narrowed to the control stream, so that a database that is slow holds the gateway back and not
//!   memory.
//!
//! Not here: what frames mean (`fulmar_protocol::session`), when to connect (`state`).

use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use fulmar_protocol::{
    close::CloseCode,
    error::{DecodeError, Violation},
    frame::{Channel, Decoder, Frame, StreamHeader},
    limit::LANES_MAX,
};
use fulmar_transport::{Connection, ConnectionError, ReadError, RecvStream, SendStream, WriteError};

use crate::options::BoxFuture;

/// Frames taken from a connection at once.
const FRAMES_MAX: usize = 64;

/// Streams the gateway may open.
const STREAMS_MAX: usize = LANES_MAX as usize + 2;

/// What came.
#[derive(Debug)]
pub(crate) enum LinkEvent {
    Frames(Vec<(Channel, Frame)>),
    /// The gateway broke the framing.
    Violation(Violation),
    /// The connection ended; the text is for people.
    Lost(Option<CloseCode>, String),
}

/// See the module's text.
pub(crate) struct Link {
    connection: Connection,
    control: Writer,
    uplink: Writer,
    readers: Vec<Reader>,
    accepting: BoxFuture<Result<RecvStream, ConnectionError>>,
    datagram: BoxFuture<Result<Bytes, ConnectionError>>,
    grease: u64,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("remote", &self.connection.remote_address()).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Writer {
    stream: SendStream,
    buffer: BytesMut,
}

#[derive(Debug)]
struct Reader {
    stream: RecvStream,
    decoder: Decoder,
    kind: Option<u64>,
    channel: Option<Channel>,
    /// Decoded as far as the bytes that were read reach.
    dry: bool,
}

impl Link {
    /// Opens the streams of a client on a connection that is up.
    pub(crate) async fn open(connection: Connection, grease: u64) -> Result<Self, ConnectionError> {
        let (control, answers) = connection.open_bi().await?;
        let uplink = connection.open_uni().await?;
        // What can't be set belongs to a connection that is gone; reading will say so.
        let _ = (control.set_priority(2), uplink.set_priority(1));
        let mut answers = Reader::new(answers);
        answers.set_channel(Channel::Control);
        Ok(Self {
            control: Writer::new(control, Channel::Control),
            uplink: Writer::new(uplink, Channel::Uplink),
            readers: vec![answers],
            accepting: accept(&connection),
            datagram: datagram_of(&connection),
            connection,
            grease,
        })
    }

    pub(crate) const fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Takes a frame to be written. Control frames are greased now and then.
    pub(crate) fn write(&mut self, channel: Channel, frame: &Frame) {
        match channel {
            Channel::Control => {
                // A step of a linear congruential generator: it only has to vary.
                self.grease = self
                    .grease
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                if self.grease >> 60 == 0 && !matches!(frame, Frame::Hello(_)) {
                    frame.encode_greased(&mut self.control.buffer, self.grease >> 20);
                } else {
                    frame.encode(&mut self.control.buffer);
                }
            }
            Channel::Uplink => frame.encode(&mut self.uplink.buffer),
            Channel::Datagram => {
                // Full, too large for the path, or not supported: it is lost, as datagrams may be.
                let _ = self.connection.send_datagram(frame.to_bytes());
            }
            Channel::Lane(_) | Channel::Backlog => {}
        }
    }

    /// Writes what waits and waits for what comes; with `records` off, only the control stream is read.
    pub(crate) fn poll(&mut self, records: bool, cx: &mut Context<'_>) -> Poll<LinkEvent> {
        let flushed = [self.control.poll_flush(cx), self.uplink.poll_flush(cx)];
        for flushed in flushed {
            if let Poll::Ready(Err(error)) = flushed {
                return Poll::Ready(self.lost(&error.to_string()));
            }
        }
        while let Poll::Ready(accepted) = self.accepting.as_mut().poll(cx) {
            match accepted {
                Ok(stream) if self.readers.len() < STREAMS_MAX => self.readers.push(Reader::new(stream)),
                Ok(_) => return Poll::Ready(LinkEvent::Violation(Violation::BadStream("too many streams"))),
                Err(error) => return Poll::Ready(self.lost(&error.to_string())),
            }
            self.accepting = accept(&self.connection);
        }
        let mut frames = Vec::new();
        while records && frames.len() < FRAMES_MAX {
            let Poll::Ready(datagram) = self.datagram.as_mut().poll(cx) else { break };
            self.datagram = datagram_of(&self.connection);
            match datagram {
                Ok(bytes) => match whole_frame(bytes) {
                    Ok(frame) => frames.extend(frame.map(|frame| (Channel::Datagram, frame))),
                    Err(violation) => return Poll::Ready(LinkEvent::Violation(violation)),
                },
                Err(error) => return Poll::Ready(self.lost(&error.to_string())),
            }
        }
        let mut index = 0;
        while let Some(reader) = self.readers.get_mut(index) {
            if index > 0 && !records {
                break;
            }
            match reader.poll_frames(&mut frames, cx) {
                Poll::Ready(Ok(())) if index == 0 => {
                    // The gateway has nothing more to say; the frames that came before count.
                    if frames.is_empty() {
                        return Poll::Ready(self.lost("the gateway closed the control stream"));
                    }
                    index += 1;
                }
                Poll::Ready(Ok(())) => {
                    self.readers.swap_remove(index);
                }
                Poll::Ready(Err(StreamEnd::Violation(violation))) => {
                    return Poll::Ready(LinkEvent::Violation(violation));
                }
                Poll::Ready(Err(StreamEnd::Lost(error))) => {
                    if frames.is_empty() {
                        return Poll::Ready(self.lost(&error.to_string()));
                    }
                    index += 1;
                }
                Poll::Pending => index += 1,
            }
        }
        if frames.is_empty() { Poll::Pending } else { Poll::Ready(LinkEvent::Frames(frames)) }
    }

    fn lost(&self, text: &str) -> LinkEvent {
        match self.connection.close_reason() {
            Some(ConnectionError::ApplicationClosed(close)) => {
                let code = u32::try_from(close.code).unwrap_or(u32::MAX);
                let code = CloseCode::from_code(code);
                LinkEvent::Lost(Some(code), code.to_string())
            }
            Some(reason) => LinkEvent::Lost(None, reason.to_string()),
            None => LinkEvent::Lost(None, text.to_owned()),
        }
    }

    /// Closes the connection; what was not flushed is lost.
    pub(crate) fn close(&self, code: CloseCode) {
        self.connection.close(code.code(), code.text().as_bytes());
    }
}

fn accept(connection: &Connection) -> BoxFuture<Result<RecvStream, ConnectionError>> {
    let connection = connection.clone();
    Box::pin(async move { connection.accept_uni().await })
}

fn datagram_of(connection: &Connection) -> BoxFuture<Result<Bytes, ConnectionError>> {
    let connection = connection.clone();
    Box::pin(async move { connection.read_datagram().await })
}

/// A datagram is one frame, whole.
fn whole_frame(bytes: Bytes) -> Result<Option<Frame>, Violation> {
    let mut decoder = Decoder::new(Channel::Datagram.frame_limit());
    decoder.push(bytes);
    let frame = decoder.next()?;
    if decoder.buffered() > 0 {
        return Err(Violation::BadStream("a datagram holds one whole frame"));
    }
    Ok(frame)
}

impl Writer {
    fn new(stream: SendStream, channel: Channel) -> Self {
        let mut buffer = BytesMut::new();
        if let Some(header) = channel.header() {
            header.encode(&mut buffer);
        }
        Self { stream, buffer }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), WriteError>> {
        while !self.buffer.is_empty() {
            let written = ready!(self.stream.poll_write(cx, &self.buffer))?;
            self.buffer.advance(written);
        }
        // A burst is over: its buffer is not kept.
        if self.buffer.capacity() > 64 * 1024 {
            self.buffer = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

enum StreamEnd {
    Violation(Violation),
    Lost(ReadError),
}

impl From<Violation> for StreamEnd {
    fn from(violation: Violation) -> Self {
        Self::Violation(violation)
    }
}

impl From<DecodeError> for StreamEnd {
    fn from(error: DecodeError) -> Self {
        Self::Violation(error.into())
    }
}

impl Reader {
    fn new(stream: RecvStream) -> Self {
        // Until the header says which channel it is, a frame of it can't be read, so this limit is never used.
        let decoder = Decoder::new(Channel::Control.frame_limit());
        Self { stream, decoder, kind: None, channel: None, dry: true }
    }

    fn set_channel(&mut self, channel: Channel) {
        self.decoder.set_limit(channel.frame_limit());
        self.channel = Some(channel);
    }

    /// Appends frames until there are enough or no more bytes; ready when the stream ended.
    fn poll_frames(
        &mut self,
        frames: &mut Vec<(Channel, Frame)>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), StreamEnd>> {
        loop {
            if !self.dry && self.decode(frames)? {
                // Enough for now: what is left is taken when these were.
                return Poll::Pending;
            }
            match ready!(self.stream.poll_read_chunk(cx, Channel::Backlog.frame_limit())) {
                Ok(Some(chunk)) => {
                    // Copied: a slice of the receive buffer would pin all of it for as long as one payload lives.
                    self.decoder.push(Bytes::copy_from_slice(&chunk));
                    self.dry = false;
                }
                Ok(None) => return Poll::Ready(Ok(())),
                Err(ReadError::Reset(_)) => return Poll::Ready(Ok(())),
                Err(error) => return Poll::Ready(Err(StreamEnd::Lost(error))),
            }
        }
    }

    /// `true`: there are enough frames, and maybe more in the decoder.
    fn decode(&mut self, frames: &mut Vec<(Channel, Frame)>) -> Result<bool, StreamEnd> {
        while self.channel.is_none() {
            let Some(number) = self.decoder.next_varint() else {
                self.dry = true;
                return Ok(false);
            };
            match self.kind {
                None => self.kind = Some(number),
                Some(kind) => {
                    let channel = StreamHeader { kind, index: number }.channel()?;
                    if !matches!(channel, Channel::Lane(_) | Channel::Backlog) {
                        return Err(Violation::BadStream("a stream only a client opens").into());
                    }
                    self.set_channel(channel);
                }
            }
        }
        let Some(channel) = self.channel else { return Ok(false) };
        while frames.len() < FRAMES_MAX {
            match self.decoder.next()? {
                Some(frame) => frames.push((channel, frame)),
                None => {
                    self.dry = true;
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}
