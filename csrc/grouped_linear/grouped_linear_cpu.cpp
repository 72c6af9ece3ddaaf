// grouped_linear on the CPU: pieces of experts over torch's threads, each a matrix product of torch's on one thread.
// torch's own grouped_mm runs the experts one after another with all threads in each, and waits for them at each end.
#include "grouped_linear/grouped_linear.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "common/library.h"

namespace mmoe {
namespace {

// Rows of an expert, or outputs of its weight's gradient, in one piece: whatever the number of threads, so that a piece
// and with it every sum is the same.
constexpr int64_t kPiece = 512;

struct Piece {
  int64_t expert, begin, end;
};

struct Span {
  int64_t begin, end;
};

std::vector<Span> spans(const Tensor& ends_any, const GroupedShape& shape) {
  const Tensor ends = torch::stable::contiguous(ends_any);
  const int32_t* end = ends.const_data_ptr<int32_t>();
  std::vector<Span> found;
  for (int64_t e = 0, begin = 0; e < shape.experts; begin = end[e++]) {
    check(end[e] >= begin && end[e] <= shape.rows, "grouped_linear: ends must not fall nor pass R = ", shape.rows);
    found.push_back({begin, end[e]});
  }
  return found;
}

void cut(std::vector<Piece>& pieces, int64_t expert, Span span) {
  for (int64_t begin = span.begin; begin < span.end; begin += kPiece) {
    pieces.push_back({expert, begin, std::min(begin + kPiece, span.end)});
  }
}

// Each thread takes the next piece when it is done with one. All threads run, though there may be fewer pieces: outside
// of a parallel region the product itself would use them.
template <typename Work>
void for_each_piece(const std::vector<Piece>& pieces, const Work& work) {
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < pieces.size();) work(pieces[i]);
  });
}

int64_t bytes_of(ScalarType dtype) { return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2; }

// [rows, columns] in the memory of a contiguous tensor, from its element `offset` on, rows `stride` elements apart.
struct Matrix {
  const Tensor& of;
  int64_t offset, rows, columns, stride;
  bool written = false;

  Tensor view(bool transposed = false) const {
    const auto dtype = of.scalar_type();
    char* data = static_cast<char*>(written ? of.mutable_data_ptr() : const_cast<void*>(of.const_data_ptr()));
    data += offset * bytes_of(dtype);
    const int64_t sizes[] = {transposed ? columns : rows, transposed ? rows : columns};
    const int64_t strides[] = {transposed ? 1 : stride, transposed ? stride : 1};
    return torch::stable::from_blob(data, {sizes, 2}, {strides, 2}, of.device(), dtype);
  }
};

// out = a b, or out += a b. These entries go to the CPU's kernel directly: the threads have none of the dispatcher's
// state, autograd's among it.
void product(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  TORCH_ERROR_CODE_CHECK(add ? aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0)
                             : aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// [R, to]: rows [R, from] times each expert's weight [outputs, inputs], or with `transposed` times its transpose.
Tensor multiply(const Tensor& rows, const Tensor& weight, const Tensor& ends, const GroupedShape& shape,
                bool transposed) {
  const int64_t from = transposed ? shape.inputs : shape.outputs, to = transposed ? shape.outputs : shape.inputs;
  const std::vector<Span> owned = spans(ends, shape);
  std::vector<Piece> pieces;
  for (int64_t e = 0; e < shape.experts; ++e) cut(pieces, e, owned[e]);
  Tensor out = torch::stable::new_empty(rows, {shape.rows, to});
  for_each_piece(pieces, [&](const Piece& piece) {
    const int64_t count = piece.end - piece.begin, first = piece.expert * shape.outputs * shape.inputs;
    product(Matrix{out, piece.begin * to, count, to, to, true}.view(),
            Matrix{rows, piece.begin * from, count, from, from}.view(),
            Matrix{weight, first, shape.outputs, shape.inputs, shape.inputs}.view(transposed), false);
  });
  const int64_t used = owned.empty() ? 0 : owned.back().end;
  Tensor rest = torch::stable::narrow(out, 0, used, shape.rows - used);
  torch::stable::zero_(rest);
  return out;
}

Tensor grouped_linear_cpu(Tensor rows, Tensor weight, Tensor ends, bool /* into_main_grad */) {
  const GroupedShape shape = check_grouped_linear(rows, weight, ends);
  return multiply(torch::stable::contiguous(rows), torch::stable::contiguous(weight), ends, shape, true);
}

Tensor grad_rows_cpu(Tensor grad_out, Tensor rows, Tensor weight, Tensor ends) {
  const GroupedShape shape = check_grouped_linear(rows, weight, ends);
  check_tensor("grouped_linear", grad_out, rows.scalar_type(), {shape.rows, shape.outputs}, "grad_out");
  return multiply(torch::stable::contiguous(grad_out), torch::stable::contiguous(weight), ends, shape, false);
}

void write_grad_weight(const Tensor& into, const Tensor& grad_out_any, const Tensor& rows_any, const Tensor& ends,
                       bool add) {
  const GroupedShape shape = check_grouped_linear(rows_any, into, ends, add ? "into" : "weight");
  check_tensor("grouped_linear", grad_out_any, rows_any.scalar_type(), {shape.rows, shape.outputs}, "grad_out");
  const Tensor grad_out = torch::stable::contiguous(grad_out_any), rows = torch::stable::contiguous(rows_any);
  const std::vector<Span> owned = spans(ends, shape);
  std::vector<Piece> pieces;
  for (int64_t e = 0; e < shape.experts; ++e) {
    // Without rows there is nothing to add, but there are zeros to write.
    if (!add || owned[e].end > owned[e].begin) cut(pieces, e, {0, shape.outputs});
  }
  for_each_piece(pieces, [&](const Piece& piece) {
    const int64_t first = owned[piece.expert].begin, count = owned[piece.expert].end - first;
    const int64_t outputs = piece.end - piece.begin, weight_row = piece.expert * shape.outputs + piece.begin;
    product(Matrix{into, weight_row * shape.inputs, outputs, shape.inputs, shape.inputs, true}.view(),
            Matrix{grad_out, first * shape.outputs + piece.begin, count, outputs, shape.outputs}.view(true),
            Matrix{rows, first * shape.inputs, count, shape.inputs, shape.inputs}.view(), add);
  });
}

Tensor grad_weight_cpu(Tensor grad_out, Tensor rows, Tensor weight, Tensor ends) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < weight.dim(); ++i) sizes.push_back(weight.size(i));
  Tensor grad_weight = torch::stable::new_empty(weight, sizes);
  write_grad_weight(grad_weight, grad_out, rows, ends, false);
  return grad_weight;
}

void add_grad_weight_cpu(Tensor into, Tensor grad_out, Tensor rows, Tensor ends) {
  check(into.is_contiguous(), "grouped_linear: into must be contiguous");
  write_grad_weight(into, grad_out, rows, ends, true);
}

}  // namespace

MMOE_CPU(m) {
  m.impl("grouped_linear", TORCH_BOX(&grouped_linear_cpu));
  m.impl("grouped_linear_grad_rows", TORCH_BOX(&grad_rows_cpu));
  m.impl("grouped_linear_grad_weight", TORCH_BOX(&grad_weight_cpu));
  m.impl("grouped_linear_add_grad_weight", TORCH_BOX(&add_grad_weight_cpu));
}

}  // namespace mmoe
