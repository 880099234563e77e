//! CALL and REPLY: requests to services. Service 0 is built in (`crate::service`).

use bytes::{BufMut, Bytes, BytesMut};

use super::{Body, Fields, put_varint, varint_len};
use crate::{
    close::RefusalCode,
    error::DecodeError,
    id::{RequestId, ServiceId},
    limit::CALL_BODY_BYTES_MAX,
};

/// A request to a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Whom.
    pub service: ServiceId,
    /// What, numbered by the service.
    pub method: u32,
    /// Correlates the REPLY, from 1.
    pub id: RequestId,
    /// Milliseconds the caller waits; 0 leaves it to the gateway.
    pub deadline_ms: u32,
    /// The request's bytes, known to the service.
    pub body: Bytes,
}

impl Body for Call {
    fn decode(fields: &mut Fields<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            service: fields.id("service")?,
            method: fields.u32("method")?,
            id: fields.id("id")?,
            deadline_ms: fields.u32("deadline")?,
            body: fields.rest("body", CALL_BODY_BYTES_MAX)?,
        })
    }

    fn len(&self) -> usize {
        varint_len(self.service.get())
            + varint_len(self.method.into())
            + varint_len(self.id.get())
            + varint_len(self.deadline_ms.into())
            + self.body.len()
    }

    fn encode(&self, out: &mut BytesMut) {
        put_varint(out, self.service.get());
        put_varint(out, self.method.into());
        put_varint(out, self.id.get());
        put_varint(out, self.deadline_ms.into());
        out.put_slice(&self.body);
    }
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallStatus {
    /// The body is the result.
    Ok,
    /// Refused; the body is a text for people.
    Refused(RefusalCode),
}

/// The answer to a CALL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The call's number.
    pub id: RequestId,
    /// How it ended.
    pub status: CallStatus,
    /// The result's bytes, or a text.
    pub body: Bytes,
}

impl Body for Reply {
    fn decode(fields: &mut Fields<'_>) -> Result<Self, DecodeError> {
        let id = fields.id("id")?;
        let status = match fields.u32("status")? {
            0 => CallStatus::Ok,
            code => CallStatus::Refused(RefusalCode::from_code(code)),
        };
        Ok(Self { id, status, body: fields.rest("body", CALL_BODY_BYTES_MAX)? })
    }

    fn len(&self) -> usize {
        varint_len(self.id.get()) + varint_len(self.status_number()) + self.body.len()
    }

    fn encode(&self, out: &mut BytesMut) {
        put_varint(out, self.id.get());
        put_varint(out, self.status_number());
        out.put_slice(&self.body);
    }
}

impl Reply {
    fn status_number(&self) -> u64 {
        match self.status {
            CallStatus::Ok => 0,
            CallStatus::Refused(code) => code.code().into(),
        }
    }
}
