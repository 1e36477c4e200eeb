//! Network slots: one namespace per sandbox.
