//! Dialogues between two people: read from a file, or drawn from a seed.
//!
//! The format, one line each, UTF-8, lines of a dialogue together and in order:
//! ```text
//! language <tab> dialogue number <tab> speaker A|B <tab> text
//! ```
//! - Reading is strict: what does not fit is an [`Error`] with file, line and reason, never skipped or guessed.
//! - What is read is bounded by [`Limits`], whatever the file holds.
//! - What is drawn has the sizes of real chat (in bytes: 1 % up to 4, median 32, 90 % up to 93, 99 % up to 264,
//!   longest 1 087) in 28 languages and their scripts, with an emoji now and then.
//!
//! Not here: who sends which line to whom (the caller's matter).

mod draw;

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

pub use draw::{LANGUAGES, TEXT_BYTES_MAX, generate};

/// Which of the two people speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Speaker {
    /// The first.
    A,
    /// The second.
    B,
}

/// One thing said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// By whom.
    pub speaker: Speaker,
    /// What: at least one byte, no tab, no line break.
    pub text: String,
}

/// A conversation of two people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dialogue {
    /// Language name as the file gives it, for example `bengali`.
    pub language: String,
    /// What is said, in order; at least one line.
    pub lines: Vec<Line>,
}

/// How much is read at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one line, its fields and tabs included, the line break not.
    pub line_bytes_max: usize,
    /// Lines of the whole input.
    pub lines_max: usize,
    /// Bytes of the whole input.
    pub bytes_max: u64,
}

impl Default for Limits {
    /// 16 KiB a line, a million lines, 256 MiB in all.
    fn default() -> Self {
        Self { line_bytes_max: 16 * 1024, lines_max: 1_000_000, bytes_max: 256 * 1024 * 1024 }
    }
}

/// Why an input could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file could not be opened or read.
    #[error("{file}: {source}")]
    Io {
        /// The input's name.
        file: String,
        /// What the system said.
        source: io::Error,
    },
    /// A line is not in the format, or a limit is exceeded there.
    #[error("{file}, line {line}: {reason}")]
    Line {
        /// The input's name.
        file: String,
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        reason: Reason,
    },
    /// There is no line.
    #[error("{file}: no dialogue in it")]
    Empty {
        /// The input's name.
        file: String,
    },
}

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// Other than four fields.
    #[error(
        "{0} fields where 4 are wanted: language, dialogue number, speaker, text, with tabs between them"
    )]
    Fields(usize),
    /// Bytes that are no UTF-8.
    #[error("not UTF-8 from byte {0} of the line on")]
    NotUtf8(usize),
    /// The language field is empty, too long (over 64 bytes) or has control characters.
    #[error("the language must be 1 to 64 bytes without control characters")]
    Language,
    /// The dialogue number is none.
    #[error("dialogue number {0:?} is not a whole number from 0 to 18446744073709551615")]
    Number(String),
    /// The speaker is neither.
    #[error("speaker {0:?} is neither A nor B")]
    Speaker(String),
    /// Nothing is said.
    #[error("the text is empty")]
    NoText,
    /// A carriage return or another control character in the text.
    #[error("control character {0:?} in the text (lines end with a bare line feed)")]
    Control(char),
    /// An empty line.
    #[error("the line is empty")]
    EmptyLine,
    /// A byte order mark at the start.
    #[error("starts with a byte order mark; save it as plain UTF-8")]
    ByteOrderMark,
    /// A dialogue goes on after another one began.
    #[error("dialogue {number} of {language} already ended at line {ended}: its lines must stand together")]
    Torn {
        /// Its language.
        language: String,
        /// Its number.
        number: u64,
        /// Its last line before the break.
        ended: usize,
    },
    /// The line is longer than allowed.
    #[error("longer than {0} bytes")]
    TooLong(usize),
    /// More lines than allowed.
    #[error("more than {0} lines")]
    TooManyLines(usize),
    /// More bytes than allowed.
    #[error("the input is larger than {0} bytes")]
    TooLarge(u64),
}

/// Reads the file at `path` within the default [`Limits`].
///
/// # Errors
/// [`Error`] says which line of the file is wrong, and how.
pub fn read_file(path: impl AsRef<Path>) -> Result<Vec<Dialogue>, Error> {
    let path = path.as_ref();
    let file = path.display().to_string();
    match File::open(path) {
        Ok(opened) => read(BufReader::new(opened), &file, &Limits::default()),
        Err(source) => Err(Error::Io { file, source }),
    }
}

/// Reads dialogues from `input`, called `file` in errors.
///
/// # Errors
/// [`Error`] says which line is wrong, and how.
///
/// ```
/// use fulmar_badnet::dialogue::{Limits, Speaker, read};
/// let input = "english\t1\tA\thello\nenglish\t1\tB\thi there\n";
/// let dialogues = read(input.as_bytes(), "example", &Limits::default())?;
/// assert_eq!(dialogues[0].lines[1].speaker, Speaker::B);
///
/// let refused = read("english\t1\tC\thello\n".as_bytes(), "example", &Limits::default()).unwrap_err();
/// assert_eq!(refused.to_string(), "example, line 1: speaker \"C\" is neither A nor B");
/// # Ok::<(), fulmar_badnet::dialogue::Error>(())
/// ```
pub fn read(input: impl BufRead, file: &str, limits: &Limits) -> Result<Vec<Dialogue>, Error> {
    let mut input = input.take(limits.bytes_max.saturating_add(1));
    let mut reading = Reading::default();
    let mut line = Vec::new();
    let mut number = 0usize;
    let mut bytes = 0u64;
    loop {
        number += 1;
        let wrong = |reason| Error::Line { file: file.to_owned(), line: number, reason };
        line.clear();
        let room = u64::try_from(limits.line_bytes_max).unwrap_or(u64::MAX).saturating_add(1);
        let read = (&mut input).take(room).read_until(b'\n', &mut line);
        let read = read.map_err(|source| Error::Io { file: file.to_owned(), source })?;
        if read == 0 {
            break;
        }
        bytes = bytes.saturating_add(u64::try_from(read).unwrap_or(u64::MAX));
        if bytes > limits.bytes_max {
            return Err(wrong(Reason::TooLarge(limits.bytes_max)));
        }
        if number > limits.lines_max {
            return Err(wrong(Reason::TooManyLines(limits.lines_max)));
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        } else if line.len() > limits.line_bytes_max {
            return Err(wrong(Reason::TooLong(limits.line_bytes_max)));
        }
        reading.take(&line, number).map_err(wrong)?;
    }
    if reading.dialogues.is_empty() {
        return Err(Error::Empty { file: file.to_owned() });
    }
    Ok(reading.dialogues)
}

#[derive(Default)]
struct Reading {
    dialogues: Vec<Dialogue>,
    /// Language → its number here, so that a dialogue is two numbers.
    languages: HashMap<String, usize>,
    /// (language, dialogue number) → its last line.
    last_lines: HashMap<(usize, u64), usize>,
    current: Option<(usize, u64)>,
}

impl Reading {
    fn take(&mut self, line: &[u8], line_number: usize) -> Result<(), Reason> {
        if line.is_empty() {
            return Err(Reason::EmptyLine);
        }
        let line = std::str::from_utf8(line).map_err(|e| Reason::NotUtf8(e.valid_up_to() + 1))?;
        if line_number == 1 && line.starts_with('\u{feff}') {
            return Err(Reason::ByteOrderMark);
        }
        let fields = line.split('\t').count();
        let mut split = line.split('\t');
        let (Some(language), Some(number), Some(speaker), Some(text), None) =
            (split.next(), split.next(), split.next(), split.next(), split.next())
        else {
            return Err(Reason::Fields(fields));
        };
        if language.is_empty() || language.len() > 64 || language.contains(char::is_control) {
            return Err(Reason::Language);
        }
        let plain = !number.is_empty() && number.bytes().all(|digit| digit.is_ascii_digit());
        let parsed = if plain { number.parse().ok() } else { None };
        let number: u64 = parsed.ok_or_else(|| Reason::Number(number.chars().take(32).collect()))?;
        let speaker = match speaker {
            "A" => Speaker::A,
            "B" => Speaker::B,
            other => return Err(Reason::Speaker(other.chars().take(32).collect())),
        };
        if text.is_empty() {
            return Err(Reason::NoText);
        }
        if let Some(control) = text.chars().find(|c| c.is_control()) {
            return Err(Reason::Control(control));
        }
        let known = self.languages.len();
        let language_number = match self.languages.get(language) {
            Some(number) => *number,
            None => *self.languages.entry(language.to_owned()).or_insert(known),
        };
        let key = (language_number, number);
        let ended = self.last_lines.insert(key, line_number);
        let line = Line { speaker, text: text.to_owned() };
        if self.current == Some(key)
            && let Some(dialogue) = self.dialogues.last_mut()
        {
            dialogue.lines.push(line);
            return Ok(());
        }
        if let Some(ended) = ended {
            return Err(Reason::Torn { language: language.to_owned(), number, ended });
        }
        self.current = Some(key);
        self.dialogues.push(Dialogue { language: language.to_owned(), lines: vec![line] });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(input: &str) -> Result<Vec<Dialogue>, Error> {
        read(input.as_bytes(), "in.tsv", &Limits::default())
    }

    #[test]
    fn dialogues_are_read_in_order() {
        let got = read_text(
            "bengali\t1\tA\tকেমন আছো?\nbengali\t1\tB\tভালো 😀\nbengali\t2\tB\tনাই।\nthai\t1\tA\tหวัดดี",
        )
        .unwrap();
        assert_eq!(got.len(), 3);
        assert_eq!(got[0].lines.len(), 2);
        assert_eq!(got[0].lines[1], Line { speaker: Speaker::B, text: "ভালো 😀".into() });
        assert_eq!((got[2].language.as_str(), got[2].lines.len()), ("thai", 1));
    }

    #[test]
    fn everything_wrong_is_named() {
        let good = "english\t1\tA\thi\n";
        for (bad, want) in [
            ("english\t1\tA\n", "in.tsv, line 2: 3 fields where 4 are wanted"),
            ("english\t1\tA\ta\tb\n", "in.tsv, line 2: 5 fields where 4 are wanted"),
            ("\t1\tA\thi\n", "in.tsv, line 2: the language must be"),
            ("eng\u{7}\t1\tA\thi\n", "in.tsv, line 2: the language must be"),
            ("english\tone\tA\thi\n", "in.tsv, line 2: dialogue number \"one\""),
            ("english\t+1\tA\thi\n", "in.tsv, line 2: dialogue number \"+1\""),
            ("english\t\tA\thi\n", "in.tsv, line 2: dialogue number \"\""),
            ("english\t99999999999999999999\tA\thi\n", "in.tsv, line 2: dialogue number"),
            ("english\t1\ta\thi\n", "in.tsv, line 2: speaker \"a\" is neither"),
            ("english\t1\tA\t\n", "in.tsv, line 2: the text is empty"),
            ("english\t1\tA\thi\r\n", "in.tsv, line 2: control character '\\r'"),
            ("\n", "in.tsv, line 2: the line is empty"),
            (
                "english\t2\tA\thi\nenglish\t1\tB\tho\n",
                "in.tsv, line 3: dialogue 1 of english already ended at line 1",
            ),
        ] {
            let refused = read_text(&format!("{good}{bad}")).unwrap_err().to_string();
            assert!(refused.starts_with(want), "{bad:?}: {refused}");
        }
        let bom = read_text(&format!("\u{feff}{good}")).unwrap_err().to_string();
        assert!(bom.contains("byte order mark"), "{bom}");
        let bytes = read(&b"english\t1\tA\thi \xff\n"[..], "in.tsv", &Limits::default()).unwrap_err();
        assert_eq!(bytes.to_string(), "in.tsv, line 1: not UTF-8 from byte 16 of the line on");
        assert_eq!(read_text("").unwrap_err().to_string(), "in.tsv: no dialogue in it");
        let missing = read_file("/nonexistent/dialogues.tsv").unwrap_err();
        assert!(matches!(missing, Error::Io { .. }), "{missing}");
    }

    #[test]
    fn limits_hold_at_their_edge() {
        let line = "english\t1\tA\thello\n";
        let (len, total) = (line.len() - 1, line.len() as u64 * 3);
        let input = line.repeat(3);
        let read = |limits: Limits| read(input.as_bytes(), "x", &limits).map_err(|e| e.to_string());
        let exact = Limits { line_bytes_max: len, lines_max: 3, bytes_max: total };
        assert_eq!(read(exact).unwrap()[0].lines.len(), 3);
        for (limits, want) in [
            (
                Limits { line_bytes_max: len - 1, ..exact },
                format!("x, line 1: longer than {} bytes", len - 1),
            ),
            (Limits { lines_max: 2, ..exact }, "x, line 3: more than 2 lines".to_owned()),
            (
                Limits { bytes_max: total - 1, ..exact },
                format!("x, line 3: the input is larger than {} bytes", total - 1),
            ),
        ] {
            assert_eq!(read(limits).unwrap_err(), want);
        }
    }

    #[test]
    fn what_is_drawn_can_be_read_back() {
        let drawn = generate(3, 200);
        let mut file = String::new();
        for (number, dialogue) in drawn.iter().enumerate() {
            for line in &dialogue.lines {
                file += &format!("{}\t{number}\t{:?}\t{}\n", dialogue.language, line.speaker, line.text);
            }
        }
        assert_eq!(read_text(&file).unwrap(), drawn);
    }

    proptest::proptest! {
        #[test]
        fn no_input_panics(input: Vec<u8>) {
            let _result = read(&input[..], "x", &Limits { line_bytes_max: 40, lines_max: 5, bytes_max: 200 });
        }
    }
}
