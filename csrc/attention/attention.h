// Attention: what the kernels of this folder are given, and which there are. No torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "device/types.h"

namespace fastgpt {

// What every kernel here is told: shapes and masks, as fastgpt/ops/attention.py has them.
struct AttentionPlan {
  int batches = 0, queries = 0, keys = 0;  // B, Tq, Tk
  int heads = 0, kv_heads = 0, width = 0;  // H, KV, D
  DType dtype = DType::float32;            // of q, k, v, o and their gradients
  bool causal = true;
  int window = -1;  // -1: none
  double scale = 1, softcap = 0;           // softcap 0: none
  const int32_t *doc_start = nullptr, *doc_end = nullptr;  // (B, T), or null
  const void* kv_lengths = nullptr;                        // (B,), or null: Tk keys everywhere
  bool long_lengths = false;                               // int64, and not int32
};

struct AttentionForward {
  AttentionPlan plan;
  ConstHeads q, k, v;
  void* o = nullptr;    // (B, Tq, H, D) contiguous
  void* lse = nullptr;  // (B, H, Tq), float, or double for float64
  // Of decoding alone. splits: what attention_decode_splits said; with more than one there are workspaces, float.
  int splits = 1;
  void* partial_o = nullptr;      // (B, H, Tq, splits, D): not yet divided by its sum
  void* partial_stats = nullptr;  // (B, H, Tq, splits, 2): the largest score, and the sum of e^(score - largest)
};

struct AttentionBackward {
  AttentionPlan plan;
  ConstHeads d_o, q, k, v, o;
  const void* lse = nullptr;    // (B, H, Tq), float, or double for float64: what the forward gave
  const void* d_lse = nullptr;  // likewise; null: LSE was not used
  void* delta = nullptr;        // likewise: workspace, rowsum(d_o * o) - d_lse
  void *d_q = nullptr, *d_k = nullptr, *d_v = nullptr;  // contiguous, as q, k, v; null: not wanted
  void* row_stats = nullptr;  // (B, H, Tq, 2), likewise: workspace of the generic path, see QueryStats there
  // Of the paths on tensor cores alone: what attention_backward_splits_ of the path said, and workspaces, of d_q where
  // it is wanted, and of what tiles of queries see where there are documents.
  int splits = 1;
  float* partial_d_q = nullptr;  // (splits, B, Tq, H, D)
  int32_t* visible = nullptr;    // (B, ceil(Tq / kFewestBackwardQueries), 4)
};

// generic: any dtype, width and alignment. decode: few queries against many keys. sm80: tensor cores, 16 bits. sm90:
// likewise, by TMA and wgmma. attention.cpp: choose_path.
enum class AttentionPath { generic, decode, sm80, sm90 };

// What decoding serves besides: 16-byte accesses, no documents, no float64.
constexpr int kMostDecodeQueries = 8;
constexpr int kWidestDecodeHead = 512;  // bytes: one vector for each lane of a warp

// What the sm_80 path serves: heads of up to this width, rows that begin at multiples of 16 bytes.
constexpr int kWidestSm80Head = 128;
constexpr int kFewestBackwardQueries = 32;  // of a tile
bool attention_sm80_serves_chip();  // the current device

// The sm_90 path serves what the sm_80 path does where the TMA unit can find the tensors.
bool attention_sm90_serves_chip();  // the current device; it alone, for newer chips have no wgmma

// Over how many blocks the backward splits the keys of a head.
int attention_backward_splits_sm80(const AttentionPlan& plan);
int attention_backward_splits_sm90(const AttentionPlan& plan);

// Over how many blocks decoding splits the keys of a row: by the room for keys, which the host knows, and not by how
// many there are.
int attention_decode_splits(const AttentionPlan& plan);

void launch_attention_forward_generic(const AttentionForward& p, Stream stream);
void launch_attention_decode(const AttentionForward& p, Stream stream);
void launch_attention_forward_sm80(const AttentionForward& p, Stream stream);
void launch_attention_forward_sm90(const AttentionForward& p, Stream stream);

// First, on the generic path, and on the others.
void launch_attention_delta(const AttentionBackward& p, Stream stream);
void launch_attention_delta_of_vectors(const AttentionBackward& p, Stream stream);
void launch_attention_backward_generic(const AttentionBackward& p, Stream stream);
void launch_attention_backward_sm80(const AttentionBackward& p, Stream stream);
void launch_attention_backward_sm90(const AttentionBackward& p, Stream stream);

// Of these two, for their tiles: before, where there are documents, and after, where d_q is wanted.
void launch_attention_visible(const AttentionBackward& p, int queries_of_tile, Stream stream);
void launch_attention_sum_queries(const AttentionBackward& p, int keys_of_tile, int queries_of_tile, Stream stream);
unsigned attention_blocks(int64_t blocks);  // for a launch; raises if they are too many

}  // namespace fastgpt
