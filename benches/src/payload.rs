//! Bodies of messages as people write them: lengths follow what chats were measured to have, content is text.

use bytes::Bytes;
use rand::{Rng as _, RngExt as _, SeedableRng as _, rngs::SmallRng};

/// (share of messages up to here, bytes): the distribution is linear in between.
const LENGTHS: [(f64, f64); 6] =
    [(0.0, 1.0), (0.01, 4.0), (0.5, 32.0), (0.9, 93.0), (0.99, 264.0), (1.0, 1_087.0)];

/// A seeded source of bodies.
#[derive(Debug)]
pub struct Payloads(SmallRng);

impl Payloads {
    /// The same seed gives the same bodies.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(SmallRng::seed_from_u64(seed))
    }

    /// The length of the next message: 1 % have up to 4 bytes, half 32, 90 % 93, 99 % 264, all 1 087.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "lengths are below 1088")]
    pub fn length(&mut self) -> usize {
        let share: f64 = self.0.random();
        let mut low = (0.0, 1.0);
        for point in LENGTHS {
            if share <= point.0 && point.0 > low.0 {
                let part = (share - low.0) / (point.0 - low.0);
                return (low.1 + part * (point.1 - low.1)).round() as usize;
            }
            low = point;
        }
        1_087
    }

    /// A body of this many bytes.
    pub fn body(&mut self, bytes: usize) -> Bytes {
        const LETTERS: &[u8; 32] = b"etaoin shrdlu cmfwyp vbgkqj xz. ";
        let letter = |n: u8| LETTERS.get(usize::from(n % 32)).copied().unwrap_or(b' ');
        let mut body = vec![0; bytes];
        self.0.fill_bytes(&mut body);
        body.iter_mut().for_each(|byte| *byte = letter(*byte));
        body.into()
    }

    /// The next message.
    pub fn message(&mut self) -> Bytes {
        let bytes = self.length();
        self.body(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_follow_the_distribution_and_the_seed() {
        let mut payloads = Payloads::new(7);
        let mut lengths: Vec<usize> = (0..100_000).map(|_| payloads.length()).collect();
        let mut again = Payloads::new(7);
        assert!(lengths.iter().all(|length| *length == again.length()));
        lengths.sort_unstable();
        for (percent, want) in [(1, 4), (50, 32), (90, 93), (99, 264)] {
            // Of 100 000 draws, the share up to a length is known to within three standard deviations: 500 draws.
            let up_to = lengths.partition_point(|length| *length <= want);
            assert!(up_to.abs_diff(percent * 1_000) <= 2_000, "{up_to} up to {want} bytes");
            let near = lengths.partition_point(|length| *length <= want + want / 10 + 1);
            assert!(near >= percent * 1_000 - 500, "{near} up to a little more than {want} bytes");
        }
        assert!(lengths[0] >= 1 && lengths[99_999] <= 1_087);
        assert_eq!(payloads.message(), again.message());
    }
}
