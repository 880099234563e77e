//! What a typed line asks for.

/// A line, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Send this text to the open conversation.
    Say(String),
    /// Show what can be typed.
    Help,
    /// Talk with a user.
    With(String),
    /// Open a group.
    Group(String),
    /// Open a broadcast.
    Broadcast(String),
    /// Make a group with these members.
    New(String, Vec<String>),
    /// Add users to the open group.
    Add(Vec<String>),
    /// Remove users from the open group.
    Remove(Vec<String>),
    /// Leave the open group.
    Leave,
    /// Who is in the open conversation.
    Who,
    /// Which conversations there are.
    List,
    /// Older messages of the open conversation.
    Older,
    /// End.
    Quit,
}

/// What `/help` says.
pub(super) const HELP: &[&str] = &[
    "/with NAME            talk with a user",
    "/group NAME           open a group you are in",
    "/broadcast NAME       open what everybody reads (marked with ! in the list)",
    "/new NAME USER ...    make a group",
    "/add USER ...         add users to the open group",
    "/remove USER ...      remove users from it",
    "/leave                leave it",
    "/who                  who is here",
    "/list                 your conversations",
    "/older                older messages",
    "/quit                 leave the chat",
    "//text                say something that begins with a slash",
];

/// Reads a line; `None` when it is empty.
///
/// # Errors
/// One line that says what would be right.
pub(super) fn read(line: &str) -> Result<Option<Command>, String> {
    let line = line.trim();
    if line.is_empty() {
        return Ok(None);
    }
    let Some(command) = line.strip_prefix('/') else { return Ok(Some(Command::Say(line.to_owned()))) };
    if command.starts_with('/') {
        return Ok(Some(Command::Say(command.to_owned())));
    }
    let mut words = command.split_whitespace();
    let name = words.next().unwrap_or_default();
    let mut rest: Vec<String> = words.map(str::to_owned).collect();
    let usage = |right: &str| Err(format!("that is: {right}"));
    Ok(Some(match (name, rest.len()) {
        ("help" | "h" | "?", _) => Command::Help,
        ("with" | "w" | "msg", 1) => Command::With(rest.remove(0)),
        ("with" | "w" | "msg", _) => return usage("/with NAME"),
        ("group" | "g", 1) => Command::Group(rest.remove(0)),
        ("group" | "g", _) => return usage("/group NAME"),
        ("broadcast" | "b", 1) => Command::Broadcast(rest.remove(0)),
        ("broadcast" | "b", _) => return usage("/broadcast NAME"),
        ("new", 1..) => Command::New(rest.remove(0), rest),
        ("new", _) => return usage("/new NAME USER ..."),
        ("add", 1..) => Command::Add(rest),
        ("add", _) => return usage("/add USER ..."),
        ("remove", 1..) => Command::Remove(rest),
        ("remove", _) => return usage("/remove USER ..."),
        ("leave", _) => Command::Leave,
        ("who", _) => Command::Who,
        ("list" | "l", _) => Command::List,
        ("older", _) => Command::Older,
        ("quit" | "q" | "exit", _) => Command::Quit,
        (unknown, _) => return Err(format!("/{unknown} is not known; /help lists what is")),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_understood() {
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        for (line, want) in [
            ("  ", Ok(None)),
            (" hello there ", Ok(Some(Command::Say("hello there".to_owned())))),
            ("//etc/passwd", Ok(Some(Command::Say("/etc/passwd".to_owned())))),
            ("/help", Ok(Some(Command::Help))),
            ("/with bob", Ok(Some(Command::With("bob".to_owned())))),
            ("/with", Err("that is: /with NAME")),
            ("/with bob carol", Err("that is: /with NAME")),
            ("/new team bob carol", Ok(Some(Command::New("team".to_owned(), owned(&["bob", "carol"]))))),
            ("/new team", Ok(Some(Command::New("team".to_owned(), Vec::new())))),
            ("/new", Err("that is: /new NAME USER ...")),
            ("/add bob", Ok(Some(Command::Add(owned(&["bob"]))))),
            ("/add", Err("that is: /add USER ...")),
            ("/who", Ok(Some(Command::Who))),
            ("/q", Ok(Some(Command::Quit))),
            ("/dance", Err("/dance is not known; /help lists what is")),
            ("/", Err("/ is not known; /help lists what is")),
        ] {
            assert_eq!(read(line), want.map_err(str::to_owned), "{line:?}");
        }
    }
}
