//! Builds the rooms, joins them, starts them, and stops them in reverse.
