// The gradient's norm and AdamW's update: see adamw.rs.
#include "cuda/kernel.cuh"

// The sum of the squares of elements blockIdx.x * per_block onwards, in f64.
KERNEL(256, square_sum_parts)(const float* gradient, double* parts, i64 n, int per_block) {
  SHARED(double, scratch, WARP);
  i64 first = i64(blockIdx.x) * per_block;
  i64 end = first + per_block < n ? first + per_block : n;
  double sum = 0.0;
  for (i64 i = first + threadIdx.x; i < end; i += blockDim.x) sum += double(gradient[i]) * double(gradient[i]);
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// The sum of all parts; one block.
KERNEL(256, square_sum)(const double* parts, double* total, int count) {
  SHARED(double, scratch, WARP);
  double sum = 0.0;
  for (int i = threadIdx.x; i < count; i += blockDim.x) sum += parts[i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) *total = sum;
}

// Neighbouring elements that end before `end`, and their scalars.
struct GroupRun {
  i64 end;
  float decay, step_size;
};

// state (3, n): value, first and second moment. A block updates `per_block` elements.
KERNEL(256, adamw)(float* state, const float* gradient, const GroupRun* runs, int run_count, i64 n, int per_block,
                   float clip, float rate1, float beta2, float rate2, float root_correction, float epsilon) {
  i64 at = i64(blockIdx.x) * per_block + threadIdx.x;
  i64 end = i64(blockIdx.x + 1) * per_block < n ? i64(blockIdx.x + 1) * per_block : n;
  // The first run that ends behind `at`.
  int run = 0;
  for (int size = run_count; size > 0;) {
    int half = size / 2;
    bool before = runs[run + half].end <= at && run + half + 1 < run_count;
    run = before ? run + half + 1 : run;
    size = before ? size - half - 1 : half;
  }
  for (; at < end; at += blockDim.x) {
    while (run + 1 < run_count && runs[run].end <= at) run++;
    float g = gradient[at] * clip;
    float first = state[n + at], second = state[2 * n + at];
    first += (g - first) * rate1;
    second = second * beta2 + g * g * rate2;
    float denominator = sqrtf(second) / root_correction + epsilon;
    state[at] = state[at] * runs[run].decay - runs[run].step_size * (first / denominator);
    state[n + at] = first;
    state[2 * n + at] = second;
  }
}
