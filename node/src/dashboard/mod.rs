//! The page a browser sees.
