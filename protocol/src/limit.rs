//! Every bound on the wire, in one place, with the relations between them proven at compile time.
//!
//! A peer may negotiate a limit down (WELCOME carries the gateway's), never up.

use core::time::Duration;

/// Largest QUIC variable-length integer (RFC 9000 section 16): 2^62 - 1.
pub const VARINT_MAX: u64 = (1 << 62) - 1;

/// Shards a cluster can ever have. Part of every user and conversation number, so it can't change.
pub const SHARDS_MAX: u64 = 256;

/// Bytes of a HELLO frame, its changed cursors included.
pub const HELLO_BYTES_MAX: usize = 4 * 1024;

/// Bytes of any other frame on the control stream.
pub const CONTROL_FRAME_BYTES_MAX: usize = 4 * 1024;

/// Payload bytes of one SEND and so of one record. A larger body travels as several, chained by the `more` flag.
pub const SEND_PAYLOAD_BYTES_MAX: usize = 16 * 1024;

/// Bytes of fields before a SEND's or DELIVER's payload (every number at its widest).
pub const SEND_HEADER_BYTES_MAX: usize = 96;

/// Bytes of a frame on the uplink (U0).
pub const UPLINK_FRAME_BYTES_MAX: usize = SEND_PAYLOAD_BYTES_MAX + SEND_HEADER_BYTES_MAX;

/// Bytes of a frame on a lane.
pub const LANE_FRAME_BYTES_MAX: usize = SEND_PAYLOAD_BYTES_MAX + SEND_HEADER_BYTES_MAX;

/// Bytes of one BLOCK on the backlog stream.
pub const BLOCK_BYTES_MAX: usize = 64 * 1024;

/// Records in one BLOCK.
pub const BLOCK_RECORDS_MAX: usize = 512;

/// Bytes of a whole message body, chained over several SENDs.
pub const BODY_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Payload bytes of an EVENT; with its header it fits a datagram on any path QUIC runs on (1200-byte packets).
pub const EVENT_PAYLOAD_BYTES_MAX: usize = 1_000;

/// Bytes of padding a PING may carry.
pub const PING_PADDING_BYTES_MAX: usize = 1_000;

/// Bytes of a datagram frame.
pub const DATAGRAM_BYTES_MAX: usize = 1_150;

/// SENDs of one conversation that may be unacknowledged.
pub const INFLIGHT_PER_CONVERSATION_MAX: usize = 64;

/// SENDs of one producer that may be unacknowledged.
pub const INFLIGHT_PER_PRODUCER_MAX: usize = 256;

/// (pseq, seq) pairs a lane of sending remembers for repeated sends.
pub const LANE_ACKS_REMEMBERED: usize = INFLIGHT_PER_CONVERSATION_MAX;

/// Sends a lane keeps while one before them is missing.
pub const LANE_PARKED_MAX: usize = 16;

/// Sends a client's session half keeps; the rest waits in the SDK's database.
pub const OUTBOX_SENDS_MAX: usize = 1_024;

/// Payload bytes of those sends from which it takes no more.
pub const OUTBOX_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Requests a client's session half keeps unanswered.
pub const REQUESTS_MAX: usize = 256;

/// Read cursors a client's session half keeps to be sent again.
pub const MARKS_MAX: usize = 256;

/// Downlink lanes a connection may have.
pub const LANES_MAX: u8 = 16;

/// Downlink lanes unless configured otherwise; more gained nothing when measured at 20 messages/s and 5 % loss.
pub const LANES_DEFAULT: u8 = 4;

/// Entries of one CURSORS, ACK, HEAD, RECEIPT or SEND_ACK frame.
pub const ENTRIES_PER_FRAME_MAX: usize = 256;

/// Bytes of an auth token (a JWT).
pub const TOKEN_BYTES_MAX: usize = 2 * 1024;

/// Bytes of a session ticket.
pub const TICKET_BYTES_MAX: usize = 256;

/// Bytes of a user's, app's or conversation's name.
pub const NAME_BYTES_MAX: usize = 128;

/// Bytes of the text of an ERROR, GOAWAY or KICKED; it is for people, never parsed.
pub const TEXT_BYTES_MAX: usize = 512;

/// Bytes of a CALL's or REPLY's body.
pub const CALL_BODY_BYTES_MAX: usize = CONTROL_FRAME_BYTES_MAX - 64;

/// Calls of one connection that may be unanswered.
pub const CALLS_INFLIGHT_MAX: usize = 32;

/// Other addresses a WELCOME or GOAWAY may name.
pub const ADDRESSES_MAX: usize = 8;

/// Bytes of TLVs a cold frame may carry.
pub const TLV_BYTES_MAX: usize = 1_024;

/// Records of one conversation a client keeps that arrived before their predecessors.
pub const REORDER_RECORDS_MAX: usize = 256;

/// Bytes of all records a client keeps that arrived before their predecessors.
pub const REORDER_BYTES_MAX: usize = 1024 * 1024;

/// SENDs a client may have unacknowledged before it has seen the WELCOME, and so what a gateway always tolerates,
/// however low its own limits are.
pub const FIRST_FLIGHT_SENDS_MAX: usize = 32;

/// Frames a client may send after its HELLO before it has seen the WELCOME. A gateway holds them until the client is
/// authenticated.
pub const FIRST_FLIGHT_FRAMES_MAX: usize = 64;

/// Bytes of those frames. What a stranger can make a gateway hold is this and one frame.
pub const FIRST_FLIGHT_BYTES_MAX: usize = 48 * 1024;

/// PULLs of one connection that may be unanswered.
pub const PULLS_INFLIGHT_MAX: usize = 8;

/// Delivered records after which an ACK leaves without waiting for the timer.
pub const ACK_EVERY: usize = 16;

/// From one ACK of a client to its next, while records keep coming.
pub const ACK_DELAY: Duration = Duration::from_millis(100);

/// The same while they come so densely that the last ACK was for more than one arrival: what is lost there shows by what follows,
/// and an ACK each [`ACK_DELAY`] would be a packet for every other record.
pub const ACK_DELAY_DENSE: Duration = Duration::from_millis(400);

const _: () = {
    assert!(TOKEN_BYTES_MAX + 16 * 100 <= HELLO_BYTES_MAX, "a token and a hundred cursors fit a HELLO");
    assert!(EVENT_PAYLOAD_BYTES_MAX + 64 <= DATAGRAM_BYTES_MAX, "an event fits a datagram");
    assert!(
        BLOCK_BYTES_MAX >= 2 * LANE_FRAME_BYTES_MAX,
        "a block holds at least one record of the largest size"
    );
    assert!(
        BODY_BYTES_MAX.is_multiple_of(SEND_PAYLOAD_BYTES_MAX),
        "the largest body is a whole number of sends"
    );
    assert!(FIRST_FLIGHT_BYTES_MAX > UPLINK_FRAME_BYTES_MAX, "the largest send fits the first flight");
    assert!(FIRST_FLIGHT_SENDS_MAX < FIRST_FLIGHT_FRAMES_MAX, "sends leave room for requests");
    assert!(LANE_PARKED_MAX <= INFLIGHT_PER_CONVERSATION_MAX, "no more can be parked than can be in flight");
    assert!(
        INFLIGHT_PER_CONVERSATION_MAX <= INFLIGHT_PER_PRODUCER_MAX,
        "one conversation fits the producer's window"
    );
    assert!(
        ENTRIES_PER_FRAME_MAX * 16 <= CONTROL_FRAME_BYTES_MAX,
        "a full frame of pairs fits the control stream"
    );
    assert!(TEXT_BYTES_MAX + NAME_BYTES_MAX * ADDRESSES_MAX <= CONTROL_FRAME_BYTES_MAX, "a GOAWAY fits");
};
