//! What a crate depends on, with the lines that say so, read from its `Cargo.toml`.

use anyhow::Context as _;
use toml::{Table, Value};

/// A package named under `[dependencies]` or `[build-dependencies]`, for whatever target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Dependency {
    /// First line of the manifest on which its key stands, from 1; 1 if it can't be found.
    pub(crate) line: u32,
    /// Name of the package; of a renamed dependency, the real one.
    pub(crate) package: String,
}

/// The dependencies of a manifest, dev-dependencies left out.
///
/// # Errors
/// When `text` is not TOML.
pub(crate) fn dependencies(text: &str) -> anyhow::Result<Vec<Dependency>> {
    let manifest: Table = text.parse().context("not a Cargo.toml")?;
    let targets = manifest.get("target").and_then(Value::as_table);
    let tables = targets.into_iter().flatten().filter_map(|(_, target)| target.as_table());
    let mut found = Vec::new();
    for table in std::iter::once(&manifest).chain(tables) {
        for section in ["dependencies", "build-dependencies"] {
            for (key, value) in table.get(section).and_then(Value::as_table).into_iter().flatten() {
                let package = value.get("package").and_then(Value::as_str).unwrap_or(key).to_owned();
                found.push(Dependency { line: line_of(text, key), package });
            }
        }
    }
    Ok(found)
}

fn line_of(text: &str, key: &str) -> u32 {
    let is_key = |line: &str| {
        let line = line.trim_start().trim_start_matches('"');
        line.strip_prefix(key).is_some_and(|rest| rest.starts_with(['.', ' ', '=', '"']))
            || line.ends_with(&format!(".{key}]"))
    };
    text.lines().zip(1..).find(|(line, _)| is_key(line)).map_or(1, |(_, number)| number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_dependencies_of_every_shape_and_leaves_dev_dependencies_out() {
        let text = r#"
[package]
name = "fulmar-protocol"

[dependencies]
bytes.workspace = true
clock = { package = "tokio", version = "1" }

[build-dependencies]
cc = "1"

[dev-dependencies]
sled = "0.34"

[target.'cfg(unix)'.dependencies]
rustix = "1"

[dependencies.quinn]
version = "0.11"
"#;
        let mut found: Vec<(String, u32)> =
            dependencies(text).unwrap().into_iter().map(|d| (d.package, d.line)).collect();
        found.sort();
        let want = [("bytes", 6), ("cc", 10), ("quinn", 18), ("rustix", 16), ("tokio", 7)];
        assert_eq!(found, want.map(|(p, l)| (p.to_owned(), l)));
    }

    #[test]
    fn a_broken_manifest_is_an_error() {
        assert!(dependencies("[dependencies").is_err());
    }
}
