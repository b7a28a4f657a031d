//! GGUF, the format of llama.cpp and Ollama: a model directory as one file, and a file as a model.
//!
//! Writing takes weights, architecture, config.json and tokenizer, returns the file's metadata, tensor names and quantised values. Names,
//! metadata keys and types are those of the GGUF specification and of llama.cpp's `convert_hf_to_gguf.py` and `llama-quantize`.
//! Reading (`reader`) returns configuration and tokenizer; `model` reads the tensors. Knows no command, no run and no adapter: an adapter is merged before.

/// What to do with a model that cannot be written.
const CONVERT: &str = "write a Hugging Face directory with `--format hf`, and convert it with llama.cpp's convert_hf_to_gguf.py";

pub mod container;
pub mod family;
pub mod modelfile;
pub mod quantization;
pub mod reader;
mod reader_tokenizer;
pub mod tokenizer;

pub use container::{TensorInfo, Value};
pub use family::family;
pub use quantization::Quantization;
