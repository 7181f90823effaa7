// How the blocks of attention's backwards on tensor cores share the work. A block has tiles of keys of one KV head, and
// goes, for each, through the tiles of queries that see some of it, of all heads that share these keys: so d_k and d_v
// are its own.
//
// d_q sums over blocks, too. So that nothing is ever added in another order, and without atomics, there are p.splits
// blocks for each head, each takes every splits-th tile of keys, one after the other, and adds to a part of d_q, fp32,
// that is its own; attention_sum_queries_kernel adds the parts up in order, those to which a tile of keys has added.
#pragma once

#include "attention/tiles.cuh"

namespace fastgpt {

// What a tile of queries sees. Where there are documents it was found once, by attention_visible_kernel.
__device__ __forceinline__ Visible seen_by_tile(const AttentionBackward& p, int batch, int tile, int queries_of_tile,
                                                int keys) {
  const int first = tile * queries_of_tile, count = min(queries_of_tile, p.plan.queries - first);
  if (!p.plan.doc_start) return visible_by_position(p.plan, first, count, keys);
  const int tiles = (p.plan.queries + queries_of_tile - 1) / queries_of_tile;
  const Vec<int32_t, 4> found = load<4>(p.visible + (int64_t(batch) * tiles + tile) * 4);
  return {{found.at[0], found.at[1]}, {found.at[2], found.at[3]}};
}

// Queries of a head that see some of a block's keys.
struct Step {
  int tile, head;
};

}  // namespace fastgpt
