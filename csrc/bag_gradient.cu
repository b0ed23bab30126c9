// The CUDA kernels of gradients: bag_gradient.cpp's operators; those by sorted sums have the CPU's bits.
#include <tuple>

#include "cuda_touches.h"

namespace embeddings::inline cuda {
namespace {

// --- gradients by atomics --------------------------------------------------------------------------------------------

// to[i] += v[i], four at once where the device has that: else each would be a transaction of its own.
template <typename real, int kVector>
__device__ void add_each(real* to, const real (&v)[kVector]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (std::is_same_v<real, float> && kVector % 4 == 0) {
    if (Pack<float, 4>::fits(to)) {
      for (int i = 0; i < kVector; i += 4) {
        atomicAdd(reinterpret_cast<float4*>(to + i), make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]));
      }
      return;
    }
  }
#endif
  for (int i = 0; i < kVector; ++i) atomicAdd(to + i, v[i]);
}

// The same; threads of a warp that meet at one slot, as those of a hot id do, add up first and then write once.
template <typename real, int kVector>
__device__ void add_atomically(real* to, const real (&v)[kVector]) {
  namespace cg = cooperative_groups;
  const auto group = cg::labeled_partition(cg::coalesced_threads(), to);
  if (group.size() == 1) return add_each(to, v);
  real sum[kVector];
  for (int i = 0; i < kVector; ++i) sum[i] = cg::reduce(group, v[i], cg::plus<real>());
  if (group.thread_rank() == 0) add_each(to, sum);
}

// to [S, Z] += every contribution, in no fixed order.
template <typename Lookup>
__global__ void __launch_bounds__(kThreads)
    atomic_kernel(Lookup lookup, typename Lookup::real* __restrict__ to, int lanes) {
  const Group group = group_of(lanes);
  lookup.for_each_bag(group, lookup.at.probes, [&](const Bag& bag, int64_t k) {
    const Table table = lookup.at.table(bag.f, k);
    lookup.for_each_id(bag, [&](int64_t n, int64_t id) {
      const uint64_t key = lookup.map.key(table, id);
      for_each_pack<typename Lookup::weight_t>(group, table.width, table.dim, [&](auto pack, int d) {
        typename Lookup::real v[pack];
        lookup.contribution(bag, n, k, d, v);
        const int width = static_cast<int>(table.width), chunk = d / width;
        const Read read = lookup.map.read(table, key, chunk);
        negate_if(read.negative, v);
        add_atomically(to + table.begin + read.slot * width + (d - chunk * width), v);
      });
    });
  });
}

template <typename from_t, typename to_t>
__global__ void __launch_bounds__(kThreads)
    convert_kernel(const from_t* __restrict__ from, to_t* __restrict__ to, int64_t n, int lanes) {
  const Group group = group_of(lanes);
  for (int64_t i = group.index; i < n; i += group.count) to[i] = static_cast<to_t>(from[i]);
}

// out [N]: the ordered sum of an id's vector times the gradient of its bag, over all columns of its feature.
template <typename Lookup>
__global__ void __launch_bounds__(kThreads)
    sample_weights_kernel(Lookup lookup, typename Lookup::real* __restrict__ out, int lanes) {
  using real = typename Lookup::real;
  const Group group = group_of(lanes);
  lookup.for_each_bag(group, 1, [&](const Bag& bag, int64_t) {
    lookup.for_each_id(bag, [&](int64_t n, int64_t id) {
      const real divisor = lookup.at.template divisor<real>(bag.f, bag.b, lookup.pooling);
      OrderedSum<real, 1> sum;
      for (int64_t part = 0; part < lookup.parts(); ++part) {
        const Table& table = lookup.at.table(bag.f, part);
        for_each_pack<typename Lookup::weight_t>(group, table.width, table.dim, [&](auto pack, int d) {
          real v[1][pack], g[pack];
          lookup.vectors(bag.f, part, {id}, {true}, d, v);
          load(lookup.grad + bag.b * lookup.columns + table.column + d, g);
          for (int i = 0; i < pack; ++i) sum.add({v[0][i] * g[i] / divisor});
        });
      }
      real total[1];
      sum.finish(total);
      out[n] = total[0];
    });
  });
}

// The gradient of the slab by atomics, summed in the accumulator's type.
template <typename Lookup>
void atomic_backward(const Launch& launch, const Call& call, const Lookup& lookup, Tensor& out) {
  using weight_t = typename Lookup::weight_t;
  using real = typename Lookup::real;
  constexpr bool kExact = std::is_same_v<weight_t, real>;
  const int64_t numbers = call.num_units * call.unit;
  Tensor sums = kExact ? out : torch::stable::new_zeros(out, {numbers}, ScalarType::Float);
  auto* to = static_cast<real*>(sums.mutable_data_ptr());
  const Typical<typename Lookup::weight_t> typical(call);
  launch(atomic_kernel<Lookup>, {call.at.batch_size, call.at.num_features * call.at.probes}, typical.vector_lanes(),
         lookup, to);
  if constexpr (!kExact) {
    launch(convert_kernel<real, weight_t>, {numbers}, 1, to, out.mutable_data_ptr<weight_t>(), numbers);
  }
}

// By slots_kernel: rows and units as it takes them.
template <typename Lookup, typename number_t>
void write_slots(const Launch& launch, const Call& call, const Lookup& lookup, SortedTouches& sorted,
                 const int64_t* rows, int64_t* units, number_t* values) {
  with_passed_back(call, lookup, [&](auto passed_back) {
    launch(slots_kernel<decltype(passed_back), number_t>, {sorted.touches.count}, Typical<number_t>(call).slot_lanes(),
           sums_of_slots(launch, call, passed_back, sorted), rows, units, values);
  });
}

Tensor bag_backward(const Tensor& grad, const Tensor& weights, const Tensor& ids, std::optional<Tensor> offsets,
                    std::optional<Tensor> sample_weights, const Tensor& tables, int64_t probes, int64_t chunks,
                    int64_t index_map, int64_t combine, int64_t pooling, bool atomic, Names features) {
  const Launch launch(weights);
  const Layout layout{probes, chunks, index_map, combine, pooling};
  const Call call = make_backward_call(grad, weights, ids, offsets, sample_weights, tables, layout, features);
  const Tensor dense = summable(grad, weights);
  Tensor out = torch::stable::new_zeros(weights, {call.num_units, call.unit});
  with_lookup(call, dense, argmax_of(launch, call), [&](auto lookup) {
    if (atomic) return atomic_backward(launch, call, lookup, out);
    using Lookup = decltype(lookup);
    using weight_t = typename Lookup::weight_t;
    SortedTouches sorted = sort_touches(launch, call, lookup);
    if (sorted.touches.count == 0) return;
    const int64_t* rows = nullptr;
    int64_t* units = nullptr;
    write_slots(launch, call, lookup, sorted, rows, units, out.mutable_data_ptr<weight_t>());
  });
  return out;
}

// The number of touched units sizes the outputs, so this one waits for the device once.
std::tuple<Tensor, Tensor> bag_backward_rows(const Tensor& grad, const Tensor& weights, const Tensor& ids,
                                             std::optional<Tensor> offsets, std::optional<Tensor> sample_weights,
                                             const Tensor& tables, int64_t probes, int64_t chunks, int64_t index_map,
                                             int64_t combine, int64_t pooling, Names features) {
  const Launch launch(weights);
  const Layout layout{probes, chunks, index_map, combine, pooling};
  const Call call = make_backward_call(grad, weights, ids, offsets, sample_weights, tables, layout, features);
  const Tensor dense = summable(grad, weights);
  Tensor units, values;
  with_lookup(call, dense, argmax_of(launch, call), [&](auto lookup) {
    using Lookup = decltype(lookup);
    using weight_t = typename Lookup::weight_t;
    SortedTouches sorted = sort_touches(launch, call, lookup);
    const int64_t count = sorted.touches.count;
    const int64_t* rows = nullptr;
    int64_t num_touched = 0;
    if (count > 0) {
      rows = number_rows(launch, call, lookup, sorted);
      check(cudaMemcpyAsync(&num_touched, rows + count - 1, sizeof(num_touched), cudaMemcpyDeviceToHost,
                            launch.stream()));
      check(cudaStreamSynchronize(launch.stream()));
    }
    units = torch::stable::new_empty(weights, {num_touched}, ScalarType::Long);
    values = torch::stable::new_empty(weights, {num_touched, call.unit});
    if (num_touched == 0) return;
    write_slots(launch, call, lookup, sorted, rows, units.mutable_data_ptr<int64_t>(),
                values.mutable_data_ptr<weight_t>());
  });
  return {units, values};
}

Tensor bag_backward_sample_weights(const Tensor& grad, const Tensor& weights, const Tensor& ids,
                                   std::optional<Tensor> offsets, const Tensor& tables, int64_t probes, int64_t chunks,
                                   int64_t index_map, int64_t combine, int64_t pooling, Names features) {
  const Launch launch(weights);
  const Layout layout{probes, chunks, index_map, combine, pooling};
  const Call call = make_backward_call(grad, weights, ids, offsets, std::nullopt, tables, layout, features);
  const Tensor dense = summable(grad, weights);
  Tensor out = torch::stable::new_zeros(dense, {call.at.num_ids});
  with_lookup(call, dense, std::nullopt, [&](auto lookup) {
    using Lookup = decltype(lookup);
    Tensor shifts = scratch(call, call.at.num_features);  // made to note features with one position
    launch(shift_kernel<decltype(lookup.map)>, {call.at.num_features}, 1, lookup, shifts.mutable_data_ptr<int64_t>());
    launch(sample_weights_kernel<Lookup>, {call.at.batch_size, call.at.num_features}, 1, lookup,
           out.mutable_data_ptr<typename Lookup::real>());
  });
  return in_dtype(out, grad.scalar_type());
}

}  // namespace
}  // namespace embeddings::inline cuda

STABLE_TORCH_LIBRARY_IMPL(EMBEDDINGS_LIBRARY, EMBEDDINGS_DEVICE, m) {
  m.impl("bag_backward", TORCH_BOX(&embeddings::bag_backward));
  m.impl("bag_backward_rows", TORCH_BOX(&embeddings::bag_backward_rows));
  m.impl("bag_backward_sample_weights", TORCH_BOX(&embeddings::bag_backward_sample_weights));
}
