// gelu, as torch calls it: memory is allocated, a kernel path chosen, and gelu.cu launched. The Python page checks the
// contract; what is checked again here could make a kernel leave its memory.

#include "gelu/gelu.h"

#include "host/path.h"
#include "host/tensor.h"

namespace fastgpt {
namespace {

GeluPath choose_path(const char* entry, const Gelu& p) {
  Alignment found(p.dtype, p.columns);
  found.rows(p.x);
  found.rows(p.d_y);
  remember_path(entry, found.reason() ? "generic" : "vector", found.reason() ? found.reason() : "16-byte accesses");
  return found.reason() ? GeluPath::generic : GeluPath::vector;
}

Tensor gelu_forward(const Tensor& x, bool tanh) {
  STD_TORCH_CHECK(x.dim() >= 1, "gelu_forward: x must have at least one dimension");
  const Call call(x);
  const RowsView rows = rows_of(x);
  const Tensor y = empty(x, x.sizes(), x.scalar_type());

  Gelu p{rows.count, rows.columns, dtype_of(x, "x"), tanh};
  p.x = {call.in(rows.tensor, "x"), rows.stride};
  p.out = call.out(y, "y");
  join_rows(p.rows, p.columns, p.x);
  launch_gelu_forward(p, choose_path("gelu_forward", p), call.stream());
  return y;
}

Tensor gelu_backward(const Tensor& d_y, const Tensor& x, bool tanh) {
  STD_TORCH_CHECK(x.dim() >= 1, "gelu_backward: x must have at least one dimension");
  bool same = d_y.dim() == x.dim() && d_y.scalar_type() == x.scalar_type() &&
              d_y.get_device_index() == x.get_device_index() && d_y.is_cuda() == x.is_cuda();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = d_y.size(d) == x.size(d);
  STD_TORCH_CHECK(same, "d_y must have the shape, dtype and device of x");
  const Call call(x);
  const RowsView rows = rows_of(x), d_y_rows = rows_of(d_y);
  const Tensor d_x = empty(x, x.sizes(), x.scalar_type());

  Gelu p{rows.count, rows.columns, dtype_of(x, "x"), tanh};
  p.x = {call.in(rows.tensor, "x"), rows.stride};
  p.d_y = {call.in(d_y_rows.tensor, "d_y"), d_y_rows.stride};
  p.out = call.out(d_x, "d_x");
  join_rows(p.rows, p.columns, p.x, p.d_y);
  launch_gelu_backward(p, choose_path("gelu_backward", p), call.stream());
  return d_x;
}

}  // namespace
}  // namespace fastgpt

FASTGPT_LIBRARY_IMPL(library) {
  library.impl("gelu_forward", TORCH_BOX(&fastgpt::gelu_forward));
  library.impl("gelu_backward", TORCH_BOX(&fastgpt::gelu_backward));
}
