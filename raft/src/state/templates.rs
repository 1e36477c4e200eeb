//! Templates that sandboxes start from.

use proto::units::{Mib, Stamp};
use proto::wire::raft as pb;

use super::rows::BadRow;
use crate::wire::array;

/// A template as the cluster knows it; its bytes lie with the nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// Unique in the cluster.
    pub name: String,
    /// BLAKE3 digest of its root disk's manifest.
    pub digest: [u8; 32],
    /// Size of the root disk a sandbox sees.
    pub disk: Mib,
    /// Bytes of data in it, holes left out.
    pub size_bytes: u64,
    /// When it was first put.
    pub created_at: Stamp,
}

impl From<&Template> for pb::TemplateRow {
    fn from(template: &Template) -> Self {
        Self {
            name: template.name.clone(),
            digest: template.digest.to_vec(),
            disk_mib: template.disk.0,
            size_bytes: template.size_bytes,
            created_at_ms: template.created_at.0,
        }
    }
}

impl TryFrom<pb::TemplateRow> for Template {
    type Error = BadRow;

    fn try_from(row: pb::TemplateRow) -> Result<Self, BadRow> {
        Ok(Self {
            name: row.name,
            digest: array("template digest", &row.digest)?,
            disk: Mib(row.disk_mib),
            size_bytes: row.size_bytes,
            created_at: Stamp(row.created_at_ms),
        })
    }
}
