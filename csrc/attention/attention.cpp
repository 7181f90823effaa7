// attention, as torch calls it: memory is allocated, a kernel path chosen, and a kernel of this folder launched. The
// Python page checks the contract; what is checked again here could make a kernel leave its memory.

#include "attention/attention.h"

#include <initializer_list>
#include <tuple>
#include <utility>

#include "host/path.h"
#include "host/tensor.h"

namespace fastgpt {
namespace {

struct Choice {
  AttentionPath path;
  const char* reason;
};

AttentionPath remember(const char* entry, Choice choice) {
  const char* const names[] = {"generic", "decode", "sm80", "sm90"};  // in the order of AttentionPath
  remember_path(entry, names[int(choice.path)], choice.reason);
  return choice.path;
}

class HeadsAlignment : public Alignment {
 public:
  using Alignment::Alignment;
  void heads(const ConstHeads& heads) {
    for (int64_t stride : {heads.batch, heads.token, heads.head}) rows({heads.data, stride});
  }
};

// Why tensor cores do not serve a call, or null.
template <class... Heads>
const char* against_sm80(const AttentionPlan& plan, const Heads&... heads) {
  HeadsAlignment found(plan.dtype, plan.width);
  if (!attention_sm80_serves_chip()) found.note("a chip older than sm_80");
  if (bytes_of(plan.dtype) != 2) found.note("not a dtype of 16 bits");
  if (plan.width == 0) found.note("heads without elements");
  if (plan.width > kWidestSm80Head) found.note("a head is too wide for tensor cores");
  // The scale is multiplied in where exponents are computed: the largest score must be that of the largest product.
  if (!(plan.scale >= 1e-30 && plan.scale <= 1e30)) found.note("a scale that is not positive, or extreme");
  // tanh is off by up to 2^-22: times a larger cap 16 bits would show it, and beside a small one its derivative is lost.
  if (plan.softcap != 0 && !(plan.softcap >= 1e-2 && plan.softcap <= 1e3)) found.note("a softcap that is extreme");
  (found.heads(heads), ...);
  return found.reason();
}

struct TmaTensor {
  const ConstHeads& of;
  int tokens, heads;
};

// Why a call that tensor cores serve cannot go by TMA, or null.
const char* against_sm90(const AttentionPlan& plan, std::initializer_list<TmaTensor> tensors) {
  HeadsAlignment found(plan.dtype, plan.width);
  if (plan.queries == 0 || plan.heads == 0) found.note("no queries");
  if (plan.keys == 0) found.note("no keys");
  // Values that no query sees are multiplied by zeros: those beyond a length may be anything, NaN too.
  if (plan.kv_lengths) found.note("lengths of keys");
  for (const auto& [of, tokens, heads] : tensors) {
    const std::pair<int64_t, int64_t> dimensions[] = {
        {plan.batches, of.batch}, {tokens, of.token}, {heads, of.head}};
    for (const auto& [size, stride] : dimensions) {
      if (size > 1 && stride < plan.width) found.note("rows of a tensor overlap");
      if (stride * bytes_of(plan.dtype) >= int64_t(1) << 40) found.note("rows are too far apart for TMA");
    }
  }
  return found.reason();
}

const char* against_decoding(const AttentionForward& p) {
  const AttentionPlan& plan = p.plan;
  HeadsAlignment found(plan.dtype, plan.width);
  if (plan.dtype == DType::float64) found.note("float64");
  if (plan.queries > kMostDecodeQueries) found.note("more queries than decoding takes");
  if (plan.doc_start) found.note("documents");
  if (plan.width == 0) found.note("heads without elements");
  if (plan.width * bytes_of(plan.dtype) > kWidestDecodeHead) found.note("a head is too wide for decoding");
  found.heads(p.q);
  found.heads(p.k);
  found.heads(p.v);
  return found.reason();
}

Choice choose_path(const AttentionForward& p) {
  const char* decoding = against_decoding(p);
  if (!decoding) return {AttentionPath::decode, "few queries"};
  if (!attention_sm80_serves_chip()) return {AttentionPath::generic, decoding};
  if (const char* reason = against_sm80(p.plan, p.q, p.k, p.v)) return {AttentionPath::generic, reason};
  if (!attention_sm90_serves_chip()) return {AttentionPath::sm80, "16 bits, on tensor cores"};
  const AttentionPlan& plan = p.plan;
  const auto reason = against_sm90(plan, {{p.q, plan.queries, plan.heads},
                                          {p.k, plan.keys, plan.kv_heads},
                                          {p.v, plan.keys, plan.kv_heads}});
  if (reason) return {AttentionPath::sm80, reason};
  return {AttentionPath::sm90, "16 bits, by TMA and wgmma"};
}

Choice choose_path(const AttentionBackward& p) {
  if (const char* reason = against_sm80(p.plan, p.q, p.k, p.v, p.d_o, p.o)) return {AttentionPath::generic, reason};
  if (!attention_sm90_serves_chip()) return {AttentionPath::sm80, "16 bits, on tensor cores"};
  const AttentionPlan& plan = p.plan;
  const auto reason = against_sm90(plan, {{p.q, plan.queries, plan.heads},
                                          {p.d_o, plan.queries, plan.heads},
                                          {p.k, plan.keys, plan.kv_heads},
                                          {p.v, plan.keys, plan.kv_heads}});
  if (reason) return {AttentionPath::sm80, reason};
  return {AttentionPath::sm90, "16 bits, by TMA and wgmma"};
}

// The arguments that both entries share, checked; with what had to be made contiguous.
struct Inputs {
  HeadsView q, k, v;
  OptionalTensor doc_start, doc_end, kv_lengths;
  AttentionPlan plan;

  Inputs(const Tensor& q_, const Tensor& k_, const Tensor& v_, bool causal, std::optional<int64_t> window, double scale,
         double softcap, const OptionalTensor& doc_start_, const OptionalTensor& doc_end_,
         const OptionalTensor& kv_lengths_)
      : q(four(q_, q_, "q")), k(four(k_, q_, "k")), v(four(v_, q_, "v")) {
    bool fit = k_.size(0) == q_.size(0) && k_.size(3) == q_.size(3) && k_.size(2) > 0 && q_.size(2) % k_.size(2) == 0;
    for (int64_t d = 0; d < 4; ++d) fit = fit && v_.size(d) == k_.size(d);
    STD_TORCH_CHECK(fit, "q must be (B, Tq, H, D), k and v (B, Tk, KV, D), with H a multiple of KV");
    constexpr int64_t kMost = int64_t(1) << 30;
    for (int64_t size : {q_.size(0), q_.size(1), q_.size(2), q_.size(3), k_.size(1)}) {
      STD_TORCH_CHECK(size < kMost, "each dimension must be less than ", kMost, ", got ", size);
    }
    plan.batches = int(q_.size(0));
    plan.queries = int(q_.size(1));
    plan.keys = int(k_.size(1));
    plan.heads = int(q_.size(2));
    plan.kv_heads = int(k_.size(2));
    plan.width = int(q_.size(3));
    plan.dtype = dtype_of(q_, "q");
    plan.causal = causal;
    STD_TORCH_CHECK(!window || *window >= 0, "window must be 0 or more, got ", window.value_or(0));
    plan.window = window && *window < plan.keys ? int(*window) : -1;
    plan.scale = scale;
    plan.softcap = softcap;
    STD_TORCH_CHECK(doc_start_.has_value() == doc_end_.has_value(), "doc_start and doc_end must be given together");
    if (doc_start_) {
      STD_TORCH_CHECK(plan.queries == plan.keys, "documents need as many queries as keys");
      doc_start = bound(*doc_start_, "doc_start");
      doc_end = bound(*doc_end_, "doc_end");
    }
    if (kv_lengths_) {
      const auto type = kv_lengths_->scalar_type();
      STD_TORCH_CHECK((type == ScalarType::Int || type == ScalarType::Long) && kv_lengths_->dim() == 1 &&
                          kv_lengths_->size(0) == plan.batches && on_device_of_q(*kv_lengths_),
                      "kv_lengths must be (B,), int32 or int64, on the device of q");
      kv_lengths = torch::stable::contiguous(*kv_lengths_);
      plan.long_lengths = type == ScalarType::Long;
    }
  }

  // Pointers for the plan, and for the tensors of P.
  template <class P>
  void give(const Call& call, P& p) {
    if (doc_start) {
      plan.doc_start = static_cast<const int32_t*>(call.in(*doc_start, "doc_start"));
      plan.doc_end = static_cast<const int32_t*>(call.in(*doc_end, "doc_end"));
    }
    if (kv_lengths) plan.kv_lengths = call.in(*kv_lengths, "kv_lengths");
    p.plan = plan;
    p.q = q.in(call, "q");
    p.k = k.in(call, "k");
    p.v = v.in(call, "v");
  }

  bool on_device_of_q(const Tensor& x) const {
    return x.is_cuda() == q.tensor.is_cuda() && x.get_device_index() == q.tensor.get_device_index();
  }

 private:
  static const Tensor& four(const Tensor& x, const Tensor& q, const char* name) {
    STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == q.scalar_type() && x.is_cuda() == q.is_cuda() &&
                        x.get_device_index() == q.get_device_index(),
                    name, " must be (B, T, heads, D), of the dtype and on the device of q");
    return x;
  }
  Tensor bound(const Tensor& x, const char* name) const {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int && x.dim() == 2 && x.size(0) == plan.batches &&
                        x.size(1) == plan.queries && on_device_of_q(x),
                    name, " must be (B, T), int32, on the device of q");
    return torch::stable::contiguous(x);
  }
};

// (o, lse)
std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                                             std::optional<int64_t> window, double scale, double softcap,
                                             OptionalTensor doc_start, OptionalTensor doc_end,
                                             OptionalTensor kv_lengths) {
  Inputs inputs(q, k, v, causal, window, scale, softcap, doc_start, doc_end, kv_lengths);
  const Call call(q);
  const Tensor o = empty(q, q.sizes(), q.scalar_type());
  const Tensor lse = empty(q, {q.size(0), q.size(2), q.size(1)}, accumulator_of(q));
  AttentionForward p;
  inputs.give(call, p);
  p.o = call.out(o, "o");
  p.lse = call.out(lse, "lse");
  const AttentionPath path = remember("attention_forward", choose_path(p));
  if (path != AttentionPath::decode) {
    const auto launch = path == AttentionPath::sm90   ? launch_attention_forward_sm90
                        : path == AttentionPath::sm80 ? launch_attention_forward_sm80
                                                      : launch_attention_forward_generic;
    launch(p, call.stream());
    return {o, lse};
  }
  p.splits = attention_decode_splits(p.plan);
  std::optional<Tensor> partial_o, partial_stats;
  if (p.splits > 1) {
    partial_o = empty(q, {q.size(0), q.size(2), q.size(1), p.splits, q.size(3)}, ScalarType::Float);
    partial_stats = empty(q, {q.size(0), q.size(2), q.size(1), p.splits, 2}, ScalarType::Float);
    p.partial_o = call.out(*partial_o, "partial_o");
    p.partial_stats = call.out(*partial_stats, "partial_stats");
  }
  launch_attention_decode(p, call.stream());
  return {o, lse};
}

// (d_q, d_k, d_v); what is not wanted is empty.
std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& d_o_, const OptionalTensor& d_lse_, const Tensor& q,
                                                      const Tensor& k, const Tensor& v, const Tensor& o_,
                                                      const Tensor& lse, bool causal, std::optional<int64_t> window,
                                                      double scale, double softcap, OptionalTensor doc_start,
                                                      OptionalTensor doc_end, OptionalTensor kv_lengths, bool need_q,
                                                      bool need_k, bool need_v) {
  Inputs inputs(q, k, v, causal, window, scale, softcap, doc_start, doc_end, kv_lengths);
  const auto check_like_q = [&](const Tensor& x, const char* name) {
    bool same = x.dim() == 4 && x.scalar_type() == q.scalar_type() && inputs.on_device_of_q(x);
    for (int64_t d = 0; same && d < 4; ++d) same = x.size(d) == q.size(d);
    STD_TORCH_CHECK(same, name, " must have the shape, dtype and device of q");
  };
  const auto check_row_values = [&](const Tensor& x, const char* name) {
    STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == q.size(0) && x.size(1) == q.size(2) && x.size(2) == q.size(1) &&
                        x.scalar_type() == accumulator_of(q) && inputs.on_device_of_q(x),
                    name, " must be (B, H, Tq), float32 (float64 for float64), on the device of q");
  };
  check_like_q(d_o_, "d_o");
  check_like_q(o_, "o");
  check_row_values(lse, "lse");
  STD_TORCH_CHECK(lse.is_contiguous(), "lse must be what the forward returned");
  if (d_lse_) check_row_values(*d_lse_, "d_lse");

  const Call call(q);
  const HeadsView d_o(d_o_), o(o_);
  OptionalTensor d_lse;
  if (d_lse_) d_lse = torch::stable::contiguous(*d_lse_);
  const Tensor delta = empty(q, lse.sizes(), accumulator_of(q));
  const auto gradient = [&](bool needed, const Tensor& of) {
    return needed ? empty(of, of.sizes(), of.scalar_type()) : empty(of, {0}, of.scalar_type());
  };
  const Tensor d_q = gradient(need_q, q), d_k = gradient(need_k, k), d_v = gradient(need_v, v);
  AttentionBackward p;
  inputs.give(call, p);
  p.d_o = d_o.in(call, "d_o");
  p.o = o.in(call, "o");
  p.lse = call.in(lse, "lse");
  if (d_lse) p.d_lse = call.in(*d_lse, "d_lse");
  p.delta = call.out(delta, "delta");
  if (need_q) p.d_q = call.out(d_q, "d_q");
  if (need_k) p.d_k = call.out(d_k, "d_k");
  if (need_v) p.d_v = call.out(d_v, "d_v");
  const AttentionPath path = remember("attention_backward", choose_path(p));
  if (path == AttentionPath::generic) {
    const Tensor row_stats = empty(q, {q.size(0), q.size(2), q.size(1), 2}, accumulator_of(q));
    p.row_stats = call.out(row_stats, "row_stats");
    launch_attention_delta(p, call.stream());
    launch_attention_backward_generic(p, call.stream());
    return {d_q, d_k, d_v};
  }
  launch_attention_delta_of_vectors(p, call.stream());
  const bool hopper = path == AttentionPath::sm90;
  p.splits = hopper ? attention_backward_splits_sm90(p.plan) : attention_backward_splits_sm80(p.plan);
  OptionalTensor partial_d_q;
  if (need_q) {
    partial_d_q = empty(q, {p.splits, q.size(0), q.size(1), q.size(2), q.size(3)}, ScalarType::Float);
    p.partial_d_q = static_cast<float*>(call.out(*partial_d_q, "partial_d_q"));
  }
  OptionalTensor visible;
  if (p.plan.doc_start) {
    const int64_t tiles = (q.size(1) + kFewestBackwardQueries - 1) / kFewestBackwardQueries;
    visible = empty(q, {q.size(0), tiles, 4}, ScalarType::Int);
    p.visible = static_cast<int32_t*>(call.out(*visible, "visible"));
  }
  (hopper ? launch_attention_backward_sm90 : launch_attention_backward_sm80)(p, call.stream());
  return {d_q, d_k, d_v};
}

}  // namespace
}  // namespace fastgpt

FASTGPT_LIBRARY_IMPL(library) {
  library.impl("attention_forward", TORCH_BOX(&fastgpt::attention_forward));
  library.impl("attention_backward", TORCH_BOX(&fastgpt::attention_backward));
}
