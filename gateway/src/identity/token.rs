//! Who is it: JWTs signed with Ed25519, checked against the keys of the app they are for.
//!
//! - A token says its app (`aud`), user (`sub`), issuer (`iss`), first and last moment (`nbf`, `exp`) and key (`kid` in
//!   the header). All are required, and EdDSA is the only algorithm there is, whatever the header claims.
//! - Apps don't share keys: the `kid` is looked up among the keys of the token's own app.
//! - A refusal says what is wrong and whether a new token helps; it never says what exists.
//! - Verified tokens are remembered by hash, boundedly; a remembered token still expires on time.
//!
//! Not here: whether the user may do something (`conversation`), session tickets ([`super::ticket`]), the clock.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use ed25519_dalek::VerifyingKey;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePublicKey as _, EncodePublicKey as _};
use fulmar_protocol::close::{RefusalCode, Retry};
use fulmar_protocol::id::{AppId, UnixMillis};
use fulmar_protocol::limit::{TOKEN_BYTES_MAX, VARINT_MAX};
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};

use crate::config::{AppConfig, AuthConfig, is_name};
use crate::data_folder::DevKey;

/// Who a valid token stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The app.
    pub app: AppId,
    /// The app's name.
    pub app_name: Arc<str>,
    /// Whether the user may come into being by showing this token.
    pub open_users: bool,
    /// The user's name, at most `NAME_BYTES_MAX` bytes, without control characters.
    pub user_name: Arc<str>,
    /// When the token ends, leeway included: from then on it is refused.
    pub expires_at: UnixMillis,
}

/// Why a token is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum AuthRefusal {
    /// Not a JWT, a claim is missing or of the wrong kind, another algorithm, or a name that may not be.
    #[error("the token is malformed: {0}")]
    Malformed(&'static str),
    /// The signature is not of the key the token names.
    #[error("the token's signature is wrong")]
    BadSignature,
    /// The app has no key of that `kid`; it may have been rotated away.
    #[error("the token was signed with a key this app does not have")]
    UnknownKey,
    /// `exp` has passed.
    #[error("the token expired")]
    Expired,
    /// `nbf` is to come.
    #[error("the token is not valid yet")]
    NotYetValid,
    /// `aud` is no app of this gateway.
    #[error("the token is for an app this gateway does not serve")]
    WrongApp,
    /// `iss` is not the app's issuer.
    #[error("the token was made by another issuer than the app's")]
    WrongIssuer,
}

impl AuthRefusal {
    /// The code on the wire.
    #[must_use]
    pub const fn code(self) -> RefusalCode {
        match self {
            Self::Malformed(_) | Self::BadSignature => RefusalCode::BadToken,
            Self::UnknownKey | Self::WrongIssuer => RefusalCode::UnknownKey,
            Self::Expired => RefusalCode::TokenExpired,
            Self::NotYetValid => RefusalCode::TokenNotYetValid,
            Self::WrongApp => RefusalCode::WrongApp,
        }
    }

    /// What the client may do about it.
    #[must_use]
    pub const fn retry(self) -> Retry {
        self.code().retry()
    }

    /// A word for metrics and logs.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Malformed(_) => "malformed",
            Self::BadSignature => "bad_signature",
            Self::UnknownKey => "unknown_key",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::WrongApp => "wrong_app",
            Self::WrongIssuer => "wrong_issuer",
        }
    }
}

/// The keys of the configured apps can't be used; one line that says which and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct KeysError(String);

/// The claims of a token, as they are signed. Times are seconds since 1970.
#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    exp: f64,
    nbf: f64,
    aud: Audience,
    iss: String,
    sub: String,
}

/// `aud` may be a text or a list of one.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    List([String; 1]),
}

impl Audience {
    fn name(&self) -> &str {
        match self {
            Self::One(name) | Self::List([name]) => name,
        }
    }
}

struct App {
    id: AppId,
    name: Arc<str>,
    issuer: String,
    open_users: bool,
    keys: HashMap<String, DecodingKey>,
}

#[derive(Clone)]
struct Remembered {
    identity: Identity,
    not_before: UnixMillis,
}

/// Checks tokens. Cheap to share; make a new one when keys change.
pub struct Verifier {
    apps: HashMap<String, App>,
    leeway_ms: u64,
    validation: Validation,
    verified: moka::sync::Cache<[u8; 32], Remembered>,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier").field("apps", &self.apps.len()).finish_non_exhaustive()
    }
}

impl Verifier {
    /// Reads the public keys of all apps.
    ///
    /// # Errors
    /// One line: which app's key file is missing or is no Ed25519 public key.
    pub fn new(apps: &[AppConfig], auth: &AuthConfig, dev_key: &DevKey) -> Result<Self, KeysError> {
        let mut by_name = HashMap::new();
        let mut by_id = HashMap::new();
        for app in apps {
            let mut keys = HashMap::new();
            for key in &app.keys {
                keys.insert(key.kid.clone(), read_public_key(&app.name, &key.file)?);
            }
            if app.dev_key {
                let pem = dev_key.signing.verifying_key().to_public_key_pem(LineEnding::LF);
                let key = pem.ok().and_then(|pem| DecodingKey::from_ed_pem(pem.as_bytes()).ok());
                let key =
                    key.ok_or_else(|| KeysError("the development key has no public half".to_owned()))?;
                keys.insert(dev_key.kid.clone(), key);
            }
            let id = AppId::of(&app.name);
            if let Some(other) = by_id.insert(id, app.name.clone()) {
                return Err(KeysError(format!(
                    "apps {other:?} and {:?} have the same number {id}: rename one of them",
                    app.name
                )));
            }
            by_name.insert(
                app.name.clone(),
                App {
                    id,
                    name: Arc::from(app.name.as_str()),
                    issuer: app.issuer.clone(),
                    open_users: app.open_users,
                    keys,
                },
            );
        }
        let mut validation = Validation::new(Algorithm::EdDSA);
        // Times are compared below, with the time that is handed in; app and issuer too, to tell them apart.
        validation.validate_exp = false;
        validation.validate_nbf = false;
        validation.validate_aud = false;
        validation.set_required_spec_claims(&["exp", "nbf", "aud", "iss", "sub"]);
        Ok(Self {
            apps: by_name,
            leeway_ms: auth.leeway_s * 1_000,
            validation,
            verified: moka::sync::Cache::new(auth.token_cache),
        })
    }

    /// Checks a token at the time `now`.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn verify(&self, token: &str, now: UnixMillis) -> Result<Identity, AuthRefusal> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(AuthRefusal::Malformed("it is too long"));
        }
        let hash = sha256(token.as_bytes());
        let known = match self.verified.get(&hash) {
            Some(known) => known,
            None => {
                let known = self.check_signature(token)?;
                self.verified.insert(hash, known.clone());
                known
            }
        };
        if now >= known.identity.expires_at {
            self.verified.invalidate(&hash);
            return Err(AuthRefusal::Expired);
        }
        if now < known.not_before {
            return Err(AuthRefusal::NotYetValid);
        }
        Ok(known.identity)
    }

    /// Everything about a token that does not depend on the time.
    fn check_signature(&self, token: &str) -> Result<Remembered, AuthRefusal> {
        let malformed = AuthRefusal::Malformed;
        let header = jsonwebtoken::decode_header(token).map_err(|_| malformed("its header can't be read"))?;
        if header.alg != Algorithm::EdDSA {
            return Err(malformed("its algorithm is not EdDSA"));
        }
        if header.crit.is_some() {
            return Err(malformed("its header demands extensions"));
        }
        let kid = header.kid.ok_or_else(|| malformed("its header has no kid"))?;
        // Not trusted yet: it only says whose keys the signature is checked with.
        let claimed: Claims = jsonwebtoken::dangerous::insecure_decode_claims(token)
            .map_err(|_| malformed("a claim of exp, nbf, aud, iss, sub is missing or of the wrong kind"))?;
        let app = self.apps.get(claimed.aud.name()).ok_or(AuthRefusal::WrongApp)?;
        let key = app.keys.get(&kid).ok_or(AuthRefusal::UnknownKey)?;
        let claims = jsonwebtoken::decode::<Claims>(token, key, &self.validation)
            .map_err(|e| match e.kind() {
                ErrorKind::InvalidSignature => AuthRefusal::BadSignature,
                _ => malformed("it can't be decoded"),
            })?
            .claims;
        if claims.iss != app.issuer {
            return Err(AuthRefusal::WrongIssuer);
        }
        if !is_name(&claims.sub) {
            return Err(malformed("sub is empty, too long, or has control characters"));
        }
        let expires_at = millis(claims.exp).saturating_add(self.leeway_ms).min(VARINT_MAX);
        let not_before = millis(claims.nbf).saturating_sub(self.leeway_ms);
        Ok(Remembered {
            identity: Identity {
                app: app.id,
                app_name: app.name.clone(),
                open_users: app.open_users,
                user_name: Arc::from(claims.sub),
                expires_at: UnixMillis::new(expires_at).unwrap_or_default(),
            },
            not_before: UnixMillis::new(not_before).unwrap_or_default(),
        })
    }

    /// The configured name of an app.
    #[must_use]
    pub fn app_name(&self, app: AppId) -> Option<Arc<str>> {
        self.apps.values().find(|known| known.id == app).map(|known| known.name.clone())
    }
}

/// Seconds with a fraction as whole milliseconds: 0 for the past beyond 1970, the largest time for the far future.
fn millis(seconds: f64) -> u64 {
    let millis = (seconds * 1_000.0).max(0.0);
    if millis < 4e18 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "between 0 and 4e18, and below a millisecond nothing matters"
        )]
        let whole = millis as u64;
        whole
    } else {
        VARINT_MAX
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    let mut hash = [0; 32];
    hash.copy_from_slice(digest.as_ref());
    hash
}

fn read_public_key(app: &str, path: &Path) -> Result<DecodingKey, KeysError> {
    let text = std::fs::read_to_string(path).map_err(|e| {
        KeysError(format!(
            "app {app:?}: key file {} can't be read ({e}): put the Ed25519 public key there, or take the key out of the \
             configuration",
            path.display()
        ))
    })?;
    let refused = |what: &str| KeysError(format!("app {app:?}: key file {} {what}", path.display()));
    if text.contains("PRIVATE KEY") {
        return Err(refused(
            "is a private key: give the gateway its public half (openssl pkey -in KEY -pubout), and keep this one away",
        ));
    }
    let not_a_key = "is not an Ed25519 public key in PEM (BEGIN PUBLIC KEY): make one with `openssl pkey -in KEY -pubout`";
    VerifyingKey::from_public_key_pem(&text).map_err(|_| refused(not_a_key))?;
    DecodingKey::from_ed_pem(text.as_bytes()).map_err(|_| refused(not_a_key))
}

/// What a development token says.
#[derive(Clone, Copy, Debug)]
pub struct Mint<'a> {
    /// `aud`.
    pub app: &'a str,
    /// `iss`.
    pub issuer: &'a str,
    /// `sub`.
    pub user: &'a str,
    /// Seconds from now until `exp`.
    pub ttl_s: u64,
}

/// Makes a development token. `nbf` is `now`.
///
/// # Errors
/// The name may not be, or the key can't sign.
pub fn mint(key: &DevKey, mint: Mint<'_>, now: UnixMillis) -> Result<String, KeysError> {
    if !is_name(mint.user) {
        return Err(KeysError(format!(
            "user {:?}: expected a name of 1 to 128 bytes without control characters",
            mint.user
        )));
    }
    let der = key.to_der().map_err(|e| KeysError(e.to_string()))?;
    let mut header = Header::new(Algorithm::EdDSA);
    header.kid = Some(key.kid.clone());
    let now_s = now.get() / 1_000;
    let claims = serde_json::json!({
        "aud": mint.app,
        "iss": mint.issuer,
        "sub": mint.user,
        "iat": now_s,
        "nbf": now_s,
        "exp": now_s.saturating_add(mint.ttl_s),
    });
    jsonwebtoken::encode(&header, &claims, &EncodingKey::from_ed_der(&der))
        .map_err(|e| KeysError(format!("the development key can't sign: {e}")))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::config::{DEMO_APP, DEV_ISSUER, KeyFile};
    use crate::data_folder::open_dev_key;

    const NOW_S: u64 = 1_800_000_000;

    fn at(seconds: u64) -> UnixMillis {
        UnixMillis::new(seconds * 1_000).unwrap()
    }

    fn new_key() -> (tempfile::TempDir, DevKey) {
        let parent = tempfile::tempdir().unwrap();
        let key = open_dev_key(&parent.path().join("data")).unwrap();
        (parent, key)
    }

    fn app(name: &str, keys: Vec<KeyFile>, dev_key: bool) -> AppConfig {
        AppConfig { name: name.to_owned(), keys, dev_key, ..AppConfig::default() }
    }

    fn sign(key: &DevKey, kid: Option<&str>, claims: &Value) -> String {
        let mut header = Header::new(Algorithm::EdDSA);
        header.kid = kid.map(str::to_owned);
        jsonwebtoken::encode(&header, claims, &EncodingKey::from_ed_der(&key.to_der().unwrap())).unwrap()
    }

    fn good() -> Value {
        json!({ "aud": DEMO_APP, "iss": DEV_ISSUER, "sub": "alice", "nbf": NOW_S, "exp": NOW_S + 100 })
    }

    fn with(key: &str, value: Value) -> Value {
        let mut claims = good();
        claims[key] = value;
        claims
    }

    fn without(key: &str) -> Value {
        let mut claims = good();
        claims.as_object_mut().unwrap().remove(key);
        claims
    }

    #[test]
    fn every_kind_of_bad_token_has_its_refusal() {
        let (_a, key) = new_key();
        let (_b, stranger) = new_key();
        let verifier =
            Verifier::new(&[app(DEMO_APP, Vec::new(), true)], &AuthConfig::default(), &key).unwrap();
        let kid = Some(key.kid.as_str());
        let hmac = {
            let mut header = Header::new(Algorithm::HS256);
            header.kid = Some(key.kid.clone());
            let public = key.signing.verifying_key();
            jsonwebtoken::encode(&header, &good(), &EncodingKey::from_secret(public.as_bytes())).unwrap()
        };
        let none = {
            let token = sign(&key, kid, &good());
            let rest = token.split_once('.').unwrap().1;
            format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{rest}")
        };
        let crit = {
            let mut header = Header::new(Algorithm::EdDSA);
            header.kid = Some(key.kid.clone());
            header.crit = Some(vec!["x".to_owned()]);
            jsonwebtoken::encode(&header, &good(), &EncodingKey::from_ed_der(&key.to_der().unwrap())).unwrap()
        };
        let swapped = {
            let mine = sign(&key, kid, &good());
            let other = sign(&key, kid, &with("sub", json!("bob")));
            format!("{}.{}", mine.rsplit_once('.').unwrap().0, other.rsplit_once('.').unwrap().1)
        };
        let claims_missing =
            AuthRefusal::Malformed("a claim of exp, nbf, aud, iss, sub is missing or of the wrong kind");
        let bad_sub = AuthRefusal::Malformed("sub is empty, too long, or has control characters");
        let undecodable = AuthRefusal::Malformed("it can't be decoded");
        let unreadable = AuthRefusal::Malformed("its header can't be read");
        for (what, token, want) in [
            ("good", sign(&key, kid, &good()), None),
            ("list of one", sign(&key, kid, &with("aud", json!([DEMO_APP]))), None),
            ("fraction", sign(&key, kid, &with("exp", json!(NOW_S as f64 + 0.5))), None),
            ("empty", String::new(), Some(unreadable)),
            ("two dots", "a.b.c".to_owned(), Some(unreadable)),
            ("too long", "a".repeat(TOKEN_BYTES_MAX + 1), Some(AuthRefusal::Malformed("it is too long"))),
            ("hmac with the public key", hmac, Some(AuthRefusal::Malformed("its algorithm is not EdDSA"))),
            ("alg none", none, Some(unreadable)),
            ("crit", crit, Some(AuthRefusal::Malformed("its header demands extensions"))),
            ("no kid", sign(&key, None, &good()), Some(AuthRefusal::Malformed("its header has no kid"))),
            ("other kid", sign(&key, Some("other"), &good()), Some(AuthRefusal::UnknownKey)),
            ("stranger with our kid", sign(&stranger, kid, &good()), Some(AuthRefusal::BadSignature)),
            ("swapped signature", swapped, Some(AuthRefusal::BadSignature)),
            ("wrong app", sign(&key, kid, &with("aud", json!("other"))), Some(AuthRefusal::WrongApp)),
            ("two apps", sign(&key, kid, &with("aud", json!([DEMO_APP, "b"]))), Some(claims_missing)),
            ("wrong issuer", sign(&key, kid, &with("iss", json!("other"))), Some(AuthRefusal::WrongIssuer)),
            ("expired", sign(&key, kid, &with("exp", json!(NOW_S - 31))), Some(AuthRefusal::Expired)),
            ("expired within leeway", sign(&key, kid, &with("exp", json!(NOW_S - 29))), None),
            ("early", sign(&key, kid, &with("nbf", json!(NOW_S + 31))), Some(AuthRefusal::NotYetValid)),
            ("early within leeway", sign(&key, kid, &with("nbf", json!(NOW_S + 30))), None),
            ("far future", sign(&key, kid, &with("exp", json!(1e17))), None),
            ("beyond time", sign(&key, kid, &with("exp", json!(1e300))), Some(undecodable)),
            ("before 1970", sign(&key, kid, &with("exp", json!(-5))), Some(undecodable)),
            ("exp as text", sign(&key, kid, &with("exp", json!("1"))), Some(claims_missing)),
            ("no exp", sign(&key, kid, &without("exp")), Some(claims_missing)),
            ("no nbf", sign(&key, kid, &without("nbf")), Some(claims_missing)),
            ("no aud", sign(&key, kid, &without("aud")), Some(claims_missing)),
            ("no iss", sign(&key, kid, &without("iss")), Some(claims_missing)),
            ("no sub", sign(&key, kid, &without("sub")), Some(claims_missing)),
            ("empty sub", sign(&key, kid, &with("sub", json!(""))), Some(bad_sub)),
            ("control", sign(&key, kid, &with("sub", json!("a\nb"))), Some(bad_sub)),
            ("long sub", sign(&key, kid, &with("sub", json!("a".repeat(129)))), Some(bad_sub)),
        ] {
            for round in ["fresh", "remembered"] {
                let got = verifier.verify(&token, at(NOW_S));
                assert_eq!(got.as_ref().err(), want.as_ref(), "{what}, {round}");
                if let Ok(identity) = got {
                    assert_eq!(&*identity.user_name, "alice", "{what}");
                    assert_eq!((identity.app, &*identity.app_name), (AppId::of(DEMO_APP), DEMO_APP));
                }
            }
        }
    }

    #[test]
    fn a_remembered_token_still_expires() {
        let (_folder, key) = new_key();
        let verifier =
            Verifier::new(&[app(DEMO_APP, Vec::new(), true)], &AuthConfig::default(), &key).unwrap();
        let mint_it = Mint { app: DEMO_APP, issuer: DEV_ISSUER, user: "alice", ttl_s: 100 };
        let token = mint(&key, mint_it, at(NOW_S)).unwrap();
        for (seconds, want) in [
            (NOW_S - 31, Some(AuthRefusal::NotYetValid)),
            (NOW_S, None),
            (NOW_S + 129, None),
            (NOW_S + 130, Some(AuthRefusal::Expired)),
            (NOW_S + 131, Some(AuthRefusal::Expired)),
        ] {
            assert_eq!(verifier.verify(&token, at(seconds)).err(), want, "{seconds}");
        }
    }

    #[test]
    fn apps_do_not_share_keys_and_keys_overlap() {
        let (one, first) = new_key();
        let (two, second) = new_key();
        let (_three, dev) = new_key();
        let file = |folder: &tempfile::TempDir| folder.path().join("data/keys/dev.pub.pem");
        // open_dev_key writes the public half too; both apps call their key "k".
        let key = |kid: &str, folder| KeyFile { kid: kid.to_owned(), file: file(folder) };
        let apps =
            [app("a", vec![key("k", &one), key("next", &two)], false), app("b", vec![key("k", &two)], false)];
        let verifier = Verifier::new(&apps, &AuthConfig::default(), &dev).unwrap();
        let claims = |aud: &str| with("aud", json!(aud));
        for (signer, kid, aud, want) in [
            (&first, "k", "a", None),
            (&second, "next", "a", None),
            (&second, "k", "b", None),
            (&first, "k", "b", Some(AuthRefusal::BadSignature)),
            (&second, "k", "a", Some(AuthRefusal::BadSignature)),
            (&second, "next", "b", Some(AuthRefusal::UnknownKey)),
            (&dev, dev.kid.as_str(), "a", Some(AuthRefusal::UnknownKey)),
        ] {
            let token = sign(signer, Some(kid), &claims(aud));
            assert_eq!(verifier.verify(&token, at(NOW_S)).err(), want, "{kid} for {aud}");
        }
    }

    #[test]
    fn refusals_say_whether_to_retry() {
        for (refusal, code, retry) in [
            (AuthRefusal::Malformed("x"), RefusalCode::BadToken, Retry::AfterAuth),
            (AuthRefusal::BadSignature, RefusalCode::BadToken, Retry::AfterAuth),
            (AuthRefusal::UnknownKey, RefusalCode::UnknownKey, Retry::AfterAuth),
            (AuthRefusal::WrongIssuer, RefusalCode::UnknownKey, Retry::AfterAuth),
            (AuthRefusal::Expired, RefusalCode::TokenExpired, Retry::AfterAuth),
            (AuthRefusal::NotYetValid, RefusalCode::TokenNotYetValid, Retry::AfterAuth),
            (AuthRefusal::WrongApp, RefusalCode::WrongApp, Retry::Never),
        ] {
            assert_eq!((refusal.code(), refusal.retry()), (code, retry), "{refusal}");
        }
    }

    #[test]
    fn bad_key_files_are_refused_in_one_sentence() {
        let (folder, dev) = new_key();
        let garbage = folder.path().join("garbage.pem");
        std::fs::write(&garbage, "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n").unwrap();
        for (file, want) in [
            (
                folder.path().join("none.pem"),
                "can't be read (No such file or directory (os error 2)): put the Ed25519 public key there, or take the \
                 key out of the configuration",
            ),
            (
                folder.path().join("data/keys/dev.pem"),
                "is a private key: give the gateway its public half (openssl pkey -in KEY -pubout), and keep this one \
                 away",
            ),
            (
                garbage,
                "is not an Ed25519 public key in PEM (BEGIN PUBLIC KEY): make one with `openssl pkey -in KEY -pubout`",
            ),
        ] {
            let keys = vec![KeyFile { kid: "k".to_owned(), file: file.clone() }];
            let error = Verifier::new(&[app("a", keys, false)], &AuthConfig::default(), &dev).unwrap_err();
            assert_eq!(error.to_string(), format!("app \"a\": key file {} {want}", file.display()));
        }
    }

    #[test]
    fn tokens_are_not_made_for_names_that_may_not_be() {
        let (_folder, key) = new_key();
        for user in ["", "a\u{7}", &"x".repeat(129)] {
            let mint_it = Mint { app: DEMO_APP, issuer: DEV_ISSUER, user, ttl_s: 1 };
            assert!(mint(&key, mint_it, at(NOW_S)).is_err(), "{user:?}");
        }
    }
}
