//! The run's report: JSON, Markdown, the adapter's model card.
