//! Session tickets: what a device shows instead of a token when it comes back.
//!
//! - A ticket says which session of which device it is and until when it is good; HMAC-SHA256 under a key of the data
//!   folder proves that we said it. Nothing is kept for it on this side.
//! - It is compared in constant time, and nothing in it is looked at before.
//! - It is not secret from its holder, and it travels inside TLS only.
//!
//! Not here: whether the device was logged out since (its class epoch is compared by its user's shard).

use std::fmt;

use fulmar_protocol::close::RefusalCode;
use fulmar_protocol::id::{AppId, ClassEpoch, DeviceClass, DeviceId, SessionId, UnixMillis, UserId};
use fulmar_protocol::limit::TICKET_BYTES_MAX;
use ring::hmac;

use crate::data_folder::TicketSecret;

/// First byte of every ticket: the layout of what follows.
const VERSION: u8 = 1;

/// Version, eight numbers of 8 bytes, and the class.
const BODY_BYTES: usize = 1 + 8 * 8 + 1;

/// Bytes of the code that authenticates the body.
const TAG_BYTES: usize = 32;

/// Bytes of a ticket.
pub const TICKET_BYTES: usize = BODY_BYTES + TAG_BYTES;

const _: () = assert!(TICKET_BYTES <= TICKET_BYTES_MAX, "a ticket fits HELLO and WELCOME");

/// What a ticket says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// The app.
    pub app: AppId,
    /// The user.
    pub user: UserId,
    /// The user's device.
    pub device: DeviceId,
    /// The device's class.
    pub class: DeviceClass,
    /// Login counter of the class when the ticket was issued.
    pub class_epoch: ClassEpoch,
    /// The device's session.
    pub session: SessionId,
    /// When it was issued.
    pub issued: UnixMillis,
    /// From when on it is refused.
    pub expires: UnixMillis,
}

/// Why a ticket is refused. The device goes on with a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum TicketRefusal {
    /// Not one of ours, or changed, or of another version.
    #[error("the ticket is not valid")]
    Invalid,
    /// Its time is over.
    #[error("the ticket expired")]
    Expired,
}

impl TicketRefusal {
    /// The code on the wire: for the device it is all the same.
    #[must_use]
    pub const fn code(self) -> RefusalCode {
        RefusalCode::BadTicket
    }

    /// A word for metrics and logs.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Invalid => "bad_ticket",
            Self::Expired => "ticket_expired",
        }
    }
}

/// Seals tickets and opens them.
#[derive(Clone)]
pub struct Tickets {
    key: hmac::Key,
}

impl fmt::Debug for Tickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tickets(..)")
    }
}

impl Tickets {
    /// With the data folder's secret, so that tickets outlive the process.
    #[must_use]
    pub fn new(secret: &TicketSecret) -> Self {
        Self { key: hmac::Key::new(hmac::HMAC_SHA256, &secret.0) }
    }

    /// The ticket as bytes.
    #[must_use]
    pub fn seal(&self, ticket: &Ticket) -> [u8; TICKET_BYTES] {
        let numbers = [
            ticket.app.get(),
            ticket.user.get(),
            ticket.device.get(),
            ticket.class_epoch.get(),
            ticket.session.get(),
            ticket.issued.get(),
            ticket.expires.get(),
            0, // reserved, so that a field can be added without a longer ticket
        ];
        let mut body = Vec::with_capacity(TICKET_BYTES);
        body.push(VERSION);
        for number in numbers {
            body.extend_from_slice(&number.to_be_bytes());
        }
        body.push(ticket.class as u8);
        let tag = hmac::sign(&self.key, &body);
        body.extend_from_slice(tag.as_ref());
        let mut sealed = [0; TICKET_BYTES];
        sealed.copy_from_slice(&body);
        sealed
    }

    /// What the bytes say, if they are ours and still good at `now`.
    ///
    /// # Errors
    /// They are not, or no longer.
    pub fn open(&self, sealed: &[u8], now: UnixMillis) -> Result<Ticket, TicketRefusal> {
        let (body, tag) = sealed.split_at_checked(BODY_BYTES).ok_or(TicketRefusal::Invalid)?;
        hmac::verify(&self.key, body, tag).map_err(|_| TicketRefusal::Invalid)?;
        let ticket = parse(body).ok_or(TicketRefusal::Invalid)?;
        if now >= ticket.expires {
            return Err(TicketRefusal::Expired);
        }
        Ok(ticket)
    }
}

fn parse(body: &[u8]) -> Option<Ticket> {
    let (&version, rest) = body.split_first()?;
    let (&class, rest) = rest.split_last()?;
    if version != VERSION {
        return None;
    }
    let (numbers, _) = rest.as_chunks::<8>();
    let mut numbers = numbers.iter().map(|bytes| u64::from_be_bytes(*bytes));
    let mut next = || numbers.next();
    Some(Ticket {
        app: AppId::new(next()?)?,
        user: UserId::new(next()?)?,
        device: DeviceId::new(next()?)?,
        class_epoch: ClassEpoch::new(next()?)?,
        session: SessionId::new(next()?)?,
        issued: UnixMillis::new(next()?)?,
        expires: UnixMillis::new(next()?)?,
        class: match class {
            0 => DeviceClass::Phone,
            1 => DeviceClass::Tablet,
            2 => DeviceClass::Desktop,
            3 => DeviceClass::Web,
            4 => DeviceClass::Bot,
            _ => return None,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticket() -> Ticket {
        Ticket {
            app: AppId::of("demo"),
            user: UserId::new(257).unwrap(),
            device: DeviceId::new(3).unwrap(),
            class: DeviceClass::Desktop,
            class_epoch: ClassEpoch::new(9).unwrap(),
            session: SessionId::new(77).unwrap(),
            issued: UnixMillis::new(1_000).unwrap(),
            expires: UnixMillis::new(2_000).unwrap(),
        }
    }

    fn at(millis: u64) -> UnixMillis {
        UnixMillis::new(millis).unwrap()
    }

    #[test]
    fn a_ticket_is_good_until_it_expires() {
        let tickets = Tickets::new(&TicketSecret([7; 64]));
        for class in [
            DeviceClass::Phone,
            DeviceClass::Tablet,
            DeviceClass::Desktop,
            DeviceClass::Web,
            DeviceClass::Bot,
        ] {
            let ticket = Ticket { class, ..ticket() };
            let sealed = tickets.seal(&ticket);
            for (now, want) in [(0, Ok(ticket)), (1_999, Ok(ticket)), (2_000, Err(TicketRefusal::Expired))] {
                assert_eq!(tickets.open(&sealed, at(now)), want, "{class:?} at {now}");
            }
        }
    }

    #[test]
    fn no_bit_can_be_changed() {
        let tickets = Tickets::new(&TicketSecret([7; 64]));
        let sealed = tickets.seal(&ticket());
        for bit in 0..sealed.len() * 8 {
            let mut changed = sealed;
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(tickets.open(&changed, at(0)), Err(TicketRefusal::Invalid), "bit {bit}");
        }
    }

    #[test]
    fn no_other_length_and_no_other_key_will_do() {
        let tickets = Tickets::new(&TicketSecret([7; 64]));
        let sealed = tickets.seal(&ticket());
        for length in 0..sealed.len() {
            assert_eq!(tickets.open(&sealed[..length], at(0)), Err(TicketRefusal::Invalid), "{length} bytes");
        }
        let mut longer = sealed.to_vec();
        longer.push(0);
        assert_eq!(tickets.open(&longer, at(0)), Err(TicketRefusal::Invalid));
        let others = Tickets::new(&TicketSecret([8; 64]));
        assert_eq!(others.open(&sealed, at(0)), Err(TicketRefusal::Invalid));
    }

    #[test]
    fn the_layout_is_pinned() {
        let sealed = Tickets::new(&TicketSecret([7; 64])).seal(&ticket());
        let hex: String = sealed.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, PINNED);
    }

    const PINNED: &str = concat!(
        "01",
        "07f72fb3af456330000000000000010100000000000000030000000000000009",
        "000000000000004d00000000000003e800000000000007d00000000000000000",
        "02",
        "6a72a6eeee1975c4f1433fde1a1912a0d7884bfdf7f67317e909dd01ea26161d",
    );
}
