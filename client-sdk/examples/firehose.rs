//! Sends as fast as acks allow: `cargo run --release -p fulmar-client --example firehose -- ADDRESS CERTIFICATE TOKEN USER COUNT`

use std::{collections::VecDeque, time::Instant};

use fulmar_client::{Client, Options, Trust, in_memory};

/// Messages on their way: more than the protocol lets fly, so that it never waits for this program.
const WINDOW: usize = 512;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, certificate, token, peer, count] = &arguments[..] else {
        return Err("usage: firehose ADDRESS CERTIFICATE TOKEN USER COUNT".into());
    };
    let count: usize = count.parse()?;
    let options = Options::new(in_memory(), address, "localhost", token.as_str());
    let client = Client::connect(options.trust(Trust::CertificateFile(certificate.into()))).await?;
    let conversation = client.direct(peer).await?;
    conversation.resolved().await?;
    let started = Instant::now();
    let mut waiting = VecDeque::new();
    for index in 0..count {
        waiting.push_back(conversation.send(format!("message {index}")).await?);
        if waiting.len() >= WINDOW
            && let Some(oldest) = waiting.pop_front()
        {
            oldest.acked().await?;
        }
    }
    for handle in waiting {
        handle.acked().await?;
    }
    let seconds = started.elapsed().as_secs_f64();
    let summary = format!("{count} acked in {seconds:.2} s, {:?}\n", client.traffic());
    tokio::io::AsyncWriteExt::write_all(&mut tokio::io::stdout(), summary.as_bytes()).await?;
    Ok(client.close().await?)
}
