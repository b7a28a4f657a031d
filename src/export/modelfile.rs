//! Ollama's Modelfile beside a GGUF file.

/// `FROM FILE`, and where the model stops. The chat template is inside the GGUF file.
pub fn modelfile(file: &str, stops: &[String]) -> String {
    let mut text = format!("FROM ./{file}\n");
    for stop in stops {
        text += &format!(
            "PARAMETER stop {}\n",
            serde_json::Value::from(stop.as_str())
        );
    }
    text
}
