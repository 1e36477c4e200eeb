//! Guest memory: owned here, handed to the VMM.
