//! A client of any of the servers, and how parties of them come together.
//!
//! - [`Client::post`] queues, [`Client::next`] writes and reads; dropping [`Client::next`] loses nothing.
//! - Every client is a user of its own with a connection of its own.
//!
//! Not here: when who sends what (`drive`).

use std::{cell::Cell, net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use fulmar_benches::{
    bare,
    phone::{Away, Phone, Seen as PhoneSeen, Tokens},
};
use fulmar_protocol::id::{ConversationId, Pseq};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use rustls::client::Resumption;
use tokio_rustls::TlsConnector;

use crate::{mqtt::Mqtt, nats::Nats, plan::Protocol, server::Server, wire::Wire};

/// UDP sockets that clients share: enough that a burst fits them.
const SOCKETS: usize = 16;

/// How long a server may take to let somebody in.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a client is told.
#[derive(Clone, Debug)]
pub(crate) enum Seen {
    /// A message came.
    Message(Bytes),
    /// The message of this number is taken, whatever that means to the server.
    Acked(u64),
    /// Something else.
    Nothing,
}

/// Where a message goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum To {
    /// A conversation of Fulmar's.
    Conversation(ConversationId),
    /// A topic or subject.
    Topic(Rc<str>),
}

/// See the module's text.
#[derive(Debug)]
pub(crate) enum Client {
    /// Fulmar's.
    Fulmar(Box<Phone>),
    /// MQTT's.
    Mqtt(Box<Mqtt>),
    /// NATS's.
    Nats(Box<Nats>),
}

impl Client {
    /// Queues a message; it leaves in [`Self::next`]. The number it is acked by, `None`: no room now.
    ///
    /// # Errors
    /// It is not for this kind of client, or numbers are used up.
    pub(crate) fn post(&mut self, to: &To, payload: Bytes) -> anyhow::Result<Option<u64>> {
        match (self, to) {
            (Self::Fulmar(phone), To::Conversation(to)) => {
                Ok(phone.post(*to, payload)?.map(|number| token(*to, number)))
            }
            (Self::Mqtt(client), To::Topic(to)) => Ok(client.post(to, &payload)),
            (Self::Nats(client), To::Topic(to)) => Ok(Some(client.post(to, &payload))),
            (client, to) => anyhow::bail!("{client:?} can't send to {to:?}"),
        }
    }

    /// Writes what is queued, and what happens next.
    ///
    /// # Errors
    /// The connection ended, or the server refused something.
    pub(crate) async fn next(&mut self) -> anyhow::Result<Seen> {
        match self {
            Self::Fulmar(phone) => Ok(match phone.next().await? {
                // Notices of members joining are records too.
                PhoneSeen::Delivered(record) if record.kind.sendable() => Seen::Message(record.payload),
                PhoneSeen::Acked(conversation, number) => Seen::Acked(token(conversation, number)),
                PhoneSeen::Refused(refused) => anyhow::bail!("a send was refused: {:?}", refused.code),
                PhoneSeen::Delivered(_) | PhoneSeen::Other(_) => Seen::Nothing,
            }),
            Self::Mqtt(client) => client.next().await,
            Self::Nats(client) => client.next().await,
        }
    }
}

/// A number for a send, which differs between the sends of a client that are under way.
fn token(conversation: ConversationId, number: Pseq) -> u64 {
    conversation.get().rotate_left(32) ^ number.get()
}

/// What it takes to be a client of one server.
pub(crate) struct Door {
    protocol: Protocol,
    address: SocketAddr,
    tls: TlsConnector,
    /// Empty where nobody speaks QUIC.
    sockets: Vec<quinn::Endpoint>,
    next: Cell<usize>,
    /// Only Fulmar asks for them.
    tokens: Option<Tokens>,
    connecting: usize,
}

impl core::fmt::Debug for Door {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Door")
            .field("protocol", &self.protocol)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Door {
    /// Of this server. With `resume`, TLS sessions may be resumed, as an app's would; without, every handshake is a full one.
    ///
    /// # Errors
    /// Its certificate can't be read, or there are no sockets.
    pub(crate) fn of(server: &Server, resume: bool, connecting: usize) -> anyhow::Result<Self> {
        let protocol = server.peer().protocol();
        let mut tls = bare::client_tls(server.certificate())?;
        if !resume {
            tls.resumption = Resumption::disabled();
        }
        let alpn: &[&[u8]] = match protocol {
            Protocol::Fulmar => &[fulmar_protocol::version::ALPN],
            Protocol::MqttQuic => &[b"mqtt"],
            Protocol::Mqtt | Protocol::Nats | Protocol::Jetstream => &[],
        };
        let sockets = if alpn.is_empty() { 0 } else { SOCKETS };
        let sockets = (0..sockets)
            .map(|_| {
                let mut tls = tls.clone();
                tls.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
                bare::client_endpoint_with(tls, std::net::Ipv4Addr::LOCALHOST)
            })
            .collect::<anyhow::Result<_>>()?;
        let tokens = (protocol == Protocol::Fulmar).then(|| Tokens::of(server.folder())).transpose()?;
        Ok(Self {
            protocol,
            address: server.address(),
            tls: TlsConnector::from(Arc::new(tls)),
            sockets,
            next: Cell::new(0),
            tokens,
            connecting,
        })
    }

    fn socket(&self) -> anyhow::Result<&quinn::Endpoint> {
        let number = self.next.get();
        self.next.set(number.wrapping_add(1));
        self.sockets.get(number % self.sockets.len().max(1)).context("no socket")
    }

    async fn wire(&self) -> anyhow::Result<Wire> {
        match self.protocol {
            Protocol::Mqtt => Wire::tls(self.address, &self.tls, false).await,
            Protocol::Nats | Protocol::Jetstream => Wire::tls(self.address, &self.tls, true).await,
            Protocol::Fulmar | Protocol::MqttQuic => Wire::quic(self.address, self.socket()?).await,
        }
    }

    /// Connects as the user of this number. A `lasting` one is still known when it comes back.
    ///
    /// # Errors
    /// It was not let in.
    pub(crate) async fn enter(&self, number: u32, lasting: bool) -> anyhow::Result<Client> {
        let name = user(number);
        let entering = async {
            Ok(match self.protocol {
                Protocol::Fulmar => {
                    let token = self.tokens.as_ref().context("no tokens")?.mint(&name)?;
                    let uid = u128::from(number) + 1;
                    Client::Fulmar(Box::new(Phone::connect(self.socket()?, self.address, token, uid).await?))
                }
                Protocol::Mqtt | Protocol::MqttQuic => {
                    let (client, _) = Mqtt::connect(self.wire().await?, &name, !lasting).await?;
                    Client::Mqtt(Box::new(client))
                }
                Protocol::Nats => {
                    Client::Nats(Box::new(Nats::connect(self.wire().await?, &name, false).await?))
                }
                Protocol::Jetstream => {
                    Client::Nats(Box::new(Nats::connect(self.wire().await?, &name, true).await?))
                }
            })
        };
        tokio::time::timeout(PATIENCE, entering).await.context("the server is silent")?
    }

    /// Comes back as the user of this number, whose last client `left` is what it still knows.
    ///
    /// # Errors
    /// It was not let in, or not known.
    pub(crate) async fn enter_again(&self, number: u32, left: Left) -> anyhow::Result<Client> {
        let entering = async {
            Ok(match left {
                Left::Phone(phone) => {
                    let back = phone.reconnect(self.socket()?, self.address).await;
                    Client::Fulmar(Box::new(back.map_err(|(_, error)| error)?))
                }
                Left::Name if self.protocol == Protocol::Jetstream => {
                    let mut client = Nats::connect(self.wire().await?, &user(number), true).await?;
                    client.attach(&user(number)).await?;
                    Client::Nats(Box::new(client))
                }
                Left::Name => {
                    let (client, present) = Mqtt::connect(self.wire().await?, &user(number), false).await?;
                    ensure!(present, "the broker does not know the session any more");
                    Client::Mqtt(Box::new(client))
                }
            })
        };
        tokio::time::timeout(PATIENCE, entering).await.context("the server is silent")?
    }

    /// Clients of these numbers, several at a time.
    ///
    /// # Errors
    /// One was not let in.
    pub(crate) async fn enter_all(
        &self,
        numbers: std::ops::Range<u32>,
        lasting: bool,
    ) -> anyhow::Result<Vec<(u32, Client)>> {
        let entering = numbers.map(|number| async move {
            let client = self.enter(number, lasting).await.with_context(|| user(number))?;
            anyhow::Ok((number, client))
        });
        let mut clients: Vec<_> =
            stream::iter(entering).buffer_unordered(self.connecting).try_collect().await?;
        clients.sort_by_key(|(number, _)| *number);
        Ok(clients)
    }

    /// Readies clients to receive what is sent to `topic` of each; with Fulmar, being a member is enough.
    async fn subscribe(
        &self,
        clients: Vec<(u32, Client)>,
        topic: impl Fn(u32) -> String,
    ) -> anyhow::Result<Vec<(u32, Client)>> {
        let subscribing = clients.into_iter().map(|(number, mut client)| {
            let topic = topic(number);
            async move {
                let subscribing = async {
                    match &mut client {
                        Client::Fulmar(_) => Ok(()),
                        Client::Mqtt(client) => client.subscribe(&topic).await,
                        Client::Nats(client) if self.protocol == Protocol::Jetstream => {
                            client.make_consumer(&user(number), &topic).await
                        }
                        Client::Nats(client) => client.subscribe(&topic).await,
                    }
                };
                tokio::time::timeout(PATIENCE, subscribing).await.context("the server is silent")??;
                anyhow::Ok((number, client))
            }
        });
        let mut clients: Vec<_> =
            stream::iter(subscribing).buffer_unordered(self.connecting).try_collect().await?;
        clients.sort_by_key(|(number, _)| *number);
        Ok(clients)
    }

    async fn sender(&self, number: u32) -> anyhow::Result<Client> {
        let mut sender = self.enter(number, false).await?;
        if self.protocol == Protocol::Jetstream
            && let Client::Nats(client) = &mut sender
        {
            client.make_stream().await?;
        }
        Ok(sender)
    }

    /// One who sends to all others.
    ///
    /// # Errors
    /// Somebody was not let in, or what they share can't be made.
    pub(crate) async fn group(&self, receivers: u32) -> anyhow::Result<(Client, To, Vec<Client>)> {
        let mut sender = self.sender(receivers).await?;
        let clients = self.enter_all(0..receivers, false).await?;
        let to = match &mut sender {
            Client::Fulmar(phone) => {
                let names: Vec<String> = (0..receivers).map(user).collect();
                To::Conversation(phone.create_group("everybody", &names).await?)
            }
            _ => To::Topic("everybody".into()),
        };
        let clients = self.subscribe(clients, |_| "everybody".to_owned()).await?;
        Ok((sender, to, clients.into_iter().map(|(_, client)| client).collect()))
    }

    /// So many who send, each to one other.
    ///
    /// # Errors
    /// As above.
    pub(crate) async fn pairs(&self, pairs: u32) -> anyhow::Result<Vec<(Client, To, Client)>> {
        if self.protocol == Protocol::Jetstream {
            self.sender(2 * pairs).await?;
        }
        let listeners = self.enter_all(pairs..2 * pairs, false).await?;
        let listeners = self.subscribe(listeners, |number| topic(number - pairs)).await?;
        let talkers = self.enter_all(0..pairs, false).await?;
        let mut ready = Vec::new();
        for ((number, mut talker), (_, listener)) in talkers.into_iter().zip(listeners) {
            let to = match &mut talker {
                Client::Fulmar(phone) => To::Conversation(phone.open_direct(&user(pairs + number)).await?),
                _ => To::Topic(topic(number).into()),
            };
            ready.push((talker, to, listener));
        }
        Ok(ready)
    }

    /// One who sends to each of so many apart, who are known when they come back.
    ///
    /// # Errors
    /// As above.
    pub(crate) async fn followers(&self, count: u32) -> anyhow::Result<(Client, Vec<(To, Client)>)> {
        let mut sender = self.sender(count).await?;
        let clients = self.enter_all(0..count, true).await?;
        let clients = self.subscribe(clients, topic).await?;
        let mut ready = Vec::new();
        for (number, client) in clients {
            let to = match &mut sender {
                Client::Fulmar(phone) => To::Conversation(phone.open_direct(&user(number)).await?),
                _ => To::Topic(topic(number).into()),
            };
            ready.push((to, client));
        }
        Ok((sender, ready))
    }
}

/// What is left of a client that went away.
#[derive(Debug)]
pub(crate) enum Left {
    /// Its cursors and its ticket.
    Phone(Box<Away>),
    /// Nothing but its name.
    Name,
}

impl From<Client> for Left {
    fn from(client: Client) -> Self {
        match client {
            Client::Fulmar(phone) => Self::Phone(Box::new(phone.leave())),
            Client::Mqtt(_) | Client::Nats(_) => Self::Name,
        }
    }
}

fn user(number: u32) -> String {
    format!("user-{number}")
}

fn topic(number: u32) -> String {
    format!("t-{number}")
}
