//! Where settings come from, and which one wins: defaults, then the file, then the environment, then flags.
//!
//! - Every value that is refused is named with its origin: file and line, variable, or flag.
//! - Nothing is skipped: an unknown section, key or `FULMAR_` variable of a section is an error.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use toml::Value;
use toml::de::{DeTable, DeValue};

use super::setting::{KeyDoc, Refusal, Section};

/// Where a value stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A line of the file, counted from 1.
    File(PathBuf, usize),
    /// An environment variable.
    Env(String),
    /// A flag of the command line.
    Flag(String),
    /// Nobody set it.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path, 0) => write!(f, "{}", path.display()),
            Self::File(path, line) => write!(f, "{}:{line}", path.display()),
            Self::Env(name) => write!(f, "environment variable {name}"),
            Self::Flag(name) => write!(f, "flag {name}"),
            Self::Default => f.write_str("default"),
        }
    }
}

/// The configuration can't be used; one line that says where, what, and what to do.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{origin}: {what}")]
pub struct ConfigError {
    /// Where the value stands.
    pub origin: Origin,
    /// What is wrong with it and what would be right.
    pub what: String,
}

impl ConfigError {
    pub(super) fn new(origin: Origin, what: impl Into<String>) -> Self {
        Self { origin, what: what.into() }
    }
}

/// `section.key = text` from the environment or the command line.
#[derive(Clone, Debug)]
pub struct Assignment {
    /// Where it was given.
    pub origin: Origin,
    /// The section.
    pub section: String,
    /// The key.
    pub key: String,
    /// The value as text: a number, `true`, a string without quotes, or a list with commas between its items.
    pub text: String,
}

impl Assignment {
    /// What a flag of its own stands for, such as `--listen` for `listen.address`.
    #[must_use]
    pub fn flag(flag: &str, section: &str, key: &str, text: impl Into<String>) -> Self {
        Self {
            origin: Origin::Flag(flag.to_owned()),
            section: section.to_owned(),
            key: key.to_owned(),
            text: text.into(),
        }
    }

    /// `--set section.key=value`.
    ///
    /// # Errors
    /// The text has another shape.
    pub fn set(text: &str) -> Result<Self, ConfigError> {
        let parsed = text
            .split_once('=')
            .and_then(|(place, value)| place.trim().split_once('.').map(|(s, k)| (s, k, value.trim())));
        match parsed {
            Some((section, key, value)) => {
                Ok(Self::flag(&format!("--set {section}.{key}"), section, key, value))
            }
            None => Err(ConfigError::new(
                Origin::Flag("--set".to_owned()),
                format!("{text:?}: expected section.key=value, such as --set fanout.ring_frames=512"),
            )),
        }
    }
}

/// The sections a reader fills, addressed by name.
pub(super) trait Sections {
    /// Names of all sections, `app` not among them.
    fn names() -> Vec<&'static str>;
    /// The keys of a section.
    fn keys(section: &str) -> Option<Vec<KeyDoc>>;
    /// Sets one key; `None` when there is no such section.
    fn set(&mut self, section: &str, key: &str, value: &Value) -> Option<Result<(), Refusal>>;
}

/// Origin of every key that was set, as `section.key` (`app[0].key` for apps).
pub(super) type Origins = HashMap<String, Origin>;

/// The file's text with the places of its values.
pub(super) struct File<'a> {
    path: &'a Path,
    text: &'a str,
}

impl<'a> File<'a> {
    pub(super) fn new(path: &'a Path, text: &'a str) -> Self {
        Self { path, text }
    }

    fn at(&self, offset: usize) -> Origin {
        let before = self.text.as_bytes().iter().take(offset);
        Origin::File(self.path.to_owned(), 1 + before.filter(|&&b| b == b'\n').count())
    }

    /// Applies every value of the file.
    pub(super) fn apply<S: Sections, A: Section>(
        &self,
        sections: &mut S,
        apps: &mut Vec<A>,
        origins: &mut Origins,
    ) -> Result<(), ConfigError> {
        let table = DeTable::parse(self.text).map_err(|e| {
            let message = e.message().lines().next().unwrap_or("it can't be read").to_owned();
            ConfigError::new(
                self.at(e.span().map_or(0, |s| s.start)),
                format!("not TOML: {message}; `fulmar serve --print-config` shows a whole file"),
            )
        })?;
        for (name, value) in table.get_ref() {
            let here = self.at(name.span().start);
            let name = name.get_ref().as_ref();
            match value.get_ref() {
                DeValue::Array(entries) if name == A::NAME => {
                    for entry in entries.iter() {
                        let here = self.at(entry.span().start);
                        let DeValue::Table(keys) = entry.get_ref() else {
                            return Err(not_a_section(here, &format!("[[{name}]]"), name));
                        };
                        let mut app = A::default();
                        let place = format!("{name}[{}]", apps.len());
                        origins.insert(place.clone(), here);
                        self.keys(&place, keys, origins, &A::keys(), |key, value| app.set(key, value))?;
                        apps.push(app);
                    }
                }
                DeValue::Table(_) if name == A::NAME => {
                    return Err(ConfigError::new(
                        here,
                        format!("[{name}] may be there several times: write [[{name}]]"),
                    ));
                }
                DeValue::Table(keys) => {
                    let Some(known) = S::keys(name) else {
                        return Err(ConfigError::new(here, no_such_section::<S>(name, A::NAME)));
                    };
                    self.keys(name, keys, origins, &known, |key, value| {
                        sections.set(name, key, value).unwrap_or(Err(Refusal::NoSuchKey))
                    })?;
                }
                _ if name == A::NAME || S::keys(name).is_some() => {
                    return Err(not_a_section(here, &format!("[{name}]"), name));
                }
                _ => {
                    let home = S::names()
                        .into_iter()
                        .find(|s| S::keys(s).is_some_and(|keys| keys.iter().any(|known| known.name == name)));
                    let advice = match home {
                        Some(section) => format!("put it under [{section}]"),
                        None => no_such_section::<S>(name, A::NAME),
                    };
                    return Err(ConfigError::new(
                        here,
                        format!("{name:?} stands outside any section; {advice}"),
                    ));
                }
            }
        }
        Ok(())
    }

    fn keys(
        &self,
        place: &str,
        keys: &DeTable<'_>,
        origins: &mut Origins,
        known: &[KeyDoc],
        mut set: impl FnMut(&str, &Value) -> Result<(), Refusal>,
    ) -> Result<(), ConfigError> {
        for (key, value) in keys {
            let here = self.at(key.span().start);
            let key = key.get_ref().as_ref();
            let value = plain(value.get_ref()).ok_or_else(|| {
                ConfigError::new(here.clone(), format!("{place}.{key}: the number is too large"))
            })?;
            set(key, &value).map_err(|refusal| refused(here.clone(), place, key, &value, refusal, known))?;
            origins.insert(format!("{place}.{key}"), here);
        }
        Ok(())
    }
}

/// The value without its places; `None` for a number beyond 64 bits.
fn plain(value: &DeValue<'_>) -> Option<Value> {
    Some(match value {
        DeValue::String(text) => Value::String(text.as_ref().to_owned()),
        DeValue::Integer(number) => {
            Value::Integer(i64::from_str_radix(&number.as_str().replace('_', ""), number.radix()).ok()?)
        }
        DeValue::Float(number) => Value::Float(number.as_str().replace('_', "").parse().ok()?),
        DeValue::Boolean(flag) => Value::Boolean(*flag),
        DeValue::Datetime(time) => Value::Datetime(*time),
        DeValue::Array(items) => {
            Value::Array(items.iter().map(|i| plain(i.get_ref())).collect::<Option<_>>()?)
        }
        DeValue::Table(table) => Value::Table(
            table
                .iter()
                .map(|(k, v)| Some((k.get_ref().as_ref().to_owned(), plain(v.get_ref())?)))
                .collect::<Option<_>>()?,
        ),
    })
}

/// Applies one assignment of the environment or the command line.
pub(super) fn assign<S: Sections>(
    sections: &mut S,
    origins: &mut Origins,
    assignment: &Assignment,
) -> Result<(), ConfigError> {
    let Assignment { origin, section, key, text } = assignment;
    let Some(known) = S::keys(section) else {
        return Err(ConfigError::new(origin.clone(), no_such_section::<S>(section, "app")));
    };
    let kind = known.iter().find(|k| k.name == key).map(|k| &k.default);
    let value = typed(text, kind);
    sections
        .set(section, key, &value)
        .unwrap_or(Err(Refusal::NoSuchKey))
        .map_err(|refusal| refused(origin.clone(), section, key, &value, refusal, &known))?;
    origins.insert(format!("{section}.{key}"), origin.clone());
    Ok(())
}

/// The variables that name a setting: `FULMAR_<SECTION>_<KEY>`. Other `FULMAR_` variables belong to other commands.
pub(super) fn assignments_of_environment<S: Sections>(environment: &[(String, String)]) -> Vec<Assignment> {
    let mut found: Vec<Assignment> = environment
        .iter()
        .filter_map(|(name, text)| {
            let rest = name.strip_prefix("FULMAR_")?.to_ascii_lowercase();
            let (section, key) = S::names().into_iter().find_map(|section| {
                rest.strip_prefix(section)?.strip_prefix('_').map(|key| (section, key))
            })?;
            Some(Assignment {
                section: section.to_owned(),
                key: key.to_owned(),
                origin: Origin::Env(name.clone()),
                text: text.clone(),
            })
        })
        .collect();
    found.sort_by(|a, b| (&a.section, &a.key).cmp(&(&b.section, &b.key)));
    found
}

/// Text as a value of the same kind as the key's default; as a string when it is not of that kind.
fn typed(text: &str, kind: Option<&Value>) -> Value {
    let as_string = || Value::String(text.to_owned());
    match kind {
        Some(Value::Integer(_)) => text.replace('_', "").parse().map_or_else(|_| as_string(), Value::Integer),
        Some(Value::Boolean(_)) => text.parse().map_or_else(|_| as_string(), Value::Boolean),
        Some(Value::Array(_)) => Value::Array(
            text.split(',')
                .map(str::trim)
                .filter(|t| !t.is_empty())
                .map(|t| Value::String(t.to_owned()))
                .collect(),
        ),
        _ => as_string(),
    }
}

fn refused(
    origin: Origin,
    section: &str,
    key: &str,
    value: &Value,
    refusal: Refusal,
    known: &[KeyDoc],
) -> ConfigError {
    let what = match refusal {
        Refusal::NoSuchKey => {
            let names: Vec<&str> = known.iter().map(|k| k.name).collect();
            let section = section.split('[').next().unwrap_or(section);
            let advice = match nearest(key, &names) {
                Some(near) => format!("did you mean {near:?}?"),
                None => format!("its keys are {}", names.join(", ")),
            };
            format!("[{section}] has no key {key:?}; {advice}")
        }
        Refusal::Expected(expected) => format!("{section}.{key} = {}: expected {expected}", shown(value)),
        Refusal::Renamed(now) => {
            format!("{section}.{key} = {}: this is called {now:?} now, write that", shown(value))
        }
    };
    ConfigError::new(origin, what)
}

/// A value in one short line.
fn shown(value: &Value) -> String {
    let text = value.to_string().replace(['\n', '\r'], " ");
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{} …", text.get(..end).unwrap_or_default()),
        None => text,
    }
}

fn not_a_section(origin: Origin, header: &str, name: &str) -> ConfigError {
    ConfigError::new(
        origin,
        format!("{name} is a section: write {header} on a line of its own, its keys below"),
    )
}

fn no_such_section<S: Sections>(name: &str, more: &'static str) -> String {
    let mut names = S::names();
    names.push(more);
    match nearest(name, &names) {
        Some(near) => format!("there is no section [{name}]; did you mean [{near}]?"),
        None => format!("there is no section [{name}]; sections are {}", names.join(", ")),
    }
}

/// The name that was probably meant.
pub(super) fn nearest<'a>(wrong: &str, names: &[&'a str]) -> Option<&'a str> {
    let wrong = wrong.to_ascii_lowercase();
    names
        .iter()
        .map(|name| (distance(&wrong, name), *name))
        .filter(|(distance, name)| *distance <= 1 + name.len() / 4)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

/// Letters to add, drop or change to come from one word to the other.
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut next = vec![i + 1];
        for ((b, &above_left), &above) in to.iter().zip(&row).zip(row.iter().skip(1)) {
            let left = next.last().copied().unwrap_or(0);
            next.push((above_left + usize::from(a != *b)).min(above + 1).min(left + 1));
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}
