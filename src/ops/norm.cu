// RMSNorm and LayerNorm, forward and backward: see norm.rs for the formulas.
//
// x, y, dy, dx (rows, cols) are dense. Blocks are (32, k) for narrow rows, one warp a row, or (32 w, 1) for wide ones, one
// block a row; either way a row is read in vectors of four and stays in the cache between its passes.
#include "cuda/kernel.cuh"

struct NormRow {
  float mean;
  // 1 / sqrt(mean((x - m)^2) + eps).
  float scale;
};

// The row of this thread, which is no less than `rows` in the last block of warps.
__device__ inline int norm_row() { return blockIdx.x * blockDim.y + threadIdx.y; }

template <typename X>
__device__ inline NormRow norm_statistics(const X* x, int cols, float eps, bool layer, bool whole, float* scratch) {
  float mean = 0.0f;
  if (layer) {
    float sum = 0.0f;
    for (int at = 4 * threadIdx.x; at < cols; at += 4 * blockDim.x) {
      float v[4];
      load4(x + at, cols - at, whole, v);
      sum += (v[0] + v[1]) + (v[2] + v[3]);
    }
    mean = block_sum(sum, scratch) / cols;
  }
  float squares = 0.0f;
  for (int at = 4 * threadIdx.x; at < cols; at += 4 * blockDim.x) {
    float v[4];
    load4(x + at, cols - at, whole, v);
    for (int i = 0; i < 4; i++) {
      float centred = at + i < cols ? v[i] - mean : 0.0f;
      squares += centred * centred;
    }
  }
  float mean_square = block_sum(squares, scratch) / cols;
  return {mean, 1.0f / sqrtf(mean_square + eps)};
}

// `copy` (bf16) receives x if it is not null; `bias` may be null. gain = factor (offset + weight).
template <typename X, typename Y>
__device__ inline void norm_forward(const X* x, const float* weight, const float* bias, Y* y, bf16* copy, int rows,
                                    int cols, float eps, float factor, float offset, int layer) {
  SHARED(float, scratch, WARP);
  int row = norm_row();
  bool inside = row < rows;
  i64 start = i64(inside ? row : 0) * cols;
  bool whole = aligned4(x, cols) && aligned4(y, cols) && aligned4(copy, cols);
  bool whole_weight = aligned4(weight, 0) && aligned4(bias, 0);
  x += start;
  NormRow norm = norm_statistics(x, cols, eps, layer != 0, whole, scratch);
  for (int at = 4 * threadIdx.x; inside && at < cols; at += 4 * blockDim.x) {
    float v[4], w[4], b[4] = {0.0f, 0.0f, 0.0f, 0.0f}, out[4];
    load4(x + at, cols - at, whole, v);
    load4(weight + at, cols - at, whole_weight, w);
    if (bias != nullptr) load4(bias + at, cols - at, whole_weight, b);
    for (int i = 0; i < 4; i++) out[i] = (v[i] - norm.mean) * norm.scale * (factor * (offset + w[i])) + factor * b[i];
    store4(y + start + at, cols - at, whole, out);
    if (copy != nullptr) store4(copy + start + at, cols - at, whole, v);
  }
}

// dx = s (g - mean(g) - z mean(g z)) + base, with z = (x - m) s, g = dy gain, and without mean(g) unless `layer`; `base`
// may be null. `statistics` receives m and s of each row if it is not null.
template <typename X, typename D>
__device__ inline void norm_backward(const D* dy, const X* x, const float* weight, const float* base, float* dx,
                                     NormRow* statistics, int rows, int cols, float eps, float factor, float offset,
                                     int layer) {
  SHARED(float, scratch, WARP);
  int row = norm_row();
  bool inside = row < rows;
  i64 start = i64(inside ? row : 0) * cols;
  bool whole = aligned4(x, cols) && aligned4(dy, cols) && aligned4(base, cols) && aligned4(dx, cols);
  bool whole_weight = aligned4(weight, 0);
  x += start;
  dy += start;
  NormRow norm = norm_statistics(x, cols, eps, layer != 0, whole, scratch);
  float sum_g = 0.0f, sum_gz = 0.0f;
  for (int at = 4 * threadIdx.x; at < cols; at += 4 * blockDim.x) {
    float v[4], w[4], d[4];
    load4(x + at, cols - at, whole, v);
    load4(dy + at, cols - at, whole, d);
    load4(weight + at, cols - at, whole_weight, w);
    for (int i = 0; i < 4; i++) {
      float g = d[i] * (factor * (offset + w[i]));
      sum_g += g;
      sum_gz += g * ((v[i] - norm.mean) * norm.scale);
    }
  }
  float mean_gz = block_sum(sum_gz, scratch) / cols;
  float mean_g = layer ? block_sum(sum_g, scratch) / cols : 0.0f;
  for (int at = 4 * threadIdx.x; inside && at < cols; at += 4 * blockDim.x) {
    float v[4], w[4], d[4], out[4], b[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    load4(x + at, cols - at, whole, v);
    load4(dy + at, cols - at, whole, d);
    load4(weight + at, cols - at, whole_weight, w);
    if (base != nullptr) load4(base + start + at, cols - at, whole, b);
    for (int i = 0; i < 4; i++) {
      float z = (v[i] - norm.mean) * norm.scale;
      out[i] = (d[i] * (factor * (offset + w[i])) - mean_g - z * mean_gz) * norm.scale + b[i];
    }
    store4(dx + start + at, cols - at, whole, out);
  }
  if (statistics != nullptr && inside && threadIdx.x == 0) statistics[row] = norm;
}

// Of rows blockIdx.y * rows_per_part onwards: the sums of dy z to partial[0] and of dy to partial[1], (parts, cols) each.
template <typename X, typename D>
__device__ inline void norm_weight_gradient(const D* dy, const X* x, const NormRow* statistics, float* partial, int rows,
                                            int cols, int rows_per_part) {
  int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= cols) return;
  int first = blockIdx.y * rows_per_part;
  int end = first + rows_per_part < rows ? first + rows_per_part : rows;
  float weight = 0.0f, bias = 0.0f;
  for (int row = first; row < end; row++) {
    i64 at = i64(row) * cols + column;
    float d = load(dy + at);
    weight += d * ((load(x + at) - statistics[row].mean) * statistics[row].scale);
    bias += d;
  }
  partial[i64(blockIdx.y) * cols + column] = weight;
  partial[i64(gridDim.y + blockIdx.y) * cols + column] = bias;
}

// x (2, parts, cols) -> factor times the sums over parts, in order: y (2, cols).
KERNEL(256, norm_sum_parts)(const float* x, float* y, int parts, int cols, float factor) {
  int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= cols) return;
  float sum = 0.0f;
  for (int part = 0; part < parts; part++) sum += x[(i64(blockIdx.y) * parts + part) * cols + column];
  y[i64(blockIdx.y) * cols + column] = factor * sum;
}

#define NORM_FORWARD(name, X, Y)                                                                                        \
  KERNEL(256, name)(const X* x, const float* weight, const float* bias, Y* y, bf16* copy, int rows, int cols, float eps, \
                    float factor, float offset, int layer) {                                                            \
    norm_forward(x, weight, bias, y, copy, rows, cols, eps, factor, offset, layer);                                     \
  }
NORM_FORWARD(norm_forward_f32_f32, float, float)
NORM_FORWARD(norm_forward_f32_bf16, float, bf16)
NORM_FORWARD(norm_forward_bf16_bf16, bf16, bf16)
NORM_FORWARD(norm_forward_bf16_f32, bf16, float)

#define NORM_BACKWARD(name, D, X)                                                                                 \
  KERNEL(256, name)(const D* dy, const X* x, const float* weight, const float* base, float* dx, NormRow* statistics, \
                    int rows, int cols, float eps, float factor, float offset, int layer) {                       \
    norm_backward(dy, x, weight, base, dx, statistics, rows, cols, eps, factor, offset, layer);                   \
  }
NORM_BACKWARD(norm_backward_f32_f32, float, float)
NORM_BACKWARD(norm_backward_f32_bf16, float, bf16)

#define NORM_WEIGHT_GRADIENT(name, D, X)                                                                        \
  KERNEL(256, name)(const D* dy, const X* x, const NormRow* statistics, float* partial, int rows, int cols,     \
                    int rows_per_part) {                                                                        \
    norm_weight_gradient(dy, x, statistics, partial, rows, cols, rows_per_part);                                \
  }
NORM_WEIGHT_GRADIENT(norm_weight_gradient_f32_f32, float, float)
NORM_WEIGHT_GRADIENT(norm_weight_gradient_f32_bf16, float, bf16)
