//! The heads of an architecture for classes and numbers: replaced, read and changed.

use super::architecture::Architecture;
use super::head::{Classified, ClassifierHead, Head, Pooling, ProblemType};
use crate::error::{Error, Kind, Result};
use crate::ops::Activation;

/// Decoders that transformers has a `ForSequenceClassification` of.
const SCORED: [&str; 12] = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_neox",
    "stablelm",
    "starcoder2",
];

/// Those of them without a `ForTokenClassification`, or with another head in it.
const SCORED_SEQUENCES_ALONE: [&str; 2] = ["gemma3_text", "gpt_neox"];

impl Architecture {
    /// Path of the module with a classifier's output layer; `None` of a model that predicts tokens.
    pub fn classifier(&self) -> Option<&'static str> {
        self.classifier_head().map(|head| head.module)
    }

    pub(super) fn classifier_head(&self) -> Option<&ClassifierHead> {
        match &self.head {
            Head::Vocabulary => None,
            Head::Classifier(head) => Some(head),
        }
    }

    /// Names of a classifier's classes, by id; empty of a model that predicts tokens.
    pub fn labels(&self) -> &[String] {
        self.classifier_head().map_or(&[], |head| &head.labels)
    }

    /// What a classifier gives classes to; `None` of a model that predicts tokens.
    pub fn classified(&self) -> Option<Classified> {
        let head = self.classifier_head()?;
        Some(match head.pooling {
            Pooling::Each => Classified::Tokens,
            Pooling::First | Pooling::Last => Classified::Sequences,
        })
    }

    /// Replaces the head by that of transformers' class for the task, with these classes.
    ///
    /// # Errors
    /// A model type that transformers has no such class for.
    pub fn classify(&mut self, classified: Classified, labels: Vec<String>) -> Result<()> {
        const OTHERS: [&str; 3] = [
            "ForCausalLM",
            "ForSequenceClassification",
            "ForTokenClassification",
        ];
        if self.classified() == Some(classified) {
            return Ok(());
        }
        let head = match (self.classifier_head(), classified) {
            (None, _) => self.score(classified, labels)?,
            // Without the layer before the output, and on each token.
            (Some(head), Classified::Tokens) => ClassifierHead {
                dense: None,
                pooling: Pooling::Each,
                labels,
                ..head.clone()
            },
            (Some(_), Classified::Sequences) => {
                let what = "the model has a head for the classes of tokens";
                return Err(Error::new(Kind::Model, what)
                    .value(&self.class)
                    .hint("choose the model without a head, or `task = \"token-classification\"` in [model]"));
            }
        };
        let class = match classified {
            Classified::Sequences => OTHERS[1],
            Classified::Tokens => OTHERS[2],
        };
        for other in OTHERS {
            self.class = self.class.replace(other, class);
        }
        self.names.lm_head = head.module;
        self.names.lm_head_in_files = None;
        self.tie_word_embeddings = false;
        self.logits_softcap = None;
        self.head = Head::Classifier(head);
        Ok(())
    }

    /// The head `score` of a decoder.
    fn score(&mut self, classified: Classified, labels: Vec<String>) -> Result<ClassifierHead> {
        let tokens = classified == Classified::Tokens;
        let model_type = self.model_type.as_str();
        let types = SCORED.into_iter();
        let types: Vec<&str> = types
            .filter(|name| !(tokens && SCORED_SEQUENCES_ALONE.contains(name)))
            .collect();
        if !types.contains(&model_type) || self.names.composite.is_some() {
            return Err(Error::new(
                Kind::Model,
                "this model type has no classifier in transformers",
            )
            .value(&self.class)
            .rule(format!("an encoder, or one of {}", types.join(", ")))
            .hint("choose a model of one of these types"));
        }
        self.names.unread = &["lm_head.", "embed_out."];
        Ok(ClassifierHead {
            module: "score",
            dense: None,
            activation: Activation::Tanh,
            bias: tokens,
            pooling: if tokens { Pooling::Each } else { Pooling::Last },
            labels,
            problem_type: ProblemType::SingleLabel,
            class_weights: Vec::new(),
        })
    }

    /// Replaces the classes of a classifier.
    pub fn set_labels(&mut self, labels: &[String]) {
        if let Head::Classifier(head) = &mut self.head {
            head.labels = labels.to_vec();
        }
    }

    /// Replaces the meaning of a head's outputs.
    pub fn set_problem_type(&mut self, problem_type: ProblemType) {
        if let Head::Classifier(head) = &mut self.head {
            head.problem_type = problem_type;
        }
    }

    /// Gives the classes of a classifier weights in the training loss, by id.
    pub fn set_class_weights(&mut self, weights: Vec<f32>) {
        if let Head::Classifier(head) = &mut self.head {
            head.class_weights = weights;
        }
    }

    /// What a head's outputs mean; `None` of a model that predicts tokens.
    pub fn problem_type(&self) -> Option<ProblemType> {
        Some(self.classifier_head()?.problem_type)
    }

    /// The sum of the weights of `classes` in the training loss: their number without weights.
    pub fn loss_weight(&self, classes: &[u32]) -> f64 {
        let weights = self.classifier_head().map(|head| &head.class_weights);
        match weights.filter(|weights| !weights.is_empty()) {
            Some(weights) => {
                let weight = |class: &u32| f64::from(weights[*class as usize]);
                classes.iter().map(weight).sum()
            }
            None => classes.len() as f64,
        }
    }

    /// Rows of the output embedding or of a classifier's output layer.
    pub(super) fn outputs(&self) -> usize {
        self.classifier_head()
            .map_or(self.vocab_size, |head| head.labels.len())
    }
}
