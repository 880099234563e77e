//! Who may name whom. This table is the whole policy; the rest of the check only reads files.
//!
//! - A path is forbidden together with everything below it: `crate::connection` covers `crate::connection::Driver`.
//! - `*::Instant::now` is forbidden wherever the two names stand at the end, whatever stands before them.
//! - Every file and folder a rule speaks of must be there: a rule about nothing would hold for ever.
//!
//! Not here: how a file is read (`source`), how a manifest is read (`manifest`). Test code is free: tests, the
//! simulator and benches may name everybody.

/// What the code below some folders, or in some files, may not name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SourceRule {
    /// Folders (they end with `/`) and files, from the root of the workspace.
    pub(crate) within: &'static [&'static str],
    /// Forbidden paths; several lists, so that rules can share one.
    pub(crate) forbids: &'static [&'static [&'static str]],
    /// Paths that are allowed although a forbidden one covers them.
    pub(crate) but: &'static [&'static str],
    /// The rule in words, as a person who broke it reads it.
    pub(crate) because: &'static str,
}

/// What a crate may not depend on. Dev-dependencies are free.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CrateRule {
    /// Folder of the crate, from the root of the workspace.
    pub(crate) folder: &'static str,
    /// Packages it may not name under `[dependencies]` or `[build-dependencies]`, for any target.
    pub(crate) forbids: &'static [&'static [&'static str]],
    /// The rule in words.
    pub(crate) because: &'static str,
}

/// Crates that bring a runtime, a socket, a disk or dice.
const WORLD_CRATES: &[&str] = &[
    "tokio",
    "quinn",
    "quinn-proto",
    "quinn-udp",
    "rustls",
    "mio",
    "socket2",
    "sled",
    "fjall",
    "rusqlite",
    "rand",
    "getrandom",
];

/// Packages that only run or test the others.
const OUTER_CRATES: &[&str] = &[
    "fulmar-benches",
    "fulmar-load",
    "fulmar-netlab",
    "fulmar-peers",
    "fulmar-fuzz",
    "fulmar-faultdisk",
    "fulmar-store-rig",
    "fulmar-client-rig",
    "xtask",
];

/// Everything by which a file stops being pure: runtimes, transports, engines, clocks, dice, sockets, files, threads.
/// Addresses (`std::net::IpAddr`) and durations are values and stay allowed.
const WORLD: &[&str] = &[
    "tokio",
    "quinn",
    "quinn_proto",
    "quinn_udp",
    "rustls",
    "sled",
    "fjall",
    "rand",
    "getrandom",
    "*::Instant::now",
    "*::SystemTime::now",
    "std::net::TcpListener",
    "std::net::TcpStream",
    "std::net::UdpSocket",
    "std::fs",
    "std::thread",
];

/// What wires the stages, and what only the command line uses. Stages are imported by these, never the other way.
const ABOVE_THE_STAGES: &[&str] =
    &["crate::*", "crate::cli", "crate::gateway", "fulmar_client", "fulmar_badnet", "fulmar_sim"];

/// The stages of the gateway, in the order in which a message meets them, and the services beside them.
const STAGES: &[&str] = &[
    "crate::accept",
    "crate::connection",
    "crate::conversation",
    "crate::fanout",
    "crate::receipt",
    "crate::service",
];

/// Rules between crates, innermost first.
pub(crate) const CRATES: &[CrateRule] = &[
    CrateRule {
        folder: "protocol",
        forbids: &[
            WORLD_CRATES,
            OUTER_CRATES,
            &["fulmar-store", "fulmar-gateway", "fulmar-client", "fulmar-badnet", "fulmar-sim"],
        ],
        because: "the protocol knows no runtime, socket, engine or randomness, and no other crate of the project",
    },
    CrateRule {
        folder: "store",
        forbids: &[
            OUTER_CRATES,
            &["fulmar-gateway", "fulmar-client", "fulmar-badnet", "fulmar-sim", "quinn", "quinn-proto"],
        ],
        because: "the store knows ids and its engines; it serves whoever holds it and names none of them",
    },
    CrateRule {
        folder: "store/faultdisk",
        forbids: &[
            WORLD_CRATES,
            OUTER_CRATES,
            &[
                "fulmar-protocol",
                "fulmar-store",
                "fulmar-gateway",
                "fulmar-client",
                "fulmar-badnet",
                "fulmar-sim",
            ],
        ],
        because: "what is preloaded into a process knows nothing of what it runs, and brings nothing along",
    },
    CrateRule {
        folder: "store/rig",
        forbids: &[&[
            "sled",
            "fjall",
            "fulmar-gateway",
            "fulmar-client",
            "fulmar-badnet",
            "fulmar-sim",
            "fulmar-faultdisk",
            "xtask",
        ]],
        because: "the rigs try the store from outside: through its public names and its files",
    },
    CrateRule {
        folder: "transport",
        forbids: &[
            OUTER_CRATES,
            &[
                "fulmar-protocol",
                "fulmar-store",
                "fulmar-gateway",
                "fulmar-client",
                "fulmar-sim",
                "fulmar-badnet",
            ],
        ],
        because: "the transport carries bytes; gateway and SDK say what they mean",
    },
    CrateRule {
        folder: "client-sdk",
        forbids: &[OUTER_CRATES, &["fulmar-store", "fulmar-gateway", "fulmar-badnet", "fulmar-sim", "sled"]],
        because: "the SDK shares only the protocol with the gateway; phones do not carry a server",
    },
    CrateRule {
        folder: "sim/badnet",
        forbids: &[OUTER_CRATES, &["fulmar-gateway", "fulmar-store", "fulmar-client", "fulmar-sim"]],
        because: "bad networks and the checker are pure; the gateway's demo and the world use them, not they these",
    },
    CrateRule {
        folder: "client-sdk/rig",
        forbids: &[&[
            "fulmar-store",
            "fulmar-gateway",
            "fulmar-protocol",
            "fulmar-transport",
            "quinn",
            "xtask",
        ]],
        because: "the rig tries the SDK as apps use it, and the gateway as a program",
    },
    CrateRule {
        folder: "sim",
        forbids: &[OUTER_CRATES, &["sled", "fjall", "rusqlite"]],
        because: "the world reaches disks through the gateway and the SDK, and nothing but tests runs in it",
    },
    CrateRule {
        folder: "gateway",
        forbids: &[OUTER_CRATES, &["sled", "fjall", "rusqlite", "fulmar-sim"]],
        because: "the gateway reaches disks through the store, and nothing depends on benches, fuzz or xtask",
    },
];

/// Rules inside crates, in the order in which a message meets the files.
pub(crate) const SOURCES: &[SourceRule] = &[
    SourceRule {
        within: &["protocol/src/"],
        forbids: &[WORLD],
        but: &[],
        because: "the protocol is a state machine: time, bytes and randomness come in as arguments",
    },
    SourceRule {
        within: &["transport/src/qmux/"],
        forbids: &[WORLD, &["tokio_rustls", "tokio_tungstenite", "crate::*", "crate::connection"]],
        but: &[],
        because: "the multiplexer turns bytes into streams and back; who reads, writes and waits stands around it",
    },
    SourceRule {
        within: &["gateway/src/config.rs", "gateway/src/config/"],
        forbids: &[ABOVE_THE_STAGES, STAGES, &["fulmar_store"]],
        but: &[],
        because: "config is read by everybody and knows nobody",
    },
    SourceRule {
        within: &["gateway/src/identity/", "gateway/src/record.rs", "gateway/src/broadcasts.rs"],
        forbids: &[ABOVE_THE_STAGES, STAGES, &["crate::context"]],
        but: &[],
        because: "proofs, the form of a record and what everybody reads are told to the stages and know none of them",
    },
    SourceRule {
        within: &["gateway/src/context.rs"],
        forbids: &[
            ABOVE_THE_STAGES,
            &["crate::accept", "crate::connection", "crate::fanout", "crate::receipt", "crate::service"],
        ],
        but: &[],
        because: "the context is the way to the shards; it knows nothing of those who take it",
    },
    SourceRule {
        within: &[
            "gateway/src/accept/",
            "gateway/src/connection/",
            "gateway/src/conversation/",
            "gateway/src/fanout/",
            "gateway/src/receipt/",
            "gateway/src/service/",
        ],
        forbids: &[ABOVE_THE_STAGES],
        but: &[],
        because: "stages are wired from above; gateway and cli import them, never the other way",
    },
    SourceRule {
        within: &["gateway/src/accept/"],
        forbids: &[&[
            "crate::conversation",
            "crate::fanout",
            "crate::receipt",
            "crate::service",
            "fulmar_store",
        ]],
        but: &[],
        because: "accept knows connection and nothing behind it",
    },
    SourceRule {
        within: &["gateway/src/connection/"],
        forbids: &[&["crate::accept", "fulmar_store"]],
        but: &[],
        because: "connection knows conversation, fanout, receipt and service; the log is entered behind them",
    },
    SourceRule {
        within: &["gateway/src/conversation/"],
        forbids: &[&[
            "crate::accept",
            "crate::connection",
            "crate::context",
            "crate::receipt",
            "crate::service",
        ]],
        but: &[],
        because: "conversation knows the store and fanout, never a connection",
    },
    SourceRule {
        within: &["gateway/src/fanout/"],
        forbids: &[&[
            "crate::accept",
            "crate::connection",
            "crate::conversation",
            "crate::receipt",
            "crate::service",
            "fulmar_store",
        ]],
        but: &[],
        because: "fanout knows frames, never a connection, a conversation or the store",
    },
    SourceRule {
        within: &["gateway/src/receipt/"],
        forbids: &[&[
            "crate::accept",
            "crate::connection",
            "crate::conversation",
            "crate::fanout",
            "crate::service",
        ]],
        but: &["crate::fanout::owed"],
        because: "receipt knows the store and fanout's owed set",
    },
    SourceRule {
        within: &["gateway/src/service/"],
        forbids: &[&["crate::accept", "crate::connection"]],
        but: &[],
        because: "services are called by connection and never name it",
    },
    SourceRule {
        within: &[
            "gateway/src/accept/admission.rs",
            "gateway/src/conversation/route.rs",
            "gateway/src/conversation/state.rs",
            "gateway/src/fanout/push.rs",
            "gateway/src/fanout/ring.rs",
            "gateway/src/fanout/roster.rs",
            "gateway/src/receipt/unread.rs",
            "gateway/src/record.rs",
            "client-sdk/src/keepalive.rs",
            "client-sdk/src/networks.rs",
            "client-sdk/src/race.rs",
            "client-sdk/src/state.rs",
        ],
        forbids: &[WORLD],
        but: &[],
        because: "a pure file decides; it names no runtime, transport, engine, clock or randomness",
    },
];
