// Rotary position embedding: see rope.rs. x, y (rows, heads * head_dim) may be the same; cos and sin (rows, half), of the
// first 2 * half channels of a head; the others are copied. A thread rotates one pair or copies one channel.
#include "cuda/kernel.cuh"

template <typename X, typename Y>
__device__ inline void rope(const X* x, const float* cos, const float* sin, Y* y, int rows, int heads, int head_dim,
                            int half, int interleaved, float direction) {
  int items = half + (head_dim - 2 * half);
  i64 at = i64(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= i64(rows) * heads * items) return;
  int item = int(at % items);
  i64 head = at / items;
  i64 start = head * head_dim;
  if (item >= half) {
    i64 channel = start + half + item;
    store(y + channel, load(x + channel));
    return;
  }
  i64 angle = head / heads * half + item;
  float c = cos[angle], s = direction * sin[angle];
  i64 first = start + (interleaved ? 2 * item : item);
  i64 second = first + (interleaved ? 1 : half);
  float a = load(x + first), b = load(x + second);
  store(y + first, a * c - b * s);
  store(y + second, b * c + a * s);
}

#define ROPE(name, X, Y)                                                                                               \
  KERNEL(256, name)(const X* x, const float* cos, const float* sin, Y* y, int rows, int heads, int head_dim, int half, \
                    int interleaved, float direction) {                                                                \
    rope(x, cos, sin, y, rows, heads, head_dim, half, interleaved, direction);                                         \
  }
ROPE(rope_f32_f32, float, float)
ROPE(rope_f32_bf16, float, bf16)
ROPE(rope_bf16_bf16, bf16, bf16)
ROPE(rope_bf16_f32, bf16, float)
