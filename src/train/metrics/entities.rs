//! Named entities from tags of the schemes IOB, IOE and IOBES, as seqeval finds them without its strict mode
//! (<https://github.com/chakki-works/seqeval>): precision, recall and F1 over entities of the right type and extent.

/// A tag: `B-PER` is B and PER; `O` is outside of all entities.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Tag {
    position: char,
    kind: String,
}

/// An entity's type, first and last word.
type Entity = (String, usize, usize);

/// Counts of entities.
#[derive(Debug, Clone)]
pub(super) struct EntityCounts {
    tags: Vec<Tag>,
    truths: u64,
    predictions: u64,
    correct: u64,
}

impl Tag {
    fn parse(label: &str) -> Option<Self> {
        let (position, kind) = match label.split_once('-') {
            None if label == "O" => ("O", ""),
            None => return None,
            Some(parts) => parts,
        };
        let known = ["O", "B", "I", "E", "S"].contains(&position);
        known.then(|| Self {
            position: position.chars().next().unwrap_or('O'),
            kind: kind.to_string(),
        })
    }

    fn outside() -> Self {
        Self {
            position: 'O',
            kind: String::new(),
        }
    }

    /// Whether an entity ends between `self` and `next`.
    fn ends_before(&self, next: &Self) -> bool {
        match (self.position, next.position) {
            ('O', _) => false,
            ('E' | 'S', _) | ('B' | 'I', 'B' | 'S' | 'O') => true,
            _ => self.kind != next.kind,
        }
    }

    /// Whether an entity begins at `self`, after `previous`.
    fn begins_after(&self, previous: &Self) -> bool {
        match (previous.position, self.position) {
            (_, 'O') => false,
            (_, 'B' | 'S') | ('E' | 'S' | 'O', _) => true,
            _ => previous.kind != self.kind,
        }
    }
}

impl EntityCounts {
    /// None yet; `None` if the labels are not all tags.
    pub(super) fn new(labels: &[String]) -> Option<Self> {
        let tags = labels.iter().map(|label| Tag::parse(label));
        Some(Self {
            tags: tags.collect::<Option<_>>()?,
            truths: 0,
            predictions: 0,
            correct: 0,
        })
    }

    /// Counts those of a record by the classes of its words.
    pub(super) fn add(&mut self, truth: &[usize], predicted: &[usize]) {
        let truths = self.entities(truth);
        let predictions = self.entities(predicted);
        self.truths += truths.len() as u64;
        self.predictions += predictions.len() as u64;
        let right = predictions.iter().filter(|entity| truths.contains(entity));
        self.correct += right.count() as u64;
    }

    fn entities(&self, classes: &[usize]) -> Vec<Entity> {
        let (mut entities, mut start) = (Vec::new(), 0);
        let mut previous = Tag::outside();
        let tags = classes.iter().map(|class| self.tags[*class].clone());
        for (i, tag) in tags.chain([Tag::outside()]).enumerate() {
            if previous.ends_before(&tag) {
                entities.push((previous.kind.clone(), start, i - 1));
            }
            if tag.begins_after(&previous) {
                start = i;
            }
            previous = tag;
        }
        entities
    }

    pub(super) fn precision(&self) -> f64 {
        share(self.correct, self.predictions)
    }

    pub(super) fn recall(&self) -> f64 {
        share(self.correct, self.truths)
    }

    pub(super) fn f1(&self) -> f64 {
        share(2 * self.correct, self.predictions + self.truths)
    }
}

/// 0 of nothing.
fn share(part: u64, of: u64) -> f64 {
    if of == 0 {
        return 0.0;
    }
    part as f64 / of as f64
}
