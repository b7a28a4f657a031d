//! GEMM against f64 sums, on every instruction set of this CPU.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use half::bf16;
use proptest::prelude::*;

use super::blocked::TASKS_PER_PACK;
use super::schedule::par_for_each_task;
use super::*;
use crate::ops::tests::{cases, uniform, with};

/// Values exact in bf16, so that both formats have one expected value.
fn exact_values(seed: u64, n: usize) -> Vec<f32> {
    uniform(seed, n)
        .iter()
        .map(|u| bf16::from_f32(2.0 * u - 1.0).to_f32())
        .collect()
}

/// A matrix in both formats, row-major or transposed.
struct TestMatrix {
    wide: Vec<f32>,
    narrow: Vec<bf16>,
    rows: usize,
    columns: usize,
    transposed: bool,
    bf16: bool,
}

impl TestMatrix {
    fn new(seed: u64, rows: usize, columns: usize, transposed: bool, bf16: bool) -> Self {
        let wide = exact_values(seed, rows * columns);
        let narrow = wide.iter().map(|x| half::bf16::from_f32(*x)).collect();
        Self {
            wide,
            narrow,
            rows,
            columns,
            transposed,
            bf16,
        }
    }

    fn matrix(&self) -> MatRef<'_> {
        self.with_cache(None)
    }

    /// The matrix with a cache of packed forms.
    fn with_cache<'a>(&'a self, cache: Option<&'a PackedWeightCache>) -> MatRef<'a> {
        let values = if self.bf16 {
            CpuSlice::Bf16(&self.narrow)
        } else {
            CpuSlice::F32(&self.wide)
        };
        if self.transposed {
            let stored = MatRef::new(values, self.columns, self.rows);
            stored.with_cache(cache).t()
        } else {
            MatRef::new(values, self.rows, self.columns).with_cache(cache)
        }
    }

    fn at(&self, row: usize, column: usize) -> f64 {
        f64::from(
            self.wide[if self.transposed {
                column * self.rows + row
            } else {
                row * self.columns + column
            }],
        )
    }
}

type Terms = [(TestMatrix, TestMatrix)];

/// Sums of products in `precision` against f64, on these numbers of threads; some B's cached in
/// packed form, which changes no bit.
fn check(
    isa: &'static Isa,
    precision: Precision,
    terms: &Terms,
    init: Init<'_>,
    threads: &[usize],
) {
    let caches: Vec<PackedWeightCache> =
        terms.iter().map(|_| PackedWeightCache::default()).collect();
    let sum = |threads: usize, cached: Range<usize>| {
        crate::ops::tests::on(threads, || {
            let lhs: Vec<Lhs<'_>> = terms
                .iter()
                .map(|(a, _)| Lhs::with_isa(isa, precision, a.matrix()))
                .collect();
            let term = |index: usize| GemmTerm {
                lhs: &lhs[index],
                rhs: (terms[index].1).with_cache(cached.contains(&index).then(|| &caches[index])),
            };
            let views: Vec<_> = (0..terms.len()).map(term).collect();
            gemm_sum_with(isa, &views, init)
        })
    };
    let got = sum(threads[0], 0..0);
    let alone = threads[1..].iter().map(|threads| (*threads, 0..0));
    let cached = [0..1, 0..terms.len(), 1..terms.len()];
    let cached = cached.map(|cached| (threads[threads.len() - 1], cached));
    for (threads, cached) in alone.chain(cached) {
        assert_eq!(
            bits(&got),
            bits(&sum(threads, cached.clone())),
            "{}: bits on {threads} threads with B of terms {cached:?} cached",
            isa.name
        );
    }
    check_close(isa, &got, terms, init);
}

fn check_close(isa: &Isa, got: &[f32], terms: &Terms, init: Init<'_>) {
    let m = terms[0].0.rows;
    let n = terms[0].1.columns;
    let depth: usize = terms.iter().map(|(a, _)| a.columns).sum();
    // Factors are below 1: each addition is off by at most half of EPSILON times the largest
    // partial sum.
    let off = (depth + 2) as f64 * (depth + 1) as f64 / 2.0;
    let bound = (off * f64::from(f32::EPSILON)).min(2e-3);
    for (index, (got, init)) in got.iter().zip(init.to_vec(m, n)).enumerate() {
        let (row, column) = (index / n, index % n);
        let sum = |(a, b): &(TestMatrix, TestMatrix)| -> f64 {
            (0..a.columns).map(|k| a.at(row, k) * b.at(k, column)).sum()
        };
        let want = f64::from(init) + terms.iter().map(sum).sum::<f64>();
        assert!(
            (f64::from(*got) - want).abs() <= bound,
            "{}: ({row}, {column}) of ({m}, {n}) is {got}, not {want}",
            isa.name
        );
    }
}

proptest! {
    #![proptest_config(cases(96))]

    #[test]
    fn sums_match_f64(
        (m, n, k, r) in (1usize..90, 1usize..100, 1usize..70, prop::option::of(1usize..20)),
        flags in prop::array::uniform8(any::<bool>()),
        start in 0usize..3,
        seed: u64,
    ) {
        let mut terms = vec![(TestMatrix::new(seed, m, k, flags[0], flags[1]), TestMatrix::new(seed ^ 1, k, n, flags[2], flags[3]))];
        if let Some(r) = r {
            terms.push((TestMatrix::new(seed ^ 2, m, r, flags[4], flags[5]), TestMatrix::new(seed ^ 3, r, n, flags[6], flags[7])));
        }
        let row = exact_values(seed ^ 4, n);
        let matrix = exact_values(seed ^ 5, m * n);
        let start = [Init::Zero, Init::Bias(&row), Init::Matrix(&matrix)][start];
        for isa in available() {
            for precision in [Precision::F32, Precision::Bf16] {
                check(isa, precision, &terms, start, &[1, 2, 3]);
            }
        }
    }
}

/// B contiguous along k takes the GEMV path, any other the path of many rows.
#[test]
fn gemv_matches_f64() {
    for (index, (n, k, r)) in [
        (1, 1, 1),
        (5, 15, 3),
        (300, 16, 16),
        (33, 600, 8),
        (1, 70_000, 2),
        (40, 33, 0),
    ]
    .into_iter()
    .enumerate()
    {
        let seed = 10 * index as u64;
        for bf16 in [false, true] {
            let adapter = (r > 0).then(|| {
                (
                    TestMatrix::new(seed + 2, 1, r, true, bf16),
                    TestMatrix::new(seed + 3, r, n, true, false),
                )
            });
            let w = (
                TestMatrix::new(seed, 1, k, false, !bf16),
                TestMatrix::new(seed + 1, k, n, true, bf16),
            );
            let terms: Vec<_> = std::iter::once(w).chain(adapter).collect();
            assert!(n == 1 || k == 1 || terms[0].1.matrix().row_stride == 1);
            let row = exact_values(seed + 4, n);
            for start in [Init::Zero, Init::Bias(&row), Init::Matrix(&row)] {
                check(best(), Precision::F32, &terms, start, &[1, 2, 3]);
                check(best(), Precision::Bf16, &terms, start, &[1, 2, 3]);
            }
        }
    }
}

/// Deeper than one panel, with a second term: several passes.
#[test]
fn deep_sums_match_f64() {
    let shapes = |Isa { max_kc, kc, .. }: &Isa| {
        [
            (3, 5, max_kc + 1),
            (15, 33, 2 * kc + 7),
            (2, 40, *max_kc),
            (33, 64, *kc),
        ]
    };
    for (m, n, k) in available().iter().flat_map(|isa| shapes(isa)) {
        let terms = [
            (
                TestMatrix::new(1, m, k, false, false),
                TestMatrix::new(2, k, n, true, true),
            ),
            (
                TestMatrix::new(3, m, 9, false, false),
                TestMatrix::new(4, 9, n, false, false),
            ),
        ];
        let matrix = exact_values(5, m * n);
        for isa in available() {
            check(isa, Precision::F32, &terms, Init::Matrix(&matrix), &[1, 2]);
            check(isa, Precision::Bf16, &terms, Init::Matrix(&matrix), &[1, 2]);
        }
    }
}

/// All 24 bits of f32 count: values over eight powers of ten, and an error against f64 within that
/// of rounding each addition.
#[test]
fn f32_keeps_24_bits() {
    let (m, n, k) = (40, 70, 300);
    let spread = |seed: u64, n: usize| -> Vec<f32> {
        let powers = uniform(seed ^ 9, n);
        uniform(seed, n)
            .iter()
            .zip(powers)
            .map(|(u, power)| (2.0 * u - 1.0) * 10f32.powf(8.0 * power - 4.0))
            .collect()
    };
    let a = spread(1, m * k);
    let b = spread(2, k * n);
    for isa in available() {
        let left = Lhs::with_isa(isa, Precision::F32, MatRef::from_f32(&a, m, k));
        let got = gemm_sum_with(
            isa,
            &[GemmTerm {
                lhs: &left,
                rhs: MatRef::from_f32(&b, k, n),
            }],
            Init::Zero,
        );
        let mut worst = 0.0f64;
        for (row, column) in (0..m).flat_map(|row| (0..n).map(move |column| (row, column))) {
            let terms = (0..k).map(|i| f64::from(a[row * k + i]) * f64::from(b[i * n + column]));
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| {
                (sum + term, size + term.abs())
            });
            worst = worst.max((f64::from(got[row * n + column]) - sum).abs() / size);
        }
        // MixedTerm of EPSILON an addition; AMX makes six for one, but rounds the sum of a pair
        // once.
        assert!(
            worst < 8.0 * f64::from(f32::EPSILON),
            "{}: {worst:e} of the sum of sizes",
            isa.name
        );
        println!("{}: {worst:e}", isa.name);
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Values of all 24 bits.
fn f32_values(seed: u64, n: usize) -> Vec<f32> {
    uniform(seed, n)
        .iter()
        .map(|u| (2.0 * u - 1.0) * 1.234_567_9)
        .collect()
}

/// A term of a sum in f32: A of all bits, B exact in bf16.
struct MixedTerm {
    a: Vec<f32>,
    b: TestMatrix,
}

impl MixedTerm {
    fn new(seed: u64, shape: [usize; 3], transposed: bool, bf16: bool) -> Self {
        let [m, k, n] = shape;
        Self {
            a: f32_values(seed, m * k),
            b: TestMatrix::new(seed ^ 77, k, n, transposed, bf16),
        }
    }
}

/// Sums in f32 do not depend on the format of B.
fn check_mixed(terms: &mut [MixedTerm], m: usize, start: Init<'_>) {
    for isa in available() {
        let sum = |terms: &[MixedTerm], threads: usize| {
            crate::ops::tests::on(threads, || {
                let a = terms
                    .iter()
                    .map(|term| MatRef::from_f32(&term.a, m, term.b.rows));
                let lhs: Vec<Lhs<'_>> = a.map(|a| Lhs::with_isa(isa, Precision::F32, a)).collect();
                let views: Vec<GemmTerm<'_>> = lhs
                    .iter()
                    .zip(terms)
                    .map(|(a, term)| GemmTerm {
                        lhs: a,
                        rhs: term.b.matrix(),
                    })
                    .collect();
                bits(&gemm_sum_with(isa, &views, start))
            })
        };
        let got = [1, 2, 3].map(|threads| sum(terms, threads));
        let stored: Vec<bool> = terms.iter().map(|term| term.b.bf16).collect();
        terms.iter_mut().for_each(|term| term.b.bf16 = false);
        let want = sum(terms, 1);
        terms
            .iter_mut()
            .zip(&stored)
            .for_each(|(term, bf16)| term.b.bf16 = *bf16);
        assert!(
            got.iter().all(|got| *got == want),
            "{}: {m} rows, B in bf16: {stored:?}",
            isa.name
        );
    }
}

/// A product with B packed as a left-hand side is the same to the last bit.
fn check_by_packed(
    precision: Precision,
    shape: [usize; 3],
    transposed: bool,
    b_bf16: bool,
    seed: u64,
) {
    let [m, k, n] = shape;
    // One row more, so that a single row is packed too: a row's result does not depend on the
    // others.
    let a = f32_values(seed, (m + 1) * k);
    let b = TestMatrix::new(seed ^ 1, k, n, false, b_bf16);
    let b_wide = f32_values(seed ^ 2, k * n);
    let b = if b_bf16 {
        b.matrix()
    } else {
        MatRef::from_f32(&b_wide, k, n)
    };
    let across: Vec<f32> = (0..m * k).map(|at| a[at % m * k + at / m]).collect();
    let few = if transposed {
        MatRef::from_f32(&across, k, m).t()
    } else {
        MatRef::from_f32(&a[..m * k], m, k)
    };
    for isa in available()
        .iter()
        .filter(|isa| isa.gemm_unit(precision).is_some())
    {
        let left = Lhs::with_isa(isa, precision, MatRef::from_f32(&a, m + 1, k));
        let want =
            bits(&gemm_sum_with(isa, &[GemmTerm { lhs: &left, rhs: b }], Init::Zero)[..m * n]);
        for threads in [1, 2, 3] {
            let got = crate::ops::tests::on(threads, || {
                with(isa, || {
                    let packed = PackedLhs::with_isa(isa, precision, &b);
                    packed
                        .packed()
                        .map(|packed| bits(&gemm_by_packed(few, packed, n)))
                })
            });
            assert_eq!(got.is_some(), k > 1, "a single row is not packed");
            assert!(
                got.is_none_or(|got| got == want),
                "{}, {precision:?}: ({m}, {k}) by ({k}, {n}) at {threads} threads",
                isa.name
            );
        }
    }
}

proptest! {
    #![proptest_config(cases(96))]

    /// B stored in bf16 is one plane of three, in any order of such terms and others.
    #[test]
    fn bf16_rhs_in_f32_matches_f32_rhs(
        (m, n) in (1usize..90, 1usize..100),
        depths in prop::collection::vec(prop_oneof![4 => 1usize..70, 1 => 600usize..1500], 1..5),
        flags in prop::array::uniform8(any::<bool>()),
        start in 0usize..3,
        seed: u64,
    ) {
        let term = |(index, k): (usize, &usize)| MixedTerm::new(seed ^ index as u64, [m, *k, n], flags[index], flags[4 + index]);
        let mut terms: Vec<MixedTerm> = depths.iter().enumerate().map(term).collect();
        let row = exact_values(seed ^ 4, n);
        let matrix = exact_values(seed ^ 5, m * n);
        check_mixed(&mut terms, m, [Init::Zero, Init::Bias(&row), Init::Matrix(&matrix)][start]);
    }

    #[test]
    fn gemm_by_packed_matches_gemm(
        m in 1usize..70,
        k in prop_oneof![4 => 1usize..100, 1 => 600usize..1500],
        n in 1usize..140,
        flags: (bool, bool),
        seed: u64,
    ) {
        for precision in [Precision::F32, Precision::Bf16] {
            check_by_packed(precision, [m, k, n], flags.0, flags.1, seed);
        }
    }
}

/// Several passes and tasks, in bf16 too.
#[test]
fn deep_gemm_by_packed_matches_gemm() {
    for shape in [[1, 4100, 33], [33, 2100, 700], [65, 700, 1900]] {
        check_by_packed(Precision::F32, shape, true, true, 8);
        check_by_packed(Precision::Bf16, shape, true, false, 8);
    }
}

/// In bf16, matrix units round operands to nearest, once; sums are f32.
#[test]
fn bf16_units_round_operands_once() {
    let (m, n, k) = (40, 70, 300);
    let a = uniform(1, m * k);
    let b = uniform(2, k * n);
    let rounded = |values: &[f32]| {
        values
            .iter()
            .map(|x| bf16::from_f32(*x).to_f32())
            .collect::<Vec<_>>()
    };
    for isa in available().iter().filter(|isa| isa.matrix_unit.is_some()) {
        let gemm = |a: &[f32], b: &[f32], precision| {
            let left = Lhs::with_isa(isa, precision, MatRef::from_f32(a, m, k));
            gemm_sum_with(
                isa,
                &[GemmTerm {
                    lhs: &left,
                    rhs: MatRef::from_f32(b, k, n),
                }],
                Init::Zero,
            )
        };
        let got = gemm(&a, &b, Precision::Bf16);
        let want = gemm(&rounded(&a), &rounded(&b), Precision::F32);
        assert!(
            got.iter()
                .zip(&want)
                .all(|(got, want)| (got - want).abs() < 1e-4),
            "{}",
            isa.name
        );
        assert!(
            got.iter()
                .zip(gemm(&a, &b, Precision::F32))
                .any(|(got, exact)| (got - exact).abs() > 1e-3),
            "operands are rounded"
        );
    }
}

#[test]
fn empty_products_are_the_initial_value() {
    let none = TestMatrix::new(1, 0, 4, false, false);
    let b = TestMatrix::new(2, 4, 3, false, false);
    assert!(gemm(Precision::F32, none.matrix(), b.matrix()).is_empty());
    let start = exact_values(3, 6);
    let left = Lhs::with_packed(MatRef::from_f32(&[], 2, 0), PackedLhs::default());
    let terms = [GemmTerm {
        lhs: &left,
        rhs: MatRef::from_f32(&[], 0, 3),
    }];
    assert_eq!(gemm_sum(&terms, Init::Matrix(&start)), start);
    assert_eq!(
        gemm_sum(&terms, Init::Bias(&start[..3])),
        [&start[..3], &start[..3]].concat()
    );
    assert_eq!(gemm_sum(&terms, Init::Zero), [0.0; 6]);
}

/// Every strip of every panel once, and a task for each thread if there are enough panels.
#[test]
fn tasks_cover_the_result_and_use_all_threads() {
    for (panels, strips, threads) in [
        (18, 1, 4),
        (18, 32, 16),
        (18, 32, 2),
        (17, 1, 2),
        (6, 8, 8),
        (1, 1, 3),
        (64, 1, 3),
        (5, 0, 2),
    ] {
        let count = AtomicU64::new(0);
        let done = std::sync::Mutex::new(vec![0; panels * strips]);
        crate::ops::tests::on(threads, || {
            par_for_each_task(
                panels,
                usize::MAX,
                strips,
                TASKS_PER_PACK,
                |panels, rows| {
                    count.fetch_add(1, Ordering::Relaxed);
                    panels.for_each(|panel| {
                        rows.clone()
                            .for_each(|row| done.lock().unwrap()[panel * strips + row] += 1)
                    });
                },
            );
        });
        assert!(
            done.into_inner().unwrap().iter().all(|times| *times == 1),
            "{panels} panels, {strips} strips"
        );
        assert!(
            count.into_inner() >= panels.min(threads) as u64,
            "{panels} panels, {strips} strips on {threads}"
        );
    }
}

/// Every element of a range once, in parts of nearly one length, at most `max`.
#[test]
fn even_parts_cover_the_range() {
    for (length, max) in [
        (0, 14),
        (1, 14),
        (14, 14),
        (15, 14),
        (64, 14),
        (1024, 14),
        (29, 6),
    ] {
        let parts: Vec<_> = even_parts(7..7 + length, max).collect();
        assert_eq!(
            parts.iter().flat_map(Clone::clone).collect::<Vec<_>>(),
            (7..7 + length).collect::<Vec<_>>()
        );
        let longest = parts.iter().map(Range::len).max().unwrap_or(0);
        let shortest = parts.iter().map(Range::len).min().unwrap_or(0);
        assert!(longest <= max && longest <= shortest + 1);
    }
}
