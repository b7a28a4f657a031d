//! PiSSA and OLoRA: initial factors cut out of the base weight.
//!
//! Takes a weight W (out, in); returns A (r, in) and B (out, r), and W - s B A, which is trained on in place of W: the model
//! computes the same at first. PiSSA (Meng et al. 2024) takes the r largest singular values, W = U S V^T,
//! A = sqrt(S_r / s) V_r^T and B = U_r sqrt(S_r / s); OLoRA (Büyükakyüz 2024) the first r columns and rows of W = Q R. The same
//! weight gives the same bytes, whatever the number of threads. Knows nothing of models.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use crate::error::{Error, Kind, Result};
use crate::work::{Precision, Work};

use super::init::kaiming_uniform;
use super::merge::low_rank_row;
use super::options::LoraInit;
use super::peft::StoredValues;
use super::targets::{ModuleKind, Site};

/// Products with W^T W from which `pissa` reads its singular vectors: the others of its block decay by
/// (S_(k+1) / S_r)^(2 x 32), with a block of k = 2 r + 16.
const ITERATIONS: usize = 32;
/// Sweeps of Jacobi's method: it converges quadratically, in 6 to 10 for matrices of this size.
const SWEEPS: usize = 30;

/// Initial factors of a layer, whose base weight is W - scaling B A.
#[derive(Debug, Clone, PartialEq)]
pub struct Factors {
    /// (r, in).
    pub a: StoredValues,
    /// (out, r).
    pub b: StoredValues,
    /// The layer's.
    pub scaling: f64,
}

impl Factors {
    /// The factors of the weight `w` of `site`.
    ///
    /// # Errors
    /// A scheme that changes no base weight.
    pub fn new(init: LoraInit, w: Vec<f32>, site: &Site, seed: u64) -> Result<Self> {
        let w = Tensor::from_vec(w, (site.out_features, site.in_features), &Device::Cpu)?;
        let w = w.to_dtype(DType::F64)?;
        let [a, b] = match (init, subspace(init, site)) {
            (LoraInit::Olora, _) => orthonormal_factors(&w, site.r)?,
            (_, Some(subspace)) => principal_factors(&w, site, subspace, seed)?,
            _ => {
                return Err(
                    Error::new(Kind::Adapter, "the initialisation changes no base weight")
                        .value(init.to_string()),
                );
            }
        };
        let stored = |tensor: &Tensor| -> Result<StoredValues> {
            let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
            Ok(StoredValues {
                shape: tensor.dims().to_vec(),
                values,
            })
        };
        Ok(Self {
            a: stored(&a)?,
            b: stored(&b)?,
            scaling: site.scaling,
        })
    }

    /// Subtracts scaling B A from `w` (out, in).
    pub fn subtract_from(&self, w: &mut [f32]) {
        let [r, columns] = [self.a.shape[0], self.a.shape[1]];
        let scaling = self.scaling as f32;
        let rows = w
            .par_chunks_exact_mut(columns)
            .zip(self.b.values.par_chunks_exact(r));
        rows.for_each(|(w, b)| {
            let delta = low_rank_row(r, b, &self.a.values, columns);
            for (w, delta) in w.iter_mut().zip(delta) {
                *w -= scaling * delta;
            }
        });
    }
}

/// A block of vectors and the number of products with W^T W.
#[derive(Clone, Copy)]
struct Subspace {
    block: usize,
    iterations: usize,
}

/// How PiSSA's singular vectors of `site` are found; `None` for other schemes. `pissa_niter_N` is `torch.svd_lowrank` with
/// q = r, whose first product and N power iterations are N + 1 here.
fn subspace(init: LoraInit, site: &Site) -> Option<Subspace> {
    let smaller = site.in_features.min(site.out_features);
    let subspace = match init {
        LoraInit::Pissa => Subspace {
            block: smaller.min(2 * site.r + 16),
            iterations: ITERATIONS,
        },
        LoraInit::PissaNiter(n) => Subspace {
            block: site.r,
            iterations: n + 1,
        },
        _ => return None,
    };
    // All vectors at once: Jacobi's method alone finds them.
    let iterations = if subspace.block == smaller {
        0
    } else {
        subspace.iterations
    };
    Some(Subspace {
        iterations,
        ..subspace
    })
}

/// The matrix products of the initialisation of `site`, and of the change of its base weight.
pub fn initial_work(init: LoraInit, site: &Site) -> Work {
    let product = |m, n, k| Work::product(m, n, k, Precision::F32);
    let (out, columns, r) = (site.out_features, site.in_features, site.r);
    let (smaller, larger) = (out.min(columns), out.max(columns));
    let factors = match subspace(init, site) {
        Some(Subspace { block, iterations }) => {
            product(smaller, smaller, larger)
                + product(block, smaller, smaller).times(iterations as u64 + 1)
                + product(larger, r, smaller)
        }
        None if init == LoraInit::Olora => product(r, columns, out),
        None => return Work::default(),
    };
    factors + product(out, columns, r)
}

/// Refuses layers that `init` cannot be applied to.
///
/// # Errors
/// An embedding or the output embedding, and a rank above a layer's smaller dimension.
pub fn check_sites(init: LoraInit, sites: &[Site], output_embedding: &str) -> Result<()> {
    if !init.changes_the_base() {
        return Ok(());
    }
    let refuse = |what: &str, site: &Site| {
        Error::new(
            Kind::Adapter,
            format!("`init_lora_weights = \"{init}\"` {what}"),
        )
        .value(format!("`{}`", site.path))
    };
    for site in sites {
        if site.kind == ModuleKind::Embedding || site.path == output_embedding {
            return Err(refuse("is for layers between the embeddings", site)
                .hint("leave `embed_tokens` and `lm_head` out of `target_modules`"));
        }
        let most = site.in_features.min(site.out_features);
        if site.r > most {
            return Err(refuse(
                "has no more factors than the weight has singular values",
                site,
            )
            .rule(format!("a rank of at most {most}, not {}", site.r))
            .hint("lower `r`, or give this layer a rank of its own by `rank_pattern`"));
        }
    }
    Ok(())
}

/// A and B of PiSSA, from the eigenvectors of the smaller of W^T W and W W^T.
fn principal_factors(
    w: &Tensor,
    site: &Site,
    subspace: Subspace,
    seed: u64,
) -> Result<[Tensor; 2]> {
    let is_wide = site.out_features < site.in_features;
    let tall = if is_wide {
        w.t()?.contiguous()?
    } else {
        w.clone()
    };
    let gram = tall.t()?.matmul(&tall)?;
    let vectors = leading_eigenvectors(&gram, subspace, site, seed)?;
    // T = tall V = U S: (larger, r).
    let projected = tall.matmul(&vectors.t()?)?;
    let singular = projected.sqr()?.sum(0)?.sqrt()?;
    // A zero singular value has zero factors.
    let singular = singular.maximum(f64::MIN_POSITIVE)?;
    let of_projected = (&singular * site.scaling)?.sqrt()?.recip()?;
    let of_vectors = (singular / site.scaling)?.sqrt()?;
    let projected = projected.broadcast_mul(&of_projected)?;
    let vectors = vectors.broadcast_mul(&of_vectors.unsqueeze(1)?)?;
    Ok(if is_wide {
        [projected.t()?.contiguous()?, vectors.t()?.contiguous()?]
    } else {
        [vectors, projected]
    })
}

/// The eigenvectors (r, n) of the largest eigenvalues of `gram` (n, n): subspace iteration, then Rayleigh and Ritz.
fn leading_eigenvectors(
    gram: &Tensor,
    subspace: Subspace,
    site: &Site,
    seed: u64,
) -> Result<Tensor> {
    let n = gram.dim(0)?;
    let Subspace { block, iterations } = subspace;
    let mut basis = if block == n {
        Tensor::eye(n, DType::F64, &Device::Cpu)?
    } else {
        let start = kaiming_uniform(n, block, seed, &site.path);
        Tensor::from_vec(start, (block, n), &Device::Cpu)?.to_dtype(DType::F64)?
    };
    for _ in 0..iterations {
        basis = orthonormal_rows(&basis.matmul(gram)?)?;
    }
    let projected = basis.matmul(gram)?.matmul(&basis.t()?)?;
    let ritz = jacobi_eigenvectors(projected.to_vec2()?, site.r);
    let ritz = Tensor::new(ritz, &Device::Cpu)?;
    Ok(ritz.matmul(&basis)?)
}

/// A and B of OLoRA: the first r columns of Q, and the first r rows of R, zero left of the diagonal.
fn orthonormal_factors(w: &Tensor, r: usize) -> Result<[Tensor; 2]> {
    let q = orthonormal_rows(&w.narrow(1, 0, r)?.t()?.contiguous()?)?;
    let upper = Tensor::triu2(r, DType::F64, &Device::Cpu)?;
    let a = q.matmul(w)?;
    let [left, right] = [a.narrow(1, 0, r)?, a.narrow(1, r, w.dim(1)? - r)?];
    let a = Tensor::cat(&[(left * upper)?, right], 1)?;
    Ok([a, q.t()?.contiguous()?])
}

/// The rows of `matrix` made orthonormal in order, by the modified Gram-Schmidt method applied twice; a row that depends on earlier
/// ones becomes zero.
fn orthonormal_rows(matrix: &Tensor) -> Result<Tensor> {
    let mut rows: Vec<Vec<f64>> = matrix.to_vec2()?;
    for i in 0..rows.len() {
        let (before, rest) = rows.split_at_mut(i);
        let row = &mut rest[0];
        let length = dot(row, row).sqrt();
        for _ in 0..2 {
            for earlier in before.iter() {
                let part = dot(earlier, row);
                row.iter_mut()
                    .zip(earlier)
                    .for_each(|(x, e)| *x -= part * e);
            }
        }
        let left = dot(row, row).sqrt();
        let scale = if left > 1e-12 * length {
            left.recip()
        } else {
            0.0
        };
        row.iter_mut().for_each(|x| *x *= scale);
    }
    Ok(Tensor::new(rows, &Device::Cpu)?)
}

/// The eigenvectors of the r largest eigenvalues of a symmetric positive semidefinite matrix, largest first: rotations make its
/// rows orthogonal (Hestenes 1958), which are then eigenvalue times eigenvector.
fn jacobi_eigenvectors(mut rows: Vec<Vec<f64>>, r: usize) -> Vec<Vec<f64>> {
    for _ in 0..SWEEPS {
        let mut rotated = false;
        for i in 0..rows.len() {
            let (head, tail) = rows.split_at_mut(i + 1);
            for other in tail {
                rotated |= make_orthogonal(&mut head[i], other);
            }
        }
        if !rotated {
            break;
        }
    }
    rows.sort_by(|x, y| dot(y, y).total_cmp(&dot(x, x)));
    rows.truncate(r);
    for row in &mut rows {
        let length = dot(row, row).sqrt();
        let scale = if length > 0.0 { length.recip() } else { 0.0 };
        row.iter_mut().for_each(|x| *x *= scale);
    }
    rows
}

/// Rotates two rows until they are orthogonal; `false` if they were.
fn make_orthogonal(x: &mut [f64], y: &mut [f64]) -> bool {
    let (xx, yy, xy) = (dot(x, x), dot(y, y), dot(x, y));
    if xy.abs() <= 1e-15 * (xx * yy).sqrt() {
        return false;
    }
    let zeta = (yy - xx) / (2.0 * xy);
    let tangent = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
    let cosine = (1.0 + tangent * tangent).sqrt().recip();
    let sine = cosine * tangent;
    for (x, y) in x.iter_mut().zip(y) {
        let old = *x;
        *x = cosine * old - sine * *y;
        *y = sine * old + cosine * *y;
    }
    true
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(out_features: usize, in_features: usize, r: usize) -> Site {
        Site {
            path: "m.q".into(),
            in_features,
            out_features,
            r,
            lora_alpha: 6.0,
            scaling: 1.5,
            kind: ModuleKind::Linear,
        }
    }

    /// U S V^T with known factors: columns of reflections I - 2 v v^T / (v^T v), singular values 10, 9, ...
    fn known(out: usize, columns: usize) -> Vec<f32> {
        let reflection = |n: usize, i: usize, j: usize| {
            let v = |i: usize| 1.0 + i as f64;
            let square: f64 = (0..n).map(|i| v(i) * v(i)).sum();
            f64::from(u8::from(i == j)) - 2.0 * v(i) * v(j) / square
        };
        let mut w = vec![0.0; out * columns];
        for (row, w) in w.chunks_exact_mut(columns).enumerate() {
            for (column, w) in w.iter_mut().enumerate() {
                let terms = (0..out.min(columns)).map(|k| {
                    reflection(out, row, k) * (10.0 - k as f64) * reflection(columns, column, k)
                });
                *w = terms.sum::<f64>() as f32;
            }
        }
        w
    }

    #[test]
    fn pissa_takes_the_largest_singular_values() {
        for (out, columns) in [(5, 9), (9, 5), (10, 10)] {
            let site = site(out, columns, 3);
            let w = known(out, columns);
            for init in [LoraInit::Pissa, LoraInit::PissaNiter(60)] {
                let factors = Factors::new(init, w.clone(), &site, 7).unwrap();
                // |A_i|^2 = |B_i|^2 = S_i / s.
                for i in 0..3 {
                    let a: f32 = factors.a.values[i * columns..][..columns]
                        .iter()
                        .map(|x| x * x)
                        .sum();
                    let b: f32 = (0..out)
                        .map(|row| factors.b.values[row * 3 + i].powi(2))
                        .sum();
                    let expected = (10.0 - i as f32) / 1.5;
                    assert!(
                        (a - expected).abs() < 1e-4 && (b - expected).abs() < 1e-4,
                        "{init}: {a} {b}"
                    );
                }
                // What is left has the other singular values: its squares sum to theirs.
                let mut rest = w.clone();
                factors.subtract_from(&mut rest);
                let squares: f32 = rest.iter().map(|x| x * x).sum();
                let others: f32 = (3..out.min(columns))
                    .map(|k| (10.0 - k as f32).powi(2))
                    .sum();
                assert!(
                    (squares - others).abs() < 1e-3,
                    "{init}: {squares}, {others}"
                );
            }
        }
    }

    #[test]
    fn olora_takes_the_first_columns() {
        let site = site(6, 8, 3);
        let w = known(6, 8);
        let factors = Factors::new(LoraInit::Olora, w.clone(), &site, 7).unwrap();
        let mut rest: Vec<f32> = w.iter().map(|x| 1.5 * x).collect();
        // B A equals W in its first columns.
        factors.subtract_from(&mut rest);
        let left = rest.chunks_exact(8).flat_map(|row| &row[..3]);
        assert!(left.into_iter().all(|x| x.abs() < 1e-4), "{rest:?}");
        assert!(rest.chunks_exact(8).any(|row| row[3].abs() > 0.1));
        let below = [
            factors.a.values[8],
            factors.a.values[16],
            factors.a.values[17],
        ];
        assert_eq!(below, [0.0; 3]);
    }

    #[test]
    fn layers_without_such_factors_are_refused() {
        let embedding = Site {
            kind: ModuleKind::Embedding,
            ..site(4, 9, 2)
        };
        for (site, word) in [(embedding, "embed_tokens"), (site(4, 9, 5), "at most 4")] {
            let sites = std::slice::from_ref(&site);
            let error = check_sites(LoraInit::Pissa, sites, "")
                .unwrap_err()
                .to_string();
            assert!(error.contains(word), "{error}");
            check_sites(LoraInit::Gaussian, sites, "").unwrap();
        }
        assert!(check_sites(LoraInit::Olora, &[site(4, 9, 2)], "m.q").is_err());
    }
}
