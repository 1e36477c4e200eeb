//! Configuration: as written, as checked, and its defaults with their reasons.
