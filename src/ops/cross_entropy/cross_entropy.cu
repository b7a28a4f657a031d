// Losses of logits, and their gradients in place: see mod.rs. One block a row of z (rows, vocab).
#include "../cuda/kernel.cuh"

// Capped if `cap` is positive.
__device__ inline float capped(float z, float cap) { return cap > 0.0f ? cap * tanhf(z / cap) : z; }

// loss = log sum exp z - z[target]. With `gradient`, `scale slope (softmax z - onehot target)` replaces z; the slope is that
// of the cap. A running maximum and sum a thread (Milakov and Gimelshein 2018), combined in a fixed order.
template <typename G>
__device__ inline void cross_entropy(const float* logits, const u32* targets, float* losses, G* gradient, int vocab,
                                     float scale, float cap) {
  SHARED(float, scratch, WARP);
  i64 start = i64(blockIdx.x) * vocab;
  const float* z = logits + start;
  int target = int(targets[blockIdx.x]);
  float max = -INFINITY, sum = 0.0f;
  for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
    float value = capped(z[i], cap);
    if (value > max) {
      sum *= expf(max - value);
      max = value;
    }
    // Also where both are NaN or infinite: a loss that is not finite stays so.
    sum += expf(value - max);
  }
  float highest = warp_max(max);
  int warps = blockDim.x / WARP;
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = highest;
  __syncthreads();
  highest = scratch[0];
  for (int i = 1; i < warps; i++) highest = fmaxf(highest, scratch[i]);
  // A thread without elements has no maximum.
  float total = block_sum(int(threadIdx.x) < vocab ? sum * expf(max - highest) : 0.0f, scratch);
  float target_logit = capped(z[target], cap);
  // Every thread has read the target's logit before any replaces it.
  __syncthreads();
  if (threadIdx.x == 0) losses[blockIdx.x] = highest + logf(total) - target_logit;
  if (gradient == nullptr) return;
  for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
    float value = capped(z[i], cap);
    float slope = cap > 0.0f ? 1.0f - (value / cap) * (value / cap) : 1.0f;
    float probability = expf(value - highest) / total;
    store(gradient + start + i, scale * slope * (probability - (i == target ? 1.0f : 0.0f)));
  }
}

// `gradient` may be `logits`, or null.
KERNEL(512, cross_entropy_f32)(const float* logits, const u32* targets, float* losses, float* gradient, int vocab,
                               float scale, float cap) {
  cross_entropy(logits, targets, losses, gradient, vocab, scale, cap);
}

// `gradient` does not overlap `logits`.
KERNEL(512, cross_entropy_bf16)(const float* logits, const u32* targets, float* losses, bf16* gradient, int vocab,
                                float scale, float cap) {
  cross_entropy(logits, targets, losses, gradient, vocab, scale, cap);
}
