//! Which start of the operating system this is: what was written to the page cache since is still there, whatever
//! happened to processes.
//!
//! Not here: what follows from it (`journal`).

use std::sync::OnceLock;

/// Names one start of the operating system; all zero where it can't be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BootId(pub(crate) [u8; 16]);

impl BootId {
    /// The present one (Linux: `/proc/sys/kernel/random/boot_id`).
    pub(crate) fn now() -> Self {
        static NOW: OnceLock<BootId> = OnceLock::new();
        *NOW.get_or_init(|| {
            let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
            Self::parse(&text)
        })
    }

    fn parse(text: &str) -> Self {
        let mut id = [0; 16];
        let digits: Vec<u8> = text
            .chars()
            .filter_map(|c| c.to_digit(16))
            .filter_map(|digit| u8::try_from(digit).ok())
            .collect();
        for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = pair.iter().fold(0, |byte, digit| byte << 4 | digit);
        }
        Self(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_its_digits() {
        let id = BootId::parse("0123abcd-0000-4000-8000-0000000000ff\n");
        assert_eq!(crate::hex(&id.0), "0123abcd0000400080000000000000ff");
        assert_eq!(BootId::parse(""), BootId([0; 16]));
    }
}
