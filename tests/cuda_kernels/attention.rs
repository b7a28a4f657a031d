//! Attention, forward and backward, on emulated tensor cores.

use wattune::ops::{Attention, Segments};

use super::harness::{Arg, Buffer, Device, in_every_order, largest, within};
use super::{random, random_bf16, reference, tensor, values};

/// Rows of a tile.
const TILE: usize = 64;

/// A case: the layer, the segments, and the kernels' padded head dimension with their tiles of keys and of queries.
struct Case {
    attention: Attention,
    lengths: &'static [usize],
    padded: usize,
    keys: usize,
    queries: usize,
    columns: usize,
}

fn case(heads: [usize; 3], lengths: &'static [usize]) -> Case {
    let [heads, kv_heads, head_dim] = heads;
    let sizes = match head_dim {
        0..=64 => [64, 64, 64, 64],
        65..=128 => [128, 64, 32, 128],
        _ => [256, 32, 32, 128],
    };
    let [padded, keys, queries, columns] = sizes;
    let attention = Attention {
        heads,
        kv_heads,
        head_dim,
        causal: true,
        window: None,
        scale: None,
        softcap: None,
    };
    Case {
        attention,
        lengths,
        padded,
        keys,
        queries,
        columns,
    }
}

fn cases() -> Vec<Case> {
    let with = |mut case: Case, change: fn(&mut Attention)| {
        change(&mut case.attention);
        case
    };
    vec![
        case([2, 1, 64], &[1, 70, 3]),
        with(case([1, 1, 20], &[65, 2]), |a| a.causal = false),
        with(case([2, 2, 80], &[130]), |a| a.window = Some(40)),
        with(case([1, 1, 16], &[75]), |a| {
            (a.causal, a.window) = (false, Some(5));
        }),
        with(case([1, 1, 8], &[9, 66]), |a| a.window = Some(1)),
        with(case([2, 1, 128], &[67]), |a| {
            (a.softcap, a.scale) = (Some(2.0), Some(0.3));
        }),
        case([1, 1, 256], &[35]),
    ]
}

impl Case {
    fn segments(&self) -> Segments {
        Segments::from_lengths(self.lengths.iter().copied())
    }

    /// The tiles of all segments: first row, end, and the segment's.
    fn tiles(&self) -> Vec<u32> {
        let ranges = self.segments();
        let tiles = ranges.ranges().iter().flat_map(|range| {
            let starts = range.clone().step_by(TILE);
            starts.map(move |start| [start, (start + TILE).min(range.end), range.start, range.end])
        });
        tiles.flatten().map(|x| x as u32).collect()
    }

    fn shape(&self) -> Arg {
        let a = &self.attention;
        Arg::Fields(vec![
            a.heads as u32,
            a.kv_heads as u32,
            a.head_dim as u32,
            u32::from(a.causal),
            a.window.unwrap_or(0) as u32,
            (a.scale.unwrap_or(1.0 / (a.head_dim as f64).sqrt()) as f32).to_bits(),
            (a.softcap.unwrap_or(0.0) as f32).to_bits(),
        ])
    }

    /// Bytes of this many rows in shared memory.
    fn shared(&self, rows: usize) -> usize {
        2 * rows * (self.padded + 8)
    }

    /// q, k and v, some scores of which are large.
    fn inputs(&self) -> [Vec<f32>; 3] {
        let n = self.segments().tokens() * self.attention.head_dim;
        let large = |x: Vec<f32>| x.iter().map(|x| 2.0 * x).collect();
        let kv = n * self.attention.kv_heads;
        [
            large(random_bf16(40, n * self.attention.heads)),
            large(random_bf16(41, kv)),
            random_bf16(42, kv),
        ]
    }

    /// The output and the log-sum-exp.
    fn forward(&self, device: &Device, [q, k, v]: [&Buffer; 3], tiles: &Buffer) -> [Buffer; 2] {
        let (a, tokens) = (&self.attention, self.segments().tokens());
        let out = Buffer::bf16_output(tokens * a.heads * a.head_dim);
        let lse = Buffer::f32_output(tokens * a.heads);
        let args = [
            q.arg(),
            k.arg(),
            v.arg(),
            out.arg(),
            lse.arg(),
            tiles.arg(),
            self.shape(),
        ];
        let kernel = format!("attention_forward_{}", self.padded);
        let grid = [self.tiles().len() / 4, a.heads, 1];
        let shared = self.shared(TILE + 2 * self.keys);
        device.launch(&kernel, grid, [128, 1, 1], shared, &args);
        [out, lse]
    }

    /// dq, dk and dv.
    fn backward(&self, device: &Device, qkv: [&Buffer; 3], dout: &[f32]) -> Vec<Vec<f32>> {
        let (a, tokens) = (&self.attention, self.segments().tokens());
        let tiles = Buffer::new(&self.tiles());
        let [out, lse] = self.forward(device, qkv, &tiles);
        let dout = Buffer::new(dout);
        let narrow = Buffer::bf16_output(tokens * a.heads * a.head_dim);
        let delta = Buffer::f32_output(tokens * a.heads);
        let count = tokens * a.heads;
        let mut args = vec![dout.arg(), out.arg(), narrow.arg(), delta.arg()];
        args.extend([Arg::Long(count as i64), Arg::Int(a.head_dim as i32)]);
        device.launch(
            "attention_delta",
            [count.div_ceil(4), 1, 1],
            [32, 4, 1],
            0,
            &args,
        );
        let inputs = || {
            let [q, k, v] = qkv.map(Buffer::arg);
            vec![q, k, v, narrow.arg(), lse.arg(), delta.arg()]
        };
        let dq = Buffer::f32_output(count * a.head_dim);
        let [dk, dv] = [(); 2].map(|()| Buffer::f32_output(tokens * a.kv_heads * a.head_dim));
        let count = self.tiles().len() / 4;
        let mut args = inputs();
        args.extend([dq.arg(), tiles.arg(), self.shape()]);
        let kernel = format!("attention_backward_queries_{}", self.padded);
        let shared = self.shared(2 * TILE + 2 * self.keys);
        device.launch(&kernel, [count, a.heads, 1], [128, 1, 1], shared, &args);
        let mut args = inputs();
        args.extend([dk.arg(), dv.arg(), tiles.arg(), self.shape()]);
        let kernel = format!("attention_backward_keys_{}", self.padded);
        let shared = self.shared(2 * TILE + 2 * self.queries);
        let grid = [count, a.kv_heads, self.padded / self.columns];
        device.launch(&kernel, grid, [128, 1, 1], shared, &args);
        vec![out.bf16s(), lse.f32s(), dq.f32s(), dk.f32s(), dv.f32s()]
    }

    /// What `backward` returns, by the op's reference.
    fn reference(&self, qkv: &[Vec<f32>; 3], dout: &[f32]) -> Vec<Vec<f32>> {
        let (a, segments) = (&self.attention, self.segments());
        let (n, d) = (segments.tokens(), a.head_dim);
        let [q, k, v] = qkv;
        let q = tensor(q, (n, a.heads * d));
        let [k, v] = [k, v].map(|x| tensor(x, (n, a.kv_heads * d)));
        let dout = tensor(dout, (n, a.heads * d));
        let (out, grads) = reference(|c| {
            let (out, saved) = a.forward(c, q, k, v, &segments).unwrap();
            (out, a.backward(c, &dout, &saved, &segments).unwrap())
        });
        [out, grads.0, grads.1, grads.2]
            .iter()
            .map(values)
            .collect()
    }
}

#[test]
fn attention_and_its_gradients_equal_the_reference() {
    for case in cases() {
        let qkv = case.inputs();
        let dout = random(43, qkv[0].len());
        let name = format!("{:?} over {:?}", case.attention, case.lengths);
        let found = in_every_order(&name, |device| {
            let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(|x| Buffer::bf16(x));
            case.backward(device, [&q, &k, &v], &dout)
        });
        let Some(mut found) = found else { return };
        // Checked through the gradients, which are computed from it.
        found.remove(1);
        let expected = case.reference(&qkv, &dout);
        for ((part, found), expected) in ["out", "dq", "dk", "dv"].iter().zip(&found).zip(&expected)
        {
            // Probabilities, ds and dout are rounded to bf16; so is out, of which delta is made, where dq is 0.
            let bound = 0.012 * largest(expected).max(0.3);
            within(&format!("{name}: {part}"), found, expected, bound);
        }
    }
}
