// Attention of few queries against many keys: a step of generation over a cache. Every key and value is read once, so
// all that counts is that they are read fast.
//
// One sequence has too few heads to keep a GPU busy, so its keys are split over blocks (attention_decode_splits); a
// second kernel merges what they found, in the order of the splits. A block has the queries of all heads that share its
// keys, up to kRows of them, so a key that is loaded serves them all. How many keys there are is read on the device,
// and each split takes its share of them; only the number of splits comes from the host, by the room in the cache. No
// synchronisation, and a CUDA graph may hold it.
//
// A key lies in `lanes` lanes of a warp, 16 bytes each (D of 128 in bf16: 16 lanes, two keys in a warp), so loads are
// whole rows. Each lane multiplies its part by the queries' and the lanes add up. A thread has kAhead keys and their
// values on their way at a time: 8 warps of a multiprocessor with 6 loads of 512 bytes are 24 KB (one row: 16 with 8,
// 64 KB), where an H200 moves 32 KB in the microsecond that a load takes (arithmetic; no time on a GPU has been taken
// so far). Each group of lanes has an online softmax of its own keys; at the end groups are joined by shuffles, and
// warps through shared memory.

#include <algorithm>
#include <stdexcept>

#include "attention/scores.cuh"
#include "device/bounds.cuh"
#include "device/numeric.cuh"
#include "device/reduce.cuh"
#include "device/vector.cuh"
#include "host/launch.h"
#include "host/multiprocessors.h"

namespace fastgpt {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kFewestKeys = 256;  // of a split: its share of the merge must not outweigh it
constexpr int kManyRows = 8;
// What registers allow: keys of a group of lanes that are on their way at a time, and blocks of a multiprocessor.
template <int kRows>
constexpr int kAhead = kRows == 1 ? 4 : 3;
template <int kRows>
constexpr int kBlocks = kRows == 1 ? 4 : 2;
constexpr unsigned kAll = 0xffffffffu;

__host__ __device__ constexpr int divided_up(int a, int b) { return (a + b - 1) / b; }

// e^(score - peak) becomes e^(score - larger) by this factor. No score at all: nothing to keep.
__device__ __forceinline__ float decay(float peak, float larger) {
  return peak == -INFINITY ? 0.0f : exp(peak - larger);
}

// A block's queries: up to kRows of the heads that share a key/value head, heads first.
template <int kRows>
struct QueryRows {
  int batch, kv_head, split, first, count, group;

  __device__ __forceinline__ explicit QueryRows(const AttentionForward& p) {
    group = p.plan.heads / p.plan.kv_heads;
    const int rows = p.plan.queries * group, blocks = divided_up(rows, kRows);
    const unsigned block = blockIdx.x / p.splits, head = block / blocks;
    split = int(blockIdx.x % p.splits);
    first = int(block % blocks) * kRows;
    count = min(kRows, rows - first);
    kv_head = int(head % p.plan.kv_heads);
    batch = int(head / p.plan.kv_heads);
  }
  __device__ __forceinline__ int query(int row) const { return (first + row) / group; }
  __device__ __forceinline__ int head(int row) const { return kv_head * group + (first + row) % group; }
};

// Of a block: what each warp found of each row. Eight lanes that store 16 bytes each meet different banks, and so do
// eight that load neighbouring columns: the halves of a lane's columns are in different planes.
template <int kRows, int kPlanes>
struct DecodeShared {
  float o[kWarps][kRows][kPlanes][kWarp * 4 + 16];
  float peak[kWarps][kRows], sum[kWarps][kRows];
  KeyRange ranges[kRows];  // of the queries: registers have no room for them
};

// Four neighbouring columns of a row of O; with the first ones, its LSE.
template <class T>
__device__ __forceinline__ void store_row(const AttentionForward& p, int64_t row, int quad, const Vec16<float>& total,
                                          float peak, float sum) {
  const AttentionPlan& plan = p.plan;
  const int64_t of_batch = int64_t(plan.heads) * plan.queries;
  const int batch = int(row / of_batch), head = int(row % of_batch / plan.queries), query = int(row % plan.queries);
  const bool blind = keys_seen(plan, batch, query, keys_of(plan, batch)).empty();
  const float scale = blind ? 0.0f : 1 / sum;
  Vec<T, 4> o;
#pragma unroll
  for (int j = 0; j < 4; ++j) o.at[j] = narrow<T>(total.at[j] * scale);
  const int64_t token = (int64_t(batch) * plan.queries + query) * plan.heads + head;
  store(static_cast<T*>(p.o) + token * plan.width + quad * 4, o);
  if (quad == 0) store_lse(p, row, blind, peak, sum);
}

template <class T, int kRows>
__global__ __launch_bounds__(kThreads, kBlocks<kRows>) void attention_decode_kernel(AttentionForward p) {
  constexpr int kSize = Vec16<T>::kSize, kPlanes = kSize / 4, kKeys = kAhead<kRows>;
  auto& shared = dynamic_shared<DecodeShared<kRows, kPlanes>>();
  const AttentionPlan& plan = p.plan;
  const QueryRows<kRows> rows(p);
  const int keys = keys_of(plan, rows.batch);

  const int vectors = plan.width / kSize;
  int lanes = 1;
  while (lanes < vectors) lanes *= 2;
  const int lane = threadIdx.x % lanes, slot = threadIdx.x / lanes, slots = kThreads / lanes;
  const bool holds = in_bounds(lane, vectors);

  if (in_bounds(int(threadIdx.x), rows.count)) {
    shared.ranges[threadIdx.x] = keys_seen(plan, rows.batch, rows.query(threadIdx.x), keys);
  }
  __syncthreads();
  KeyRange all;
  Vec16<T> q[kRows] = {};  // as it is stored: widened it would take twice the registers
  float o[kRows][kSize] = {}, peak[kRows], sum[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    peak[r] = -INFINITY;
    sum[r] = 0;
    if (r >= rows.count) continue;
    all.join(shared.ranges[r].begin, shared.ranges[r].end);
    if (!holds) continue;
    const int64_t at = rows.batch * p.q.batch + rows.query(r) * p.q.token + rows.head(r) * p.q.head;
    q[r] = load16(static_cast<const T*>(p.q.data) + at + lane * kSize);
  }

  const int share = all.empty() ? 0 : divided_up(all.end - all.begin, p.splits);
  const int begin = all.empty() ? 0 : all.begin + rows.split * share, end = min(begin + share, all.end);
  const T* k_head = static_cast<const T*>(p.k.data) + rows.batch * p.k.batch + rows.kv_head * p.k.head + lane * kSize;
  const T* v_head = static_cast<const T*>(p.v.data) + rows.batch * p.v.batch + rows.kv_head * p.v.head + lane * kSize;
  for (int first = begin; first < end; first += kKeys * slots) {
    Vec16<T> k[kKeys], v[kKeys];
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
      const int key = first + u * slots + slot;
      k[u] = v[u] = Vec16<T>{};
      if (!holds || !in_bounds(key, end)) continue;
      k[u] = load16(k_head + key * p.k.token);
      v[u] = load16(v_head + key * p.v.token);
    }
    // A key is widened once for all rows, and so is its value: as floats all of them would not fit the registers.
    float scores[kRows][kKeys];
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
      float wide[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) wide[i] = widen(k[u].at[i]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows.count) continue;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kSize; ++i) sum = fma(widen(q[r].at[i]), wide[i], sum);
        for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAll, sum, distance);
        scores[r][u] = sum;
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows.count) continue;
      const KeyRange range = shared.ranges[r];
      float larger = peak[r];
#pragma unroll
      for (int u = 0; u < kKeys; ++u) {
        const int key = first + u * slots + slot;
        scores[r][u] = key < end && range.has(key) ? capped(scores[r][u], plan) : -INFINITY;
        larger = max(larger, scores[r][u]);
      }
      const float kept = decay(peak[r], larger), base = larger == -INFINITY ? 0 : larger;
      peak[r] = larger;
      sum[r] *= kept;
#pragma unroll
      for (int i = 0; i < kSize; ++i) o[r][i] *= kept;
#pragma unroll
      for (int u = 0; u < kKeys; ++u) {
        scores[r][u] = exp(scores[r][u] - base);
        sum[r] += scores[r][u];
      }
    }
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
      float wide[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) wide[i] = widen(v[u].at[i]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows.count) continue;
#pragma unroll
        for (int i = 0; i < kSize; ++i) o[r][i] = fma(scores[r][u], wide[i], o[r][i]);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    for (int distance = lanes; distance < kWarp; distance *= 2) {
      const float other_peak = __shfl_xor_sync(kAll, peak[r], distance), larger = max(peak[r], other_peak);
      const float kept = decay(peak[r], larger), added = decay(other_peak, larger);
      peak[r] = larger;
      sum[r] = sum[r] * kept + __shfl_xor_sync(kAll, sum[r], distance) * added;
#pragma unroll
      for (int i = 0; i < kSize; ++i) o[r][i] = o[r][i] * kept + __shfl_xor_sync(kAll, o[r][i], distance) * added;
    }
    const int warp = threadIdx.x / kWarp;
    if (int(threadIdx.x % kWarp) >= lanes) continue;
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      store16(&shared.o[warp][r][plane][lane * 4],
              {o[r][plane * 4], o[r][plane * 4 + 1], o[r][plane * 4 + 2], o[r][plane * 4 + 3]});
    }
    if (lane == 0) shared.peak[warp][r] = peak[r], shared.sum[warp][r] = sum[r];
  }
  __syncthreads();

  const int quads = plan.width / 4;
  for (int i = threadIdx.x; i < rows.count * quads; i += kThreads) {
    const int r = i / quads, quad = i % quads;
    float larger = -INFINITY, whole = 0;
    for (int warp = 0; warp < kWarps; ++warp) larger = max(larger, shared.peak[warp][r]);
    Vec16<float> total = {};
    for (int warp = 0; warp < kWarps; ++warp) {
      const float kept = decay(shared.peak[warp][r], larger);
      whole += shared.sum[warp][r] * kept;
      const Vec16<float> part = load16(&shared.o[warp][r][quad % kPlanes][quad / kPlanes * 4]);
#pragma unroll
      for (int j = 0; j < 4; ++j) total.at[j] += part.at[j] * kept;
    }
    const int64_t row = (int64_t(rows.batch) * plan.heads + rows.head(r)) * plan.queries + rows.query(r);
    if (p.splits > 1) {
      const int64_t part = row * p.splits + rows.split;
      store16(static_cast<float*>(p.partial_o) + part * plan.width + quad * 4, total);
      if (quad == 0) store(static_cast<float*>(p.partial_stats) + part * 2, Vec<float, 2>{larger, whole});
    } else {
      store_row<T>(p, row, quad, total, larger, whole);
    }
  }
}

constexpr int kMergeThreads = 128, kMergeBlocks = 8;  // of a multiprocessor

// A warp for each row.
template <class T>
__global__ __launch_bounds__(kMergeThreads, kMergeBlocks) void attention_decode_merge_kernel(AttentionForward p) {
  const AttentionPlan& plan = p.plan;
  const int64_t row = int64_t(blockIdx.x) * (kMergeThreads / kWarp) + threadIdx.x / kWarp;
  if (!in_bounds(row, int64_t(plan.batches) * plan.heads * plan.queries)) return;
  const float* stats = static_cast<const float*>(p.partial_stats) + row * p.splits * 2;
  const float* parts = static_cast<const float*>(p.partial_o) + row * p.splits * plan.width;

  float larger = -INFINITY;
  for (int split = 0; split < p.splits; ++split) larger = max(larger, stats[split * 2]);
  for (int quad = threadIdx.x % kWarp; quad < plan.width / 4; quad += kWarp) {
    Vec16<float> total = {};
    float whole = 0;
    for (int split = 0; split < p.splits; ++split) {
      const Vec<float, 2> stat = load<2>(stats + split * 2);
      const float kept = decay(stat.at[0], larger);
      whole += stat.at[1] * kept;
      const Vec16<float> part = load16(parts + split * plan.width + quad * 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) total.at[j] += part.at[j] * kept;
    }
    store_row<T>(p, row, quad, total, larger, whole);
  }
}

template <class T, int kRows>
void decode(const AttentionForward& p, Stream stream) {
  const AttentionPlan& plan = p.plan;
  const int rows = plan.queries * (plan.heads / plan.kv_heads);
  const int64_t blocks = int64_t(plan.batches) * plan.kv_heads * divided_up(rows, kRows) * p.splits;
  if (blocks == 0) return;
  if (blocks > INT_MAX) throw std::runtime_error("attention: too many blocks for one launch");
  launch(attention_decode_kernel<T, kRows>,
         {dim3(unsigned(blocks)), dim3(kThreads), sizeof(DecodeShared<kRows, Vec16<T>::kSize / 4>), stream}, p);
  if (p.splits == 1) return;
  const int64_t merged = (int64_t(plan.batches) * plan.heads * plan.queries + kMergeThreads / kWarp - 1) /
                         (kMergeThreads / kWarp);
  launch(attention_decode_merge_kernel<T>, {dim3(unsigned(merged)), dim3(kMergeThreads), 0, stream}, p);
}

template <class T>
void decode(const AttentionForward& p, Stream stream) {
  // Almost always one row, or those of a few heads that share their keys.
  if (p.plan.queries * (p.plan.heads / p.plan.kv_heads) == 1) return decode<T, 1>(p, stream);
  decode<T, kManyRows>(p, stream);
}

}  // namespace

int attention_decode_splits(const AttentionPlan& plan) {
  const int rows = plan.queries * (plan.heads / plan.kv_heads);
  const int64_t blocks = int64_t(plan.batches) * plan.kv_heads * divided_up(rows, kManyRows);
  const int64_t running = int64_t(multiprocessors()) * (rows == 1 ? kBlocks<1> : kBlocks<kManyRows>);
  return int(std::max<int64_t>(1, std::min<int64_t>(running / std::max<int64_t>(blocks, 1), plan.keys / kFewestKeys)));
}

void launch_attention_decode(const AttentionForward& p, Stream stream) {
  switch (p.plan.dtype) {
    case DType::float32: return decode<float>(p, stream);
    case DType::bfloat16: return decode<__nv_bfloat16>(p, stream);
    case DType::float16: return decode<__half>(p, stream);
    default: throw std::runtime_error("attention: float64 is not decoded");
  }
}

}  // namespace fastgpt
