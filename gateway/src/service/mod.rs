//! Calls of clients. Service 0 is built in: groups, members, the conversation list, devices, names.
//!
//! - A call is checked, routed to the shards it concerns, and answered once; what it promised is on disk by then.
//!
//! Not here: what a change of members does to a conversation (`conversation::state`).

mod builtin;

use std::sync::Arc;

use bytes::Bytes;
use fulmar_protocol::{
    close::RefusalCode,
    frame::{Call, CallStatus, Reply},
    id::{AppId, Producer, UserId},
    service::{BUILTIN, Method},
};

use crate::{
    config::is_name,
    context::Context,
    conversation::{Command, Refusal, route::Named},
};

/// Who calls.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The caller's app; everything a call touches is in it.
    pub app: AppId,
    /// The user's name.
    pub name: Arc<str>,
    /// The user and device.
    pub producer: Producer,
}

/// Carries a call out.
pub async fn call(context: &Context, caller: &Caller, call: Call) -> Reply {
    let id = call.id;
    let result = match Method::from_number(call.method) {
        Some(method) if call.service == BUILTIN => builtin::call(context, caller, method, &call.body).await,
        _ => Err(RefusalCode::UnknownService.into()),
    };
    context.metrics.calls.inc();
    match result {
        Ok(body) => Reply { id, status: CallStatus::Ok, body },
        Err(refusal) => {
            context.metrics.call_refused(refusal.code.name());
            let body = Bytes::from_static(refusal.code.text().as_bytes());
            Reply { id, status: CallStatus::Refused(refusal.code), body }
        }
    }
}

/// Whether a name may be one.
///
/// # Errors
/// [`RefusalCode::BadName`].
pub fn check_name(name: &str) -> Result<(), Refusal> {
    if is_name(name) { Ok(()) } else { Err(RefusalCode::BadName.into()) }
}

/// The number of the user called `name`; one that was never heard of gets one, where the app takes new users.
///
/// # Errors
/// [`RefusalCode::UnknownUser`], or the shard's.
pub async fn user(context: &Context, app: AppId, name: &str) -> Result<UserId, Refusal> {
    check_name(name)?;
    let create = context.takes_new_users(app);
    let shard = context.named(app, Named::User, name)?;
    let name = name.to_owned();
    shard.ask(|answer| Command::User { app, name, create, answer }).await
}

/// The name of a user of `app`.
#[must_use]
pub fn name_of(context: &Context, app: AppId, user: UserId) -> Option<String> {
    let row = context.user(user).ok()?.reader.user(user).ok()??;
    (row.app == app).then_some(row.name)
}
