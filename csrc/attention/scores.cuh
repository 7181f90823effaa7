// Which keys a query sees, and its scores as the softmax takes them, for all paths. Causal mask, window, documents and
// lengths together leave a run of neighbouring keys, so every kernel here has two numbers for a query and no mask.
#pragma once

#include <climits>

#include "attention/attention.h"
#include "device/cuda.h"

namespace fastgpt {

// begin <= j < end. None: INT_MAX and 0, so that a union of ranges is a minimum and a maximum.
struct KeyRange {
  int begin = INT_MAX, end = 0;

  __device__ __forceinline__ bool empty() const { return end <= begin; }
  // The softmax of one score is 1 whatever it is: no gradient comes from it, exactly and not up to rounding.
  __device__ __forceinline__ bool single() const { return end - begin == 1; }
  __device__ __forceinline__ bool has(int key) const { return begin <= key && key < end; }
  __device__ __forceinline__ bool meets(int first, int last) const { return begin < last && first < end; }
  __device__ __forceinline__ void join(int other_begin, int other_end) {
    begin = min(begin, other_begin);
    end = max(end, other_end);
  }
};

// How many keys a row of the batch has. A length that is not in 0 .. Tk would lead out of the tensors.
__device__ __forceinline__ int keys_of(const AttentionPlan& plan, int batch) {
  if (!plan.kv_lengths) return plan.keys;
  const int64_t length = plan.long_lengths ? static_cast<const int64_t*>(plan.kv_lengths)[batch]
                                           : int64_t(static_cast<const int32_t*>(plan.kv_lengths)[batch]);
  return int(max(int64_t(0), min(length, int64_t(plan.keys))));
}

// Of one query, where the row of the batch has `keys` keys, and its document is doc_start .. doc_end - 1.
__device__ __forceinline__ KeyRange keys_seen(const AttentionPlan& plan, int query, int keys, int doc_start,
                                              int doc_end) {
  const int position = query + keys - plan.queries;  // the queries are the last of the keys
  int begin = max(0, doc_start), end = min(keys, doc_end);
  if (plan.causal) end = min(end, position + 1);
  if (plan.window >= 0) begin = max(begin, position - plan.window);
  return begin < end ? KeyRange{begin, end} : KeyRange{};
}
__device__ __forceinline__ KeyRange keys_seen(const AttentionPlan& plan, int batch, int query, int keys) {
  if (!plan.doc_start) return keys_seen(plan, query, keys, 0, keys);
  const int64_t token = int64_t(batch) * plan.queries + query;
  return keys_seen(plan, query, keys, plan.doc_start[token], plan.doc_end[token]);
}

// The queries that may see keys first .. last - 1, by the causal mask and the window; documents are looked at tile by
// tile.
__device__ __forceinline__ KeyRange queries_seeing(const AttentionPlan& plan, int first, int last, int keys) {
  const int offset = keys - plan.queries;  // of a query's position
  KeyRange queries{0, plan.queries};
  if (plan.causal) queries.begin = max(0, first - offset);
  if (plan.window >= 0) queries.end = int(min(int64_t(plan.queries), int64_t(last) + plan.window - offset));
  return queries;
}

// The union over the lanes of a warp; every lane gets it.
__device__ __forceinline__ KeyRange over_warp(KeyRange range) {
  for (int distance = 16; distance > 0; distance /= 2) {
    range.join(__shfl_xor_sync(0xffffffffu, range.begin, distance), __shfl_xor_sync(0xffffffffu, range.end, distance));
  }
  return range;
}

// LSE of a row from its largest score and its sum e^(score - peak).
template <class A>
__device__ __forceinline__ void store_lse(const AttentionForward& p, int64_t row, bool blind, A peak, A sum) {
  static_cast<A*>(p.lse)[row] = blind ? -A(INFINITY) : peak + log(sum);
}

// A score as the softmax takes it, and its derivative by the product q . k, without `scale`.
template <class A>
__device__ __forceinline__ A capped(A product, const AttentionPlan& plan) {
  const A score = product * A(plan.scale);
  return plan.softcap == 0 ? score : A(plan.softcap) * tanh(score / A(plan.softcap));
}
template <class A>
__device__ __forceinline__ A capped_derivative(A score, const AttentionPlan& plan) {
  const A of_cap = plan.softcap == 0 ? A(0) : score / A(plan.softcap);
  return 1 - of_cap * of_cap;
}

// e^(score - base). An exponent of 6 is rounded by up to 2.4e-7, which would make a weight wrong by as much, more than
// torch's are in float32: so what was lost is found exactly (Knuth's two-sum) and multiplied in.
template <class A>
__device__ __forceinline__ A weight_of(A score, A base) {
  const A exponent = score - base;
  const A base_found = score - exponent, score_found = exponent + base_found;
  const A lost = (score - score_found) + (base_found - base);
  const A power = exp(exponent);
  return score == -A(INFINITY) ? power : fma(power, lost, power);  // inf - inf would be NaN
}

}  // namespace fastgpt
