// Attention, backward: two passes, each of which sums what it owns, so that nothing is added from two blocks (Dao 2023,
// algorithm 2, without its atomic sums). p = e^(s - lse), ds = p (dp - delta) slope, dv = p^T dout, dq = ds k, dk = ds^T q.
#include "attention.cuh"

// delta (N, heads) = the sum of dout times out over a head, and dout in bf16. One warp a head of a row.
KERNEL(128, attention_delta)(const float* dout, const bf16* out, bf16* narrow, float* delta, i64 count, int head_dim) {
  i64 head = i64(blockIdx.x) * blockDim.y + threadIdx.y;
  bool inside = head < count;
  float sum = 0.0f;
  for (int i = threadIdx.x; inside && i < head_dim; i += WARP) {
    i64 at = head * head_dim + i;
    store(narrow + at, dout[at]);
    sum += dout[at] * load(out + at);
  }
  sum = warp_sum(sum);
  if (inside && threadIdx.x == 0) delta[head] = sum;
}

template <int D, int KEYS>
__device__ inline void attention_backward_queries(const bf16* q, const bf16* k, const bf16* v, const bf16* dout,
                                                  const float* lse, const float* delta, float* dq, const Tile* tiles,
                                                  AttentionShape shape) {
  DYNAMIC_SHARED(bytes);
  bf16* queries = (bf16*)bytes;
  bf16* douts = queries + TILE * STRIDE<D>;
  bf16* keys = douts + TILE * STRIDE<D>;
  bf16* values = keys + KEYS * STRIDE<D>;
  Tile tile = tiles[blockIdx.x];
  int head = blockIdx.y, dim = shape.head_dim, count = tile.end - tile.start;
  i64 ld = i64(shape.heads) * dim, kv_ld = i64(shape.kv_heads) * dim;
  int kv_head = head / (shape.heads / shape.kv_heads);
  bool whole = aligned_heads(q, dim) && aligned_heads(k, dim) && aligned_heads(v, dim) && aligned_heads(dout, dim);
  i64 start = tile.start * ld + head * dim;
  k += kv_head * dim;
  v += kv_head * dim;
  Range range = keys_of(tile, shape);
  int row = threadIdx.x / WARP * 16;
  load_tile<D, TILE>(queries, q + start, count, ld, dim, whole);
  load_tile<D, TILE>(douts, dout + start, count, ld, dim, whole);
  float row_lse[2], row_delta[2];
  for (int half = 0; half < 2; half++) {
    int at = row + row_of(half);
    i64 index = i64(tile.start + at_most(at, count - 1)) * shape.heads + head;
    row_lse[half] = lse[index];
    row_delta[half] = delta[index];
  }
  float c[D / 8][4] = {};
  for (int first = range.start; first < range.end; first += KEYS) {
    __syncthreads();
    load_tile<D, KEYS>(keys, k + first * kv_ld, range.end - first, kv_ld, dim, whole);
    load_tile<D, KEYS>(values, v + first * kv_ld, range.end - first, kv_ld, dim, whole);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    float s[KEYS / 8][4], dp[KEYS / 8][4];
    product_transposed<D, KEYS / 8>(s, queries, row, keys);
    product_transposed<D, KEYS / 8>(dp, douts, row, values);
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
      for (int i = 0; i < 4; i++) {
        int query = tile.start + row + row_of(i / 2), key = first + 8 * n + column_of(i);
        Score of = score(s[n][i], shape);
        float p = key < range.end && visible(query, key, shape) ? expf(of.value - row_lse[i / 2]) : 0.0f;
        s[n][i] = p * (dp[n][i] - row_delta[i / 2]) * of.slope;
      }
    }
    accumulate_product<D, D, KEYS / 8>(c, s, keys, 0);
  }
  float factor[2] = {1.0f, 1.0f};
  store_rows<D / 8>(dq + start, c, factor, row, count, ld, dim);
}

// The tile is of keys; dk and dv are summed over the query heads of the group. Channels blockIdx.z * COLUMNS onwards of dk
// and dv are this block's, so that the sums of large heads stay in registers.
template <int D, int COLUMNS, int QUERIES>
__device__ inline void attention_backward_keys(const bf16* q, const bf16* k, const bf16* v, const bf16* dout,
                                               const float* lse, const float* delta, float* dk, float* dv,
                                               const Tile* tiles, AttentionShape shape) {
  DYNAMIC_SHARED(bytes);
  bf16* keys = (bf16*)bytes;
  bf16* values = keys + TILE * STRIDE<D>;
  bf16* queries = values + TILE * STRIDE<D>;
  bf16* douts = queries + QUERIES * STRIDE<D>;
  Tile tile = tiles[blockIdx.x];
  int kv_head = blockIdx.y, dim = shape.head_dim, count = tile.end - tile.start, column = blockIdx.z * COLUMNS;
  int group = shape.heads / shape.kv_heads;
  i64 ld = i64(shape.heads) * dim, kv_ld = i64(shape.kv_heads) * dim;
  bool whole = aligned_heads(q, dim) && aligned_heads(k, dim) && aligned_heads(v, dim) && aligned_heads(dout, dim);
  i64 start = tile.start * kv_ld + kv_head * dim;
  Range range = queries_of(tile, shape);
  int row = threadIdx.x / WARP * 16;
  load_tile<D, TILE>(keys, k + start, count, kv_ld, dim, whole);
  load_tile<D, TILE>(values, v + start, count, kv_ld, dim, whole);
  float c_k[COLUMNS / 8][4] = {}, c_v[COLUMNS / 8][4] = {};
  for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
    for (int first = range.start; first < range.end; first += QUERIES) {
      i64 from = first * ld + head * dim;
      __syncthreads();
      load_tile<D, QUERIES>(queries, q + from, range.end - first, ld, dim, whole);
      load_tile<D, QUERIES>(douts, dout + from, range.end - first, ld, dim, whole);
      commit_copies();
      wait_copies<0>();
      __syncthreads();
      // Transposed: keys are rows and queries are columns.
      float s[QUERIES / 8][4], dp[QUERIES / 8][4];
      product_transposed<D, QUERIES / 8>(s, keys, row, queries);
      product_transposed<D, QUERIES / 8>(dp, values, row, douts);
#pragma unroll
      for (int n = 0; n < QUERIES / 8; n++) {
        for (int i = 0; i < 4; i++) {
          int key = tile.start + row + row_of(i / 2), query = first + 8 * n + column_of(i);
          bool seen = query < range.end && visible(query, key, shape);
          i64 index = i64(at_most(query, range.end - 1)) * shape.heads + head;
          Score of = score(s[n][i], shape);
          s[n][i] = seen ? expf(of.value - lse[index]) : 0.0f;
          dp[n][i] = s[n][i] * (dp[n][i] - delta[index]) * of.slope;
        }
      }
      accumulate_product<D, COLUMNS, QUERIES / 8>(c_v, s, douts, column);
      accumulate_product<D, COLUMNS, QUERIES / 8>(c_k, dp, queries, column);
    }
  }
  // A tile that no query attends to.
  wait_copies<0>();
  float factor[2] = {1.0f, 1.0f};
  store_rows<COLUMNS / 8>(dk + start + column, c_k, factor, row, count, kv_ld, dim - column);
  store_rows<COLUMNS / 8>(dv + start + column, c_v, factor, row, count, kv_ld, dim - column);
}

#define ATTENTION_BACKWARD_QUERIES(name, D, KEYS)                                                                 \
  KERNEL(128, name)(const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const float* lse,              \
                    const float* delta, float* dq, const Tile* tiles, AttentionShape shape) {                     \
    attention_backward_queries<D, KEYS>(q, k, v, dout, lse, delta, dq, tiles, shape);                             \
  }
ATTENTION_BACKWARD_QUERIES(attention_backward_queries_64, 64, 64)
ATTENTION_BACKWARD_QUERIES(attention_backward_queries_128, 128, 64)
ATTENTION_BACKWARD_QUERIES(attention_backward_queries_256, 256, 32)

#define ATTENTION_BACKWARD_KEYS(name, D, COLUMNS, QUERIES)                                                        \
  KERNEL(128, name)(const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const float* lse,              \
                    const float* delta, float* dk, float* dv, const Tile* tiles, AttentionShape shape) {          \
    attention_backward_keys<D, COLUMNS, QUERIES>(q, k, v, dout, lse, delta, dk, dv, tiles, shape);                \
  }
ATTENTION_BACKWARD_KEYS(attention_backward_keys_64, 64, 64, 64)
ATTENTION_BACKWARD_KEYS(attention_backward_keys_128, 128, 128, 32)
ATTENTION_BACKWARD_KEYS(attention_backward_keys_256, 256, 128, 32)
