// The CPU kernels: forward, gradients of the weights (dense or touched slots only) and of the per-sample weights.
#include "bag.h"

#include <algorithm>
#include <array>
#include <mutex>
#include <tuple>
#include <vector>

namespace embeddings {
namespace {

using torch::stable::parallel_for;

// The first bad bag or id in the order feature, sample, position, whichever thread met it; raised when all have joined.
class FirstError {
 public:
  void bad_id(int64_t f, int64_t b, int64_t n, int64_t id, int64_t limit) { note({f, b, n, id, limit}); }
  void bad_bag(int64_t f, int64_t b, int64_t begin, int64_t end) { note({f, b, -1, begin, end}); }
  void raise(const Call& call) const {
    if (!found_) return;
    const auto [f, b, n, first, second] = error_;
    if (n >= 0) call.fail_id(f, n, first, second);
    call.fail_offsets(f, b, first, second);
  }

 private:
  using Error = std::array<int64_t, 5>;  // feature, sample, position or -1, then id and limit, or begin and end
  void note(const Error& error) {
    std::lock_guard<std::mutex> guard(lock_);
    if (!found_ || error < error_) error_ = error;
    found_ = true;
  }
  std::mutex lock_;
  bool found_ = false;
  Error error_{};
};

// The batch must cover every feature, and the slices must lie in the slab, ascending and apart: a few rows, checked on
// every call.
template <typename Map>
void check_tables(const Call& call) {
  int64_t end = 0;
  for (int64_t f = 0; f < call.at.num_tables; ++f) {
    const Table& table = call.at.tables[f];
    if (table.position < 0 || (call.at.num_bags > 0 && table.position >= call.at.num_bags / call.at.batch_size)) {
      fail("the batch has no bags for feature ", call.feature(f), " at position ", table.position);
    }
    const int64_t needed = Map::ranged ? table.num_embeddings : 1;
    if (table.first_slot < end || table.num_slots < std::max<int64_t>(needed, 1) || table.num_slots > call.num_slots ||
        table.first_slot > call.num_slots - table.num_slots) {
      fail("feature ", call.feature(f), ": slots [", table.first_slot, ", +", table.num_slots, ") do not fit its ",
           table.num_embeddings, " ids, the slots before and a slab of ", call.num_slots, " slots");
    }
    end = table.first_slot + table.num_slots;
  }
}

// Offsets that pass bag by bag must also cover all ids.
void check_cover(const Call& call) {
  if (!call.offsets) return;
  const int64_t first = call.at.offsets[0], last = call.at.offsets[call.at.num_bags];
  if (first != 0 || last != call.at.num_ids) {
    fail("offsets must begin with 0 and end with the number of ids, ", call.at.num_ids, ", not ", first, " and ", last);
  }
}

// False, with the error noted, if the bag of sample b reaches outside the batch's ids.
HOST_DEVICE bool valid_bag(const Call& call, int64_t f, int64_t b, FirstError& error) {
  const int64_t begin = call.at.begin(f, b), end = call.at.end(f, b);
  if (begin >= 0 && begin <= end && end <= call.at.num_ids) return true;
  error.bad_bag(f, b, begin, end);
  return false;
}

template <typename Map>
HOST_DEVICE bool valid_id(const Call& call, int64_t f, int64_t b, int64_t n, int64_t id, FirstError& error) {
  if (!Map::ranged || (id >= 0 && id < call.at.tables[f].num_embeddings)) return true;
  error.bad_id(f, b, n, id, call.at.tables[f].num_embeddings);
  return false;
}

// Adds vectors of `size` numbers, in chunks of `width`, in the order that index_map.h fixes: runs of kRun, then the
// runs. kPiece numbers, a divisor of width, are moved at once.
template <typename real, int kPiece>
class OrderedSum {
 public:
  OrderedSum(int64_t size, int64_t width) : width_(width), total_(size), run_(size) {}
  void clear() { count_ = 0; }

  // chunk(c)(z): number z of chunk c of the next vector.
  template <typename Chunk>
  void add_chunks(int64_t chunks, Chunk chunk) {
    const bool starts_run = count_ % kRun == 0;
    if (starts_run && count_) close_run();
    real* to = run_.data();
    for (int64_t c = 0; c < chunks; ++c) {
      const auto numbers = chunk(c);
      for (int64_t z = 0; z < width_; z += kPiece, to += kPiece) {
        real piece[kPiece];  // a copy, so that the compiler need not ask whether `to` overlaps the slab
        for (int i = 0; i < kPiece; ++i) piece[i] = numbers(z + i);
        if (starts_run) {
          for (int i = 0; i < kPiece; ++i) to[i] = piece[i];
        } else {
          for (int i = 0; i < kPiece; ++i) to[i] += piece[i];
        }
      }
    }
    ++count_;
  }
  // contribution(z): number z of the next vector, in one chunk.
  template <typename Contribution>
  void add(Contribution contribution) {
    add_chunks(1, [&](int64_t) { return contribution; });
  }
  // The sum; zeros if nothing was added.
  const real* finish() {
    if (count_ == 0) std::fill(run_.begin(), run_.end(), real(0));
    if (count_ <= kRun) return run_.data();
    close_run();
    return total_.data();
  }
  // Room for a result that is no sum (max pooling).
  real* scratch() { return run_.data(); }

 private:
  void close_run() {
    const bool first = count_ <= kRun;
    for (size_t d = 0; d < run_.size(); ++d) total_[d] = first ? run_[d] : total_[d] + run_[d];
  }
  int64_t width_;
  std::vector<real> total_, run_;
  int64_t count_ = 0;
};

// One id's vector, number by number, in the accumulator's type.
template <typename weight_t, typename Map>
struct Row {
  using real = typename Accumulator<weight_t>::type;
  const weight_t* slab;
  const Table& table;
  uint64_t key;
  int64_t width;

  const weight_t* chunk(int64_t c) const { return slab + (table.first_slot + Map::slot(table, key, c)) * width; }
};

template <typename weight_t, typename Map>
Row<weight_t, Map> row_of(const Call& call, const weight_t* slab, int64_t f, int64_t id) {
  const Table& table = call.at.tables[f];
  return {slab, table, Map::key(table, id), call.width};
}

// v replaces best: the first of equals wins, and a NaN, once met, stays.
template <typename real>
bool replaces(real v, real best) {
  return best == best && !(v <= best);
}

// Writes max over the bag to best [D] and, if wanted, where each maximum came from to argmax [D] (-1 in an empty bag).
template <typename weight_t, typename Map, typename real>
void max_of_bag(const Call& call, const weight_t* slab, int64_t f, int64_t b, real* best, int64_t* argmax,
                FirstError& error) {
  bool any = false;
  for (int64_t n = call.at.begin(f, b); n < call.at.end(f, b); ++n) {
    const int64_t id = call.at.id(n);
    if (!valid_id<Map>(call, f, b, n, id, error)) continue;
    const auto row = row_of<weight_t, Map>(call, slab, f, id);
    for (int64_t c = 0, d = 0; c < call.chunks; ++c) {
      const weight_t* from = row.chunk(c);
      for (int64_t z = 0; z < call.width; ++z, ++d) {
        const real v = static_cast<real>(from[z]);
        if (any && !replaces(v, best[d])) continue;
        best[d] = v;
        if (argmax) argmax[d] = n;
      }
    }
    any = true;
  }
  if (any) return;
  std::fill(best, best + call.dim, real(0));
  if (argmax) std::fill(argmax, argmax + call.dim, int64_t(-1));
}

// Asks for the vector of position n, if it is one of the feature's (its last is before `end`): a cold row costs more to
// wait for than to add. HOST_DEVICE forces it inline: gcc drops a call whose only effect is a prefetch.
template <typename weight_t, typename Map>
HOST_DEVICE void prefetch(const Call& call, const weight_t* slab, int64_t f, int64_t n, int64_t end) {
  if (n >= end) return;
  const int64_t id = call.at.id(n);
  if (Map::ranged && (id < 0 || id >= call.at.tables[f].num_embeddings)) return;
  const auto row = row_of<weight_t, Map>(call, slab, f, id);
  for (int64_t c = 0; c < call.chunks; ++c) {
    const char* from = reinterpret_cast<const char*>(row.chunk(c));
    for (size_t line = 0; line < call.width * sizeof(weight_t); line += 64) __builtin_prefetch(from + line);
  }
}

// Sums the bag into `sum`, each vector times its sample weight. last: where the feature's ids end.
template <typename weight_t, typename Map, typename Sum>
void sum_of_bag(const Call& call, const weight_t* slab, const weight_t* sample_weights, int64_t f, int64_t b,
                int64_t last, Sum& sum, FirstError& error) {
  using real = typename Accumulator<weight_t>::type;
  constexpr int64_t kAhead = 16;  // ids: about the time of one cold read
  sum.clear();
  for (int64_t n = call.at.begin(f, b); n < call.at.end(f, b); ++n) {
    const int64_t id = call.at.id(n);
    if (!valid_id<Map>(call, f, b, n, id, error)) continue;
    prefetch<weight_t, Map>(call, slab, f, n + kAhead, last);
    const auto row = row_of<weight_t, Map>(call, slab, f, id);
    sum.add_chunks(call.chunks, [&](int64_t c) {
      const weight_t* from = row.chunk(c);
      const real w = sample_weights ? static_cast<real>(sample_weights[n]) : real(1);
      return [=](int64_t z) { return static_cast<real>(from[z]) * w; };  // * 1 is exact
    });
  }
}

template <typename weight_t, typename Map, int kPiece>
void forward(const Call& call, weight_t* out) {
  using real = typename Accumulator<weight_t>::type;
  check_tables<Map>(call);
  const auto* slab = call.weights.const_data_ptr<weight_t>();
  const auto* sample_weights = call.sample_weights ? call.sample_weights->const_data_ptr<weight_t>() : nullptr;
  const int64_t F = call.at.num_tables, B = call.at.batch_size, D = call.dim;
  FirstError error;
  parallel_for(0, F * B, 512, [&](int64_t first, int64_t last) {
    OrderedSum<real, kPiece> sum(D, call.width);
    int64_t f = first / B, b = first % B;
    for (int64_t bag = first; bag < last; ++bag, ++b) {
      if (b == B) b = 0, ++f;
      if (!valid_bag(call, f, b, error)) continue;
      const real* pooled = sum.scratch();
      if (call.pooling == kMax) {
        max_of_bag<weight_t, Map>(call, slab, f, b, sum.scratch(), nullptr, error);
      } else {
        const int64_t end = std::min(call.at.end(f, B - 1), call.at.num_ids);
        sum_of_bag<weight_t, Map>(call, slab, sample_weights, f, b, end, sum, error);
        pooled = sum.finish();
      }
      weight_t* to = out + (b * F + f) * D;
      const real divisor = call.at.divisor<real>(f, b, call.pooling);
      if (divisor == real(1)) {
        for (int64_t d = 0; d < D; ++d) to[d] = static_cast<weight_t>(pooled[d]);
      } else {
        for (int64_t d = 0; d < D; ++d) to[d] = static_cast<weight_t>(pooled[d] / divisor);
      }
    }
  });
  error.raise(call);
  check_cover(call);
}

// What id n adds to the gradient of its own vector: g(d) * weight / count, or g(d) where it was the maximum.
template <typename weight_t>
struct Contributions {
  using real = typename Accumulator<weight_t>::type;
  const Call& call;
  const weight_t* grad;            // [B, F, D]
  const weight_t* sample_weights;  // [N] or nullptr
  const int64_t* argmax;           // [B, D] of the current table, or nullptr

  // to[z] (+)= what position n of sample b adds to the slot of its chunk c.
  template <typename Sum>
  void add_to(Sum& sum, int64_t f, int64_t b, int64_t n, int64_t c) const {
    const int64_t start = c * call.width;
    const weight_t* g = grad + (b * call.at.num_tables + f) * call.dim + start;
    if (argmax) {
      const int64_t* winner = argmax + b * call.dim + start;
      sum.add([&](int64_t z) { return winner[z] == n ? static_cast<real>(g[z]) : real(0); });
      return;
    }
    const real w = sample_weights ? static_cast<real>(sample_weights[n]) : real(1);
    const real divisor = call.at.divisor<real>(f, b, call.pooling);
    if (divisor == real(1)) {
      sum.add([=](int64_t z) { return static_cast<real>(g[z]) * w; });
    } else {
      sum.add([=](int64_t z) { return static_cast<real>(g[z]) * w / divisor; });
    }
  }
};

// One chunk of one id: the slot that it reads, and its place in batch order.
struct Touch {
  uint64_t slot, place;
};

// Stable sort by slot: least significant digit first, 11 bits a pass.
void sort_by_slot(std::vector<Touch>& touches, uint64_t num_slots) {
  constexpr int kBits = 11;
  if (touches.size() < 512) {
    std::sort(touches.begin(), touches.end(),
              [](const Touch& a, const Touch& b) { return a.slot != b.slot ? a.slot < b.slot : a.place < b.place; });
    return;
  }
  std::vector<Touch> other(touches.size());
  for (int shift = 0; shift < 64 && (num_slots - 1) >> shift; shift += kBits) {
    std::array<uint64_t, (1 << kBits) + 1> starts{};
    constexpr uint64_t mask = (1 << kBits) - 1;
    for (const Touch& touch : touches) ++starts[((touch.slot >> shift) & mask) + 1];
    for (size_t digit = 1; digit < starts.size(); ++digit) starts[digit] += starts[digit - 1];
    for (const Touch& touch : touches) other[starts[(touch.slot >> shift) & mask]++] = touch;
    touches.swap(other);
  }
}

// The touches of one table's slice, sorted by slot, and what it takes to sum them.
struct SortedTable {
  int64_t first = 0;           // position in ids of the table's first bag
  std::vector<int64_t> bags;   // sample of each id
  std::vector<Touch> touches;  // place = (n - first) * chunks + c
  int64_t num_unique = 0;
};

template <typename Map>
SortedTable sort_table(const Call& call, int64_t f, FirstError& error) {
  SortedTable sorted;
  const Table& table = call.at.tables[f];
  const int64_t B = call.at.batch_size;
  if (B == 0) return sorted;
  sorted.first = call.at.begin(f, 0);
  const int64_t last = call.at.end(f, B - 1);
  if (sorted.first >= 0 && last >= sorted.first && last <= call.at.num_ids) {
    sorted.bags.reserve(last - sorted.first);
    sorted.touches.reserve((last - sorted.first) * call.chunks);
  }
  for (int64_t b = 0; b < B; ++b) {
    if (!valid_bag(call, f, b, error)) continue;
    for (int64_t n = call.at.begin(f, b); n < call.at.end(f, b); ++n) {
      const int64_t id = call.at.id(n);
      sorted.bags.push_back(b);
      if (!valid_id<Map>(call, f, b, n, id, error)) continue;
      const uint64_t key = Map::key(table, id);
      for (int64_t c = 0; c < call.chunks; ++c) {
        sorted.touches.push_back({static_cast<uint64_t>(Map::slot(table, key, c)),
                                  static_cast<uint64_t>((n - sorted.first) * call.chunks + c)});
      }
    }
  }
  sort_by_slot(sorted.touches, static_cast<uint64_t>(table.num_slots));
  for (size_t i = 0; i < sorted.touches.size(); ++i) {
    sorted.num_unique += i == 0 || sorted.touches[i].slot != sorted.touches[i - 1].slot;
  }
  return sorted;
}

// Sums each touched slot's contributions in order and hands them on: write(u, slot, sum [Z]), u counts this table's
// slots.
template <typename weight_t, typename Map, int kPiece, typename Write>
void reduce_table(const Call& call, const weight_t* grad, int64_t f, const SortedTable& sorted, FirstError& error,
                  Write write) {
  using real = typename Accumulator<weight_t>::type;
  std::vector<int64_t> argmax;
  if (call.pooling == kMax) {
    std::vector<real> best(call.dim);
    argmax.resize(call.at.batch_size * call.dim);
    const auto* slab = call.weights.const_data_ptr<weight_t>();
    for (int64_t b = 0; b < call.at.batch_size; ++b) {
      max_of_bag<weight_t, Map>(call, slab, f, b, best.data(), argmax.data() + b * call.dim, error);
    }
  }
  const auto* sample_weights = call.sample_weights ? call.sample_weights->const_data_ptr<weight_t>() : nullptr;
  const Contributions<weight_t> contributions{call, grad, sample_weights, argmax.empty() ? nullptr : argmax.data()};
  OrderedSum<real, kPiece> sum(call.width, call.width);
  int64_t u = 0;
  for (size_t i = 0; i < sorted.touches.size(); ++u) {
    const uint64_t slot = sorted.touches[i].slot;
    sum.clear();
    for (; i < sorted.touches.size() && sorted.touches[i].slot == slot; ++i) {
      const auto place = static_cast<int64_t>(sorted.touches[i].place);
      const int64_t offset = place / call.chunks;
      contributions.add_to(sum, f, sorted.bags[offset], sorted.first + offset, place % call.chunks);
    }
    write(u, call.at.tables[f].first_slot + static_cast<int64_t>(slot), sum.finish());
  }
}

// Sorts every table (in parallel: slices do not overlap), then lets `use(sorted)` allocate and reduce.
template <typename Map, typename Use>
void with_sorted_tables(const Call& call, Use use) {
  check_tables<Map>(call);
  FirstError error;
  std::vector<SortedTable> sorted(call.at.num_tables);
  parallel_for(0, call.at.num_tables, 1, [&](int64_t first, int64_t last) {
    for (int64_t f = first; f < last; ++f) sorted[f] = sort_table<Map>(call, f, error);
  });
  error.raise(call);
  check_cover(call);
  use(sorted, error);
}

// Calls function(std::integral_constant<int, kPiece>): how many numbers of a slot are moved at once.
template <typename Function>
void with_piece(int64_t width, Function function) {
  if (width % 16 == 0) return function(std::integral_constant<int, 16>{});
  if (width % 8 == 0) return function(std::integral_constant<int, 8>{});
  function(std::integral_constant<int, 1>{});
}

// Calls function(weight_t{}, Map{}, std::integral_constant<int, kPiece>).
template <typename Function>
void with_kernel(const Call& call, int64_t index_map, Function function) {
  with_dtype_and_map(call.weights.scalar_type(), index_map, [&](auto weight, auto map) {
    with_piece(call.width, [&](auto piece) { function(weight, map, piece); });
  });
}

// --- the operators: arguments as in embeddings/ops.py -------------------------------------------------------------

Tensor bag(const Tensor& weights, const Tensor& ids, std::optional<Tensor> offsets,
           std::optional<Tensor> sample_weights, const Tensor& tables, int64_t batch_size, int64_t dim,
           int64_t index_map, int64_t pooling, int64_t /*accumulate*/, std::string features) {
  const Call call = make_call(weights, ids, offsets, sample_weights, tables, batch_size, dim, pooling, features);
  Tensor out = torch::stable::new_empty(weights, {batch_size, call.at.num_tables, dim});
  with_kernel(call, index_map, [&](auto weight, auto map, auto piece) {
    using weight_t = decltype(weight);
    forward<weight_t, decltype(map), decltype(piece)::value>(call, out.mutable_data_ptr<weight_t>());
  });
  return out;
}

Tensor bag_backward(const Tensor& grad, const Tensor& weights, const Tensor& ids, std::optional<Tensor> offsets,
                    std::optional<Tensor> sample_weights, const Tensor& tables, int64_t index_map, int64_t pooling,
                    bool /*atomic: on the CPU the sorted sum serves both*/, std::string features) {
  const Call call = make_backward_call(grad, weights, ids, offsets, sample_weights, tables, pooling, features);
  const Tensor dense = torch::stable::contiguous(grad);
  Tensor out = torch::stable::new_zeros(weights, {call.num_slots, call.width});
  with_kernel(call, index_map, [&](auto weight, auto map, auto piece) {
    using weight_t = decltype(weight);
    using Map = decltype(map);
    constexpr int kPiece = decltype(piece)::value;
    with_sorted_tables<Map>(call, [&](const std::vector<SortedTable>& sorted, FirstError& error) {
      const auto* g = dense.const_data_ptr<weight_t>();
      auto* to = out.mutable_data_ptr<weight_t>();
      parallel_for(0, call.at.num_tables, 1, [&](int64_t first, int64_t last) {
        for (int64_t f = first; f < last; ++f) {
          reduce_table<weight_t, Map, kPiece>(call, g, f, sorted[f], error,
                                              [&](int64_t, int64_t slot, const auto* sum) {
                                                for (int64_t z = 0; z < call.width; ++z)
                                                  to[slot * call.width + z] = static_cast<weight_t>(sum[z]);
                                              });
        }
      });
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> bag_backward_rows(const Tensor& grad, const Tensor& weights, const Tensor& ids,
                                             std::optional<Tensor> offsets, std::optional<Tensor> sample_weights,
                                             const Tensor& tables, int64_t index_map, int64_t pooling,
                                             std::string features) {
  const Call call = make_backward_call(grad, weights, ids, offsets, sample_weights, tables, pooling, features);
  const Tensor dense = torch::stable::contiguous(grad);
  std::optional<Tensor> slots, values;
  with_kernel(call, index_map, [&](auto weight, auto map, auto piece) {
    using weight_t = decltype(weight);
    using Map = decltype(map);
    constexpr int kPiece = decltype(piece)::value;
    with_sorted_tables<Map>(call, [&](const std::vector<SortedTable>& sorted, FirstError& error) {
      std::vector<int64_t> starts(sorted.size() + 1, 0);
      for (size_t f = 0; f < sorted.size(); ++f) starts[f + 1] = starts[f] + sorted[f].num_unique;
      slots = torch::stable::new_empty(weights, {starts.back()}, ScalarType::Long);
      values = torch::stable::new_empty(weights, {starts.back(), call.width});
      const auto* g = dense.const_data_ptr<weight_t>();
      auto* to_slots = slots->mutable_data_ptr<int64_t>();
      auto* to = values->mutable_data_ptr<weight_t>();
      parallel_for(0, call.at.num_tables, 1, [&](int64_t first, int64_t last) {
        for (int64_t f = first; f < last; ++f) {
          reduce_table<weight_t, Map, kPiece>(call, g, f, sorted[f], error,
                                              [&](int64_t u, int64_t slot, const auto* sum) {
                                                const int64_t row = starts[f] + u;
                                                to_slots[row] = slot;
                                                for (int64_t z = 0; z < call.width; ++z)
                                                  to[row * call.width + z] = static_cast<weight_t>(sum[z]);
                                              });
        }
      });
    });
  });
  return {*slots, *values};
}

Tensor bag_backward_sample_weights(const Tensor& grad, const Tensor& weights, const Tensor& ids,
                                   std::optional<Tensor> offsets, const Tensor& tables, int64_t index_map,
                                   int64_t pooling, std::string features) {
  const Call call = make_backward_call(grad, weights, ids, offsets, std::nullopt, tables, pooling, features);
  const Tensor dense = torch::stable::contiguous(grad);
  Tensor out = torch::stable::new_zeros(weights, {call.at.num_ids});
  with_dtype_and_map(weights.scalar_type(), index_map, [&](auto weight, auto map) {
    using weight_t = decltype(weight);
    using Map = decltype(map);
    using real = typename Accumulator<weight_t>::type;
    check_tables<Map>(call);
    const auto* slab = call.weights.const_data_ptr<weight_t>();
    const auto* grads = dense.const_data_ptr<weight_t>();
    auto* to = out.mutable_data_ptr<weight_t>();
    FirstError error;
    parallel_for(0, call.at.num_tables * call.at.batch_size, 512, [&](int64_t first, int64_t last) {
      OrderedSum<real, 1> sum(1, 1);
      for (int64_t bag = first; bag < last; ++bag) {
        const int64_t f = bag / call.at.batch_size, b = bag % call.at.batch_size;
        if (!valid_bag(call, f, b, error)) continue;
        const int64_t begin = call.at.begin(f, b), end = call.at.end(f, b);
        const real divisor = call.at.divisor<real>(f, b, call.pooling);
        for (int64_t n = begin; n < end; ++n) {
          const int64_t id = call.at.id(n);
          if (!valid_id<Map>(call, f, b, n, id, error)) continue;
          const auto row = row_of<weight_t, Map>(call, slab, f, id);
          const weight_t* g = grads + (b * call.at.num_tables + f) * call.dim;
          sum.clear();
          for (int64_t d = 0; d < call.dim; ++d) {
            const real v = static_cast<real>(row.chunk(d / call.width)[d % call.width]);
            sum.add([&](int64_t) { return v * static_cast<real>(g[d]) / divisor; });
          }
          to[n] = static_cast<weight_t>(*sum.finish());
        }
      }
    });
    error.raise(call);
    check_cover(call);
  });
  return out;
}

}  // namespace
}  // namespace embeddings

STABLE_TORCH_LIBRARY_IMPL(embeddings, CPU, m) {
  m.impl("bag", TORCH_BOX(&embeddings::bag));
  m.impl("bag_backward", TORCH_BOX(&embeddings::bag_backward));
  m.impl("bag_backward_rows", TORCH_BOX(&embeddings::bag_backward_rows));
  m.impl("bag_backward_sample_weights", TORCH_BOX(&embeddings::bag_backward_sample_weights));
}
