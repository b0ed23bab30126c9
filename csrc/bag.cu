// The CUDA kernels: the operators of bag.cpp, in the same order of sums, so that their bits are the CPU's.
// A bag, a touched slot or a run of 64 touches is the work of `lanes` threads, each holding kVector numbers of the dim.
#include <cuda_runtime.h>

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>

#include "bag.h"

namespace embeddings {
namespace {

constexpr int kThreads = 256;

void check(cudaError_t error) {
  if (error != cudaSuccess) fail("CUDA: ", cudaGetErrorString(error));
}

// --- errors without a host synchronisation ---------------------------------------------------------------------------

// The first bad id that a slab's kernels met. In mapped host memory: a kernel writes it, the next call on the slab
// reads and raises it. Kernels skip bad ids, so nothing is read or written out of bounds and the CUDA context stays
// usable.
struct BadId {
  int state;  // 0 none, 1 being written, 2 complete
  int is_id;
  int64_t table, place, first, second;  // as CPU FirstError: id and limit, or begin and end of a bag
};

// One record per slab, named by its features; never freed, since a captured graph may still write to it.
BadId* bad_id_of(const Call& call) {
  static std::mutex lock;
  static std::map<std::string, BadId*> records;
  std::lock_guard<std::mutex> guard(lock);
  BadId*& record = records[call.features];
  if (record == nullptr) {
    check(cudaHostAlloc(reinterpret_cast<void**>(&record), sizeof(BadId), cudaHostAllocMapped | cudaHostAllocPortable));
    *record = BadId{};
  }
  if (__atomic_load_n(&record->state, __ATOMIC_ACQUIRE) == 2) {
    const BadId bad = *record;
    __atomic_store_n(&record->state, 0, __ATOMIC_RELEASE);  // last: from here on a kernel may write it again
    if (bad.is_id) call.fail_id(bad.table, bad.place, bad.first, bad.second);
    call.fail_offsets(bad.table, bad.place, bad.first, bad.second);
  }
  return record;
}

__device__ void note(BadId* bad, int64_t table, int64_t place, int64_t first, int64_t second, bool is_id) {
  if (atomicCAS_system(&bad->state, 0, 1) != 0) return;
  bad->is_id = is_id, bad->table = table, bad->place = place, bad->first = first, bad->second = second;
  __threadfence_system();
  atomicExch_system(&bad->state, 2);
}

// Also notes, once per feature, a feature that the batch has no bags for, and offsets that do not cover all ids.
__device__ bool valid_bag(const Ids& at, int64_t f, int64_t b, BadId* bad) {
  const int64_t position = at.tables[f].position;
  if (position < 0 || (position + 1) * at.batch_size > at.num_bags) {
    note(bad, f, b, position, at.num_bags / at.batch_size, false);
    return false;
  }
  if (b == 0 && at.offsets && (at.offsets[0] != 0 || at.offsets[at.num_bags] != at.num_ids)) {
    note(bad, f, b, at.offsets[0], at.offsets[at.num_bags], false);
  }
  const int64_t begin = at.begin(f, b), end = at.end(f, b);
  if (begin >= 0 && begin <= end && end <= at.num_ids) return true;
  note(bad, f, b, begin, end, false);
  return false;
}

template <typename Map>
__device__ bool valid_id(const Ids& at, int64_t f, int64_t n, int64_t id, BadId* bad) {
  if (!Map::ranged || (id >= 0 && id < at.tables[f].num_embeddings)) return true;
  note(bad, f, n, id, at.tables[f].num_embeddings, true);
  return false;
}

// --- what the kernels share
// -------------------------------------------------------------------------------------------

// kVector numbers that are loaded and stored at once: 16 bytes where rows allow.
template <typename weight_t, int kVector>
struct alignas(sizeof(weight_t) * kVector) Pack {
  weight_t at[kVector];
};

// Sums in the order of index_map.h, kVector numbers at a time.
template <typename real, int kVector>
struct OrderedSum {
  real total[kVector], run[kVector];
  int64_t count = 0;

  __device__ void add(const real (&v)[kVector]) {
    if (count % kRun == 0) {
      if (count) close_run();
      for (int i = 0; i < kVector; ++i) run[i] = v[i];
    } else {
      for (int i = 0; i < kVector; ++i) run[i] += v[i];
    }
    ++count;
  }
  __device__ void finish(real (&sum)[kVector]) {
    if (count > kRun) close_run();
    for (int i = 0; i < kVector; ++i) sum[i] = count == 0 ? real(0) : count > kRun ? total[i] : run[i];
  }
  __device__ void close_run() {
    const bool first = count <= kRun;
    for (int i = 0; i < kVector; ++i) total[i] = first ? run[i] : total[i] + run[i];
  }
};

template <typename real>
__device__ bool replaces(real v, real best) {
  return best == best && !(v <= best);
}

// Sizes that every kernel needs, beside the ids.
struct Shape {
  int64_t dim, width, chunks, pooling;
  int lanes;  // threads per row of dim (or width) numbers: a power of two, at most a warp
};

// Weight of position n's vector: v * this / count.
template <typename weight_t, typename real>
__device__ real sample_weight(const weight_t* sample_weights, int64_t n) {
  return sample_weights ? static_cast<real>(sample_weights[n]) : real(1);
}

__device__ int64_t group_index(const Shape& shape) {
  return (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) / shape.lanes;
}
__device__ int64_t num_groups(const Shape& shape) {
  return gridDim.x * int64_t(blockDim.x) / shape.lanes;
}
__device__ int lane_index(const Shape& shape) {
  return threadIdx.x % shape.lanes;
}

// Loads kVector numbers of id's vector, from number d on.
template <typename weight_t, typename Map, int kVector, typename real>
__device__ void load(const weight_t* slab, const Table& table, uint64_t key, int64_t width, int64_t d,
                     real (&to)[kVector]) {
  const int64_t slot = table.first_slot + Map::slot(table, key, d / width);
  const auto pack = *reinterpret_cast<const Pack<weight_t, kVector>*>(slab + slot * width + d % width);
  for (int i = 0; i < kVector; ++i) to[i] = static_cast<real>(pack.at[i]);
}

template <typename weight_t, int kVector, typename real>
__device__ void store(weight_t* to, const real (&from)[kVector]) {
  Pack<weight_t, kVector> pack;
  for (int i = 0; i < kVector; ++i) pack.at[i] = static_cast<weight_t>(from[i]);
  *reinterpret_cast<Pack<weight_t, kVector>*>(to) = pack;
}

// --- forward
// ----------------------------------------------------------------------------------------------------------

// out [B, F, D] if given; argmax [F * B, D], the position of each maximum, if given (-1 in an empty bag).
template <typename weight_t, typename Map, int kVector>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(Ids at, Shape shape, const weight_t* __restrict__ slab, const weight_t* __restrict__ sample_weights,
                   weight_t* __restrict__ out, int64_t* __restrict__ argmax, BadId* bad) {
  using real = typename Accumulator<weight_t>::type;
  const int64_t num_bags = at.num_tables * at.batch_size;
  for (int64_t bag = group_index(shape); bag < num_bags; bag += num_groups(shape)) {
    const int64_t f = bag / at.batch_size, b = bag % at.batch_size;
    const bool valid = valid_bag(at, f, b, bad);
    const Table table = at.tables[f];
    const int64_t begin = valid ? at.begin(f, b) : 0, end = valid ? at.end(f, b) : 0;  // a bad bag gives zeros
    const real divisor = valid ? at.divisor<real>(f, b, shape.pooling) : real(1);
    for (int64_t d = lane_index(shape) * kVector; d < shape.dim; d += shape.lanes * kVector) {
      OrderedSum<real, kVector> sum;
      real best[kVector], v[kVector];
      int64_t winner[kVector];
      for (int i = 0; i < kVector; ++i) best[i] = 0, winner[i] = -1;
      for (int64_t n = begin; n < end; ++n) {
        const int64_t id = at.id(n);
        if (!valid_id<Map>(at, f, n, id, bad)) continue;
        load<weight_t, Map, kVector>(slab, table, Map::key(table, id), shape.width, d, v);
        if (shape.pooling == kMax) {
          for (int i = 0; i < kVector; ++i) {
            if (winner[i] < 0 || replaces(v[i], best[i])) best[i] = v[i], winner[i] = n;
          }
          continue;
        }
        if (sample_weights) {
          const real w = sample_weight<weight_t, real>(sample_weights, n);
          for (int i = 0; i < kVector; ++i) v[i] *= w;
        }
        sum.add(v);
      }
      if (shape.pooling != kMax) {
        sum.finish(best);
        for (int i = 0; i < kVector; ++i) best[i] /= divisor;
      }
      if (out) store<weight_t, kVector>(out + (b * at.num_tables + f) * shape.dim + d, best);
      if (argmax) {
        for (int i = 0; i < kVector; ++i) argmax[bag * shape.dim + d + i] = winner[i];
      }
    }
  }
}

// --- gradients
// --------------------------------------------------------------------------------------------------------

// What position n of bag f * B + b adds to the gradient of numbers d.. of its vector.
template <typename weight_t, int kVector, typename real>
__device__ void contribution(const Ids& at, const Shape& shape, const weight_t* grad, const weight_t* sample_weights,
                             const int64_t* argmax, int64_t bag, int64_t n, int64_t d, real (&to)[kVector]) {
  const int64_t f = bag / at.batch_size, b = bag % at.batch_size;
  const weight_t* g = grad + (b * at.num_tables + f) * shape.dim + d;
  const auto pack = *reinterpret_cast<const Pack<weight_t, kVector>*>(g);
  for (int i = 0; i < kVector; ++i) to[i] = static_cast<real>(pack.at[i]);
  if (argmax) {
    for (int i = 0; i < kVector; ++i) to[i] = argmax[bag * shape.dim + d + i] == n ? to[i] : real(0);
    return;
  }
  if (sample_weights) {
    const real w = sample_weight<weight_t, real>(sample_weights, n);
    for (int i = 0; i < kVector; ++i) to[i] *= w;
  }
  const real divisor = at.divisor<real>(f, b, shape.pooling);
  for (int i = 0; i < kVector; ++i) to[i] /= divisor;
}

__device__ void add_atomically(float* to, float v) {
  atomicAdd(to, v);
}
__device__ void add_atomically(double* to, double v) {
  atomicAdd(to, v);
}

// to [S, Z] += every contribution, in no fixed order.
template <typename weight_t, typename Map, int kVector>
__global__ void __launch_bounds__(kThreads)
    atomic_backward_kernel(Ids at, Shape shape, const weight_t* __restrict__ grad,
                           const weight_t* __restrict__ sample_weights, const int64_t* __restrict__ argmax,
                           typename Accumulator<weight_t>::type* __restrict__ to, BadId* bad) {
  using real = typename Accumulator<weight_t>::type;
  const int64_t num_bags = at.num_tables * at.batch_size;
  for (int64_t bag = group_index(shape); bag < num_bags; bag += num_groups(shape)) {
    const int64_t f = bag / at.batch_size, b = bag % at.batch_size;
    if (!valid_bag(at, f, b, bad)) continue;
    const Table table = at.tables[f];
    for (int64_t n = at.begin(f, b); n < at.end(f, b); ++n) {
      const int64_t id = at.id(n);
      if (!valid_id<Map>(at, f, n, id, bad)) continue;
      const uint64_t key = Map::key(table, id);
      for (int64_t d = lane_index(shape) * kVector; d < shape.dim; d += shape.lanes * kVector) {
        real v[kVector];
        contribution<weight_t, kVector>(at, shape, grad, sample_weights, argmax, bag, n, d, v);
        real* slot = to + (table.first_slot + Map::slot(table, key, d / shape.width)) * shape.width + d % shape.width;
        for (int i = 0; i < kVector; ++i) {
          if (!argmax || argmax[bag * shape.dim + d + i] == n) add_atomically(slot + i, v[i]);
        }
      }
    }
  }
}

// Sorted sums work on "touches", one per chunk of an id. Touch number: occurrence * chunks + c, where an occurrence is
// the bag f * B + b when every bag has one id, else the position n in the batch's ids (so features of other slabs leave
// gaps).
struct Touches {
  uint64_t* slots;  // [M], num_slots where a gap is
  uint64_t* order;  // [M] touch numbers
  int64_t* bags;    // [N] bag of each position, or nullptr with one id per bag
  int64_t* starts;  // [M] where the segment of equal slots begins
  int64_t count;    // M
  int64_t num_slots;
};

__device__ int64_t bag_of(const Touches& touches, int64_t occurrence) {
  return touches.bags ? touches.bags[occurrence] : occurrence;
}
__device__ int64_t position_of(const Ids& at, const Touches& touches, int64_t occurrence) {
  return touches.bags ? occurrence : at.begin(occurrence / at.batch_size, occurrence % at.batch_size);
}

__global__ void __launch_bounds__(kThreads) clear_touches_kernel(Touches touches) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < touches.count;
       i += gridDim.x * int64_t(blockDim.x)) {
    touches.slots[i] = static_cast<uint64_t>(touches.num_slots);
    touches.order[i] = static_cast<uint64_t>(i);
  }
}

template <typename Map>
__global__ void __launch_bounds__(kThreads) touch_kernel(Ids at, Shape shape, Touches touches, BadId* bad) {
  const int64_t num_bags = at.num_tables * at.batch_size;
  for (int64_t bag = group_index(shape); bag < num_bags; bag += num_groups(shape)) {
    const int64_t f = bag / at.batch_size, b = bag % at.batch_size;
    if (!valid_bag(at, f, b, bad)) continue;
    const Table table = at.tables[f];
    for (int64_t n = at.begin(f, b); n < at.end(f, b); ++n) {
      const int64_t id = at.id(n);
      if (!valid_id<Map>(at, f, n, id, bad)) continue;
      const uint64_t key = Map::key(table, id);
      const int64_t occurrence = touches.bags ? n : bag;
      for (int64_t c = lane_index(shape); c < shape.chunks; c += shape.lanes) {
        touches.slots[occurrence * shape.chunks + c] =
            static_cast<uint64_t>(table.first_slot + Map::slot(table, key, c));
      }
      if (touches.bags && lane_index(shape) == 0) touches.bags[n] = bag;
    }
  }
}

// starts[i] = i where a segment of equal slots begins, else 0; a running maximum then gives every touch its segment's
// start.
__global__ void __launch_bounds__(kThreads) mark_starts_kernel(Touches touches, int64_t* rows) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < touches.count;
       i += gridDim.x * int64_t(blockDim.x)) {
    const bool head = i == 0 || touches.slots[i] != touches.slots[i - 1];
    touches.starts[i] = head ? i : 0;
    if (rows) rows[i] = head && touches.slots[i] < static_cast<uint64_t>(touches.num_slots);
  }
}

// partial [M, Z]: at each run's first touch, the sum of its up to kRun contributions, left to right.
template <typename weight_t, int kVector>
__global__ void __launch_bounds__(kThreads)
    sum_runs_kernel(Ids at, Shape shape, Touches touches, const weight_t* __restrict__ grad,
                    const weight_t* __restrict__ sample_weights, const int64_t* __restrict__ argmax,
                    typename Accumulator<weight_t>::type* __restrict__ partial) {
  using real = typename Accumulator<weight_t>::type;
  for (int64_t i = group_index(shape); i < touches.count; i += num_groups(shape)) {
    const uint64_t slot = touches.slots[i];
    if (slot >= static_cast<uint64_t>(touches.num_slots) || (i - touches.starts[i]) % kRun != 0) continue;
    for (int64_t z = lane_index(shape) * kVector; z < shape.width; z += shape.lanes * kVector) {
      OrderedSum<real, kVector> sum;
      for (int64_t j = i; j < touches.count && j < i + kRun && touches.slots[j] == slot; ++j) {
        const int64_t occurrence = static_cast<int64_t>(touches.order[j]) / shape.chunks;
        const int64_t chunk = static_cast<int64_t>(touches.order[j]) % shape.chunks;
        real v[kVector];
        contribution<weight_t, kVector>(at, shape, grad, sample_weights, argmax, bag_of(touches, occurrence),
                                        position_of(at, touches, occurrence), chunk * shape.width + z, v);
        sum.add(v);
      }
      real run[kVector];
      sum.finish(run);
      store<real, kVector>(partial + i * shape.width + z, run);
    }
  }
}

// The runs of each segment, left to right, into the dense gradient [S, Z], or (rows given) into slots [U] and values
// [U, Z].
template <typename weight_t, int kVector>
__global__ void __launch_bounds__(kThreads)
    sum_segments_kernel(Shape shape, Touches touches, const typename Accumulator<weight_t>::type* __restrict__ partial,
                        const int64_t* __restrict__ rows, int64_t* __restrict__ slots, weight_t* __restrict__ values) {
  using real = typename Accumulator<weight_t>::type;
  for (int64_t i = group_index(shape); i < touches.count; i += num_groups(shape)) {
    const uint64_t slot = touches.slots[i];
    if (slot >= static_cast<uint64_t>(touches.num_slots) || touches.starts[i] != i) continue;
    const int64_t row = rows ? rows[i] - 1 : static_cast<int64_t>(slot);  // rows: inclusive count of segments so far
    if (rows && lane_index(shape) == 0) slots[row] = static_cast<int64_t>(slot);
    for (int64_t z = lane_index(shape) * kVector; z < shape.width; z += shape.lanes * kVector) {
      real sum[kVector];
      for (int64_t j = i; j < touches.count && touches.slots[j] == slot; j += kRun) {
        const auto run = *reinterpret_cast<const Pack<real, kVector>*>(partial + j * shape.width + z);
        for (int k = 0; k < kVector; ++k) sum[k] = j == i ? run.at[k] : sum[k] + run.at[k];
      }
      store<weight_t, kVector>(values + row * shape.width + z, sum);
    }
  }
}

template <typename weight_t, typename Map>
__global__ void __launch_bounds__(kThreads)
    sample_weights_kernel(Ids at, Shape shape, const weight_t* __restrict__ grad, const weight_t* __restrict__ slab,
                          weight_t* __restrict__ out, BadId* bad) {
  using real = typename Accumulator<weight_t>::type;
  const int64_t num_bags = at.num_tables * at.batch_size;
  for (int64_t bag = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; bag < num_bags;
       bag += gridDim.x * int64_t(blockDim.x)) {
    const int64_t f = bag / at.batch_size, b = bag % at.batch_size;
    if (!valid_bag(at, f, b, bad)) continue;
    const Table table = at.tables[f];
    const int64_t begin = at.begin(f, b), end = at.end(f, b);
    const real divisor = at.divisor<real>(f, b, shape.pooling);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t id = at.id(n);
      if (!valid_id<Map>(at, f, n, id, bad)) continue;
      const uint64_t key = Map::key(table, id);
      OrderedSum<real, 1> sum;
      for (int64_t d = 0; d < shape.dim; ++d) {
        real v[1];
        load<weight_t, Map, 1>(slab, table, key, shape.width, d, v);
        v[0] = v[0] * static_cast<real>(grad[(b * at.num_tables + f) * shape.dim + d]) / divisor;
        sum.add(v);
      }
      real total[1];
      sum.finish(total);
      out[n] = static_cast<weight_t>(total[0]);
    }
  }
}

template <typename from_t, typename to_t>
__global__ void __launch_bounds__(kThreads)
    convert_kernel(const from_t* __restrict__ from, to_t* __restrict__ to, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += gridDim.x * int64_t(blockDim.x)) {
    to[i] = static_cast<to_t>(from[i]);
  }
}

// --- launches
// ---------------------------------------------------------------------------------------------------------

// The device and stream of one call.
class Launch {
 public:
  explicit Launch(const Tensor& on) : guard_(on.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

  // Runs kernel over `work` groups of `lanes` threads, if there is any.
  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t work, int lanes, Arguments... arguments) const {
    if (work == 0) return;
    const int64_t blocks = (work * lanes + kThreads - 1) / kThreads;
    kernel<<<static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, 0, stream_>>>(arguments...);
    check(cudaGetLastError());
  }

 private:
  static constexpr int64_t kMaxBlocks = 1 << 20;  // kernels stride over the rest
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

int lanes_for(int64_t numbers, int vector) {
  int lanes = 1;
  while (lanes < 32 && lanes * vector < numbers) lanes *= 2;
  return lanes;
}

Shape shape_of(const Call& call, int64_t numbers, int vector) {
  return {call.dim, call.width, call.chunks, call.pooling, lanes_for(numbers, vector)};
}

bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Calls function(std::integral_constant<int, kVector>): 16 bytes at once where the width and the pointers allow, else
// one number.
template <typename weight_t, typename Function>
void with_vector(const Call& call, bool is_aligned, Function function) {
  constexpr int kWide = 16 / sizeof(weight_t);
  if (is_aligned && call.width % kWide == 0) {
    function(std::integral_constant<int, kWide>{});
  } else {
    function(std::integral_constant<int, 1>{});
  }
}

template <typename weight_t>
const weight_t* sample_weights_of(const Call& call) {
  return call.sample_weights ? call.sample_weights->const_data_ptr<weight_t>() : nullptr;
}

Tensor scratch(const Call& call, int64_t numbers) {
  return torch::stable::new_empty(call.weights, {numbers}, ScalarType::Long);
}

// Positions of the maxima [F * B * D], or nothing unless pooling is max.
template <typename weight_t, typename Map>
std::optional<Tensor> argmax_of(const Launch& launch, const Call& call, BadId* bad) {
  if (call.pooling != kMax) return std::nullopt;
  const int64_t num_bags = call.at.num_tables * call.at.batch_size;
  Tensor argmax = scratch(call, num_bags * call.dim);
  const Shape shape = shape_of(call, call.dim, 1);
  launch(forward_kernel<weight_t, Map, 1>, num_bags, shape.lanes, call.at, shape,
         call.weights.const_data_ptr<weight_t>(), static_cast<const weight_t*>(nullptr),
         static_cast<weight_t*>(nullptr), argmax.mutable_data_ptr<int64_t>(), bad);
  return argmax;
}

struct Maximum {
  __device__ int64_t operator()(int64_t a, int64_t b) const { return a < b ? b : a; }
};

// Two-phase cub calls: how much scratch memory, then the work.
template <typename Work>
void with_scratch(const Call& call, Work work) {
  size_t bytes = 0;
  check(work(nullptr, bytes));
  Tensor memory = scratch(call, static_cast<int64_t>(bytes / sizeof(int64_t) + 1));
  check(work(memory.mutable_data_ptr(), bytes));
}

// The touches, sorted by slot, with the tensors that hold them.
struct SortedTouches {
  Touches touches;
  std::vector<Tensor> memory;
};

template <typename Map>
SortedTouches sort_touches(const Launch& launch, const Call& call, BadId* bad) {
  const int64_t num_bags = call.at.num_tables * call.at.batch_size;
  const int64_t occurrences = call.offsets ? call.at.num_ids : num_bags;
  const int64_t count = occurrences * call.chunks;
  SortedTouches sorted;
  auto allocate = [&](int64_t numbers) {
    sorted.memory.push_back(scratch(call, numbers));
    return sorted.memory.back().mutable_data_ptr<int64_t>();
  };
  auto* slots = reinterpret_cast<uint64_t*>(allocate(count));
  auto* order = reinterpret_cast<uint64_t*>(allocate(count));
  int64_t* bags = call.offsets ? allocate(occurrences) : nullptr;
  Touches unsorted{slots, order, bags, nullptr, count, call.num_slots};
  launch(clear_touches_kernel, count, 1, unsorted);
  const Shape shape = shape_of(call, call.chunks, 1);
  launch(touch_kernel<Map>, num_bags, shape.lanes, call.at, shape, unsorted, bad);

  sorted.touches = unsorted;
  sorted.touches.slots = reinterpret_cast<uint64_t*>(allocate(count));
  sorted.touches.order = reinterpret_cast<uint64_t*>(allocate(count));
  sorted.touches.starts = allocate(count);
  if (count == 0) return sorted;
  int bits = 1;
  while (static_cast<uint64_t>(call.num_slots) >> bits) ++bits;
  with_scratch(call, [&](void* memory, size_t& bytes) {
    return cub::DeviceRadixSort::SortPairs(memory, bytes, slots, sorted.touches.slots, order, sorted.touches.order,
                                           count, 0, bits, launch.stream());
  });
  return sorted;
}

// Sums the sorted touches into values: [S, Z], or [U, Z] with their slots where rows [M] numbers the segments.
template <typename weight_t, typename Map>
void sum_touches(const Launch& launch, const Call& call, const SortedTouches& sorted, const weight_t* grad,
                 const int64_t* rows, int64_t* slots, weight_t* values, BadId* bad) {
  using real = typename Accumulator<weight_t>::type;
  const Touches& touches = sorted.touches;
  const auto argmax = argmax_of<weight_t, Map>(launch, call, bad);
  // int64 scratch holds `real` numbers, 8 bytes each
  Tensor memory = scratch(call, touches.count * call.width * int64_t(sizeof(real)) / 8 + 1);
  auto* partial = static_cast<real*>(memory.mutable_data_ptr());
  with_vector<weight_t>(call, aligned(grad) && aligned(values), [&](auto vector) {
    constexpr int kVector = decltype(vector)::value;
    const Shape shape = shape_of(call, call.width, kVector);
    launch(sum_runs_kernel<weight_t, kVector>, touches.count, shape.lanes, call.at, shape, touches, grad,
           sample_weights_of<weight_t>(call), argmax ? argmax->template const_data_ptr<int64_t>() : nullptr, partial);
    launch(sum_segments_kernel<weight_t, kVector>, touches.count, shape.lanes, shape, touches,
           static_cast<const real*>(partial), rows, slots, values);
  });
}

void scan_starts(const Launch& launch, const Call& call, const SortedTouches& sorted) {
  const Touches& touches = sorted.touches;
  if (touches.count == 0) return;
  with_scratch(call, [&](void* memory, size_t& bytes) {
    return cub::DeviceScan::InclusiveScan(memory, bytes, touches.starts, touches.starts, Maximum{}, touches.count,
                                          launch.stream());
  });
}

// --- the operators: arguments as in embeddings/ops.py
// -----------------------------------------------------------------

Tensor bag(const Tensor& weights, const Tensor& ids, std::optional<Tensor> offsets,
           std::optional<Tensor> sample_weights, const Tensor& tables, int64_t batch_size, int64_t dim,
           int64_t index_map, int64_t pooling, int64_t /*accumulate*/, std::string features) {
  const Launch launch(weights);
  const Call call = make_call(weights, ids, offsets, sample_weights, tables, batch_size, dim, pooling, features);
  BadId* bad = bad_id_of(call);
  Tensor out = torch::stable::new_empty(weights, {batch_size, call.at.num_tables, dim});
  with_dtype_and_map(weights.scalar_type(), index_map, [&](auto weight, auto map) {
    using weight_t = decltype(weight);
    using Map = decltype(map);
    const auto* slab = call.weights.const_data_ptr<weight_t>();
    with_vector<weight_t>(call, aligned(slab), [&](auto vector) {
      constexpr int kVector = decltype(vector)::value;
      const Shape shape = shape_of(call, dim, kVector);
      launch(forward_kernel<weight_t, Map, kVector>, call.at.num_tables * batch_size, shape.lanes, call.at, shape, slab,
             sample_weights_of<weight_t>(call), out.mutable_data_ptr<weight_t>(), static_cast<int64_t*>(nullptr), bad);
    });
  });
  return out;
}

// The gradient of the slab by atomics, in the accumulator's type.
template <typename weight_t, typename Map>
void atomic_backward(const Launch& launch, const Call& call, const weight_t* grad, Tensor& out, BadId* bad) {
  using real = typename Accumulator<weight_t>::type;
  const auto argmax = argmax_of<weight_t, Map>(launch, call, bad);
  constexpr bool kExact = std::is_same_v<weight_t, real>;
  Tensor sums = kExact ? out : torch::stable::new_zeros(out, {call.num_slots, call.width}, ScalarType::Float);
  auto* to = static_cast<real*>(sums.mutable_data_ptr());
  with_vector<weight_t>(call, aligned(grad), [&](auto vector) {
    constexpr int kVector = decltype(vector)::value;
    const Shape shape = shape_of(call, call.dim, kVector);
    launch(atomic_backward_kernel<weight_t, Map, kVector>, call.at.num_tables * call.at.batch_size, shape.lanes,
           call.at, shape, grad, sample_weights_of<weight_t>(call),
           argmax ? argmax->template const_data_ptr<int64_t>() : nullptr, to, bad);
  });
  if constexpr (!kExact) {
    launch(convert_kernel<real, weight_t>, call.num_slots * call.width, 1, static_cast<const real*>(to),
           out.mutable_data_ptr<weight_t>(), call.num_slots * call.width);
  }
}

Tensor bag_backward(const Tensor& grad, const Tensor& weights, const Tensor& ids, std::optional<Tensor> offsets,
                    std::optional<Tensor> sample_weights, const Tensor& tables, int64_t index_map, int64_t pooling,
                    bool atomic, std::string features) {
  const Launch launch(weights);
  const Call call = make_backward_call(grad, weights, ids, offsets, sample_weights, tables, pooling, features);
  BadId* bad = bad_id_of(call);
  const Tensor dense = torch::stable::contiguous(grad);
  Tensor out = torch::stable::new_zeros(weights, {call.num_slots, call.width});
  with_dtype_and_map(weights.scalar_type(), index_map, [&](auto weight, auto map) {
    using weight_t = decltype(weight);
    using Map = decltype(map);
    const auto* g = dense.const_data_ptr<weight_t>();
    if (atomic) return atomic_backward<weight_t, Map>(launch, call, g, out, bad);
    const SortedTouches sorted = sort_touches<Map>(launch, call, bad);
    launch(mark_starts_kernel, sorted.touches.count, 1, sorted.touches, static_cast<int64_t*>(nullptr));
    scan_starts(launch, call, sorted);
    sum_touches<weight_t, Map>(launch, call, sorted, g, nullptr, nullptr, out.mutable_data_ptr<weight_t>(), bad);
  });
  return out;
}

// The number of touched slots sizes the outputs, so this one waits for the device once.
std::tuple<Tensor, Tensor> bag_backward_rows(const Tensor& grad, const Tensor& weights, const Tensor& ids,
                                             std::optional<Tensor> offsets, std::optional<Tensor> sample_weights,
                                             const Tensor& tables, int64_t index_map, int64_t pooling,
                                             std::string features) {
  const Launch launch(weights);
  const Call call = make_backward_call(grad, weights, ids, offsets, sample_weights, tables, pooling, features);
  BadId* bad = bad_id_of(call);
  const Tensor dense = torch::stable::contiguous(grad);
  std::optional<Tensor> slots, values;
  with_dtype_and_map(weights.scalar_type(), index_map, [&](auto weight, auto map) {
    using weight_t = decltype(weight);
    using Map = decltype(map);
    const SortedTouches sorted = sort_touches<Map>(launch, call, bad);
    const int64_t count = sorted.touches.count;
    Tensor memory = scratch(call, count + 1);
    auto* rows = memory.mutable_data_ptr<int64_t>();
    launch(mark_starts_kernel, count, 1, sorted.touches, rows);
    scan_starts(launch, call, sorted);
    int64_t num_touched = 0;
    if (count > 0) {
      with_scratch(call, [&](void* temporary, size_t& bytes) {
        return cub::DeviceScan::InclusiveSum(temporary, bytes, rows, rows, count, launch.stream());
      });
      check(cudaMemcpyAsync(&num_touched, rows + count - 1, sizeof(num_touched), cudaMemcpyDeviceToHost,
                            launch.stream()));
      check(cudaStreamSynchronize(launch.stream()));
    }
    slots = torch::stable::new_empty(weights, {num_touched}, ScalarType::Long);
    values = torch::stable::new_empty(weights, {num_touched, call.width});
    sum_touches<weight_t, Map>(launch, call, sorted, dense.const_data_ptr<weight_t>(), rows,
                               slots->mutable_data_ptr<int64_t>(), values->mutable_data_ptr<weight_t>(), bad);
  });
  return {*slots, *values};
}

Tensor bag_backward_sample_weights(const Tensor& grad, const Tensor& weights, const Tensor& ids,
                                   std::optional<Tensor> offsets, const Tensor& tables, int64_t index_map,
                                   int64_t pooling, std::string features) {
  const Launch launch(weights);
  const Call call = make_backward_call(grad, weights, ids, offsets, std::nullopt, tables, pooling, features);
  BadId* bad = bad_id_of(call);
  const Tensor dense = torch::stable::contiguous(grad);
  Tensor out = torch::stable::new_zeros(weights, {call.at.num_ids});
  with_dtype_and_map(weights.scalar_type(), index_map, [&](auto weight, auto map) {
    using weight_t = decltype(weight);
    launch(sample_weights_kernel<weight_t, decltype(map)>, call.at.num_tables * call.at.batch_size, 1, call.at,
           shape_of(call, call.dim, 1), dense.const_data_ptr<weight_t>(), call.weights.const_data_ptr<weight_t>(),
           out.mutable_data_ptr<weight_t>(), bad);
  });
  return out;
}

void raise_noted(const Tensor& weights, std::string features) {
  const Launch launch(weights);
  check(cudaStreamSynchronize(launch.stream()));
  Call call;
  call.features = features;
  bad_id_of(call);
}

}  // namespace
}  // namespace embeddings

STABLE_TORCH_LIBRARY_IMPL(embeddings, CUDA, m) {
  m.impl("bag", TORCH_BOX(&embeddings::bag));
  m.impl("bag_backward", TORCH_BOX(&embeddings::bag_backward));
  m.impl("bag_backward_rows", TORCH_BOX(&embeddings::bag_backward_rows));
  m.impl("bag_backward_sample_weights", TORCH_BOX(&embeddings::bag_backward_sample_weights));
  m.impl("raise_noted", TORCH_BOX(&embeddings::raise_noted));
}
