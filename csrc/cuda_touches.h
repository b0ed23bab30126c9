// The CUDA half of repeatable gradients: what a batch touches, sorted by slot, and the sums of it in one order. A run
// of touches is the work of a group of `lanes` threads.
#pragma once

#include <vector>

#include "cuda_call.h"

namespace embeddings::inline cuda {

#ifdef EMBEDDINGS_NARROW_UNITS
constexpr int64_t kNarrowUnits = EMBEDDINGS_NARROW_UNITS;
#else
constexpr int64_t kNarrowUnits = INT32_MAX;  // of slabs up to so many, slots are kept in 32 bits
#endif

// A touch is one chunk of one probe of an id. Its number: (occurrence * K + probe) * chunks + chunk. Occurrences number
// the slab's ids by feature, sample and position: without offsets they are the bags f * B + b, with offsets the
// positions, shifted so that the features' ranges follow one another in the slab's order.
struct Touches {
  // [M] first unit of the slot, kNoSlot where there is no touch of that number: int32, or int64 if is_wide
  void* slots;
  bool is_wide;     // of a slab beyond kNarrowUnits; elsewhere 64 bits would be half as many bytes again to sort
  uint32_t* order;  // [M] touch number * 2, + 1 if its numbers count negatively
  uint32_t* bags;   // [N] bag f * B + b of each occurrence; nullptr without offsets
  int64_t* shifts;  // [F] occurrence - position; nullptr without offsets
  int64_t count, num_occurrences;

  static constexpr int64_t kNoSlot = -1;

  __device__ int64_t slot(int64_t i) const {
    return is_wide ? static_cast<const int64_t*>(slots)[i] : static_cast<const int32_t*>(slots)[i];
  }
  __device__ void set_slot(int64_t i, int64_t unit) const {
    if (is_wide) {
      static_cast<int64_t*>(slots)[i] = unit;
    } else {
      static_cast<int32_t*>(slots)[i] = static_cast<int32_t>(unit);
    }
  }

  // The rest is for touches that are sorted by slot.
  __device__ bool continues(int64_t i, int64_t unit) const { return i < count && slot(i) == unit; }
  __device__ bool begins_slot(int64_t i) const { return slot(i) != kNoSlot && (i == 0 || slot(i - 1) != slot(i)); }
  // The touch in [q * kRun, + kRun) that begins a run, but not its slot's first one; -1 if none does. There is at most
  // one: it is of the slot at q * kRun, as a slot that begins later has its second run beyond.
  __device__ int64_t later_run(int64_t q) const {
    const int64_t block = q * kRun;
    const int64_t unit = slot(block);
    if (unit == kNoSlot || block == 0 || slot(block - 1) != unit) return -1;
    int64_t first = 0, last = block;  // the slot begins in [first, last]
    while (first < last) {
      const int64_t middle = (first + last) / 2;
      if (slot(middle) < unit) {
        first = middle + 1;
      } else {
        last = middle;
      }
    }
    const int64_t i = first + (block - first + kRun - 1) / kRun * kRun;
    return continues(i, unit) ? i : -1;
  }
};

struct Touch {
  Bag bag;  // without its positions
  int64_t n, k;
  int chunk;
  bool negative;
};

// In 32 bits, where divisions are several times faster: sort_touches has seen to it that all fits. batch: a Batch, or
// what else has its `at` and `chunks`.
template <typename Batch>
__device__ Touch touch_at(const Batch& batch, const Touches& touches, int64_t i) {
  const Ids& at = batch.at;
  const auto chunks = static_cast<uint32_t>(batch.chunks), probes = static_cast<uint32_t>(at.probes);
  const auto batch_size = static_cast<uint32_t>(at.batch_size);
  const uint32_t order = touches.order[i], number = order / 2, vector = number / chunks, occurrence = vector / probes;
  const uint32_t bag = touches.bags ? touches.bags[occurrence] : occurrence;
  const int64_t f = bag / batch_size, b = bag % batch_size;
  const int64_t n = touches.shifts ? occurrence - touches.shifts[f] : at.begin(f, b);
  return {{f, b, 0, 0}, n, vector % probes, static_cast<int>(number % chunks), order % 2 == 1};
}

template <typename Batch>
__device__ int64_t width_at(const Batch& batch, const Touches& touches, int64_t i) {
  const Touch touch = touch_at(batch, touches, i);
  return batch.at.table(touch.bag.f, touch.k).width;
}

// Also notes features that share a position: their occurrences could be more than the batch has ids.
template <typename Map>
__global__ void __launch_bounds__(kThreads) shift_kernel(Batch<Map> batch, int64_t* __restrict__ shifts, int lanes) {
  const Group group = group_of(lanes);
  for (int64_t f = group.index; f < batch.at.num_features; f += group.count) {
    int64_t shift = 0;
    for (int64_t g = 0; g <= f; ++g) {
      if (!batch.has_bags(g)) continue;
      const Bag whole = batch.whole(g);
      shift += g < f ? whole.end - whole.begin : -whole.begin;
      const int64_t position = batch.at.table(g, 0).position;
      if (g < f && position == batch.at.table(f, 0).position) batch.note(kSharedPosition, f, 0, position);
    }
    shifts[f] = shift;
  }
}

template <typename Map>
__global__ void __launch_bounds__(kThreads) touch_kernel(Batch<Map> batch, Touches touches, int lanes) {
  const Group group = group_of(lanes);
  const Ids& at = batch.at;
  batch.for_each_bag(group, at.probes, [&](const Bag& bag, int64_t k) {
    if (bag.begin == bag.end) return;
    const Table table = at.table(bag.f, k);
    if (touches.shifts) {
      const Bag whole = batch.whole(bag.f);
      const bool fits = whole.end + touches.shifts[bag.f] <= touches.num_occurrences;
      if (bag.begin < whole.begin || bag.end > whole.end || !fits) return;  // something else is wrong, and noted
    }
    const int64_t number_of_bag = bag.f * at.batch_size + bag.b;
    batch.for_each_id(bag, [&](int64_t n, int64_t id) {
      const int64_t occurrence = touches.shifts ? n + touches.shifts[bag.f] : number_of_bag;
      if (touches.bags && k == 0 && group.lane == 0) touches.bags[occurrence] = static_cast<uint32_t>(number_of_bag);
      const uint64_t key = batch.map.key(table, id);
      for (int64_t chunk = group.lane; chunk < table.chunks(); chunk += group.lanes) {
        const Read read = batch.map.read(table, key, chunk);
        const int64_t number = (occurrence * at.probes + k) * batch.chunks + chunk;
        touches.set_slot(number, (table.begin + read.slot * table.width) / batch.unit);
        touches.order[number] = static_cast<uint32_t>(number) * 2 + read.negative;
      }
    });
  });
}

// --- the sum of a run ------------------------------------------------------------------------------------------------

// Numbers z.. of the run that begins at touch `first`: up to kRun contributions to one slot, left to right. Returns
// false if that is all of its slot.
template <typename Lookup, int kVector, typename real>
__device__ bool sum_run(const Lookup& lookup, const Touches& touches, int64_t first, int width, int z,
                        real (&sum)[kVector]) {
  const int64_t slot = touches.slot(first);
  int64_t j = first;
  for (; j < first + kRun && touches.continues(j, slot); ++j) {
    const Touch touch = touch_at(lookup, touches, j);
    real v[kVector];
    lookup.contribution(touch.bag, touch.n, touch.k, touch.chunk * width + z, v);
    negate_if(touch.negative, v);
    for (int i = 0; i < kVector; ++i) sum[i] = j == first ? v[i] : sum[i] + v[i];
  }
  return touches.continues(j, slot);
}

// sum += v / divisor, a number by which most are not divided: 1.
template <typename real, int kVector>
__device__ void add_quotient(real (&sum)[kVector], const real (&v)[kVector], real divisor) {
  if (divisor == 1) {
    for (int i = 0; i < kVector; ++i) sum[i] += v[i];
  } else {
    for (int i = 0; i < kVector; ++i) sum[i] += v[i] / divisor;
  }
}

// Adds numbers 0, 1, ... to sum, in this order: load(i, v) reads number i and says what it is to be divided by, 0 after
// the last. A few are on their way at a time, so that a hot slot waits for memory once for them all.
template <typename real, int kVector, typename Load>
__device__ void add_ahead(real (&sum)[kVector], Load load) {
  constexpr int kAhead = 4;
  bool goes_on = true;
  for (int64_t i = 0; goes_on; i += kAhead) {
    real v[kAhead][kVector], divisors[kAhead];
    UNROLL for (int a = 0; a < kAhead; ++a) divisors[a] = load(i + a, v[a]);
    UNROLL for (int a = 0; a < kAhead; ++a) {
      if (divisors[a] != 0) add_quotient(sum, v[a], divisors[a]);
    }
    goes_on = divisors[kAhead - 1] != 0;
  }
}

// What touches pass back where that is a share of their bag's gradient, whatever the map and whatever else their ids
// read.
template <typename number_t>
struct Shares {
  using weight_t = number_t;
  using real = typename Accumulator<weight_t>::type;
  Ids at;
  int64_t unit, columns, chunks, pooling;
  const real* __restrict__ sample_weights;  // these as in a Lookup
  const real* __restrict__ grad;
  const int64_t* __restrict__ argmax;

  template <typename Lookup>
  explicit Shares(const Lookup& lookup)
      : at(lookup.at),
        unit(lookup.unit),
        columns(lookup.columns),
        chunks(lookup.chunks),
        pooling(lookup.pooling),
        sample_weights(lookup.sample_weights),
        grad(lookup.grad),
        argmax(lookup.argmax) {}

  // The share is `to` by the result: a division waits for what is loaded, so that the caller makes it.
  template <int kVector>
  __device__ real load_touch(const Touches& touches, int64_t i, int width, int z, real (&to)[kVector]) const {
    const Touch touch = touch_at(*this, touches, i);
    const int64_t column = at.table(touch.bag.f, touch.k).column;
    const int64_t first = touch.bag.b * columns + column + touch.chunk * width + z;
    load_share(grad, argmax, sample_weights, first, touch.n, to);
    const real divisor = at.template divisor<real>(touch.bag.f, touch.bag.b, pooling);
    return touch.negative ? -divisor : divisor;
  }
};

template <typename number_t, int kVector, typename real>
__device__ bool sum_run(const Shares<number_t>& shares, const Touches& touches, int64_t first, int width, int z,
                        real (&sum)[kVector]) {
  const int64_t slot = touches.slot(first);
  const real divisor = shares.load_touch(touches, first, width, z, sum);
  if (divisor != 1) {
    for (int i = 0; i < kVector; ++i) sum[i] /= divisor;
  }
  if (!touches.continues(first + 1, slot)) return false;  // most slots of a large table
  add_ahead(sum, [&](int64_t i, real(&v)[kVector]) {
    const int64_t j = first + 1 + i;
    return j < first + kRun && touches.continues(j, slot) ? shares.load_touch(touches, j, width, z, v) : real(0);
  });
  return touches.continues(first + kRun, slot);
}

// rows[i] = units of the slot that begins at touch i, 0 if none does.
template <typename Batch>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(Batch batch, Touches touches, int64_t* __restrict__ rows, int lanes) {
  const Group group = group_of(lanes);
  for (int64_t i = group.index; i < touches.count; i += group.count) {
    rows[i] = touches.begins_slot(i) ? width_at(batch, touches, i) / batch.unit : 0;
  }
}

// partial [M / kRun, reach]: the first `reach` numbers of every run that is not its slot's first; row q is that of
// Touches::later_run(q).
template <typename Lookup>
__global__ void __launch_bounds__(kThreads)
    later_runs_kernel(Lookup lookup, Touches touches, typename Lookup::real* __restrict__ partial, int64_t reach,
                      int lanes) {
  const Group group = group_of(lanes);
  for (int64_t q = group.index; q * kRun < touches.count; q += group.count) {
    const int64_t i = touches.later_run(q);
    if (i < 0) continue;
    const int64_t width = width_at(lookup, touches, i);
    for_each_pack<typename Lookup::weight_t>(group, width, width < reach ? width : reach, [&](auto pack, int z) {
      typename Lookup::real run[pack];
      sum_run(lookup, touches, i, static_cast<int>(width), z, run);
      store(partial + q * reach + z, run);
    });
  }
}

// The sum of each touched slot: its runs, left to right.
template <typename Lookup>
struct SlotSums {
  using real = typename Lookup::real;
  using weight_t = typename Lookup::weight_t;
  Lookup lookup;
  Touches touches;
  const real* __restrict__ partial;  // of later_runs_kernel
  int64_t reach;

  // Numbers of the slot that begins at touch `first`.
  __device__ int64_t width(int64_t first) const { return width_at(lookup, touches, first); }
  // Numbers z.. of its sum.
  template <int kVector>
  __device__ void sum(int64_t first, int64_t width, int z, real (&sum)[kVector]) const {
    bool goes_on = true;
    for (int64_t i = first; goes_on; i += kRun) {
      real run[kVector];
      goes_on = sum_run(lookup, touches, i, static_cast<int>(width), z, run);
      for (int j = 0; j < kVector; ++j) sum[j] = i == first ? run[j] : sum[j] + run[j];
      if (z < reach) break;
    }
    if (!goes_on) return;
    const int64_t slot = touches.slot(first);
    add_ahead(sum, [&](int64_t r, real(&run)[kVector]) {
      const int64_t i = first + (r + 1) * kRun;
      if (!touches.continues(i, slot)) return real(0);
      load(partial + i / kRun * reach + z, run);
      return real(1);
    });
  }
};

// Each touched slot's sum into the dense gradient [S, Z], or (rows [M] given, summed up to each touch) into values
// [U, Z] and, if given, units [U].
template <typename Lookup, typename number_t>
__global__ void __launch_bounds__(kThreads)
    slots_kernel(SlotSums<Lookup> sums, const int64_t* __restrict__ rows, int64_t* __restrict__ units,
                 number_t* __restrict__ values, int lanes) {
  const Group group = group_of(lanes);
  const Touches& touches = sums.touches;
  for (int64_t first = group.index; first < touches.count; first += group.count) {
    if (!touches.begins_slot(first)) continue;
    const int64_t unit = sums.lookup.unit, width = sums.width(first), num_units = width / unit;
    const int64_t slot = touches.slot(first);
    const int64_t row = rows ? rows[first] - num_units : slot;
    if (units) {
      for (int64_t u = group.lane; u < num_units; u += group.lanes) units[row + u] = slot + u;
    }
    for_each_pack<typename Lookup::weight_t>(group, width, width, [&](auto pack, int z) {
      typename Lookup::real sum[pack];
      sums.sum(first, width, z, sum);
      store(values + row * unit + z, sum);
    });
  }
}

// The touches, sorted by slot, with the tensors that hold them.
struct SortedTouches {
  Touches touches{};
  std::vector<Tensor> memory;

  template <typename number_t = int64_t>
  number_t* allocate(const Call& call, int64_t numbers) {
    constexpr int64_t kPerWord = sizeof(int64_t) / sizeof(number_t);
    memory.push_back(scratch(call, (numbers + kPerWord - 1) / kPerWord));
    return static_cast<number_t*>(memory.back().mutable_data_ptr());
  }
};

template <typename Map>
SortedTouches sort_touches(const Launch& launch, const Call& call, const Batch<Map>& batch) {
  SortedTouches sorted;
  Touches& touches = sorted.touches;
  const int64_t num_bags = call.at.num_features * call.at.batch_size;
  touches.num_occurrences = call.offsets ? call.at.num_ids : num_bags;
  touches.count = touches.num_occurrences * call.at.probes * call.chunks;
  if (touches.count == 0) return sorted;
  require(std::max(touches.count, num_bags) < int64_t{1} << 31,
          "a batch may have at most 2^31 bags and read at most 2^31 slots of a slab on CUDA");
  if (call.offsets) {
    touches.bags = sorted.allocate<uint32_t>(call, touches.num_occurrences);
    touches.shifts = sorted.allocate(call, call.at.num_features);
    launch(shift_kernel<Map>, {call.at.num_features}, 1, batch, touches.shifts);
  }
  touches.is_wide = call.num_units > kNarrowUnits;
  const auto write_and_sort = [&](auto key) {
    using key_t = decltype(key);
    const int64_t count = touches.count;
    cub::DoubleBuffer<key_t> slots(sorted.allocate<key_t>(call, count), sorted.allocate<key_t>(call, count));
    cub::DoubleBuffer<uint32_t> order(sorted.allocate<uint32_t>(call, count), sorted.allocate<uint32_t>(call, count));
    touches.slots = slots.Current(), touches.order = order.Current();
    check(cudaMemsetAsync(touches.slots, 0xff, count * sizeof(key_t), launch.stream()));  // kNoSlot
    check(cudaMemsetAsync(touches.order, 0, count * sizeof(uint32_t), launch.stream()));
    launch(touch_kernel<Map>, {call.at.batch_size, call.at.num_features * call.at.probes}, lanes_for(call.chunks),
           batch, touches);

    const int bits = std::bit_width(static_cast<uint64_t>(call.num_units) | 1);  // all set in kNoSlot, so it is last
    with_scratch(call, [&](void* memory, size_t& size) {
      return cub::DeviceRadixSort::SortPairs(memory, size, slots, order, count, 0, bits, launch.stream());
    });
    touches.slots = slots.Current(), touches.order = order.Current();
  };
  touches.is_wide ? write_and_sort(uint64_t{}) : write_and_sort(uint32_t{});
  return sorted;
}

// Sums all runs but the slots' first ones, if anything is touched; the rest is for kernels that take the result.
template <typename Lookup>
SlotSums<Lookup> sums_of_slots(const Launch& launch, const Call& call, const Lookup& lookup, SortedTouches& sorted) {
  using real = typename Lookup::real;
  const Touches& touches = sorted.touches;
  // How many numbers of a slot have their later runs summed side by side; a wider slot's rest is summed run after run.
  // 128 floats for kRun touches are no more memory than another array of touches.
  const Typical<typename Lookup::weight_t> typical(call);
  const int64_t widest = std::max(call.columns, call.at.probes);
  const int64_t reach = (std::min(std::max<int64_t>(typical.dim, 128), widest) + 31) / 32 * 32;
  const int64_t num_blocks = (touches.count + kRun - 1) / kRun;
  real* partial = sorted.allocate<real>(call, num_blocks * reach);
  launch(later_runs_kernel<Lookup>, {num_blocks}, typical.slot_lanes(), lookup, touches, partial, reach);
  return {lookup, touches, partial, reach};
}

// Calls function(what touches pass back): `Shares`, or the lookup where its weights are read, too.
template <typename Lookup, typename Function>
void with_passed_back(const Call& call, const Lookup& lookup, Function function) {
  if (reads_others(call)) {
    if constexpr (Lookup::kAdds) function(lookup);
  } else {
    function(Shares<typename Lookup::weight_t>(lookup));
  }
}

// For each touch that begins a slot: the units of all slots up to it [M]; the last is how many units are touched.
template <typename Lookup>
int64_t* number_rows(const Launch& launch, const Call& call, const Lookup& lookup, SortedTouches& sorted) {
  using Widths = Shares<typename Lookup::weight_t>;
  const int64_t count = sorted.touches.count;
  auto* rows = sorted.allocate(call, count);
  launch(rows_kernel<Widths>, {count}, 1, Widths(lookup), sorted.touches, rows);
  with_scratch(call, [&](void* memory, size_t& bytes) {
    return cub::DeviceScan::InclusiveSum(memory, bytes, rows, rows, count, launch.stream());
  });
  return rows;
}

}  // namespace embeddings::inline cuda
