// Attention's forward on Hopper: bf16 and fp16, heads of up to 128, by TMA and wgmma. docs/attention.md draws it.
//
// A tile of the grid is 128 queries of one head. Of a block's three warpgroups the last one is the producer: one thread
// of it has the TMA unit bring Q, and then tile after tile of K and V into a ring of two stages. The others, the
// consumers, have 64 queries each. Their scores come by wgmma from shared memory; powers of these stay in the registers
// where they are, and are the left operand of P V as they are; O stays in registers to the end, and leaves through Q's
// shared memory, by TMA.
//
// Barriers of a stage: full, when all bytes are there (the TMA unit counts them), and empty, when both consumers have
// read it. K and V have their own, for K is read before the softmax and V after it; and Q, which has two stages too, is
// empty when O has left from there.
//
// Two things overlap with the exponentials of a tile. Within a warpgroup P V of the tile before: Q K^T is issued first,
// P V next, and only the former is waited for. Between warpgroups the other one's products: they take turns in issuing.
//
// The grid is persistent: a block for each multiprocessor, which comes to one tile in each round, so that the producer
// brings the next tile's Q, K and V while the consumers still finish this one. The longest tiles come first (under a
// causal mask the last rows see the most), section by section of heads whose keys and values the L2 cache holds at
// once; every other round goes backwards, so that no block always gets the longer ones. 384 threads with 168 registers,
// which the warpgroups share out anew, and 97 to 193 KB of shared memory make one block for a multiprocessor. By
// arithmetic: nothing was measured so far.

#include <algorithm>
#include <type_traits>

#include "attention/tiles_sm90.cuh"
#include "host/launch.h"
#include "host/multiprocessors.h"

namespace fastgpt {

// What the kernel is told besides: where its tensors are, for the TMA unit, and how blocks are ordered.
struct ForwardMaps {
  TensorMap q, k, v, o;
  int tiles;           // of queries, over all heads
  int heads_together;  // of a section: their tiles of one length come after each other
};

namespace {

template <class T_, int width>
struct HopperTile {
  using T = T_;
  using Type = std::conditional_t<std::is_same_v<T, __half>, F16, Bf16>;
  static constexpr int kWidth = width, kConsumers = 2, kQueries = kConsumers * kWarpgroupRows, kKeys = 128, kStages = 2;
  static constexpr int kFewKeys = kKeys / 2;  // of the last tile where the queries see no more of it
  static constexpr int kQueryStages = 2;      // this tile's, from where O leaves, and the next one's
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kPersistent = 1;  // 0: a block for each tile
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

  using Queries = SwizzledTile<T, kQueries, kWidth>;
  using Keys = SwizzledTile<T, kKeys, kWidth>;
  using Ring = RingPosition<kStages>;
  using QueryRing = RingPosition<kQueryStages>;
  struct SharedMemory {
    Queries q[kQueryStages];
    Keys k[kStages], v[kStages];
    uint64_t q_full[kQueryStages], q_empty[kQueryStages];
    uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  };
  using Output = float[kWidth / 2];             // of a thread
  using Weights = uint32_t[kKeys / kPiece][4];  // likewise, as a left operand
};

// The tiles that a block comes to, in its order: f(place).
template <class F>
__device__ __forceinline__ void for_each_tile(int tiles, F f) {
  const int blocks = int(gridDim.x), forward = int(blockIdx.x), backward = blocks - 1 - forward;
  for (int first = 0, round = 0; first < tiles; first += blocks, ++round) {
    const int place = first + (round % 2 ? backward : forward);
    if (place < tiles) f(place);
  }
}

// Which queries of which head a tile has, and which keys they see. By a whole warp.
template <class Tile>
struct TileOfQueries {
  int batch, head, first, keys;  // keys: of the row of the batch
  KeyRange range;                // of those, what some query sees

  __device__ __forceinline__ TileOfQueries(const AttentionPlan& plan, int heads_together, int place) {
    constexpr int kQueries = Tile::kQueries;
    const int all_heads = plan.batches * plan.heads, tiles = (plan.queries + kQueries - 1) / kQueries;
    const int section = place / (heads_together * tiles), in_section = place % (heads_together * tiles);
    const int first_head = section * heads_together, here = min(heads_together, all_heads - first_head);
    batch = (first_head + in_section % here) / plan.heads;
    head = (first_head + in_section % here) % plan.heads;
    first = (tiles - 1 - in_section / here) * kQueries;
    keys = keys_of(plan, batch);
    range = visible_to<kQueries>(plan, batch, first, min(kQueries, plan.queries - first), keys).some;
  }
};

// ---- producer ------------------------------------------------------------------------------------------

// By one warp, of which one thread works.
template <class Tile>
__device__ __forceinline__ void produce(typename Tile::SharedMemory& shared, const AttentionPlan& plan,
                                        const ForwardMaps& maps) {
  typename Tile::Ring at;
  typename Tile::QueryRing q;
  for_each_tile(maps.tiles, [&](int place) {
    const TileOfQueries<Tile> tile(plan, maps.heads_together, place);
    if (lane_of_warp() != 0) return;
    const int kv_head = tile.head / (plan.heads / plan.kv_heads);
    mbarrier_wait(shared.q_empty[q.stage], q.parity ^ 1);  // the first time round they all are
    if (tile.range.empty()) mbarrier_arrive(shared.q_full[q.stage]);  // O needs the place alone
    else shared.q[q.stage].fetch(maps.q, shared.q_full[q.stage], tile.first, tile.head, tile.batch);
    q.advance();
    for (int key = tile.range.begin; key < tile.range.end; key += Tile::kKeys, at.advance()) {
      mbarrier_wait(shared.k_empty[at.stage], at.parity ^ 1);
      shared.k[at.stage].fetch(maps.k, shared.k_full[at.stage], key, kv_head, tile.batch);
      mbarrier_wait(shared.v_empty[at.stage], at.parity ^ 1);
      shared.v[at.stage].fetch(maps.v, shared.v_full[at.stage], key, kv_head, tile.batch);
    }
  });
}

// ---- consumers -----------------------------------------------------------------------------------------

// What a thread knows of its two rows, 8 apart.
struct Rows {
  int first;          // this one; the other is 8 on
  KeyRange range[2];  // which keys they see
  float peak[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // the largest score; this lane's share of the powers' sum
};

// Issues Q K^T of the first 2 n keys of a tile.
template <class Tile, int n>
__device__ __forceinline__ void multiply_keys(float (&scores)[n], const typename Tile::Queries& of_q, int first_row,
                                              const typename Tile::Keys& of_k) {
  const uint64_t q = of_q.with_depth_along_rows(first_row), k = of_k.with_depth_along_rows(0);
#pragma unroll
  for (int depth = 0; depth < Tile::kWidth; depth += kPiece) {
    wgmma(scores, q + Tile::Queries::step_along_rows(depth), k + Tile::Keys::step_along_rows(depth), depth > 0,
          typename Tile::Type());
  }
}

// Issues O += P V of the first keys of a tile.
template <int keys, class Tile>
__device__ __forceinline__ void add_values(typename Tile::Output& o, const typename Tile::Weights& weights,
                                           const typename Tile::Keys& of_v) {
  const uint64_t v = of_v.with_depth_down();
#pragma unroll
  for (int piece = 0; piece < keys / kPiece; ++piece) {
    wgmma<Major::mn>(o, weights[piece], v + Tile::Keys::step_down(piece * kPiece), true, typename Tile::Type());
  }
}

// Scores become powers of two; decay[] is what the sums so far must be multiplied by, which was done to rows.sum.
template <bool masked, int n>
__device__ __forceinline__ void scores_to_powers(float (&scores)[n], Rows& rows, float (&decay)[2],
                                            const PowersOfTwo& powers, int first_key) {
  constexpr int kGroups = n / 4;  // of 8 keys
  if (powers.capped) {
#pragma unroll
    for (int i = 0; i < n; ++i) scores[i] = powers.tanh_of(scores[i]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float larger[2] = {rows.peak[half], rows.peak[half]};  // two chains, for each step waits for the one before
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = scores[i * 4 + half * 2 + e];
        if (masked && !rows.range[half].has(first_key + i * 8 + member_of_group() * 2 + e)) score = -INFINITY;
        larger[e] = max(larger[e], score);  // NaN is in the sum, not here
      }
    }
    float peak = max(larger[0], larger[1]);
    peak = max(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
    peak = max(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
    const float base = peak == -INFINITY ? 0.0f : peak;  // nothing seen so far
    decay[half] = exp2_approx((rows.peak[half] - base) * powers.exponent);
    rows.peak[half] = peak;
    float sums[2] = {rows.sum[half] * decay[half], 0};
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = scores[i * 4 + half * 2 + e];
        score = exp2_approx(fmaf(score, powers.exponent, -base * powers.exponent));
        sums[e] += score;
      }
    }
    rows.sum[half] = sums[0] + sums[1];
  }
}

// Powers, rounded, as a left operand.
template <class Tile, int n>
__device__ __forceinline__ void pack_weights(typename Tile::Weights& weights, const float (&powers)[n]) {
#pragma unroll
  for (int piece = 0; piece < n / 8; ++piece) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weights[piece][i] = pack<typename Tile::T>(powers[piece * 8 + i * 2], powers[piece * 8 + i * 2 + 1]);
    }
  }
}

// One tile of a warpgroup; `at` is the stage that its first keys come to.
template <class Tile>
__device__ __forceinline__ void consume(typename Tile::SharedMemory& shared, const AttentionForward& p,
                                        const PowersOfTwo& powers, const ForwardMaps& maps,
                                        const TileOfQueries<Tile>& block, typename Tile::QueryRing q,
                                        typename Tile::Ring& at) {
  const AttentionPlan& plan = p.plan;
  const int group = threadIdx.x / kWarpgroup, first_row = group * kWarpgroupRows, keys = block.keys;
  typename Tile::Queries& queries = shared.q[q.stage];
  const Visible seen = visible_to<kWarpgroupRows>(plan, block.batch, block.first + first_row,
                                                  min(kWarpgroupRows, plan.queries - block.first - first_row), keys);
  Rows rows;
  rows.first = block.first + warp_of_block() * kPiece + group_of_lane();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = rows.first + half * 8;
    if (in_bounds(row, plan.queries)) rows.range[half] = keys_seen(plan, block.batch, row, keys);
  }

  typename Tile::Output o;
  typename Tile::Weights weights;
#pragma unroll
  for (int i = 0; i < Tile::kWidth / 2; ++i) o[i] = 0;

  const int keys_here = block.range.empty() ? 0 : block.range.end - block.range.begin;
  const int tiles = (keys_here + Tile::kKeys - 1) / Tile::kKeys;
  const Turns<Tile::kConsumers> turns{group, tiles};
  const auto first_key = [&](int tile) { return block.range.begin + tile * Tile::kKeys; };
  const auto hidden = [&](int tile) { return seen.hidden(first_key(tile), Tile::kKeys); };
  const auto few = [&](int tile) { return seen.some.end <= first_key(tile) + Tile::kFewKeys; };
  const auto whole = [&](int tile) { return seen.whole(first_key(tile), Tile::kKeys); };
  typename Tile::Ring before;  // of the tile whose P V is still to be added
  int tile = 0;

  const auto release = [&](uint64_t& empty) {
    if (threadIdx.x % kWarpgroup == 0) mbarrier_arrive(empty);
  };
  // A tile that none of these queries sees: the producer has to know that it is not needed. Only when it is there: both
  // warpgroups may pass one, and what is still on its way (V may be there before K) must not be asked for anew.
  const auto pass = [&] {
    mbarrier_wait(shared.k_full[at.stage], at.parity);
    mbarrier_wait(shared.v_full[at.stage], at.parity);
    turns.take(tile);
    turns.give(tile);
    release(shared.k_empty[at.stage]);
    release(shared.v_empty[at.stage]);
    at.advance();
    ++tile;
  };
  const auto attend = [&](auto first, auto masked, auto keys_of_tile) {
    constexpr bool kFirst = decltype(first)::value, kMasked = decltype(masked)::value;
    float scores[decltype(keys_of_tile)::value / 2];
    mbarrier_wait(shared.k_full[at.stage], at.parity);
    if (!kFirst) mbarrier_wait(shared.v_full[before.stage], before.parity);
    turns.take(tile);
    pin_registers(o);
    pin_registers(weights);
    wgmma_fence();
    multiply_keys<Tile>(scores, queries, first_row, shared.k[at.stage]);
    wgmma_commit();
    if constexpr (!kFirst) {
      add_values<Tile::kKeys, Tile>(o, weights, shared.v[before.stage]);
      wgmma_commit();
    }
    turns.give(tile);
    wgmma_wait<kFirst ? 0 : 1>();
    pin_registers(scores);
    release(shared.k_empty[at.stage]);
    float decay[2];
    scores_to_powers<kMasked>(scores, rows, decay, powers, first_key(tile));
    if constexpr (!kFirst) {
      compute_before_here(rows.sum[0] + rows.sum[1]);
      wgmma_wait<0>();
      pin_registers(o);
      release(shared.v_empty[before.stage]);
#pragma unroll
      for (int i = 0; i < Tile::kWidth / 2; ++i) o[i] *= decay[i / 2 % 2];
    }
    pack_weights<Tile>(weights, scores);
    before = at;
    at.advance();
    ++tile;
  };

  const auto finish = [&](auto keys_of_tile) {
    mbarrier_wait(shared.v_full[before.stage], before.parity);
    pin_registers(o);
    pin_registers(weights);
    wgmma_fence();
    add_values<decltype(keys_of_tile)::value, Tile>(o, weights, shared.v[before.stage]);
    wgmma_commit();
    wgmma_wait<0>();
    pin_registers(o);
    release(shared.v_empty[before.stage]);
  };

  using Yes = std::true_type;
  using No = std::false_type;
  using All = std::integral_constant<int, Tile::kKeys>;
  using Few = std::integral_constant<int, Tile::kFewKeys>;
  mbarrier_wait(shared.q_full[q.stage], q.parity);  // by those who see nothing too: O will go where Q came
  while (tile < tiles && hidden(tile)) pass();
  if (tile < tiles && few(tile)) {
    attend(Yes(), Yes(), Few());
    finish(Few());
  } else if (tile < tiles) {
    attend(Yes(), Yes(), All());
    while (tile < tiles && !hidden(tile) && !few(tile)) {
      while (tile < tiles && !hidden(tile) && !few(tile) && !whole(tile)) attend(No(), Yes(), All());
      while (tile < tiles && whole(tile)) attend(No(), No(), All());
    }
    if (tile < tiles && !hidden(tile)) {
      attend(No(), Yes(), Few());
      finish(Few());
    } else {
      finish(All());
    }
  }
  while (tile < tiles) pass();

  const int warp_row = warp_of_block() * kPiece;  // of the block's tile
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float whole_sum = rows.sum[half];
    whole_sum += __shfl_xor_sync(0xffffffffu, whole_sum, 1);
    whole_sum += __shfl_xor_sync(0xffffffffu, whole_sum, 2);
    const int row = rows.first + half * 8;
    const bool blind = rows.range[half].empty();
    const float scale = blind ? 0.0f : 1 / whole_sum;
    if (member_of_group() == 0 && in_bounds(row, plan.queries)) {
      store_lse(p, (int64_t(block.batch) * plan.heads + block.head) * plan.queries + row, blind,
                rows.peak[half] * powers.unit, whole_sum);
    }
#pragma unroll
    for (int i = 0; i < Tile::kWidth / 8; ++i) {
      const int column = i * 8 + member_of_group() * 2;
      *reinterpret_cast<uint32_t*>(queries.at(warp_row + half * 8 + group_of_lane(), column)) =
          pack<typename Tile::T>(o[i * 4 + half * 2] * scale, o[i * 4 + half * 2 + 1] * scale);
    }
  }
  fence_proxy_async();
  __syncwarp();
  if (lane_of_warp() == 0) {  // rows and columns that the tensor does not have are left out
#pragma unroll
    for (int panel = 0; panel < Tile::Queries::kPanels; ++panel) {
      const int to[4] = {panel * Tile::Queries::kPanel, block.first + warp_row, block.head, block.batch};
      tma_store(maps.o, queries.at(warp_row, 0) + panel * (Tile::kQueries * Tile::Queries::kPanel), to);
    }
    bulk_commit();
    bulk_wait_read<0>();
    mbarrier_arrive(shared.q_empty[q.stage]);
  }
}

template <class Tile>
__global__ __launch_bounds__(Tile::kThreads, 1) void attention_forward_sm90_kernel(
    AttentionForward p, PowersOfTwo powers, const __grid_constant__ ForwardMaps maps) {
  if (!kForSm90) return __trap();
  auto& shared = dynamic_shared<typename Tile::SharedMemory>();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int stage = 0; stage < Tile::kQueryStages; ++stage) {
      mbarrier_init(shared.q_full[stage], 1);
      mbarrier_init(shared.q_empty[stage], Tile::kConsumers * kWarpgroup / 32);  // each warp's part of O
    }
#pragma unroll
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      mbarrier_init(shared.k_full[stage], 1);
      mbarrier_init(shared.v_full[stage], 1);
      mbarrier_init(shared.k_empty[stage], Tile::kConsumers);
      mbarrier_init(shared.v_empty[stage], Tile::kConsumers);
    }
    fence_mbarrier_init();
  }
  __syncthreads();

  if (threadIdx.x / kWarpgroup == Tile::kConsumers) {
    give_back_registers_down_to<Tile::kProducerRegisters>();
    if (threadIdx.x / 32 == Tile::kConsumers * kWarpgroup / 32) produce<Tile>(shared, p.plan, maps);
  } else {
    take_registers_up_to<Tile::kConsumerRegisters>();
    typename Tile::Ring at;
    typename Tile::QueryRing q;
    for_each_tile(maps.tiles, [&](int place) {
      consume<Tile>(shared, p, powers, maps, TileOfQueries<Tile>(p.plan, maps.heads_together, place), q, at);
      q.advance();
    });
  }
}

template <class T, class F>
void with_hopper_tile(int width, F f) {
  if (width <= 64) return f(HopperTile<T, 64>());
  if (width <= 96) return f(HopperTile<T, 96>());
  return f(HopperTile<T, 128>());
}

}  // namespace

bool attention_sm90_serves_chip() { return compiled_for(90) && chip() == 90; }

void launch_attention_forward_sm90(const AttentionForward& p, Stream stream) {
  if (only_asking) return;  // the driver would be asked for maps
  const AttentionPlan& plan = p.plan;
  const auto with = [&](auto of) {
    using Tile = decltype(of);
    const int64_t heads = int64_t(plan.batches) * plan.heads;
    const int64_t tiles = heads * ((plan.queries + Tile::kQueries - 1) / Tile::kQueries);
    if (tiles == 0) return;
    if (tiles > INT_MAX / 2) throw std::runtime_error("attention: too many tiles for one launch");
    ForwardMaps maps;
    maps.tiles = int(tiles);
    maps.q = map_of_heads<typename Tile::Queries>(p.q, plan, plan.queries, plan.heads, Tile::kQueries);
    maps.k = map_of_heads<typename Tile::Keys>(p.k, plan, plan.keys, plan.kv_heads, Tile::kKeys);
    maps.v = map_of_heads<typename Tile::Keys>(p.v, plan, plan.keys, plan.kv_heads, Tile::kKeys);
    const int64_t token = int64_t(plan.heads) * plan.width;
    const ConstHeads o{p.o, plan.queries * token, token, plan.width};
    maps.o = map_of_heads<typename Tile::Queries>(o, plan, plan.queries, plan.heads, kPiece);
    const int64_t bytes_of_head = int64_t(2) * plan.keys * plan.width * sizeof(typename Tile::T);
    const int64_t kv_heads_together = std::max<int64_t>(1, cache_bytes() * 2 / 3 / bytes_of_head);
    maps.heads_together = int(std::min(heads, kv_heads_together * (plan.heads / plan.kv_heads)));
    const int blocks = Tile::kPersistent ? std::min(maps.tiles, multiprocessors()) : maps.tiles;
    const LaunchShape shape{dim3(unsigned(blocks)), dim3(Tile::kThreads), sizeof(typename Tile::SharedMemory), stream};
    launch(attention_forward_sm90_kernel<Tile>, shape, p, PowersOfTwo(plan), maps);
  };
  if (plan.dtype == DType::bfloat16) with_hopper_tile<__nv_bfloat16>(plan.width, with);
  else with_hopper_tile<__half>(plan.width, with);
}

}  // namespace fastgpt
