// Attention's gradients for any dtype, width, strides and chip. docs/attention.md has the equations.
//
// With P = softmax(S), computed again from the LSE that the forward kept, and D = rowsum(P * (d_o v^T)) - d_lse,
//
//   d_v = P^T d_o        d_s = P * (d_o v^T - D), times the softcap's derivative
//   d_k = scale * d_s^T q        d_q = scale * d_s k
//
// Three kernels. attention_delta_kernel: delta = rowsum(d_o * o) - d_lse, which is D up to roundings, o's above all; a
// warp for each row. attention_queries_backward_generic_kernel: a block has kRows queries and goes through their keys.
// It finds what e^(S - LSE) sums up to, and what delta is off by; with them it mends d_q at the end, and leaves them in
// row_stats for the kernel that follows. attention_keys_backward_generic_kernel: a block has kRows keys and goes through
// the queries that see them, of all heads that share these keys; so nobody else adds to its d_k and d_v. S and d_o v^T
// are computed in both, eight products in the place of five; in return nothing is ever added up in another order,
// without atomics and without a workspace for d_q.

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

// What the backward knows of a query; before its keys have been gone through, off and inverse are as here.
template <class A>
struct QueryStats {
  A lse = 0, delta = 0;
  A off = 0;      // what delta is less than D
  A inverse = 1;  // 1 / the sum of e^(S - LSE)
};

// Of a query and a key: P, d_o . v - D, and the softcap's derivative.
template <class A>
struct Element {
  A weight, gap, derivative;
};

// From the products q . k and d_o . v; `seen` is the query's. A query that sees one key alone has P = 1 and no gradient
// from it, exactly: d_o . v and rowsum(d_o * o) are the same, and both left out.
template <class A>
__device__ __forceinline__ Element<A> differentiate(A product, A d_p, int key, const KeyRange& seen,
                                                    const QueryStats<A>& of, const AttentionPlan& plan) {
  if (!seen.has(key)) return {0, 0, 0};
  const A score = capped(product, plan), derivative = capped_derivative(score, plan);
  if (seen.single()) return {exp(score - score), -of.delta, derivative};  // 1, or NaN
  return {weight_of(score, of.lse) * of.inverse, (d_p - of.delta) - of.off, derivative};
}

template <class A, int n>
__device__ __forceinline__ void fill(A (&values)[n], A with) {
#pragma unroll
  for (int i = 0; i < n; ++i) values[i] = with;
}

template <class Tile>
__global__ __launch_bounds__(Tile::kThreads, Tile::kBlocks) void attention_queries_backward_generic_kernel(
    AttentionBackward p) {
  using A = typename Tile::A;
  auto& shared = dynamic_shared<typename Tile::SharedMemory>();
  const AttentionPlan& plan = p.plan;
  const GenericPlace<Tile> at(plan, plan.heads, plan.queries);
  if (!p.d_q && at.depth > 0) return;  // row_stats are the first part's
  const int kv_head = at.head / (plan.heads / plan.kv_heads);
  const int keys = keys_of(plan, at.batch), queries = min(Tile::kRows, plan.queries - at.first);
  const HeadRows q(p.q, at.batch, at.head, at.first, queries), d_o(p.d_o, at.batch, at.head, at.first, queries);

  find_ranges<Tile>(shared, plan, at.batch, at.first, queries, keys);
  __syncthreads();
  const KeyRange all = shared.all;
  KeyRange ranges[Tile::kOwn];
  const int64_t first_row = (int64_t(at.batch) * plan.heads + at.head) * plan.queries + at.first + Tile::first_row();
  QueryStats<A> stats[Tile::kOwn];
  A d_lse[Tile::kOwn], scale[Tile::kOwn];
  fill(d_lse, A(0));
#pragma unroll
  for (int r = 0; r < Tile::kOwn; ++r) {
    ranges[r] = shared.ranges[Tile::first_row() + r];
    if (ranges[r].empty()) continue;
    stats[r].lse = static_cast<const A*>(p.lse)[first_row + r];
    stats[r].delta = static_cast<const A*>(p.delta)[first_row + r];
    if (p.d_lse) d_lse[r] = static_cast<const A*>(p.d_lse)[first_row + r];
  }
  fill(scale, A(1));

  typename Tile::Result d_q = {}, mean_k = {};  // mean: by what P weighs keys with, and the softcap's derivative
  A sum[Tile::kOwn], error[Tile::kOwn];         // of e^(S - LSE); of delta, by the same weights
  fill(sum, A(0));
  fill(error, A(0));
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
        const auto found = differentiate(weights[r][c], d_s[r][c], key, ranges[r], stats[r], plan);
        sum[r] += found.weight;
        error[r] += found.weight * (found.gap - d_lse[r]);
        weights[r][c] = found.weight * found.derivative;
        d_s[r][c] = weights[r][c] * found.gap;
      }
    }
    if (!p.d_q) continue;
    add_weighted<Tile>(d_q, scale, shared, d_s, k, plan, at.depth);
    add_weighted<Tile>(mean_k, scale, shared, weights, k, plan, at.depth);
  }

#pragma unroll
  for (int r = 0; r < Tile::kOwn; ++r) {
    const A whole = sum_of_row<Tile>(sum[r]), inverse = ranges[r].empty() ? A(0) : 1 / whole;
    const A off = sum_of_row<Tile>(error[r]) * inverse;
    if (Tile::lane() == 0 && at.depth == 0 && in_bounds(Tile::first_row() + r, queries)) {
      store(static_cast<A*>(p.row_stats) + (first_row + r) * 2, Vec<A, 2>{off, inverse});
    }
    scale[r] = inverse * A(plan.scale);
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
#pragma unroll
      for (int v = 0; v < Tile::kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < Tile::kVector; ++i) {
          // Fused, it would not be 0 where one key has all the weight.
          d_q[chunk][r][v][i] -= rounded_product(off, mean_k[chunk][r][v][i]);
        }
      }
    }
  }

  const int64_t token = int64_t(plan.heads) * plan.width;
  const int64_t begin = (int64_t(at.batch) * plan.queries + at.first) * token + int64_t(at.head) * plan.width;
  if (p.d_q) store_result<Tile>(p.d_q, begin, token, queries, plan, at.depth, d_q, scale);
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
        const auto found = load<2>(static_cast<const A*>(p.row_stats) + row * 2);
        shared.lse[threadIdx.x] = static_cast<const A*>(p.lse)[row];
        shared.delta[threadIdx.x] = static_cast<const A*>(p.delta)[row];
        shared.off[threadIdx.x] = found.at[0];
        shared.inverse[threadIdx.x] = found.at[1];
      }
      tile_products<Tile>(d_s, shared, v, d_o, plan);
#pragma unroll
      for (int c = 0; c < Tile::kOwnColumns; ++c) {
        const int column = Tile::lane() + c * Tile::kLanes;
        const KeyRange range = shared.ranges[column];
        QueryStats<A> stats;
        if (!range.empty()) {
          stats = {shared.lse[column], shared.delta[column], shared.off[column], shared.inverse[column]};
        }
#pragma unroll
        for (int r = 0; r < Tile::kOwn; ++r) {
          const int key = at.first + Tile::first_row() + r;
          const auto found = differentiate(weights[r][c], d_s[r][c], key, range, stats, plan);
          weights[r][c] = found.weight;
          d_s[r][c] = found.weight * found.gap * found.derivative;
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
    const LaunchShape of_queries = generic_shape<Tile>(p.plan, p.plan.heads, p.plan.queries, stream);
    if (of_queries.grid.x > 0) launch(attention_queries_backward_generic_kernel<Tile>, of_queries, p);
    const LaunchShape of_keys = generic_shape<Tile>(p.plan, p.plan.kv_heads, p.plan.keys, stream);
    if ((p.d_k || p.d_v) && of_keys.grid.x > 0) launch(attention_keys_backward_generic_kernel<Tile>, of_keys, p);
  });
}

}  // namespace fastgpt
