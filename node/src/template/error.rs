//! Why images or templates cannot be used, and who must act on it.

use std::io;
use std::path::PathBuf;

use proto::units::Mib;

use crate::base::remedy::Remedy;
use crate::store::ReadImageError;

/// Why no guest can be started from an images directory.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum OpenCatalogError {
    /// Something every guest needs is not there.
    #[error("no {what} at {path}; run {script} to make it, or name another images directory")]
    Missing {
        /// What is missing.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// The script that makes it.
        script: &'static str,
    },
    /// The kernel's release file holds something else.
    #[error("{path} does not hold a kernel release; run deploy/images/kernel --refresh")]
    KernelRelease {
        /// The file.
        path: PathBuf,
    },
    /// The disk refused.
    #[error("{action} {path}")]
    Disk {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl OpenCatalogError {
    /// Who must act next: images are put in place by the operator.
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Missing { .. } | Self::KernelRelease { .. } | Self::Disk { .. } => {
                Remedy::CallOperator
            }
        }
    }
}

/// Why one template cannot be used. The others still can.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The name breaks the rule.
    #[error(
        "template name {name:?} must be 1 to 64 characters of [a-zA-Z0-9._-], \
         the first a letter or digit"
    )]
    Name {
        /// The name, shortened.
        name: String,
    },
    /// The description says another name than its directory.
    #[error("template directory {dir} describes a template named {name:?}")]
    OtherName {
        /// The directory.
        dir: PathBuf,
        /// The name in the description.
        name: String,
    },
    /// The description cannot be understood.
    #[error("understand template description {path}")]
    Description {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The disk is too small for the image, or larger than any disk may be.
    #[error("template {name} asks for a disk of {disk} over an image of {image_bytes} bytes")]
    DiskSize {
        /// The template.
        name: String,
        /// The size in its description.
        disk: Mib,
        /// Length of its root file system.
        image_bytes: u64,
    },
    /// The root file system cannot be read.
    #[error("describe the root file system of template {name}")]
    Image {
        /// The template.
        name: String,
        /// What is wrong with it.
        source: ReadImageError,
    },
    /// The root file system changed while it was read.
    #[error("root file system {path} changed while it was being read")]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The disk refused.
    #[error("{action} {path}")]
    Disk {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl TemplateError {
    /// Who must act next. A bad name may be a client's; all else lies in the images directory.
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Name { .. } => Remedy::FixRequest,
            Self::OtherName { .. }
            | Self::Description { .. }
            | Self::DiskSize { .. }
            | Self::Image { .. }
            | Self::Changed { .. }
            | Self::Disk { .. } => Remedy::CallOperator,
        }
    }
}
