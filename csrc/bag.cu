// The CUDA kernels of forward passes: bag.cpp's operators, in the same order of sums, so that their bits are the CPU's.
// A bag is the work of a group of `lanes` threads, each of which takes 16 bytes of numbers at a time where the slots'
// width allows.
#include "cuda_call.h"

namespace embeddings::inline cuda {
namespace {

// out [B, columns]
template <typename Lookup>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(Lookup lookup, typename Lookup::real* __restrict__ out, int lanes) {
  using real = typename Lookup::real;
  const Group group = group_of(lanes);
  lookup.for_each_bag(group, lookup.parts(), [&](const Bag& bag, int64_t part) {
    const Table& table = lookup.at.table(bag.f, part);
    const int64_t count = lookup.pooling == kMean ? bag.end - bag.begin : 1;
    for_each_pack<typename Lookup::weight_t>(group, table.width, table.dim, [&](auto pack, int d) {
      OrderedSum<real, pack> sum;
      lookup.template for_each_vector<pack>(bag, part, d, [&](int64_t n, auto& v) {
        if (lookup.sample_weights) scale(v, lookup.sample_weights[n]);
        sum.add(v);
      });
      real total[pack];
      sum.finish(total);
      if (count > 1) {
        for (int i = 0; i < pack; ++i) total[i] /= static_cast<real>(count);
      }
      store(out + bag.b * lookup.columns + table.column + d, total);
    });
  });
}

// The same for bags of one id, which are not summed: those of kAhead samples at a time.
template <typename Lookup>
__global__ void __launch_bounds__(kThreads)
    row_kernel(Lookup lookup, typename Lookup::real* __restrict__ out, int lanes) {
  constexpr int kAhead = Lookup::kAhead;
  const Group group = group_of(lanes);
  const Ids& at = lookup.at;
  lookup.for_each_part(lookup.parts(), [&](int64_t f, int64_t part) {
    const Table table = at.table(f, part);  // a copy: a store to out could be one to it
    const bool has_bags = lookup.has_bags(f);
    if (!has_bags) lookup.note(kNoBags, f, 0, table.position);
    const int64_t begin = has_bags ? table.position * at.batch_size : 0, end = has_bags ? begin + at.batch_size : 0;
    for (int64_t first = group.index * kAhead; first < at.batch_size; first += group.count * kAhead) {
      int64_t ids[kAhead];
      bool wanted[kAhead];
      lookup.load_ids(f, begin + first, end, ids, wanted);
      for_each_pack<typename Lookup::weight_t>(group, table.width, table.dim, [&](auto pack, int d) {
        typename Lookup::real v[kAhead][pack];
        lookup.vectors(f, part, ids, wanted, d, v);
        UNROLL for (int s = 0; s < kAhead; ++s) {
          if (first + s >= at.batch_size) break;
          if (lookup.sample_weights && wanted[s]) scale(v[s], lookup.sample_weights[begin + first + s]);
          store(out + (first + s) * lookup.columns + table.column + d, v[s]);
        }
      });
    }
  });
}

// out [B, columns] if given; argmax [B, columns], the position of each maximum (-1 in an empty bag), if given. The
// first of equals wins, and a NaN, once met, stays.
template <typename Lookup>
__global__ void __launch_bounds__(kThreads)
    max_kernel(Lookup lookup, typename Lookup::real* __restrict__ out, int64_t* __restrict__ argmax, int lanes) {
  const Group group = group_of(lanes);
  lookup.for_each_bag(group, lookup.parts(), [&](const Bag& bag, int64_t part) {
    const Table& table = lookup.at.table(bag.f, part);
    for_each_pack<typename Lookup::weight_t>(group, table.width, table.dim, [&](auto pack, int d) {
      typename Lookup::real best[pack];
      int64_t winner[pack];
      for (int i = 0; i < pack; ++i) best[i] = 0, winner[i] = -1;
      lookup.template for_each_vector<pack>(bag, part, d, [&](int64_t n, auto& v) {
        for (int i = 0; i < pack; ++i) {
          if (winner[i] < 0 || (best[i] == best[i] && !(v[i] <= best[i]))) best[i] = v[i], winner[i] = n;
        }
      });
      const int64_t first = bag.b * lookup.columns + table.column + d;
      if (out) store(out + first, best);
      if (argmax) store(argmax + first, winner);
    });
  });
}

// --- the operators: arguments as in embeddings/ops.py ----------------------------------------------------------------

void forward(const Launch& launch, const Call& call, Tensor& out) {
  with_lookup(call, std::nullopt, std::nullopt, [&](auto lookup) {
    using Lookup = decltype(lookup);
    const Typical<typename Lookup::weight_t> typical(call);
    const int64_t samples = call.at.batch_size, rows = call.at.num_features * lookup.parts();
    auto* to = out.mutable_data_ptr<typename Lookup::real>();
    if (call.pooling == kMax) {
      return launch(max_kernel<Lookup>, {samples, rows}, typical.vector_lanes(), lookup, to, nullptr);
    }
    if (!call.offsets) {
      const int64_t times = (samples + Lookup::kAhead - 1) / Lookup::kAhead;
      return launch(row_kernel<Lookup>, {times, rows}, typical.vector_lanes(), lookup, to);
    }
    launch(sum_kernel<Lookup>, {samples, rows}, typical.vector_lanes(), lookup, to);
  });
}

Tensor bag(const Tensor& weights, const Tensor& ids, std::optional<Tensor> offsets,
           std::optional<Tensor> sample_weights, const Tensor& tables, int64_t batch_size, int64_t columns,
           int64_t probes, int64_t chunks, int64_t index_map, int64_t combine, int64_t pooling, int64_t /*accumulate*/,
           Names features) {
  const Launch launch(weights);
  const Layout layout{probes, chunks, index_map, combine, pooling};
  const Call call = make_call(weights, ids, offsets, sample_weights, tables, batch_size, columns, layout, features);
  Tensor out = torch::stable::new_empty(weights, {batch_size, columns}, sums_of(weights.scalar_type()));
  forward(launch, call, out);
  return in_dtype(out, weights.scalar_type());
}

void bag_into(Tensor out, const Tensor& weights, const Tensor& ids, std::optional<Tensor> offsets,
              std::optional<Tensor> sample_weights, const Tensor& tables, int64_t probes, int64_t chunks,
              int64_t index_map, int64_t combine, int64_t pooling, Names features) {
  const Launch launch(weights);
  check_out(out, weights);
  const Layout layout{probes, chunks, index_map, combine, pooling};
  forward(launch, make_call(weights, ids, offsets, sample_weights, tables, out.size(0), out.size(1), layout, features),
          out);
}

void raise_noted(const Tensor& weights, Names features) {
  const Launch launch(weights);
  check(cudaStreamSynchronize(launch.stream()));
  error_of(features);
}

}  // namespace

std::optional<Tensor> argmax_of(const Launch& launch, const Call& call) {
  if (call.pooling != kMax) return std::nullopt;
  Tensor argmax = scratch(call, call.at.batch_size * call.columns);
  with_lookup(call, std::nullopt, std::nullopt, [&](auto lookup) {
    using Lookup = decltype(lookup);
    const Typical<typename Lookup::weight_t> typical(call);
    launch(max_kernel<Lookup>, {call.at.batch_size, call.at.num_features * lookup.parts()}, typical.vector_lanes(),
           lookup, nullptr, argmax.mutable_data_ptr<int64_t>());
  });
  return argmax;
}

}  // namespace embeddings::inline cuda

STABLE_TORCH_LIBRARY_IMPL(EMBEDDINGS_LIBRARY, EMBEDDINGS_DEVICE, m) {
  m.impl("bag", TORCH_BOX(&embeddings::bag));
  m.impl("bag_into", TORCH_BOX(&embeddings::bag_into));
  m.impl("raise_noted", TORCH_BOX(&embeddings::raise_noted));
}
