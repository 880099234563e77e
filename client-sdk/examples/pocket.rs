//! The smallest app that is one: it connects, takes what comes and says how much, on one thread.
//! `cargo run --profile small -p fulmar-client --example pocket -- ADDRESS CERTIFICATE TOKEN DATABASE`
//!
//! `cargo xtask footprint` measures its size and its memory.

use std::io::Write as _;

use fulmar_client::{Client, ConnectionState, Options, RecordKind, Trust};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, certificate, token, database] = &arguments[..] else {
        return Err("usage: pocket ADDRESS CERTIFICATE TOKEN DATABASE".into());
    };
    let options = Options::new(database.as_str(), address, "localhost", token.as_str());
    let client = Client::connect(options.trust(Trust::CertificateFile(certificate.into()))).await?;
    let (mut messages, mut states) = (client.messages(), client.state());
    let mut taken = 0u64;
    loop {
        tokio::select! {
            state = states.next() => match state {
                Some(ConnectionState::Live) => writeln!(std::io::stdout(), "live")?,
                Some(_) => {}
                None => return Ok(()),
            },
            message = messages.next() => match message {
                Some(message) if message.kind == RecordKind::Message => {
                    taken += 1;
                    writeln!(std::io::stdout(), "{taken}")?;
                }
                Some(_) => {}
                None => return Ok(()),
            },
        }
    }
}
