//! Finding the node that runs a sandbox and carrying bytes to its guest.
