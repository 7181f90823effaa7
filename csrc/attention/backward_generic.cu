// Attention's gradients for any dtype, width, strides and chip. docs/attention.md has the equations.
//
// With P = exp(S - LSE), computed again from the LSE that the forward kept, and delta = rowsum(d_o * o) - d_lse (of a
// query that sees one key alone, d_o v^T and rowsum(d_o * o) are the same, and both left out),
//
//   d_v = P^T d_o        d_s = P * (d_o v^T - delta), times the softcap's derivative
//   d_k = scale * d_s^T q        d_q = scale * d_s k
//
// Three kernels. attention_delta_kernel: delta, a warp for each row. attention_keys_backward_generic_kernel: a block
// has kRows keys and goes through the queries that see them, of all heads that share these keys; so nobody else adds to
// its d_k and d_v. attention_queries_backward_generic_kernel: a block has kRows queries and goes through their keys. S
// and d_o v^T are computed in both, seven products in the place of five; in return nothing is ever added up in another
// order, without atomics and without a workspace for d_q.

#include "attention/generic.cuh"
#include "device/reduce.cuh"

namespace fastgpt {
namespace {

constexpr int kDeltaThreads = 128;

// A warp for each token and head.
template <class A>
__global__ __launch_bounds__(kDeltaThreads) void attention_delta_kernel(AttentionBackward p) {
  const AttentionPlan& plan = p.plan;
  const int64_t row = int64_t(blockIdx.x) * (kDeltaThreads / kWarp) + threadIdx.x / kWarp;
  if (!in_bounds(row, int64_t(plan.batches) * plan.queries * plan.heads)) return;
  const int64_t head = row % plan.heads, token = row / plan.heads, query = token % plan.queries,
                batch = token / plan.queries;
  const int64_t d_o = batch * p.d_o.batch + query * p.d_o.token + head * p.d_o.head;
  const int64_t o = batch * p.o.batch + query * p.o.token + head * p.o.head;
  A sum = 0;
  const bool single = keys_seen(plan, int(batch), int(query), keys_of(plan, int(batch))).single();
  for (int i = threadIdx.x % kWarp; i < plan.width && !single; i += kWarp) {
    sum += load_as<A>(p.d_o.data, plan.dtype, d_o + i) * load_as<A>(p.o.data, plan.dtype, o + i);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) {
    const int64_t to = (batch * plan.heads + head) * plan.queries + query;
    static_cast<A*>(p.delta)[to] = p.d_lse ? sum - static_cast<const A*>(p.d_lse)[to] : sum;
  }
}

// What the backward knows of a query.
template <class A>
struct QueryStats {
  A lse = 0, lse_rest = 0, delta = 0;

  __device__ __forceinline__ static QueryStats load(const AttentionBackward& p, int64_t row) {
    return {static_cast<const A*>(p.lse)[row], p.lse_rest ? A(p.lse_rest[row]) : A(0),
            static_cast<const A*>(p.delta)[row]};
  }
};

// P and d_s of a tile, from the products q . k (in p) and d_o . v (in d_s); the others are of the element's query.
template <class A>
__device__ __forceinline__ void differentiate(A& p, A& d_s, int key, const KeyRange& seen, const QueryStats<A>& of,
                                              const AttentionPlan& plan) {
  if (!seen.has(key)) {
    p = d_s = 0;
    return;
  }
  const A score = capped(p, plan), d_p = seen.single() ? A(0) : d_s;
  p = seen.single() ? exp(score - score) : exp((score - of.lse) - of.lse_rest);  // single: 1, or NaN
  d_s = p * (d_p - of.delta) * capped_derivative(score, plan);
}

template <class A, int n>
__device__ __forceinline__ void fill(A (&values)[n], A with) {
#pragma unroll
  for (int i = 0; i < n; ++i) values[i] = with;
}

template <class Tile>
__global__ __launch_bounds__(Tile::kThreads, Tile::kBlocks) void attention_keys_backward_generic_kernel(
    AttentionBackward p) {
  using A = typename Tile::A;
  auto& shared = dynamic_shared<typename Tile::SharedMemory>();
  const AttentionPlan& plan = p.plan;
  const GenericPlace<Tile> at(plan, plan.kv_heads, plan.keys);
  const int group = plan.heads / plan.kv_heads, keys = keys_of(plan, at.batch);
  const int stored = min(Tile::kRows, plan.keys - at.first), count = min(stored, keys - at.first);  // may be negative
  const HeadRows k(p.k, at.batch, at.head, at.first, max(0, count)), v(p.v, at.batch, at.head, at.first, max(0, count));

  typename Tile::Result d_k = {}, d_v = {};
  A scale[Tile::kOwn];
  fill(scale, A(1));

  const KeyRange queries = count > 0 ? queries_seeing(plan, at.first, at.first + count, keys) : KeyRange();
  for (int first = queries.begin; first < queries.end; first += Tile::kColumns) {
    const int columns = min(Tile::kColumns, queries.end - first);
    __syncthreads();  // the ranges that were here have been read
    find_ranges<Tile>(shared, plan, at.batch, first, columns, keys);
    __syncthreads();
    if (!shared.all.meets(at.first, at.first + count)) continue;

    for (int head = at.head * group; head < (at.head + 1) * group; ++head) {
      const HeadRows q(p.q, at.batch, head, first, columns), d_o(p.d_o, at.batch, head, first, columns);
      typename Tile::Scores weights, d_s;
      tile_products<Tile>(weights, shared, k, q, plan);
      if (in_bounds(int(threadIdx.x), columns)) {
        const int64_t row = (int64_t(at.batch) * plan.heads + head) * plan.queries + first + threadIdx.x;
        const auto stats = QueryStats<A>::load(p, row);
        shared.lse[threadIdx.x] = stats.lse;
        shared.lse_rest[threadIdx.x] = stats.lse_rest;
        shared.delta[threadIdx.x] = stats.delta;
      }
      tile_products<Tile>(d_s, shared, v, d_o, plan);
#pragma unroll
      for (int c = 0; c < Tile::kOwnColumns; ++c) {
        const int column = Tile::lane() + c * Tile::kLanes;
        const KeyRange range = shared.ranges[column];
        QueryStats<A> stats;
        if (!range.empty()) stats = {shared.lse[column], shared.lse_rest[column], shared.delta[column]};
#pragma unroll
        for (int r = 0; r < Tile::kOwn; ++r) {
          differentiate(weights[r][c], d_s[r][c], at.first + Tile::first_row() + r, range, stats, plan);
        }
      }
      if (p.d_v) add_weighted<Tile>(d_v, scale, shared, weights, d_o, plan, at.depth);
      if (p.d_k) add_weighted<Tile>(d_k, scale, shared, d_s, q, plan, at.depth);
    }
  }

  const int64_t token = int64_t(plan.kv_heads) * plan.width;
  const int64_t begin = (int64_t(at.batch) * plan.keys + at.first) * token + int64_t(at.head) * plan.width;
  if (p.d_v) store_result<Tile>(p.d_v, begin, token, stored, plan, at.depth, d_v, scale);
  fill(scale, A(plan.scale));
  if (p.d_k) store_result<Tile>(p.d_k, begin, token, stored, plan, at.depth, d_k, scale);
}

template <class Tile>
__global__ __launch_bounds__(Tile::kThreads, Tile::kBlocks) void attention_queries_backward_generic_kernel(
    AttentionBackward p) {
  using A = typename Tile::A;
  auto& shared = dynamic_shared<typename Tile::SharedMemory>();
  const AttentionPlan& plan = p.plan;
  const GenericPlace<Tile> at(plan, plan.heads, plan.queries);
  const int kv_head = at.head / (plan.heads / plan.kv_heads);
  const int keys = keys_of(plan, at.batch), queries = min(Tile::kRows, plan.queries - at.first);
  const HeadRows q(p.q, at.batch, at.head, at.first, queries), d_o(p.d_o, at.batch, at.head, at.first, queries);

  find_ranges<Tile>(shared, plan, at.batch, at.first, queries, keys);
  __syncthreads();
  const KeyRange all = shared.all;
  KeyRange ranges[Tile::kOwn];
  QueryStats<A> stats[Tile::kOwn];
  A scale[Tile::kOwn];
#pragma unroll
  for (int r = 0; r < Tile::kOwn; ++r) {
    const int row = Tile::first_row() + r;
    ranges[r] = shared.ranges[row];
    if (ranges[r].empty()) continue;
    const int64_t at_row = (int64_t(at.batch) * plan.heads + at.head) * plan.queries + at.first + row;
    stats[r] = QueryStats<A>::load(p, at_row);
  }
  fill(scale, A(1));

  typename Tile::Result d_q = {};
  for (int first = all.begin; first < all.end; first += Tile::kColumns) {
    const int count = min(Tile::kColumns, all.end - first);
    const HeadRows k(p.k, at.batch, kv_head, first, count), v(p.v, at.batch, kv_head, first, count);
    typename Tile::Scores weights, d_s;
    tile_products<Tile>(weights, shared, q, k, plan);
    tile_products<Tile>(d_s, shared, d_o, v, plan);
#pragma unroll
    for (int r = 0; r < Tile::kOwn; ++r) {
#pragma unroll
      for (int c = 0; c < Tile::kOwnColumns; ++c) {
        const int key = first + Tile::lane() + c * Tile::kLanes;
        differentiate(weights[r][c], d_s[r][c], key, ranges[r], stats[r], plan);
      }
    }
    add_weighted<Tile>(d_q, scale, shared, d_s, k, plan, at.depth);
  }

  const int64_t token = int64_t(plan.heads) * plan.width;
  const int64_t begin = (int64_t(at.batch) * plan.queries + at.first) * token + int64_t(at.head) * plan.width;
  fill(scale, A(plan.scale));
  store_result<Tile>(p.d_q, begin, token, queries, plan, at.depth, d_q, scale);
}

}  // namespace

void launch_attention_delta(const AttentionBackward& p, Stream stream) {
  constexpr int kRows = kDeltaThreads / kWarp;
  const int64_t blocks = (int64_t(p.plan.batches) * p.plan.queries * p.plan.heads + kRows - 1) / kRows;
  if (blocks == 0) return;
  if (blocks > INT_MAX) throw std::runtime_error("attention: too many blocks for one launch");
  const LaunchShape shape{dim3(unsigned(blocks)), dim3(kDeltaThreads), 0, stream};
  p.plan.dtype == DType::float64 ? launch(attention_delta_kernel<double>, shape, p)
                                 : launch(attention_delta_kernel<float>, shape, p);
}

void launch_attention_backward_generic(const AttentionBackward& p, Stream stream) {
  if (p.plan.width == 0) return;
  with_generic_tile(p.plan, [&](auto tile) {
    using Tile = decltype(tile);
    const LaunchShape of_keys = generic_shape<Tile>(p.plan, p.plan.kv_heads, p.plan.keys, stream);
    if ((p.d_k || p.d_v) && of_keys.grid.x > 0) launch(attention_keys_backward_generic_kernel<Tile>, of_keys, p);
    const LaunchShape of_queries = generic_shape<Tile>(p.plan, p.plan.heads, p.plan.queries, stream);
    if (p.d_q && of_queries.grid.x > 0) launch(attention_queries_backward_generic_kernel<Tile>, of_queries, p);
  });
}

}  // namespace fastgpt
