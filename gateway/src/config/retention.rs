//! How much is kept, as it stands in the file: an age such as `"90d"`, a size such as `"64 MiB"`, or everything.
//!
//! - Strict: a whole number and one unit. What is below a second or 64 KiB is refused as a slip of the pen.
//! - [`Keep::Inherit`] leaves it to the next wider setting.
//!
//! Not here: which setting counts for a conversation ([`crate::retention`]).

use std::marker::PhantomData;

use toml::Value;

use super::setting::Setting;

/// A limit of one dimension; `U` says which one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Keep<U> {
    /// As the next wider setting says.
    Inherit,
    /// No limit.
    Everything,
    /// This much: milliseconds of age, or bytes.
    At(u64, PhantomData<U>),
}

/// Keeping by age; the number is milliseconds.
pub type KeepAge = Keep<Age>;

/// Keeping by size; the number is bytes.
pub type KeepBytes = Keep<Size>;

/// See [`KeepAge`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Age {}

/// See [`KeepBytes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Size {}

/// Below it a conversation could not even show its last screen.
const SIZE_MIN: u64 = 64 << 10;

const AGE_UNITS: [(&str, u64); 4] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000)];

const SIZE_UNITS: [(&str, u64); 3] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

const INHERIT: &str = "inherit";

impl<U> Keep<U> {
    /// So many milliseconds or bytes.
    #[must_use]
    pub const fn at(amount: u64) -> Self {
        Self::At(amount, PhantomData)
    }

    /// The limit, if there is one.
    #[must_use]
    pub const fn limit(&self) -> Option<u64> {
        match self {
            Self::At(amount, _) => Some(*amount),
            Self::Inherit | Self::Everything => None,
        }
    }
}

impl KeepAge {
    /// What a setting of this kind accepts.
    pub const EXPECTED: &'static str =
        "a time such as \"90d\" or \"12h\" (s, m, h, d), \"forever\" or \"inherit\"";
    /// The same for one that has nothing to inherit from.
    pub const EXPECTED_AT_ROOT: &'static str =
        "a time such as \"90d\" or \"12h\" (s, m, h, d), or \"forever\"";
}

impl KeepBytes {
    /// What a setting of this kind accepts.
    pub const EXPECTED: &'static str =
        "a size of at least 64 KiB such as \"64 MiB\" (KiB, MiB, GiB), \"unlimited\" or \"inherit\"";
    /// The same for one that has nothing to inherit from.
    pub const EXPECTED_AT_ROOT: &'static str =
        "a size of at least 64 KiB such as \"64 MiB\" (KiB, MiB, GiB), or \"unlimited\"";
}

impl Setting for KeepAge {
    fn read(value: &Value) -> Option<Self> {
        read(value.as_str()?, "forever", &AGE_UNITS, 1)
    }

    fn write(&self) -> Value {
        Value::String(write(self, "forever", &AGE_UNITS))
    }
}

impl Setting for KeepBytes {
    fn read(value: &Value) -> Option<Self> {
        read(value.as_str()?, "unlimited", &SIZE_UNITS, SIZE_MIN)
    }

    fn write(&self) -> Value {
        Value::String(write(self, "unlimited", &SIZE_UNITS))
    }
}

fn read<U>(text: &str, everything: &str, units: &[(&str, u64)], least: u64) -> Option<Keep<U>> {
    if text == everything {
        return Some(Keep::Everything);
    }
    if text == INHERIT {
        return Some(Keep::Inherit);
    }
    let end = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at_checked(end)?;
    let unit = unit.strip_prefix(' ').unwrap_or(unit);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    let amount = number.parse::<u64>().ok()?.checked_mul(*factor)?;
    (amount >= least).then(|| Keep::at(amount))
}

fn write<U>(keep: &Keep<U>, everything: &str, units: &[(&str, u64)]) -> String {
    match keep {
        Keep::Inherit => INHERIT.to_owned(),
        Keep::Everything => everything.to_owned(),
        Keep::At(amount, _) => units
            .iter()
            .find(|(_, factor)| amount % factor == 0)
            .map_or_else(|| amount.to_string(), |(name, factor)| format!("{}{name}", amount / factor)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn age(text: &str) -> Option<KeepAge> {
        KeepAge::read(&Value::String(text.to_owned()))
    }

    fn bytes(text: &str) -> Option<KeepBytes> {
        KeepBytes::read(&Value::String(text.to_owned()))
    }

    #[test]
    fn amounts_have_one_unit_and_nothing_is_guessed() {
        for (text, want) in [
            ("90d", Some(Keep::at(90 * 86_400_000))),
            ("12 h", Some(Keep::at(12 * 3_600_000))),
            ("30m", Some(Keep::at(30 * 60_000))),
            ("1s", Some(Keep::at(1_000))),
            ("forever", Some(Keep::Everything)),
            ("inherit", Some(Keep::Inherit)),
            ("0d", None),
            ("90", None),
            ("d", None),
            ("-1d", None),
            ("1.5d", None),
            ("90D", None),
            ("90  d", None),
            ("90d ", None),
            ("1d12h", None),
            ("300000000000d", None),
            ("unlimited", None),
            ("", None),
        ] {
            assert_eq!(age(text), want, "{text:?}");
        }
        for (text, want) in [
            ("64 MiB", Some(Keep::at(64 << 20))),
            ("64KiB", Some(Keep::at(64 << 10))),
            ("2 GiB", Some(Keep::at(2 << 30))),
            ("unlimited", Some(Keep::Everything)),
            ("63 KiB", None),
            ("64 MB", None),
            ("64", None),
            ("99999999999 GiB", None),
            ("forever", None),
        ] {
            assert_eq!(bytes(text), want, "{text:?}");
        }
        assert_eq!(KeepAge::read(&Value::Integer(90)), None);
    }

    #[test]
    fn what_is_written_is_read_back() {
        for text in ["90d", "36h", "90m", "90s", "forever", "inherit"] {
            assert_eq!(age(text).unwrap().write(), Value::String(text.to_owned()));
        }
        for text in ["3GiB", "1536MiB", "100KiB", "unlimited", "inherit"] {
            assert_eq!(bytes(text).unwrap().write(), Value::String(text.to_owned()));
        }
    }
}
