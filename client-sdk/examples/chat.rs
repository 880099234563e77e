//! The smallest chat: `cargo run -p fulmar-client --example chat -- 127.0.0.1:4433 certificate.pem TOKEN bob`
//!
//! Lines typed go to the named user, what comes is printed; kill it and start it again as you like.

use fulmar_client::{Client, Options, Trust};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, stdin, stdout};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, certificate, token, peer] = &arguments[..] else {
        return Err("usage: chat ADDRESS CERTIFICATE TOKEN USER".into());
    };
    let options = Options::new("chat.db", address, "localhost", token.as_str());
    let client = Client::connect(options.trust(Trust::CertificateFile(certificate.into()))).await?;
    let conversation = client.direct(peer).await?;
    let (mut messages, mut states) = (client.messages(), client.state());
    let (mut lines, mut screen) = (BufReader::new(stdin()).lines(), stdout());
    loop {
        let shown = tokio::select! {
            Some(state) = states.next() => format!("-- {state:?}\n"),
            Some(message) = messages.next() => match message.own {
                true => format!("✓ {}\n", message.text()),
                false => format!("{}: {}\n", message.sender_name.as_deref().unwrap_or("?"), message.text()),
            },
            line = lines.next_line() => match line? {
                Some(line) => { conversation.send(line).await?; continue }
                None => break,
            },
            else => break,
        };
        screen.write_all(shown.as_bytes()).await?;
        screen.flush().await?;
    }
    Ok(client.close().await?)
}
