// y = f(gate) up, or y = f(gate) where up is null, and its backward pass: see activation/functions.rs for the functions.
// A thread takes four elements.
#include "../cuda/kernel.cuh"

constexpr float TANH_SLOPE = 0.7978845608028654f;
constexpr float TANH_CUBIC = 0.044715f;

struct Activated {
  float value, slope;
};

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Ordered as the Rust enum `Activation`.
__device__ inline Activated activate(int function, float x) {
  if (function == 0) {
    float s = sigmoid(x);
    return {x * s, s * (1.0f + x * (1.0f - s))};
  }
  if (function == 1) {
    float cdf = 0.5f * erfcf(-x * 0.70710678118654752f);
    return {x * cdf, cdf + x * (0.3989422804014327f * expf(-0.5f * x * x))};
  }
  if (function == 2) {
    // (1 + tanh(z)) / 2 = sigmoid(2 z).
    float cubic = TANH_CUBIC * x * x;
    float s = sigmoid(2.0f * TANH_SLOPE * x * (1.0f + cubic));
    return {x * s, s + x * s * (1.0f - s) * (2.0f * TANH_SLOPE * (1.0f + 3.0f * cubic))};
  }
  if (function == 3) return {x <= 0.0f ? 0.0f : x, x <= 0.0f ? 0.0f : 1.0f};
  float t = tanhf(x);
  return {t, 1.0f - t * t};
}

// `gate_copy` and `up_copy` (bf16) receive the inputs if they are not null.
template <typename X, typename Y>
__device__ inline void activation(const X* gate, const X* up, Y* y, bf16* gate_copy, bf16* up_copy, i64 n, int function) {
  i64 at = 4 * (i64(blockIdx.x) * blockDim.x + threadIdx.x);
  if (at >= n) return;
  int count = n - at < 4 ? int(n - at) : 4;
  bool whole = aligned4(gate, 0) && aligned4(up, 0) && aligned4(y, 0) && aligned4(gate_copy, 0) && aligned4(up_copy, 0);
  float g[4], u[4] = {1.0f, 1.0f, 1.0f, 1.0f}, out[4];
  load4(gate + at, count, whole, g);
  if (up != nullptr) load4(up + at, count, whole, u);
  for (int i = 0; i < 4; i++) out[i] = activate(function, g[i]).value * u[i];
  store4(y + at, count, whole, out);
  if (gate_copy != nullptr) store4(gate_copy + at, count, whole, g);
  if (up_copy != nullptr) store4(up_copy + at, count, whole, u);
}

// `dup` is null where `up` is.
template <typename D, typename X, typename Y>
__device__ inline void activation_backward(const D* dy, const X* gate, const X* up, Y* dgate, Y* dup, i64 n,
                                           int function) {
  i64 at = 4 * (i64(blockIdx.x) * blockDim.x + threadIdx.x);
  if (at >= n) return;
  int count = n - at < 4 ? int(n - at) : 4;
  bool whole = aligned4(dy, 0) && aligned4(gate, 0) && aligned4(up, 0) && aligned4(dgate, 0) && aligned4(dup, 0);
  float d[4], g[4], u[4] = {1.0f, 1.0f, 1.0f, 1.0f}, of_gate[4], of_up[4];
  load4(dy + at, count, whole, d);
  load4(gate + at, count, whole, g);
  if (up != nullptr) load4(up + at, count, whole, u);
  for (int i = 0; i < 4; i++) {
    Activated f = activate(function, g[i]);
    of_gate[i] = d[i] * u[i] * f.slope;
    of_up[i] = d[i] * f.value;
  }
  store4(dgate + at, count, whole, of_gate);
  if (dup != nullptr) store4(dup + at, count, whole, of_up);
}

#define ACTIVATION(name, X, Y)                                                                                       \
  KERNEL(256, name)(const X* gate, const X* up, Y* y, bf16* gate_copy, bf16* up_copy, i64 n, int function) {         \
    activation(gate, up, y, gate_copy, up_copy, n, function);                                                        \
  }
ACTIVATION(activation_f32_f32, float, float)
ACTIVATION(activation_f32_bf16, float, bf16)
ACTIVATION(activation_bf16_bf16, bf16, bf16)
ACTIVATION(activation_bf16_f32, bf16, float)

#define ACTIVATION_BACKWARD(name, D, X, Y)                                                                    \
  KERNEL(256, name)(const D* dy, const X* gate, const X* up, Y* dgate, Y* dup, i64 n, int function) {         \
    activation_backward(dy, gate, up, dgate, dup, n, function);                                               \
  }
ACTIVATION_BACKWARD(activation_backward_f32_f32_f32, float, float, float)
ACTIVATION_BACKWARD(activation_backward_f32_bf16_f32, float, bf16, float)
ACTIVATION_BACKWARD(activation_backward_f32_bf16_bf16, float, bf16, bf16)
