//! The layering check: reads manifests and sources, and says which lines name what they must not.
//!
//! The policy is the table in [`rules`]; this file applies it to a tree. A tree is paths and texts, so the check
//! itself is tried on small trees that break each rule.

mod manifest;
pub(crate) mod rules;
mod source;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::Context as _;

use rules::{CrateRule, SourceRule};

/// The files the rules speak of: path from the workspace's root, with `/`, to content.
pub(crate) type Tree = BTreeMap<String, String>;

/// One line that breaks one rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Violation {
    file: String,
    line: u32,
    what: String,
    rule: &'static str,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}\n    rule: {}", self.file, self.line, self.what, self.rule)
    }
}

/// Reads every manifest and source file below `root` that a rule speaks of.
///
/// # Errors
/// When a file can't be read. A file or folder that is not there is no error here; [`check`] reports it.
pub(crate) fn read_tree(root: &Path) -> anyhow::Result<Tree> {
    let mut tree = Tree::new();
    for rule in rules::CRATES {
        read_into(&mut tree, root, &manifest_of(rule))?;
    }
    for within in rules::SOURCES.iter().flat_map(|rule| rule.within) {
        read_into(&mut tree, root, within.trim_end_matches('/'))?;
    }
    Ok(tree)
}

fn read_into(tree: &mut Tree, root: &Path, path: &str) -> anyhow::Result<()> {
    let full = root.join(path);
    if full.is_dir() {
        for entry in full.read_dir().with_context(|| format!("can't list {path}"))? {
            let name = entry.with_context(|| format!("can't list {path}"))?.file_name();
            let below = format!("{path}/{}", name.to_string_lossy());
            read_into(tree, root, &below)?;
        }
    } else if full.is_file() && (path.ends_with(".rs") || path.ends_with(".toml")) {
        let text = std::fs::read_to_string(&full).with_context(|| format!("can't read {path}"))?;
        tree.insert(path.to_owned(), text);
    }
    Ok(())
}

/// Every line of `tree` that breaks a rule, in the order of files and lines.
///
/// # Errors
/// When a manifest is not TOML.
pub(crate) fn check(
    tree: &Tree,
    crates: &[CrateRule],
    sources: &[SourceRule],
) -> anyhow::Result<Vec<Violation>> {
    let mut violations = Vec::new();
    for rule in crates {
        check_manifest(tree, rule, &mut violations)?;
    }
    for rule in sources {
        for within in rule.within {
            check_sources(tree, within, rule, &mut violations);
        }
    }
    violations.sort();
    violations.dedup();
    Ok(violations)
}

fn manifest_of(rule: &CrateRule) -> String {
    format!("{}/Cargo.toml", rule.folder)
}

fn check_manifest(tree: &Tree, rule: &CrateRule, violations: &mut Vec<Violation>) -> anyhow::Result<()> {
    let file = manifest_of(rule);
    let Some(text) = tree.get(&file) else {
        violations.push(missing(&file, rule.because));
        return Ok(());
    };
    for dependency in manifest::dependencies(text).with_context(|| file.clone())? {
        if rule.forbids.iter().flat_map(|list| list.iter()).any(|f| *f == dependency.package) {
            violations.push(Violation {
                file: file.clone(),
                line: dependency.line,
                what: format!("depends on `{}`", dependency.package),
                rule: rule.because,
            });
        }
    }
    Ok(())
}

fn check_sources(tree: &Tree, within: &str, rule: &SourceRule, violations: &mut Vec<Violation>) {
    let covered = |file: &str| if within.ends_with('/') { file.starts_with(within) } else { file == within };
    let mut any = false;
    for (file, text) in tree.iter().filter(|(file, _)| covered(file) && file.ends_with(".rs")) {
        any = true;
        // `#[cfg(test)] mod tests;` puts test code into a file of its own.
        if file.ends_with("/tests.rs") || file.contains("/tests/") {
            continue;
        }
        let Some((folder, below_src)) = file.split_once("/src/") else { continue };
        let lib = format!("fulmar_{}", folder.replace('-', "_"));
        for name in source::names(text, &source::module_of(below_src), &lib) {
            let forbidden = rule.forbids.iter().flat_map(|list| list.iter()).any(|f| covers(f, &name.path));
            if forbidden && !rule.but.iter().any(|b| covers(b, &name.path)) {
                violations.push(Violation {
                    file: file.clone(),
                    line: name.line,
                    what: format!("names `{}`", name.path.join("::")),
                    rule: rule.because,
                });
            }
        }
    }
    if !any {
        violations.push(missing(within, rule.because));
    }
}

fn missing(path: &str, rule: &'static str) -> Violation {
    let what = "a rule speaks of it, but it is not there: change the table in xtask/src/layering/rules.rs";
    Violation { file: path.to_owned(), line: 0, what: what.to_owned(), rule }
}

/// Whether the forbidden (or allowed) `pattern` covers `path`.
fn covers(pattern: &str, path: &[String]) -> bool {
    let matches = |words: &[&str], path: &[String]| words.iter().zip(path).all(|(w, p)| w == p);
    if let Some(end) = pattern.strip_prefix("*::") {
        let words: Vec<&str> = end.split("::").collect();
        let from = path.len().checked_sub(words.len());
        return from.and_then(|n| path.get(n..)).is_some_and(|tail| matches(&words, tail));
    }
    let words: Vec<&str> = pattern.split("::").collect();
    path.len() >= words.len() && matches(&words, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tree that keeps every rule: the files the rules speak of, each with little in it.
    fn clean() -> Tree {
        let mut tree = Tree::new();
        for rule in rules::CRATES {
            tree.insert(manifest_of(rule), "[dependencies]\nbytes = \"1\"\n".to_owned());
        }
        for within in rules::SOURCES.iter().flat_map(|rule| rule.within) {
            let file = if within.ends_with('/') { format!("{within}mod.rs") } else { (*within).to_owned() };
            tree.insert(file, "//! tokio::spawn is only spoken of here.\nuse bytes::Bytes;\n".to_owned());
        }
        tree
    }

    fn broken_by(file: &str, text: &str) -> Vec<(String, u32)> {
        let mut tree = clean();
        tree.insert(file.to_owned(), text.to_owned());
        let violations = check(&tree, rules::CRATES, rules::SOURCES).unwrap();
        violations.into_iter().map(|v| (v.file, v.line)).collect()
    }

    #[test]
    fn a_tree_that_keeps_the_rules_passes() {
        assert_eq!(check(&clean(), rules::CRATES, rules::SOURCES).unwrap(), []);
    }

    #[test]
    fn each_forbidden_name_is_found_on_its_line() {
        for (file, text) in [
            ("protocol/src/session/client.rs", "\nuse tokio::time::sleep;\n"),
            ("protocol/src/frame/codec.rs", "\nfn f() { std::time::Instant::now(); }\n"),
            ("protocol/src/producer.rs", "use std::time::SystemTime;\nfn f() { SystemTime::now(); }\n"),
            ("gateway/src/accept/endpoint.rs", "\nuse crate::conversation::Shard;\n"),
            ("gateway/src/accept/endpoint.rs", "\nuse fulmar_store::Log;\n"),
            ("gateway/src/accept/mod.rs", "\nuse crate::gateway::Gateway;\n"),
            ("gateway/src/config.rs", "\nuse crate::accept::Admission;\n"),
            ("gateway/src/connection/driver.rs", "\nuse crate::accept::Admission;\n"),
            ("gateway/src/connection/driver.rs", "\nuse fulmar_store::Log;\n"),
            ("gateway/src/conversation/shard.rs", "\nuse crate::{bytes, connection};\n"),
            ("gateway/src/conversation/shard.rs", "\nuse super::super::receipt::Cursor;\n"),
            ("gateway/src/conversation/shard.rs", "\nuse crate::*;\n"),
            ("gateway/src/fanout/push.rs", "\nfn f(_: &crate::connection::Writer) {}\n"),
            ("gateway/src/fanout/push.rs", "\nuse crate::conversation::state;\n"),
            ("gateway/src/fanout/push.rs", "\nuse fulmar_store::Record;\n"),
            ("gateway/src/fanout/push.rs", "\nuse fulmar_sim::World;\n"),
            ("gateway/src/receipt/cursor.rs", "\nuse crate::fanout::ring::Ring;\n"),
            ("gateway/src/receipt/cursor.rs", "\nuse crate::fanout::*;\n"),
            ("gateway/src/service/builtin/groups.rs", "\nuse crate::connection::Dispatch;\n"),
            ("gateway/src/accept/admission.rs", "use tokio::time;\nuse tokio::net;\n"),
            ("gateway/src/conversation/route.rs", "\nuse quinn::Endpoint;\n"),
            ("gateway/src/conversation/state.rs", "\nfn f() { tokio::time::Instant::now(); }\n"),
            ("gateway/src/fanout/roster.rs", "\nuse sled::Db;\n"),
            ("client-sdk/src/state.rs", "\nfn f() { rand::random::<u64>(); }\n"),
            ("protocol/Cargo.toml", "[dependencies]\ntokio = \"1\"\n"),
            ("protocol/Cargo.toml", "[dependencies]\nclock = { package = \"quinn\" }\n"),
            ("store/Cargo.toml", "[dependencies]\nfulmar-gateway.workspace = true\n"),
            ("store/faultdisk/Cargo.toml", "[dependencies]\nfulmar-store.workspace = true\n"),
            ("store/rig/Cargo.toml", "[dependencies]\nfulmar-faultdisk.workspace = true\n"),
            ("gateway/Cargo.toml", "[dependencies]\nfulmar-store-rig.workspace = true\n"),
            ("client-sdk/Cargo.toml", "[dependencies]\nfulmar-store.workspace = true\n"),
            ("sim/badnet/Cargo.toml", "[dependencies]\nfulmar-client.workspace = true\n"),
            ("gateway/Cargo.toml", "[dependencies]\nfulmar-sim.workspace = true\n"),
            ("gateway/Cargo.toml", "[dependencies]\nsled.workspace = true\n"),
        ] {
            assert!(broken_by(file, text).contains(&(file.to_owned(), 2)), "not found: {file}: {text}");
        }
    }

    #[test]
    fn what_the_rules_allow_is_not_reported() {
        for (file, text) in [
            ("gateway/src/gateway.rs", "use crate::{accept, connection, conversation};"),
            (
                "gateway/src/accept/endpoint.rs",
                "use crate::{config::Tls, connection::Driver}; use quinn::Endpoint;",
            ),
            ("gateway/src/accept/admission.rs", "use std::net::IpAddr; use std::time::{Duration, Instant};"),
            ("gateway/src/connection/driver.rs", "use crate::{conversation, fanout, receipt, service};"),
            ("gateway/src/conversation/shard.rs", "use crate::fanout::Handle; use fulmar_store::Log;"),
            ("gateway/src/receipt/cursor.rs", "use crate::fanout::owed::OwedSet; use fulmar_store::Log;"),
            ("gateway/src/fanout/roster.rs", "#[cfg(test)]\nmod tests { use crate::connection::Driver; }"),
            ("gateway/src/fanout/tests.rs", "use crate::connection::Driver;"),
            ("protocol/Cargo.toml", "[dev-dependencies]\ntokio = \"1\"\n"),
        ] {
            assert_eq!(broken_by(file, text), [], "{file}: {text}");
        }
    }

    #[test]
    fn a_rule_about_nothing_is_reported() {
        let mut tree = clean();
        tree.remove("gateway/src/fanout/ring.rs");
        tree.remove("sim/Cargo.toml");
        let violations = check(&tree, rules::CRATES, rules::SOURCES).unwrap();
        let files: Vec<&str> = violations.iter().map(|v| v.file.as_str()).collect();
        assert_eq!(files, ["gateway/src/fanout/ring.rs", "sim/Cargo.toml"]);
    }

    #[test]
    fn a_violation_reads_as_file_line_and_rule() {
        let mut tree = clean();
        tree.insert("gateway/src/fanout/push.rs".to_owned(), "use crate::connection::Writer;".to_owned());
        let shown = check(&tree, rules::CRATES, rules::SOURCES).unwrap().first().unwrap().to_string();
        assert_eq!(
            shown,
            "gateway/src/fanout/push.rs:1: names `crate::connection::Writer`\n    \
             rule: fanout knows frames, never a connection, a conversation or the store"
        );
    }
}
