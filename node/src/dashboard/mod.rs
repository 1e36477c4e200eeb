//! The page a browser sees: a static application that uses the public API like any other client.
//!
//! It is served without authentication because it holds nothing: the API key is typed in by the
//! user and kept in the browser tab's session storage. The node never learns that the page is open
//! except by the API calls it makes.

mod assets;

pub use assets::routes;
