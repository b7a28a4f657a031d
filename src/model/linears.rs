//! The linear layers of a block.

/// One value for each linear layer of a block, such as a layer, its saved tensors or its shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Linears<T> {
    /// q, k and v; or one layer with the columns of all three.
    pub(super) qkv: Vec<T>,
    /// The attention's output.
    pub(super) o: T,
    /// gate and up; or one layer with the columns of both; or the one before the activation where
    /// nothing gates it.
    pub(super) gate_up: Vec<T>,
    /// The output of the MLP; `None` where experts are in place of both.
    pub(super) down: Option<T>,
}

impl<T> Linears<T> {
    /// The values in model order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        let qkv = self.qkv.iter().chain([&self.o]);
        qkv.chain(&self.gate_up).chain(&self.down)
    }

    /// Applies `f` to each value, in model order.
    pub(super) fn map<U>(&self, mut f: impl FnMut(&T) -> U) -> Linears<U> {
        Linears {
            qkv: self.qkv.iter().map(&mut f).collect(),
            o: f(&self.o),
            gate_up: self.gate_up.iter().map(&mut f).collect(),
            down: self.down.as_ref().map(f),
        }
    }

    /// Applies `f` to each value, in model order, up to the first error.
    pub(super) fn try_map<U, E>(
        &self,
        mut f: impl FnMut(&T) -> Result<U, E>,
    ) -> Result<Linears<U>, E> {
        Ok(Linears {
            qkv: self.qkv.iter().map(&mut f).collect::<Result<_, E>>()?,
            o: f(&self.o)?,
            gate_up: self.gate_up.iter().map(&mut f).collect::<Result<_, E>>()?,
            down: self.down.as_ref().map(f).transpose()?,
        })
    }
}
