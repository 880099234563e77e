//! Service 0.

use std::collections::HashMap;

use bytes::Bytes;
use fulmar_protocol::{
    close::RefusalCode,
    id::{ConversationId, Seq, UserId},
    limit::CALL_BODY_BYTES_MAX,
    service::{
        ChangeMembers, ConversationEntry, ConversationPage, CreateGroup, DeviceEntry, Devices, GroupCreated,
        ListConversations, ListMembers, MemberEntry, MemberPage, MembersChanged, Method, Names, NamesFound,
        PAGE_MAX, Role, decode, encode,
    },
};
use fulmar_store::{ConversationClass, PendingLink, ReadError};
use futures_util::future::{join_all, try_join_all};
use serde::{Serialize, de::DeserializeOwned};
use tracing::warn;

use super::{Caller, check_name, name_of, user};
use crate::{
    context::Context,
    conversation::{
        Command, GroupRequest, MembersRequest, Refusal, route::Named, shard::carry_link, state::direct_peer,
    },
    ground,
    receipt::{catchup, refusal_code, unread::unread},
    record,
};

/// Bytes a page may grow to: the rest of the frame is for what surrounds the entries.
const PAGE_BYTES_MAX: usize = CALL_BODY_BYTES_MAX - 256;

pub(super) async fn call(
    context: &Context,
    caller: &Caller,
    method: Method,
    body: &[u8],
) -> Result<Bytes, Refusal> {
    match method {
        Method::CreateGroup => answer(&create_group(context, caller, read(body)?).await?),
        Method::AddMembers => answer(&change_members(context, caller, read(body)?, true).await?),
        Method::RemoveMembers => answer(&change_members(context, caller, read(body)?, false).await?),
        Method::ListMembers => answer(&list_members(context, caller, read(body)?).await?),
        Method::ListConversations => answer(&list_conversations(context, caller, read(body)?).await?),
        Method::MyDevices => {
            read::<()>(body)?;
            answer(&my_devices(context, caller).await?)
        }
        Method::Names => answer(&names(context, caller, &read(body)?)),
    }
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    decode(body).ok_or_else(|| RefusalCode::BadRequest.into())
}

fn answer(body: &impl Serialize) -> Result<Bytes, Refusal> {
    encode(body).ok_or_else(|| RefusalCode::TooLarge.into())
}

fn unreadable(error: &ReadError) -> Refusal {
    warn!(%error, "reading the log failed");
    Refusal::new(refusal_code(error))
}

async fn users(
    context: &Context,
    caller: &Caller,
    names: Vec<String>,
) -> Result<Vec<(UserId, String)>, Refusal> {
    if names.len() > PAGE_MAX {
        return Err(RefusalCode::TooLarge.into());
    }
    // All at once: those who have no number yet get them in one commit, not in one each.
    try_join_all(names.into_iter().map(async |name| Ok((user(context, caller.app, &name).await?, name))))
        .await
}

async fn follow(context: &Context, links: Vec<PendingLink>) {
    // What can't follow now follows by the repair at the next start.
    let _ = join_all(links.into_iter().map(|link| carry_link(&context.shards, context.route, link))).await;
}

async fn create_group(
    context: &Context,
    caller: &Caller,
    request: CreateGroup,
) -> Result<GroupCreated, Refusal> {
    check_name(&request.name)?;
    let members = users(context, caller, request.members).await?;
    let shard = context.named(caller.app, Named::Group, &request.name)?;
    let owner = (caller.producer.user, caller.name.to_string());
    let request = GroupRequest { app: caller.app, name: request.name, owner, members };
    let (conversation, links) = shard.ask(|answer| Command::Group(request, answer)).await?;
    follow(context, links).await;
    Ok(GroupCreated { conversation })
}

async fn change_members(
    context: &Context,
    caller: &Caller,
    request: ChangeMembers,
    adding: bool,
) -> Result<MembersChanged, Refusal> {
    let members = users(context, caller, request.members).await?;
    let (add, remove) = if adding { (members, Vec::new()) } else { (Vec::new(), members) };
    let shard = context.conversation(request.conversation)?;
    let by = caller.producer.user;
    let request = MembersRequest { app: caller.app, conversation: request.conversation, by, add, remove };
    let (changed, seq, links) = shard.ask(|answer| Command::Members(request, answer)).await?;
    follow(context, links).await;
    Ok(MembersChanged { changed, seq })
}

/// Reads on a thread that may block.
async fn blocking<T: Send + 'static>(
    read: impl FnOnce() -> Result<T, ReadError> + Send + 'static,
) -> Result<T, Refusal> {
    match ground::blocking(read).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(unreadable(&error)),
        Err(_) => Err(RefusalCode::StorageUnavailable.into()),
    }
}

async fn list_members(
    context: &Context,
    caller: &Caller,
    request: ListMembers,
) -> Result<MemberPage, Refusal> {
    let conversation = request.conversation;
    if context.broadcasts.has(caller.app, conversation) {
        // Everybody of the app reads it, and nobody is a member.
        return Err(RefusalCode::NotAllowed.into());
    }
    let reader = context.conversation(conversation)?.reader.clone();
    let (app, me) = (caller.app, caller.producer.user);
    let after = (request.after != UserId::default()).then_some(request.after);
    let found = blocking(move || {
        let meta = reader.meta(conversation)?;
        if meta.is_none_or(|meta| meta.app != app) || reader.member(conversation, me)?.is_none() {
            return Ok(None);
        }
        let total = reader.head(conversation)?.map_or(0, |head| head.members);
        Ok(Some((reader.members(conversation, after, PAGE_MAX + 1)?, total)))
    });
    let (page, total) = found.await?.ok_or(RefusalCode::UnknownConversation)?;
    let mut bytes = 0;
    let mut members: Vec<MemberEntry> = Vec::new();
    let more = page.len() > PAGE_MAX;
    let mut cut = false;
    for (user, member) in page.into_iter().take(PAGE_MAX) {
        let name = name_of(context, app, user).unwrap_or_default();
        bytes += name.len() + 32;
        if bytes > PAGE_BYTES_MAX {
            cut = true;
            break;
        }
        let role = match member.role {
            fulmar_store::Role::Member => Role::Member,
            fulmar_store::Role::Admin => Role::Admin,
            fulmar_store::Role::Owner => Role::Owner,
        };
        members.push(MemberEntry { user, name, role, joined: member.joined, online: false });
    }
    let online = online(context, members.iter().map(|member| member.user).collect()).await?;
    for member in &mut members {
        member.online = online.get(&member.user).copied().unwrap_or(false);
    }
    Ok(MemberPage { members, total, more: more || cut })
}

/// Which users are here. Every shard knows all sessions, so any one can tell.
async fn online(context: &Context, users: Vec<UserId>) -> Result<HashMap<UserId, bool>, Refusal> {
    let Some(shard) = context.shards.first() else { return Ok(HashMap::new()) };
    let here = shard.tell(|answer| Command::Online(users.clone(), answer)).await?;
    Ok(users.into_iter().zip(here).collect())
}

async fn list_conversations(
    context: &Context,
    caller: &Caller,
    request: ListConversations,
) -> Result<ConversationPage, Refusal> {
    let me = caller.producer.user;
    let reader = context.user(me)?.reader.clone();
    let after = (request.after != ConversationId::default()).then_some(request.after);
    let listed = blocking(move || reader.user_conversations(me, after, PAGE_MAX + 1)).await?;
    let mut listed: Vec<ConversationId> = listed.into_iter().map(|(conversation, _)| conversation).collect();
    // What everybody reads is on nobody's list.
    let broadcasts = context.broadcasts.of(caller.app).iter().copied();
    listed.extend(broadcasts.filter(|conversation| after.is_none_or(|after| *conversation > after)));
    listed.sort_unstable();
    let more = listed.len() > PAGE_MAX;
    let mut page = ConversationPage { conversations: Vec::new(), more };
    let mut bytes = 0;
    for conversation in listed.into_iter().take(PAGE_MAX) {
        let shard = context.conversation(conversation)?;
        let app = caller.app;
        let producer = caller.producer;
        // Asks the shard, which knows read cursors that are not written down yet.
        let found = match shard.ask(|answer| Command::Find { app, conversation, producer, answer }).await {
            Ok(found) => found,
            // The list follows the conversation: the user has left it a moment ago.
            Err(refusal) if refusal.code == RefusalCode::UnknownConversation => continue,
            Err(refusal) => return Err(refusal),
        };
        let (reader, head) = (shard.reader.clone(), found.head);
        let mark = found.read.max(found.member.joined.prev());
        let unread = blocking(move || unread(&reader, conversation, me, &head, mark)).await?;
        let peer =
            direct_peer(&found.meta.name, me).filter(|_| found.meta.class == ConversationClass::Direct);
        let name = match peer {
            Some(peer) => name_of(context, app, peer).unwrap_or_default(),
            None => found.meta.name.clone(),
        };
        bytes += name.len() + 64;
        if bytes > PAGE_BYTES_MAX {
            page.more = true;
            break;
        }
        page.conversations.push(ConversationEntry {
            conversation,
            class: record::class(found.meta.class),
            name,
            peer: peer.unwrap_or_default(),
            head: found.head.seq,
            low: catchup::low(&found.head, &found.member),
            read: found.read.max(Seq::ZERO),
            unread,
            time: found.head.time,
        });
    }
    Ok(page)
}

async fn my_devices(context: &Context, caller: &Caller) -> Result<Devices, Refusal> {
    let me = caller.producer.user;
    let shard = context.user(me)?;
    let reader = shard.reader.clone();
    let rows = blocking(move || reader.devices(me, None, 10_000)).await?;
    let here = shard.tell(|answer| Command::DevicesHere(me, answer)).await?;
    let devices = rows
        .into_iter()
        .map(|(device, row)| DeviceEntry {
            device,
            class: row.class,
            last_seen: row.seen,
            online: here.contains(&device),
            this: device == caller.producer.device,
        })
        .rev()
        .take(PAGE_MAX)
        .collect();
    Ok(Devices { devices })
}

fn names(context: &Context, caller: &Caller, request: &Names) -> NamesFound {
    let named = |user: &UserId| Some((*user, name_of(context, caller.app, *user)?));
    let mut bytes = 0;
    let fits = |(_, name): &(UserId, String)| {
        bytes += name.len() + 16;
        bytes <= PAGE_BYTES_MAX
    };
    NamesFound { names: request.users.iter().take(PAGE_MAX).filter_map(named).take_while(fits).collect() }
}
