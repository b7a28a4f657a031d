//! The seven linear layers of a block, by their names in the checkpoint.

/// One value for each linear layer of a block, such as a layer, its saved tensors or its shape.
#[derive(Debug, Clone, PartialEq)]
pub struct Linears<T> {
    /// `self_attn.q_proj`
    pub q_proj: T,
    /// `self_attn.k_proj`
    pub k_proj: T,
    /// `self_attn.v_proj`
    pub v_proj: T,
    /// `self_attn.o_proj`
    pub o_proj: T,
    /// `mlp.gate_proj`
    pub gate_proj: T,
    /// `mlp.up_proj`
    pub up_proj: T,
    /// `mlp.down_proj`
    pub down_proj: T,
}

/// Their names inside a block, in model order.
pub(super) const LINEAR_NAMES: Linears<&str> = Linears {
    q_proj: "self_attn.q_proj",
    k_proj: "self_attn.k_proj",
    v_proj: "self_attn.v_proj",
    o_proj: "self_attn.o_proj",
    gate_proj: "mlp.gate_proj",
    up_proj: "mlp.up_proj",
    down_proj: "mlp.down_proj",
};

impl<T> Linears<T> {
    fn from_array(
        [
            q_proj,
            k_proj,
            v_proj,
            o_proj,
            gate_proj,
            up_proj,
            down_proj,
        ]: [T; 7],
    ) -> Self {
        Self {
            q_proj,
            k_proj,
            v_proj,
            o_proj,
            gate_proj,
            up_proj,
            down_proj,
        }
    }

    /// The values in model order.
    pub fn into_array(self) -> [T; 7] {
        [
            self.q_proj,
            self.k_proj,
            self.v_proj,
            self.o_proj,
            self.gate_proj,
            self.up_proj,
            self.down_proj,
        ]
    }

    /// References to the values.
    pub fn as_ref(&self) -> Linears<&T> {
        Linears {
            q_proj: &self.q_proj,
            k_proj: &self.k_proj,
            v_proj: &self.v_proj,
            o_proj: &self.o_proj,
            gate_proj: &self.gate_proj,
            up_proj: &self.up_proj,
            down_proj: &self.down_proj,
        }
    }

    /// Applies `f` to each value, in model order.
    pub fn map<U>(self, f: impl FnMut(T) -> U) -> Linears<U> {
        Linears::from_array(self.into_array().map(f))
    }

    /// Pairs the values with those of `other`.
    pub fn zip<U>(self, other: Linears<U>) -> Linears<(T, U)> {
        let mut others = other.into_array().into_iter();
        self.map(|value| (value, others.next().expect("both have seven")))
    }

    /// Whether `test` holds for any value.
    pub fn any(&self, test: impl FnMut(&T) -> bool) -> bool {
        self.as_ref().into_array().into_iter().any(test)
    }
}

impl<T, E> Linears<Result<T, E>> {
    /// The values, or the first error in model order.
    pub fn transpose(self) -> Result<Linears<T>, E> {
        Ok(Linears {
            q_proj: self.q_proj?,
            k_proj: self.k_proj?,
            v_proj: self.v_proj?,
            o_proj: self.o_proj?,
            gate_proj: self.gate_proj?,
            up_proj: self.up_proj?,
            down_proj: self.down_proj?,
        })
    }
}
