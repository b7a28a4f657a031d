// Dropout masks from ChaCha8 streams (Bernstein 2008), the bits of random.rs and dropout.rs; and masked inputs.
#include "cuda/kernel.cuh"

__device__ inline u32 rotate_left(u32 x, int bits) { return x << bits | x >> (32 - bits); }

__device__ inline void quarter_round(u32 x[16], int a, int b, int c, int d) {
  x[a] += x[b], x[d] = rotate_left(x[d] ^ x[a], 16);
  x[c] += x[d], x[b] = rotate_left(x[b] ^ x[c], 12);
  x[a] += x[b], x[d] = rotate_left(x[d] ^ x[a], 8);
  x[c] += x[d], x[b] = rotate_left(x[b] ^ x[c], 7);
}

// Block `counter` of the stream of `key`.
__device__ inline void chacha8(const u32 key[8], u64 counter, u32 out[16]) {
  u32 start[16] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
#pragma unroll
  for (int i = 0; i < 8; i++) start[4 + i] = key[i];
  start[12] = u32(counter);
  start[13] = u32(counter >> 32);
  start[14] = start[15] = 0;
#pragma unroll
  for (int i = 0; i < 16; i++) out[i] = start[i];
#pragma unroll
  for (int round = 0; round < 4; round++) {
    quarter_round(out, 0, 4, 8, 12);
    quarter_round(out, 1, 5, 9, 13);
    quarter_round(out, 2, 6, 10, 14);
    quarter_round(out, 3, 7, 11, 15);
    quarter_round(out, 0, 5, 10, 15);
    quarter_round(out, 1, 6, 11, 12);
    quarter_round(out, 2, 7, 8, 13);
    quarter_round(out, 3, 4, 9, 14);
  }
#pragma unroll
  for (int i = 0; i < 16; i++) out[i] += start[i];
}

// Bit i of word w of row r is set where element 32 w + i is kept: where the upper 24 of its random bits are no less than
// `threshold`. Row r takes words tokens[r] * width onwards of the stream of keys[segments[r]], (8) each. A thread makes a
// mask word, of `words` a row.
KERNEL(256, dropout_mask)(const u32* keys, const u32* segments, const u32* tokens, u32* kept, int rows, int width,
                          int words, u32 threshold) {
  i64 at = i64(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= i64(rows) * words) return;
  int row = int(at / words), first = int(at % words) * 32;
  u64 position = u64(tokens[row]) * u64(width) + u64(first);
  int count = width - first < 32 ? width - first : 32;
  int skipped = int(position % 16);
  u32 key[8];
#pragma unroll
  for (int i = 0; i < 8; i++) key[i] = keys[8 * segments[row] + i];
  u32 bits = 0;
  for (int block = 0; 16 * block < skipped + count; block++) {
    u32 drawn[16];
    chacha8(key, position / 16 + block, drawn);
#pragma unroll
    for (int i = 0; i < 16; i++) {
      int element = 16 * block + i - skipped;
      if (element >= 0 && element < count) bits |= u32(drawn[i] >> 8 >= threshold) << element;
    }
  }
  kept[at] = bits;
}

// y = scale x where kept, else 0; with `base` (which may be y) added to it. A thread takes four elements of a row.
template <typename X, typename Y>
__device__ inline void dropout(const X* x, const u32* kept, const float* base, Y* y, int rows, int width, int words,
                               float scale) {
  int quads = (width + 3) / 4;
  i64 item = i64(blockIdx.x) * blockDim.x + threadIdx.x;
  if (item >= i64(rows) * quads) return;
  int row = int(item / quads), column = int(item % quads) * 4;
  i64 at = i64(row) * width + column;
  bool whole = aligned4(x, width) && aligned4(y, width) && aligned4(base, width);
  u32 bits = kept[i64(row) * words + column / 32] >> column % 32;
  float v[4], b[4] = {0.0f, 0.0f, 0.0f, 0.0f}, out[4];
  load4(x + at, width - column, whole, v);
  if (base != nullptr) load4(base + at, width - column, whole, b);
  for (int i = 0; i < 4; i++) out[i] = b[i] + (bits >> i & 1 ? scale * v[i] : 0.0f);
  store4(y + at, width - column, whole, out);
}

#define DROPOUT(name, X, Y)                                                                                 \
  KERNEL(256, name)(const X* x, const u32* kept, const float* base, Y* y, int rows, int width, int words,   \
                    float scale) {                                                                          \
    dropout(x, kept, base, y, rows, width, words, scale);                                                   \
  }
DROPOUT(dropout_f32_f32, float, float)
DROPOUT(dropout_f32_bf16, float, bf16)
DROPOUT(dropout_bf16_bf16, bf16, bf16)
