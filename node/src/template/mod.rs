//! Templates: what sandboxes start from.
//!
//! Today a template is a root file system that was made by the image scripts and lies in the
//! images directory. The [`catalog`] finds and checks what is there, with the kernel and initramfs
//! all guests boot from; [`rootfs`] keeps each root file system in use under its digest, so that
//! a rebuilt template never changes the disk below a running sandbox. The cluster learns of
//! templates by a proposal made elsewhere.
//!
//! A team's own templates are built by the room `build`; what a build is made of is here, pure: the
//! [`recipe`], its steps and their keys ([`plan`]), the [`health`] check, the [`archive`] that files come
//! from, and the lines of the [`log`]; [`import`] makes a root file system of an archive or an image.

pub mod archive;
pub mod catalog;
pub mod error;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
pub mod health;
pub mod import;
pub mod log;
pub mod plan;
pub mod recipe;
pub mod rootfs;

pub use catalog::{Catalog, GuestImages, Template, TemplateName, find_guest};
pub use error::{OpenCatalogError, TemplateError};
