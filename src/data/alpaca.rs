//! Alpaca's prompt: instruction, optional input, response. The text is Stanford Alpaca's (tatsu-lab/stanford_alpaca, Apache-2.0)
//! with a line end after the last heading, as in alpaca-lora, LitGPT and torchtune.

/// The prompt of an instruction; an empty input has no section.
pub(super) fn prompt(instruction: &str, input: &str) -> String {
    if input.trim().is_empty() {
        return format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n\
            ### Instruction:\n{instruction}\n\n### Response:\n"
        );
    }
    format!(
        "Below is an instruction that describes a task, paired with an input that provides further context. \
        Write a response that appropriately completes the request.\n\n\
        ### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    )
}
