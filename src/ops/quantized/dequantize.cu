// Quantised weights -> bf16 or f32: see format.rs for the layouts. A thread decodes eight values.
#include "../cuda/kernel.cuh"

// The levels of NF4 by code: QLoRA, appendix E.
__device__ inline void nf4_levels(float levels[16]) {
  const float values[16] = {-1.0f,         -0.6961928f,  -0.52507305f, -0.3949175f,  -0.28444138f, -0.18477343f,
                            -0.091050036f, 0.0f,         0.0795803f,   0.1609302f,   0.2461123f,   0.33791524f,
                            0.44070983f,   0.562617f,    0.72295684f,  1.0f};
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < 16; i++) levels[i] = values[i];
  }
  __syncthreads();
}

// An f32 of four bytes that need not be aligned.
__device__ inline float float_at(const u8* bytes) {
  return bits_to_float(u32(bytes[0]) | u32(bytes[1]) << 8 | u32(bytes[2]) << 16 | u32(bytes[3]) << 24);
}

// Blocks of 64 values, which run over the ends of rows: the maximum in f32, then 32 bytes of two codes each, the first
// in the high bits.
template <typename Y>
__device__ inline void dequantize_nf4(const u8* blocks, Y* y, i64 n) {
  SHARED(float, levels, 16);
  nf4_levels(levels);
  i64 at = 8 * (i64(blockIdx.x) * blockDim.x + threadIdx.x);
  if (at >= n) return;
  const u8* block = blocks + at / 64 * 36;
  const u8* codes = block + 4 + at % 64 / 2;
  float maximum = float_at(block), out[8];
#pragma unroll
  for (int i = 0; i < 8; i++) out[i] = levels[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4] * maximum;
  int count = n - at < 8 ? int(n - at) : 8;
  bool whole = aligned4(y, 0);
  store4(y + at, count, whole, out);
  if (count > 4) store4(y + at + 4, count - 4, whole, out + 4);
}

// Rows of `cols` signed bytes, then the row's maximum in f32: code times maximum over 127.
template <typename Y>
__device__ inline void dequantize_int8(const u8* blocks, Y* y, int rows, int cols) {
  int items = (cols + 7) / 8;
  i64 item = i64(blockIdx.x) * blockDim.x + threadIdx.x;
  if (item >= i64(rows) * items) return;
  i64 row = item / items;
  int column = int(item % items) * 8;
  const u8* bytes = blocks + row * (cols + 4);
  float maximum = float_at(bytes + cols);
  for (int i = 0; i < 8 && column + i < cols; i++) {
    float code = float(int(bytes[column + i] ^ 0x80) - 0x80);
    store(y + row * cols + column + i, code * maximum * 7.874016e-3f);
  }
}

KERNEL(256, dequantize_nf4_f32)(const u8* blocks, float* y, i64 n) { dequantize_nf4(blocks, y, n); }
KERNEL(256, dequantize_nf4_bf16)(const u8* blocks, bf16* y, i64 n) { dequantize_nf4(blocks, y, n); }
KERNEL(256, dequantize_int8_f32)(const u8* blocks, float* y, int rows, int cols) {
  dequantize_int8(blocks, y, rows, cols);
}
KERNEL(256, dequantize_int8_bf16)(const u8* blocks, bf16* y, int rows, int cols) {
  dequantize_int8(blocks, y, rows, cols);
}
