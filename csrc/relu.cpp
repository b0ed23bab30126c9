// The gradient of ReLU on the CPU in the three forms that a layer needs: as it is, for its input's gradient;
// transposed, for the weights' (the product would copy a transposed view number by number); and summed, for the bias's.
#include <tuple>

#include "cpu_call.h"
#include "cpu_packs.h"

namespace embeddings::inline cpu {
namespace {

constexpr int64_t kSide = kLanes<float>;  // of a square of numbers that registers hold
constexpr int64_t kBlock = 32;            // rows of a task: of a transposed row whole lines of the cache

struct Gradient {
  const float *grad, *out;     // [rows, columns]
  float *masked, *transposed;  // [rows, columns], [columns, rows]
  int64_t rows, columns;

  // Rows first..last of columns c..end, number by number; adds them to sums.
  void some(int64_t first, int64_t last, int64_t c, int64_t end, float* sums) const {
    for (int64_t b = first; b < last; ++b) {
      for (int64_t j = c; j < end; ++j) {
        const int64_t at = b * columns + j;
        masked[at] = transposed[j * rows + b] = out[at] <= 0 ? 0 : grad[at];  // of a NaN the gradient goes through
        sums[j] += masked[at];
      }
    }
  }

  // The same of kSide rows and kSide columns.
  void square(int64_t first, int64_t c, float* sums) const {
    Pack<float> packs[kSide], sum;
    load(sums + c, sum);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kSide; ++i) {
      Pack<float> values;
      load(out + (first + i) * columns + c, values);
      load(grad + (first + i) * columns + c, packs[i]);
      packs[i] = values <= 0 ? Pack<float>{} : packs[i];
      store<float>(masked + (first + i) * columns + c, packs[i]);
      sum += packs[i];
    }
    store<float>(sums + c, sum);
    transpose<float>(packs);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kSide; ++i) store<float>(transposed + (c + i) * rows + first, packs[i]);
  }

  void block(int64_t begin, int64_t end, float* sums) const {
    for (int64_t first = begin; first < end; first += kSide) {
      const int64_t last = std::min(first + kSide, end), whole = last - first == kSide ? columns / kSide * kSide : 0;
      for (int64_t c = 0; c < whole; c += kSide) square(first, c, sums);
      some(first, last, whole, columns, sums);
    }
  }
};

// Arguments as in embeddings/relu.py.
std::tuple<Tensor, Tensor, Tensor> relu_backward(const Tensor& grad, const Tensor& out) {
  const ScalarType types[2] = {grad.scalar_type(), out.scalar_type()};
  if (grad.dim() != 2 || out.dim() != 2 || grad.size(0) != out.size(0) || grad.size(1) != out.size(1) ||
      types[0] != ScalarType::Float || types[1] != ScalarType::Float) {
    fail("relu_backward: grad and out must be of one shape [B, O], both float32, not ", shape_of(grad), " ", types[0],
         " and ", shape_of(out), " ", types[1]);
  }
  const Tensor grads = torch::stable::contiguous(grad), outs = torch::stable::contiguous(out);
  const int64_t rows = grad.size(0), columns = grad.size(1);
  const int64_t blocks = columns ? (rows + kBlock - 1) / kBlock : 0;  // of no columns there may be any number of rows
  Tensor masked = torch::stable::new_empty(grads, {rows, columns});
  Tensor transposed = torch::stable::new_empty(grads, {columns, rows});
  Tensor sums = torch::stable::new_empty(grads, {columns});
  std::vector<float> parts(blocks * columns);
  const Gradient gradient{grads.const_data_ptr<float>(),
                          outs.const_data_ptr<float>(),
                          masked.mutable_data_ptr<float>(),
                          transposed.mutable_data_ptr<float>(),
                          rows,
                          columns};
  for_each_task(blocks, rows * columns, [&](int64_t i) {
    gradient.block(i * kBlock, std::min((i + 1) * kBlock, rows), parts.data() + i * columns);
  });
  float* to = sums.mutable_data_ptr<float>();
  std::fill_n(to, columns, 0.0f);
  for (int64_t i = 0; i < blocks; ++i) {
    const float* part = parts.data() + i * columns;
    for (int64_t j = 0; j < columns; ++j) to[j] += part[j];
  }
  return {masked, transposed, sums};
}

}  // namespace
}  // namespace embeddings::inline cpu

STABLE_TORCH_LIBRARY_IMPL(embeddings, CPU, m) {
  m.impl("relu_backward", TORCH_BOX(&embeddings::relu_backward));
}
