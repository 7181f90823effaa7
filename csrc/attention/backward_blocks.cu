// What runs before and after the backwards on tensor cores: delta, what each tile of queries sees, and the sum of d_q's
// parts.

#include <algorithm>

#include "attention/backward_blocks.cuh"
#include "host/launch.h"

namespace fastgpt {
namespace {

constexpr int kThreadsOfVisible = 128, kMostQueries = 128;
constexpr int kMostSumThreads = 256, kSumSize = Vec16<float>::kSize, kDeltaThreads = 256;
constexpr int kVector = 8;  // elements of 16 bits: a vector of 16 bytes

// As attention_delta_kernel's, of rows that are whole vectors: `lanes` neighbours, a power of two, for each token and
// head.
template <class T>
__global__ __launch_bounds__(kDeltaThreads) void attention_delta_of_vectors_kernel(AttentionBackward p, int lanes) {
  const AttentionPlan& plan = p.plan;
  const int64_t row = int64_t(blockIdx.x) * (kDeltaThreads / lanes) + threadIdx.x / lanes;
  const int column = threadIdx.x % lanes * kVector;
  const bool exists = in_bounds(row, int64_t(plan.batches) * plan.queries * plan.heads);
  const int64_t token = row / plan.heads;
  const int head = int(row % plan.heads), query = int(token % plan.queries), batch = int(token / plan.queries);
  float sum = 0;
  if (exists && in_bounds(column, plan.width) && !keys_seen(plan, batch, query, keys_of(plan, batch)).single()) {
    const Vec16<T> d_o = load16(rows_of_head<T>(p.d_o, batch, head, query) + column);
    const Vec16<T> o = load16(rows_of_head<T>(p.o, batch, head, query) + column);
#pragma unroll
    for (int e = 0; e < kVector; ++e) sum += widen(d_o.at[e]) * widen(o.at[e]);
  }
  for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (exists && column == 0) {
    const int64_t to = (int64_t(batch) * plan.heads + head) * plan.queries + query;
    static_cast<float*>(p.delta)[to] = p.d_lse ? sum - static_cast<const float*>(p.d_lse)[to] : sum;
  }
}

// Where there are documents, once: every block asks for every tile. A warp for each.
__global__ __launch_bounds__(kThreadsOfVisible) void attention_visible_kernel(AttentionBackward p,
                                                                              int queries_of_tile) {
  const AttentionPlan& plan = p.plan;
  const int tiles = (plan.queries + queries_of_tile - 1) / queries_of_tile;
  const int64_t warp = int64_t(blockIdx.x) * (kThreadsOfVisible / 32) + warp_of_block();
  if (!in_bounds(warp, int64_t(plan.batches) * tiles)) return;
  const int batch = int(warp / tiles), first = int(warp % tiles) * queries_of_tile;
  const Visible seen =
      visible_to<kMostQueries>(plan, batch, first, min(queries_of_tile, plan.queries - first), plan.keys);
  if (lane_of_warp() == 0) {
    store(p.visible + warp * 4, Vec<int32_t, 4>{seen.some.begin, seen.some.end, seen.all.begin, seen.all.end});
  }
}

// d_q = scale * the sum of the parts that a tile of keys has added to. A block for each token.
template <class T>
__global__ __launch_bounds__(kMostSumThreads) void attention_sum_queries_kernel(AttentionBackward p, int keys_of_tile,
                                                                                int queries_of_tile) {
  const AttentionPlan& plan = p.plan;
  const int batch = int(blockIdx.x) / plan.queries, query = int(blockIdx.x) % plan.queries;
  const Visible seen = seen_by_tile(p, batch, query / queries_of_tile, queries_of_tile, keys_of(plan, batch));
  const bool blind = seen.some.empty();
  const int first = blind ? 0 : seen.some.begin / keys_of_tile;
  const int tiles = blind ? 0 : (seen.some.end - 1) / keys_of_tile - first + 1;
  const int64_t size = int64_t(plan.heads) * plan.width, part_size = size * plan.queries * plan.batches;
  for (int64_t i = threadIdx.x * kSumSize; i < size; i += blockDim.x * kSumSize) {
    const int64_t at = blockIdx.x * size + i;
    Vec16<float> sums{};
    int turn = p.splits - first % p.splits;  // of a split: how many tiles it is behind the first one
    for (int split = 0; split < p.splits; ++split, ++turn) {
      if (turn == p.splits) turn = 0;
      if (turn >= tiles) continue;
      const Vec16<float> part = load16(p.partial_d_q + split * part_size + at);
#pragma unroll
      for (int e = 0; e < kSumSize; ++e) sums.at[e] += part.at[e];
    }
    Vec<T, kSumSize> d_q;
#pragma unroll
    for (int e = 0; e < kSumSize; ++e) d_q.at[e] = narrow<T>(sums.at[e] * float(plan.scale));
    store(static_cast<T*>(p.d_q) + at, d_q);
  }
}

}  // namespace

unsigned attention_blocks(int64_t blocks) {
  if (blocks > INT_MAX) throw std::runtime_error("attention: too many blocks for one launch");
  return unsigned(blocks);
}

void launch_attention_delta_of_vectors(const AttentionBackward& p, Stream stream) {
  const AttentionPlan& plan = p.plan;
  int lanes = 1;
  while (lanes * kVector < plan.width) lanes *= 2;
  const int rows = kDeltaThreads / lanes;  // of a block
  const int64_t blocks = (int64_t(plan.batches) * plan.queries * plan.heads + rows - 1) / rows;
  if (blocks == 0) return;
  const LaunchShape shape{dim3(attention_blocks(blocks)), dim3(kDeltaThreads), 0, stream};
  if (plan.dtype == DType::bfloat16) launch(attention_delta_of_vectors_kernel<__nv_bfloat16>, shape, p, lanes);
  else launch(attention_delta_of_vectors_kernel<__half>, shape, p, lanes);
}

void launch_attention_visible(const AttentionBackward& p, int queries_of_tile, Stream stream) {
  const AttentionPlan& plan = p.plan;
  if (!plan.doc_start || plan.queries == 0) return;
  const int64_t warps = int64_t(plan.batches) * ((plan.queries + queries_of_tile - 1) / queries_of_tile);
  const int64_t blocks = (warps * 32 + kThreadsOfVisible - 1) / kThreadsOfVisible;
  launch(attention_visible_kernel, {dim3(attention_blocks(blocks)), dim3(kThreadsOfVisible), 0, stream}, p,
         queries_of_tile);
}

void launch_attention_sum_queries(const AttentionBackward& p, int keys_of_tile, int queries_of_tile, Stream stream) {
  const AttentionPlan& plan = p.plan;
  const int64_t tokens = int64_t(plan.batches) * plan.queries, vectors = int64_t(plan.heads) * plan.width / kSumSize;
  if (!p.d_q || tokens == 0 || vectors == 0) return;
  const int threads = int(std::min<int64_t>((vectors + 31) / 32 * 32, kMostSumThreads));
  const LaunchShape shape{dim3(attention_blocks(tokens)), dim3(unsigned(threads)), 0, stream};
  const auto sum = plan.dtype == DType::bfloat16 ? attention_sum_queries_kernel<__nv_bfloat16>
                                                 : attention_sum_queries_kernel<__half>;
  launch(sum, shape, p, keys_of_tile, queries_of_tile);
}

}  // namespace fastgpt
