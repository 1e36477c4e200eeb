//! From what is desired and observed to steps.
