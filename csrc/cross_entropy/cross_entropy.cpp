// cross_entropy, as torch calls it: memory is allocated, a kernel path chosen, and cross_entropy.cu launched. The Python
// page checks the contract; what is checked again here could make a kernel leave its memory.

#include "cross_entropy/cross_entropy.h"

#include <limits>
#include <tuple>
#include <vector>

#include "host/path.h"
#include "host/tensor.h"

namespace fastgpt {
namespace {

CrossEntropyPath choose_path(const char* entry, const CrossEntropy& p, bool two_passes) {
  Alignment found(p.dtype, p.columns);
  found.rows(p.logits);
  found.rows({p.d_logits, p.d_stride});
  const char* reason = found.reason();
  if (!reason) {
    const int vectors = (p.vocab_size * int64_t(bytes_of(p.dtype)) + 15) / 16;
    const int in_shared = cross_entropy_kept_vectors(p), in_registers = cross_entropy_vectors_in_registers(p);
    reason = !two_passes            ? "16-byte accesses"
             : in_shared == vectors ? "16-byte accesses; rows are kept in shared memory"
             : in_shared + in_registers == vectors
                 ? "16-byte accesses; rows are kept in shared memory and registers"
                 : "16-byte accesses; a part of each row is kept, the rest read twice";
  }
  remember_path(entry, found.reason() ? "generic" : "vector", reason);
  return found.reason() ? CrossEntropyPath::generic : CrossEntropyPath::vector;
}

struct Options {
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap;
  std::optional<int64_t> vocab_size;
};

// The arguments that all entries share, checked; with what had to be made contiguous.
struct Inputs {
  RowsView logits;
  Tensor targets;

  Inputs(const char* entry, const Tensor& logits_, const Tensor& targets_)
      : logits(rows_of(logits_)), targets(torch::stable::contiguous(targets_)) {
    STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long || targets.scalar_type() == ScalarType::Int, entry,
                    ": targets must be int64 or int32");
    check_row_values(entry, targets, 1, "targets");
  }

  void check_row_values(const char* entry, const Tensor& values, int64_t of_row, const char* name) const {
    STD_TORCH_CHECK(values.numel() == of_row * logits.count &&
                        values.get_device_index() == logits.tensor.get_device_index() &&
                        values.is_cuda() == logits.tensor.is_cuda(),
                    entry, ": ", name, " must be on the device of logits, ", of_row, " for each row");
  }

  // Contiguous, in what the kernels compute in.
  Tensor row_values(const char* entry, const Tensor& values, int64_t of_row, const char* name) const {
    check_row_values(entry, values, of_row, name);
    STD_TORCH_CHECK(values.scalar_type() == accumulator_of(logits.tensor), entry, ": ", name,
                    " must be float32, or float64 for float64 logits");
    return torch::stable::contiguous(values);
  }

  CrossEntropy parameters(const char* entry, const Call& call, const Options& options) const {
    const int64_t vocab_size = options.vocab_size.value_or(logits.columns);
    STD_TORCH_CHECK(1 <= vocab_size && vocab_size <= logits.columns, entry, ": vocab_size must be in 1 .. ",
                    logits.columns, ", got ", vocab_size);
    constexpr int64_t kWidest = std::numeric_limits<int>::max() / 2;
    STD_TORCH_CHECK(logits.columns <= kWidest, entry, ": rows must have no more than ", kWidest, " columns");
    CrossEntropy p;
    p.rows = logits.count;
    p.columns = int(logits.columns);
    p.vocab_size = int(vocab_size);
    p.dtype = dtype_of(logits.tensor, "logits");
    p.targets = call.in(targets, "targets");
    p.targets_are_int64 = targets.scalar_type() == ScalarType::Long;
    p.ignore_index = options.ignore_index;
    p.label_smoothing = options.label_smoothing;
    p.z_loss = options.z_loss;
    p.softcap = options.softcap;
    return p;
  }
};

std::vector<int64_t> shape_of_rows(const Tensor& logits) {
  return {logits.sizes().begin(), logits.sizes().end() - 1};
}

std::tuple<Tensor, Tensor> cross_entropy_forward(const Tensor& logits, const Tensor& targets, int64_t ignore_index,
                                                 double label_smoothing, double z_loss, double softcap,
                                                 std::optional<int64_t> vocab_size) {
  const char* entry = "cross_entropy_forward";
  STD_TORCH_CHECK(logits.dim() >= 1, entry, ": logits must have at least one dimension");
  const Call call(logits);
  const Inputs inputs(entry, logits, targets);
  CrossEntropy p = inputs.parameters(entry, call, {ignore_index, label_smoothing, z_loss, softcap, vocab_size});
  std::vector<int64_t> shape = shape_of_rows(logits);
  const Tensor losses = torch::stable::new_empty(logits, shape, accumulator_of(logits));
  shape.push_back(2);
  const Tensor peak_and_rest = torch::stable::new_empty(logits, shape, accumulator_of(logits));
  p.logits = {call.in(inputs.logits.tensor, "logits"), inputs.logits.stride};
  p.losses = call.out(losses, "losses");
  p.peak_and_rest = call.out(peak_and_rest, "peak_and_rest");
  launch_cross_entropy(p, choose_path(entry, p, false), call.stream());
  return {losses, peak_and_rest};
}

Tensor cross_entropy_backward(const Tensor& d_losses_, const Tensor& logits, const Tensor& targets,
                              const Tensor& peak_and_rest_, int64_t ignore_index, double label_smoothing, double z_loss,
                              double softcap, std::optional<int64_t> vocab_size) {
  const char* entry = "cross_entropy_backward";
  STD_TORCH_CHECK(logits.dim() >= 1, entry, ": logits must have at least one dimension");
  const Call call(logits);
  const Inputs inputs(entry, logits, targets);
  CrossEntropy p = inputs.parameters(entry, call, {ignore_index, label_smoothing, z_loss, softcap, vocab_size});
  const Tensor d_losses = inputs.row_values(entry, d_losses_, 1, "d_losses");
  const Tensor peak_and_rest = inputs.row_values(entry, peak_and_rest_, 2, "peak_and_rest");
  const Tensor d_logits = empty(logits, logits.sizes(), logits.scalar_type());
  p.logits = {call.in(inputs.logits.tensor, "logits"), inputs.logits.stride};
  p.d_losses = call.in(d_losses, "d_losses");
  p.known = call.in(peak_and_rest, "peak_and_rest");
  p.d_logits = call.out(d_logits, "d_logits");
  p.d_stride = inputs.logits.columns;
  launch_cross_entropy_backward(p, choose_path(entry, p, false), call.stream());
  return d_logits;
}

Tensor cross_entropy_gradient_(Tensor logits, const Tensor& targets, const Tensor& d_losses_, int64_t ignore_index,
                               double label_smoothing, double z_loss, double softcap,
                               std::optional<int64_t> vocab_size) {
  const char* entry = "cross_entropy_gradient_";
  STD_TORCH_CHECK(logits.dim() >= 1, entry, ": logits must have at least one dimension");
  STD_TORCH_CHECK(logits.is_contiguous(), entry, ": logits must be contiguous: they are overwritten");
  const Call call(logits);
  const Inputs inputs(entry, logits, targets);
  CrossEntropy p = inputs.parameters(entry, call, {ignore_index, label_smoothing, z_loss, softcap, vocab_size});
  const Tensor d_losses = inputs.row_values(entry, d_losses_, 1, "d_losses");
  const Tensor losses = torch::stable::new_empty(logits, shape_of_rows(logits), accumulator_of(logits));
  p.d_logits = call.in_place(logits, "logits");
  p.d_stride = inputs.logits.columns;
  p.logits = {p.d_logits, p.d_stride};
  p.d_losses = call.in(d_losses, "d_losses");
  p.losses = call.out(losses, "losses");
  launch_cross_entropy(p, choose_path(entry, p, true), call.stream());
  return losses;
}

}  // namespace
}  // namespace fastgpt

FASTGPT_LIBRARY_IMPL(library) {
  library.impl("cross_entropy_forward", TORCH_BOX(&fastgpt::cross_entropy_forward));
  library.impl("cross_entropy_backward", TORCH_BOX(&fastgpt::cross_entropy_backward));
  library.impl("cross_entropy_gradient_", TORCH_BOX(&fastgpt::cross_entropy_gradient_));
}
