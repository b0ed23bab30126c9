// What bag.cpp and bag.cu share: the arguments of one call, checked once. Shapes: B samples, F features of this slab,
// K probes of an id, N ids of the whole batch, S * Z numbers of the slab in units of Z (every width is a multiple of
// Z).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "index_map.h"

namespace embeddings {

// The schema's `str features`. Not std::string: torch's conversion to that (2.10 to 2.13) leaks one with every call,
// and each stays between two large blocks of the heap, whose room is then never used again.
struct Names {
  std::string text;
  operator const std::string&() const { return text; }
};

}  // namespace embeddings

template <>
struct torch::stable::detail::ToImpl<embeddings::Names> {
  static embeddings::Names call(StableIValue value, [[maybe_unused]] uint64_t version, [[maybe_unused]] bool internal) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    embeddings::Names names{std::string(data, length)};
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return names;
  }
};

namespace embeddings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr char kSeparator = '\x1f';  // ASCII's unit separator: no name holds it

enum Pooling : int64_t { kSum = 0, kMean = 1, kMax = 2 };

// How the vectors of an id's K probes become one: their sum, left to right; their product, left to right; side by side,
// each in its own columns; or the sum of the first K - 1, each times its number of the last probe's vector.
enum Combine : int64_t { kAdd = 0, kMultiply = 1, kConcat = 2, kWeighted = 3, kNumCombines = 4 };
constexpr int64_t kMaxProbes = 32;

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
  const Table* tables;     // [F * K]
  int64_t num_ids;         // N
  int64_t num_bags;        // of all the batch's features
  int64_t batch_size;      // B
  int64_t num_features;    // F
  int64_t probes;          // K

  HOST_DEVICE const Table& table(int64_t f, int64_t k) const { return tables[f * probes + k]; }
  HOST_DEVICE int64_t id(int64_t n) const { return ids32 ? static_cast<int64_t>(ids32[n]) : ids64[n]; }
  HOST_DEVICE int64_t begin(int64_t f, int64_t b) const {
    const int64_t bag = table(f, 0).position * batch_size + b;
    return offsets ? offsets[bag] : bag;
  }
  HOST_DEVICE int64_t end(int64_t f, int64_t b) const {
    const int64_t bag = table(f, 0).position * batch_size + b;
    return offsets ? offsets[bag + 1] : bag + 1;
  }
  // What the sum over a bag is divided by: its number of ids under mean pooling (of an empty bag: 1), else 1.
  template <typename real>
  HOST_DEVICE real divisor(int64_t f, int64_t b, int64_t pooling) const {
    const int64_t count = pooling == kMean ? end(f, b) - begin(f, b) : 1;
    return count > 1 ? static_cast<real>(count) : real(1);
  }
};

// One call: tensors made contiguous (and kept alive), sizes, and the pointers above.
struct Call {
  Tensor weights, ids, tables;
  const void* slab;  // the weights' numbers: asking the tensor for them costs more than reading some
  std::optional<Tensor> offsets, sample_weights;  // sample_weights: in the dtype of sums
  int64_t num_units, unit;                        // S, Z
  int64_t columns;                                // of a row of the output: the numbers of all features
  int64_t chunks;                                 // the most that any table has
  int64_t index_map, combine, pooling;
  Ids at;
  std::string features;  // names, for errors, with kSeparator between them

  template <typename weight_t>
  const weight_t* weights_at() const {
    return static_cast<const weight_t*>(slab);
  }
  template <typename real>
  const real* sample_weights_at() const {
    return sample_weights ? sample_weights->const_data_ptr<real>() : nullptr;
  }
  // Numbers of feature f's vector: columns of the output that it fills.
  int64_t length(int64_t f) const {
    if (combine != kConcat) return at.table(f, 0).dim;
    const Table& last = at.table(f, at.probes - 1);
    return last.column + last.dim - at.table(f, 0).column;
  }
  std::string feature(int64_t f) const {
    std::istringstream names(features);
    std::string name;
    for (int64_t i = 0; i <= f && std::getline(names, name, kSeparator); ++i) {
    }
    return name;
  }
  // The sample whose bag of feature f holds position n of the ids, in valid offsets.
  int64_t bag_of(int64_t f, int64_t n) const {
    const int64_t first = at.table(f, 0).position * at.batch_size;
    if (!offsets) return n - first;
    const int64_t* of_feature = at.offsets + first;
    return std::upper_bound(of_feature, of_feature + at.batch_size + 1, n) - of_feature - 1;
  }
  [[noreturn]] void fail_id(int64_t f, int64_t n, int64_t id, int64_t limit) const {
    fail("id out of range: feature ", feature(f), ", position ", n, " of the batch's ids, id ", id, ", limit ", limit,
         " (valid ids are 0..", limit - 1, ")");
  }
  [[noreturn]] void fail_offsets(int64_t f, int64_t b, int64_t begin, int64_t end) const {
    fail("offsets must not descend or leave the ids: feature ", feature(f), ", sample ", b, ", bag [", begin, ", ", end,
         ") of ", at.num_ids, " ids");
  }
};

// True if a slot's gradient needs the weights of others, so that none may change before all are summed.
inline bool reads_others(const Call& call) {
  return call.at.probes > 1 && (call.combine == kMultiply || call.combine == kWeighted);
}

inline void require(bool condition, const char* what) {
  if (!condition) fail(what);
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "[") << tensor.size(i);
  text << (tensor.dim() ? "]" : "[]");
  return text.str();
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// The dtype of sums over weights of a dtype, and so of what is written to and read from the batch's vectors.
inline ScalarType sums_of(ScalarType weights) {
  return weights == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool is_summable(const Tensor& tensor, const Tensor& weights) {
  return tensor.scalar_type() == weights.scalar_type() || tensor.scalar_type() == sums_of(weights.scalar_type());
}

inline Tensor in_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// Contiguous, in the dtype of sums: exact.
inline Tensor summable(const Tensor& tensor, const Tensor& weights) {
  return torch::stable::contiguous(in_dtype(tensor, sums_of(weights.scalar_type())));
}

// How a call's tables are to be read: integers of the operators' schema, in its order.
struct Layout {
  int64_t probes, chunks, index_map, combine, pooling;
};

// Checks everything that can be told without looking at ids and tables; embeddings/reference.py checks the same in the
// same order.
inline Call make_call(const Tensor& weights, const Tensor& ids, const std::optional<Tensor>& offsets,
                      const std::optional<Tensor>& sample_weights, const Tensor& tables, int64_t batch_size,
                      int64_t columns, const Layout& layout, const std::string& features) {
  require(weights.dim() == 1 || (weights.dim() == 2 && weights.size(1) > 0),
          "weights must be [units, numbers of a unit]");
  require(layout.probes >= 1 && layout.probes <= kMaxProbes, "probes must be 1 to 32");
  require(tables.dim() == 2 && tables.size(1) == kTableColumns && tables.scalar_type() == ScalarType::Long &&
              tables.size(0) % layout.probes == 0,
          "tables must be int64 [features * probes, 9]");
  require(columns >= 0 && layout.chunks >= 1, "columns must be at least 0 and chunks at least 1");
  require(ids.dim() == 1, "ids must be 1-D");
  require(ids.scalar_type() == ScalarType::Long || ids.scalar_type() == ScalarType::Int, "ids must be int32 or int64");
  require(same_device(ids, weights) && same_device(tables, weights) && (!offsets || same_device(*offsets, weights)) &&
              (!sample_weights || same_device(*sample_weights, weights)),
          "ids, offsets, per_sample_weights and tables must be on the weights' device");
  require(layout.index_map >= 0 && layout.index_map < kNumMaps, "unknown index_map");
  require(layout.combine >= 0 && layout.combine < kNumCombines,
          "combine must be 0 (add), 1 (multiply), 2 (concat) or 3 (weighted)");
  require(layout.combine != kWeighted || layout.probes >= 2, "combine=weighted needs at least 2 probes");
  require(layout.pooling >= 0 && layout.pooling <= kMax, "pooling must be 0 (sum), 1 (mean) or 2 (max)");
  if (offsets) {
    require(offsets->dim() == 1 && offsets->scalar_type() == ScalarType::Long && offsets->numel() > 0,
            "offsets must be 1-D int64, one more than there are bags");
  }
  const int64_t num_bags = offsets ? offsets->numel() - 1 : ids.numel();
  require(batch_size >= 0 && (batch_size == 0 ? num_bags == 0 : num_bags % batch_size == 0),
          "the number of bags must be a multiple of batch_size");
  if (sample_weights) {
    require(layout.pooling != kMax, "per_sample_weights: pooling must be sum or mean, not max");
    require(
        sample_weights->dim() == 1 && sample_weights->numel() == ids.numel() && is_summable(*sample_weights, weights),
        "per_sample_weights must be [N], of the weights' dtype or that of their sums");
  }
  Call call;
  call.weights = torch::stable::contiguous(weights);
  call.slab = call.weights.const_data_ptr();
  call.ids = torch::stable::contiguous(ids);
  call.tables = torch::stable::contiguous(tables);
  if (offsets) call.offsets = torch::stable::contiguous(*offsets);
  if (sample_weights) call.sample_weights = summable(*sample_weights, weights);
  call.num_units = weights.size(0);
  call.unit = weights.dim() == 1 ? 1 : weights.size(1);
  call.columns = columns;
  call.chunks = layout.chunks;
  call.index_map = layout.index_map;
  call.combine = layout.combine;
  call.pooling = layout.pooling;
  call.features = features;
  const bool narrow = ids.scalar_type() == ScalarType::Int;
  call.at = Ids{narrow ? call.ids.const_data_ptr<int32_t>() : nullptr,
                narrow ? nullptr : call.ids.const_data_ptr<int64_t>(),
                offsets ? call.offsets->const_data_ptr<int64_t>() : nullptr,
                reinterpret_cast<const Table*>(call.tables.const_data_ptr<int64_t>()),
                ids.numel(),
                num_bags,
                batch_size,
                tables.size(0) / layout.probes,
                layout.probes};
  return call;
}

// The call of a gradient: its sizes come from grad [B, columns].
inline Call make_backward_call(const Tensor& grad, const Tensor& weights, const Tensor& ids,
                               const std::optional<Tensor>& offsets, const std::optional<Tensor>& sample_weights,
                               const Tensor& tables, const Layout& layout, const std::string& features) {
  require(grad.dim() == 2 && is_summable(grad, weights) && same_device(grad, weights),
          "grad must be [B, columns], of the weights' dtype or that of their sums and on their device");
  require(weights.dim() == 2, "weights must be [units, numbers of a unit]");
  return make_call(weights, ids, offsets, sample_weights, tables, grad.size(0), grad.size(1), layout, features);
}

// What bag_into writes to.
inline void check_out(const Tensor& out, const Tensor& weights) {
  require(out.dim() == 2 && out.is_contiguous() && out.scalar_type() == sums_of(weights.scalar_type()) &&
              same_device(out, weights),
          "out must be contiguous [B, columns], of the dtype of the weights' sums and on their device");
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

// Calls function(weight_t{}, map).
template <typename Function>
inline void with_dtype_and_map(const Call& call, Function function) {
  with_dtype(call.weights.scalar_type(),
             [&](auto weight) { with_map(call.index_map, [&](auto map) { function(weight, map); }); });
}

}  // namespace embeddings
