//! Speaking to the guest agent.
