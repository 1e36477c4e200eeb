//! The HTTP interface: parses, proposes, answers.
