//! What a guest can and cannot reach, tried from inside of it.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::thread;

use serde_json::Value;
use wrenn_cluster_tests::outside::Outside;
use wrenn_cluster_tests::world::World;

use crate::PATIENCE;

/// The port of the guest's agent.
const AGENT_PORT: u16 = 49983;
/// The port of the listeners outside.
const PORT: u16 = 7171;
/// The port of a server in a guest.
const GUEST_PORT: u16 = 8123;
/// What a listener says.
const WORD: &str = "wrenn-outside";

/// Says [`WORD`], in a way that curl takes for an answer too, to whoever calls.
fn answer(mut stream: TcpStream) {
    let length = WORD.len();
    let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {length}\r\n\r\n");
    let _gone = stream.write_all(format!("{head}{WORD}").as_bytes());
    let _gone = stream.shutdown(Shutdown::Write);
    // Closing with a request unread would take the answer back.
    let _gone = stream.read_to_end(&mut Vec::new());
}

/// Listens on every address of the host; tells the port.
fn serve_on_host() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a free port");
    let port = listener.local_addr().expect("it is bound").port();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A caller that never hangs up must not keep others waiting.
            thread::spawn(move || answer(stream));
        }
    });
    port
}

/// Every IPv4 address of the host, loopback apart.
fn host_addresses() -> Vec<Ipv4Addr> {
    let listed = Command::new("ip")
        .args(["-j", "-4", "addr"])
        .output()
        .expect("ip is installed");
    let links: Value = serde_json::from_slice(&listed.stdout).expect("JSON");
    let addresses = links
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|link| link["addr_info"].as_array().cloned().unwrap_or_default());
    addresses
        .filter_map(|address| address["local"].as_str()?.parse::<Ipv4Addr>().ok())
        .filter(|address| !address.is_loopback())
        .collect()
}

fn answers_to_host(address: Ipv4Addr, port: u16) -> bool {
    TcpStream::connect_timeout(&SocketAddr::from((address, port)), PATIENCE).is_ok()
}

/// Which of `targets` a guest can connect to; all are tried at once.
fn reached(world: &World, id: &str, targets: &[(Ipv4Addr, u16)]) -> BTreeSet<(Ipv4Addr, u16)> {
    let list: Vec<String> = targets
        .iter()
        .map(|(address, port)| format!("(\"{address}\",{port})"))
        .collect();
    // Twice the retry of a lost first packet.
    let script = format!(
        "import socket, threading\n\
         def call(to):\n\
         \x20   try:\n\
         \x20       socket.create_connection(to, 3).close()\n\
         \x20       print(to[0], to[1], flush=True)\n\
         \x20   except OSError: pass\n\
         calls = [threading.Thread(target=call, args=(to,)) for to in [{}]]\n\
         for it in calls: it.start()\n\
         for it in calls: it.join()\n",
        list.join(",")
    );
    let written = world.upload(id, "files/write", "/tmp/reach.py", script.as_bytes());
    assert_eq!(written.status, 204);
    let said = world.output(id, "python3 /tmp/reach.py");
    said.lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(address, port)| {
            (
                address.parse().expect("an address"),
                port.parse().expect("a port"),
            )
        })
        .collect()
}

/// The address at which the host dials a capsule.
fn dialled_at(world: &World, id: &str) -> Ipv4Addr {
    let record = std::fs::read(world.sandbox_dir(id).join("sandbox.json")).expect("a record");
    let record: Value = serde_json::from_slice(&record).expect("JSON");
    record["slot"]["guest_addr"]
        .as_str()
        .and_then(|text| text.parse().ok())
        .expect("an address")
}

#[test]
fn a_guest_reaches_the_internet_and_what_the_operator_allows_and_nothing_else() {
    let outside = Outside::new();
    outside.serve(PORT, answer);
    let mut world = World::asleep();
    world.arguments = vec!["--egress-allow".into(), format!("{}/32", outside.allowed)];
    world.start();
    let (id, other) = (world.capsule(), world.capsule());
    serve_in(&world, &other);

    let open = [(outside.public, PORT), (outside.allowed, PORT)];
    let refused = refused_targets(&world, &outside, &other);
    for (address, port) in open {
        assert!(
            answers_to_host(address, port),
            "{address} is not there at all"
        );
    }
    let all: Vec<_> = open.iter().chain(&refused).copied().collect();
    assert_eq!(reached(&world, &id, &all), open.into());

    // Other programs meet the same rules.
    let curl = |address: Ipv4Addr| format!("curl -s --max-time 3 http://{address}:{PORT}/");
    assert_eq!(world.output(&id, &curl(outside.public)), WORD);
    assert_eq!(
        world.exec(&id, &curl(outside.private))["exit_code"],
        28,
        "a timeout"
    );
    let bash =
        |address| format!("timeout 3 bash -c 'exec 3<>/dev/tcp/{address}/{PORT} && head -1 <&3'");
    assert_eq!(world.output(&id, &bash(outside.allowed)), "HTTP/1.0 200 OK");
    assert_ne!(world.exec(&id, &bash(outside.private))["exit_code"], 0);

    its_own_address_is_itself(&world, &id, &other);
    world.wait_only(&[&id, &other]);
}

/// Starts a server in a capsule and waits until it answers to the host.
fn serve_in(world: &World, id: &str) {
    let request = serde_json::json!({
        "cmd": "python3", "args": ["-m", "http.server", GUEST_PORT.to_string()],
        "cwd": "/srv", "background": true,
    });
    assert_eq!(world.run(id, &request).status, 202);
    let address = dialled_at(world, id);
    let up = wrenn_cluster_tests::client::wait_for(PATIENCE, || {
        answers_to_host(address, GUEST_PORT).then_some(())
    });
    assert!(up.is_some(), "the guest does not serve");
}

/// Everything that answers to the host and must not answer to a guest.
fn refused_targets(world: &World, outside: &Outside, other: &str) -> Vec<(Ipv4Addr, u16)> {
    let host_port = serve_on_host();
    let neighbour = dialled_at(world, other);
    let mut refused = vec![
        (outside.private, PORT),
        (neighbour, AGENT_PORT),
        (neighbour, GUEST_PORT),
    ];
    for address in host_addresses() {
        refused.push((address, host_port));
    }
    for (address, port) in &refused {
        assert!(
            answers_to_host(*address, *port),
            "{address}:{port} is not there at all"
        );
    }
    // These need not answer to anybody to be forbidden.
    let gateway = Ipv4Addr::new(169, 254, 0, 22);
    let metadata = Ipv4Addr::new(169, 254, 169, 254);
    for address in host_addresses().into_iter().chain([gateway, metadata]) {
        refused.extend([(address, world.port()), (address, 22), (address, 80)]);
    }
    refused.push((gateway, host_port));
    refused
}

/// All guests have the same address; each means itself by it.
fn its_own_address_is_itself(world: &World, id: &str, other: &str) {
    let own = Ipv4Addr::new(169, 254, 0, 21);
    let targets = [(own, AGENT_PORT), (own, GUEST_PORT)];
    assert_eq!(reached(world, id, &targets), [(own, AGENT_PORT)].into());
    assert_eq!(reached(world, other, &targets), targets.into());
}
