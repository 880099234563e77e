//! One setting: how its value is read from TOML, checked, and shown.
//!
//! - A section is declared once, with the documentation, unit, default and bounds of every key; the struct, the
//!   reader and the printed default file all come from that declaration, so they can't disagree.
//! - Reading is strict: no value is rounded, trimmed or guessed.
//!
//! Not here: where values come from and which one wins ([`super::source`]).

use std::fmt::Display;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use toml::Value;

/// A type a key can have.
pub trait Setting: Sized {
    /// The value, or `None` when it is of another kind or can't be understood.
    fn read(value: &Value) -> Option<Self>;
    /// The value as it stands in a file.
    fn write(&self) -> Value;
    /// What a value that is no longer taken is called now.
    fn renamed(_value: &Value) -> Option<&'static str> {
        None
    }
}

/// What a key accepts beyond its type.
pub trait Check<T> {
    /// Whether the value will do.
    fn accepts(&self, value: &T) -> bool;
    /// What would do, to follow the word "expected".
    fn expects(&self) -> String;
}

impl<T: PartialOrd + Display> Check<T> for RangeInclusive<T> {
    fn accepts(&self, value: &T) -> bool {
        self.contains(value)
    }

    fn expects(&self) -> String {
        format!("a number from {} to {}", self.start(), self.end())
    }
}

impl<T> Check<T> for &'static str {
    fn accepts(&self, _: &T) -> bool {
        true
    }

    fn expects(&self) -> String {
        (*self).to_owned()
    }
}

/// A condition with the words that describe it.
#[derive(Debug)]
pub struct Where<F>(pub &'static str, pub F);

impl<T, F: Fn(&T) -> bool> Check<T> for Where<F> {
    fn accepts(&self, value: &T) -> bool {
        (self.1)(value)
    }

    fn expects(&self) -> String {
        self.0.to_owned()
    }
}

/// One of a few words; see the macro `words`.
#[derive(Debug)]
pub struct OneOf(pub &'static [&'static str]);

impl<T> Check<T> for OneOf {
    fn accepts(&self, _: &T) -> bool {
        true
    }

    fn expects(&self) -> String {
        let quoted: Vec<String> = self.0.iter().map(|word| format!("{word:?}")).collect();
        match quoted.split_last() {
            Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
            _ => quoted.concat(),
        }
    }
}

/// Why a key was not set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The section has no such key.
    NoSuchKey,
    /// The value will not do; this is what would.
    Expected(String),
    /// The value has another name since an earlier version: this one.
    Renamed(&'static str),
}

/// Reads one value and checks it.
///
/// # Errors
/// What was expected instead.
pub fn read<T: Setting>(value: &Value, check: &impl Check<T>) -> Result<T, Refusal> {
    T::read(value).filter(|v| check.accepts(v)).ok_or_else(|| match T::renamed(value) {
        Some(now) => Refusal::Renamed(now),
        None => Refusal::Expected(check.expects()),
    })
}

/// What is known of a key without a value for it.
#[derive(Clone, Debug)]
pub struct KeyDoc {
    /// As it stands in the file.
    pub name: &'static str,
    /// Its documentation, line by line.
    pub doc: &'static [&'static str],
    /// Its default.
    pub default: Value,
    /// What it accepts.
    pub expects: String,
}

/// A `[section]` of the file.
pub trait Section: Default {
    /// As it stands in the file.
    const NAME: &'static str;
    /// Its documentation, line by line.
    const DOC: &'static [&'static str];
    /// Its keys in the order of their declaration.
    fn keys() -> Vec<KeyDoc>;
    /// Sets one key.
    ///
    /// # Errors
    /// No such key, or what the key expects instead.
    fn set(&mut self, key: &str, value: &Value) -> Result<(), Refusal>;
}

/// Declares a section: struct, defaults, reader and documentation in one place.
macro_rules! section {
    (
        $(#[doc = $section_doc:literal])*
        $name:ident = $section:literal {
            $( $(#[doc = $doc:literal])* $key:ident : $ty:ty = $default:expr, $check:expr; )*
        }
    ) => {
        $(#[doc = $section_doc])*
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name {
            $( $(#[doc = $doc])* pub $key: $ty, )*
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $( $key: $default, )* }
            }
        }

        impl $crate::config::setting::Section for $name {
            const NAME: &'static str = $section;
            const DOC: &'static [&'static str] = &[$($section_doc),*];

            fn keys() -> Vec<$crate::config::setting::KeyDoc> {
                let defaults = Self::default();
                vec![$(
                    $crate::config::setting::KeyDoc {
                        name: stringify!($key),
                        doc: &[$($doc),*],
                        default: $crate::config::setting::Setting::write(&defaults.$key),
                        expects: $crate::config::setting::Check::<$ty>::expects(&$check),
                    }
                ),*]
            }

            fn set(
                &mut self,
                key: &str,
                value: &toml::Value,
            ) -> Result<(), $crate::config::setting::Refusal> {
                match key {
                    $( stringify!($key) => self.$key = $crate::config::setting::read(value, &$check)?, )*
                    _ => return Err($crate::config::setting::Refusal::NoSuchKey),
                }
                Ok(())
            }
        }
    };
}
pub(crate) use section;

/// Declares an enum whose values are words in the file. A word that was another one in an earlier version names it, so
/// that whoever still writes that one is told.
macro_rules! words {
    (
        $(#[doc = $enum_doc:literal])*
        $name:ident {
            $( $(#[doc = $doc:literal])* $variant:ident = $word:literal $(was $old:literal)?, )*
        }
    ) => {
        $(#[doc = $enum_doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name {
            $( $(#[doc = $doc])* $variant, )*
        }

        impl $name {
            /// The words of the file, in the order of their declaration.
            pub const WORDS: &'static [&'static str] = &[$($word),*];

            /// The word that stands for it in the file.
            #[must_use]
            pub const fn word(self) -> &'static str {
                match self { $( Self::$variant => $word, )* }
            }
        }

        impl $crate::config::setting::Setting for $name {
            fn read(value: &toml::Value) -> Option<Self> {
                match value.as_str()? {
                    $( $word => Some(Self::$variant), )*
                    _ => None,
                }
            }

            fn write(&self) -> toml::Value {
                toml::Value::String(self.word().to_owned())
            }

            fn renamed(value: &toml::Value) -> Option<&'static str> {
                match value.as_str()? {
                    $( $( $old => Some($word), )? )*
                    _ => None,
                }
            }
        }
    };
}
pub(crate) use words;

macro_rules! whole_number {
    ($($ty:ty),*) => { $(
        impl Setting for $ty {
            fn read(value: &Value) -> Option<Self> {
                Self::try_from(value.as_integer()?).ok()
            }

            fn write(&self) -> Value {
                Value::Integer(i64::try_from(*self).unwrap_or(i64::MAX))
            }
        }
    )* };
}
whole_number!(u8, u16, u32, u64, usize);

impl Setting for bool {
    fn read(value: &Value) -> Option<Self> {
        value.as_bool()
    }

    fn write(&self) -> Value {
        Value::Boolean(*self)
    }
}

impl Setting for String {
    fn read(value: &Value) -> Option<Self> {
        value.as_str().map(str::to_owned)
    }

    fn write(&self) -> Value {
        Value::String(self.clone())
    }
}

impl Setting for PathBuf {
    fn read(value: &Value) -> Option<Self> {
        value.as_str().map(Self::from)
    }

    fn write(&self) -> Value {
        Value::String(self.display().to_string())
    }
}

/// A path that may be left empty.
impl Setting for Option<PathBuf> {
    fn read(value: &Value) -> Option<Self> {
        value.as_str().map(|text| (!text.is_empty()).then(|| PathBuf::from(text)))
    }

    fn write(&self) -> Value {
        Value::String(self.as_ref().map(|p| p.display().to_string()).unwrap_or_default())
    }
}

impl Setting for SocketAddr {
    fn read(value: &Value) -> Option<Self> {
        value.as_str()?.parse().ok()
    }

    fn write(&self) -> Value {
        Value::String(self.to_string())
    }
}

/// An address that may be switched off.
impl Setting for Option<SocketAddr> {
    fn read(value: &Value) -> Option<Self> {
        match value.as_str()? {
            "off" => Some(None),
            text => text.parse().ok().map(Some),
        }
    }

    fn write(&self) -> Value {
        Value::String(self.map_or_else(|| "off".to_owned(), |a| a.to_string()))
    }
}

impl Setting for Vec<String> {
    fn read(value: &Value) -> Option<Self> {
        value.as_array()?.iter().map(|v| v.as_str().map(str::to_owned)).collect()
    }

    fn write(&self) -> Value {
        Value::Array(self.iter().cloned().map(Value::String).collect())
    }
}
