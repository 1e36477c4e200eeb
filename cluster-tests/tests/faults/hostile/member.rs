//! A member, with its own key, that sends nothing but nonsense: calls of every method, streams of
//! every service, load reports.

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use transport::{Config, Identity, Lane, Membership, Service, Transport};

use super::Target;

/// Methods of a service that are tried; there are fewer.
const METHODS: u16 = 12;
/// Bytes of a body that is long and means nothing.
const LONG_BODY: usize = 1 << 20;
/// Streams at once.
const STREAMS: usize = 3000;
/// Datagrams, thirty times what is heard in a second.
const DATAGRAMS: usize = 3000;
/// Longest one of these may take: a call that is refused is refused at once.
const PATIENCE: Duration = Duration::from_secs(3);
/// Longest a connection may take on a busy machine: a handshake is several round trips.
const CONNECT_PATIENCE: Duration = Duration::from_secs(15);

/// All of it, under the key in `identity`.
pub(super) async fn go_mad(identity: &Path, target: Target) {
    let identity = Identity::load_or_create(identity).expect("the member's key");
    let at = (Ipv4Addr::LOCALHOST, 0).into();
    let mad = Transport::start(&identity, Config::at(at, at)).expect("starts");
    mad.set_membership(Membership {
        index: u64::MAX,
        members: [identity.key(), target.key].into_iter().collect(),
        join_open: false,
    });
    for (lane, address) in [(Lane::Control, target.control), (Lane::Bulk, target.bulk)] {
        let deadline = Instant::now() + CONNECT_PATIENCE;
        let connected = mad.connect(lane, address, target.key, deadline).await;
        connected.expect("it is a member");
    }
    call_everything(&mad, target).await;
    open_everything(&mad, target).await;
    for round in 0..DATAGRAMS {
        let bytes = Bytes::from(vec![
            u8::try_from(round % 256).expect("a byte");
            round % 1000
        ]);
        let _dropped = mad.send_datagram(target.key, bytes);
        if round % 100 == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    assert!(
        mad.is_connected(Lane::Control, target.key),
        "it is a member still"
    );
    mad.stop(Instant::now() + PATIENCE).await;
}

async fn call_everything(mad: &Transport, target: Target) {
    let bodies = [
        Bytes::new(),
        Bytes::from_static(&[0xff; 64]),
        Bytes::from_static(&[0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f]),
        Bytes::from(vec![0x5a; LONG_BODY]),
    ];
    let services = [
        Service::RAFT,
        Service::JOIN,
        Service::CLUSTER,
        Service::RELAY,
        Service::SNAPSHOT,
        Service::PULL,
    ];
    for service in services {
        for number in 0..METHODS {
            for body in &bodies {
                let deadline = Instant::now() + PATIENCE;
                // Empty bodies are requests of their own: whatever is answered, it is answered.
                let _answer = mad
                    .call(target.key, service.method(number), body.clone(), deadline)
                    .await;
            }
        }
    }
}

async fn open_everything(mad: &Transport, target: Target) {
    let services = [
        Service::RELAY,
        Service::SNAPSHOT,
        Service::PULL,
        Service::CLUSTER,
    ];
    let header = Bytes::from_static(&[0xff; 512]);
    let deadline = Instant::now() + PATIENCE;
    let opening =
        services.iter().cycle().take(STREAMS).map(|service| {
            mad.open_stream(Lane::Bulk, target.key, *service, header.clone(), deadline)
        });
    // All at once, and none is read from.
    let opened = futures::future::join_all(opening).await;
    let open = opened.iter().filter(|it| it.is_ok()).count();
    println!("a mad member has {open} of {STREAMS} streams open");
}
