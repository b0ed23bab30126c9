// What bag.cpp and bag.cu share: the arguments of one call, checked once. Shapes: B samples, F features of this slab,
// D dim, N ids of the whole batch, S slots, Z width of a slot (D = chunks * Z).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "index_map.h"

namespace embeddings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr char kSeparator = '\x1f';  // ASCII's unit separator: no name holds it

enum Pooling : int64_t { kSum = 0, kMean = 1, kMax = 2 };

template <typename... Words>
[[noreturn]] inline void fail(const Words&... words) {
  std::ostringstream text;
  ((text << words), ...);
  throw std::runtime_error(text.str());
}

// Sums are kept in float, or in double for double weights.
template <typename weight_t>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

// The ids of a batch, feature-major; offsets == nullptr means one id per bag. Plain pointers: it is passed to kernels
// by value.
struct Ids {
  const int32_t* ids32;
  const int64_t* ids64;
  const int64_t* offsets;  // [num_features_of_the_batch * B + 1]
  const Table* tables;     // [F]
  int64_t num_ids;         // N
  int64_t num_bags;        // of all the batch's features
  int64_t batch_size;      // B
  int64_t num_tables;      // F

  HOST_DEVICE int64_t id(int64_t n) const { return ids32 ? static_cast<int64_t>(ids32[n]) : ids64[n]; }
  HOST_DEVICE int64_t begin(int64_t table, int64_t b) const {
    const int64_t bag = tables[table].position * batch_size + b;
    return offsets ? offsets[bag] : bag;
  }
  HOST_DEVICE int64_t end(int64_t table, int64_t b) const {
    const int64_t bag = tables[table].position * batch_size + b;
    return offsets ? offsets[bag + 1] : bag + 1;
  }
  // What the sum over a bag is divided by: its number of ids under mean pooling (of an empty bag: 1), else 1.
  template <typename real>
  HOST_DEVICE real divisor(int64_t table, int64_t b, int64_t pooling) const {
    const int64_t count = pooling == kMean ? end(table, b) - begin(table, b) : 1;
    return count > 1 ? static_cast<real>(count) : real(1);
  }
};

// One call: tensors made contiguous (and kept alive), sizes, and the pointers above.
struct Call {
  Tensor weights, ids, tables;
  std::optional<Tensor> offsets, sample_weights;
  int64_t num_slots, width, dim, chunks, pooling;
  Ids at;
  std::string features;  // names, for errors, with kSeparator between them

  std::string feature(int64_t table) const {
    std::istringstream names(features);
    std::string name;
    for (int64_t i = 0; i <= table && std::getline(names, name, kSeparator); ++i) {
    }
    return name;
  }
  [[noreturn]] void fail_id(int64_t table, int64_t n, int64_t id, int64_t limit) const {
    fail("id out of range: feature ", feature(table), ", position ", n, " of the batch's ids, id ", id, ", limit ",
         limit, " (valid ids are 0..", limit - 1, ")");
  }
  [[noreturn]] void fail_offsets(int64_t table, int64_t b, int64_t begin, int64_t end) const {
    fail("offsets must not descend or leave the ids: feature ", feature(table), ", sample ", b, ", bag [", begin, ", ",
         end, ") of ", at.num_ids, " ids");
  }
};

inline void require(bool condition, const char* what) {
  if (!condition) fail(what);
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// Checks everything that can be told without looking at ids; embeddings/reference.py checks the same in the same order.
inline Call make_call(const Tensor& weights, const Tensor& ids, const std::optional<Tensor>& offsets,
                      const std::optional<Tensor>& sample_weights, const Tensor& tables, int64_t batch_size,
                      int64_t dim, int64_t pooling, const std::string& features) {
  require(weights.dim() == 2 && weights.size(1) > 0 && dim > 0 && dim % weights.size(1) == 0,
          "weights must be [num_slots, width] with dim a multiple of width");
  require(tables.dim() == 2 && tables.size(1) == kTableColumns && tables.scalar_type() == ScalarType::Long,
          "tables must be int64 [F, 5]");
  require(ids.dim() == 1, "ids must be 1-D");
  require(ids.scalar_type() == ScalarType::Long || ids.scalar_type() == ScalarType::Int, "ids must be int32 or int64");
  require(same_device(ids, weights) && same_device(tables, weights) && (!offsets || same_device(*offsets, weights)) &&
              (!sample_weights || same_device(*sample_weights, weights)),
          "ids, offsets, per_sample_weights and tables must be on the weights' device");
  require(pooling == kSum || pooling == kMean || pooling == kMax, "pooling must be 0 (sum), 1 (mean) or 2 (max)");
  if (offsets) {
    require(offsets->dim() == 1 && offsets->scalar_type() == ScalarType::Long && offsets->numel() > 0,
            "offsets must be 1-D int64, one more than there are bags");
  }
  const int64_t num_bags = offsets ? offsets->numel() - 1 : ids.numel();
  require(batch_size >= 0 && (batch_size == 0 ? num_bags == 0 : num_bags % batch_size == 0),
          "the number of bags must be a multiple of batch_size");
  if (sample_weights) {
    require(pooling != kMax, "per_sample_weights: pooling must be sum or mean, not max");
    require(sample_weights->dim() == 1 && sample_weights->numel() == ids.numel() &&
                sample_weights->scalar_type() == weights.scalar_type(),
            "per_sample_weights must be [N], of the weights' dtype");
  }
  Call call;
  call.weights = torch::stable::contiguous(weights);
  call.ids = torch::stable::contiguous(ids);
  call.tables = torch::stable::contiguous(tables);
  if (offsets) call.offsets = torch::stable::contiguous(*offsets);
  if (sample_weights) call.sample_weights = torch::stable::contiguous(*sample_weights);
  call.num_slots = weights.size(0);
  call.width = weights.size(1);
  call.dim = dim;
  call.chunks = dim / call.width;
  call.pooling = pooling;
  call.features = features;
  const bool narrow = ids.scalar_type() == ScalarType::Int;
  call.at = Ids{narrow ? call.ids.const_data_ptr<int32_t>() : nullptr,
                narrow ? nullptr : call.ids.const_data_ptr<int64_t>(),
                offsets ? call.offsets->const_data_ptr<int64_t>() : nullptr,
                reinterpret_cast<const Table*>(call.tables.const_data_ptr<int64_t>()),
                ids.numel(),
                num_bags,
                batch_size,
                tables.size(0)};
  return call;
}

// The call of a gradient: its sizes come from grad [B, F, D].
inline Call make_backward_call(const Tensor& grad, const Tensor& weights, const Tensor& ids,
                               const std::optional<Tensor>& offsets, const std::optional<Tensor>& sample_weights,
                               const Tensor& tables, int64_t pooling, const std::string& features) {
  require(grad.dim() == 3 && tables.dim() == 2 && grad.size(1) == tables.size(0) &&
              grad.scalar_type() == weights.scalar_type() && same_device(grad, weights),
          "grad must be [B, F, D], of the weights' dtype and on their device");
  return make_call(weights, ids, offsets, sample_weights, tables, grad.size(0), grad.size(2), pooling, features);
}

// Calls function(weight_t{}) for the dtype of the weights.
template <typename Function>
inline void with_dtype(ScalarType dtype, Function function) {
  switch (dtype) {
    case ScalarType::Float: function(float{}); return;
    case ScalarType::Double: function(double{}); return;
    case ScalarType::Half: function(c10::Half{}); return;
    case ScalarType::BFloat16: function(c10::BFloat16{}); return;
    default: fail("weights must be float32, float64, float16 or bfloat16");
  }
}

// Calls function(weight_t{}, Map{}).
template <typename Function>
inline void with_dtype_and_map(ScalarType dtype, int64_t index_map, Function function) {
  with_dtype(dtype, [&](auto weight) {
    require(with_map(index_map, [&](auto map) { function(weight, map); }), "unknown index_map");
  });
}

}  // namespace embeddings
