// The CPU kernels of gradients: of the weights, dense or touched units only, and of the per-sample weights.
#include <tuple>

#include "cpu_gradient.h"

namespace embeddings::inline cpu {
namespace {

// Writes sums to a slice of the slab's gradient.
template <typename weight_t>
struct ToSlab : Sink<typename Accumulator<weight_t>::type> {
  using real = typename Accumulator<weight_t>::type;
  weight_t* slice;
  int64_t width;

  ToSlab(weight_t* slab, const Slice& of) : slice(slab + of.begin), width(of.width) {}
  void prefetch(const int64_t* slots, int64_t count) override {
    for (int64_t i = 0; i < count; ++i) __builtin_prefetch(slice + slots[i] * width, 1);
  }
  void put(const int64_t* slots, int64_t count, const real* sums) override {
    for (int64_t i = 0; i < count; ++i, sums += width) {
      weight_t* to = slice + slots[i] * width;
      for (int64_t z = 0; z < width; ++z) to[z] = static_cast<weight_t>(sums[z]);
    }
  }
};

// Writes sums one after another, and the units that they are of.
template <typename weight_t>
struct ToRows : Sink<typename Accumulator<weight_t>::type> {
  using real = typename Accumulator<weight_t>::type;
  int64_t* units;
  weight_t* values;
  int64_t first_unit, width, per_slot;

  ToRows(int64_t* units, weight_t* values, const Slice& of, int64_t unit)
      : units(units), values(values), first_unit(of.begin / unit), width(of.width), per_slot(of.width / unit) {}
  void put(const int64_t* slots, int64_t count, const real* sums) override {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t u = 0; u < per_slot; ++u) *units++ = first_unit + slots[i] * per_slot + u;
    }
    for (int64_t z = 0; z < count * width; ++z) *values++ = static_cast<weight_t>(sums[z]);
  }
};

// --- the operators: arguments as in embeddings/ops.py ----------------------------------------------------------------

Tensor bag_backward(const Tensor& grad, const Tensor& weights, const Tensor& ids, std::optional<Tensor> offsets,
                    std::optional<Tensor> sample_weights, const Tensor& tables, int64_t probes, int64_t chunks,
                    int64_t index_map, int64_t combine, int64_t pooling,
                    bool /*atomic: on the CPU the sorted sum serves both*/, Names features) {
  const Call call = make_backward_call(grad, weights, ids, offsets, sample_weights, tables,
                                       {probes, chunks, index_map, combine, pooling}, features);
  const std::vector<Slice> slices = check_tables(call, Columns::kSome);
  const Tensor dense = summable(grad, weights);
  Tensor out = torch::stable::new_zeros(weights, {call.num_units, call.unit});
  with_dtype(call.weights.scalar_type(), [&](auto weight) {
    using weight_t = decltype(weight);
    auto* to = out.mutable_data_ptr<weight_t>();
    using real = typename Accumulator<weight_t>::type;
    backward<weight_t>(call, slices, dense.const_data_ptr<real>(), [&](Touches& touches, const auto& sum) {
      for_each_part(touches, call.unit, [&](int64_t, const Touches::Part& part) {
        touches.sort(part);
        ToSlab<weight_t> sink(to, slices[part.slice]);
        sum(part, sink);
      });
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> bag_backward_rows(const Tensor& grad, const Tensor& weights, const Tensor& ids,
                                             std::optional<Tensor> offsets, std::optional<Tensor> sample_weights,
                                             const Tensor& tables, int64_t probes, int64_t chunks, int64_t index_map,
                                             int64_t combine, int64_t pooling, Names features) {
  const Call call = make_backward_call(grad, weights, ids, offsets, sample_weights, tables,
                                       {probes, chunks, index_map, combine, pooling}, features);
  const std::vector<Slice> slices = check_tables(call, Columns::kSome);
  const Tensor dense = summable(grad, weights);
  std::optional<Tensor> units, values;
  with_dtype(call.weights.scalar_type(), [&](auto weight) {
    using weight_t = decltype(weight);
    using real = typename Accumulator<weight_t>::type;
    backward<weight_t>(call, slices, dense.const_data_ptr<real>(), [&](Touches& touches, const auto& sum) {
      const std::vector<int64_t> starts = sort_and_count(touches, slices, call.unit);
      units = torch::stable::new_empty(weights, {starts.back() / call.unit}, ScalarType::Long);
      values = torch::stable::new_empty(weights, {starts.back() / call.unit, call.unit});
      auto* to_units = units->mutable_data_ptr<int64_t>();
      auto* to = values->mutable_data_ptr<weight_t>();
      for_each_part(touches, call.unit, [&](int64_t p, const Touches::Part& part) {
        ToRows<weight_t> sink(to_units + starts[p] / call.unit, to + starts[p], slices[part.slice], call.unit);
        sum(part, sink);
      });
    });
  });
  return {*units, *values};
}

// Features with one position would write the gradients of the same sample weights.
void check_positions(const Call& call) {
  std::vector<std::pair<int64_t, int64_t>> places;  // position, feature
  for (int64_t f = 0; f < call.at.num_features; ++f) places.emplace_back(call.at.table(f, 0).position, f);
  std::sort(places.begin(), places.end());
  for (size_t i = 1; i < places.size(); ++i) {
    if (places[i - 1].first != places[i].first) continue;
    fail("features ", call.feature(places[i - 1].second), " and ", call.feature(places[i].second),
         " have one position in the batch, ", places[i].first, ": per_sample_weights have no gradient there");
  }
}

Tensor bag_backward_sample_weights(const Tensor& grad, const Tensor& weights, const Tensor& ids,
                                   std::optional<Tensor> offsets, const Tensor& tables, int64_t probes, int64_t chunks,
                                   int64_t index_map, int64_t combine, int64_t pooling, Names features) {
  const Call call = make_backward_call(grad, weights, ids, offsets, std::nullopt, tables,
                                       {probes, chunks, index_map, combine, pooling}, features);
  const Tensor dense = summable(grad, weights);
  Tensor out = torch::stable::new_zeros(dense, {call.at.num_ids});
  check_tables(call, Columns::kSome);
  check_positions(call);
  with_dtype_and_map(call, [&](auto weight, auto map) {
    using weight_t = decltype(weight);
    using Map = decltype(map);
    using real = typename Accumulator<weight_t>::type;
    const auto* grads = dense.const_data_ptr<real>();
    auto* to = out.mutable_data_ptr<real>();
    FirstError error;
    parallel_for(0, call.at.num_features * call.at.batch_size, 512, [&](int64_t first, int64_t last) {
      OrderedNumber<real> sum;
      for (int64_t bag = first; bag < last; ++bag) {
        const int64_t f = bag / call.at.batch_size, b = bag % call.at.batch_size;
        if (!valid_bag(call, f, b, error)) continue;
        Reader<weight_t, Map> reader(call, map, f);
        const real* g = grads + b * call.columns + call.at.table(f, 0).column;
        const real divisor = call.at.divisor<real>(f, b, call.pooling);
        for (int64_t n = call.at.begin(f, b); n < call.at.end(f, b); ++n) {
          if (!reader.look_up(call.at.id(n))) {
            error.bad_id(call, f, b, n);
            continue;
          }
          sum.clear();
          reader.read([&](int64_t d, int64_t size, auto fill) {
            for (int64_t z = 0; z < size; ++z) {
              real v[1];
              fill(z, v);
              sum.add(v[0] * g[d + z] / divisor);
            }
          });
          to[n] = sum.finish();
        }
      }
    });
    error.raise(call);
    check_cover(call);
  });
  return in_dtype(out, grad.scalar_type());
}

}  // namespace
}  // namespace embeddings::inline cpu

STABLE_TORCH_LIBRARY_IMPL(embeddings, CPU, m) {
  m.impl("bag_backward", TORCH_BOX(&embeddings::bag_backward));
  m.impl("bag_backward_rows", TORCH_BOX(&embeddings::bag_backward_rows));
  m.impl("bag_backward_sample_weights", TORCH_BOX(&embeddings::bag_backward_sample_weights));
}
