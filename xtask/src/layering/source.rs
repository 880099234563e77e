//! What a Rust file names: its `use` lines and the paths written out in its code, with their lines.
//!
//! - Comments, strings and lifetimes name nothing; neither does an item under `#[cfg(test)]`.
//! - `use` trees are opened, `self`, `super` and renamed imports are followed, so `crate::connection` is found
//!   however it is spelled.
//!
//! Not here: macro expansion and re-exports from other files. This reads text; the compiler is not asked.

use std::collections::HashMap;

/// A path that a file names, made absolute where that can be seen from the file alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Name {
    /// Line of its first word, from 1.
    pub(crate) line: u32,
    /// Its segments: `crate`, `connection`, `Driver`, or `tokio`, `spawn`. A glob import ends with `*`.
    pub(crate) path: Vec<String>,
}

/// The names in `text`, the content of the file whose module path inside its crate is `module`.
///
/// `lib` is the crate's own name as other files write it (`fulmar_gateway`); it counts as `crate`.
pub(crate) fn names(text: &str, module: &[String], lib: &str) -> Vec<Name> {
    let mut reader = Reader {
        tokens: without_tests(tokens(text)),
        at: 0,
        lib,
        module: module.to_vec(),
        found: Vec::new(),
    };
    reader.read();
    let Reader { mut found, .. } = reader;
    let aliases: HashMap<String, Vec<String>> = found
        .iter()
        .filter_map(|f| f.imported_as.clone().map(|alias| (alias, f.name.path.clone())))
        .collect();
    for f in found.iter_mut().filter(|f| !f.is_use) {
        let Some(first) = f.name.path.first() else { continue };
        if let Some(full) = aliases.get(first) {
            f.name.path = full.iter().chain(f.name.path.iter().skip(1)).cloned().collect();
        }
    }
    found.into_iter().map(|f| f.name).collect()
}

/// The module path of a file below `src/`: `fanout/ring.rs` is `fanout::ring`, `fanout/mod.rs` is `fanout`.
pub(crate) fn module_of(file_below_src: &str) -> Vec<String> {
    let stem = file_below_src.strip_suffix(".rs").unwrap_or(file_below_src);
    let mut module: Vec<String> = stem.split('/').map(str::to_owned).collect();
    let root = module.len() == 1;
    match module.last().map(String::as_str) {
        Some("mod") => drop(module.pop()),
        Some("lib" | "main") if root => module.clear(),
        _ => {}
    }
    module
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Word(String),
    /// `::`
    Colons,
    Mark(char),
}

#[derive(Clone, Debug)]
struct Token {
    line: u32,
    kind: Kind,
}

impl Token {
    fn is_word(&self, word: &str) -> bool {
        matches!(&self.kind, Kind::Word(w) if w == word)
    }

    fn is_mark(&self, mark: char) -> bool {
        self.kind == Kind::Mark(mark)
    }
}

struct Lexer {
    chars: Vec<char>,
    at: usize,
    line: u32,
}

impl Lexer {
    fn peek(&self, ahead: usize) -> Option<char> {
        self.chars.get(self.at + ahead).copied()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek(0)?;
        self.at += 1;
        if c == '\n' {
            self.line += 1;
        }
        Some(c)
    }

    fn skip_while(&mut self, keep: impl Fn(char) -> bool) {
        while self.peek(0).is_some_and(&keep) {
            self.next();
        }
    }

    fn skip_block_comment(&mut self) {
        let mut depth = 0_u32;
        while let Some(c) = self.next() {
            match (c, self.peek(0)) {
                ('/', Some('*')) => {
                    self.next();
                    depth += 1;
                }
                ('*', Some('/')) => {
                    self.next();
                    depth = depth.saturating_sub(1);
                    if depth == 0 {
                        return;
                    }
                }
                _ => {}
            }
        }
    }

    /// The opening quote is already read.
    fn skip_string(&mut self) {
        while let Some(c) = self.next() {
            match c {
                '\\' => drop(self.next()),
                '"' => return,
                _ => {}
            }
        }
    }

    /// The `r` is read, `hashes` and the quote are not.
    fn skip_raw_string(&mut self, hashes: usize) {
        for _ in 0..=hashes {
            self.next();
        }
        while let Some(c) = self.next() {
            if c == '"' && (0..hashes).all(|n| self.peek(n) == Some('#')) {
                for _ in 0..hashes {
                    self.next();
                }
                return;
            }
        }
    }

    /// A quote is read: the rest of a character, or of a lifetime.
    fn skip_quoted(&mut self) {
        if self.peek(0) == Some('\\') {
            self.next();
            self.next();
            self.skip_while(|c| c != '\'');
            self.next();
        } else if self.peek(1) == Some('\'') {
            self.next();
            self.next();
        } else {
            self.skip_while(|c| c.is_alphanumeric() || c == '_');
        }
    }

    fn word(&mut self, first: char) -> String {
        let mut word = String::from(first);
        while let Some(c) = self.peek(0).filter(|c| c.is_alphanumeric() || *c == '_') {
            word.push(c);
            self.next();
        }
        word
    }

    fn hashes_before_quote(&self) -> Option<usize> {
        let hashes = (0..).take_while(|n| self.peek(*n) == Some('#')).count();
        (self.peek(hashes) == Some('"')).then_some(hashes)
    }
}

fn tokens(text: &str) -> Vec<Token> {
    let mut lexer = Lexer { chars: text.chars().collect(), at: 0, line: 1 };
    let mut tokens = Vec::new();
    loop {
        let line = lexer.line;
        let (first, second) = (lexer.peek(0), lexer.peek(1));
        if first == Some('/') && second == Some('*') {
            lexer.skip_block_comment();
            continue;
        }
        let Some(c) = lexer.next() else { return tokens };
        let kind = match c {
            '/' if second == Some('/') => {
                lexer.skip_while(|c| c != '\n');
                continue;
            }
            '"' => {
                lexer.skip_string();
                continue;
            }
            '\'' => {
                lexer.skip_quoted();
                continue;
            }
            ':' if second == Some(':') => {
                lexer.next();
                Kind::Colons
            }
            c if c.is_whitespace() => continue,
            c if c.is_numeric() => {
                lexer.skip_while(|c| c.is_alphanumeric() || c == '_');
                continue;
            }
            c if c.is_alphabetic() || c == '_' => {
                let word = lexer.word(c);
                match (word.as_str(), lexer.hashes_before_quote()) {
                    ("r" | "br" | "cr", Some(hashes)) => {
                        lexer.skip_raw_string(hashes);
                        continue;
                    }
                    // The quote itself comes next and is skipped then.
                    ("b" | "c", Some(0)) => continue,
                    ("b", None) if lexer.peek(0) == Some('\'') => continue,
                    ("r", None) if lexer.peek(0) == Some('#') => {
                        lexer.next();
                        continue;
                    }
                    _ => Kind::Word(word),
                }
            }
            c => Kind::Mark(c),
        };
        tokens.push(Token { line, kind });
    }
}

/// Leaves out every item under `#[cfg(test)]`, and the whole file under `#![cfg(test)]`.
fn without_tests(tokens: Vec<Token>) -> Vec<Token> {
    let mut kept = Vec::with_capacity(tokens.len());
    let mut rest = tokens.as_slice();
    while let Some((first, after)) = rest.split_first() {
        let inner = after.first().is_some_and(|t| t.is_mark('!'));
        let bracket = after.get(usize::from(inner)..).unwrap_or_default();
        if first.is_mark('#') && bracket.first().is_some_and(|t| t.is_mark('[')) {
            let (attribute, tail) = bracket.split_at(group_len(bracket));
            if is_cfg_test(attribute) {
                if inner {
                    return Vec::new();
                }
                rest = tail.get(item_len(tail)..).unwrap_or_default();
                continue;
            }
        }
        kept.push(first.clone());
        rest = after;
    }
    kept
}

fn is_cfg_test(attribute: &[Token]) -> bool {
    attribute.get(1).is_some_and(|t| t.is_word("cfg"))
        && attribute.iter().any(|t| t.is_word("test"))
        && !attribute.iter().any(|t| t.is_word("not") || t.is_word("any"))
}

/// Tokens from an opening bracket to the one that closes it.
fn group_len(tokens: &[Token]) -> usize {
    let mut depth = 0_i32;
    for (n, token) in tokens.iter().enumerate() {
        depth += nesting(token);
        if depth <= 0 {
            return n + 1;
        }
    }
    tokens.len()
}

/// Tokens of one item: up to its `;`, or to the end of its body, or to the end of what encloses it.
fn item_len(tokens: &[Token]) -> usize {
    let mut depth = 0_i32;
    for (n, token) in tokens.iter().enumerate() {
        depth += nesting(token);
        if depth < 0 {
            return n;
        }
        if depth == 0 && (token.is_mark(';') || token.is_mark('}')) {
            return n + 1;
        }
    }
    tokens.len()
}

fn nesting(token: &Token) -> i32 {
    match token.kind {
        Kind::Mark('(' | '[' | '{') => 1,
        Kind::Mark(')' | ']' | '}') => -1,
        _ => 0,
    }
}

#[derive(Debug)]
struct Found {
    name: Name,
    /// The word by which the rest of the file knows it, if this is an import.
    imported_as: Option<String>,
    is_use: bool,
}

struct Reader<'a> {
    tokens: Vec<Token>,
    at: usize,
    lib: &'a str,
    /// Module the reader is in; grows inside `mod name { .. }`.
    module: Vec<String>,
    found: Vec<Found>,
}

impl Reader<'_> {
    fn peek(&self, ahead: usize) -> Option<&Token> {
        self.tokens.get(self.at + ahead)
    }

    fn word(&self, ahead: usize) -> Option<(&str, u32)> {
        match self.peek(ahead)? {
            Token { kind: Kind::Word(word), line } => Some((word, *line)),
            _ => None,
        }
    }

    fn mark(&self, ahead: usize, mark: char) -> bool {
        self.peek(ahead).is_some_and(|t| t.is_mark(mark))
    }

    fn colons(&self, ahead: usize) -> bool {
        self.peek(ahead).is_some_and(|t| t.kind == Kind::Colons)
    }

    fn read(&mut self) {
        // Brace depths at which an inline module ends.
        let mut modules: Vec<u32> = Vec::new();
        let mut depth = 0_u32;
        while let Some(token) = self.peek(0).cloned() {
            match token.kind {
                Kind::Mark('{') => depth += 1,
                Kind::Mark('}') => {
                    depth = depth.saturating_sub(1);
                    if modules.last() == Some(&depth) {
                        modules.pop();
                        self.module.pop();
                    }
                }
                Kind::Mark(_) => {}
                Kind::Colons => {
                    // `Vec::<u8>::new`: what follows belongs to a path that is already read.
                    self.at += usize::from(!self.begins_global_path() && self.word(1).is_some());
                }
                Kind::Word(word) => match word.as_str() {
                    "use" if !self.mark(1, '<') => {
                        self.at += 1;
                        self.use_tree(&[]);
                        continue;
                    }
                    "extern" if self.word(1).is_some_and(|(w, _)| w == "crate") => {
                        if let Some((name, line)) = self.word(2).map(|(w, l)| (w.to_owned(), l)) {
                            let path = self.absolute(vec![name.clone()]);
                            self.push(line, path, Some(name), true);
                        }
                        self.at += 2;
                    }
                    "mod" if self.mark(2, '{') => {
                        if let Some(name) = self.word(1).map(|(w, _)| w.to_owned()) {
                            self.module.push(name);
                            modules.push(depth);
                            self.at += 1;
                        }
                    }
                    _ => {
                        let path = self.path();
                        if path.len() > 1 {
                            let path = self.absolute(path);
                            self.push(token.line, path, None, false);
                        }
                        continue;
                    }
                },
            }
            self.at += 1;
        }
    }

    /// Whether the `::` the reader stands on opens a path (`::tokio::spawn`).
    fn begins_global_path(&self) -> bool {
        let before = self.at.checked_sub(1).and_then(|n| self.tokens.get(n));
        !before.is_some_and(|t| t.is_mark('>') || matches!(t.kind, Kind::Word(_)))
    }

    /// Reads `word::word::word` as far as it goes.
    fn path(&mut self) -> Vec<String> {
        let mut path = Vec::new();
        while let Some((word, _)) = self.word(0) {
            path.push(word.to_owned());
            self.at += 1;
            if !(self.colons(0) && self.word(1).is_some()) {
                break;
            }
            self.at += 1;
        }
        path
    }

    /// Reads one branch of a `use`, from its first word to its end; the `;` stays unread.
    fn use_tree(&mut self, above: &[String]) {
        if self.colons(0) {
            self.at += 1;
        }
        let mut path = above.to_vec();
        let mut line = self.peek(0).map_or(0, |t| t.line);
        loop {
            if let Some((word, at_line)) = self.word(0) {
                line = at_line;
                path.push(word.to_owned());
                self.at += 1;
                if self.colons(0) {
                    self.at += 1;
                    continue;
                }
                break self.use_leaf(line, path);
            }
            if self.mark(0, '*') {
                self.at += 1;
                path.push("*".to_owned());
                let path = self.absolute(path);
                break self.push(line, path, None, true);
            }
            if self.mark(0, '{') {
                self.at += 1;
                while self.peek(0).is_some() && !self.mark(0, '}') {
                    let before = self.at;
                    self.use_tree(&path);
                    self.at += usize::from(self.mark(0, ',') || self.at == before);
                }
                self.at += 1;
            }
            break;
        }
    }

    fn use_leaf(&mut self, line: u32, mut path: Vec<String>) {
        if path.len() > 1 && path.last().is_some_and(|w| w == "self") {
            path.pop();
        }
        let mut alias = path.last().cloned();
        if self.word(0).is_some_and(|(w, _)| w == "as") {
            alias = self.word(1).map(|(w, _)| w.to_owned());
            self.at += 2;
        }
        let path = self.absolute(path);
        self.push(line, path, alias, true);
    }

    fn push(&mut self, line: u32, path: Vec<String>, imported_as: Option<String>, is_use: bool) {
        self.found.push(Found { name: Name { line, path }, imported_as, is_use });
    }

    /// Follows `self`, `super` and the crate's own name; any other first word is left as it is.
    fn absolute(&self, path: Vec<String>) -> Vec<String> {
        let mut base: Vec<String> = self.module.clone();
        let mut rest = path.as_slice();
        match rest.first().map(String::as_str) {
            Some("crate") => base.clear(),
            Some(word) if word == self.lib => base.clear(),
            Some("self") => {}
            Some("super") => drop(base.pop()),
            _ => return path,
        }
        rest = rest.get(1..).unwrap_or_default();
        while let Some((_, tail)) = rest.split_first().filter(|(first, _)| *first == "super") {
            base.pop();
            rest = tail;
        }
        std::iter::once("crate".to_owned()).chain(base).chain(rest.iter().cloned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(text: &str) -> Vec<(u32, String)> {
        let module = module_of("fanout/push.rs");
        names(text, &module, "fulmar_gateway").into_iter().map(|n| (n.line, n.path.join("::"))).collect()
    }

    #[test]
    fn module_paths_follow_the_files() {
        for (file, want) in [
            ("lib.rs", ""),
            ("main.rs", ""),
            ("gateway.rs", "gateway"),
            ("fanout/mod.rs", "fanout"),
            ("fanout/ring.rs", "fanout::ring"),
            ("service/builtin/main.rs", "service::builtin::main"),
        ] {
            assert_eq!(module_of(file).join("::"), want, "{file}");
        }
    }

    #[test]
    fn every_spelling_of_a_path_comes_out_the_same() {
        for text in [
            "use crate::connection::Driver;",
            "pub(crate) use crate::connection::Driver as D;",
            "use crate::{connection::{Driver}};",
            "use super::super::connection::Driver;",
            "use fulmar_gateway::connection::Driver;",
            "fn f(_: crate::connection::Driver) {}",
            "fn f() { let _ = Vec::<crate::connection::Driver>::new(); }",
            "mod inner { use super::super::super::connection::Driver; }",
            "mod inner {} use super::super::connection::Driver;",
        ] {
            let found = named(text);
            assert!(found.contains(&(1, "crate::connection::Driver".to_owned())), "{text} gave {found:?}");
        }
    }

    #[test]
    fn use_trees_are_opened_line_by_line() {
        let text = "use crate::{\n    connection::{self, Driver as D},\n    receipt::*,\n};\nuse ::quinn::Endpoint;\n";
        assert_eq!(
            named(text),
            [
                (2, "crate::connection".to_owned()),
                (2, "crate::connection::Driver".to_owned()),
                (3, "crate::receipt::*".to_owned()),
                (5, "quinn::Endpoint".to_owned()),
            ]
        );
    }

    #[test]
    fn imports_are_followed_to_where_they_are_used() {
        let text = "use std::time::Instant as Clock;\nuse crate as root;\nfn f() {\n  Clock::now();\n  root::receipt::g();\n}\n";
        let found = named(text);
        assert!(found.contains(&(4, "std::time::Instant::now".to_owned())), "{found:?}");
        assert!(found.contains(&(5, "crate::receipt::g".to_owned())), "{found:?}");
    }

    #[test]
    fn comments_strings_and_lifetimes_name_nothing() {
        let text = r####"
            //! tokio::spawn
            /* sled::open /* nested::path */ quinn::x */
            /// [`crate::connection`]
            fn f<'a>(x: &'a str) -> char {
                let _ = ("tokio::spawn \" sled::x", b"quinn::x", r#"tokio::"y"::z"#, '"', b'\'', '\u{41}');
                'x'
            }
        "####;
        assert_eq!(named(text), []);
    }

    #[test]
    fn code_after_tricky_literals_is_still_read() {
        let text = "const Q: char = '\"';\nconst R: &str = r\"\\\";\nfn f() { tokio::spawn(g::<'static>) }\n";
        assert_eq!(named(text), [(3, "tokio::spawn".to_owned())]);
    }

    #[test]
    fn attributes_and_macros_name_too() {
        let found = named("#[tokio::main]\nasync fn f() { tokio::select! { _ = sled::open() => {} } }");
        assert_eq!(
            found,
            [(1, "tokio::main".to_owned()), (2, "tokio::select".to_owned()), (2, "sled::open".to_owned()),]
        );
    }

    #[test]
    fn test_code_is_left_out_and_nothing_else() {
        let text = "
#[cfg(test)]
use tokio::time;
#[cfg(not(test))]
use quinn::Endpoint;
#[cfg(any(test, feature = \"x\"))]
use sled::Db;
#[cfg(test)]
#[expect(dead_code)]
mod tests { fn f() { tokio::spawn(1); } struct S { a: [u8; 3] } }
use rand::Rng;
";
        assert_eq!(
            named(text),
            [(5, "quinn::Endpoint".to_owned()), (7, "sled::Db".to_owned()), (11, "rand::Rng".to_owned())]
        );
        assert_eq!(named("#![cfg(test)]\nuse tokio::time;"), []);
    }
}
