//! One attempt to reach the gateway, step by step.

use super::link::Link;
use crate::options::BoxFuture;

/// How far an attempt has come.
pub(crate) enum Progress {
    /// What is said on this link leaves at once, before anybody answered; then it goes on.
    Early(Box<Link>, BoxFuture<Progress>),
    /// The gateway answered, and has what was said early.
    Confirmed,
    /// The gateway answered; nothing was said on this link yet.
    Up(Box<Link>),
    /// It came to nothing. `answered`: the gateway said so itself.
    Failed { text: String, answered: bool },
}
