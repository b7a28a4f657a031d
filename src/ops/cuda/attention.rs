//! Attention by the kernels of attention_forward.cu and attention_backward.cu, on tensor cores.

use candle_core::{DType, Device, Tensor};

use super::launch::{Arg, AttentionShape, Launch, output};
use crate::error::Result;
use crate::ops::storage::to_f32_contiguous;
use crate::ops::{Attention, Context, Segments};
use crate::work::Precision;

/// Rows of a tile.
const TILE: usize = 64;
/// Threads of a block.
const THREADS: usize = 128;

/// Kernels for heads of up to `padded` channels: rows of their tiles of keys and of queries, and columns of dk and dv that a
/// block sums.
struct Sizes {
    padded: usize,
    keys: usize,
    queries: usize,
    columns: usize,
}

const SIZES: [Sizes; 3] = [
    Sizes {
        padded: 64,
        keys: 64,
        queries: 64,
        columns: 64,
    },
    Sizes {
        padded: 128,
        keys: 64,
        queries: 32,
        columns: 128,
    },
    Sizes {
        padded: 256,
        keys: 32,
        queries: 32,
        columns: 128,
    },
];

impl Sizes {
    fn of(head_dim: usize) -> Option<&'static Self> {
        SIZES.iter().find(|sizes| head_dim <= sizes.padded)
    }

    /// Bytes of `rows` rows in shared memory.
    fn bytes(&self, rows: usize) -> usize {
        size_of::<u16>() * rows * (self.padded + 8)
    }
}

/// What both passes share: the kernels, the tiles of all segments, the layer.
struct Pass {
    sizes: &'static Sizes,
    /// First row, end, and the segment's, (tiles, 4) u32.
    tiles: Tensor,
    shape: AttentionShape,
}

impl Attention {
    /// Whether the kernels take this layer: in bf16, heads of at most 256 channels.
    pub(in crate::ops) fn has_kernel(&self, context: Context<'_>) -> bool {
        context.precision == Precision::Bf16 && Sizes::of(self.head_dim).is_some()
    }

    fn pass(&self, segments: &Segments, device: &Device) -> Result<Pass> {
        let tiles = segments.ranges().iter().flat_map(|range| {
            let starts = range.clone().step_by(TILE);
            starts.flat_map(|start| {
                [start, (start + TILE).min(range.end), range.start, range.end].map(|x| x as u32)
            })
        });
        let tiles: Vec<u32> = tiles.collect();
        let count = tiles.len() / 4;
        Ok(Pass {
            sizes: Sizes::of(self.head_dim).unwrap_or(&SIZES[SIZES.len() - 1]),
            tiles: Tensor::from_vec(tiles, (count, 4), device)?,
            shape: AttentionShape {
                heads: self.heads as i32,
                kv_heads: self.kv_heads as i32,
                head_dim: self.head_dim as i32,
                causal: i32::from(self.causal),
                window: self
                    .window
                    .map_or(0, |window| i32::try_from(window).unwrap_or(0)),
                scale: self.scale() as f32,
                softcap: self.softcap.unwrap_or(0.0) as f32,
            },
        })
    }

    /// q (N, Hq D), k, v (N, Hkv D) in bf16 -> the output (N, Hq D) in bf16 and the log-sum-exp (N, Hq).
    pub(in crate::ops) fn forward_cuda(
        &self,
        qkv: [&Tensor; 3],
        segments: &Segments,
    ) -> Result<(Tensor, Tensor)> {
        let (n, width) = qkv[0].dims2()?;
        let device = qkv[0].device();
        let pass = self.pass(segments, device)?;
        let [q, k, v] = contiguous(qkv)?;
        let out = output(device, DType::BF16, (n, width))?;
        let lse = output(device, DType::F32, (n, self.heads))?;
        let args = [
            Arg::from(&q),
            Arg::from(&k),
            Arg::from(&v),
            Arg::from(&out),
            Arg::from(&lse),
            Arg::from(&pass.tiles),
            Arg::Shape(pass.shape),
        ];
        let rows = TILE + 2 * pass.sizes.keys;
        pass.run("attention_forward", "", [self.heads, 1], rows, &args)?;
        Ok((out, lse))
    }

    /// dout (N, Hq D), q, k, v and out in bf16, the log-sum-exp (N, Hq) -> dq, dk and dv in f32.
    pub(in crate::ops) fn backward_cuda(
        &self,
        dout: &Tensor,
        qkv: [&Tensor; 3],
        out: &Tensor,
        lse: &Tensor,
        segments: &Segments,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let (n, width) = out.dims2()?;
        let (device, kv_width) = (out.device(), self.kv_heads * self.head_dim);
        let pass = self.pass(segments, device)?;
        let [q, k, v] = contiguous(qkv)?;
        let (dout, delta) = self.delta(dout, out)?;
        let dq = output(device, DType::F32, (n, width))?;
        let [dk, dv] = [(); 2].map(|()| output(device, DType::F32, (n, kv_width)));
        let (dk, dv) = (dk?, dv?);
        let inputs = [&q, &k, &v, &dout, lse, &delta].map(Arg::from);
        let last = [Arg::from(&pass.tiles), Arg::Shape(pass.shape)];
        let args = [&inputs[..], &[Arg::from(&dq)], &last].concat();
        let sizes = pass.sizes;
        let source = "attention_backward";
        let rows = 2 * TILE + 2 * sizes.keys;
        pass.run(source, "_queries", [self.heads, 1], rows, &args)?;
        let args = [&inputs[..], &[Arg::from(&dk), Arg::from(&dv)], &last].concat();
        let rows = 2 * TILE + 2 * sizes.queries;
        let blocks = [self.kv_heads, sizes.padded / sizes.columns];
        pass.run(source, "_keys", blocks, rows, &args)?;
        Ok((dq, dk, dv))
    }

    /// dout in bf16, and rowsum(dout * out) of each head, (N, Hq).
    fn delta(&self, dout: &Tensor, out: &Tensor) -> Result<(Tensor, Tensor)> {
        let (n, width) = out.dims2()?;
        let device = out.device();
        let dout = to_f32_contiguous(dout)?;
        let narrow = output(device, DType::BF16, (n, width))?;
        let delta = output(device, DType::F32, (n, self.heads))?;
        let args = [
            Arg::from(&dout),
            Arg::from(out),
            Arg::from(&narrow),
            Arg::from(&delta),
            Arg::Long(n * self.heads),
            Arg::Int(self.head_dim),
        ];
        let launch = Launch {
            source: "attention_backward",
            kernel: "attention_delta",
            grid: [(n * self.heads).div_ceil(4), 1, 1],
            block: [32, 4, 1],
            shared: 0,
        };
        launch.run(device, &args)?;
        Ok((narrow, delta))
    }
}

impl Pass {
    /// Runs the kernel `source + pass` with a block a tile, of `blocks` in y and z, and `rows` rows in shared memory.
    fn run(
        &self,
        source: &'static str,
        pass: &str,
        blocks: [usize; 2],
        rows: usize,
        args: &[Arg<'_>],
    ) -> Result<()> {
        let kernel = format!("{source}{pass}_{}", self.sizes.padded);
        let launch = Launch {
            source,
            kernel: &kernel,
            grid: [self.tiles.dims2()?.0, blocks[0], blocks[1]],
            block: [THREADS, 1, 1],
            shared: self.sizes.bytes(rows),
        };
        launch.run(self.tiles.device(), args)
    }
}

fn contiguous([q, k, v]: [&Tensor; 3]) -> Result<[Tensor; 3]> {
    Ok([q.contiguous()?, k.contiguous()?, v.contiguous()?])
}
