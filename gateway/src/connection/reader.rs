//! From streams and datagrams to frames, each taken in whole before the next.

use std::{convert::Infallible, sync::Arc};

use bytes::Bytes;
use fulmar_protocol::{
    error::{DecodeError, Violation},
    frame::{Channel, Decoder, StreamHeader},
};

use super::driver::{Connection, End};

/// Bytes taken from a stream at once.
const READ_MAX: usize = 64 * 1024;

impl Connection {
    pub(super) async fn read_control(
        self: &Arc<Self>,
        stream: fulmar_transport::RecvStream,
    ) -> Result<Infallible, End> {
        self.read_stream(stream, Channel::Control).await
    }

    pub(super) async fn read_uplink(self: &Arc<Self>) -> Result<Infallible, End> {
        let stream = self.transport.accept_uni().await?;
        tokio::select! {
            biased;
            end = self.read_stream(stream, Channel::Uplink) => end,
            second = self.transport.accept_uni() => {
                second?;
                Err(Violation::BadStream("a second uplink").into())
            }
        }
    }

    async fn read_stream(
        self: &Arc<Self>,
        mut stream: fulmar_transport::RecvStream,
        channel: Channel,
    ) -> Result<Infallible, End> {
        let mut decoder = Decoder::new(channel.frame_limit());
        let mut header = (None, None);
        loop {
            let chunk = match stream.read_chunk(READ_MAX).await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => return Err(Violation::BadStream("the client closed a stream it needs").into()),
                Err(fulmar_transport::ReadError::Reset(_)) => {
                    return Err(Violation::BadStream("the client reset a stream it needs").into());
                }
                Err(fulmar_transport::ReadError::ConnectionLost(error)) => return Err(error.into()),
                Err(error) => return Err(End::Lost(error.to_string())),
            };
            self.context.metrics.bytes_in(chunk.len() as u64);
            decoder.push(chunk);
            if header.0.is_none() {
                header.0 = decoder.next_varint();
            }
            if header.0.is_some() && header.1.is_none() {
                header.1 = decoder.next_varint();
                if let (Some(kind), Some(index)) = header
                    && (StreamHeader { kind, index }).channel()? != channel
                {
                    return Err(
                        Violation::BadStream("a stream of a kind the client may not open here").into()
                    );
                }
            }
            if header.1.is_none() {
                continue;
            }
            let _order = self.order.lock().await;
            while let Some(frame) = decoder.next().map_err(Violation::from)? {
                if let Some(later) = self.take_in(channel, frame)? {
                    later.await?;
                }
                // Who sends without a pause lets others have their turn.
                tokio::task::coop::consume_budget().await;
            }
        }
    }

    pub(super) async fn read_datagrams(self: &Arc<Self>) -> Result<Infallible, End> {
        loop {
            let datagram: Bytes = self.transport.read_datagram().await?;
            self.context.metrics.bytes_in(datagram.len() as u64);
            let mut decoder = Decoder::new(Channel::Datagram.frame_limit());
            decoder.push(datagram);
            let _order = self.order.lock().await;
            while let Some(frame) = decoder.next().map_err(Violation::from)? {
                if let Some(later) = self.take_in(Channel::Datagram, frame)? {
                    later.await?;
                }
            }
            if decoder.buffered() != 0 {
                return Err(Violation::from(DecodeError::Truncated { field: "datagram" }).into());
            }
        }
    }
}
