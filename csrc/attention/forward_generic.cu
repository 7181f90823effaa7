// Attention's forward for any dtype, width, strides and chip. docs/attention.md tells where it comes from.
//
// A block has kRows queries of one head and goes through the keys that any of them sees, kColumns at a time: scores of
// the tile, the softmax so far (online: where a larger score turns up, all that was summed is scaled down), weights
// times values. Tiles that the masks hide entirely are never met. A thread sums the weights of its own columns of a
// row; these sums are added up at the end.
//
// In bf16 and fp16 scores and weights are float, and only q, k, v and o are rounded.

#include "attention/generic.cuh"

namespace fastgpt {
namespace {

// Over the lanes that share a row.
template <class Tile, class A>
__device__ __forceinline__ A largest_of_row(A x) {
  for (int distance = Tile::kLanes / 2; distance > 0; distance /= 2) {
    x = max(x, __shfl_xor_sync(0xffffffffu, x, distance));
  }
  return x;
}

template <class Tile>
__global__ __launch_bounds__(Tile::kThreads, Tile::kBlocks) void attention_forward_generic_kernel(AttentionForward p) {
  using A = typename Tile::A;
  auto& shared = dynamic_shared<typename Tile::SharedMemory>();
  const AttentionPlan& plan = p.plan;
  const GenericPlace<Tile> at(plan, plan.heads, plan.queries);
  const int kv_head = at.head / (plan.heads / plan.kv_heads);
  const int keys = keys_of(plan, at.batch), queries = min(Tile::kRows, plan.queries - at.first);
  const HeadRows q(p.q, at.batch, at.head, at.first, queries);

  find_ranges<Tile>(shared, plan, at.batch, at.first, queries, keys);
  __syncthreads();
  KeyRange ranges[Tile::kOwn];
#pragma unroll
  for (int r = 0; r < Tile::kOwn; ++r) ranges[r] = shared.ranges[Tile::first_row() + r];
  const KeyRange all = shared.all;

  typename Tile::Result o = {};
  A peak[Tile::kOwn], sum[Tile::kOwn], decay[Tile::kOwn];
#pragma unroll
  for (int r = 0; r < Tile::kOwn; ++r) peak[r] = -A(INFINITY), sum[r] = 0;

  for (int first = all.begin; first < all.end; first += Tile::kColumns) {
    const int count = min(Tile::kColumns, all.end - first);
    typename Tile::Scores scores;
    tile_products<Tile>(scores, shared, q, HeadRows(p.k, at.batch, kv_head, first, count), plan);
#pragma unroll
    for (int r = 0; r < Tile::kOwn; ++r) {
      A larger = peak[r];
#pragma unroll
      for (int c = 0; c < Tile::kOwnColumns; ++c) {
        const int key = first + Tile::lane() + c * Tile::kLanes;
        scores[r][c] = ranges[r].has(key) ? capped(scores[r][c], plan) : -A(INFINITY);
        larger = max(larger, scores[r][c]);  // NaN is in the sum, not here
      }
      larger = largest_of_row<Tile>(larger);
      const A base = larger == -A(INFINITY) ? A(0) : larger;  // nothing seen so far
      decay[r] = exp(peak[r] - base);
      peak[r] = larger;
      sum[r] *= decay[r];
#pragma unroll
      for (int c = 0; c < Tile::kOwnColumns; ++c) {
        scores[r][c] = weight_of(scores[r][c], base);
        sum[r] += scores[r][c];
      }
    }
    add_weighted<Tile>(o, decay, shared, scores, HeadRows(p.v, at.batch, kv_head, first, count), plan, at.depth);
  }

  A scale[Tile::kOwn];
#pragma unroll
  for (int r = 0; r < Tile::kOwn; ++r) {
    const A whole = sum_of_row<Tile>(sum[r]);
    scale[r] = ranges[r].empty() ? A(0) : 1 / whole;
    const int row = Tile::first_row() + r;
    if (Tile::lane() == 0 && at.depth == 0 && in_bounds(row, queries)) {
      const int64_t of_head = int64_t(at.batch) * plan.heads + at.head;
      const int64_t of = of_head * plan.queries + at.first + row;
      store_lse(p, of, ranges[r].empty(), peak[r], whole);
    }
  }
  const int64_t token = int64_t(plan.heads) * plan.width;
  const int64_t begin = (int64_t(at.batch) * plan.queries + at.first) * token + int64_t(at.head) * plan.width;
  store_result<Tile>(p.o, begin, token, queries, plan, at.depth, o, scale);
}

}  // namespace

void launch_attention_forward_generic(const AttentionForward& p, Stream stream) {
  with_generic_tile(p.plan, [&](auto tile) {
    using Tile = decltype(tile);
    const LaunchShape shape = generic_shape<Tile>(p.plan, p.plan.heads, p.plan.queries, stream);
    if (shape.grid.x > 0) launch(attention_forward_generic_kernel<Tile>, shape, p);
  });
}

}  // namespace fastgpt
