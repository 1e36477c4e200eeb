//! Templates: what sandboxes start from.
