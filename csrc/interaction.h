// What interaction.cpp and interaction.cu share: the tensors of one call, checked once. Shapes: B samples, F features,
// V = F + 1 vectors of D numbers, P = V (V - 1) / 2 pairs of them.
#pragma once

#include <type_traits>

#include "bag.h"

namespace embeddings {

// Where the pairs (i, 0), (i, 1), ... begin among the pairs.
HOST_DEVICE int64_t pairs_before(int64_t i) {
  return i * (i - 1) / 2;
}

constexpr int64_t kMaxMultiple = 1024;  // far more than an alignment is

struct Interaction {
  Tensor dense, embedded;  // contiguous
  int64_t batch_size, num_vectors, dim;
  int64_t multiple;  // of columns

  int64_t num_features() const { return num_vectors - 1; }
  int64_t num_pairs() const { return pairs_before(num_vectors); }
  int64_t num_numbers() const { return dim + num_pairs(); }
  // Of a row, zeros included.
  int64_t columns() const { return (num_numbers() + multiple - 1) / multiple * multiple; }
};

// embeddings/interaction.py checks the same in the same words.
inline Interaction make_interaction(const Tensor& dense, const Tensor& embedded, int64_t multiple) {
  if (dense.dim() != 2 || embedded.dim() != 3 || dense.size(0) != embedded.size(0) ||
      dense.size(1) != embedded.size(2)) {
    fail("dot_interaction: dense must be [B, D] and embedded [B, F, D], not ", shape_of(dense), " and ",
         shape_of(embedded));
  }
  const double num_vectors = static_cast<double>(embedded.size(1)) + 1;
  if (num_vectors * num_vectors * static_cast<double>(std::max<int64_t>(dense.size(1), 1)) > 4e18) {
    fail("dot_interaction: ", embedded.size(1), " features of ", dense.size(1), " numbers are too many");
  }
  if (multiple < 1 || multiple > kMaxMultiple) {
    fail("dot_interaction: multiple must be from 1 to ", kMaxMultiple, ", not ", multiple);
  }
  require(same_device(dense, embedded), "dot_interaction: dense and embedded must be on one device");
  return {torch::stable::contiguous(dense),
          torch::stable::contiguous(embedded),
          dense.size(0),
          embedded.size(1) + 1,
          dense.size(1),
          multiple};
}

inline Tensor checked_grad(const Tensor& grad, const Interaction& call) {
  if (grad.dim() != 2 || grad.size(0) != call.batch_size || grad.size(1) != call.columns() ||
      grad.scalar_type() != call.dense.scalar_type() || !same_device(grad, call.dense)) {
    fail("dot_interaction: grad must be [", call.batch_size, ", ", call.columns(),
         "], of dense's dtype and device, not ", shape_of(grad));
  }
  return torch::stable::contiguous(grad);
}

// Calls function(dense_t{}, embedded_t{}, real{}): two equal types, or float32 and a 16-bit one; real is that of sums.
template <typename Function>
inline void with_dtypes(const Interaction& call, Function function) {
  const ScalarType dense = call.dense.scalar_type(), embedded = call.embedded.scalar_type();
  const auto of_dense = [&](auto embedded_number) {
    using embedded_t = decltype(embedded_number);
    using real = typename Accumulator<embedded_t>::type;
    if (dense == embedded) return function(embedded_t{}, embedded_t{}, real{});
    if constexpr (std::is_same_v<embedded_t, float>) {
      if (dense == ScalarType::Half) return function(c10::Half{}, float{}, float{});
      if (dense == ScalarType::BFloat16) return function(c10::BFloat16{}, float{}, float{});
    } else if constexpr (!std::is_same_v<embedded_t, double>) {
      if (dense == ScalarType::Float) return function(float{}, embedded_t{}, float{});
    }
    fail("dot_interaction: dense and embedded must be of one dtype, or one float32 and the other float16 or bfloat16");
  };
  switch (embedded) {
    case ScalarType::Float: return of_dense(float{});
    case ScalarType::Double: return of_dense(double{});
    case ScalarType::Half: return of_dense(c10::Half{});
    case ScalarType::BFloat16: return of_dense(c10::BFloat16{});
    default: fail("dot_interaction: dense and embedded must be float32, float64, float16 or bfloat16");
  }
}

}  // namespace embeddings
