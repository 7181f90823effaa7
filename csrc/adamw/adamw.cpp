// adamw_, as torch calls it: tensors are parted by what can be read and written in vectors, and adamw.cu launched. The
// Python page checks the contract; what is checked again here could make a kernel leave its memory.

#include "adamw/adamw.h"

#include <cmath>
#include <string>
#include <vector>

#include "host/path.h"
#include "host/tensor.h"

namespace fastgpt {
namespace {

using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

AdamWNumber number(const Call& call, double value, const OptionalTensor& x, const Tensor& param, const char* name) {
  if (!x) return {value};
  STD_TORCH_CHECK(x->dim() == 0 && x->is_cuda() == param.is_cuda(), name, " must be 0-dim, on the parameters' device");
  AdamWNumber found{0, call.in(*x, name)};
  switch (x->scalar_type()) {
    case ScalarType::Double: found.type = AdamWNumber::Type::float64; break;
    case ScalarType::Float: found.type = AdamWNumber::Type::float32; break;
    case ScalarType::Long: found.type = AdamWNumber::Type::int64; break;
    case ScalarType::Bool: found.type = AdamWNumber::Type::boolean; break;
    default: STD_TORCH_CHECK(false, name, " must be float64, float32, int64 or bool");
  }
  return found;
}

// Tensors of a call, whole or in part, by the path that takes them.
class Parts {
 public:
  void add(const AdamWTensor& t) {
    const char* reason = why_not(t);
    const int64_t whole = reason ? 0 : t.count - t.count % adamw_vector(t.dtype);
    add_part(t, 0, whole, vector_);
    if (whole < t.count && !reason_) reason_ = reason ? reason : "the elements of a tensor fill no whole vectors";
    add_part(t, whole, t.count - whole, generic_);
  }

  void launch(const AdamWOptions& options, Stream stream) const {
    const char* both = vector_.empty() ? "generic" : "vector and generic";
    remember_path("adamw_", reason_ ? both : "vector", reason_ ? reason_ : "16-byte accesses");
    launch_adamw(options, vector_.data(), vector_.size(), AdamWPath::vector, stream);
    launch_adamw(options, generic_.data(), generic_.size(), AdamWPath::generic, stream);
  }

 private:
  static const char* why_not(const AdamWTensor& t) {
    const int size = adamw_vector(t.dtype), bytes = size * bytes_of(t.dtype);
    const auto aligned = [](const void* data, int bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; };
    const bool all = aligned(t.param, bytes) && aligned(t.grad, t.wide_grad ? 16 : bytes) && aligned(t.exp_avg, 16) &&
                     aligned(t.exp_avg_sq, 16) && aligned(t.master, 16);
    return all ? nullptr : "a tensor does not begin at a multiple of its vectors";
  }

  static void add_part(const AdamWTensor& t, int64_t begin, int64_t count, std::vector<AdamWTensor>& to) {
    if (count == 0) return;
    const int64_t bytes = bytes_of(t.dtype), wide = t.dtype == DType::float64 ? 8 : 4;
    AdamWTensor part = t;
    part.param = static_cast<char*>(t.param) + begin * bytes;
    part.grad = static_cast<const char*>(t.grad) + begin * (t.wide_grad ? wide : bytes);
    part.exp_avg = static_cast<char*>(t.exp_avg) + begin * wide;
    part.exp_avg_sq = static_cast<char*>(t.exp_avg_sq) + begin * wide;
    if (t.master) part.master = static_cast<char*>(t.master) + begin * wide;
    part.first_element += begin;
    part.count = count;
    to.push_back(part);
  }

  std::vector<AdamWTensor> vector_, generic_;
  const char* reason_ = nullptr;  // why not all is in vectors: the first one
};

// lr, step and clip: a tensor in the place of a number is read on the device. masters: none, or one for each.
void adamw_(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
            const Tensors& masters, double lr, const OptionalTensor& lr_tensor, double beta1, double beta2, double eps,
            double weight_decay, double step, const OptionalTensor& step_tensor, double clip,
            const OptionalTensor& clip_tensor, const OptionalTensor& skip, int64_t seed, const Integers& offsets,
            const Integers& tensor_ids) {
  const size_t n = params.size();
  STD_TORCH_CHECK(n > 0, "there must be parameters");
  for (size_t size : {grads.size(), exp_avgs.size(), exp_avg_sqs.size(), offsets.size(), tensor_ids.size()}) {
    STD_TORCH_CHECK(size == n, "every list must have one entry per parameter (", n, "), got ", size);
  }
  STD_TORCH_CHECK(masters.empty() || masters.size() == n, "masters must be none or one per parameter (", n, "), got ",
                  masters.size());
  const Call call(params[0]);
  AdamWOptions options;
  options.lr = number(call, lr, lr_tensor, params[0], "lr");
  options.step = number(call, step, step_tensor, params[0], "step");
  options.clip = number(call, clip, clip_tensor, params[0], "clip");
  options.skip = number(call, 0, skip, params[0], "skip");
  options.beta1 = beta1;
  options.beta2 = beta2;
  options.eps = eps;
  options.weight_decay = weight_decay;
  options.log_beta1 = std::log(beta1);
  options.log_beta2 = std::log(beta2);
  options.seed = uint64_t(seed);

  Parts parts;
  Tensors copies;  // of gradients with gaps; they live until the launches are queued
  for (size_t i = 0; i < n; ++i) {
    const auto name = [i](const char* list) { return std::string(list) + "[" + std::to_string(i) + "]"; };
    const Tensor& param = params[i];
    const ScalarType wide = accumulator_of(param);
    const auto check = [&](const Tensor& x, const char* list, bool right_dtype) {
      STD_TORCH_CHECK(right_dtype && x.numel() == param.numel() && x.get_device_index() == params[0].get_device_index() &&
                          x.is_cuda() == params[0].is_cuda(),
                      name(list), " must have the dtype, size and device that its parameter asks for");
    };
    const auto written = [&](const Tensor& x, const char* list, bool right_dtype) {
      check(x, list, right_dtype);
      STD_TORCH_CHECK(x.is_contiguous(), name(list), " must be contiguous");
      return call.in_place(x, name(list).c_str());
    };
    AdamWTensor t;
    t.dtype = dtype_of(param, "params");
    t.count = param.numel();
    t.param = written(param, "params", true);
    check(grads[i], "grads", grads[i].scalar_type() == param.scalar_type() || grads[i].scalar_type() == wide);
    t.wide_grad = grads[i].scalar_type() != param.scalar_type();
    copies.push_back(torch::stable::contiguous(grads[i]));
    t.grad = call.in(copies.back(), name("grads").c_str());
    t.exp_avg = written(exp_avgs[i], "exp_avgs", exp_avgs[i].scalar_type() == wide);
    t.exp_avg_sq = written(exp_avg_sqs[i], "exp_avg_sqs", exp_avg_sqs[i].scalar_type() == wide);
    if (!masters.empty()) {
      t.master = written(masters[i], "masters", masters[i].scalar_type() == wide && param.scalar_type() != wide);
    }
    STD_TORCH_CHECK(!masters.empty() || t.dtype != DType::float16, name("params"), " is float16 and needs a master");
    t.first_element = uint64_t(offsets[i]);
    t.id = uint32_t(tensor_ids[i]);
    parts.add(t);
  }
  parts.launch(options, call.stream());
}

}  // namespace
}  // namespace fastgpt

FASTGPT_LIBRARY_IMPL(library) {
  library.impl("adamw_", TORCH_BOX(&fastgpt::adamw_));
}
