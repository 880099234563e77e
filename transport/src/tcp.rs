//! TCP as the streams above it want it.

use std::io;

use tokio::net::TcpStream;

/// Bytes the system may hold that were not sent yet. What is in there can't be overtaken any more: 16 KiB are half a
/// second of a line with 256 kbit/s.
#[cfg(any(target_os = "linux", target_os = "android"))]
const UNSENT_BYTES: u32 = 16 * 1024;

/// Sends at once, and keeps little that was not sent yet, so that what matters more can still go first.
///
/// # Errors
/// The socket is gone.
pub fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    socket2::SockRef::from(stream).set_tcp_notsent_lowat(UNSENT_BYTES)?;
    Ok(())
}
