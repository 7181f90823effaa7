// Attention's gradients on Hopper: bf16 and fp16, heads of up to 128, by TMA and wgmma. docs/attention.md draws it.
//
// A block has tiles of 128 keys (backward_blocks.cuh). Of its three warpgroups the last one is the producer: it brings
// K and V, and then Q and d_o, tile after tile, into a ring of two stages, with what else there is to know of these
// queries. The others, the consumers, have 64 keys each. As on the sm_80 path everything is transposed, S^T = K Q^T and
// d_o's product V d_o^T, so that P^T and d_s^T are left operands of
//
//   d_v += P^T d_o        d_k += d_s^T Q
//
// in the registers where they are. Only d_s goes through shared memory, for d_q = d_s K, of which each consumer has 64
// queries, or 64 columns. It leaves by TMA: what a part has of these queries is stored the first time, and added to by
// the TMA unit after that.
//
// Barriers of a stage: full, when all bytes are there (the TMA unit counts them) and what the producer's four warps
// write themselves; empty, when both consumers have read it all. K and V have full ones of their own. So that a block
// need not wait where it comes to its next tile of keys, K has two stages, and V is empty when the last step has no
// more need of it. One barrier a step is between consumers, for d_s, which has two buffers: who passes it knows that
// both have read those of the step before.
//
// 384 threads with 168 registers, which the warpgroups share out anew, and 212 or 226 KB of shared memory make one
// block for a multiprocessor. 128 queries at a time for heads of up to 64, whose S and d_p take 128 registers beside 64
// of d_k and d_v; 64 for wider ones, where it is the other way round. By arithmetic: nothing was measured so far.

#include <algorithm>
#include <type_traits>

#include "attention/backward_blocks.cuh"
#include "attention/tiles_sm90.cuh"
#include "host/launch.h"
#include "host/multiprocessors.h"

namespace fastgpt {

// Where the kernel's tensors are, for the TMA unit. part: of d_q, those of all splits as if they were more batches.
struct BackwardMaps {
  TensorMap q, k, v, d_o, d_k, d_v, part;
};

namespace {

constexpr int kLine = kSwizzleBytes;  // bytes of a row of a panel

// A warp's 16 rows on their way out: 64 columns of d_q, fp32, or all of d_k or d_v, 16 bits, in panels of 128 bytes.
struct alignas(1024) Outgoing {
  static constexpr int kPanels = 2;
  unsigned char bytes[kPanels][kPiece * kLine];

  // Where the TMA unit looks for the 16 bytes that come as number `vector` of a row.
  __device__ __forceinline__ unsigned char* at(int panel, int row, int vector) {
    return bytes[panel] + row * kLine + (vector ^ row % 8) * 16;
  }
};

template <class T_, int width, int queries>
struct HopperBackwardTile {
  using T = T_;
  using Type = std::conditional_t<std::is_same_v<T, __half>, F16, Bf16>;
  static constexpr int kWidth = width, kConsumers = 2, kKeys = kConsumers * kWarpgroupRows, kQueries = queries;
  static constexpr int kStages = 2, kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  // Of d_q a consumer has 64 of the queries, or 64 of the columns.
  static constexpr int kColumns = 64;
  static constexpr bool kByColumns = kQueries == kWarpgroupRows;
  static_assert(kByColumns ? kWidth > kColumns && kWidth <= kConsumers * kColumns
                           : kWidth == kColumns && kQueries == kConsumers * kWarpgroupRows);
  static_assert(kQueries <= kWarpgroup && kQueries >= kFewestBackwardQueries);

  using Keys = SwizzledTile<T, kKeys, kWidth>;
  using Queries = SwizzledTile<T, kQueries, kWidth>;
  using Scores = SwizzledTile<T, kKeys, kQueries>;
  using Ring = RingPosition<kStages>;
  // What the producer tells of a stage.
  struct Told {
    int first_query, head, exists, last;  // exists: 0 where nobody sees the tile of keys. last: of its steps
    Visible seen;
    float base[kQueries], delta[kQueries];       // base: -LSE, as a power of two
    int first_key[kQueries], key_count[kQueries];  // that a query sees
  };
  struct SharedMemory {
    Keys k[kStages], v;
    Queries q[kStages], d_o[kStages];
    Scores d_s[kStages];  // transposed
    Outgoing out[kConsumers * kWarpgroup / 32];
    Told told[kStages];
    uint64_t full[kStages], empty[kStages], k_full[kStages], v_full, v_empty;
  };
  using Products = float[kQueries / 2];            // of a thread
  using Operands = uint32_t[kQueries / kPiece][4];  // likewise, as a left operand
};

// Which keys of which head a block has: every splits-th tile.
struct BlockOfKeys {
  int batch, kv_head, split;

  __device__ __forceinline__ explicit BlockOfKeys(const AttentionBackward& p) {
    const int of_head = int(blockIdx.x) / p.splits;
    split = int(blockIdx.x) % p.splits;
    kv_head = of_head % p.plan.kv_heads;
    batch = of_head / p.plan.kv_heads;
  }
};

// Of a tile of queries: whether an earlier tile of keys has begun the part that this one adds to.
__device__ __forceinline__ bool part_exists(const AttentionBackward& p, const Visible& seen, int tile_of_keys,
                                            int keys_of_tile) {
  return tile_of_keys - p.splits >= seen.some.begin / keys_of_tile;
}

// All steps of a tile of keys: tile by tile, and in each head by head. Needs all lanes of the warp.
template <int kKeys, int kQueries>
struct Steps {
  const AttentionBackward& p;
  int batch, kv_head, keys, first_key;
  int group, begin = 0, end = 0;  // heads that share the keys; tiles of queries

  __device__ __forceinline__ Steps(const AttentionBackward& p_, int batch_, int kv_head_, int keys_, int first_key_)
      : p(p_), batch(batch_), kv_head(kv_head_), keys(keys_), first_key(first_key_),
        group(p_.plan.heads / p_.plan.kv_heads) {
    if (first_key >= keys || group == 0) return;
    const KeyRange queries = queries_seeing(p.plan, first_key, min(first_key + kKeys, keys), keys);
    if (!queries.empty()) begin = queries.begin / kQueries, end = (queries.end + kQueries - 1) / kQueries;
  }

  __device__ __forceinline__ Visible seen_by(int tile) const { return seen_by_tile(p, batch, tile, kQueries, keys); }
  __device__ __forceinline__ bool over(const Step& step) const { return step.tile >= end; }
  __device__ __forceinline__ Step first_step() const { return step_from(begin); }
  __device__ __forceinline__ Step step_after(const Step& step) const {
    return step.head + 1 < (kv_head + 1) * group ? Step{step.tile, step.head + 1} : step_from(step.tile + 1);
  }

 private:
  // Only documents leave a tile out: each lane looks at one.
  __device__ __forceinline__ Step step_from(int tile) const {
    while (p.plan.doc_start && tile < end) {
      const int of_lane = tile + lane_of_warp();
      const bool sees = in_bounds(of_lane, end) && !seen_by(of_lane).hidden(first_key, kKeys);
      const unsigned which = __ballot_sync(0xffffffffu, sees);
      tile += which ? __ffs(int(which)) - 1 : 32;
      if (which) break;
    }
    return {min(tile, end), kv_head * group};
  }
};

// ---- producer ------------------------------------------------------------------------------------------

template <class Tile>
__device__ __forceinline__ void produce(typename Tile::SharedMemory& shared, const AttentionBackward& p,
                                        const BackwardMaps& maps, const BlockOfKeys& block) {
  const AttentionPlan& plan = p.plan;
  const int thread = threadIdx.x % kWarpgroup;
  typename Tile::Ring at, k;
  unsigned v_parity = 0;
  for (int first_key = block.split * Tile::kKeys; first_key < plan.keys; first_key += p.splits * Tile::kKeys) {
    const Steps<Tile::kKeys, Tile::kQueries> steps(p, block.batch, block.kv_head, plan.keys, first_key);
    Step step = steps.first_step();
    const bool exists = !steps.over(step);
    bool first = true, last = false;
    while (!last) {
      const Step next = steps.step_after(step);
      last = !exists || steps.over(next);
      const int first_query = step.tile * Tile::kQueries, query = first_query + thread;
      float base = 0, delta = 0;
      KeyRange seen;
      if (exists && thread < Tile::kQueries && in_bounds(query, plan.queries)) {
        const int64_t row = (int64_t(block.batch) * plan.heads + step.head) * plan.queries + query;
        base = -PowersOfTwo::kLog2e * static_cast<const float*>(p.lse)[row];
        delta = static_cast<const float*>(p.delta)[row];
        seen = keys_seen(plan, block.batch, query, plan.keys);
      }
      mbarrier_wait(shared.empty[at.stage], at.parity ^ 1);  // the first time round they are
      auto& told = shared.told[at.stage];
      if (thread < Tile::kQueries) {
        told.base[thread] = base;
        told.delta[thread] = delta;
        told.first_key[thread] = seen.begin;
        told.key_count[thread] = seen.empty() ? 0 : seen.end - seen.begin;
      }
      if (thread == 0) {
        told.first_query = first_query;
        told.head = step.head;
        told.exists = exists;
        told.last = last;
        told.seen = exists ? steps.seen_by(step.tile) : Visible();
      }
      __syncwarp();
      if (thread == 0 && exists) {
        uint64_t& full = shared.full[at.stage];
        mbarrier_arrive_expect_bytes(full, 2 * sizeof(typename Tile::Queries));
        shared.q[at.stage].copy(maps.q, full, first_query, step.head, block.batch);
        shared.d_o[at.stage].copy(maps.d_o, full, first_query, step.head, block.batch);
        if (first) {
          // K's stage is empty: both consumers have finished the step before the last one, which was no earlier than
          // the end of the tile of keys before the last one.
          shared.k[k.stage].fetch(maps.k, shared.k_full[k.stage], first_key, block.kv_head, block.batch);
          mbarrier_wait(shared.v_empty, v_parity ^ 1);
          shared.v.fetch(maps.v, shared.v_full, first_key, block.kv_head, block.batch);
        }
      } else if (lane_of_warp() == 0) {
        mbarrier_arrive(shared.full[at.stage]);
      }
      first = false;
      step = next;
      at.advance();
    }
    if (exists) k.advance(), v_parity ^= 1;
  }
}

// ---- consumers -----------------------------------------------------------------------------------------

// Issues K Q^T, or V d_o^T, of a consumer's keys.
template <class Tile>
__device__ __forceinline__ void multiply_queries(typename Tile::Products& products, const typename Tile::Keys& of_keys,
                                                 int first_key, const typename Tile::Queries& of_queries) {
  const uint64_t keys = of_keys.with_depth_along_rows(first_key), queries = of_queries.with_depth_along_rows(0);
#pragma unroll
  for (int depth = 0; depth < Tile::kWidth; depth += kPiece) {
    wgmma(products, keys + Tile::Keys::step_along_rows(depth), queries + Tile::Queries::step_along_rows(depth),
          depth > 0, typename Tile::Type());
  }
}

// Issues d_v += P^T d_o, or d_k += d_s^T Q.
template <class Tile>
__device__ __forceinline__ void add_queries(float (&results)[Tile::kWidth / 2],
                                            const typename Tile::Operands& weights,
                                            const typename Tile::Queries& of_queries) {
  const uint64_t queries = of_queries.with_depth_down();
#pragma unroll
  for (int piece = 0; piece < Tile::kQueries / kPiece; ++piece) {
    wgmma<Major::mn>(results, weights[piece], queries + Tile::Queries::step_down(piece * kPiece), true,
                     typename Tile::Type());
  }
}

// Issues d_q = d_s K, a consumer's share of it.
template <class Tile>
__device__ __forceinline__ void multiply_keys(float (&d_q)[Tile::kColumns / 2], const typename Tile::Scores& of_d_s,
                                              const typename Tile::Keys& of_k, int consumer) {
  const uint64_t d_s = of_d_s.with_depth_down(Tile::kByColumns ? 0 : consumer * kWarpgroupRows);
  const uint64_t k = of_k.with_depth_down(Tile::kByColumns ? consumer * Tile::kColumns : 0);
#pragma unroll
  for (int key = 0; key < Tile::kKeys; key += kPiece) {
    wgmma<Major::mn, Major::mn>(d_q, d_s + Tile::Scores::step_down(key), k + Tile::Keys::step_down(key), key > 0,
                                typename Tile::Type());
  }
}

// Scores become P, as it is before masks.
template <class Tile>
__device__ __forceinline__ void scores_to_powers(typename Tile::Products& scores, const typename Tile::Told& told,
                                                 const PowersOfTwo& powers) {
#pragma unroll
  for (int i = 0; i < Tile::kQueries / 2; i += 4) {  // i and i + 2 are of one query, i + 1 and i + 3 of the next
    const Vec<float, 2> base = load<2>(&told.base[i * 2 + member_of_group() * 2]);
#pragma unroll
    for (int e = 0; e < 4; ++e) scores[i + e] = exp2_approx(fmaf(scores[i + e], powers.exponent, base.at[e % 2]));
  }
}

// P and d_s = P (d_p - delta), times a softcap's derivative, as operands. capped: `scores` are tanh, else P already.
// first_key: the first of this lane's; the other one is 8 on.
template <bool masked, bool capped, class Tile>
__device__ __forceinline__ void differentiate(typename Tile::Operands& p, typename Tile::Operands& d_s,
                                              const typename Tile::Products& scores, const typename Tile::Products& d_p,
                                              const typename Tile::Told& told, const PowersOfTwo& powers,
                                              int first_key) {
#pragma unroll
  for (int i = 0; i < Tile::kQueries / 2; i += 4) {
    const int query = i * 2 + member_of_group() * 2;
    const Vec<float, 2> delta = load<2>(&told.delta[query]);
    Vec<float, 2> base;
    Vec<int, 2> begin, count;
    if (capped) base = load<2>(&told.base[query]);
    if (masked) begin = load<2>(&told.first_key[query]), count = load<2>(&told.key_count[query]);
    float weights[4], gradients[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float gradient = d_p[i + e];
      if (masked && count.at[e % 2] == 1) gradient = 0;  // as in delta: P is 1, whatever the score
      gradient -= delta.at[e % 2];
      weights[e] = scores[i + e];
      if (capped) {
        gradient *= 1 - weights[e] * weights[e];
        weights[e] = exp2_approx(fmaf(weights[e], powers.exponent, base.at[e % 2]));
      }
      gradients[e] = weights[e] * gradient;
      if (masked) {
        const bool seen = unsigned(first_key + e / 2 * 8 - begin.at[e % 2]) < unsigned(count.at[e % 2]);
        weights[e] = seen ? weights[e] : 0.0f;
        gradients[e] = seen ? gradients[e] : 0.0f;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      p[i / 8][i / 4 % 2 * 2 + half] = pack<typename Tile::T>(weights[half * 2], weights[half * 2 + 1]);
      d_s[i / 8][i / 4 % 2 * 2 + half] = pack<typename Tile::T>(gradients[half * 2], gradients[half * 2 + 1]);
    }
  }
}

// d_s^T of a consumer's keys to shared memory.
template <class Tile>
__device__ __forceinline__ void store_scores(typename Tile::Scores& to, int first_key,
                                             const typename Tile::Operands& d_s) {
  const int lane = lane_of_warp(), row = first_key + warp_of_block() % 4 * kPiece + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
  for (int piece = 0; piece < Tile::kQueries / kPiece; ++piece) {
    stmatrix(to.at(row, piece * kPiece + lane / 16 * 8), d_s[piece]);
  }
}

// A warp's 64 columns of d_q, on their way.
__device__ __forceinline__ void stage_results(Outgoing& out, const float (&d_q)[32]) {
  const int row = group_of_lane(), member = member_of_group();
  // Lanes of odd rows take their columns in another order: in the same one, rows 0 and 1 (2 and 3 ...) would want the
  // same banks.
  const bool odd = row % 2 != 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {  // of 8 columns
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Vec<float, 2> both;
#pragma unroll
      for (int e = 0; e < 2; ++e) both.at[e] = odd ? d_q[(i ^ 2) * 4 + half * 2 + e] : d_q[i * 4 + half * 2 + e];
      const int vector = (i % 4 ^ (odd ? 2 : 0)) * 2 + member / 2;
      store(reinterpret_cast<float*>(out.at(i / 4, row + half * 8, vector)) + member % 2 * 2, both);
    }
  }
}

// Its rows of d_k or d_v, rounded, to panels from first_panel on; whole panels, for whole ones are what leaves.
template <class Tile>
__device__ __forceinline__ void stage_results(Outgoing& out, int first_panel, const float (&results)[Tile::kWidth / 2],
                                              float scale) {
  constexpr int kVectors = Tile::Keys::kPanel / 8;  // of a panel's row
#pragma unroll
  for (int i = 0; i < Tile::Keys::kPanels * kVectors; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t both = 0;
      if (i * 8 < Tile::kWidth) {
        both = pack<typename Tile::T>(results[i * 4 + half * 2] * scale, results[i * 4 + half * 2 + 1] * scale);
      }
      *reinterpret_cast<uint32_t*>(out.at(first_panel + i / kVectors, group_of_lane() + half * 8, i % kVectors) +
                                   member_of_group() * 4) = both;
    }
  }
}

// Of a warpgroup.
template <class Tile>
__device__ __forceinline__ void consume(typename Tile::SharedMemory& shared, const AttentionBackward& p,
                                        const PowersOfTwo& powers, const BackwardMaps& maps,
                                        const BlockOfKeys& block) {
  constexpr int kDsBarrier = 1;  // 0 is __syncthreads's
  const AttentionPlan& plan = p.plan;
  const int consumer = threadIdx.x / kWarpgroup, own_keys = consumer * kWarpgroupRows;  // of the tile
  const int warp_row = warp_of_block() % 4 * kPiece;
  Outgoing& out = shared.out[warp_of_block()];

  const auto release = [&](uint64_t& empty) {
    if (threadIdx.x % kWarpgroup == 0) mbarrier_arrive(empty);
  };
  // Panels of `out` from first_panel on to columns first_column .. of a tensor; those that it does not have, and rows,
  // are left out.
  const auto send = [&](const TensorMap& map, int first_panel, int panels, int panel_width, int first_column, int row,
                        int head, int batch, bool add) {
    fence_proxy_async();
    __syncwarp();
    if (lane_of_warp() != 0) return;
    for (int panel = 0; panel < panels; ++panel) {
      const int to[4] = {first_column + panel * panel_width, row, head, batch};
      if (to[0] >= plan.width) break;
      if (add) tma_reduce_add(map, out.bytes[first_panel + panel], to);
      else tma_store(map, out.bytes[first_panel + panel], to);
    }
    bulk_commit();
  };

  typename Tile::Ring at, k;
  unsigned v_parity = 0;
  for (int first_key = block.split * Tile::kKeys; first_key < plan.keys; first_key += p.splits * Tile::kKeys) {
    float d_k[Tile::kWidth / 2], d_v[Tile::kWidth / 2];
#pragma unroll
    for (int i = 0; i < Tile::kWidth / 2; ++i) d_k[i] = d_v[i] = 0;

    bool first = true, last = false, exists = false;
    while (!last) {
      mbarrier_wait(shared.full[at.stage], at.parity);
      const auto& told = shared.told[at.stage];
      const int first_query = told.first_query, head = told.head;
      const Visible seen = told.seen;
      exists = told.exists != 0;
      last = told.last != 0;
      if (!exists) {
        barrier_sync(kDsBarrier, Tile::kConsumers * kWarpgroup);  // all have read what was told
        release(shared.empty[at.stage]);
        at.advance();
        break;
      }
      if (first) {
        mbarrier_wait(shared.k_full[k.stage], k.parity);
        mbarrier_wait(shared.v_full, v_parity);
      }

      const auto write_queries = [&](const float (&d_q)[Tile::kColumns / 2]) {
        if (!p.d_q) return;
        if (lane_of_warp() == 0) {
          if (first) bulk_wait<0>();  // of the tile of keys before: what is added to has to be there
          else bulk_wait_read<0>();
        }
        __syncwarp();
        stage_results(out, d_q);
        const int column = Tile::kByColumns ? consumer * Tile::kColumns : 0;
        const int row = first_query + warp_row + (Tile::kByColumns ? 0 : consumer * kWarpgroupRows);
        send(maps.part, 0, Outgoing::kPanels, kLine / int(sizeof(float)), column, row, head,
             block.split * plan.batches + block.batch, part_exists(p, seen, first_key / Tile::kKeys, Tile::kKeys));
      };
      float d_q[Tile::kColumns / 2];
      const auto& d_s_of_all = shared.d_s[at.stage];
      if (seen.hidden(first_key + own_keys, kWarpgroupRows)) {
        const typename Tile::Operands zeros = {};
        store_scores<Tile>(shared.d_s[at.stage], own_keys, zeros);
        fence_proxy_async();
        barrier_sync(kDsBarrier, Tile::kConsumers * kWarpgroup);  // d_s is there
        if (last) release(shared.v_empty);  // now that all warps have seen V come: its next coming might hide this one
        wgmma_fence();
        multiply_keys<Tile>(d_q, d_s_of_all, shared.k[k.stage], consumer);
        wgmma_commit();
        wgmma_wait<0>();
        pin_registers(d_q);
        write_queries(d_q);
      } else {
        typename Tile::Products scores, d_p;
        wgmma_fence();
        multiply_queries<Tile>(scores, shared.k[k.stage], own_keys, shared.q[at.stage]);
        wgmma_commit();
        multiply_queries<Tile>(d_p, shared.v, own_keys, shared.d_o[at.stage]);
        wgmma_commit();
        wgmma_wait<1>();
        pin_registers(scores);
        if (powers.capped) {
#pragma unroll
          for (int i = 0; i < Tile::kQueries / 2; ++i) scores[i] = powers.tanh_of(scores[i]);  // for its derivative
        } else {
          scores_to_powers<Tile>(scores, told, powers);
          compute_before_here(scores[0]);
        }
        wgmma_wait<0>();
        pin_registers(d_p);
        if (last) release(shared.v_empty);
        // Rows past the end see nothing, and have to be masked.
        const bool whole =
            seen.whole(first_key + own_keys, kWarpgroupRows) && first_query + Tile::kQueries <= plan.queries;
        const int key = first_key + own_keys + warp_row + group_of_lane();
        typename Tile::Operands weights, d_s;
        const auto differentiated = [&](auto masked, auto capped) {
          differentiate<decltype(masked)::value, decltype(capped)::value, Tile>(weights, d_s, scores, d_p, told, powers,
                                                                                key);
        };
        using Yes = std::true_type;
        using No = std::false_type;
        if (powers.capped) whole ? differentiated(No(), Yes()) : differentiated(Yes(), Yes());
        else whole ? differentiated(No(), No()) : differentiated(Yes(), No());
        store_scores<Tile>(shared.d_s[at.stage], own_keys, d_s);
        fence_proxy_async();

        pin_registers(d_v);
        pin_registers(d_k);
        pin_registers(weights);
        pin_registers(d_s);
        wgmma_fence();
        add_queries<Tile>(d_v, weights, shared.d_o[at.stage]);
        barrier_sync(kDsBarrier, Tile::kConsumers * kWarpgroup);  // d_s is there
        multiply_keys<Tile>(d_q, d_s_of_all, shared.k[k.stage], consumer);
        wgmma_commit();
        add_queries<Tile>(d_k, d_s, shared.q[at.stage]);
        wgmma_commit();
        wgmma_wait<1>();
        pin_registers(d_q);
        write_queries(d_q);
        wgmma_wait<0>();
        pin_registers(d_v);
        pin_registers(d_k);
      }
      release(shared.empty[at.stage]);
      first = false;
      at.advance();
    }
    if (exists) {
      k.advance();
      v_parity ^= 1;
    }

    const auto wait_for_room = [&] {
      if (lane_of_warp() == 0) bulk_wait_read<0>();
      __syncwarp();
    };
    const auto send_keys = [&](const TensorMap& map, int first_panel, const float (&results)[Tile::kWidth / 2],
                               float scale) {
      stage_results<Tile>(out, first_panel, results, scale);
      send(map, first_panel, Tile::Keys::kPanels, Tile::Keys::kPanel, 0, first_key + own_keys + warp_row, block.kv_head,
           block.batch, false);
    };
    constexpr bool kRoomForBoth = 2 * Tile::Keys::kPanels <= Outgoing::kPanels;
    wait_for_room();
    if (p.d_v) send_keys(maps.d_v, 0, d_v, 1.0f);
    if (!kRoomForBoth) wait_for_room();
    if (p.d_k) send_keys(maps.d_k, kRoomForBoth ? Tile::Keys::kPanels : 0, d_k, float(plan.scale));
  }
  if (lane_of_warp() == 0) bulk_wait_read<0>();
}

template <class Tile>
__global__ __launch_bounds__(Tile::kThreads, 1) void attention_backward_sm90_kernel(
    AttentionBackward p, PowersOfTwo powers, const __grid_constant__ BackwardMaps maps) {
  if (!kForSm90) return __trap();
  auto& shared = dynamic_shared<typename Tile::SharedMemory>();
  if (threadIdx.x == 0) {
    mbarrier_init(shared.v_full, 1);
    mbarrier_init(shared.v_empty, Tile::kConsumers);
#pragma unroll
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      mbarrier_init(shared.full[stage], kWarpgroup / 32);
      mbarrier_init(shared.empty[stage], Tile::kConsumers);
      mbarrier_init(shared.k_full[stage], 1);
    }
    fence_mbarrier_init();
  }
  __syncthreads();

  const BlockOfKeys block(p);
  if (threadIdx.x / kWarpgroup == Tile::kConsumers) {
    give_back_registers_down_to<Tile::kProducerRegisters>();
    produce<Tile>(shared, p, maps, block);
  } else {
    take_registers_up_to<Tile::kConsumerRegisters>();
    consume<Tile>(shared, p, powers, maps, block);
  }
}

template <class T, class F>
void with_hopper_backward_tile(int width, F f) {
  if (width <= 64) return f(HopperBackwardTile<T, 64, 128>());
  if (width <= 96) return f(HopperBackwardTile<T, 96, 64>());
  return f(HopperBackwardTile<T, 128, 64>());
}

TensorMap map_of_parts(const AttentionBackward& p) {
  const AttentionPlan& plan = p.plan;
  const uint64_t row = uint64_t(plan.width) * sizeof(float), token = row * plan.heads;
  const uint64_t sizes[4] = {uint64_t(plan.width), uint64_t(plan.queries), uint64_t(plan.heads),
                             uint64_t(p.splits) * plan.batches};
  const uint64_t strides[3] = {token, row, token * plan.queries};
  const uint32_t box[4] = {kLine / sizeof(float), kPiece, 1, 1};
  return make_tensor_map(p.partial_d_q, kTensorF32, 4, sizes, strides, box, kSwizzleBytes);
}

template <class T>
void launch_backward(const AttentionBackward& p, Stream stream) {
  const AttentionPlan& plan = p.plan;
  if (plan.batches == 0) return;
  with_hopper_backward_tile<T>(plan.width, [&](auto of) {
    using Tile = decltype(of);
    launch_attention_visible(p, Tile::kQueries, stream);
    BackwardMaps maps;
    maps.q = map_of_heads<typename Tile::Queries>(p.q, plan, plan.queries, plan.heads, Tile::kQueries);
    maps.d_o = map_of_heads<typename Tile::Queries>(p.d_o, plan, plan.queries, plan.heads, Tile::kQueries);
    maps.k = map_of_heads<typename Tile::Keys>(p.k, plan, plan.keys, plan.kv_heads, Tile::kKeys);
    maps.v = map_of_heads<typename Tile::Keys>(p.v, plan, plan.keys, plan.kv_heads, Tile::kKeys);
    const int64_t token = int64_t(plan.kv_heads) * plan.width;
    const auto map_of_keys = [&](const void* gradient) {
      return map_of_heads<typename Tile::Keys>({gradient, plan.keys * token, token, plan.width}, plan, plan.keys,
                                               plan.kv_heads, kPiece);
    };
    if (p.d_k) maps.d_k = map_of_keys(p.d_k);
    if (p.d_v) maps.d_v = map_of_keys(p.d_v);
    if (p.d_q) maps.part = map_of_parts(p);
    const LaunchShape shape{dim3(attention_blocks(int64_t(p.splits) * plan.batches * plan.kv_heads)),
                            dim3(Tile::kThreads), sizeof(typename Tile::SharedMemory), stream};
    launch(attention_backward_sm90_kernel<Tile>, shape, p, PowersOfTwo(plan), maps);
    launch_attention_sum_queries(p, Tile::kKeys, Tile::kQueries, stream);
  });
}

}  // namespace

int attention_backward_splits_sm90(const AttentionPlan& plan) {
  // The fewest with which hardly a multiprocessor is idle in the last round of blocks: each one more has to be summed.
  constexpr int64_t kMostBytes = int64_t(1) << 30;
  constexpr double kEnough = 0.9;
  const int64_t heads = std::max(int64_t(plan.batches) * plan.kv_heads, int64_t(1));
  const int64_t bytes = int64_t(plan.batches) * plan.queries * plan.heads * plan.width * int64_t(sizeof(float));
  int64_t tiles = 1;
  with_hopper_backward_tile<__half>(plan.width, [&](auto tile) {
    constexpr int kKeys = decltype(tile)::kKeys;
    tiles = (plan.keys + kKeys - 1) / kKeys;
  });
  const int64_t most = std::max(std::min(tiles, kMostBytes / std::max(bytes, int64_t(1))), int64_t(1));
  const int64_t places = multiprocessors();
  int best = 1;
  double most_busy = 0;
  for (int64_t splits = 1; splits <= most && most_busy < kEnough; ++splits) {
    const int64_t blocks = heads * splits, rounds = (blocks + places - 1) / places;
    const double busy = double(blocks) / double(rounds * places);
    if (busy > most_busy) best = int(splits), most_busy = busy;
  }
  return best;
}

void launch_attention_backward_sm90(const AttentionBackward& p, Stream stream) {
  if (only_asking) return;  // the driver would be asked for maps
  if (p.plan.dtype == DType::bfloat16) launch_backward<__nv_bfloat16>(p, stream);
  else launch_backward<__half>(p, stream);
}

}  // namespace fastgpt
