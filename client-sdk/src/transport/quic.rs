//! QUIC: whom to believe, and the settings of the transport.
//!
//! TLS 1.3 only, one ALPN. Session tickets are kept per client, so that a later connection can resume.

use std::sync::Arc;

use fulmar_protocol::version::ALPN;
use quinn::crypto::rustls::QuicClientConfig;
use rustls::{
    RootCertStore,
    client::Resumption,
    pki_types::{CertificateDer, pem::PemObject},
};

use crate::{error::Error, options::Trust};

/// TLS sessions kept for resumption: a client talks to one gateway.
const SESSIONS_KEPT: usize = 8;

/// The client's TLS settings, made once: its session store lives as long as the client.
#[derive(Clone)]
pub(crate) struct Tls(pub(crate) Arc<QuicClientConfig>);

/// TLS settings that believe `trust` only.
///
/// # Errors
/// [`Error::Certificate`].
pub(crate) fn client_tls(trust: Option<&Trust>) -> Result<Tls, Error> {
    let mut roots = RootCertStore::empty();
    if let Some(trust) = trust {
        for certificate in certificates(trust)? {
            roots.add(certificate).map_err(|error| Error::Certificate(error.to_string()))?;
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| Error::Certificate(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![ALPN.to_vec()];
    tls.resumption = Resumption::in_memory_sessions(SESSIONS_KEPT);
    let tls = QuicClientConfig::try_from(tls).map_err(|error| Error::Certificate(error.to_string()))?;
    Ok(Tls(Arc::new(tls)))
}

fn certificates(trust: &Trust) -> Result<Vec<CertificateDer<'static>>, Error> {
    let bytes = match trust {
        Trust::Certificate(bytes) => bytes.clone(),
        Trust::CertificateFile(path) => {
            std::fs::read(path).map_err(|error| Error::Certificate(format!("{}: {error}", path.display())))?
        }
    };
    if !bytes.starts_with(b"-----") && !bytes.windows(11).any(|window| window == b"-----BEGIN ") {
        return Ok(vec![CertificateDer::from(bytes)]);
    }
    let certificates = CertificateDer::pem_slice_iter(&bytes)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| Error::Certificate(error.to_string()))?;
    if certificates.is_empty() {
        return Err(Error::Certificate("no certificate in the PEM file".to_owned()));
    }
    Ok(certificates)
}
