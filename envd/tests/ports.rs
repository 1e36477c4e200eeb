//! What listens on the loopback only is reached through the real agent.

mod common;

use std::net::{Ipv4Addr, SocketAddr};

use common::{Envd, soon};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Where the agent of this test forwards from.
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 93);

async fn reach(port: u16) -> TcpStream {
    soon(async {
        loop {
            match TcpStream::connect((OUTSIDE, port)).await {
                Ok(stream) => return stream,
                Err(_) => tokio::time::sleep(std::time::Duration::from_millis(50)).await,
            }
        }
    })
    .await
}

async fn echo(listener: &TcpListener, mut client: TcpStream) {
    let (mut served, _) = soon(listener.accept()).await.expect("carried");
    client.write_all(b"to and fro").await.expect("sent");
    let mut received = [0; 10];
    soon(served.read_exact(&mut received)).await.expect("read");
    served.write_all(&received).await.expect("sent");
    soon(client.read_exact(&mut received)).await.expect("read");
    assert_eq!(&received, b"to and fro");
}

#[tokio::test]
async fn a_program_on_localhost_is_reached_in_both_families_and_its_port_is_given_back() {
    let envd = Envd::start_with(&["--forward-on", "127.0.0.93"]);
    for localhost in ["127.0.0.1:0", "[::1]:0"] {
        let Ok(listener) = TcpListener::bind(localhost).await else {
            eprintln!("SKIPPED {localhost}: this host has no such address");
            continue;
        };
        let port = listener.local_addr().expect("bound").port();
        echo(&listener, reach(port).await).await;
        drop(listener);
        // The next program may listen on all addresses.
        soon(async {
            while TcpListener::bind((OUTSIDE, port)).await.is_err() {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        })
        .await;
    }
    // Its own port is on the loopback as well here, and is left alone.
    let own: SocketAddr = envd.address.parse().expect("an address");
    assert!(TcpListener::bind((OUTSIDE, own.port())).await.is_ok());
}
