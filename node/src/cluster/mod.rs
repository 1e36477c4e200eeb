//! The replicated state as this node sees it, and the way to change it.
