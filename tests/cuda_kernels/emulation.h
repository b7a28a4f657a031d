// CUDA's execution model on a host: the names that src/ops/cuda/kernel.cuh takes from the device, for a C++ compiler.
//
// One fiber a thread of a block, blocks one after another. A fiber runs until a barrier or a warp collective, where it
// yields to the next in an order that the launch chooses. Shared memory is filled with 0xFF before each block. A thread
// that leaves before a barrier that others wait at, or lanes at different collectives, end the process with a message.
// Fragments are laid out as in the PTX manual ("Matrix multiply-accumulate operation using mma instruction"). Async
// copies happen at the wait.
#pragma once
#include <math.h>
#include <stddef.h>
#include <string.h>

#include <utility>

#define __device__
#define __forceinline__
#define KERNEL(threads, name) void name
#define SHARED(type, name, count) type* name = (type*)emulation::static_shared(__COUNTER__, (count) * sizeof(type))
#define DYNAMIC_SHARED(name) unsigned char* name = emulation::dynamic_shared()

struct Dim3 {
  unsigned x, y, z;
};
extern Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
unsigned char* dynamic_shared();
void* static_shared(int site, size_t bytes);
unsigned lane();
void syncthreads();
// Exchanges values within a warp: `combine` sees the inputs of the lanes once all have arrived, in rows of SLOT bytes.
constexpr size_t SLOT = 64;
typedef void (*Combine)(const unsigned char (*in)[SLOT], unsigned char (*out)[SLOT]);
void collective(const void* in, size_t in_bytes, void* out, size_t out_bytes, Combine combine);
void copy_later(void* to, const void* from, size_t bytes);
void commit();
void wait(int pending);

template <typename T>
inline T get(const unsigned char* slot, size_t at = 0) {
  T value;
  memcpy(&value, slot + at * sizeof(T), sizeof(T));
  return value;
}
template <typename T>
inline void put(unsigned char* slot, T value, size_t at = 0) {
  memcpy(slot + at * sizeof(T), &value, sizeof(T));
}
}  // namespace emulation

inline void __syncthreads() { emulation::syncthreads(); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

template <typename T>
struct Shuffle {
  T value;
  int lanes;
  static void combine(const unsigned char (*in)[emulation::SLOT], unsigned char (*out)[emulation::SLOT]) {
    for (int lane = 0; lane < 32; lane++) {
      int other = lane ^ emulation::get<Shuffle>(in[lane]).lanes;
      emulation::put(out[lane], emulation::get<Shuffle>(in[other]).value);
    }
  }
};

template <typename T>
inline T shuffle_xor(T value, int lanes) {
  Shuffle<T> in = {value, lanes};
  T out;
  emulation::collective(&in, sizeof in, &out, sizeof out, Shuffle<T>::combine);
  return out;
}

inline void combine_ballot(const unsigned char (*in)[emulation::SLOT], unsigned char (*out)[emulation::SLOT]) {
  unsigned bits = 0;
  for (int lane = 0; lane < 32; lane++) bits |= unsigned(in[lane][0] != 0) << lane;
  for (int lane = 0; lane < 32; lane++) emulation::put(out[lane], bits);
}

inline unsigned warp_ballot(bool value) {
  unsigned out;
  emulation::collective(&value, 1, &out, sizeof out, combine_ballot);
  return out;
}

// The bf16 in half `half` of register `at` of a slot, widened.
inline float half_of(const unsigned char* slot, int at, int half) {
  unsigned bits = unsigned(emulation::get<unsigned short>(slot, 2 * at + half)) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Of each lane: c (4), a (4), b (2), 32 bits each.
inline void combine_mma(const unsigned char (*in)[emulation::SLOT], unsigned char (*out)[emulation::SLOT]) {
  float a[16][16], b[8][16];
  for (int lane = 0; lane < 32; lane++) {
    int group = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; half++) {
      for (int i = 0; i < 4; i++) a[group + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] = half_of(in[lane], 4 + i, half);
      for (int i = 0; i < 2; i++) b[group][2 * t + 8 * i + half] = half_of(in[lane], 8 + i, half);
    }
  }
  for (int lane = 0; lane < 32; lane++) {
    for (int i = 0; i < 4; i++) {
      const float* row = a[lane / 4 + 8 * (i / 2)];
      const float* column = b[2 * (lane % 4) + i % 2];
      float sum = emulation::get<float>(in[lane], i);
      for (int k = 0; k < 16; k++) sum += row[k] * column[k];
      emulation::put(out[lane], sum, i);
    }
  }
}

inline void mma(float c[4], const unsigned a[4], const unsigned b[2]) {
  unsigned char in[40];
  memcpy(in, c, 16);
  memcpy(in + 16, a, 16);
  memcpy(in + 32, b, 8);
  emulation::collective(in, sizeof in, c, 16, combine_mma);
}

template <bool transposed>
inline void combine_matrices(const unsigned char (*in)[emulation::SLOT], unsigned char (*out)[emulation::SLOT]) {
  for (int lane = 0; lane < 32; lane++) {
    for (int matrix = 0; matrix < 4; matrix++) {
      for (int half = 0; half < 2; half++) {
        int major = lane / 4, minor = 2 * (lane % 4) + half;
        int row = transposed ? minor : major, column = transposed ? major : minor;
        const unsigned short* elements = emulation::get<const unsigned short*>(in[8 * matrix + row]);
        emulation::put(out[lane], elements[column], 2 * matrix + half);
      }
    }
  }
}

template <typename T>
inline void load_matrices(unsigned out[4], const T* row) {
  emulation::collective(&row, sizeof row, out, 16, combine_matrices<false>);
}
template <typename T>
inline void load_matrices_transposed(unsigned out[4], const T* row) {
  emulation::collective(&row, sizeof row, out, 16, combine_matrices<true>);
}

template <typename T>
inline void copy16_async(T* shared, const T* global, bool valid) {
  emulation::copy_later(shared, valid ? global : nullptr, 16);
}
inline void commit_copies() { emulation::commit(); }
template <int pending>
inline void wait_copies() {
  emulation::wait(pending);
}

// Calls a kernel with one pointer an argument.
namespace emulation {
template <typename... A, size_t... I>
void unpack(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*(A*)arguments[I]...);
}
template <typename... A>
void unpack(void (*kernel)(A...), void** arguments) {
  unpack(kernel, arguments, std::index_sequence_for<A...>());
}
template <auto kernel>
void call(void** arguments) {
  unpack(kernel, arguments);
}
struct Kernel {
  const char* name;
  unsigned max_threads;
  void (*call)(void**);
};
}  // namespace emulation
