//! Primitives with an explicit forward and backward.
