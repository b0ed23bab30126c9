// The CUDA kernels of forward passes: bag.cpp's operators, in the same order of sums, so that their bits are the CPU's.
// A bag is the work of a group of `lanes` threads, each of which takes 16 bytes of numbers at a time where the slots'
// width allows.
#include "cuda_call.h"

namespace embeddings::inline cuda {
namespace {

constexpr int64_t kSamples = 4;  // of row_kernel

// out [B, columns]
template <typename Lookup>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(Lookup lookup, typename Lookup::real* __restrict__ out, int lanes) {
  const Group group = group_of(lanes);
  lookup.for_each_bag(group, lookup.parts(), [&](const Bag& bag, int64_t part) {
    const Table& table = lookup.at.table(bag.f, part);
    const int64_t count = lookup.pooling == kMean ? bag.end - bag.begin : 1;
    for_each_pack<typename Lookup::weight_t>(group, table.width, table.dim, [&](auto pack, int d) {
      OrderedSum<typename Lookup::real, pack> sum;
      typename Lookup::real v[pack];
      lookup.for_each_id(bag, [&](int64_t n, int64_t id) {
        lookup.vector(bag.f, part, id, d, v);
        if (lookup.sample_weights) scale(v, lookup.sample_weights[n]);
        sum.add(v);
      });
      sum.finish(v);
      if (count > 1) {
        for (int i = 0; i < pack; ++i) v[i] /= static_cast<typename Lookup::real>(count);
      }
      store(out + bag.b * lookup.columns + table.column + d, v);
    });
  });
}

// The same for bags of one id, of which nothing is added: those of kSamples samples at a time, whose rows are on their
// way together.
template <typename Lookup>
__global__ void __launch_bounds__(kThreads)
    row_kernel(Lookup lookup, typename Lookup::real* __restrict__ out, int lanes) {
  const Group group = group_of(lanes);
  const Ids& at = lookup.at;
  const int64_t times = (at.batch_size + kSamples - 1) / kSamples;
  for (int64_t i = group.index; i < at.num_features * at.probes * times; i += group.count) {
    const int64_t row = i / times, f = row / at.probes, first = i % times * kSamples;
    const Table table = at.table(f, row % at.probes);
    const bool has_bags = lookup.has_bags(f);
    const int64_t begin = has_bags ? table.position * at.batch_size + first : 0;
    if (!has_bags) lookup.note(kNoBags, f, first, table.position);
    bool reads[kSamples];
    uint64_t keys[kSamples];
    UNROLL for (int s = 0; s < kSamples; ++s) {
      reads[s] = has_bags && first + s < at.batch_size;
      const int64_t id = reads[s] ? at.id(begin + s) : 0;
      reads[s] = reads[s] && lookup.has_weights(f, begin + s, id);
      keys[s] = lookup.map.key(table, id);
    }
    for_each_pack<typename Lookup::weight_t>(group, table.width, table.dim, [&](auto pack, int d) {
      const int width = static_cast<int>(table.width), chunk = d / width;
      const typename Lookup::weight_t* from[kSamples];
      bool negative[kSamples];
      UNROLL for (int s = 0; s < kSamples; ++s) {
        const Read read = lookup.map.read(table, keys[s], chunk);
        negative[s] = read.negative;
        from[s] = reads[s] ? lookup.slab + table.begin + read.slot * width + (d - chunk * width) : nullptr;
      }
      typename Lookup::real v[kSamples][pack];
      load_all(from, v);
      UNROLL for (int s = 0; s < kSamples; ++s) {
        if (first + s >= at.batch_size) break;
        negate_if(reads[s] && negative[s], v[s]);
        if (lookup.sample_weights && reads[s]) scale(v[s], lookup.sample_weights[begin + s]);
        store(out + (first + s) * lookup.columns + table.column + d, v[s]);
      }
    });
  }
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
      typename Lookup::real best[pack], v[pack];
      int64_t winner[pack];
      for (int i = 0; i < pack; ++i) best[i] = 0, winner[i] = -1;
      lookup.for_each_id(bag, [&](int64_t n, int64_t id) {
        lookup.vector(bag.f, part, id, d, v);
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
    const int64_t work = typical.parts * call.at.batch_size;
    auto* to = out.mutable_data_ptr<typename Lookup::real>();
    if (call.pooling == kMax) {
      return launch(max_kernel<Lookup>, work, typical.vector_lanes(), lookup, to, nullptr);
    }
    if constexpr (!Lookup::kAdds) {
      const int64_t times = (call.at.batch_size + kSamples - 1) / kSamples;
      if (!call.offsets) return launch(row_kernel<Lookup>, typical.parts * times, typical.vector_lanes(), lookup, to);
    }
    launch(sum_kernel<Lookup>, work, typical.vector_lanes(), lookup, to);
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
    launch(max_kernel<Lookup>, typical.parts * call.at.batch_size, typical.vector_lanes(), lookup, nullptr,
           argmax.mutable_data_ptr<int64_t>());
  });
  return argmax;
}

}  // namespace embeddings::inline cuda

STABLE_TORCH_LIBRARY_IMPL(EMBEDDINGS_LIBRARY, EMBEDDINGS_DEVICE, m) {
  m.impl("bag", TORCH_BOX(&embeddings::bag));
  m.impl("bag_into", TORCH_BOX(&embeddings::bag_into));
  m.impl("raise_noted", TORCH_BOX(&embeddings::raise_noted));
}
