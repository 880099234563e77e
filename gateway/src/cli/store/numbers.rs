//! Where the gateway's payloads and names have numbers of users in them.

use bytes::Bytes;
use fulmar_protocol::id::UserId;
use fulmar_protocol::service::{self, Roster};
use fulmar_store::{ConversationClass, Numbers, RecordKind};

use crate::conversation::state::direct_name;

/// Knows them all.
#[derive(Clone, Copy, Debug)]
pub(super) struct OfTheGateway;

impl Numbers for OfTheGateway {
    fn payload(
        &self,
        kind: RecordKind,
        payload: &Bytes,
        map: &mut dyn FnMut(UserId) -> Option<UserId>,
    ) -> Option<Bytes> {
        match kind {
            RecordKind::Created | RecordKind::Joined | RecordKind::Left if !payload.is_empty() => {
                let Roster { mut users } = service::decode(payload)?;
                for (user, _) in &mut users {
                    *user = map(*user)?;
                }
                postcard::to_allocvec(&Roster { users }).ok().map(Bytes::from)
            }
            _ => Some(payload.clone()),
        }
    }

    fn name(
        &self,
        class: ConversationClass,
        name: &str,
        map: &mut dyn FnMut(UserId) -> Option<UserId>,
    ) -> Option<String> {
        match class {
            ConversationClass::Group | ConversationClass::Broadcast => Some(name.to_owned()),
            ConversationClass::Direct => {
                let (a, b) = name.split_once(':')?;
                let mut number = |text: &str| map(text.parse().ok().and_then(UserId::new)?);
                Some(direct_name(number(a)?, number(b)?))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(n: u64) -> UserId {
        UserId::new(n).unwrap()
    }

    fn doubled(of: UserId) -> Option<UserId> {
        (of != user(13)).then(|| user(of.get() * 2))
    }

    #[test]
    fn numbers_are_replaced_wherever_they_stand() {
        let roster = |numbers: &[u64]| {
            let users = numbers.iter().map(|n| (user(*n), format!("user {n}"))).collect();
            Bytes::from(postcard::to_allocvec(&Roster { users }).unwrap())
        };
        let joined = |payload: &Bytes| OfTheGateway.payload(RecordKind::Joined, payload, &mut doubled);
        let found: Roster = service::decode(&joined(&roster(&[5, 300])).unwrap()).unwrap();
        assert_eq!(found.users, [(user(10), "user 5".to_owned()), (user(600), "user 300".to_owned())]);
        assert_eq!(joined(&roster(&[5, 13])), None, "a number nobody knows");
        assert_eq!(joined(&Bytes::from_static(b"\xff\xff")), None, "not a roster");
        assert_eq!(joined(&Bytes::new()), Some(Bytes::new()), "there were too many names to carry");
        let text = Bytes::from_static(b"5:300");
        assert_eq!(OfTheGateway.payload(RecordKind::Message, &text, &mut doubled), Some(text));

        let name = |class, name| OfTheGateway.name(class, name, &mut doubled);
        assert_eq!(name(ConversationClass::Direct, "5:300").as_deref(), Some("10:600"));
        assert_eq!(name(ConversationClass::Direct, "13:300"), None);
        assert_eq!(name(ConversationClass::Direct, "friends"), None);
        assert_eq!(name(ConversationClass::Group, "5:300").as_deref(), Some("5:300"));
        let mut swapped = |of: UserId| Some(if of == user(1) { user(9) } else { user(4) });
        let smaller_first = OfTheGateway.name(ConversationClass::Direct, "1:2", &mut swapped);
        assert_eq!(smaller_first.as_deref(), Some("4:9"));
    }
}
