//! What is kept of which conversation. Pure.
//!
//! - The narrowest setting that says anything counts: the app's for the class, the app's, the class's for everybody, the
//!   one for everything. Age and bytes are decided each by itself.
//! - Conversations of an app that is no longer configured are kept as the settings for everybody say.

use std::collections::HashMap;

use fulmar_protocol::id::AppId;

use crate::{
    config::{
        AppConfig, RetentionConfig,
        retention::{Keep, KeepAge, KeepBytes},
    },
    conversation::ConversationClass,
};

/// What is kept of a conversation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Milliseconds a record is kept; `None`: forever.
    pub age_ms: Option<u64>,
    /// Bytes of records that are kept; `None`: all.
    pub bytes: Option<u64>,
}

impl Kept {
    /// Whether nothing ever goes.
    #[must_use]
    pub const fn everything(&self) -> bool {
        self.age_ms.is_none() && self.bytes.is_none()
    }
}

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    of_all: [Kept; 2],
    of_app: HashMap<AppId, [Kept; 2]>,
}

const CLASSES: [ConversationClass; 2] = [ConversationClass::Direct, ConversationClass::Group];

impl Policy {
    /// As configured.
    #[must_use]
    pub fn new(config: &RetentionConfig, apps: &[AppConfig]) -> Self {
        let of_all = CLASSES.map(|class| {
            let (age, bytes) = class_wide(config, class);
            Kept { age_ms: first(&[age, config.age]), bytes: first(&[bytes, config.bytes]) }
        });
        let of_app = apps.iter().map(|app| {
            let kept = CLASSES.map(|class| {
                let (age, bytes) = class_wide(config, class);
                let (app_age, app_bytes) = match class {
                    ConversationClass::Direct => (app.retention_direct_age, app.retention_direct_bytes),
                    ConversationClass::Group | ConversationClass::Broadcast => {
                        (app.retention_group_age, app.retention_group_bytes)
                    }
                };
                Kept {
                    age_ms: first(&[app_age, app.retention_age, age, config.age]),
                    bytes: first(&[app_bytes, app.retention_bytes, bytes, config.bytes]),
                }
            });
            (AppId::of(&app.name), kept)
        });
        Self { of_all, of_app: of_app.collect() }
    }

    /// What is kept of a conversation.
    #[must_use]
    pub fn kept(&self, app: AppId, class: ConversationClass) -> Kept {
        let [direct, group] = self.of_app.get(&app).unwrap_or(&self.of_all);
        match class {
            ConversationClass::Direct => *direct,
            ConversationClass::Group | ConversationClass::Broadcast => *group,
        }
    }

    /// Whether nothing ever goes, of any conversation.
    #[must_use]
    pub fn keeps_everything(&self) -> bool {
        self.of_app.values().chain([&self.of_all]).flatten().all(Kept::everything)
    }
}

const fn class_wide(config: &RetentionConfig, class: ConversationClass) -> (KeepAge, KeepBytes) {
    match class {
        ConversationClass::Direct => (config.direct_age, config.direct_bytes),
        ConversationClass::Group | ConversationClass::Broadcast => (config.group_age, config.group_bytes),
    }
}

/// The first that does not leave it to the next.
fn first<U: PartialEq>(narrowest_first: &[Keep<U>]) -> Option<u64> {
    narrowest_first.iter().find(|keep| **keep != Keep::Inherit).and_then(Keep::limit)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    const DAY: u64 = 86_400_000;
    const MIB: u64 = 1 << 20;

    fn policy(text: &str) -> Policy {
        let config = Config::assemble(Some((Path::new("/etc/f.toml"), text)), &[], &[]).unwrap();
        Policy::new(&config.retention, &config.apps)
    }

    #[test]
    fn the_default_keeps_everything() {
        assert!(policy("").keeps_everything());
        assert!(policy("[retention]\nage = \"forever\"\ngroup_age = \"inherit\"").keeps_everything());
        assert!(!policy("[retention]\ngroup_bytes = \"1 MiB\"").keeps_everything());
        assert!(!policy("[[app]]\nname = \"a\"\ndev_key = true\nretention_age = \"1d\"").keeps_everything());
    }

    #[test]
    fn the_narrowest_setting_counts_for_age_and_for_bytes() {
        let policy = policy(
            "[retention]\nage = \"90d\"\ngroup_age = \"30d\"\nbytes = \"64 MiB\"\n\
             [[app]]\nname = \"short\"\ndev_key = true\nretention_age = \"7d\"\nretention_direct_bytes = \"1 MiB\"\n\
             [[app]]\nname = \"long\"\ndev_key = true\nretention_group_age = \"forever\"\nretention_bytes = \"unlimited\"\n\
             [[app]]\nname = \"plain\"\ndev_key = true\n",
        );
        for (app, class, age, bytes) in [
            ("short", ConversationClass::Direct, Some(7 * DAY), Some(MIB)),
            ("short", ConversationClass::Group, Some(7 * DAY), Some(64 * MIB)),
            ("long", ConversationClass::Direct, Some(90 * DAY), None),
            ("long", ConversationClass::Group, None, None),
            ("plain", ConversationClass::Direct, Some(90 * DAY), Some(64 * MIB)),
            ("plain", ConversationClass::Group, Some(30 * DAY), Some(64 * MIB)),
            ("gone", ConversationClass::Direct, Some(90 * DAY), Some(64 * MIB)),
            ("gone", ConversationClass::Group, Some(30 * DAY), Some(64 * MIB)),
        ] {
            let want = Kept { age_ms: age, bytes };
            assert_eq!(policy.kept(AppId::of(app), class), want, "{app} {class:?}");
        }
    }
}
