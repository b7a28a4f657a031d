// A kernel with a fault that the emulation must show: it reads its neighbour's element of shared memory without a barrier.
#include "../../src/ops/cuda/kernel.cuh"

KERNEL(64, missing_barrier)(float* y) {
  SHARED(float, x, 64);
  x[threadIdx.x] = float(threadIdx.x);
  y[threadIdx.x] = x[(threadIdx.x + 1) % blockDim.x];
}
