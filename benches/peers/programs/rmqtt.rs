//! rmqtt as a program of its own: its library with two listeners, TLS over TCP and QUIC, nothing else. (`rmqttd` brings clients of Kafka,
//! Pulsar and a dozen more along.) Arguments: certificate, key, port.

use std::{net::SocketAddr, num::NonZeroU16, time::Duration};

use rmqtt::{
    context::ServerContext,
    net::{Builder, Result},
    server::MqttServer,
};

#[tokio::main]
async fn main() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let (Some(certificate), Some(key), Some(port)) = (words.next(), words.next(), words.next()) else {
        eprintln!("rmqtt-mini CERTIFICATE KEY PORT");
        std::process::exit(2);
    };
    let port: u16 = port.parse().expect("a port");
    let builder = |name: &str| {
        Builder::new()
            .name(name)
            .laddr(SocketAddr::from(([127, 0, 0, 1], port)))
            .backlog(4_096)
            .nodelay(true)
            .max_handshaking_limit(100_000)
            .max_inflight(NonZeroU16::MAX)
            .max_mqueue_len(1_000_000)
            .message_retry_interval(Duration::from_secs(120))
            .tls_cert(Some(certificate.clone()))
            .tls_key(Some(key.clone()))
    };
    let context = ServerContext::new().busy_check_enable(false).build().await;
    let tls = builder("tls").bind()?.tls()?;
    let quic = builder("quic").bind_quic()?;
    eprintln!("listening on {port}");
    MqttServer::new(context).listener_by_id(tls, 1).listener_by_id(quic, 2).build().run().await?;
    Ok(())
}
