// grad_norm, as torch calls it: memory is allocated and grad_norm.cu launched. The Python page checks the contract; what
// is checked again here could make a kernel leave its memory.

#include "grad_norm/grad_norm.h"

#include <string>
#include <vector>

#include "host/path.h"
#include "host/tensor.h"

namespace fastgpt {
namespace {

Tensor grad_norm(const std::vector<Tensor>& grads) {
  const Call call(grads[0]);
  GradNorm p;
  std::vector<GradNormTensor> tensors;
  std::vector<Tensor> copies;  // of gradients with gaps; they live until the launches are queued
  const char* reason = nullptr;
  int64_t chunks = 0;
  for (const Tensor& grad : grads) {
    const std::string name = "grads[" + std::to_string(tensors.size()) + "]";
    STD_TORCH_CHECK(grad.is_cuda() == grads[0].is_cuda() && grad.get_device_index() == grads[0].get_device_index(), name,
                    " must be on the device of grads[0]");
    copies.push_back(torch::stable::contiguous(grad));
    GradNormTensor t;
    t.dtype = dtype_of(grad, "grads");
    t.count = grad.numel();
    t.data = call.in(copies.back(), name.c_str());
    if (t.count && !Alignment::aligned(t.data)) reason = "a tensor does not begin at a multiple of 16 bytes";
    p.wide = p.wide || t.dtype == DType::float64;
    chunks += grad_norm_chunks(t.count);
    tensors.push_back(t);
  }
  const Tensor partials = empty(grads[0], {chunks}, ScalarType::Double);
  const ScalarType sum = p.wide ? ScalarType::Double : ScalarType::Float;
  const Tensor out = empty(grads[0], std::initializer_list<int64_t>{}, sum);
  p.tensors = tensors.data();
  p.count = tensors.size();
  p.partials = static_cast<double*>(call.out(partials, "partials"));
  p.out = call.out(out, "out");
  remember_path("grad_norm", reason ? "generic" : "vector", reason ? reason : "16-byte accesses");
  launch_grad_norm(p, call.stream());
  return out;
}

}  // namespace
}  // namespace fastgpt

FASTGPT_LIBRARY_IMPL(library) {
  library.impl("grad_norm", TORCH_BOX(&fastgpt::grad_norm));
}
