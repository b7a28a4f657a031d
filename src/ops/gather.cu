// Rows by index, and the adjoint: see gather.rs. One block a row. An index of `n` or more, which the host cannot refuse
// without waiting for the device, gives a row of NaN, and is not added anywhere.
#include "cuda/kernel.cuh"

template <typename X>
__device__ inline void gather_rows(const X* x, const u32* indices, float* y, int n, int cols) {
  u32 index = indices[blockIdx.x];
  bool inside = index < u32(n);
  const X* from = x + i64(inside ? index : 0) * cols;
  float* to = y + i64(blockIdx.x) * cols;
  bool whole = aligned4(x, cols) && aligned4(y, cols);
  for (int at = 4 * threadIdx.x; at < cols; at += 4 * blockDim.x) {
    float v[4];
    load4(from + at, cols - at, whole, v);
    for (int i = 0; i < 4; i++) v[i] = inside ? v[i] : NAN;
    store4(to + at, cols - at, whole, v);
  }
}

KERNEL(256, gather_rows_f32)(const float* x, const u32* indices, float* y, int n, int cols) {
  gather_rows(x, indices, y, n, cols);
}

KERNEL(256, gather_rows_bf16)(const bf16* x, const u32* indices, float* y, int n, int cols) {
  gather_rows(x, indices, y, n, cols);
}

// y[index] += the rows of dx (rows, cols) with that index, in their order; the other rows of y are unchanged. The block of
// an index's first occurrence adds them all, so no two blocks write one row.
KERNEL(256, scatter_rows)(const float* dx, const u32* indices, float* y, int rows, int n, int cols) {
  SHARED(u32, found, 256 / WARP);
  int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  int row = blockIdx.x;
  u32 index = indices[row];
  if (index >= u32(n)) return;
  u32 earlier = 0;
  for (int at = threadIdx.x; at < row; at += blockDim.x) earlier |= indices[at] == index;
  found[warp] = warp_ballot(earlier != 0);
  __syncthreads();
  for (int i = 0; i < warps; i++)
    if (found[i] != 0) return;
  float* to = y + i64(index) * cols;
  for (int first = row; first < rows; first += blockDim.x) {
    int at = first + threadIdx.x;
    __syncthreads();
    found[warp] = warp_ballot(at < rows && indices[at] == index);
    __syncthreads();
    for (int i = 0; i < int(blockDim.x); i++) {
      if ((found[i / WARP] >> i % WARP & 1) == 0) continue;
      const float* from = dx + i64(first + i) * cols;
      for (int column = threadIdx.x; column < cols; column += blockDim.x) to[column] += from[column];
    }
  }
}
