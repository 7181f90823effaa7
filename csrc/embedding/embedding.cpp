// embedding, as torch calls it: memory is allocated, a kernel path chosen, and embedding.cu launched. The Python page
// checks the contract; what is checked again here could make a kernel leave its memory.

#include "embedding/embedding.h"

#include <vector>

#include "host/path.h"
#include "host/tensor.h"

namespace fastgpt {
namespace {

EmbeddingPath choose_path(const char* entry, DType dtype, int64_t columns, const ConstRows& rows) {
  Alignment found(dtype, columns);
  found.rows(rows);
  remember_path(entry, found.reason() ? "generic" : "vector", found.reason() ? found.reason() : "16-byte accesses");
  return found.reason() ? EmbeddingPath::generic : EmbeddingPath::vector;
}

bool is_long(const Tensor& ids) {
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long || ids.scalar_type() == ScalarType::Int,
                  "ids must be int64 or int32");
  return ids.scalar_type() == ScalarType::Long;
}

// Of the first `rows` rows of weight.
Tensor embedding_forward(const Tensor& ids_, const Tensor& weight, int64_t rows) {
  STD_TORCH_CHECK(weight.dim() == 2 && 0 <= rows && rows <= weight.size(0) && ids_.is_cuda() == weight.is_cuda(),
                  "weight must be (V, C) with V >= ", rows, ", on the device of ids");
  const Call call(weight);
  const Tensor ids = torch::stable::contiguous(ids_);
  const RowsView table = rows_of(weight);
  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(table.columns);
  const Tensor y = torch::stable::new_empty(weight, shape, weight.scalar_type());

  EmbeddingForward p;
  p.count = ids.numel();
  p.rows = rows;
  p.columns = table.columns;
  p.dtype = dtype_of(weight, "weight");
  p.weight = {call.in(table.tensor, "weight"), table.stride};
  p.long_ids = is_long(ids);
  p.ids = call.in(ids, "ids");
  p.y = call.out(y, "y");
  launch_embedding_forward(p, choose_path("embedding_forward", p.dtype, p.columns, p.weight), call.stream());
  return y;
}

// order, begins and sorted: what embedding.h says of them, of the ids (...) of d_y (..., C).
Tensor embedding_backward(const Tensor& d_y, const Tensor& sorted, const Tensor& order, const Tensor& begins,
                          bool wide) {
  STD_TORCH_CHECK(d_y.dim() >= 1 && begins.dim() == 1 && begins.size(0) >= 1, "d_y must be (..., C), begins (V + 1,)");
  const Call call(d_y);
  const RowsView places = rows_of(d_y);
  for (const Tensor* of : {&sorted, &order, &begins}) {
    STD_TORCH_CHECK(of->is_contiguous() && of->is_cuda() == d_y.is_cuda() && of->dim() == 1,
                    "sorted, order and begins must be contiguous and on the device of d_y");
  }
  STD_TORCH_CHECK(order.scalar_type() == ScalarType::Long && begins.scalar_type() == ScalarType::Long,
                  "order and begins must be int64");
  STD_TORCH_CHECK(order.numel() == places.count && sorted.numel() == places.count, "d_y must have a row for each id");
  const ScalarType sums = accumulator_of(d_y);
  const Tensor partials = empty(d_y, {embedding_runs(places.count), places.columns}, sums);
  const Tensor d_weight = empty(d_y, {begins.size(0) - 1, places.columns}, wide ? sums : d_y.scalar_type());

  EmbeddingBackward p;
  p.count = places.count;
  p.rows = begins.size(0) - 1;
  p.columns = places.columns;
  p.dtype = dtype_of(d_y, "d_y");
  p.wide = wide;
  p.d_y = {call.in(places.tensor, "d_y"), places.stride};
  p.long_ids = is_long(sorted);
  p.sorted = call.in(sorted, "sorted");
  p.order = static_cast<const int64_t*>(call.in(order, "order"));
  p.begins = static_cast<const int64_t*>(call.in(begins, "begins"));
  p.partials = call.out(partials, "partials");
  p.d_weight = call.out(d_weight, "d_weight");
  if (p.rows == 0) return d_weight;
  launch_embedding_backward(p, choose_path("embedding_backward", p.dtype, p.columns, p.d_y), call.stream());
  return d_weight;
}

}  // namespace
}  // namespace fastgpt

FASTGPT_LIBRARY_IMPL(library) {
  library.impl("embedding_forward", TORCH_BOX(&fastgpt::embedding_forward));
  library.impl("embedding_backward", TORCH_BOX(&fastgpt::embedding_backward));
}
