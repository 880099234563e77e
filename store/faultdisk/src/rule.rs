//! Rules: which calls fail, are left out, or are the last ones.
//!
//! A rule is words separated by spaces, an action and then `name=value`:
//!
//! | action | does |
//! |---|---|
//! | `fail` | the call is not made and fails with `errno` |
//! | `skip` | the call is not made and seems to succeed (a disk that lies about syncs) |
//! | `kill` | the process ends as by `kill -9`, before or after the call |
//! | `full` | writes fail with `ENOSPC` once `bytes` were written below the root; a write that crosses the line is short |
//!
//! | name | value |
//! |---|---|
//! | `op` | `open`, `create`, `write`, `length`, `rename`, `unlink`, `mkdir`, `link`, `sync` or `any` (if not given) |
//! | `path` | part of the path below the root (of a rename, of either path); everything if not given |
//! | `nth` | which matching call it begins with, from 1 (if not given, 1) |
//! | `keep` | `once` (if not given) or `on`: every matching call from then on |
//! | `until` | a file; the rule holds only while it exists |
//! | `errno` | a number, `EIO` or `ENOSPC`; `EIO` if not given |
//! | `when` | of `kill`: `before` (if not given) or `after` |
//! | `bytes` | of `full`: how many |

use libc::c_int;

use crate::system;

/// What a call is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Open,
    Create,
    Write,
    Length,
    Rename,
    Unlink,
    Mkdir,
    Link,
    Sync,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Fail(c_int),
    Skip,
    Kill { after: bool },
    Full { bytes: u64 },
}

/// One rule, and how many calls it matched.
#[derive(Debug)]
pub(crate) struct Rule {
    action: Action,
    operation: Option<Operation>,
    path: Vec<u8>,
    nth: u64,
    once: bool,
    until: Option<Vec<u8>>,
    matched: u64,
}

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is made.
    Go,
    /// It is made, and then the process ends.
    GoAndDie,
    /// It is not made; this is the error number.
    Fail(c_int),
    /// It is not made, and seems to succeed.
    Skip,
    /// The process ends.
    Die,
    /// A write is made with at most so many bytes.
    Short(u64),
}

impl Rule {
    fn holds(&self) -> bool {
        self.until.as_ref().is_none_or(|file| system::exists(file))
    }

    fn matches(&self, operation: Operation, paths: &[&[u8]]) -> bool {
        let path = |path: &&[u8]| {
            self.path.is_empty() || path.windows(self.path.len()).any(|part| part == self.path)
        };
        self.operation.is_none_or(|wanted| wanted == operation) && paths.iter().any(path)
    }
}

/// Asks the rules about a call. `bytes`: what a write would add to the `written` bytes so far.
pub(crate) fn judge(
    rules: &mut [Rule],
    operation: Operation,
    paths: &[&[u8]],
    written: u64,
    bytes: u64,
) -> Verdict {
    for rule in rules {
        if let Action::Full { bytes: most } = rule.action {
            if operation == Operation::Write && written.saturating_add(bytes) > most && rule.holds() {
                let room = most.saturating_sub(written);
                return if room == 0 { Verdict::Fail(libc::ENOSPC) } else { Verdict::Short(room) };
            }
            continue;
        }
        if !rule.matches(operation, paths) || !rule.holds() {
            continue;
        }
        rule.matched += 1;
        let now = rule.matched == rule.nth || (rule.matched > rule.nth && !rule.once);
        if !now {
            continue;
        }
        return match rule.action {
            Action::Fail(number) => Verdict::Fail(number),
            Action::Skip => Verdict::Skip,
            Action::Kill { after: false } => Verdict::Die,
            Action::Kill { after: true } => Verdict::GoAndDie,
            Action::Full { .. } => Verdict::Go,
        };
    }
    Verdict::Go
}

/// Reads rules separated by `;`.
pub(crate) fn parse(text: &str) -> Result<Vec<Rule>, String> {
    text.split(';').map(str::trim).filter(|rule| !rule.is_empty()).map(parse_one).collect()
}

fn parse_one(text: &str) -> Result<Rule, String> {
    let mut words = text.split_whitespace();
    let action = words.next().unwrap_or_default();
    let mut rule = Rule {
        action: match action {
            "fail" => Action::Fail(libc::EIO),
            "skip" => Action::Skip,
            "kill" => Action::Kill { after: false },
            "full" => Action::Full { bytes: 0 },
            other => return Err(format!("no such action: {other}")),
        },
        operation: None,
        path: Vec::new(),
        nth: 1,
        once: true,
        until: None,
        matched: 0,
    };
    for word in words {
        let Some((name, value)) = word.split_once('=') else { return Err(format!("not name=value: {word}")) };
        let number = || value.parse::<u64>().map_err(|_| format!("not a number: {word}"));
        match (name, value) {
            ("op", _) => rule.operation = operation(value)?,
            ("path", _) => rule.path = value.as_bytes().to_vec(),
            ("nth", _) => rule.nth = number()?.max(1),
            ("keep", "once") => rule.once = true,
            ("keep", "on") => rule.once = false,
            ("until", _) => rule.until = Some(value.as_bytes().to_vec()),
            ("errno", "EIO") => rule.action = failing(rule.action, libc::EIO)?,
            ("errno", "ENOSPC") => rule.action = failing(rule.action, libc::ENOSPC)?,
            ("errno", _) => {
                let number =
                    c_int::try_from(number()?).map_err(|_| format!("not an error number: {word}"))?;
                rule.action = failing(rule.action, number)?;
            }
            ("when", "before") if action == "kill" => rule.action = Action::Kill { after: false },
            ("when", "after") if action == "kill" => rule.action = Action::Kill { after: true },
            ("bytes", _) if action == "full" => rule.action = Action::Full { bytes: number()? },
            _ => return Err(format!("makes no sense here: {word}")),
        }
    }
    if rule.action == Action::Skip
        && matches!(rule.operation, None | Some(Operation::Open | Operation::Create))
    {
        return Err(
            "`skip` needs an op, and an open can't be left out: there would be no descriptor".to_owned()
        );
    }
    Ok(rule)
}

fn failing(action: Action, number: c_int) -> Result<Action, String> {
    match action {
        Action::Fail(_) => Ok(Action::Fail(number)),
        _ => Err("only `fail` has an errno".to_owned()),
    }
}

fn operation(name: &str) -> Result<Option<Operation>, String> {
    Ok(Some(match name {
        "any" => return Ok(None),
        "open" => Operation::Open,
        "create" => Operation::Create,
        "write" => Operation::Write,
        "length" => Operation::Length,
        "rename" => Operation::Rename,
        "unlink" => Operation::Unlink,
        "mkdir" => Operation::Mkdir,
        "link" => Operation::Link,
        "sync" => Operation::Sync,
        other => return Err(format!("no such operation: {other}")),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Vec<Rule> {
        parse(text).unwrap()
    }

    #[test]
    fn the_nth_matching_call_once_or_from_then_on() {
        let mut once = one("fail op=sync path=.log nth=2 errno=ENOSPC");
        let mut ask = |path: &[u8]| judge(&mut once, Operation::Sync, &[path], 0, 0);
        assert_eq!(
            [ask(b"s/1.log"), ask(b"s/tip"), ask(b"s/1.log"), ask(b"s/1.log")],
            [Verdict::Go, Verdict::Go, Verdict::Fail(libc::ENOSPC), Verdict::Go]
        );
        let mut on = one("skip op=write nth=2 keep=on; kill op=rename when=after");
        let mut ask = |operation| judge(&mut on, operation, &[b"a"], 0, 9);
        assert_eq!(ask(Operation::Write), Verdict::Go);
        assert_eq!(ask(Operation::Write), Verdict::Skip);
        assert_eq!(ask(Operation::Write), Verdict::Skip);
        assert_eq!(ask(Operation::Rename), Verdict::GoAndDie);
        assert_eq!(ask(Operation::Rename), Verdict::Go);
    }

    #[test]
    fn a_full_disk_takes_what_fits_and_no_more() {
        let mut full = one("full bytes=10");
        let mut ask = |written, bytes| judge(&mut full, Operation::Write, &[b"a"], written, bytes);
        assert_eq!(ask(0, 10), Verdict::Go);
        assert_eq!(ask(8, 3), Verdict::Short(2));
        assert_eq!(ask(10, 1), Verdict::Fail(libc::ENOSPC));
        let mut until = one("full bytes=0 until=/no/such/file");
        assert_eq!(judge(&mut until, Operation::Write, &[b"a"], 5, 5), Verdict::Go);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for text in [
            "explode",
            "fail op=swim",
            "fail nth",
            "kill errno=EIO",
            "skip",
            "skip op=open",
            "fail nth=x",
            "fail when=after",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(parse(" ; ").unwrap().is_empty());
    }
}
