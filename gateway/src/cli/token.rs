//! `fulmar token`: makes a token for trying things out, signed with the data folder's development key.
//!
//! Not here: tokens of real apps; their back ends sign those with keys the gateway never sees.

use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use clap::Args;
use fulmar_protocol::id::UnixMillis;

use super::ConfigArgs;
use crate::config::{AppConfig, Config, DEMO_APP};
use crate::data_folder::open_dev_key;
use crate::identity::token::{Mint, mint};

const EXAMPLES: &str = "\
Examples:
  fulmar token --user alice                   for the app \"demo\", for 30 days
  fulmar token -u bob --ttl 10m -d /srv/f     of another data folder
  TOKEN=$(fulmar token --user carol)          in a script

The token is signed with keys/dev.pem of the data folder, which is made if it
is missing. A gateway accepts it for apps with dev_key = true; the app \"demo\",
which is there when no other is configured, has that.";

/// Flags of `fulmar token`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct TokenArgs {
    /// The user it stands for
    #[arg(short, long, value_name = "NAME")]
    pub user: String,
    /// The app
    #[arg(short, long, value_name = "NAME", default_value = DEMO_APP)]
    pub app: String,
    /// How long it is good for: a number with s, m, h or d
    #[arg(long, value_name = "TIME", default_value = "30d", value_parser = seconds)]
    pub ttl: u64,
    /// Print an object with token, app, user, kid and expiry instead of the token alone
    #[arg(long)]
    pub json: bool,
    /// Where the configuration is.
    #[command(flatten)]
    pub config: ConfigArgs,
}

/// Makes the token and prints it.
///
/// # Errors
/// The app does not accept such tokens, or the data folder can't be used.
pub fn run(args: &TokenArgs) -> anyhow::Result<ExitCode> {
    let config = args.config.load(Vec::new())?;
    let app = accepting_app(&config, &args.app)?;
    let key = open_dev_key(&config.data.path)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the system clock is not set")?;
    let now = u64::try_from(now.as_millis()).ok().and_then(UnixMillis::new);
    let now = now.context("the system clock is beyond the end of time")?;
    let token =
        mint(&key, Mint { app: &app.name, issuer: &app.issuer, user: &args.user, ttl_s: args.ttl }, now)?;
    if args.json {
        let object = serde_json::json!({
            "token": token,
            "app": app.name,
            "user": args.user,
            "kid": key.kid,
            "expires_s": now.get() / 1_000 + args.ttl,
        });
        super::answer(&object.to_string())?;
    } else {
        super::answer(&token)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn accepting_app<'a>(config: &'a Config, name: &str) -> anyhow::Result<&'a AppConfig> {
    let names = || config.apps.iter().map(|app| format!("{:?}", app.name)).collect::<Vec<_>>().join(", ");
    match config.app(name) {
        Some(app) if app.dev_key => Ok(app),
        Some(_) => bail!(
            "app {name:?} does not accept development tokens: set dev_key = true in its [[app]], or have its back end make \
             one"
        ),
        None => bail!("there is no app {name:?}: choose one of {} with --app, or add an [[app]]", names()),
    }
}

/// Reads `90s`, `10m`, `12h`, `30d`.
fn seconds(text: &str) -> Result<u64, String> {
    let expected = || "expected a number with s, m, h or d, such as 12h, from 1s to 3650d".to_owned();
    let unit = text.chars().next_back().ok_or_else(expected)?;
    let number: u64 = text.strip_suffix(unit).and_then(|n| n.parse().ok()).ok_or_else(expected)?;
    let factor = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3_600,
        'd' => 86_400,
        _ => return Err(expected()),
    };
    number.checked_mul(factor).filter(|s| (1..=3_650 * 86_400).contains(s)).ok_or_else(expected)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn times_are_read() {
        for (text, want) in [
            ("90s", Some(90)),
            ("10m", Some(600)),
            ("12h", Some(43_200)),
            ("30d", Some(2_592_000)),
            ("3650d", Some(315_360_000)),
            ("3651d", None),
            ("0s", None),
            ("10", None),
            ("", None),
            ("h", None),
            ("-1h", None),
            ("1ü", None),
            ("99999999999999999999d", None),
            ("18446744073709551615d", None),
        ] {
            assert_eq!(seconds(text).ok(), want, "{text:?}");
        }
    }

    #[test]
    fn apps_that_do_not_accept_such_tokens_are_named() {
        let file = "[[app]]\nname = \"a\"\ndev_key = true\n[[app]]\nname = \"b\"\nkeys = [{kid = \"k\", file = \"f\"}]\n";
        let config = Config::assemble(Some((Path::new("f.toml"), file)), &[], &[]).unwrap();
        for (app, want) in [
            ("a", None),
            (
                "b",
                Some(
                    "app \"b\" does not accept development tokens: set dev_key = true in its [[app]], or have its back \
                     end make one",
                ),
            ),
            (
                "demo",
                Some("there is no app \"demo\": choose one of \"a\", \"b\" with --app, or add an [[app]]"),
            ),
        ] {
            assert_eq!(accepting_app(&config, app).err().map(|e| e.to_string()).as_deref(), want);
        }
    }
}
