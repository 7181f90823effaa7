// swiglu, as torch calls it: memory is allocated, a kernel path chosen, and swiglu.cu launched. The Python page checks
// the contract; what is checked again here could make a kernel leave its memory.

#include "swiglu/swiglu.h"

#include <tuple>
#include <vector>

#include "host/path.h"
#include "host/tensor.h"

namespace fastgpt {
namespace {

SwigluPath choose_path(const char* entry, const Alignment& found) {
  remember_path(entry, found.reason() ? "generic" : "vector", found.reason() ? found.reason() : "16-byte accesses");
  return found.reason() ? SwigluPath::generic : SwigluPath::vector;
}

void check_same(const Tensor& gate, const Tensor& other, const char* name, int64_t columns) {
  bool same = other.dim() == gate.dim() && other.scalar_type() == gate.scalar_type() &&
              other.get_device_index() == gate.get_device_index() && other.is_cuda() == gate.is_cuda() &&
              other.size(other.dim() - 1) == columns;
  for (int64_t d = 0; same && d < gate.dim() - 1; ++d) same = other.size(d) == gate.size(d);
  STD_TORCH_CHECK(same, name, " must have the rows, dtype and device of gate, and ", columns, " columns");
}

// gate and up, from one tensor or from two, as rows of F elements.
struct Inputs {
  RowsView gate;  // packed: of 2F elements
  std::optional<RowsView> up;
  int64_t F;

  Inputs(const Tensor& gate_, const OptionalTensor& up_) : gate(rows_of(gate_)), F(gate.columns) {
    if (up_) {
      check_same(gate_, *up_, "up", F);
      up = rows_of(*up_);
    } else {
      STD_TORCH_CHECK(F % 2 == 0, "gate_up must have an even last dimension");
      F /= 2;
    }
  }
  // Sets gate, up and the size of p.
  template <class P>
  void give(const Call& call, P& p) const {
    p.rows = gate.count;
    p.columns = F;
    p.dtype = dtype_of(gate.tensor, up ? "gate" : "gate_up");
    p.gate = {call.in(gate.tensor, up ? "gate" : "gate_up"), gate.stride};
    if (up) p.up = {call.in(up->tensor, "up"), up->stride};
    else p.up = {static_cast<const char*>(p.gate.data) + F * bytes_of(p.dtype), gate.stride};
  }
};

Tensor swiglu_forward(const Tensor& gate, OptionalTensor up) {
  STD_TORCH_CHECK(gate.dim() >= 1, "swiglu_forward: gate must have at least one dimension");
  const Call call(gate);
  const Inputs inputs(gate, up);
  std::vector<int64_t> shape(gate.sizes().begin(), gate.sizes().end());
  shape.back() = inputs.F;
  const Tensor y = torch::stable::new_empty(gate, shape, gate.scalar_type());

  SwigluForward p;
  inputs.give(call, p);
  p.y = call.out(y, "y");
  join_rows(p.rows, p.columns, p.gate, p.up);
  Alignment found(p.dtype, p.columns);
  found.rows(p.gate);
  found.rows(p.up);
  launch_swiglu_forward(p, choose_path("swiglu_forward", found), call.stream());
  return y;
}

// (d_gate_up, nothing) for packed inputs; of two inputs, one that does not need its gradient gets nothing.
std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& d_y, const Tensor& gate, OptionalTensor up, bool need_gate,
                                           bool need_up) {
  STD_TORCH_CHECK(gate.dim() >= 1, "swiglu_backward: gate must have at least one dimension");
  const Call call(gate);
  const Inputs inputs(gate, up);
  check_same(gate, d_y, "d_y", inputs.F);
  const RowsView d_y_rows = rows_of(d_y);
  const auto gradient = [&](bool needed) {
    return needed ? empty(gate, gate.sizes(), gate.scalar_type()) : empty(gate, {0}, gate.scalar_type());
  };
  const Tensor d_gate = gradient(need_gate), d_up = gradient(up && need_up);

  SwigluBackward p;
  inputs.give(call, p);
  p.d_y = {call.in(d_y_rows.tensor, "d_y"), d_y_rows.stride};
  p.d_stride = inputs.gate.columns;
  if (need_gate) p.d_gate = call.out(d_gate, up ? "d_gate" : "d_gate_up");
  if (up && need_up) p.d_up = call.out(d_up, "d_up");
  if (!up && need_gate) p.d_up = static_cast<char*>(p.d_gate) + inputs.F * bytes_of(p.dtype);
  if (!p.d_gate && !p.d_up) return {d_gate, d_up};
  join_rows(p.rows, p.columns, p.d_y, p.gate, p.up);
  Alignment found(p.dtype, p.columns);
  found.rows(p.d_y);
  found.rows(p.gate);
  found.rows(p.up);
  launch_swiglu_backward(p, choose_path("swiglu_backward", found), call.stream());
  return {d_gate, d_up};
}

}  // namespace
}  // namespace fastgpt

FASTGPT_LIBRARY_IMPL(library) {
  library.impl("swiglu_forward", TORCH_BOX(&fastgpt::swiglu_forward));
  library.impl("swiglu_backward", TORCH_BOX(&fastgpt::swiglu_backward));
}
