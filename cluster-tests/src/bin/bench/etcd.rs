//! Durable writes of three members: ours beside etcd-server on the same disk.
//!
//! Both run all the time and are written to in turns, in short rounds, so that a machine whose mood
//! changes changes it for both. The clients are those of [`trio`](crate::trio), at the leader.
//! Ratios say what a write of ours costs in etcd's: below 1 is better than etcd.

use std::time::Duration;

use tokio::runtime::Runtime;

use crate::figures::{figure, ratio};
use crate::trio::etcd::Etcd;
use crate::trio::ours::Ours;
use crate::trio::{Load, VALUE_BYTES};
use crate::{Outcome, Run};

/// Clients at once.
const CLIENTS: [u8; 3] = [1, 8, 64];
/// How long one part of a round lasts.
const PART: Duration = Duration::from_millis(800);
/// We want to be no slower than etcd, in the middle and at the slow end.
const GOAL: f64 = 1.0;

/// Measures rounds.
pub(crate) fn run(run: &Run) -> Outcome {
    let folder = tempfile::Builder::new().prefix("wrenn-bench-").tempdir()?;
    let runtime = Runtime::new()?;
    let etcd = Etcd::start(folder.path())?;
    let ours = runtime.block_on(Ours::start(folder.path()))?;
    let mut loads = CLIENTS.map(|clients| (clients, Load::default(), Load::default()));
    for round in 1..=run.runs {
        run.go_on()?;
        for (clients, our, their) in &mut loads {
            runtime.block_on(measure_ours(&ours, *clients, our))?;
            measure_etcd(&runtime, &etcd, *clients, their)?;
        }
        run.note(&format!("round {round} of {}", run.runs));
    }
    figure("etcd_value_size", VALUE_BYTES as f64, "bytes");
    for (clients, our, their) in &loads {
        print(*clients, our, their);
    }
    Ok(())
}

async fn measure_ours(ours: &Ours, clients: u8, load: &mut Load) -> Outcome {
    let leader = ours.doors().swap_remove(ours.leader().await?);
    let before = ours.syncs().await?;
    let writes = load.run(&leader, clients, PART).await?;
    let syncs = ours.syncs().await? - before;
    load.syncs_per_write.add(syncs / writes as f64);
    Ok(())
}

fn measure_etcd(runtime: &Runtime, etcd: &Etcd, clients: u8, load: &mut Load) -> Outcome {
    let leader = etcd.leader()?;
    let leader = runtime.block_on(etcd.door(leader))?;
    let before = etcd.syncs();
    let writes = runtime.block_on(load.run(&leader, clients, PART))?;
    load.syncs_per_write
        .add((etcd.syncs() - before) / writes as f64);
    Ok(())
}

fn print(clients: u8, our: &Load, their: &Load) {
    for (who, load) in [("ours", our), ("etcd", their)] {
        let name = format!("etcd_{clients}_clients_{who}");
        load.per_second.print_p50(&format!("{name}_writes"), "/s");
        load.latency.print(&name, "ms");
        let syncs = format!("{name}_syncs_per_write");
        load.syncs_per_write.print_p50(&syncs, "by all members");
    }
    let name = format!("etcd_{clients}_clients");
    let (our_rate, their_rate) = (our.per_second.p50(), their.per_second.p50());
    // Time for a write, so that less is better.
    ratio(&format!("{name}_write_cost"), their_rate, our_rate, GOAL);
    let p50 = (our.latency.p50(), their.latency.p50());
    ratio(&format!("{name}_p50"), p50.0, p50.1, GOAL);
    let p99 = (our.latency.p99(), their.latency.p99());
    ratio(&format!("{name}_p99"), p99.0, p99.1, GOAL);
    let syncs = (our.syncs_per_write.p50(), their.syncs_per_write.p50());
    ratio(&format!("{name}_syncs"), syncs.0, syncs.1, GOAL);
}
