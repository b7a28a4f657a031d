// What the CUDA kernels share: element types, vector loads, reductions, tensor-core tiles.
//
// Kernels are written in the subset of CUDA C++ that a host compiler accepts together with the emulation header of
// tests/cuda_kernels, so that the same source runs in tests without a GPU. No CUDA header is included: bf16 is a 16-bit
// pattern. Kernels use no atomics: equal inputs give equal bytes.
#pragma once

#ifdef __CUDACC__
#define KERNEL(threads, name) extern "C" __global__ void __launch_bounds__(threads) name
#define SHARED(type, name, count) __shared__ type name[count]
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#include "emulation.h"
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// The upper half of an f32.
struct bf16 {
  u16 bits;
};

constexpr int WARP = 32;

__device__ inline float bits_to_float(u32 bits) {
  union {
    u32 bits;
    float value;
  } pun;
  pun.bits = bits;
  return pun.value;
}

__device__ inline u32 float_to_bits(float value) {
  union {
    u32 bits;
    float value;
  } pun;
  pun.value = value;
  return pun.bits;
}

// To the nearest, ties to even; NaN stays NaN.
__device__ inline bf16 to_bf16(float value) {
  u32 bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {u16(bits >> 16 | 0x40)};
  return {u16((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}

__device__ inline float load(const float* x) { return *x; }
__device__ inline float load(const bf16* x) { return bits_to_float(u32(x->bits) << 16); }
__device__ inline void store(float* y, float value) { *y = value; }
__device__ inline void store(bf16* y, float value) { *y = to_bf16(value); }

// Two bf16, the first in the low half.
__device__ inline u32 pack_bf16(float low, float high) {
  return u32(to_bf16(low).bits) | u32(to_bf16(high).bits) << 16;
}

// Whether vectors of four elements of a row-major matrix are aligned.
template <typename T>
__device__ inline bool aligned4(const T* x, int ld) {
  return x == nullptr || ((u64(x) | u64(ld) * sizeof(T)) & (4 * sizeof(T) - 1)) == 0;
}

struct alignas(16) Float4 {
  float x[4];
};
struct alignas(8) Bf16x4 {
  bf16 x[4];
};
__device__ inline Float4 vector4(const float* x) { return *(const Float4*)x; }
__device__ inline Bf16x4 vector4(const bf16* x) { return *(const Bf16x4*)x; }

// x[0..4], zero from `count` on; one access if `whole`, which requires alignment.
template <typename T>
__device__ inline void load4(const T* x, int count, bool whole, float out[4]) {
  if (whole && count >= 4) {
    auto v = vector4(x);
#pragma unroll
    for (int i = 0; i < 4; i++) out[i] = load(&v.x[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) out[i] = i < count ? load(x + i) : 0.0f;
}

__device__ inline void store_vector4(float* y, const float values[4]) {
  Float4 v;
#pragma unroll
  for (int i = 0; i < 4; i++) v.x[i] = values[i];
  *(Float4*)y = v;
}

__device__ inline void store_vector4(bf16* y, const float values[4]) {
  Bf16x4 v;
#pragma unroll
  for (int i = 0; i < 4; i++) v.x[i] = to_bf16(values[i]);
  *(Bf16x4*)y = v;
}

// The first `count` of four values; one access if `whole`.
template <typename T>
__device__ inline void store4(T* y, int count, bool whole, const float values[4]) {
  if (whole && count >= 4) return store_vector4(y, values);
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (i < count) store(y + i, values[i]);
}

#ifdef __CUDACC__

__device__ inline float shuffle_xor(float value, int lanes) { return __shfl_xor_sync(~0u, value, lanes); }
__device__ inline double shuffle_xor(double value, int lanes) { return __shfl_xor_sync(~0u, value, lanes); }
__device__ inline u32 warp_ballot(bool value) { return __ballot_sync(~0u, value); }

// C (16, 8) += A (16, 16) B (16, 8): PTX `mma.m16n8k16` with its fragments.
__device__ inline void mma(float c[4], const u32 a[4], const u32 b[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrices(u32 out[4], const bf16* row) {
  u32 address = u32(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// The same with each matrix transposed.
__device__ inline void load_matrices_transposed(u32 out[4], const bf16* row) {
  u32 address = u32(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// Copies 16 bytes to shared memory without waiting; zeros if not `valid`.
__device__ inline void copy16_async(bf16* shared, const bf16* global, bool valid) {
  u32 address = u32(__cvta_generic_to_shared(shared));
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of the committed groups are under way.
template <int pending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

#endif

// The sum over a warp, in every lane; the order is fixed.
template <typename T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
  return value;
}

__device__ inline float warp_max(float value) {
#pragma unroll
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) value = fmaxf(value, shuffle_xor(value, lanes));
  return value;
}

// The sum over the x dimension of a block of warps, in every thread. `scratch`: one element a warp. A block of one warp
// in x needs no scratch and no barrier.
template <typename T>
__device__ inline T block_sum(T value, T* scratch) {
  value = warp_sum(value);
  if (blockDim.x == WARP) return value;
  int warps = blockDim.x / WARP;
  __syncthreads();
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
  __syncthreads();
  T sum = 0;
  for (int i = 0; i < warps; i++) sum += scratch[i];
  return sum;
}
