//! Records -> rendered text and loss mask -> tokens -> packed batches.
//!
//! Owns file formats, chat templates, encoding, packing and the order of records. Token ids stay `u32`: knows nothing of
//! tensors or models.

pub mod batch;
