//! Ollama's Modelfile beside a GGUF file.

use serde_json::Value;

/// `FROM FILE`, and the text at which the model stops. The chat template is inside the GGUF file.
pub fn modelfile(file: &str, stop: Option<&str>) -> String {
    let stop = stop.map_or(String::new(), |stop| {
        format!("PARAMETER stop {}\n", Value::from(stop))
    });
    format!("FROM ./{file}\n{stop}")
}
