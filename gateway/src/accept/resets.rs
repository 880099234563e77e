//! Telling clients of a process that was killed that their connections are gone.
//!
//! - A client that only listens has nothing to notice it by before its next PING. So the next process sends each one that
//!   was noted ([`super::book`]) a stateless reset (RFC 9000, 10.3), as it would answer a packet of it: once, paced, from
//!   its own port.
//! - A reset needs an id the client was given, and our key. quinn hands ids out itself; the one it hands out while an
//!   attempt is accepted is what its client uses until it changes its own address. Who did ([`quinn::Endpoint::rebind`])
//!   uses an id only quinn knows, and notices by its PING as before.
//! - No use to anybody else: 43 bytes to addresses that completed a handshake with us minutes ago, and only at a start
//!   that follows a kill.

use std::{cell::Cell, io, sync::Arc, time::Duration};

use quinn::{AsyncUdpSocket, ConnectionId, ConnectionIdGenerator, udp::Transmit};
use quinn_proto::InvalidCid;
use ring::hmac;
use tracing::{info, warn};

use super::{
    book::Gone,
    steering::{Core, CoreIds},
};
use crate::{data_folder::EndpointKeys, metrics::Metrics};

/// Bytes of a reset's token.
const TOKEN_BYTES: usize = 16;

/// Bytes of a reset: enough not to be told from any other short packet.
const RESET_BYTES: usize = 43;

/// How often resets leave; as many at once as the rate asks for.
const TURN: Duration = Duration::from_millis(10);

thread_local! {
    static FIRST: Cell<Option<ConnectionId>> = const { Cell::new(None) };
}

/// The ids of a core; the first one made during [`first_id`] is remembered.
pub(super) struct NotingIds(CoreIds);

impl NotingIds {
    pub(super) fn new(key: u64, core: Core) -> Self {
        Self(CoreIds::new(key, core))
    }
}

impl ConnectionIdGenerator for NotingIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let id = self.0.generate_cid();
        FIRST.set(FIRST.get().or(Some(id)));
        id
    }

    fn validate(&self, id: &ConnectionId) -> Result<(), InvalidCid> {
        self.0.validate(id)
    }

    fn cid_len(&self) -> usize {
        self.0.cid_len()
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        self.0.cid_lifetime()
    }
}

/// Does `work`, and says which id was the first that was made meanwhile on this thread. quinn makes the ids of an attempt
/// where it is accepted, holding its lock.
pub(super) fn first_id<T>(work: impl FnOnce() -> T) -> (T, Option<ConnectionId>) {
    FIRST.set(None);
    let done = work();
    (done, FIRST.take())
}

/// The reset for a connection with this id. `random` makes it look like any other packet.
fn reset(key: &hmac::Key, id: &[u8], mut random: [u8; RESET_BYTES]) -> [u8; RESET_BYTES] {
    if let Some(first) = random.first_mut() {
        // A short header.
        *first = 0b0100_0000 | (*first >> 2);
    }
    let token = hmac::sign(key, id);
    let tail = random.iter_mut().rev().take(TOKEN_BYTES).rev();
    for (byte, token) in tail.zip(token.as_ref()) {
        *byte = *token;
    }
    random
}

/// Tells everybody in `gone`, at most `per_second` of them a second.
pub async fn tell(
    socket: Arc<dyn AsyncUdpSocket>,
    keys: EndpointKeys,
    gone: Vec<Gone>,
    per_second: u32,
    metrics: Metrics,
) {
    let key = hmac::Key::new(hmac::HMAC_SHA256, &keys.reset);
    let turns = u32::try_from(Duration::from_secs(1).as_millis() / TURN.as_millis()).unwrap_or(1);
    let at_once = usize::try_from(per_second / turns).unwrap_or(1).max(1);
    info!(
        clients = gone.len(),
        "the last process was killed: its clients are told that their connections are gone"
    );
    let mut told = 0;
    for some in gone.chunks(at_once) {
        for gone in some {
            let mut random = [0; RESET_BYTES];
            if let Err(error) = getrandom::fill(&mut random) {
                warn!(%error, "the system gives no random numbers: clients notice the restart later");
                return;
            }
            let packet = reset(&key, &gone.id, random);
            let transmit = Transmit {
                destination: gone.remote,
                ecn: None,
                contents: &packet,
                segment_size: None,
                src_ip: gone.local,
            };
            // One that can't be reached notices later.
            if send(&socket, &transmit).await.is_ok() {
                told += 1;
                metrics.clients_reset.inc();
            }
        }
        tokio::time::sleep(TURN.max(Duration::from_secs(1) / per_second.max(1))).await;
    }
    info!(told, "everybody was told");
}

/// Sends one packet, when the socket can take it.
async fn send(socket: &Arc<dyn AsyncUdpSocket>, transmit: &Transmit<'_>) -> io::Result<()> {
    loop {
        match socket.try_send(transmit) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut poller = Arc::clone(socket).create_io_poller();
                std::future::poll_fn(|cx| poller.as_mut().poll_writable(cx)).await?;
            }
            sent => return sent,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{IpAddr, SocketAddr},
        pin::Pin,
        sync::{
            Mutex,
            atomic::{AtomicUsize, Ordering},
        },
        task::Poll,
    };

    use quinn::{UdpPoller, udp::RecvMeta};

    use super::*;

    #[test]
    fn a_reset_looks_like_any_packet_and_ends_in_the_token_of_its_id() {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &[7; 64]);
        let packet = reset(&key, &[1, 2, 3, 4, 5, 6, 7, 8], [0xff; RESET_BYTES]);
        assert_eq!(packet[0] & 0b1100_0000, 0b0100_0000, "a short header with its fixed bit");
        assert_eq!(packet[1..RESET_BYTES - TOKEN_BYTES], [0xff; RESET_BYTES - TOKEN_BYTES - 1]);
        let token = hmac::sign(&key, &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(packet[RESET_BYTES - TOKEN_BYTES..], token.as_ref()[..TOKEN_BYTES]);
    }

    /// To whom, from where, what.
    type Packet = (SocketAddr, Option<IpAddr>, Vec<u8>);

    /// Takes a packet at every second try.
    #[derive(Debug, Default)]
    struct Sent {
        packets: Mutex<Vec<Packet>>,
        tries: AtomicUsize,
    }

    #[derive(Debug)]
    struct Writable;

    impl UdpPoller for Writable {
        fn poll_writable(self: Pin<&mut Self>, _: &mut std::task::Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncUdpSocket for Sent {
        fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
            Box::pin(Writable)
        }

        fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
            let packet = (transmit.destination, transmit.src_ip, transmit.contents.to_vec());
            if self.tries.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.packets.lock().unwrap().push(packet);
            Ok(())
        }

        fn poll_recv(
            &self,
            _: &mut std::task::Context<'_>,
            _: &mut [io::IoSliceMut<'_>],
            _: &mut [RecvMeta],
        ) -> Poll<io::Result<usize>> {
            Poll::Pending
        }

        fn local_addr(&self) -> io::Result<SocketAddr> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    /// How long it took, in virtual time.
    async fn told(count: u16, per_second: u32) -> Duration {
        let keys = EndpointKeys { reset: [7; 64], token: [8; 64], connection_id: 9 };
        let gone: Vec<Gone> = (1..=count)
            .map(|port| Gone {
                remote: SocketAddr::from(([192, 0, 2, 1], port)),
                local: Some([198, 51, 100, 1].into()),
                id: port.to_be_bytes().to_vec(),
            })
            .collect();
        let (socket, metrics) = (Arc::new(Sent::default()), Metrics::default());
        let began = tokio::time::Instant::now();
        tell(Arc::<Sent>::clone(&socket), keys.clone(), gone.clone(), per_second, metrics.clone()).await;
        let key = hmac::Key::new(hmac::HMAC_SHA256, &keys.reset);
        let sent = socket.packets.lock().unwrap();
        assert_eq!(sent.len(), gone.len(), "one packet each");
        for (gone, (to, from, packet)) in gone.iter().zip(sent.iter()) {
            assert_eq!((gone.remote, gone.local, packet.len()), (*to, *from, RESET_BYTES));
            assert!(packet.ends_with(&hmac::sign(&key, &gone.id).as_ref()[..TOKEN_BYTES]));
        }
        assert_eq!(metrics.clients_reset.get(), u64::from(count));
        began.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn everybody_is_told_once_and_not_all_at_once() {
        // The clock goes in whole milliseconds.
        let about = |time: Duration| time..=time * 6 / 5;
        assert!(about(TURN).contains(&told(1, 5_000).await));
        assert!(about(25 * TURN).contains(&told(250, 1_000).await));
        assert!(about(Duration::from_secs(3)).contains(&told(3, 1).await));
    }

    #[test]
    fn the_first_id_made_meanwhile_is_the_connection_s() {
        let mut ids = NotingIds::new(9, Core::ALONE);
        ids.generate_cid();
        let (first, noted) = first_id(|| {
            let first = ids.generate_cid();
            ids.generate_cid();
            first
        });
        assert_eq!(noted, Some(first));
        assert!(ids.validate(&first).is_ok());
        ids.generate_cid();
        assert_eq!(first_id(|| ()).1, None);
    }
}
