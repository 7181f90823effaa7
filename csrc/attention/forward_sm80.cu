// Attention's forward on tensor cores from sm_80 on: bf16 and fp16, heads of up to 128. docs/attention.md draws it.
//
// A block has 128 queries of one head, 32 for each of four warps, and goes through the keys that any of them sees, a
// tile at a time. Q stays in shared memory. K and V have two stages: while one is computed with, cp.async fills the
// other. A warp's scores become probabilities in the registers where they are, and these are the left operand of P V as
// they are. Nothing but Q, K and V goes through shared memory.
//
// A tile that all queries of a warp see has code without masks. Of the others those that no query of the warp sees are
// left out, and so are pieces of 16 keys: under the causal mask this saves most of what a square tile on the diagonal
// would compute in vain.
//
// 128 threads with at most 255 registers make two blocks for a multiprocessor, which 48 to 72 KB of shared memory each
// leave room for where it has 164 KB. By arithmetic: nothing was measured so far. Tiles of 128 keys (of 64 where heads
// are wider than 96) spill.

#include <type_traits>

#include "attention/tiles.cuh"
#include "host/launch.h"
#include "host/multiprocessors.h"

namespace fastgpt {
namespace {

template <class T_, int width, int keys>
struct ForwardTile {
  using T = T_;
  static constexpr int kWidth = width, kKeys = keys, kQueries = 128;
  static constexpr int kWarpRows = 32, kParts = kWarpRows / kPiece, kThreads = kQueries / kWarpRows * 32;

  using Queries = MatrixTile<T, kQueries, kWidth>;
  using Keys = MatrixTile<T, kKeys, kWidth>;
  struct SharedMemory {
    Queries q;
    struct Stage {
      Keys k, v;
    } stages[2];
  };
};

// What a warp knows of its rows: of each of its kParts parts a lane has two, 8 apart.
template <class Tile>
struct Rows {
  int first;  // of the warp
  Visible seen;
  float o[Tile::kParts][Tile::kWidth / 8][4];
  float peak[Tile::kParts][2], sum[Tile::kParts][2];  // the largest score; this lane's share of the powers' sum

  __device__ __forceinline__ int row(int part, int half) const {
    return first + part * kPiece + half * 8 + group_of_lane();
  }
};

template <class Tile>
using Scores = float[Tile::kParts][Tile::kKeys / 8][4];

// Q K^T of a tile.
template <bool masked, class Tile>
__device__ __forceinline__ void find_scores(Scores<Tile>& scores, const Rows<Tile>& rows,
                                            const typename Tile::Queries& of_q, const typename Tile::Keys& of_k,
                                            int first_key) {
  const int lane_of_q = place_of_lane<typename Tile::Queries, Order::down_first>();
  const int lane_of_k = place_of_lane<typename Tile::Keys, Order::across_first>();
#pragma unroll
  for (int part = 0; part < Tile::kParts; ++part) clear(scores[part]);
#pragma unroll
  for (int depth = 0; depth < Tile::kWidth; depth += kPiece) {
    uint32_t q[Tile::kParts][4];
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      load_piece(q[part], of_q, lane_of_q, warp_of_block() * Tile::kWarpRows + part * kPiece, depth);
    }
#pragma unroll
    for (int key = 0; key < Tile::kKeys; key += kPiece) {
      if (masked && rows.seen.hidden(first_key + key, kPiece)) continue;
      uint32_t k[4];
      load_piece(k, of_k, lane_of_k, key, depth);
#pragma unroll
      for (int part = 0; part < Tile::kParts; ++part) {
        multiply_piece<typename Tile::T>(scores[part][key / 8], scores[part][key / 8 + 1], q[part], k);
      }
    }
  }
}

// Scores become powers of two, and what was summed so far is scaled to the largest score of all.
template <bool masked, class Tile>
__device__ __forceinline__ void find_powers(Scores<Tile>& scores, Rows<Tile>& rows, const AttentionPlan& plan,
                                            const PowersOfTwo& powers, int batch, int keys, int first_key) {
  float decay[Tile::kParts][2];
  bool larger_found = false;
#pragma unroll
  for (int part = 0; part < Tile::kParts; ++part) {
    if (powers.capped) {
#pragma unroll
      for (int i = 0; i < Tile::kKeys / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[part][i][e] = powers.tanh_of(scores[part][i][e]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      KeyRange range;
      if (masked && in_bounds(rows.row(part, half), plan.queries)) {
        range = keys_seen(plan, batch, rows.row(part, half), keys);
      }
      float larger = rows.peak[part][half];
#pragma unroll
      for (int i = 0; i < Tile::kKeys / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[part][i][half * 2 + e];
          if (masked && !range.has(first_key + i * 8 + member_of_group() * 2 + e)) score = -INFINITY;
          larger = max(larger, score);  // NaN is in the sum, not here
        }
      }
      larger = max(larger, __shfl_xor_sync(0xffffffffu, larger, 1));
      larger = max(larger, __shfl_xor_sync(0xffffffffu, larger, 2));
      const float base = larger == -INFINITY ? 0.0f : larger;  // nothing seen so far
      const bool same = larger == rows.peak[part][half];
      decay[part][half] = same ? 1.0f : exp2_approx((rows.peak[part][half] - base) * powers.exponent);
      larger_found |= !same;
      rows.peak[part][half] = larger;
#pragma unroll
      for (int i = 0; i < Tile::kKeys / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[part][i][half * 2 + e];
          score = exp2_approx(fmaf(score, powers.exponent, -base * powers.exponent));
        }
      }
    }
  }
  if (__any_sync(0xffffffffu, larger_found)) {  // the longer the row, the more seldom
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        rows.sum[part][half] *= decay[part][half];
#pragma unroll
        for (int i = 0; i < Tile::kWidth / 8; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) rows.o[part][i][half * 2 + e] *= decay[part][half];
        }
      }
    }
  }
#pragma unroll
  for (int part = 0; part < Tile::kParts; ++part) {
#pragma unroll
    for (int i = 0; i < Tile::kKeys / 8; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) rows.sum[part][e / 2] += scores[part][i][e];
    }
  }
}

// O += P V
template <bool masked, class Tile>
__device__ __forceinline__ void add_values(Rows<Tile>& rows, const Scores<Tile>& powers,
                                           const typename Tile::Keys& of_v, int first_key) {
  const int lane_of_v = place_of_lane<typename Tile::Keys, Order::down_first>();
#pragma unroll
  for (int key = 0; key < Tile::kKeys; key += kPiece) {
    if (masked && rows.seen.hidden(first_key + key, kPiece)) continue;
    uint32_t p[Tile::kParts][4];
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      pack_piece<typename Tile::T>(p[part], powers[part][key / 8], powers[part][key / 8 + 1]);
    }
#pragma unroll
    for (int column = 0; column < Tile::kWidth; column += kPiece) {
      uint32_t v[4];
      load_piece<true>(v, of_v, lane_of_v, key, column);
#pragma unroll
      for (int part = 0; part < Tile::kParts; ++part) {
        multiply_piece<typename Tile::T>(rows.o[part][column / 8], rows.o[part][column / 8 + 1], p[part], v);
      }
    }
  }
}

template <class Tile>
__global__ __launch_bounds__(Tile::kThreads) void attention_forward_sm80_kernel(AttentionForward p,
                                                                                 PowersOfTwo powers) {
  if (!kForSm80) return __trap();
  using T = typename Tile::T;
  auto& shared = dynamic_shared<typename Tile::SharedMemory>();
  const AttentionPlan& plan = p.plan;
  const int tiles = (plan.queries + Tile::kQueries - 1) / Tile::kQueries;
  const int of_head = int(blockIdx.x / tiles), head = of_head % plan.heads, batch = of_head / plan.heads;
  // Last rows first: under a causal mask they see the most. Heads that share keys are neighbours, and meet in the L2
  // cache.
  const int first = (tiles - 1 - int(blockIdx.x % tiles)) * Tile::kQueries;
  const int kv_head = head / (plan.heads / plan.kv_heads);
  const int keys = keys_of(plan, batch), queries = min(Tile::kQueries, plan.queries - first);
  const KeyRange all = visible_to<Tile::kQueries>(plan, batch, first, queries, keys).some;

  Rows<Tile> rows;
  rows.first = first + warp_of_block() * Tile::kWarpRows;
  const int own = min(Tile::kWarpRows, plan.queries - rows.first);  // may be negative
  rows.seen = visible_to<Tile::kWarpRows>(plan, batch, rows.first, own, keys);
#pragma unroll
  for (int part = 0; part < Tile::kParts; ++part) {
    clear(rows.o[part]);
#pragma unroll
    for (int half = 0; half < 2; ++half) rows.peak[part][half] = -INFINITY, rows.sum[part][half] = 0;
  }

  const auto load_stage = [&](int stage, int first_key) {
    const auto load = [&](typename Tile::Keys& to, const ConstHeads& from) {
      load_tile<Tile::kThreads>(to, rows_of_head<T>(from, batch, kv_head, first_key), from.token, all.end - first_key,
                                plan.width);
    };
    load(shared.stages[stage].k, p.k);
    load(shared.stages[stage].v, p.v);
    cp_async_commit();
  };
  if (!all.empty()) {
    load_tile<Tile::kThreads>(shared.q, rows_of_head<T>(p.q, batch, head, first), p.q.token, queries, plan.width);
    load_stage(0, all.begin);
  }
  int stage = 0;
  for (int first_key = all.begin; first_key < all.end; first_key += Tile::kKeys, stage ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // this stage is there, and the other has been read
    if (first_key + Tile::kKeys < all.end) load_stage(stage ^ 1, first_key + Tile::kKeys);
    const auto attend = [&](auto masked) {
      constexpr bool kMasked = decltype(masked)::value;
      Scores<Tile> scores;
      find_scores<kMasked, Tile>(scores, rows, shared.q, shared.stages[stage].k, first_key);
      find_powers<kMasked, Tile>(scores, rows, plan, powers, batch, keys, first_key);
      add_values<kMasked, Tile>(rows, scores, shared.stages[stage].v, first_key);
    };
    if (rows.seen.whole(first_key, Tile::kKeys)) attend(std::false_type());
    else if (!rows.seen.hidden(first_key, Tile::kKeys)) attend(std::true_type());
  }

#pragma unroll
  for (int part = 0; part < Tile::kParts; ++part) {
    float scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float whole = rows.sum[part][half];
      whole += __shfl_xor_sync(0xffffffffu, whole, 1);
      whole += __shfl_xor_sync(0xffffffffu, whole, 2);
      const int row = rows.row(part, half);
      scale[half] = 0;
      if (!in_bounds(row, plan.queries)) continue;
      const bool blind = keys_seen(plan, batch, row, keys).empty();
      if (!blind) scale[half] = 1 / whole;
      if (member_of_group() == 0) {
        store_lse(p, int64_t(of_head) * plan.queries + row, blind, rows.peak[part][half] * powers.unit, whole);
      }
    }
    const int from = rows.first + part * kPiece;
    T* o = static_cast<T*>(p.o) + ((int64_t(batch) * plan.queries + from) * plan.heads + head) * plan.width;
    store_results(shared.q, warp_of_block() * Tile::kWarpRows + part * kPiece, rows.o[part], scale, o,
                  int64_t(plan.heads) * plan.width, plan.queries - from, plan.width);
  }
}

template <class T, class F>
void with_forward_tile(int width, F f) {
  if (width <= 64) return f(ForwardTile<T, 64, 64>());
  if (width <= 96) return f(ForwardTile<T, 96, 64>());
  return f(ForwardTile<T, 128, 32>());
}

}  // namespace

bool attention_sm80_serves_chip() { return chip() >= 80; }

void launch_attention_forward_sm80(const AttentionForward& p, Stream stream) {
  const auto with = [&](auto tile) {
    using Tile = decltype(tile);
    const int64_t tiles = (p.plan.queries + Tile::kQueries - 1) / Tile::kQueries;
    const int64_t blocks = int64_t(p.plan.batches) * p.plan.heads * tiles;
    if (blocks == 0) return;
    if (blocks > INT_MAX) throw std::runtime_error("attention: too many blocks for one launch");
    const LaunchShape shape{dim3(unsigned(blocks)), dim3(Tile::kThreads), sizeof(typename Tile::SharedMemory), stream};
    launch(attention_forward_sm80_kernel<Tile>, shape, p, PowersOfTwo(p.plan));
  };
  if (p.plan.dtype == DType::bfloat16) with_forward_tile<__nv_bfloat16>(p.plan.width, with);
  else with_forward_tile<__half>(p.plan.width, with);
}

}  // namespace fastgpt
