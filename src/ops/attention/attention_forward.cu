// Attention, forward: online softmax over tiles of keys (Dao et al. 2022, algorithm 1; Dao 2023, algorithm 1).
#include "attention.cuh"

// Softmax of the scores of one tile of keys: the running maximum and sum of two rows a lane, `s` becomes e^(s - max), and
// `rescale` what earlier sums must be multiplied by.
template <int NT>
__device__ inline void update_softmax(float s[NT][4], float max[2], float sum[2], float rescale[2]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float highest = max[half];
#pragma unroll
    for (int n = 0; n < NT; n++) highest = fmaxf(highest, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    highest = fmaxf(highest, shuffle_xor(highest, 1));
    highest = fmaxf(highest, shuffle_xor(highest, 2));
    // A row that sees no key of this tile or an earlier one.
    float shift = highest == -INFINITY ? 0.0f : highest;
    rescale[half] = expf(max[half] - shift);
    float part = 0.0f;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      for (int i = 2 * half; i < 2 * half + 2; i++) {
        s[n][i] = expf(s[n][i] - shift);
        part += s[n][i];
      }
    }
    max[half] = highest;
    sum[half] = sum[half] * rescale[half] + part;
  }
}

// While a tile of keys is multiplied, the values are on their way, and the other way round.
template <int D, int KEYS>
__device__ inline void attention_forward(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse,
                                         const Tile* tiles, AttentionShape shape) {
  DYNAMIC_SHARED(bytes);
  bf16* queries = (bf16*)bytes;
  bf16* keys = queries + TILE * STRIDE<D>;
  bf16* values = keys + KEYS * STRIDE<D>;
  Tile tile = tiles[blockIdx.x];
  int head = blockIdx.y, dim = shape.head_dim, count = tile.end - tile.start;
  i64 ld = i64(shape.heads) * dim, kv_ld = i64(shape.kv_heads) * dim;
  int kv_head = head / (shape.heads / shape.kv_heads);
  bool whole = aligned_heads(q, dim) && aligned_heads(k, dim) && aligned_heads(v, dim);
  q += tile.start * ld + head * dim;
  out += tile.start * ld + head * dim;
  k += kv_head * dim;
  v += kv_head * dim;
  Range range = keys_of(tile, shape);
  int row = threadIdx.x / WARP * 16;

  load_tile<D, TILE>(queries, q, count, ld, dim, whole);
  load_tile<D, KEYS>(keys, k + range.start * kv_ld, range.end - range.start, kv_ld, dim, whole);
  commit_copies();
  float c[D / 8][4] = {}, max[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
  for (int first = range.start; first < range.end; first += KEYS) {
    load_tile<D, KEYS>(values, v + first * kv_ld, range.end - first, kv_ld, dim, whole);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    float s[KEYS / 8][4];
    product_transposed<D, KEYS / 8>(s, queries, row, keys);
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
      for (int i = 0; i < 4; i++) {
        int query = tile.start + row + row_of(i / 2), key = first + 8 * n + column_of(i);
        s[n][i] = key < range.end && visible(query, key, shape) ? score(s[n][i], shape).value : -INFINITY;
      }
    }
    float rescale[2];
    update_softmax<KEYS / 8>(s, max, sum, rescale);
#pragma unroll
    for (int n = 0; n < D / 8; n++)
      for (int i = 0; i < 4; i++) c[n][i] *= rescale[i / 2];
    // Every warp has read the keys, and every thread's copies of values are here.
    wait_copies<0>();
    __syncthreads();
    if (first + KEYS < range.end) {
      i64 next = first + KEYS;
      load_tile<D, KEYS>(keys, k + next * kv_ld, int(range.end - next), kv_ld, dim, whole);
    }
    commit_copies();
    accumulate_product<D, D, KEYS / 8>(c, s, values, 0);
    __syncthreads();
  }
  wait_copies<0>();

  float factor[2];
  for (int half = 0; half < 2; half++) {
    sum[half] += shuffle_xor(sum[half], 1);
    sum[half] += shuffle_xor(sum[half], 2);
    factor[half] = 1.0f / sum[half];
    int at = row + row_of(half);
    if (at < count && threadIdx.x % 4 == 0) lse[i64(tile.start + at) * shape.heads + head] = max[half] + logf(sum[half]);
  }
  store_rows<D / 8>(out, c, factor, row, count, ld, dim);
}

#define ATTENTION_FORWARD(name, D, KEYS)                                                                              \
  KERNEL(128, name)(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse, const Tile* tiles,            \
                    AttentionShape shape) {                                                                           \
    attention_forward<D, KEYS>(q, k, v, out, lse, tiles, shape);                                                      \
  }
ATTENTION_FORWARD(attention_forward_64, 64, 64)
ATTENTION_FORWARD(attention_forward_128, 128, 64)
ATTENTION_FORWARD(attention_forward_256, 256, 32)
