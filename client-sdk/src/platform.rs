//! What a client stands on: the clocks, the sockets and the tasks of its device.
//!
//! - The SDK asks for time, sockets and names here and nowhere else. An app gives its own [`Platform`] to route sockets
//!   around a VPN (`VpnService.protect` on Android), to resolve names its own way, or to run a client in a simulated world.
//! - [`System`] is what is used without one.
//!
//! Not here: which connection is made when (`state`, `transport`).

use std::{
    fmt::Debug,
    future::Future,
    io,
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use quinn::{AsyncUdpSocket, Runtime, TokioRuntime};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::Instant,
};

use crate::options::BoxFuture;

/// A connected byte stream, TCP as a rule.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> ByteStream for T {}

/// The device a client runs on.
///
/// Every method may be called from any thread. None may block for long.
pub trait Platform: Send + Sync + Debug + 'static {
    /// A clock that never goes back, since some moment; it may stand still while the device sleeps. All timers of the
    /// client follow it.
    fn monotonic(&self) -> Duration;

    /// A clock that never goes back and goes on while the device sleeps (`CLOCK_BOOTTIME`), since some moment. Against
    /// [`Self::monotonic`] it shows how long the device slept.
    fn boot(&self) -> Duration;

    /// Milliseconds since 1970 by the device's clock, which people may set.
    fn unix_millis(&self) -> u64;

    /// A number nobody can guess.
    fn random(&self) -> u64;

    /// Ends when [`Self::monotonic`] has reached `at`.
    fn sleep_until(&self, at: Duration) -> BoxFuture<()>;

    /// Runs a task until it ends.
    fn spawn(&self, task: BoxFuture<()>);

    /// What quinn runs on.
    fn quic_runtime(&self) -> Arc<dyn Runtime>;

    /// A UDP socket bound to `local`, for QUIC.
    ///
    /// # Errors
    /// As binding a socket.
    fn udp(&self, local: SocketAddr) -> io::Result<Arc<dyn AsyncUdpSocket>>;

    /// A byte stream to `remote`, for networks that block UDP.
    fn tcp(&self, remote: SocketAddr) -> BoxFuture<io::Result<Box<dyn ByteStream>>>;

    /// Addresses of `host:port`, the preferred one first.
    fn resolve(&self, address: &str) -> BoxFuture<io::Result<Vec<SocketAddr>>>;

    /// Whether the database's work is done on the thread that asks for it instead of one of its own: for worlds in
    /// which everything happens on one thread.
    fn in_place(&self) -> bool {
        false
    }
}

/// The operating system, by tokio.
#[derive(Clone, Copy, Debug)]
pub struct System {
    started: Instant,
}

impl Default for System {
    fn default() -> Self {
        Self { started: Instant::now() }
    }
}

impl Platform for System {
    fn monotonic(&self) -> Duration {
        self.started.elapsed()
    }

    fn boot(&self) -> Duration {
        // Darwin's CLOCK_MONOTONIC goes on during sleep; Linux has a clock of its own for that.
        #[cfg(any(target_os = "linux", target_os = "android"))]
        let clock = rustix::time::ClockId::Boottime;
        #[cfg(not(any(target_os = "linux", target_os = "android")))]
        let clock = rustix::time::ClockId::Monotonic;
        let now = rustix::time::clock_gettime(clock);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        Duration::new(seconds, u32::try_from(now.tv_nsec).unwrap_or(0))
    }

    fn unix_millis(&self) -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
    }

    fn random(&self) -> u64 {
        // Without a source of randomness, one that varies.
        getrandom::u64().unwrap_or_else(|_| self.unix_millis())
    }

    fn sleep_until(&self, at: Duration) -> BoxFuture<()> {
        Box::pin(tokio::time::sleep_until(self.started + at))
    }

    fn spawn(&self, task: BoxFuture<()>) {
        tokio::spawn(task);
    }

    fn quic_runtime(&self) -> Arc<dyn Runtime> {
        Arc::new(TokioRuntime)
    }

    fn udp(&self, local: SocketAddr) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        TokioRuntime.wrap_udp_socket(UdpSocket::bind(local)?)
    }

    fn tcp(&self, remote: SocketAddr) -> BoxFuture<io::Result<Box<dyn ByteStream>>> {
        Box::pin(async move {
            let stream = TcpStream::connect(remote).await?;
            fulmar_transport::tcp::tune(&stream)?;
            Ok(Box::new(stream) as Box<dyn ByteStream>)
        })
    }

    fn resolve(&self, address: &str) -> BoxFuture<io::Result<Vec<SocketAddr>>> {
        let address = address.to_owned();
        Box::pin(async move { Ok(tokio::net::lookup_host(address).await?.collect()) })
    }
}

/// `future`, unless it takes longer than `limit` on the platform's clock.
pub(crate) async fn within<T>(
    platform: &dyn Platform,
    limit: Duration,
    future: impl Future<Output = T>,
) -> Option<T> {
    let end = platform.sleep_until(platform.monotonic() + limit);
    tokio::select! {
        biased;
        done = future => Some(done),
        () = end => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_system_sleeps_on_its_own_clock_and_knows_the_time() {
        let system = System::default();
        system.sleep_until(Duration::from_secs(5)).await;
        assert_eq!(system.monotonic(), Duration::from_secs(5));
        assert!(system.unix_millis() > 1_700_000_000_000);
        assert!(system.boot() > Duration::ZERO);
        assert_ne!(system.random(), system.random());
        assert_eq!(within(&system, Duration::from_secs(1), async { 7 }).await, Some(7));
        assert_eq!(within(&system, Duration::from_secs(1), std::future::pending::<()>()).await, None);
        assert_eq!(system.resolve("127.0.0.1:443").await.unwrap(), ["127.0.0.1:443".parse().unwrap()]);
    }
}
