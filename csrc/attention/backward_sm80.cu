// Attention's gradients on tensor cores from sm_80 on: bf16 and fp16, heads of up to 128. docs/attention.md draws it.
//
// A block has a tile of keys, 16 for each warp, and goes through the queries that see them, of all heads that share
// these keys. K and V stay in shared memory, Q and d_o have two stages. What is computed is transposed, S^T = K Q^T and
// d_o's product V d_o^T, so that a row is a key and belongs to one warp: P^T and d_s^T are then left operands of
//
//   d_v += P^T d_o        d_k += d_s^T Q
//
// as they are, in registers, and d_k and d_v stay in registers to the end. Only d_s goes through shared memory, for
// d_q = d_s K, which sums over the keys of all warps.
//
// d_q sums over blocks, too: backward_blocks.cuh. Five products, where computing S and d_o V^T again for d_q alone
// would make seven.
//
// 128 keys and 64 queries: one block of 8 warps for a multiprocessor. Heads wider than 64 need 114 and 146 KB for it,
// and 64 keys and 32 queries serve chips with less. By arithmetic: nothing was measured so far.

#include <algorithm>
#include <type_traits>

#include "attention/backward_blocks.cuh"
#include "host/launch.h"
#include "host/multiprocessors.h"

namespace fastgpt {
namespace {

template <class T_, int width, int keys, int queries>
struct BackwardTile {
  using T = T_;
  static constexpr int kWidth = width, kKeys = keys, kQueries = queries;
  static constexpr int kWarps = kKeys / kPiece, kThreads = kWarps * 32;
  // Of how many queries a warp has S and d_p at a time: all of them beside a wide d_k and d_v would spill.
  static constexpr int kAtATime = width > 96 ? 32 : kQueries;
  // Of d_q a warp has kPiece queries and some of the columns.
  static constexpr int kQueryParts = kQueries / kPiece, kColumns = kWidth / (kWarps / kQueryParts);
  static_assert(kWarps % kQueryParts == 0 && kColumns % kPiece == 0 && kQueries >= kFewestBackwardQueries);

  using Keys = MatrixTile<T, kKeys, kWidth>;
  using Queries = MatrixTile<T, kQueries, kWidth>;
  using Scores = MatrixTile<T, kKeys, kQueries>;
  struct Stage {
    Queries q, d_o;
    float lse[kQueries], delta[kQueries];
    int doc_start[kQueries], doc_end[kQueries];
  };
  struct SharedMemory {
    Keys k, v;
    Stage stages[2];
    Scores d_s;  // transposed
  };
};

template <class Tile>
using Products = float[Tile::kAtATime / 8][4];  // a row is a key, a column a query
template <class Tile>
using Operands = uint32_t[Tile::kAtATime / kPiece][4];

// keys . queries^T, of queries from `first` on.
template <class Tile>
__device__ __forceinline__ void find_products(Products<Tile>& products, const typename Tile::Keys& keys,
                                              const typename Tile::Queries& queries, int first) {
  const int lane_of_a = place_of_lane<typename Tile::Keys, Order::down_first>();
  const int lane_of_b = place_of_lane<typename Tile::Queries, Order::across_first>();
  clear(products);
#pragma unroll
  for (int depth = 0; depth < Tile::kWidth; depth += kPiece) {
    uint32_t a[4];
    load_piece(a, keys, lane_of_a, warp_of_block() * kPiece, depth);
#pragma unroll
    for (int query = 0; query < Tile::kAtATime; query += kPiece) {
      uint32_t b[4];
      load_piece(b, queries, lane_of_b, first + query, depth);
      multiply_piece<typename Tile::T>(products[query / 8], products[query / 8 + 1], a, b);
    }
  }
}

// result += weights^T . queries, likewise.
template <class Tile>
__device__ __forceinline__ void add_queries(float (&result)[Tile::kWidth / 8][4], const Operands<Tile>& weights,
                                             const typename Tile::Queries& queries, int first) {
  const int lane_of_b = place_of_lane<typename Tile::Queries, Order::down_first>();
#pragma unroll
  for (int query = 0; query < Tile::kAtATime; query += kPiece) {
#pragma unroll
    for (int column = 0; column < Tile::kWidth; column += kPiece) {
      uint32_t b[4];
      load_piece<true>(b, queries, lane_of_b, first + query, column);
      multiply_piece<typename Tile::T>(result[column / 8], result[column / 8 + 1], weights[query / kPiece], b);
    }
  }
}

// P and d_s from the products S and d_o . v, as operands; d_s also to shared memory. The first query is number `from`
// of the tile, whose first is first_query.
template <bool masked, class Tile>
__device__ __forceinline__ void differentiate(Operands<Tile>& p, Operands<Tile>& d_s, Products<Tile>& products,
                                              Products<Tile>& d_p, const typename Tile::Stage& stage,
                                              typename Tile::Scores& to, const AttentionPlan& plan,
                                              const PowersOfTwo& powers, int first_key, int first_query, int from,
                                              int keys) {
  const int row = warp_of_block() * kPiece + group_of_lane();
#pragma unroll
  for (int i = 0; i < Tile::kAtATime / 8; ++i) {
    const int in_tile = from + i * 8 + member_of_group() * 2;
    const Vec<float, 2> lse = load<2>(&stage.lse[in_tile]), delta = load<2>(&stage.delta[in_tile]);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      KeyRange range;
      if (masked) {
        int doc_start = 0, doc_end = keys;
        if (plan.doc_start) doc_start = stage.doc_start[in_tile + e], doc_end = stage.doc_end[in_tile + e];
        range = keys_seen(plan, first_query + in_tile + e, keys, doc_start, doc_end);
        if (first_query + in_tile + e >= plan.queries) range = {};
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float &score = products[i][half * 2 + e], &gradient = d_p[i][half * 2 + e];
        if (powers.capped) score = powers.tanh_of(score);
        const bool seen = !masked || range.has(first_key + row + half * 8);
        if (masked && range.single()) gradient = 0;  // as in delta: P is 1, whatever the score
        const float power = exp2_approx(fmaf(score, powers.exponent, -lse.at[e] * PowersOfTwo::kLog2e));
        const float derivative = powers.capped ? 1 - score * score : 1.0f;
        gradient = seen ? power * (gradient - delta.at[e]) * derivative : 0.0f;
        score = seen ? power : 0.0f;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < Tile::kAtATime / kPiece; ++i) {
    pack_piece<typename Tile::T>(p[i], products[2 * i], products[2 * i + 1]);
    pack_piece<typename Tile::T>(d_s[i], d_p[2 * i], d_p[2 * i + 1]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {  // in the order of an operand: rows first
      const int column = from + i * kPiece + e / 2 * 8 + member_of_group() * 2;
      *reinterpret_cast<uint32_t*>(to.at(row + e % 2 * 8, column)) = d_s[i][e];
    }
  }
}

template <class Tile>
__global__ __launch_bounds__(Tile::kThreads) void attention_backward_sm80_kernel(AttentionBackward p,
                                                                                  PowersOfTwo powers) {
  if (!kForSm80) return __trap();
  using T = typename Tile::T;
  auto& shared = dynamic_shared<typename Tile::SharedMemory>();
  const AttentionPlan& plan = p.plan;
  const int split = int(blockIdx.x) % p.splits, of_head = int(blockIdx.x) / p.splits;
  const int kv_head = of_head % plan.kv_heads, batch = of_head / plan.kv_heads, group = plan.heads / plan.kv_heads;
  const int keys = keys_of(plan, batch), query_tiles = (plan.queries + Tile::kQueries - 1) / Tile::kQueries;

  const int row_stride = plan.heads * plan.width;  // of d_q
  const auto sums_of = [&](int head, int tile) {  // of this block
    const int64_t token = (int64_t(split) * plan.batches + batch) * plan.queries + int64_t(tile) * Tile::kQueries;
    return p.partial_d_q + token * row_stride + head * plan.width;
  };
  // Sums begin: whatever no tile of keys adds to is zero.
  const auto clear_queries = [&](int tile) {
    if (!p.d_q) return;
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      float* const to = sums_of(head, tile);
      constexpr int kSize = Vec16<float>::kSize, kVectors = Tile::kWidth / kSize;
#pragma unroll 1  // or its addresses take registers all through the loop below
      for (int i = threadIdx.x; i < Tile::kQueries * kVectors; i += Tile::kThreads) {
        const int row = i / kVectors, column = i % kVectors * kSize;
        const bool exists = in_bounds(tile * Tile::kQueries + row, plan.queries);
        if (exists && in_bounds(column, plan.width)) {
          store16(to + int64_t(row) * row_stride + column, Vec16<float>{});
        }
      }
    }
  };

  int cleared = 0;  // of this block's sums those of the tiles of queries before it exist
  for (int first_key = split * Tile::kKeys; first_key < plan.keys; first_key += p.splits * Tile::kKeys) {
    KeyRange queries;
    if (first_key < keys && group > 0) {
      queries = queries_seeing(plan, first_key, min(first_key + Tile::kKeys, keys), keys);
    }
    const int last_tile = queries.empty() ? 0 : (queries.end + Tile::kQueries - 1) / Tile::kQueries;

    const auto seen_by = [&](int tile) { return seen_by_tile(p, batch, tile, Tile::kQueries, keys); };
    // The next of the tiles of queries from `from` on that sees some of the keys. Only documents leave one out: each
    // lane looks at one.
    const auto next_tile = [&](int from) {
      int found = from;
      while (plan.doc_start && found < last_tile) {
        const int tile = found + lane_of_warp();
        const bool sees = in_bounds(tile, last_tile) && !seen_by(tile).hidden(first_key, Tile::kKeys);
        const unsigned which = __ballot_sync(0xffffffffu, sees);
        found += which ? __ffs(int(which)) - 1 : 32;
        if (which) break;
      }
      found = min(found, last_tile);
      for (int tile = max(from, cleared); tile < found; ++tile) clear_queries(tile);
      return Step{found, kv_head * group};
    };
    const auto next_step = [&](const Step& step) {
      return step.head + 1 < (kv_head + 1) * group ? Step{step.tile, step.head + 1} : next_tile(step.tile + 1);
    };
    // Rows past the end become zeros, and see nothing.
    const auto load_step = [&](typename Tile::Stage& stage, const Step& step) {
      const int first = step.tile * Tile::kQueries, rows = plan.queries - first;
      const auto load = [&](typename Tile::Queries& to, const ConstHeads& from) {
        load_tile<Tile::kThreads>(to, rows_of_head<T>(from, batch, step.head, first), from.token, rows, plan.width);
      };
      load(stage.q, p.q);
      load(stage.d_o, p.d_o);
      const int row = threadIdx.x;
      if (row < Tile::kQueries) {
        const bool exists = in_bounds(row, rows);
        const auto load_value = [&](void* to, const void* from, int64_t at) {
          cp_async<4>(to, static_cast<const float*>(from) + (exists ? at : 0), exists);
        };
        const int64_t token = int64_t(batch) * plan.queries + first + row;
        const int64_t of_row = (int64_t(batch) * plan.heads + step.head) * plan.queries + first + row;
        load_value(&stage.lse[row], p.lse, of_row);
        load_value(&stage.delta[row], p.delta, of_row);
        if (plan.doc_start) {
          load_value(&stage.doc_start[row], plan.doc_start, token);
          load_value(&stage.doc_end[row], plan.doc_end, token);
        }
      }
      cp_async_commit();
    };

    const int first_tile = queries.empty() ? 0 : queries.begin / Tile::kQueries;
    for (int gap = cleared; gap < first_tile; ++gap) clear_queries(gap);
    Step step = next_tile(first_tile);
    __syncthreads();  // everything in shared memory has been read
    const auto load_keys = [&](typename Tile::Keys& to, const ConstHeads& from) {
      load_tile<Tile::kThreads>(to, rows_of_head<T>(from, batch, kv_head, first_key), from.token, keys - first_key,
                                plan.width);
    };
    if (step.tile < last_tile) {
      load_keys(shared.k, p.k);
      load_keys(shared.v, p.v);
      load_step(shared.stages[0], step);
    }

    const int own_key = first_key + warp_of_block() * kPiece;  // the first of the warp's
    float d_k[Tile::kWidth / 8][4], d_v[Tile::kWidth / 8][4];
    clear(d_k);
    clear(d_v);
    for (int turn = 0; step.tile < last_tile; turn ^= 1) {
      cp_async_wait<0>();
      __syncthreads();  // this stage is there; the other one and d_s have been read
      const Step next = next_step(step);
      if (next.tile < last_tile) load_step(shared.stages[turn ^ 1], next);
      const typename Tile::Stage& stage = shared.stages[turn];
      const int first_query = step.tile * Tile::kQueries;
      const Visible seen = seen_by(step.tile);

      if (!seen.hidden(own_key, kPiece)) {
#pragma unroll 1
        for (int from = 0; from < Tile::kQueries; from += Tile::kAtATime) {
          Products<Tile> products, d_p;
          Operands<Tile> weights, d_s;
          find_products<Tile>(products, shared.k, stage.q, from);
          find_products<Tile>(d_p, shared.v, stage.d_o, from);
          const auto differentiated = [&](auto masked) {
            differentiate<decltype(masked)::value, Tile>(weights, d_s, products, d_p, stage, shared.d_s, plan, powers,
                                                         first_key, first_query, from, keys);
          };
          // With rows past the end too: by a key that is infinite their zeros would make NaN.
          const bool all_exist = first_query + Tile::kQueries <= plan.queries;
          if (all_exist && seen.whole(own_key, kPiece)) differentiated(std::false_type());
          else differentiated(std::true_type());
          if (p.d_v) add_queries<Tile>(d_v, weights, stage.d_o, from);
          if (p.d_k) add_queries<Tile>(d_k, d_s, stage.q, from);
        }
      }
      if (p.d_q) {
        __syncthreads();  // d_s is there
        const int part = warp_of_block() % Tile::kQueryParts, columns = warp_of_block() / Tile::kQueryParts;
        const int lane_of_a = place_of_lane<typename Tile::Scores, Order::across_first>();
        const int lane_of_b = place_of_lane<typename Tile::Keys, Order::down_first>();
        float d_q[Tile::kColumns / 8][4];
        // f(results, where their sum is) for all that exist
        const auto with_sums = [&](auto f) {
          float* const sums = sums_of(step.head, step.tile);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = part * kPiece + half * 8 + group_of_lane();
            const bool exists = in_bounds(first_query + row, plan.queries);
#pragma unroll
            for (int i = 0; i < Tile::kColumns / 8; ++i) {
              const int column = columns * Tile::kColumns + i * 8 + member_of_group() * 2;
              float* const sum = sums + int64_t(row) * row_stride + column;
              if (exists && in_bounds(column, plan.width)) f(&d_q[i][half * 2], sum);
            }
          }
        };
        clear(d_q);
        if (step.tile < cleared) {
          with_sums([](float* results, const float* sum) {
            const Vec<float, 2> both = load<2>(sum);
            results[0] = both.at[0], results[1] = both.at[1];
          });
        }
#pragma unroll
        for (int key = 0; key < Tile::kKeys; key += kPiece) {
          if (seen.hidden(first_key + key, kPiece)) continue;  // the warp of these keys has left no d_s
          uint32_t a[4];
          load_piece<true>(a, shared.d_s, lane_of_a, key, part * kPiece);
#pragma unroll
          for (int column = 0; column < Tile::kColumns; column += kPiece) {
            uint32_t b[4];
            load_piece<true>(b, shared.k, lane_of_b, key, columns * Tile::kColumns + column);
            multiply_piece<T>(d_q[column / 8], d_q[column / 8 + 1], a, b);
          }
        }
        with_sums([](const float* results, float* sum) { store(sum, Vec<float, 2>{results[0], results[1]}); });
      }
      step = next;
    }
    cleared = max(cleared, last_tile);

    const int64_t token = int64_t(plan.kv_heads) * plan.width;
    const int64_t begin = (int64_t(batch) * plan.keys + own_key) * token + int64_t(kv_head) * plan.width;
    const auto store_keys = [&](void* to, const float (&results)[Tile::kWidth / 8][4], float scale) {
      const float scales[2] = {scale, scale};  // the warp's own rows of V have been read
      if (to) {
        store_results(shared.v, warp_of_block() * kPiece, results, scales, static_cast<T*>(to) + begin, token,
                      plan.keys - own_key, plan.width);
      }
    };
    store_keys(p.d_v, d_v, 1.0f);
    store_keys(p.d_k, d_k, float(plan.scale));
  }
  for (; cleared < query_tiles; ++cleared) clear_queries(cleared);
}

// f(tile) for the tile that fits a call's width, and the chip.
template <class T, class F>
void with_backward_tile(int width, F f) {
  const auto or_smaller = [&](auto large, auto small) {
    if (int64_t(sizeof(typename decltype(large)::SharedMemory)) <= most_shared_bytes()) f(large);
    else f(small);
  };
  if (width <= 64) return f(BackwardTile<T, 64, 128, 64>());
  if (width <= 96) return or_smaller(BackwardTile<T, 96, 128, 64>(), BackwardTile<T, 96, 64, 32>());
  return or_smaller(BackwardTile<T, 128, 128, 64>(), BackwardTile<T, 128, 64, 32>());
}

template <class T>
void launch_backward(const AttentionBackward& p, Stream stream) {
  const AttentionPlan& plan = p.plan;
  if (plan.batches == 0) return;
  with_backward_tile<T>(plan.width, [&](auto tile) {
    using Tile = decltype(tile);
    launch_attention_visible(p, Tile::kQueries, stream);
    const LaunchShape shape{dim3(attention_blocks(int64_t(p.splits) * plan.batches * plan.kv_heads)),
                            dim3(Tile::kThreads), sizeof(typename Tile::SharedMemory), stream};
    launch(attention_backward_sm80_kernel<Tile>, shape, p, PowersOfTwo(plan));
    launch_attention_sum_queries(p, Tile::kKeys, Tile::kQueries, stream);
  });
}

}  // namespace

int attention_backward_splits_sm80(const AttentionPlan& plan) {
  // Blocks differ in length, and the last of them run alone: the more there are, the less it matters. More splits write
  // and read hardly more, for the first addition is a store; but they need more memory.
  constexpr int64_t kBlocksOfMultiprocessor = 4, kMostBytes = int64_t(1) << 30;
  int64_t tiles = 0;
  with_backward_tile<__half>(plan.width, [&](auto tile) {
    constexpr int kKeys = decltype(tile)::kKeys;
    tiles = (plan.keys + kKeys - 1) / kKeys;
  });
  const int64_t heads = std::max(int64_t(plan.batches) * plan.kv_heads, int64_t(1));
  const int64_t wanted = (multiprocessors() * kBlocksOfMultiprocessor + heads - 1) / heads;
  const int64_t bytes = int64_t(plan.batches) * plan.queries * plan.heads * plan.width * int64_t(sizeof(float));
  return int(std::max(std::min({wanted, tiles, kMostBytes / std::max(bytes, int64_t(1))}), int64_t(1)));
}

void launch_attention_backward_sm80(const AttentionBackward& p, Stream stream) {
  if (p.plan.dtype == DType::bfloat16) launch_backward<__nv_bfloat16>(p, stream);
  else launch_backward<__half>(p, stream);
}

}  // namespace fastgpt
