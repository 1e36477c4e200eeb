//! What a starting node tells: the cluster about itself, its templates and its first key; and the
//! command line on the same host that it is ready.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use proto::ids::{KeyId, NodeId, NodeKey, TeamId};
use proto::units::Stamp;
use proto::version;
use raft::command::Command;
use raft::group::Group;
use raft::state::{Key, Node, State, Template};
use sha2::{Digest as _, Sha256};
use tokio::time;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::hypervisor::Chosen;
use super::{BOOTSTRAP_KEY_FILE, READY_FILE, RunError, disk, host};
use crate::base::chain::chain;
use crate::cluster::{ProposeError, Proposer};
use crate::config::Config;
use crate::store::{DataPaths, durable};
use crate::template::Catalog;

/// Pause before the cluster is told again what it could not be told.
const TELL_AGAIN: Duration = Duration::from_secs(1);
/// What an API key begins with.
const KEY_PREFIX: &str = "wrn_";
/// Bytes of randomness in a key.
const KEY_BYTES: usize = 16;
/// Characters of a key that may be shown again.
const SHOWN_CHARS: usize = 10;

/// What a node tells the cluster about itself.
pub(super) struct Announcement {
    node: Node,
    templates: Vec<Template>,
}

impl Announcement {
    /// What there is to tell.
    pub(super) fn new(
        config: &Config,
        here: NodeId,
        group: &Group<State>,
        catalog: &Catalog,
        chosen: &Chosen,
    ) -> Result<Self, RunError> {
        let held = catalog.templates();
        let held: BTreeMap<_, _> = held
            .map(|held| (held.name.to_string(), held.digest.0))
            .collect();
        let template = |held: &crate::template::Template| {
            Ok(Template {
                name: held.name.to_string(),
                digest: held.digest.0,
                disk: held.disk,
                size_bytes: data_bytes(&held.rootfs)?,
                created_at: Stamp::default(),
            })
        };
        let hardware = chosen.hardware.clone();
        Ok(Self {
            node: Node {
                id: here,
                name: config.name.clone(),
                key: NodeKey(group.node().key),
                api_url: config.public_url.clone(),
                cluster_address: config.advertise.to_string(),
                bulk_address: config.advertise_bulk.to_string(),
                disk: group.node().disk.0,
                capacity: host::capacity(config),
                vmm: chosen.driver.name().to_owned(),
                vmm_version: chosen.version.clone(),
                accelerator: chosen.accelerator.name().to_owned(),
                machine: hardware.machine,
                cpu: hardware.cpu,
                version: version::PRODUCT.to_owned(),
                templates: held,
                tags: config.tags.clone(),
                asks_first: true,
                reads_actors: true,
                boots_disks: true,
                ..Node::default()
            },
            templates: catalog
                .templates()
                .map(template)
                .collect::<Result<_, RunError>>()?,
        })
    }

    /// Tells it. Every start does, since it gives the node a fresh incarnation.
    pub(super) async fn tell(&self, proposer: &Proposer) -> Result<(), ProposeError> {
        let admit = Command::AdmitNode(self.node.clone());
        proposer.propose(admit).await?;
        for template in &self.templates {
            let state = proposer.view().state();
            if self.decides(&state, template) {
                let put = Command::PutTemplate(template.clone());
                proposer.propose(put).await?;
            }
        }
        Ok(())
    }

    /// Whether this node's version of a template is to be the cluster's: where there is none, or
    /// where no other node holds the one there is any more. So a new image spreads host by host,
    /// and the last one to get it makes it everybody's.
    fn decides(&self, state: &State, template: &Template) -> bool {
        let Some(known) = state.template(&template.name) else {
            return true;
        };
        let is_held = |node: &Node| node.templates.get(&known.name) == Some(&known.digest);
        let others = state.nodes().filter(|node| node.id != self.node.id);
        let same = known.digest == template.digest;
        let held_elsewhere = others.into_iter().any(is_held);
        if !same && held_elsewhere {
            warn!(
                template = known.name,
                "this host has another version of the template than the cluster; capsules of it \
                 are placed elsewhere"
            );
        }
        !same && !held_elsewhere
    }

    /// Tells it in the background until it is told: the cluster had no quorum when this node
    /// started.
    pub(super) async fn keep_telling(self, proposer: Proposer, stop: CancellationToken) {
        let tell = async {
            while let Err(err) = self.tell(&proposer).await {
                warn!(
                    err = chain(&err),
                    "could not tell the cluster about this node yet"
                );
                time::sleep(TELL_AGAIN).await;
            }
            info!("told the cluster about this node");
        };
        stop.run_until_cancelled(tell).await;
    }
}

/// Makes the first API key, once. The file is written before the key is proposed, so that a crash
/// between the two leaves a key that the next start proposes again.
pub(super) async fn bootstrap_key(paths: &DataPaths, proposer: &Proposer) -> Result<(), RunError> {
    if proposer.view().state().keys().next().is_some() {
        return Ok(());
    }
    let file = paths.root().join(BOOTSTRAP_KEY_FILE);
    let secret = match std::fs::read_to_string(&file) {
        Ok(text) => whole_key(text.trim()).map_err(disk("read the first API key"))?,
        Err(err) if err.kind() == io::ErrorKind::NotFound => {
            let random: [u8; KEY_BYTES] = rand::random();
            let hex: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
            let secret = format!("{KEY_PREFIX}{hex}");
            durable::write(&file, secret.as_bytes()).map_err(disk("write the first API key"))?;
            secret
        }
        Err(err) => return Err(disk("read the first API key")(err)),
    };
    let hash: [u8; 32] = Sha256::digest(secret.as_bytes()).into();
    let mut id = [0; 16];
    id.copy_from_slice(&hash[..16]);
    let key = Key {
        id: KeyId(id),
        team: TeamId::default(),
        name: "bootstrap".into(),
        hash,
        shown: secret.chars().take(SHOWN_CHARS).collect(),
        ..Key::default()
    };
    proposer.propose(Command::PutKey(key)).await?;
    info!(file = %file.display(), "made the first API key");
    Ok(())
}

/// A key as this node made it. Half a key, or none, must not become one that opens everything.
fn whole_key(text: &str) -> io::Result<String> {
    let digits = text.strip_prefix(KEY_PREFIX).unwrap_or_default();
    let whole = digits.len() == 2 * KEY_BYTES
        && digits
            .bytes()
            .all(|it| matches!(it, b'0'..=b'9' | b'a'..=b'f'));
    if whole {
        return Ok(text.to_owned());
    }
    let why = format!("{BOOTSTRAP_KEY_FILE} holds no key of this node; remove it to get a new one");
    Err(io::Error::new(io::ErrorKind::InvalidData, why))
}

/// No longer says so: a starting or stopping node is not ready.
pub(super) fn remove_ready(paths: &DataPaths) -> Result<(), RunError> {
    match std::fs::remove_file(paths.root().join(READY_FILE)) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => {
            Err(disk("say that the node is not ready")(err))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Says that the node is ready and where.
pub(super) fn write_ready(
    paths: &DataPaths,
    here: NodeId,
    name: &str,
    url: &str,
) -> Result<(), RunError> {
    let ready = serde_json::json!({
        "id": here.to_string(),
        "name": name,
        "url": url,
        "pid": std::process::id(),
    });
    durable::write(&paths.root().join(READY_FILE), ready.to_string().as_bytes())
        .map_err(disk("say that the node is ready"))
}

/// Bytes of data in a sparse image, as the disk counts them.
fn data_bytes(image: &Path) -> Result<u64, RunError> {
    /// The unit of `st_blocks`, whatever the file system's own.
    const STAT_BLOCK_BYTES: u64 = 512;
    let image = std::fs::metadata(image).map_err(disk("look at a template's image"))?;
    Ok(image.blocks() * STAT_BLOCK_BYTES)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::sync::Arc;

    use super::*;
    use crate::base::clock::HandClock;
    use crate::cluster::MemoryLog;

    fn proposer() -> Proposer {
        Proposer::new(
            Arc::new(MemoryLog::default()),
            Arc::new(HandClock::default()),
        )
    }

    #[tokio::test]
    async fn the_first_key_is_private_and_outlives_the_loss_of_its_proposal() {
        let root = tempfile::tempdir().expect("a directory");
        let paths = DataPaths::new(root.path());
        let file = root.path().join(BOOTSTRAP_KEY_FILE);
        bootstrap_key(&paths, &proposer()).await.expect("made");
        let secret = std::fs::read_to_string(&file).expect("read");
        let mode = std::fs::metadata(&file).expect("there").permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);

        let after_crash = proposer();
        bootstrap_key(&paths, &after_crash).await.expect("made");
        bootstrap_key(&paths, &after_crash).await.expect("kept");
        assert_eq!(std::fs::read_to_string(&file).expect("read"), secret);
        let hash: [u8; 32] = Sha256::digest(secret.as_bytes()).into();
        let state = after_crash.view().state();
        assert!(state.key_by_hash(&hash).is_some());
        assert_eq!(state.keys().count(), 1);
    }

    #[tokio::test]
    async fn a_damaged_key_file_makes_no_key() {
        let root = tempfile::tempdir().expect("a directory");
        let paths = DataPaths::new(root.path());
        for damaged in [
            "",
            "wrn_",
            "wrn_0123",
            "hunter2hunter2hunter2hunter2hunter2h",
        ] {
            std::fs::write(root.path().join(BOOTSTRAP_KEY_FILE), damaged).expect("written");
            let proposer = proposer();
            assert!(bootstrap_key(&paths, &proposer).await.is_err());
            assert_eq!(proposer.view().state().keys().count(), 0, "{damaged:?}");
        }
    }
}
