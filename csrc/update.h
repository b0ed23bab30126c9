// One step of an embedding optimizer on one slot: embeddings/rules.py has the same in torch, operation by operation.
#pragma once

#include <cmath>
#include <cstring>

#include "bag.h"

namespace embeddings {

// The numbers that name a rule in the operators' schema: Rule in embeddings/rules.py.
enum Rule : int64_t { kSgd = 0, kAdagrad = 1, kRowWiseAdagrad = 2, kAdam = 3, kNumRules = 4 };

// A rule's hyperparameters at this step: `numbers` of the schema, float64 on the weights' device, so that a captured
// CUDA graph finds new ones there. embeddings/rules.py says them.
struct Step {
  double lr, weight_decay, eps, beta1, beta2, correction, draw;  // draw: an integer
};
constexpr int64_t kStepNumbers = sizeof(Step) / sizeof(double);

// Weights of 16 bits are rounded up or down at random, so that steps smaller than half of their spacing are not lost:
// up with the probability that keeps the mean. Number j of the slab draws 16 bits of number j / 4 of the SplitMix64
// stream `draw`, so a step repeats. Gupta et al., ICML 2015.
HOST_DEVICE uint32_t drawn(int64_t draw, int64_t j) {
  const uint64_t bits = splitmix64(static_cast<uint64_t>(draw), static_cast<uint64_t>(j) / 4);
  return static_cast<uint32_t>(bits >> (j % 4 * 16)) & 0xffff;
}

template <typename weight_t>
HOST_DEVICE weight_t rounded(typename Accumulator<weight_t>::type v, int64_t /*draw*/, int64_t /*j*/) {
  return v;
}
HOST_DEVICE float with_bits(uint32_t bits) {
  float v;
  memcpy(&v, &bits, sizeof(v));
  return v;
}
HOST_DEVICE uint32_t bits_of_float(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof(bits));
  return bits;
}
template <>
HOST_DEVICE c10::BFloat16 rounded<c10::BFloat16>(float v, int64_t draw, int64_t j) {
  const uint32_t bits = bits_of_float(v);
  const bool finite = (bits & 0x7f800000) != 0x7f800000;
  return static_cast<c10::BFloat16>(finite ? with_bits((bits + drawn(draw, j)) & 0xffff0000) : v);
}
template <>
HOST_DEVICE c10::Half rounded<c10::Half>(float v, int64_t draw, int64_t j) {
  const uint32_t bits = bits_of_float(v), r = drawn(draw, j);
  const float size = with_bits(bits & 0x7fffffff);
  if (size >= 6.103515625e-5f && size < 65504.0f) {  // normal: 13 bits are dropped
    return static_cast<c10::Half>(with_bits((bits + (r >> 3)) & 0xffffe000));
  }
  if (size < 6.103515625e-5f) {  // below: multiples of 2^-24
    const float scaled = size * 16777216.0f, whole = std::floor(scaled);
    const float nearest = scaled - whole > static_cast<float>(r) * (1.0f / 65536) ? whole + 1 : whole;
    return static_cast<c10::Half>(with_bits(bits_of_float(nearest * (1.0f / 16777216)) | (bits & 0x80000000)));
  }
  return static_cast<c10::Half>(v);
}

// What bag_update may write to.
inline void check_state(const Tensor& weights, const std::optional<Tensor>& first, const std::optional<Tensor>& second,
                        int64_t rule, const Tensor& numbers) {
  require(rule >= 0 && rule < kNumRules, "rule must be 0 (sgd), 1 (adagrad), 2 (row-wise adagrad) or 3 (adam)");
  require(numbers.numel() == kStepNumbers && numbers.scalar_type() == ScalarType::Double && numbers.is_contiguous() &&
              same_device(numbers, weights),
          "the step's numbers must be 7 contiguous float64 on the weights' device");
  require(weights.is_contiguous(), "weights must be contiguous to be updated");
  const int64_t units = weights.size(0), all = weights.numel();
  const int64_t sizes[2] = {rule == kSgd ? 0 : rule == kRowWiseAdagrad ? units : all, rule == kAdam ? all : 0};
  const ScalarType dtype = sums_of(weights.scalar_type());
  const std::optional<Tensor>* states[2] = {&first, &second};
  for (int i = 0; i < 2; ++i) {
    const std::optional<Tensor>& state = *states[i];
    const bool fits = state ? state->numel() == sizes[i] && state->scalar_type() == dtype && state->is_contiguous() &&
                                  same_device(*state, weights)
                            : sizes[i] == 0;
    require(fits,
            "the rule's state must be contiguous float32 (float64 of float64 weights), a number per weight or "
            "per unit, on the weights' device");
  }
}

}  // namespace embeddings
