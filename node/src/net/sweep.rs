//! What is on the host, and taking away what should not be: found by name alone.
//!
//! A slot half made, half unmade or whole is at most a file in `/run/netns` (a namespace mounted on
//! it or not) and a veth; the tap and the inner rules go with the namespace, and no rule on the
//! host names a slot. So two lists of names tell everything. Sweeping twice does nothing more.
//!
//! A namespace with processes still in it ends when they do; its veth is gone at once, so
//! they are cut off. Ending them is up to whoever started them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;

use tokio::task;

use super::build::raze;
use super::error::NetError;
use super::slot::{NETNS_DIR, Serial, Slot, SlotIndex, SlotTag, index_of};
use super::{link, rules};

/// What a sweep took away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// The slots of which there was anything.
    pub slots: BTreeSet<Serial>,
}

/// Removes every namespace, veth and file of `tag`, except those of the slots in `keep`.
///
/// Run it before the pool starts, or it takes the pool's own slots.
///
/// # Errors
/// [`NetError::Kernel`] with the first refusal, after everything else was tried.
pub async fn sweep(tag: &SlotTag, keep: &BTreeSet<Serial>) -> Result<Swept, NetError> {
    let (tag, keep) = (tag.clone(), keep.clone());
    blocking(move || sweep_now(&tag, &keep)).await
}

/// Removes the node's table from the host: the last thing, when the node leaves it for good.
///
/// Guests still running lose their way out; the rules in their namespaces stay in force.
///
/// # Errors
/// [`NetError::Kernel`] if the kernel refuses.
pub async fn teardown_host(tag: &SlotTag) -> Result<(), NetError> {
    let tag = tag.clone();
    blocking(move || {
        rules::remove_from_host(&tag).map_err(NetError::kernel("remove the rules of node", &tag))
    })
    .await
}

/// Runs `work` on a blocking thread, in the namespace of the runtime.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetError> + Send + 'static,
) -> Result<T, NetError> {
    match task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(err) if err.is_panic() => std::panic::resume_unwind(err.into_panic()),
        // The runtime is being dropped.
        Err(_) => Err(NetError::Stopped),
    }
}

fn sweep_now(tag: &SlotTag, keep: &BTreeSet<Serial>) -> Result<Swept, NetError> {
    let mut swept = Swept::default();
    let mut first_refusal = Ok(());
    for serial in all_serials(tag)?.difference(keep) {
        swept.slots.insert(*serial);
        // The index does not matter here: only the names do.
        let done = raze(&Slot::new(tag, *serial, SlotIndex(0)));
        first_refusal = first_refusal.and(done);
    }
    first_refusal.map(|()| swept)
}

/// The serials of `tag` of which anything is on the host.
fn all_serials(tag: &SlotTag) -> Result<BTreeSet<Serial>, NetError> {
    let links = link::names().map_err(NetError::kernel("list the links of", "this host"))?;
    let held = names_in(Path::new(NETNS_DIR))
        .map_err(NetError::kernel("list the namespaces in", NETNS_DIR))?;
    let of_links = links.iter().filter_map(|name| tag.serial_of_veth(name));
    let of_files = held.iter().filter_map(|name| tag.serial_of_netns(name));
    Ok(of_links.chain(of_files).collect())
}

fn names_in(folder: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        read => read?,
    };
    entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

/// What a starting pool has to work around.
#[derive(Debug, Default)]
pub(super) struct Census {
    /// Slots of this tag that are whole enough to hold an index.
    pub(super) slots: BTreeMap<Serial, SlotIndex>,
    /// Indexes whose addresses are on links that are not of this tag.
    pub(super) foreign: BTreeSet<SlotIndex>,
    /// The highest serial of this tag, whole or not.
    pub(super) highest: Option<Serial>,
}

/// Looks at the host.
pub(super) fn census(tag: &SlotTag) -> Result<Census, NetError> {
    let mut census = Census {
        highest: all_serials(tag)?.last().copied(),
        ..Census::default()
    };
    let addresses =
        link::addresses().map_err(NetError::kernel("list the addresses of", "this host"))?;
    for (link, address) in addresses {
        match (index_of(address), tag.serial_of_veth(&link)) {
            (Some(index), Some(serial)) => {
                census.slots.insert(serial, index);
            }
            (Some(index), None) => {
                census.foreign.insert(index);
            }
            (None, _) => {}
        }
    }
    Ok(census)
}
