// The CPU kernel of the forward pass.
#include "cpu_call.h"
#include "cpu_reader.h"
#include "cpu_sums.h"

namespace embeddings::inline cpu {
namespace {

// --- bags of one probe's rows ----------------------------------------------------------------------------------------

// Whole bags of one feature, and the numbers of the slab at which their ids' slots begin: chunk by chunk.
struct Found {
  int64_t first_bag = 0, last_bag = 0;  // [first_bag, last_bag)
  std::vector<int64_t> slots;
};

// Finds the slots of bags from `first` on, up to `last`: about as many as a core's first cache keeps the places of, of
// one bag at least. Notes the first bad bag or id: then there are fewer than the bags have.
template <typename Map>
void find_slots(const Call& call, const Map& map, int64_t f, int64_t first, int64_t last, Found& found,
                FirstError& error) {
  constexpr int64_t kSlots = 2048;
  const Table table = call.at.table(f, 0);  // a copy: what is read for every id need not be loaded for every id
  const int64_t chunks = Map::one_chunk ? 1 : table.chunks();
  const Ids at = call.at;
  found.first_bag = first;
  int64_t num_ids = 0;
  if (!at.offsets) {
    num_ids = std::min(last - first, (kSlots + chunks - 1) / chunks);
    found.last_bag = first + num_ids;
  } else {
    found.last_bag = first;
  }
  for (; at.offsets && found.last_bag < last && num_ids * chunks < kSlots; ++found.last_bag) {
    if (!valid_bag(call, f, found.last_bag, error)) {
      found.last_bag += found.last_bag == first;
      break;
    }
    num_ids += at.end(f, found.last_bag) - at.begin(f, found.last_bag);
  }
  found.slots.resize(num_ids * chunks);
  int64_t* slot = found.slots.data();
  const int64_t begin = at.begin(f, first);
  for (int64_t n = begin; n < begin + num_ids; ++n) {
    const int64_t id = at.id(n);
    if (Map::ranged && (id < 0 || id >= table.num_embeddings)) return error.bad_id(call, f, call.bag_of(f, n), n);
    const uint64_t key = map.key(table, id);
    for (int64_t c = 0; c < chunks; ++c) *slot++ = table.begin + map.read(table, key, c).slot * table.width;
  }
}

// to [width] = the sum of `count` slots of the slab, every `step`-th of slots, over divisor. begin(i): slot i is next.
template <int kWidth, typename weight_t, typename Begin>
HOST_DEVICE void pool(const weight_t* slab, const int64_t* slots, int64_t count, int64_t step, int64_t width,
                      typename Accumulator<weight_t>::type divisor, typename Accumulator<weight_t>::type* to,
                      const Begin& begin) {
  using real = typename Accumulator<weight_t>::type;
  if constexpr (kWidth > 0) {
    if (count == 0) return static_cast<void>(std::fill_n(to, kWidth, real(0)));
    const auto read = [&](int64_t i) {
      begin(i);
      Numbers<real, kWidth> row;
      row.load(slab + slots[i * step]);
      return row;
    };
    RegisterSum<real, kWidth> sum(read(0));
    for (int64_t i = 1; i < count; ++i) sum.add(read(i));
    Numbers<real, kWidth> pooled = sum.finish();
    if (divisor != real(1)) pooled.divide(divisor);
    pooled.store(to);
  } else {
    for (int64_t z = 0; z < width; ++z) {  // a number at a time: rare widths only
      real total = 0, run = 0;
      for (int64_t i = 0; i < count; ++i) {
        if (z == 0) begin(i);
        const real v = static_cast<real>(slab[slots[i * step] + z]);
        if (i % kRun == 0) {
          if (i) total = i == kRun ? run : total + run;
          run = v;
        } else {
          run += v;
        }
      }
      const real sum = count > kRun ? total + run : run;
      to[z] = divisor == real(1) ? sum : sum / divisor;
    }
  }
}

// True if an id's vector is what its one probe reads, and a bag's the sum or mean of them.
bool pools_rows(const Call& call) {
  return call.at.probes == 1 && call.pooling != kMax && !call.sample_weights && call.index_map != kSigned;
}

template <int kWidth, typename weight_t>
void write_bags(const Call& call, int64_t f, const Found& found, typename Accumulator<weight_t>::type* out) {
  using real = typename Accumulator<weight_t>::type;
  const Table table = call.at.table(f, 0);
  const int64_t chunks = table.chunks(), width = kWidth ? kWidth : table.width;
  const weight_t* slab = call.weights_at<weight_t>();
  const int64_t *slots = found.slots.data(), *ahead = slots, *end = slots + found.slots.size();
  constexpr int64_t kAhead = 16;
  const auto ask_for = [&](const int64_t* until) {
    for (; ahead < std::min(until, end); ++ahead) {
      const char* bytes = reinterpret_cast<const char*>(slab + *ahead);
      for (size_t line = 0; line < width * sizeof(weight_t); line += 64) __builtin_prefetch(bytes + line);
    }
  };
  if constexpr (kWidth > 0) {
    if (!call.at.offsets) {  // every slot is a bag's, or a chunk of it
      for (int64_t b = found.first_bag; b < found.last_bag; ++b) {
        real* to = out + b * call.columns + table.column;
        for (int64_t c = 0; c < chunks; ++c, ++slots) {
          ask_for(slots + kAhead);
          Numbers<real, kWidth> row;
          row.load(slab + *slots);
          row.store(to + c * kWidth);
        }
      }
      return;
    }
  }
  for (int64_t b = found.first_bag; b < found.last_bag; ++b) {
    const int64_t count = call.at.end(f, b) - call.at.begin(f, b);
    const real divisor = call.at.divisor<real>(f, b, call.pooling);
    real* to = out + b * call.columns + table.column;
    // a bag's rows are asked for all at once, if they are few; else, as a core has so many reads under way, one by one
    const bool few = count * chunks * width * int64_t{sizeof(weight_t)} <= 4096;
    if (few) ask_for(slots + count * chunks + kAhead);
    const auto begin = [&](int64_t i) {
      if (!few) ask_for(slots + (i + 1) * chunks + kAhead);
    };
    for (int64_t c = 0; c < chunks; ++c) {
      pool<kWidth>(slab, slots + c, count, chunks, width, divisor, to + c * width, begin);
    }
    slots += count * chunks;
  }
}

template <typename weight_t, typename Map>
void forward_rows(const Call& call, const Map& map, typename Accumulator<weight_t>::type* out) {
  const int64_t B = call.at.batch_size, size = 1024, tasks = (B + size - 1) / size;  // bags of a task
  const auto some = [](int64_t n) { return std::min(n, 8 * kSmallWork); };  // the product of any sizes may not fit
  const int64_t work = some(call.at.num_ids) * some(call.chunks) * some(call.unit) / 8;  // a row only read is soon done
  FirstError error;
  for_each_task(call.at.num_features * tasks, work, [&](int64_t task) {
    const int64_t f = task / tasks, last = std::min((task % tasks + 1) * size, B);
    Found found;
    with_width(call.at.table(f, 0).width, [&](auto width) {
      for (int64_t b = task % tasks * size; b < last; b = found.last_bag) {
        find_slots(call, map, f, b, last, found, error);
        if (!error.found()) write_bags<width.value, weight_t>(call, f, found, out);
      }
    });
  });
  error.raise(call);
  check_cover(call);
}

// --- any bag ---------------------------------------------------------------------------------------------------------

// Sums the bag into `sum`, each vector times its sample weight. last: where the feature's ids end.
template <typename real, typename Reader, typename Sum>
HOST_DEVICE void sum_of_bag(const Call& call, Reader& reader, Reader& ahead, const real* sample_weights, int64_t f,
                            int64_t b, int64_t last, Sum& sum, FirstError& error) {
  constexpr int64_t kAhead = 16;  // ids: about the time of one cold read, which costs more to wait for than to add
  for (int64_t n = call.at.begin(f, b), end = call.at.end(f, b); n < end; ++n) {
    if (n + kAhead < last && ahead.look_up(call.at.id(n + kAhead))) ahead.prefetch();
    if (!reader.look_up(call.at.id(n))) {
      error.bad_id(call, f, b, n);
      continue;
    }
    const real w = sample_weights ? sample_weights[n] : real(1);
    sum.next();
    reader.read([&](int64_t d, int64_t size, auto fill) {
      sum.put(d, size, [&fill, w](int64_t z, auto& piece) {
        fill(z, piece);
        for (auto& number : piece) number *= w;  // * 1 is exact
      });
    });
  }
}

template <typename weight_t, typename Map>
void forward_any(const Call& call, const Map& map, typename Accumulator<weight_t>::type* out) {
  using real = typename Accumulator<weight_t>::type;
  const auto* sample_weights = call.sample_weights_at<real>();
  const int64_t B = call.at.batch_size;
  FirstError error;
  parallel_for(0, call.at.num_features * B, 512, [&](int64_t first, int64_t last) {
    OrderedSum<real> sum(call.columns);
    for (int64_t f = first / B; f * B < last; ++f) {
      Reader<weight_t, Map> reader(call, map, f), ahead(call, map, f);
      const int64_t length = call.length(f), column = call.at.table(f, 0).column;
      const int64_t end = std::min(call.at.end(f, B - 1), call.at.num_ids);
      for (int64_t b = std::max(first - f * B, int64_t(0)); b < std::min(last - f * B, B); ++b) {
        if (!valid_bag(call, f, b, error)) continue;
        sum.clear(length);
        const real* pooled = sum.scratch();
        if (call.pooling == kMax) {
          max_of_bag(call, reader, f, b, sum.scratch(), nullptr, error);
        } else {
          sum_of_bag(call, reader, ahead, sample_weights, f, b, end, sum, error);
          pooled = sum.finish();
        }
        real* to = out + b * call.columns + column;
        const real divisor = call.at.divisor<real>(f, b, call.pooling);
        if (divisor == real(1)) {
          std::copy_n(pooled, length, to);
        } else {
          for (int64_t d = 0; d < length; ++d) to[d] = pooled[d] / divisor;
        }
      }
    }
  });
  error.raise(call);
  check_cover(call);
}

void forward(const Call& call, Tensor& out) {
  with_dtype_and_map(call, [&](auto weight, auto map) {
    using weight_t = decltype(weight);
    auto* to = out.mutable_data_ptr<typename Accumulator<weight_t>::type>();
    pools_rows(call) ? forward_rows<weight_t>(call, map, to) : forward_any<weight_t>(call, map, to);
  });
}

// --- the operators: arguments as in embeddings/ops.py ----------------------------------------------------------------

Tensor bag(const Tensor& weights, const Tensor& ids, std::optional<Tensor> offsets,
           std::optional<Tensor> sample_weights, const Tensor& tables, int64_t batch_size, int64_t columns,
           int64_t probes, int64_t chunks, int64_t index_map, int64_t combine, int64_t pooling, int64_t /*accumulate*/,
           Names features) {
  const Call call = make_call(weights, ids, offsets, sample_weights, tables, batch_size, columns,
                              {probes, chunks, index_map, combine, pooling}, features);
  check_tables(call, Columns::kAll);  // before `columns` is believed
  Tensor out = torch::stable::new_empty(weights, {batch_size, columns}, sums_of(weights.scalar_type()));
  forward(call, out);
  return in_dtype(out, weights.scalar_type());
}

void bag_into(Tensor out, const Tensor& weights, const Tensor& ids, std::optional<Tensor> offsets,
              std::optional<Tensor> sample_weights, const Tensor& tables, int64_t probes, int64_t chunks,
              int64_t index_map, int64_t combine, int64_t pooling, Names features) {
  check_out(out, weights);
  const Call call = make_call(weights, ids, offsets, sample_weights, tables, out.size(0), out.size(1),
                              {probes, chunks, index_map, combine, pooling}, features);
  check_tables(call, Columns::kSome);
  forward(call, out);
}

}  // namespace
}  // namespace embeddings::inline cpu

STABLE_TORCH_LIBRARY_IMPL(embeddings, CPU, m) {
  m.impl("bag", TORCH_BOX(&embeddings::bag));
  m.impl("bag_into", TORCH_BOX(&embeddings::bag_into));
}
