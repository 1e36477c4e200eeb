//! Every bound of the transport, why it has its value and what memory it can cost.
//!
//! What one authenticated peer can make this node hold, in the worst case and on one connection:
//! the connection's receive window plus [`REQUEST_BYTES`] of assembled requests, as much of
//! answers, and the send window. What strangers can make it hold: [`MAX_HANDSHAKES`] handshakes
//! with [`UNPROVEN_WINDOW_BYTES`] each, [`MAX_UNPROVEN_PER_ADDRESS`] joiners for each address, and
//! [`INCOMING_BUFFER_TOTAL_BYTES`].
//!
//! Values that a test or an operator may want otherwise are fields of [`Limits`]; the others are
//! constants.

use std::time::Duration;

/// Largest frame of a control call. A raft append of a whole batch fits; anything larger belongs
/// on the bulk path.
pub const FRAME_BYTES: usize = 4 << 20;
/// Bytes of requests that one connection may have assembled or under way in handlers. Memory: this
/// much for each live control connection.
pub const REQUEST_BYTES: usize = 32 << 20;
/// Largest frame of a stranger's join call: a signature, a few addresses and a version fit.
pub const JOIN_FRAME_BYTES: usize = 4 << 10;
/// Largest hello: two numbers, a version text and room for what later versions add.
pub const HELLO_FRAME_BYTES: usize = 4 << 10;
/// Largest answer to a stranger's join call: the member list of 40 nodes, with room to spare.
pub const JOIN_ANSWER_BYTES: usize = 64 << 10;
/// Largest header of a byte stream: an HTTP request's head fits. Counts against
/// [`REQUEST_BYTES`] until the stream is accepted or refused.
pub const STREAM_HEADER_BYTES: usize = 64 << 10;
/// Largest answer to the opening of a byte stream: a status and a reason.
pub const STREAM_ANSWER_BYTES: usize = 4 << 10;
/// Longest text that explains a refused call. Longer reasons are cut.
pub const REASON_BYTES: usize = 512;

/// Calls of one peer that may run at the same time on a control connection. The notes measured
/// with this value; a task and its stream cost about 2 KiB, so 2 MiB per connection.
pub const CONTROL_STREAMS: u32 = 1024;
/// Streams of one peer on a bulk connection. Each guest connection that the peer relays here is one
/// of them, and a node full of guests with a busy preview has thousands. A task, its handler and
/// QUIC's state cost about 8 KiB a stream, so 32 MiB per connection; unread bytes are bounded for
/// all of them together by [`BULK_WINDOW_BYTES`].
pub const BULK_STREAMS: u32 = 4096;
/// Unread bytes of one control stream: a large frame needs a few round trips, not one per packet.
pub const CONTROL_STREAM_WINDOW_BYTES: u32 = 1 << 20;
/// Unread bytes of one control connection. Memory: this much per connection.
pub const CONTROL_WINDOW_BYTES: u32 = 16 << 20;
/// Unread bytes of one bulk stream: 1 GB/s over 1 ms, 10 MB/s over 100 ms; whoever needs more over
/// a long path opens several. Small against [`BULK_WINDOW_BYTES`], because a relayed client that
/// stops reading keeps this much of it until it is given up ([`Limits::stream_stall`]).
pub const BULK_STREAM_WINDOW_BYTES: u32 = 1 << 20;
/// Unread bytes of one bulk connection; quinn's default has no bound. Memory: this much per
/// connection. So many stopped readers at once hold up the connection's other streams.
pub const BULK_WINDOW_BYTES: u32 = 256 << 20;
const _: () = assert!(BULK_WINDOW_BYTES / BULK_STREAM_WINDOW_BYTES >= 256);
/// Bytes written to one bulk connection and not acknowledged yet: what a full 10 Gbit/s link has
/// under way in 50 ms. Memory: this much per connection.
pub const BULK_SEND_WINDOW_BYTES: u64 = 64 << 20;
/// Streams of a connection that has not said hello: the hello, and one more whose opening tells a
/// stranger that it may make one call only.
pub const UNPROVEN_STREAMS: u32 = 2;
/// Unread bytes of a connection that has not said hello. Memory: this much for each of them.
pub const UNPROVEN_WINDOW_BYTES: u32 = 64 << 10;
/// Unread datagrams of one control connection; the oldest are dropped first. A load report has 120
/// bytes, so this holds minutes of them.
pub const DATAGRAM_BUFFER_BYTES: usize = 64 << 10;
/// Datagrams a second that one connection is heard with; the rest are dropped. A node sends one.
pub const DATAGRAM_RATE: u64 = 100;
/// The same at once, after a silence.
pub const DATAGRAM_BURST: u64 = 200;
/// Packets of the bulk lane for which one confirmation is enough: a page of memory is six to
/// twenty-four of them, and whoever waits for it has it before the confirmation is made.
pub const BULK_ACK_EVERY: u32 = 8;
/// Longest a confirmation is put off for that. A lost last packet is noticed so much later.
pub const BULK_ACK_DELAY: Duration = Duration::from_millis(2);
/// Kernel buffer of each socket, each way. With the kernel's default, bulk lost 3,000 to 10,000
/// packets per GB; with this none.
pub const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// Silence after which a control connection is dead. Two lost keep-alives are survived.
pub const CONTROL_IDLE: Duration = Duration::from_secs(5);
/// How often the dialling side of a quiet control connection says that it is alive.
pub const CONTROL_KEEP_ALIVE: Duration = Duration::from_secs(1);
/// Silence after which a bulk connection is dead. A request that is relayed to a dead peer hangs as
/// long, unless a control connection to it was lost before: then all is closed at once.
pub const BULK_IDLE: Duration = Duration::from_secs(10);
/// How often the dialling side of a quiet bulk connection says that it is alive: a relayed terminal
/// may be silent for hours. A packet each way, so an unused connection may as well stay.
pub const BULK_KEEP_ALIVE: Duration = Duration::from_secs(3);
const _: () = assert!(BULK_KEEP_ALIVE.as_millis() * 3 <= BULK_IDLE.as_millis());
const _: () = assert!(CONTROL_KEEP_ALIVE.as_millis() * 3 < CONTROL_IDLE.as_millis());

/// Handshakes that may be under way at both endpoints together. Each costs about 40 KiB until it is
/// decided, so 5 MiB; the rest are refused at once.
pub const MAX_HANDSHAKES: usize = 128;
/// Connections of one address that have not said hello yet; more are refused before their
/// handshake, so that no single address can take all of [`MAX_HANDSHAKES`].
pub const MAX_ARRIVING_PER_ADDRESS: usize = 64;
/// The same for connections that turn out to be a stranger's. Lower, so that strangers behind the
/// address of a member leave it room.
pub const MAX_UNPROVEN_PER_ADDRESS: usize = 32;
const _: () = assert!(MAX_UNPROVEN_PER_ADDRESS < MAX_ARRIVING_PER_ADDRESS);
const _: () = assert!(MAX_ARRIVING_PER_ADDRESS < MAX_HANDSHAKES);
/// Connections of unknown keys held while known peers are asked about them. Each costs one call to a
/// peer and [`UNPROVEN_WINDOW_BYTES`]; more are refused.
pub const MAX_VOUCHING: usize = 16;
const _: () = assert!(MAX_VOUCHING < MAX_HANDSHAKES);
/// First packets waiting for the accept loop at one endpoint.
pub const MAX_INCOMING: usize = 256;
/// Bytes buffered for one connection attempt that is not accepted yet.
pub const INCOMING_BUFFER_BYTES: u64 = 16 << 10;
/// The same for all attempts together.
pub const INCOMING_BUFFER_TOTAL_BYTES: u64 = 1 << 20;
/// Live connections between two nodes on one lane. Both may dial at the same instant, and a peer
/// that restarted leaves a corpse until its next hello; past this the oldest is closed.
pub const MAX_CONNECTIONS_PER_LANE: usize = 4;

/// Longest deadline a caller may ask for. A peer that never answers holds a stream this long.
pub const MAX_CALL: Duration = Duration::from_secs(60);

/// The bounds that may differ between nodes: [`Limits::default`] is what production uses.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Largest control frame accepted or sent, see [`FRAME_BYTES`].
    pub frame_bytes: usize,
    /// Bytes of requests one connection may hold, see [`REQUEST_BYTES`]; at least `frame_bytes`.
    pub request_bytes: usize,
    /// From the first packet of a connection to its answered hello. Covers three round trips at
    /// 500 ms and a busy machine.
    pub handshake: Duration,
    /// From the opening of a stream to the end of its request: a whole frame at 1 MB/s fits.
    pub request_read: Duration,
    /// From the answer's first byte to its last being taken over by the transport.
    pub reply_write: Duration,
    /// How long the peer may take nothing of a byte stream that has bytes for it. A reader that is
    /// merely slow is waited for: its next window opens within this time above 150 bytes a second.
    /// One that never reads would otherwise hold the stream's buffers for ever.
    pub stream_stall: Duration,
    /// All of a stranger's join call, handler included.
    pub join: Duration,
    /// After a failed dial, how long the same one is not tried again but fails at once: a caller in
    /// a loop must not keep both ends busy with handshakes.
    pub redial: Duration,
    /// How long a key that a peer vouched for is let in before the voucher is asked again. A node
    /// that is behind has its member list up to date long before.
    pub vouched: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            frame_bytes: FRAME_BYTES,
            request_bytes: REQUEST_BYTES,
            handshake: Duration::from_secs(5),
            request_read: Duration::from_secs(10),
            reply_write: Duration::from_secs(10),
            stream_stall: Duration::from_secs(15 * 60),
            join: Duration::from_secs(5),
            redial: Duration::from_millis(200),
            vouched: Duration::from_secs(60),
        }
    }
}

const _: () = assert!(FRAME_BYTES <= REQUEST_BYTES);
const _: () = assert!(JOIN_FRAME_BYTES <= FRAME_BYTES);
const _: () = assert!(STREAM_HEADER_BYTES <= FRAME_BYTES);
const _: () = assert!(REASON_BYTES < STREAM_ANSWER_BYTES);
