//! What the commands that play a whole world on this machine share (`demo`, `weak`): the gateway's process, tokens for
//! the phones, a request asked until it is answered, and counts as people write them.
//!
//! Not here: what is played, and who judges it.

mod process;

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use fulmar_client::Error;
use fulmar_protocol::id::UnixMillis;
use tokio::time::{Instant, sleep};

pub(super) use self::process::GatewayProcess;
use crate::config::{DEMO_APP, DEV_ISSUER};
use crate::data_folder::open_dev_key;
use crate::identity::token::{Mint, mint};

/// How long a request is asked again when the network ate it.
const ASK_TIMEOUT: Duration = Duration::from_secs(60);

/// Pause between two tries.
const ASK_PAUSE: Duration = Duration::from_millis(300);

/// One token per user, good for a day, of the gateway whose data folder this is.
///
/// # Errors
/// The key can't be read, or the clock is not set.
pub(super) fn tokens(data: &Path, users: &[String]) -> anyhow::Result<Vec<String>> {
    let key = open_dev_key(data)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the system clock is not set")?;
    let now = u64::try_from(now.as_millis()).ok().and_then(UnixMillis::new);
    let now = now.context("the system clock is beyond the end of time")?;
    let day = 24 * 60 * 60;
    let token = |user: &String| mint(&key, Mint { app: DEMO_APP, issuer: DEV_ISSUER, user, ttl_s: day }, now);
    Ok(users.iter().map(token).collect::<Result<_, _>>()?)
}

/// Asks until there is an answer, or for [`ASK_TIMEOUT`].
pub(super) async fn again<T, F: Future<Output = Result<T, Error>>>(ask: impl Fn() -> F) -> Result<T, Error> {
    let until = Instant::now() + ASK_TIMEOUT;
    loop {
        match ask().await {
            Err(Error::TimedOut | Error::TooMany) if Instant::now() < until => sleep(ASK_PAUSE).await,
            answer => return answer,
        }
    }
}

/// `1234567` as `1,234,567`.
pub(super) fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A count as the report keeps it.
pub(super) fn number(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

/// `count / of`; 0 when there is nothing to divide by.
pub(super) fn ratio(count: u64, of: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "shown with one decimal; counts are far below 2^53")]
    let (count, of) = (count as f64, of.max(1) as f64);
    count / of
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        for (count, want) in
            [(0, "0"), (999, "999"), (1_000, "1,000"), (123_456, "123,456"), (1_234_567, "1,234,567")]
        {
            assert_eq!(grouped(count), want);
        }
    }
}
