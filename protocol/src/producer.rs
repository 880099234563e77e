//! Producer rules.
