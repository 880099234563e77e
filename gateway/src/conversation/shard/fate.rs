//! What becomes of a batch, and of everybody who had a part in it.
//!
//! - On disk: its effects run in their order. Void: writers are refused, questions are asked again, and what memory knew of the
//!   conversations it touched is forgotten.
//!
//! Not here: who may write while the disk fails ([`crate::conversation::storage`]).

use fulmar_protocol::{
    close::RefusalCode,
    frame,
    id::{ConversationId, UserId},
};
use fulmar_store::{CommitError, Op, ReadError};
use tracing::{error, info};

use super::{CommitLog, DAMAGED_WAIT_MS, Done, InFlight, Shard};
use crate::{
    conversation::{
        command::{Command, Refusal},
        commit::{Batch, Effect, conversation_of, send_refused},
        storage::Failure,
    },
    fanout::owed::Settled,
    ground::now,
};

impl Shard {
    pub(super) fn commit<W: CommitLog>(&mut self, mut writer: W, batch: Batch) -> InFlight<W> {
        if !batch.ops.is_empty() {
            self.storage.began();
        }
        let started = now();
        let records = batch.ops.iter().filter(|op| matches!(op, Op::Append { .. })).count();
        let metrics = self.metrics.clone();
        Box::pin(async move {
            if batch.ops.is_empty() {
                return Done { writer, batch, took: None, result: Ok(()) };
            }
            let result = writer.commit(&batch.ops).await;
            let took = now().saturating_duration_since(started);
            if result.is_ok() {
                metrics.commits.inc();
                metrics.commit_records.observe(records as f64);
                metrics.commit_duration.observe(took.as_secs_f64());
            } else {
                metrics.commits_failed.inc();
            }
            Done { writer, batch, took: Some(took), result }
        })
    }

    /// Carries out what follows from a batch's fate; returns what is to be committed in its place, if anything is.
    pub(super) fn committed(&mut self, batch: Batch, result: Result<(), CommitError>) -> Option<Batch> {
        match result {
            Ok(()) => {
                if !batch.ops.is_empty()
                    && let Some(after) = self.storage.committed(now())
                {
                    info!(shard = %self.id, ?after, "the log can be written again");
                    self.metrics.storage_writable(self.id, true);
                    self.fault.send_replace(None);
                }
                self.directory.batch_committed();
                for op in &batch.ops {
                    if let Op::Recv { user, device, conversation, seq } = op {
                        self.cursors.committed(*user, *device, *conversation, *seq);
                    }
                }
                for effect in batch.effects {
                    self.carry_out(effect);
                }
                None
            }
            Err(CommitError::Read(ReadError::Damaged { conversation: Some(conversation), .. }))
                if batch.ops.iter().any(|op| conversation_of(op) == Some(conversation)) =>
            {
                self.without(conversation, batch)
            }
            Err(error) => {
                self.failed(batch, &error);
                None
            }
        }
    }

    /// A batch could not be committed because a conversation is damaged: refuses everything about that one, and returns
    /// the rest.
    pub(super) fn without(&mut self, conversation: ConversationId, mut batch: Batch) -> Option<Batch> {
        self.tell_damaged(conversation, "writing to it");
        // If it was a trial, it says nothing about the disk.
        let _ = self.storage.failed(Failure::Batch, now());
        let out = batch.take_out(conversation);
        let since = self.batch.take_out(conversation);
        self.directory.forget(conversation);
        self.unload(conversation);
        let refusal = Refusal { code: RefusalCode::StorageUnavailable, retry_after_ms: DAMAGED_WAIT_MS };
        let questions: Vec<Command> =
            out.into_iter().chain(since).filter_map(|effect| self.refuse(effect, refusal)).collect();
        for question in questions {
            self.handle(question);
        }
        if batch.is_empty() {
            self.directory.batch_committed();
            return None;
        }
        Some(batch)
    }

    /// A batch is void, and with it everything decided since.
    pub(super) fn failed(&mut self, batch: Batch, error: &CommitError) {
        let failure = Failure::of(error);
        if self.storage.failed(failure, now()) {
            match failure {
                Failure::Storage(_) => {
                    error!(shard = %self.id, %error, "the log can't be written: writes are refused until it can, reads go on");
                    self.metrics.storage_writable(self.id, false);
                    self.fault.send_replace(Some(error.to_string()));
                }
                Failure::Batch => {
                    error!(shard = %self.id, %error, "a batch was refused by the log, and so are its askers")
                }
            }
        }
        self.directory.batch_failed();
        let since = std::mem::take(&mut self.batch);
        for op in batch.ops.into_iter().chain(since.ops) {
            match op {
                // Cursors only move forward: they wait for another commit.
                Op::Recv { user, device, conversation, .. } => {
                    self.cursors.void(user, device, conversation);
                    self.cursors_since.get_or_insert_with(now);
                }
                Op::Read { conversation, user, seq } => self.wait_read(conversation, user, seq),
                // The row stays, and is repaired when the log can be written again.
                Op::LinkDone { .. } => {}
                op => {
                    if let Some(conversation) = conversation_of(&op) {
                        self.unload(conversation);
                    }
                }
            }
        }
        let refusal = Refusal::new(failure.code());
        let questions: Vec<Command> = batch
            .effects
            .into_iter()
            .chain(since.effects)
            .filter_map(|effect| self.refuse(effect, refusal))
            .collect();
        for question in questions {
            self.handle(question);
        }
    }

    /// Refuses what was to follow a commit; a question comes back, to be asked again.
    pub(super) fn refuse(&self, effect: Effect, refusal: Refusal) -> Option<Command> {
        match effect {
            Effect::Settle(session, settled) => {
                // What was to be refused for good is refused for now: that its number is used up is not on disk.
                let (conversation, pseq) = match settled {
                    Settled::Acked { conversation, pseq, .. }
                    | Settled::Before { conversation, up_to: pseq, .. }
                    | Settled::Refused(frame::SendRefused { conversation, pseq, .. }) => (conversation, pseq),
                };
                self.metrics.storage_refused(refusal.code.name());
                session.settle(Settled::Refused(send_refused(conversation, pseq, refusal, pseq)));
                None
            }
            Effect::Answer { give, .. } => {
                let question = give(Err(refusal));
                if question.is_none() {
                    self.metrics.storage_refused(refusal.code.name());
                }
                question
            }
            Effect::Publish { .. } | Effect::Trimmed { .. } => None,
        }
    }

    /// Whether something may be decided that has to be written.
    pub(super) fn writable(&self) -> Result<(), Refusal> {
        let admitted = self.storage.admits(self.batch.ops.is_empty(), now());
        admitted.inspect_err(|refusal| self.metrics.storage_refused(refusal.code.name()))
    }

    /// Finds out whether the log can be written again when nobody asks for it.
    pub(super) fn probe(&mut self) {
        if !self.storage.wants_probe(now()) || !self.batch.ops.is_empty() {
            return;
        }
        if let Some(conversation) = self.id.number(0).and_then(ConversationId::new) {
            // Nothing is owed to the user without a number by the conversation without one: a commit that changes nothing.
            self.batch.push(Op::LinkDone { conversation, user: UserId::default() });
        }
    }
}
