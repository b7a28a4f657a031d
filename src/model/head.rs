//! The head of a classifier or regression: an optional linear layer with an activation, then the
//! outputs, on the rows with a loss.

use candle_core::Tensor;

use super::block::Pass;
use crate::error::Result;
use crate::ops::{
    Activation, ActivationSaved, Context, Gradients, InputGradient, Linear, LinearInput,
    LinearSaved, LinearShape, LmHead, OutputLoss,
};
use crate::work::{Precision, Work};

/// What follows the blocks and their last norm.
#[derive(Debug, Clone, PartialEq)]
pub enum Head {
    /// Logits of the next token.
    Vocabulary,
    /// Logits of the class of a loss token.
    Classifier(ClassifierHead),
}

/// The data of a classifier's head.
#[derive(Debug, Clone, PartialEq)]
pub struct ClassifierHead {
    /// Path of the module that holds the output layer, which PEFT trains in full.
    pub module: &'static str,
    /// Path of a linear layer before the output.
    pub dense: Option<&'static str>,
    /// Of that layer's output.
    pub activation: Activation,
    /// Whether the layers have biases.
    pub bias: bool,
    /// The token whose output is classified.
    pub pooling: Pooling,
    /// Names of the outputs, by id.
    pub labels: Vec<String>,
    /// What the outputs mean.
    pub problem_type: ProblemType,
    /// Factor of the training loss of each class, by id; empty: 1.
    pub class_weights: Vec<f32>,
}

impl ClassifierHead {
    /// Whether the losses of a backward pass have the weights of their classes.
    pub(super) fn is_weighted(&self) -> bool {
        !self.class_weights.is_empty()
    }
}

/// What a head's outputs mean: transformers' `problem_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProblemType {
    /// One class of all.
    SingleLabel,
    /// Each label applies or not.
    MultiLabel,
    /// A number.
    Regression,
}

impl ProblemType {
    /// The words of config.json.
    pub const NAMES: [(Self, &str); 3] = [
        (Self::SingleLabel, "single_label_classification"),
        (Self::MultiLabel, "multi_label_classification"),
        (Self::Regression, "regression"),
    ];

    /// The word of config.json.
    pub fn name(self) -> &'static str {
        let mut names = Self::NAMES.into_iter();
        names
            .find(|(kind, _)| *kind == self)
            .map_or("", |(_, name)| name)
    }

    /// What a word of config.json names.
    pub fn from_name(name: &str) -> Option<Self> {
        let mut names = Self::NAMES.into_iter();
        names
            .find(|(_, known)| *known == name)
            .map(|(kind, _)| kind)
    }

    /// The loss of its outputs.
    pub(super) fn loss(self) -> OutputLoss {
        match self {
            Self::SingleLabel => OutputLoss::CrossEntropy,
            Self::MultiLabel => OutputLoss::BinaryCrossEntropy,
            Self::Regression => OutputLoss::SquaredError,
        }
    }
}

/// What a classifier gives classes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Classified {
    /// Records: `ForSequenceClassification`.
    Sequences,
    /// Tokens: `ForTokenClassification`.
    Tokens,
}

impl Classified {
    /// What the class in config.json's `architectures` classifies.
    pub(super) fn of_class(class: &str) -> Option<Self> {
        if class.ends_with("ForSequenceClassification") {
            Some(Self::Sequences)
        } else if class.ends_with("ForTokenClassification") {
            Some(Self::Tokens)
        } else {
            None
        }
    }

    /// PEFT's `task_type`.
    pub fn task_type(self) -> &'static str {
        match self {
            Self::Sequences => "SEQ_CLS",
            Self::Tokens => "TOKEN_CLS",
        }
    }

    /// What PEFT's `task_type` names.
    pub fn from_task_type(name: &str) -> Option<Self> {
        let all = [Self::Sequences, Self::Tokens].into_iter();
        all.into_iter()
            .find(|classified| classified.task_type() == name)
    }
}

/// The token of a segment whose output is classified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The first, `[CLS]`.
    First,
    /// The last.
    Last,
    /// Each token that has a class.
    Each,
}

/// The weights of the head.
#[derive(Debug)]
pub(super) enum DecoderHead {
    Vocabulary(Box<LmHead>),
    Classifier(Box<Classifier>),
}

/// A classifier's weights.
#[derive(Debug)]
pub(super) struct Classifier {
    /// C to C.
    pub(super) dense: Option<Linear>,
    pub(super) activation: Activation,
    /// C to K.
    pub(super) output: Linear,
    /// Path of `dense`.
    pub(super) dense_path: String,
    /// Path of `output`.
    pub(super) output_path: String,
}

/// Saved by [`Classifier::forward`] for `backward`.
pub(super) struct ClassifierSaved {
    /// (L, C).
    x: Tensor,
    dense: Option<(LinearSaved, ActivationSaved)>,
    /// The input of the output layer (L, C).
    pooled: Tensor,
    output: LinearSaved,
}

impl Classifier {
    /// x (L, C) -> logits (L, K); `pass`: over the loss rows.
    pub(super) fn forward(&self, pass: &Pass<'_>, x: &Tensor) -> Result<(Tensor, ClassifierSaved)> {
        let context = pass.context;
        let apply = |linear: &Linear, path: &str, x: &Tensor| {
            let input = LinearInput::new(context, x.clone())?;
            let mask = pass.mask(linear, path, &input);
            linear.forward_input(context, &input, mask, None)
        };
        let mut pooled = x.clone();
        let mut dense = None;
        if let Some(linear) = &self.dense {
            let (y, linear_saved) = apply(linear, &self.dense_path, x)?;
            let (y, activation_saved) = self.activation.forward(context, &y, None)?;
            pooled = y;
            dense = Some((linear_saved, activation_saved));
        }
        let (logits, output) = apply(&self.output, &self.output_path, &pooled)?;
        let saved = ClassifierSaved {
            x: x.clone(),
            dense,
            pooled,
            output,
        };
        Ok((logits, saved))
    }

    /// dlogits (L, K) -> dx (L, C) if `input_gradient`; adds the gradients of trained weights.
    pub(super) fn backward(
        &self,
        context: Context<'_>,
        dlogits: &Tensor,
        saved: &ClassifierSaved,
        input_gradient: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let dense_trained = self.dense.as_ref().is_some_and(Linear::is_trained);
        let below = InputGradient::when(input_gradient || dense_trained);
        let output = &saved.output;
        let pooled = Some(&saved.pooled);
        let dpooled = self
            .output
            .backward(context, dlogits, pooled, output, below, gradients)?;
        let (Some(dense), Some((linear, activation)), Some(dpooled)) =
            (&self.dense, &saved.dense, &dpooled)
        else {
            return Ok(dpooled);
        };
        let (dy, _) = self.activation.backward(context, dpooled, activation)?;
        let below = InputGradient::when(input_gradient);
        dense.backward(context, &dy, Some(&saved.x), linear, below, gradients)
    }
}

/// The layers of a classifier for the cost of one micro-batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct ClassifierShape {
    pub(super) dense: Option<LinearShape>,
    pub(super) activation: Activation,
    pub(super) output: LinearShape,
    pub(super) precision: Precision,
    pub(super) loss: OutputLoss,
    /// Whether classes have weights in training.
    pub(super) weighted: bool,
}

impl ClassifierShape {
    /// Elements of the pooled rows.
    fn pooled(&self) -> usize {
        self.output.tokens * self.output.in_features
    }

    /// Work of the logits and, with `backward`, of their gradients.
    fn losses_cost(&self, backward: bool) -> Work {
        let output = &self.output;
        let (rows, k) = (output.tokens, output.out_features);
        self.loss.cost(rows, k, self.weighted, backward)
    }

    fn logits_cost(&self) -> Work {
        let dense = self.dense.map(|dense| {
            dense.forward_cost(self.precision) + self.activation.cost(self.pooled(), false)
        });
        dense.unwrap_or_default() + self.output.forward_cost(self.precision)
    }

    /// Work of the losses.
    pub(super) fn forward_cost(&self) -> Work {
        self.logits_cost() + self.losses_cost(false)
    }

    /// Work of the losses and gradients.
    pub(super) fn backward_cost(&self, input_gradient: bool) -> Work {
        let dense_trained = self.dense.is_some_and(|dense| dense.is_trained());
        let below = input_gradient || dense_trained;
        let mut work = self.logits_cost() + self.losses_cost(true);
        work += &self.output.backward_cost(self.precision, below);
        if let Some(dense) = self.dense.filter(|_| below) {
            work += &self.activation.backward_cost(self.pooled(), false);
            work += &dense.backward_cost(self.precision, input_gradient);
        }
        work
    }
}
