//! Cross-entropy, gather and scatter.

use wattune::ops::{cross_entropy, gather_rows, scatter_rows};

use super::harness::{Arg, Buffer, close, in_every_order};
use super::{Type, random, reference, tensor, values};

#[test]
fn losses_and_gradients_of_logits_equal_the_reference() {
    for (rows, vocab, cap) in [(1, 1, 0.0), (3, 7, 0.0), (2, 600, 0.0), (2, 1501, 3.0)] {
        let targets: Vec<u32> = (0..rows)
            .map(|row| ((row * 41 + 5) % vocab) as u32)
            .collect();
        let logits: Vec<f32> = random(11, rows * vocab).iter().map(|z| 9.0 * z).collect();
        let scale = 0.25;
        let found = in_every_order("cross_entropy", |device| {
            let (z, targets) = (Buffer::new(&logits), Buffer::new(&targets));
            let narrow = Buffer::bf16_output(rows * vocab);
            let losses = [(); 3].map(|()| Buffer::f32_output(rows));
            let gradients = [
                ("bf16", narrow.arg()),
                ("f32", Arg::Pointer(0)),
                ("f32", z.arg()),
            ];
            for ((kind, gradient), losses) in gradients.into_iter().zip(&losses) {
                let args = [
                    z.arg(),
                    targets.arg(),
                    losses.arg(),
                    gradient,
                    Arg::Int(vocab as i32),
                    Arg::Float(scale),
                    Arg::Float(cap),
                ];
                let kernel = format!("cross_entropy_{kind}");
                device.launch(&kernel, [rows, 1, 1], [128, 1, 1], 0, &args);
            }
            let losses = losses.map(|losses| losses.f32s());
            assert!(losses[0] == losses[1] && losses[0] == losses[2]);
            vec![losses[0].clone(), z.f32s(), narrow.bf16s()]
        });
        let Some(found) = found else { return };
        let capped = |z: &f32| {
            if cap > 0.0 {
                cap * (z / cap).tanh()
            } else {
                *z
            }
        };
        let capped: Vec<f32> = logits.iter().map(capped).collect();
        let (losses, dz) = reference(|c| {
            let z = tensor(&capped, (rows, vocab));
            cross_entropy(c, z, &targets, Some(f64::from(scale))).unwrap()
        });
        let slope = |z: &f32| {
            if cap > 0.0 {
                1.0 - (z / cap) * (z / cap)
            } else {
                1.0
            }
        };
        let dz = values(&dz.unwrap());
        let dz: Vec<f32> = dz
            .iter()
            .zip(&capped)
            .map(|(dz, z)| dz * slope(z))
            .collect();
        close("loss", &found[0], &losses, 1e-6);
        close("gradient", &found[1], &dz, 1e-5);
        close("gradient in bf16", &found[2], &dz, Type::Bf16.error());
    }
}

#[test]
fn a_row_of_infinite_logits_has_no_finite_loss() {
    let found = in_every_order("cross_entropy", |device| {
        let z = Buffer::new(&[1.0, f32::NAN, 2.0, 0.0, f32::INFINITY, 1.0]);
        let (targets, losses) = (Buffer::new(&[0u32, 2]), Buffer::f32_output(2));
        let mut args = vec![z.arg(), targets.arg(), losses.arg(), Arg::Pointer(0)];
        args.extend([Arg::Int(3), Arg::Float(1.0), Arg::Float(0.0)]);
        device.launch("cross_entropy_f32", [2, 1, 1], [32, 1, 1], 0, &args);
        let finite = losses
            .f32s()
            .iter()
            .map(|x| f32::from(u8::from(x.is_finite())))
            .collect();
        vec![finite]
    });
    assert!(found.is_none_or(|found| found[0] == [0.0, 0.0]));
}

#[test]
fn gathered_and_scattered_rows_equal_the_reference() {
    // Indices that repeat within a block of 64 threads and beyond it, and rows without any.
    let many: Vec<u32> = (0..150).map(|i| [4, 0, 4, 9, 2, 4][i % 6]).collect();
    for (n, cols, indices) in [(1, 1, vec![0, 0]), (10, 7, many.clone()), (10, 96, many)] {
        let rows = indices.len();
        for x in [Type::F32, Type::Bf16] {
            let table = x.random(12, n * cols);
            let name = format!("gather_rows_{}", x.name());
            let found = in_every_order(&name, |device| {
                let (table, out) = (x.input(&table), Buffer::f32_output(rows * cols));
                let indices = Buffer::new(&indices);
                let mut args = vec![table.arg(), indices.arg(), out.arg()];
                args.extend([n, cols].map(|size| Arg::Int(size as i32)));
                device.launch(&name, [rows, 1, 1], [64, 1, 1], 0, &args);
                vec![out.f32s()]
            });
            let Some(found) = found else { return };
            let index = candle_core::Tensor::new(&indices[..], &candle_core::Device::Cpu).unwrap();
            let expected =
                reference(|c| gather_rows(c, &tensor(&table, (n, cols)), &index).unwrap());
            close(&name, &found[0], &values(&expected), 0.0);
        }
        let dx = random(13, rows * cols);
        let found = in_every_order("scatter_rows", |device| {
            let (dx, out) = (Buffer::new(&dx), Buffer::new(&vec![0f32; n * cols]));
            let indices = Buffer::new(&indices);
            let mut args = vec![dx.arg(), indices.arg(), out.arg()];
            args.extend([rows, n, cols].map(|size| Arg::Int(size as i32)));
            device.launch("scatter_rows", [rows, 1, 1], [64, 1, 1], 0, &args);
            vec![out.f32s()]
        });
        let Some(found) = found else { return };
        let index = candle_core::Tensor::new(&indices[..], &candle_core::Device::Cpu).unwrap();
        let dx = tensor(&dx, (rows, cols));
        let expected = reference(|c| scatter_rows(c, &dx, &index, n).unwrap());
        close("scatter_rows", &found[0], &values(&expected), 0.0);
    }
}
