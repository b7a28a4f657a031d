// What the attention kernels share: tiles of heads in shared memory, their products on tensor cores, and the mask.
//
// q and out (N, heads * head_dim), k and v (N, kv_heads * head_dim), lse and delta (N, heads). A block of four warps owns a
// tile of 64 rows of one segment and one head, 16 rows a warp. Heads are padded with zeros to D channels.
#pragma once
#include "../cuda/kernel.cuh"

constexpr int TILE = 64;
constexpr int THREADS = 128;

struct AttentionShape {
  int heads, kv_heads, head_dim, causal;
  // Visible keys behind a query, itself included, and unless causal before it too; 0: all.
  int window;
  float scale;
  // 0: none.
  float softcap;
};

// Rows `start` to `end` of the segment `segment_start` to `segment_end`.
struct Tile {
  int start, end, segment_start, segment_end;
};

struct Range {
  int start, end;
};

__device__ inline int at_least(int x, int bound) { return x > bound ? x : bound; }
__device__ inline int at_most(int x, int bound) { return x < bound ? x : bound; }

// The keys that some query of the tile attends to.
__device__ inline Range keys_of(Tile tile, AttentionShape shape) {
  Range keys = {tile.segment_start, tile.segment_end};
  if (shape.window > 0) {
    keys.start = at_least(keys.start, tile.start + 1 - shape.window);
    keys.end = at_most(keys.end, tile.end - 1 + shape.window);
  }
  if (shape.causal) keys.end = at_most(keys.end, tile.end);
  return keys;
}

// The queries that attend to some key of the tile.
__device__ inline Range queries_of(Tile tile, AttentionShape shape) {
  Range queries = {tile.segment_start, tile.segment_end};
  if (shape.window > 0) {
    queries.start = at_least(queries.start, tile.start + 1 - shape.window);
    queries.end = at_most(queries.end, tile.end - 1 + shape.window);
  }
  if (shape.causal) queries.start = at_least(queries.start, tile.start);
  return queries;
}

__device__ inline bool visible(int query, int key, AttentionShape shape) {
  if (shape.causal && key > query) return false;
  return shape.window == 0 || (query - key < shape.window && key - query < shape.window);
}

// Elements from one row of a tile in shared memory to the next: a shift of four banks a row, and aligned to 16 bytes.
template <int D>
constexpr int STRIDE = D + 8;

// Rows of x (rows of `ld`, of which `head_dim` are read) to shared memory, with zeros behind row `count` and behind
// `head_dim`. Copies are asynchronous if `whole`.
template <int D, int ROWS>
__device__ inline void load_tile(bf16* tile, const bf16* x, int count, i64 ld, int head_dim, bool whole) {
  for (int item = threadIdx.x; item < ROWS * (D / 8); item += THREADS) {
    int row = item / (D / 8), column = item % (D / 8) * 8;
    bf16* to = tile + row * STRIDE<D> + column;
    const bf16* from = x + row * ld + column;
    bool inside = row < count && column < head_dim;
    if (whole) {
      copy16_async(to, inside ? from : x, inside);
      continue;
    }
    for (int i = 0; i < 8; i++) {
      bf16 zero = {0};
      to[i] = inside && column + i < head_dim ? from[i] : zero;
    }
  }
}

// Whether every row of every head starts at a multiple of 16 bytes.
__device__ inline bool aligned_heads(const bf16* x, int head_dim) { return u64(x) % 16 == 0 && head_dim % 8 == 0; }

// The 16 x 16 tile of rows from `row` and columns from `column` on, as the first operand of `mma`.
template <int D>
__device__ inline void load_lhs(u32 a[4], const bf16* tile, int row, int column) {
  int lane = threadIdx.x % WARP;
  load_matrices(a, tile + (row + lane % 16) * STRIDE<D> + column + lane / 16 * 8);
}

// c (16, 8 NT) = rows `row` to `row + 16` of `a` times the transpose of the first 8 NT rows of `b`, both (_, D).
template <int D, int NT>
__device__ inline void product_transposed(float c[NT][4], const bf16* a, int row, const bf16* b) {
  int lane = threadIdx.x % WARP;
#pragma unroll
  for (int n = 0; n < NT; n++) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.0f;
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    u32 lhs[4];
    load_lhs<D>(lhs, a, row, k);
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      u32 rhs[4];
      load_matrices(rhs, b + (8 * n + lane % 8 + lane / 16 * 8) * STRIDE<D> + k + lane / 8 % 2 * 8);
      mma(c[n], lhs, rhs);
      mma(c[n + 1], lhs, rhs + 2);
    }
  }
}

// c (16, COLUMNS) += p (16, 8 KT) times the columns from `column` on of the first 8 KT rows of `b` (_, D); p as a result
// of `product_transposed`.
template <int D, int COLUMNS, int KT>
__device__ inline void accumulate_product(float c[COLUMNS / 8][4], const float p[KT][4], const bf16* b, int column) {
  int lane = threadIdx.x % WARP;
#pragma unroll
  for (int k = 0; k < KT; k += 2) {
    u32 lhs[4] = {pack_bf16(p[k][0], p[k][1]), pack_bf16(p[k][2], p[k][3]), pack_bf16(p[k + 1][0], p[k + 1][1]),
                  pack_bf16(p[k + 1][2], p[k + 1][3])};
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n += 2) {
      u32 rhs[4];
      load_matrices_transposed(rhs, b + (8 * k + lane % 16) * STRIDE<D> + column + 8 * n + lane / 16 * 8);
      mma(c[n], lhs, rhs);
      mma(c[n + 1], lhs, rhs + 2);
    }
  }
}

// The row (0 or 1 of the two of a lane) and column of element i of a lane's part of a 16 x 8 result.
__device__ inline int row_of(int half) { return threadIdx.x % WARP / 4 + 8 * half; }
__device__ inline int column_of(int i) { return threadIdx.x % WARP % 4 * 2 + i % 2; }

// Writes rows of 8 NT columns, those inside `count` rows and `columns` columns.
template <int NT, typename Y>
__device__ inline void store_rows(Y* y, const float c[NT][4], const float factor[2], int row, int count, i64 ld,
                                  int columns) {
#pragma unroll
  for (int n = 0; n < NT; n++) {
    for (int i = 0; i < 4; i++) {
      int at = row + row_of(i / 2), column = 8 * n + column_of(i);
      if (at < count && column < columns) store(y + at * ld + column, c[n][i] * factor[i / 2]);
    }
  }
}

// The scaled and capped score, and the slope of it with respect to the product of query and key.
struct Score {
  float value, slope;
};

__device__ inline Score score(float product, AttentionShape shape) {
  float scaled = product * shape.scale;
  if (shape.softcap <= 0.0f) return {scaled, shape.scale};
  float t = tanhf(scaled / shape.softcap);
  return {shape.softcap * t, shape.scale * (1.0f - t * t)};
}
