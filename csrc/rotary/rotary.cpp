// rotary, as torch calls it: memory is allocated, a kernel path chosen, and rotary.cu launched. The Python page checks
// the contract; what is checked again here could make a kernel leave its memory.

#include "rotary/rotary.h"

#include <tuple>

#include "host/path.h"
#include "host/tensor.h"

namespace fastgpt {
namespace {

class RotaryAlignment : public Alignment {
 public:
  explicit RotaryAlignment(const RotaryPlan& plan) : Alignment(plan.dtype, plan.width) {
    if (plan.half % (16 / bytes_of(plan.dtype)) != 0) note("half of what is rotated is no multiple of 16 bytes");
    if (!aligned(plan.cos) || !aligned(plan.sin)) note("a table does not begin at a multiple of 16 bytes");
  }
  void heads(const ConstHeads& heads) {
    for (int64_t stride : {heads.batch, heads.token, heads.head}) rows({heads.data, stride});
  }
};

RotaryPath remember(const char* entry, const Alignment& found) {
  remember_path(entry, found.reason() ? "generic" : "vector", found.reason() ? found.reason() : "16-byte accesses");
  return found.reason() ? RotaryPath::generic : RotaryPath::vector;
}

// The tables and positions of a call, and its plan.
struct Inputs {
  Tensor cos, sin;
  OptionalTensor positions;
  RotaryPlan plan;

  Inputs(const Tensor& qkv, const Tensor& cos_, const Tensor& sin_, const OptionalTensor& positions_, int64_t n_head,
         int64_t n_kv_head)
      : cos(torch::stable::contiguous(cos_)), sin(torch::stable::contiguous(sin_)) {
    STD_TORCH_CHECK(qkv.dim() == 4 && n_head >= 0 && n_kv_head >= 0 && qkv.size(2) == n_head + 2 * n_kv_head,
                    "qkv must be (B, T, n_head + 2 n_kv_head, D)");
    for (const Tensor* table : {&cos, &sin}) {
      STD_TORCH_CHECK(table->dim() == 2 && table->scalar_type() == accumulator_of(qkv) &&
                          table->is_cuda() == qkv.is_cuda() && table->size(0) == cos.size(0) &&
                          table->size(1) == cos.size(1) && 2 * cos.size(1) <= qkv.size(3),
                      "cos and sin must be (T_max, R / 2) with R <= D, float32 (float64 for float64)");
    }
    plan.batches = qkv.size(0);
    plan.tokens = qkv.size(1);
    plan.q_heads = n_head;
    plan.k_heads = plan.v_heads = n_kv_head;
    plan.width = qkv.size(3);
    plan.half = cos.size(1);
    plan.dtype = dtype_of(qkv, "qkv");
    plan.table_rows = cos.size(0);
    if (!positions_) return;
    const auto type = positions_->scalar_type();
    const int64_t dim = positions_->dim();
    STD_TORCH_CHECK((type == ScalarType::Int || type == ScalarType::Long) && positions_->is_cuda() == qkv.is_cuda() &&
                        (dim == 1 || (dim == 2 && positions_->size(0) == plan.batches)) &&
                        positions_->size(dim - 1) == plan.tokens,
                    "positions must be (B, T) or (T,), int32 or int64, on the device of qkv");
    positions = torch::stable::contiguous(*positions_);
    plan.long_positions = type == ScalarType::Long;
    plan.positions_batch = dim == 2 ? plan.tokens : 0;
  }
  void give(const Call& call) {
    plan.cos = call.in(cos, "cos");
    plan.sin = call.in(sin, "sin");
    if (positions) plan.positions = call.in(*positions, "positions");
  }
};

void launch_rotary(const char* entry, const Rotary& p, const Call& call) {
  RotaryAlignment found(p.plan);
  found.heads(p.x);
  launch_rotary(p, remember(entry, found), call.stream());
}

Tensor rotated(const char* entry, const Tensor& x, const Tensor& cos, const Tensor& sin,
               const OptionalTensor& positions, int64_t n_head, int64_t n_kv_head, bool backwards) {
  Inputs inputs(x, cos, sin, positions, n_head, n_kv_head);
  const Call call(x);
  const HeadsView heads(x);
  const Tensor y = empty(x, x.sizes(), x.scalar_type());
  inputs.give(call);
  Rotary p{inputs.plan, heads.in(call, backwards ? "d_y" : "qkv"), call.out(y, backwards ? "d_qkv" : "y")};
  p.backwards = backwards;
  launch_rotary(entry, p, call);
  return y;
}

Tensor rotary_forward(const Tensor& qkv, const Tensor& cos, const Tensor& sin, OptionalTensor positions,
                      int64_t n_head, int64_t n_kv_head) {
  return rotated("rotary_forward", qkv, cos, sin, positions, n_head, n_kv_head, false);
}

Tensor rotary_backward(const Tensor& d_y, const Tensor& cos, const Tensor& sin, OptionalTensor positions,
                       int64_t n_head, int64_t n_kv_head) {
  return rotated("rotary_backward", d_y, cos, sin, positions, n_head, n_kv_head, true);
}

void rotary_forward_(const Tensor& qkv, const Tensor& cos, const Tensor& sin, OptionalTensor positions, int64_t n_head,
                     int64_t n_kv_head) {
  Inputs inputs(qkv, cos, sin, positions, n_head, n_kv_head);
  STD_TORCH_CHECK(qkv.is_contiguous(), "rotary_forward_: qkv must be contiguous");
  const Call call(qkv);
  inputs.give(call);
  void* const data = call.in_place(qkv, "qkv");
  Rotary p{inputs.plan, HeadsView(qkv).at(data), data};
  p.in_place = true;
  launch_rotary("rotary_forward_", p, call);
}

Tensor weight_of(const Tensor& qkv, const Tensor& weight, const char* name) {
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == qkv.size(3) && weight.is_cuda() == qkv.is_cuda(), name,
                  " must have shape (", qkv.size(3), ",) and be on the device of qkv");
  return torch::stable::contiguous(weight);
}

template <class P>
void give_weights(const Call& call, P& p, const Tensor& q_weight, const Tensor& k_weight, double eps) {
  p.q_weight = call.in(q_weight, "q_weight");
  p.k_weight = call.in(k_weight, "k_weight");
  p.q_weight_dtype = dtype_of(q_weight, "q_weight");
  p.k_weight_dtype = dtype_of(k_weight, "k_weight");
  p.eps = eps;
}

Tensor rotary_norm_forward(const Tensor& qkv, const Tensor& cos, const Tensor& sin, OptionalTensor positions,
                           const Tensor& q_weight_, const Tensor& k_weight_, int64_t n_head, int64_t n_kv_head,
                           double eps) {
  Inputs inputs(qkv, cos, sin, positions, n_head, n_kv_head);
  const Tensor q_weight = weight_of(qkv, q_weight_, "q_weight"), k_weight = weight_of(qkv, k_weight_, "k_weight");
  const Call call(qkv);
  const HeadsView heads(qkv);
  const Tensor y = empty(qkv, qkv.sizes(), qkv.scalar_type());
  inputs.give(call);
  RotaryNormForward p;
  p.plan = inputs.plan;
  p.x = heads.in(call, "qkv");
  p.y = call.out(y, "y");
  give_weights(call, p, q_weight, k_weight, eps);
  RotaryAlignment found(p.plan);
  found.heads(p.x);
  if (!rotary_norm_fits_vectors(p.plan)) found.note("a head is too wide for the norm's registers");
  launch_rotary_norm_forward(p, remember("rotary_norm_forward", found), call.stream());
  return y;
}

// (d_qkv, d_q_weight, d_k_weight); what is not wanted is empty.
std::tuple<Tensor, Tensor, Tensor> rotary_norm_backward(const Tensor& d_y, const Tensor& qkv, const Tensor& cos,
                                                        const Tensor& sin, OptionalTensor positions,
                                                        const Tensor& q_weight_, const Tensor& k_weight_,
                                                        int64_t n_head, int64_t n_kv_head, double eps, bool need_qkv,
                                                        bool need_weights) {
  Inputs inputs(qkv, cos, sin, positions, n_head, n_kv_head);
  bool same = d_y.dim() == 4 && d_y.scalar_type() == qkv.scalar_type() && d_y.is_cuda() == qkv.is_cuda();
  for (int64_t d = 0; same && d < 4; ++d) same = d_y.size(d) == qkv.size(d);
  STD_TORCH_CHECK(same, "d_y must have the shape, dtype and device of qkv");
  const Tensor q_weight = weight_of(qkv, q_weight_, "q_weight"), k_weight = weight_of(qkv, k_weight_, "k_weight");
  const Call call(qkv);
  const HeadsView x(qkv), d(d_y);
  const auto gradient = [&](bool needed, const Tensor& of) {
    return needed ? empty(of, of.sizes(), of.scalar_type()) : empty(of, {0}, of.scalar_type());
  };
  const Tensor d_qkv = gradient(need_qkv, qkv), d_q_weight = gradient(need_weights, q_weight),
               d_k_weight = gradient(need_weights, k_weight);
  inputs.give(call);
  RotaryNormBackward p;
  p.plan = inputs.plan;
  p.x = x.in(call, "qkv");
  p.d_y = d.in(call, "d_y");
  give_weights(call, p, q_weight, k_weight, eps);
  RotaryAlignment found(p.plan);
  found.heads(p.x);
  found.heads(p.d_y);
  if (!rotary_norm_fits_vectors(p.plan)) found.note("a head is too wide for the norm's registers");
  const RotaryPath path = remember("rotary_norm_backward", found);
  rotary_split_tokens(p);
  if (need_qkv) p.d_x = call.out(d_qkv, "d_qkv");
  std::optional<Tensor> partials, rstd;
  if (need_weights) {
    p.d_q_weight = call.out(d_q_weight, "d_q_weight");
    p.d_k_weight = call.out(d_k_weight, "d_k_weight");
    partials = empty(qkv, {p.sums, 2, p.plan.width}, accumulator_of(qkv));
    p.partials = call.out(*partials, "partials");
  }
  if (path == RotaryPath::generic) {
    rstd = empty(qkv, {p.plan.batches, p.plan.tokens, p.plan.q_heads + p.plan.k_heads}, accumulator_of(qkv));
    p.rstd = call.out(*rstd, "rstd");
  }
  launch_rotary_norm_backward(p, path, call.stream());
  return {d_qkv, d_q_weight, d_k_weight};
}

}  // namespace
}  // namespace fastgpt

FASTGPT_LIBRARY_IMPL(library) {
  library.impl("rotary_forward", TORCH_BOX(&fastgpt::rotary_forward));
  library.impl("rotary_forward_", TORCH_BOX(&fastgpt::rotary_forward_));
  library.impl("rotary_backward", TORCH_BOX(&fastgpt::rotary_backward));
  library.impl("rotary_norm_forward", TORCH_BOX(&fastgpt::rotary_norm_forward));
  library.impl("rotary_norm_backward", TORCH_BOX(&fastgpt::rotary_norm_backward));
}
