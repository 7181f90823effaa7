// layer_norm and rms_norm, as torch calls them: memory is allocated, a kernel path chosen, and norm.cu launched.
// The Python pages check the contract; what is checked again here could make a kernel leave its memory.

#include "norm/norm.h"

#include <tuple>

#include "host/path.h"
#include "host/tensor.h"

namespace fastgpt {
namespace {

struct Choice {
  NormPath path;
  const char* reason;
};

// What a call's rows and channels are like; norm.cu serves any of it, but not on the vector path.
class NormAlignment : public Alignment {
 public:
  NormAlignment(DType dtype, int64_t columns) : Alignment(dtype, columns), dtype_(dtype) {
    if (dtype == DType::float64) note("float64");
    if (columns > norm_widest_vector_row(dtype)) note("a row is too wide for registers");
  }
  void channels(const ConstChannels& channels) {
    if (!channels.data) return;
    if (!aligned(channels.data)) note("weight or bias does not begin at a multiple of 16 bytes");
    if (bytes_of(channels.dtype) < bytes_of(dtype_)) note("weight or bias has fewer bits than the rows");
  }
  Choice choice() const {
    return reason() ? Choice{NormPath::generic, reason()} : Choice{NormPath::vector, "16-byte accesses"};
  }

 private:
  DType dtype_;
};

NormPath remember(const char* entry, Choice choice) {
  remember_path(entry, choice.path == NormPath::vector ? "vector" : "generic", choice.reason);
  return choice.path;
}

Choice choose_path(const NormForward& p) {
  NormAlignment found(p.dtype, p.columns);
  found.rows(p.x);
  found.rows(p.residual);
  found.channels(p.weight);
  found.channels(p.bias);
  return found.choice();
}

Choice choose_path(const NormBackward& p) {
  NormAlignment found(p.dtype, p.columns);
  found.rows(p.d_y);
  found.rows(p.d_residual);
  found.rows(p.r);
  found.channels(p.weight);
  return found.choice();
}

void check_same(const Tensor& x, const Tensor& other, const char* name) {
  bool same = other.dim() == x.dim() && other.scalar_type() == x.scalar_type() &&
              other.get_device_index() == x.get_device_index() && other.is_cuda() == x.is_cuda();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = other.size(d) == x.size(d);
  STD_TORCH_CHECK(same, name, " must have the shape, dtype and device of the other rows");
}

// Contiguous, and one for each column of x.
OptionalTensor channels_of(const Tensor& x, const OptionalTensor& channels, const char* name) {
  if (!channels) return channels;
  const int64_t columns = x.size(x.dim() - 1);
  STD_TORCH_CHECK(channels->dim() == 1 && channels->size(0) == columns, name, " must have shape (", columns, ",)");
  STD_TORCH_CHECK(channels->is_cuda() == x.is_cuda(), name, " must be on the device of x");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double || channels->scalar_type() != ScalarType::Double, name,
                  " must not be float64 unless x is");
  return torch::stable::contiguous(*channels);
}

ConstChannels channels_in(const Call& call, const OptionalTensor& channels, const char* name) {
  if (!channels) return {};
  return {call.in(*channels, name), dtype_of(*channels, name)};
}

struct ForwardResult {
  Tensor y, new_residual, mean, rstd;  // without a residual, or without mean: empty
};

ForwardResult forward(const char* entry, bool subtract_mean, const Tensor& x, const OptionalTensor& residual,
                      const OptionalTensor& weight_, const OptionalTensor& bias_, double eps) {
  STD_TORCH_CHECK(x.dim() >= 1, entry, ": x must have at least one dimension");
  if (residual) check_same(x, *residual, "residual");
  const Call call(x);
  const OptionalTensor weight = channels_of(x, weight_, "weight"), bias = channels_of(x, bias_, "bias");
  const RowsView x_rows = rows_of(x);
  std::optional<RowsView> residual_rows;
  if (residual) residual_rows = rows_of(*residual);

  const auto shape = x.sizes(), shape_of_rows = shape.slice(0, x.dim() - 1);
  ForwardResult made{
      empty(x, shape, x.scalar_type()),
      residual ? empty(x, shape, x.scalar_type()) : empty(x, {0}, x.scalar_type()),
      subtract_mean ? empty(x, shape_of_rows, accumulator_of(x)) : empty(x, {0}, accumulator_of(x)),
      empty(x, shape_of_rows, accumulator_of(x)),
  };

  NormForward p;
  p.rows = x_rows.count;
  p.columns = x_rows.columns;
  p.dtype = dtype_of(x, "x");
  p.subtract_mean = subtract_mean;
  p.eps = eps;
  p.x = {call.in(x_rows.tensor, "x"), x_rows.stride};
  if (residual) {
    p.residual = {call.in(residual_rows->tensor, "residual"), residual_rows->stride};
    p.new_residual = call.out(made.new_residual, "new_residual");
  }
  p.weight = channels_in(call, weight, "weight");
  p.bias = channels_in(call, bias, "bias");
  p.y = call.out(made.y, "y");
  if (subtract_mean) p.mean = call.out(made.mean, "mean");
  p.rstd = call.out(made.rstd, "rstd");
  launch_norm_forward(p, remember(entry, choose_path(p)), call.stream());
  return made;
}

struct BackwardResult {
  Tensor d_x, d_weight, d_bias;  // what is not wanted is empty
};

BackwardResult backward(const char* entry, const Tensor& d_y, const OptionalTensor& d_residual, const Tensor& r,
                        const OptionalTensor& weight_, const OptionalTensor& bias, const OptionalTensor& mean,
                        const Tensor& rstd, bool need_x, bool need_weight, bool need_bias) {
  STD_TORCH_CHECK(r.dim() >= 1, entry, ": r must have at least one dimension");
  check_same(r, d_y, "d_y");
  if (d_residual) check_same(r, *d_residual, "d_residual");
  const Call call(r);
  const OptionalTensor weight = channels_of(r, weight_, "weight");
  const RowsView r_rows = rows_of(r), d_y_rows = rows_of(d_y);
  std::optional<RowsView> d_residual_rows;
  if (d_residual) d_residual_rows = rows_of(*d_residual);
  STD_TORCH_CHECK(rstd.is_contiguous() && rstd.numel() == r_rows.count && rstd.scalar_type() == accumulator_of(r),
                  entry, ": rstd must be what the forward returned");
  STD_TORCH_CHECK(!mean || (mean->is_contiguous() && mean->numel() == r_rows.count &&
                            mean->scalar_type() == accumulator_of(r)),
                  entry, ": mean must be what the forward returned");

  need_weight = need_weight && weight;
  need_bias = need_bias && bias;
  const int64_t columns = r_rows.columns;
  BackwardResult made{
      need_x ? empty(r, r.sizes(), r.scalar_type()) : empty(r, {0}, r.scalar_type()),
      need_weight ? empty(r, {columns}, weight->scalar_type()) : empty(r, {0}, r.scalar_type()),
      need_bias ? empty(r, {columns}, bias->scalar_type()) : empty(r, {0}, r.scalar_type()),
  };

  NormBackward p;
  p.rows = r_rows.count;
  p.columns = columns;
  p.dtype = dtype_of(r, "r");
  p.subtract_mean = mean.has_value();
  p.d_y = {call.in(d_y_rows.tensor, "d_y"), d_y_rows.stride};
  if (d_residual) p.d_residual = {call.in(d_residual_rows->tensor, "d_residual"), d_residual_rows->stride};
  p.r = {call.in(r_rows.tensor, "r"), r_rows.stride};
  p.weight = channels_in(call, weight, "weight");
  if (mean) p.mean = call.in(*mean, "mean");
  p.rstd = call.in(rstd, "rstd");
  if (need_x) p.d_x = call.out(made.d_x, "d_x");
  if (need_weight) p.d_weight = {call.out(made.d_weight, "d_weight"), dtype_of(made.d_weight, "weight")};
  if (need_bias) p.d_bias = {call.out(made.d_bias, "d_bias"), dtype_of(made.d_bias, "bias")};
  const NormPath path = remember(entry, choose_path(p));
  norm_split_rows(p, path);
  std::optional<Tensor> partials;
  if (need_weight || need_bias) {
    partials = empty(r, {2, p.sums, columns}, accumulator_of(r));
    p.partials = call.out(*partials, "partials");
  }
  launch_norm_backward(p, path, call.stream());
  return made;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x, OptionalTensor residual, Tensor weight,
                                                              OptionalTensor bias, double eps) {
  ForwardResult made = forward("layer_norm_forward", true, x, residual, weight, bias, eps);
  return {made.y, made.new_residual, made.mean, made.rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& d_y, OptionalTensor d_residual, const Tensor& r,
                                                       const Tensor& weight, OptionalTensor bias, const Tensor& mean,
                                                       const Tensor& rstd, bool need_x, bool need_weight,
                                                       bool need_bias) {
  BackwardResult made = backward("layer_norm_backward", d_y, d_residual, r, weight, bias, mean, rstd, need_x,
                                 need_weight, need_bias);
  return {made.d_x, made.d_weight, made.d_bias};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_forward(const Tensor& x, OptionalTensor residual, OptionalTensor weight,
                                                    double eps) {
  ForwardResult made = forward("rms_norm_forward", false, x, residual, weight, std::nullopt, eps);
  return {made.y, made.new_residual, made.rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& d_y, OptionalTensor d_residual, const Tensor& r,
                                             OptionalTensor weight, const Tensor& rstd, bool need_x,
                                             bool need_weight) {
  BackwardResult made = backward("rms_norm_backward", d_y, d_residual, r, weight, std::nullopt, std::nullopt, rstd,
                                 need_x, need_weight, false);
  return {made.d_x, made.d_weight};
}

}  // namespace
}  // namespace fastgpt

FASTGPT_LIBRARY_IMPL(library) {
  library.impl("layer_norm_forward", TORCH_BOX(&fastgpt::layer_norm_forward));
  library.impl("layer_norm_backward", TORCH_BOX(&fastgpt::layer_norm_backward));
  library.impl("rms_norm_forward", TORCH_BOX(&fastgpt::rms_norm_forward));
  library.impl("rms_norm_backward", TORCH_BOX(&fastgpt::rms_norm_backward));
}
