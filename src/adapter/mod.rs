//! LoRA on disk and by name: which modules, PEFT's files, merging.
