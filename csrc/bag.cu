// The CUDA kernels: the operators of bag.cpp, in the same order of sums, so that their bits are the CPU's. A bag, a
// touched slot or a run of touches is the work of a group of `lanes` threads, each of which takes 16 bytes of numbers
// at a time where the slots' width allows.
#include <algorithm>
#include <bit>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "lookup.h"

namespace embeddings {
namespace {

constexpr int kThreads = 256;

// --- forward ---------------------------------------------------------------------------------------------------------

// out [B, columns]
template <typename Lookup>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(Lookup lookup, typename Lookup::real* __restrict__ out, int lanes) {
  const Group group = group_of(lanes);
  lookup.for_each_bag(group, lookup.parts(), [&](const Bag& bag, int64_t part) {
    const Table& table = lookup.at.table(bag.f, part);
    const int64_t count = lookup.pooling == kMean ? bag.end - bag.begin : 1;
    lookup.for_each_pack(group, table.width, table.dim, [&](auto pack, int d) {
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

// out [B, columns] if given; argmax [B, columns], the position of each maximum (-1 in an empty bag), if given. The
// first of equals wins, and a NaN, once met, stays.
template <typename Lookup>
__global__ void __launch_bounds__(kThreads)
    max_kernel(Lookup lookup, typename Lookup::real* __restrict__ out, int64_t* __restrict__ argmax, int lanes) {
  const Group group = group_of(lanes);
  lookup.for_each_bag(group, lookup.parts(), [&](const Bag& bag, int64_t part) {
    const Table& table = lookup.at.table(bag.f, part);
    lookup.for_each_pack(group, table.width, table.dim, [&](auto pack, int d) {
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

// --- gradients by atomics --------------------------------------------------------------------------------------------

// to[i] += v[i]. Threads of a warp that meet at one slot, as those of a hot id do, add up first and then write once.
template <typename real, int kVector>
__device__ void add_atomically(real* to, const real (&v)[kVector]) {
  namespace cg = cooperative_groups;
  const auto group = cg::labeled_partition(cg::coalesced_threads(), to);
  for (int i = 0; i < kVector; ++i) {
    const real sum = group.size() == 1 ? v[i] : cg::reduce(group, v[i], cg::plus<real>());
    if (group.thread_rank() == 0 && sum != real(0)) atomicAdd(to + i, sum);
  }
}

// to [S, Z] += every contribution, in no fixed order.
template <typename Lookup>
__global__ void __launch_bounds__(kThreads)
    atomic_kernel(Lookup lookup, typename Lookup::real* __restrict__ to, int lanes) {
  const Group group = group_of(lanes);
  lookup.for_each_bag(group, lookup.at.probes, [&](const Bag& bag, int64_t k) {
    const Table& table = lookup.at.table(bag.f, k);
    lookup.for_each_id(bag, [&](int64_t n, int64_t id) {
      const uint64_t key = lookup.map.key(table, id);
      lookup.for_each_pack(group, table.width, table.dim, [&](auto pack, int d) {
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

// --- gradients by sorted sums ----------------------------------------------------------------------------------------

// A touch is one chunk of one probe of an id. Its number: (occurrence * K + probe) * chunks + chunk. Occurrences number
// the slab's ids by feature, sample and position: without offsets they are the bags f * B + b, with offsets the
// positions, shifted so that the features' ranges follow one another in the slab's order.
struct Touches {
  uint64_t* slots;  // [M] first unit of the slot, kNoSlot where there is no touch of that number
  uint64_t* order;  // [M] touch number * 2, + 1 if its numbers count negatively
  int64_t* bags;    // [N] bag f * B + b of each occurrence; nullptr without offsets
  int64_t* shifts;  // [F] occurrence - position; nullptr without offsets
  int64_t count, num_occurrences;

  static constexpr uint64_t kNoSlot = ~0ull;

  // The rest is for touches that are sorted by slot.
  __device__ bool begins_slot(int64_t i) const { return slots[i] != kNoSlot && (i == 0 || slots[i - 1] != slots[i]); }
  // The touch in [q * kRun, + kRun) that begins a run, but not its slot's first one; -1 if none does. There is at most
  // one: it is of the slot at q * kRun, as a slot that begins later has its second run beyond.
  __device__ int64_t later_run(int64_t q) const {
    const int64_t block = q * kRun;
    const uint64_t slot = slots[block];
    if (slot == kNoSlot || block == 0 || slots[block - 1] != slot) return -1;
    int64_t first = 0, last = block;  // the slot begins in [first, last]
    while (first < last) {
      const int64_t middle = (first + last) / 2;
      if (slots[middle] < slot) {
        first = middle + 1;
      } else {
        last = middle;
      }
    }
    const int64_t i = first + (block - first + kRun - 1) / kRun * kRun;
    return i < count && slots[i] == slot ? i : -1;
  }
};

struct Touch {
  Bag bag;  // without its positions
  int64_t n, k;
  int chunk;
  bool negative;
};

template <typename Map>
__device__ Touch touch_at(const Batch<Map>& batch, const Touches& touches, int64_t i) {
  const Ids& at = batch.at;
  const auto number = static_cast<int64_t>(touches.order[i] / 2), vector = number / batch.chunks;
  const int64_t occurrence = vector / at.probes, bag = touches.bags ? touches.bags[occurrence] : occurrence;
  const int64_t f = bag / at.batch_size, b = bag % at.batch_size;
  const int64_t n = touches.shifts ? occurrence - touches.shifts[f] : at.begin(f, b);
  return {{f, b, 0, 0}, n, vector % at.probes, static_cast<int>(number % batch.chunks), touches.order[i] % 2 == 1};
}

template <typename Map>
__device__ int64_t width_at(const Batch<Map>& batch, const Touches& touches, int64_t i) {
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
    const Table& table = at.table(bag.f, k);
    if (touches.shifts) {
      const Bag whole = batch.whole(bag.f);
      const bool fits = whole.end + touches.shifts[bag.f] <= touches.num_occurrences;
      if (bag.begin < whole.begin || bag.end > whole.end || !fits) return;  // something else is wrong, and noted
    }
    const int64_t number_of_bag = bag.f * at.batch_size + bag.b;
    batch.for_each_id(bag, [&](int64_t n, int64_t id) {
      const int64_t occurrence = touches.shifts ? n + touches.shifts[bag.f] : number_of_bag;
      if (touches.bags && k == 0 && group.lane == 0) touches.bags[occurrence] = number_of_bag;
      const uint64_t key = batch.map.key(table, id);
      for (int64_t chunk = group.lane; chunk < table.chunks(); chunk += group.lanes) {
        const Read read = batch.map.read(table, key, chunk);
        const int64_t number = (occurrence * at.probes + k) * batch.chunks + chunk;
        touches.slots[number] = static_cast<uint64_t>((table.begin + read.slot * table.width) / batch.unit);
        touches.order[number] = static_cast<uint64_t>(number) * 2 + read.negative;
      }
    });
  });
}

// rows[i] = units of the slot that begins at touch i, 0 if none does.
template <typename Map>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(Batch<Map> batch, Touches touches, int64_t* __restrict__ rows, int lanes) {
  const Group group = group_of(lanes);
  for (int64_t i = group.index; i < touches.count; i += group.count) {
    rows[i] = touches.begins_slot(i) ? width_at(batch, touches, i) / batch.unit : 0;
  }
}

// Numbers z.. of the run that begins at touch `first`: up to kRun contributions to one slot, left to right.
template <typename Lookup, int kVector, typename real>
__device__ void sum_run(const Lookup& lookup, const Touches& touches, int64_t first, int width, int z,
                        real (&sum)[kVector]) {
  const uint64_t slot = touches.slots[first];
  for (int64_t j = first; j < touches.count && j < first + kRun && touches.slots[j] == slot; ++j) {
    const Touch touch = touch_at(lookup, touches, j);
    real v[kVector];
    lookup.contribution(touch.bag, touch.n, touch.k, touch.chunk * width + z, v);
    negate_if(touch.negative, v);
    for (int i = 0; i < kVector; ++i) sum[i] = j == first ? v[i] : sum[i] + v[i];
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
    lookup.for_each_pack(group, width, width < reach ? width : reach, [&](auto pack, int z) {
      typename Lookup::real run[pack];
      sum_run(lookup, touches, i, static_cast<int>(width), z, run);
      store(partial + q * reach + z, run);
    });
  }
}

// Each touched slot's runs, left to right, into the dense gradient [S, Z], or (rows [M] given, summed up to each touch)
// into units [U] and values [U, Z].
template <typename Lookup>
__global__ void __launch_bounds__(kThreads)
    slots_kernel(Lookup lookup, Touches touches, const typename Lookup::real* __restrict__ partial, int64_t reach,
                 const int64_t* __restrict__ rows, int64_t* __restrict__ units,
                 typename Lookup::weight_t* __restrict__ values, int lanes) {
  const Group group = group_of(lanes);
  for (int64_t first = group.index; first < touches.count; first += group.count) {
    if (!touches.begins_slot(first)) continue;
    const int64_t width = width_at(lookup, touches, first), num_units = width / lookup.unit;
    const auto slot = static_cast<int64_t>(touches.slots[first]);
    const int64_t row = rows ? rows[first] - num_units : slot;
    if (rows) {
      for (int64_t u = group.lane; u < num_units; u += group.lanes) units[row + u] = slot + u;
    }
    lookup.for_each_pack(group, width, width, [&](auto pack, int z) {
      typename Lookup::real sum[pack], run[pack];
      for (int64_t i = first; i < touches.count && touches.slots[i] == touches.slots[first]; i += kRun) {
        if (i == first || z >= reach) {
          sum_run(lookup, touches, i, static_cast<int>(width), z, run);
        } else {
          load(partial + i / kRun * reach + z, run);
        }
        for (int j = 0; j < pack; ++j) sum[j] = i == first ? run[j] : sum[j] + run[j];
      }
      store(values + row * lookup.unit + z, sum);
    });
  }
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
        lookup.for_each_pack(group, table.width, table.dim, [&](auto pack, int d) {
          real v[pack], g[pack];
          lookup.vector(bag.f, part, id, d, v);
          load(lookup.grad + bag.b * lookup.columns + table.column + d, g);
          for (int i = 0; i < pack; ++i) sum.add({v[i] * g[i] / divisor});
        });
      }
      real total[1];
      sum.finish(total);
      out[n] = total[0];
    });
  });
}

// --- launches --------------------------------------------------------------------------------------------------------

void check(cudaError_t error) {
  if (error != cudaSuccess) fail("CUDA: ", cudaGetErrorString(error));
}

// The device and stream of one call.
class Launch {
 public:
  explicit Launch(const Tensor& on) : guard_(on.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

  // Runs kernel(arguments..., lanes) over `work` groups of `lanes` threads, if there is any.
  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t work, int lanes, Arguments... arguments) const {
    if (work == 0) return;
    const int64_t needed = (work * lanes + kThreads - 1) / kThreads;
    const auto blocks = static_cast<unsigned>(std::min(needed, kMaxBlocks));
#ifdef __CUDACC__
    kernel<<<blocks, kThreads, 0, stream_>>>(arguments..., lanes);
#else
    launch_on_host(blocks, kThreads, [&] { kernel(arguments..., lanes); });
#endif
    check(cudaGetLastError());
  }

 private:
  static constexpr int64_t kMaxBlocks = 1 << 20;  // kernels stride over the rest
  DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Threads for so many packs of numbers: a power of two, at most a warp.
int lanes_for(int64_t packs) {
  return static_cast<int>(std::bit_ceil(static_cast<uint64_t>(std::clamp<int64_t>(packs, 1, 32))));
}

// Sizes of the slab if its features are alike. The host does not see the tables: these decide how fast a call is, not
// what it gives.
template <typename Lookup>
struct Typical {
  int64_t parts, dim, width;

  explicit Typical(const Call& call) {
    parts = call.at.num_features * (call.combine == kConcat ? call.at.probes : 1);
    dim = std::max<int64_t>(call.columns / std::max<int64_t>(parts, 1), 1);
    width = std::max<int64_t>(dim / call.chunks, 1);
  }
  int lanes(int64_t numbers) const {
    constexpr int64_t kWide = 16 / sizeof(typename Lookup::weight_t);
    return lanes_for(width % kWide == 0 ? numbers / kWide : numbers);
  }
};

Tensor scratch(const Call& call, int64_t numbers) {
  return torch::stable::new_empty(call.weights, {numbers}, ScalarType::Long);
}

// Two-phase cub calls: how much scratch memory, then the work.
template <typename Work>
void with_scratch(const Call& call, Work work) {
  size_t bytes = 0;
  check(work(nullptr, bytes));
  Tensor memory = scratch(call, static_cast<int64_t>(bytes / sizeof(int64_t) + 1));
  check(work(memory.mutable_data_ptr(), bytes));
}

// The record of a slab, named by its features; never freed, since a captured graph may still write to it. Raises what
// an earlier call left in it.
FirstError* error_of(const std::string& features) {
  static std::mutex lock;
  static std::map<std::string, FirstError*> records;
  std::lock_guard<std::mutex> guard(lock);
  FirstError*& record = records[features];
  if (record == nullptr) {
    void* memory = nullptr;
    check(cudaHostAlloc(&memory, sizeof(FirstError), cudaHostAllocMapped | cudaHostAllocPortable));
    record = new (memory) FirstError{};
  }
  if (__atomic_load_n(&record->state, __ATOMIC_ACQUIRE) == 2) {
    const FirstError error = *record;
    __atomic_store_n(&record->state, 0, __ATOMIC_RELEASE);  // last: from here on a kernel may write it again
    error.raise(features);
  }
  return record;
}

// Calls function(lookup). grad: `summable`, or nothing in a forward.
template <typename Function>
void with_lookup(const Call& call, const std::optional<Tensor>& grad, Function function) {
  require(call.columns <= INT32_MAX, "columns must be less than 2^31");
  const int64_t num_positions = call.at.batch_size == 0 ? 0 : call.at.num_bags / call.at.batch_size;
  FirstError* error = error_of(call.features);
  with_dtype_and_map(call, [&](auto weight, auto map) {
    using weight_t = decltype(weight);
    using real = typename Accumulator<weight_t>::type;
    using Map = decltype(map);
    const Batch<Map> batch{call.at,      map,          call.unit,     call.columns, call.chunks,
                           call.combine, call.pooling, num_positions, error};
    const weight_t* slab = call.weights_at<weight_t>();
    const real *sample_weights = call.sample_weights_at<real>(), *g = grad ? grad->const_data_ptr<real>() : nullptr;
    if (call.combine == kConcat || call.at.probes == 1) {
      function(Lookup<weight_t, Map, false>{batch, slab, sample_weights, g, nullptr});
    } else {
      function(Lookup<weight_t, Map, true>{batch, slab, sample_weights, g, nullptr});
    }
  });
}

// Gives a backward of max pooling the positions of the maxima [B, columns]; returns their memory.
template <typename Lookup>
std::optional<Tensor> find_argmax(const Launch& launch, const Call& call, Lookup& lookup) {
  if (call.pooling != kMax) return std::nullopt;
  Tensor argmax = scratch(call, call.at.batch_size * call.columns);
  auto* to = argmax.mutable_data_ptr<int64_t>();
  const Typical<Lookup> typical(call);
  launch(max_kernel<Lookup>, typical.parts * call.at.batch_size, typical.lanes(typical.dim), lookup, nullptr, to);
  lookup.argmax = to;
  return argmax;
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
  const Typical<Lookup> typical(call);
  launch(atomic_kernel<Lookup>, call.at.num_features * call.at.probes * call.at.batch_size, typical.lanes(typical.dim),
         lookup, to);
  if constexpr (!kExact) {
    launch(convert_kernel<real, weight_t>, numbers, 1, to, out.mutable_data_ptr<weight_t>(), numbers);
  }
}

// The touches, sorted by slot, with the tensors that hold them.
struct SortedTouches {
  Touches touches{};
  std::vector<Tensor> memory;

  int64_t* allocate(const Call& call, int64_t numbers) {
    memory.push_back(scratch(call, numbers));
    return memory.back().mutable_data_ptr<int64_t>();
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
  if (call.offsets) {
    touches.bags = sorted.allocate(call, touches.num_occurrences);
    touches.shifts = sorted.allocate(call, call.at.num_features);
    launch(shift_kernel<Map>, call.at.num_features, 1, batch, touches.shifts);
  }
  auto allocate = [&] { return reinterpret_cast<uint64_t*>(sorted.allocate(call, touches.count)); };
  cub::DoubleBuffer<uint64_t> slots(allocate(), allocate()), order(allocate(), allocate());
  touches.slots = slots.Current(), touches.order = order.Current();
  const size_t bytes = static_cast<size_t>(touches.count) * sizeof(uint64_t);
  check(cudaMemsetAsync(touches.slots, 0xff, bytes, launch.stream()));  // kNoSlot
  check(cudaMemsetAsync(touches.order, 0, bytes, launch.stream()));
  launch(touch_kernel<Map>, num_bags * call.at.probes, lanes_for(call.chunks), batch, touches);

  const int bits = std::bit_width(static_cast<uint64_t>(call.num_units) | 1);  // all set in kNoSlot, so it is last
  with_scratch(call, [&](void* memory, size_t& size) {
    return cub::DeviceRadixSort::SortPairs(memory, size, slots, order, touches.count, 0, bits, launch.stream());
  });
  touches.slots = slots.Current(), touches.order = order.Current();
  return sorted;
}

// Sums the sorted touches into values: [S, Z], or [U, Z] with their units where rows [M] numbers them.
template <typename Lookup>
void sum_touches(const Launch& launch, const Call& call, const Lookup& lookup, const Touches& touches,
                 const int64_t* rows, int64_t* units, typename Lookup::weight_t* values) {
  if (touches.count == 0) return;
  // How many numbers of a slot have their later runs summed side by side; a wider slot's rest is summed run after run.
  // 128 floats for kRun touches are no more memory than another array of touches.
  const Typical<Lookup> typical(call);
  const int64_t widest = std::max(call.columns, call.at.probes);
  const int64_t reach = (std::min(std::max<int64_t>(typical.dim, 128), widest) + 31) / 32 * 32;
  const int64_t num_blocks = (touches.count + kRun - 1) / kRun;
  Tensor memory = scratch(call, num_blocks * reach * static_cast<int64_t>(sizeof(typename Lookup::real)) / 8);
  auto* partial = static_cast<typename Lookup::real*>(memory.mutable_data_ptr());
  const int lanes = typical.lanes(typical.width);
  launch(later_runs_kernel<Lookup>, num_blocks, lanes, lookup, touches, partial, reach);
  launch(slots_kernel<Lookup>, touches.count, lanes, lookup, touches, partial, reach, rows, units, values);
}

// --- the operators: arguments as in embeddings/ops.py ----------------------------------------------------------------

void forward(const Launch& launch, const Call& call, Tensor& out) {
  with_lookup(call, std::nullopt, [&](auto lookup) {
    using Lookup = decltype(lookup);
    const Typical<Lookup> typical(call);
    const int64_t work = typical.parts * call.at.batch_size;
    auto* to = out.mutable_data_ptr<typename Lookup::real>();
    if (call.pooling == kMax) {
      launch(max_kernel<Lookup>, work, typical.lanes(typical.dim), lookup, to, nullptr);
    } else {
      launch(sum_kernel<Lookup>, work, typical.lanes(typical.dim), lookup, to);
    }
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

Tensor bag_backward(const Tensor& grad, const Tensor& weights, const Tensor& ids, std::optional<Tensor> offsets,
                    std::optional<Tensor> sample_weights, const Tensor& tables, int64_t probes, int64_t chunks,
                    int64_t index_map, int64_t combine, int64_t pooling, bool atomic, Names features) {
  const Launch launch(weights);
  const Layout layout{probes, chunks, index_map, combine, pooling};
  const Call call = make_backward_call(grad, weights, ids, offsets, sample_weights, tables, layout, features);
  const Tensor dense = summable(grad, weights);
  Tensor out = torch::stable::new_zeros(weights, {call.num_units, call.unit});
  with_lookup(call, dense, [&](auto lookup) {
    const auto argmax = find_argmax(launch, call, lookup);
    if (atomic) return atomic_backward(launch, call, lookup, out);
    const SortedTouches sorted = sort_touches(launch, call, lookup);
    using weight_t = typename decltype(lookup)::weight_t;
    sum_touches(launch, call, lookup, sorted.touches, nullptr, nullptr, out.mutable_data_ptr<weight_t>());
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
  with_lookup(call, dense, [&](auto lookup) {
    const auto argmax = find_argmax(launch, call, lookup);
    const SortedTouches sorted = sort_touches(launch, call, lookup);
    const int64_t count = sorted.touches.count;
    Tensor memory = scratch(call, count);
    auto* rows = memory.mutable_data_ptr<int64_t>();
    int64_t num_touched = 0;
    if (count > 0) {
      launch(rows_kernel<decltype(lookup.map)>, count, 1, lookup, sorted.touches, rows);
      with_scratch(call, [&](void* temporary, size_t& bytes) {
        return cub::DeviceScan::InclusiveSum(temporary, bytes, rows, rows, count, launch.stream());
      });
      check(cudaMemcpyAsync(&num_touched, rows + count - 1, sizeof(num_touched), cudaMemcpyDeviceToHost,
                            launch.stream()));
      check(cudaStreamSynchronize(launch.stream()));
    }
    units = torch::stable::new_empty(weights, {num_touched}, ScalarType::Long);
    values = torch::stable::new_empty(weights, {num_touched, call.unit});
    sum_touches(launch, call, lookup, sorted.touches, rows, units.mutable_data_ptr<int64_t>(),
                values.mutable_data_ptr<typename decltype(lookup)::weight_t>());
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
  with_lookup(call, dense, [&](auto lookup) {
    using Lookup = decltype(lookup);
    launch(sample_weights_kernel<Lookup>, call.at.num_features * call.at.batch_size, 1, lookup,
           out.mutable_data_ptr<typename Lookup::real>());
  });
  return in_dtype(out, grad.scalar_type());
}

void raise_noted(const Tensor& weights, Names features) {
  const Launch launch(weights);
  check(cudaStreamSynchronize(launch.stream()));
  error_of(features);
}

}  // namespace
}  // namespace embeddings

STABLE_TORCH_LIBRARY_IMPL(EMBEDDINGS_LIBRARY, EMBEDDINGS_DEVICE, m) {
  m.impl("bag", TORCH_BOX(&embeddings::bag));
  m.impl("bag_into", TORCH_BOX(&embeddings::bag_into));
  m.impl("bag_backward", TORCH_BOX(&embeddings::bag_backward));
  m.impl("bag_backward_rows", TORCH_BOX(&embeddings::bag_backward_rows));
  m.impl("bag_backward_sample_weights", TORCH_BOX(&embeddings::bag_backward_sample_weights));
  m.impl("raise_noted", TORCH_BOX(&embeddings::raise_noted));
}
