//! Images on disk: chunks, manifests, overlays, paths.
