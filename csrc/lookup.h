// What the kernels of bag.cu share: a call as they see it, the numbers that an id reads, and what it passes back.
// Without nvcc, cuda_on_host.h makes it C++, so that a sanitizer can watch the indices.
#pragma once

#include "bag.h"

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cuda_runtime.h>

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#define EMBEDDINGS_LIBRARY embeddings
#define EMBEDDINGS_DEVICE CUDA
using torch::stable::accelerator::DeviceGuard;
#else
#include "cuda_on_host.h"
#endif

namespace embeddings::inline cuda {

// --- errors without a host synchronisation ---------------------------------------------------------------------------

enum ErrorKind { kBadId, kBadBag, kNoBags, kNotCovered, kSharedPosition };

// The first error that a slab's kernels met. In mapped host memory: a kernel writes it, the next call on the slab reads
// and raises it. Kernels skip what is bad, so nothing is read or written out of bounds and the CUDA context stays
// usable.
struct FirstError {
  int state;  // 0 none, 1 being written, 2 complete
  int kind;
  int64_t f, place, first, second, num_ids;  // place: position of an id, sample of a bag

  __device__ void note(ErrorKind error, int64_t feature, int64_t at, int64_t a, int64_t b, int64_t ids) {
    if (atomicCAS_system(&state, 0, 1) != 0) return;
    kind = error, f = feature, place = at, first = a, second = b, num_ids = ids;
    __threadfence_system();
    atomicExch_system(&state, 2);
  }

  [[noreturn]] void raise(const std::string& features) const {
    Call call{};
    call.features = features;
    call.at.num_ids = num_ids;
    switch (kind) {
      case kBadId: call.fail_id(f, place, first, second);
      case kBadBag: call.fail_offsets(f, place, first, second);
      case kNoBags: fail("the batch has no bags for feature ", call.feature(f), " at position ", first);
      case kNotCovered:
        fail("offsets must begin with 0 and end with the number of ids, ", num_ids, ", not ", first, " and ", second);
      default:
        fail("feature ", call.feature(f), ": another feature of its slab has the same position ", first,
             "; on CUDA such have gradients with offsets by accumulate=atomic only, and none of per_sample_weights");
    }
  }
};

// --- threads and numbers ---------------------------------------------------------------------------------------------

// This thread's place. Work is dealt to groups of `lanes` threads: a power of two, at most a warp.
struct Group {
  int64_t index, count;
  int lane, lanes;
};

__device__ inline Group group_of(int lanes) {
  const int64_t thread = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  const int shift = __ffs(lanes) - 1;
  return {thread >> shift, gridDim.x * int64_t(blockDim.x) >> shift, static_cast<int>(threadIdx.x) & (lanes - 1),
          lanes};
}

template <typename number_t, int kVector>
struct alignas(sizeof(number_t) * kVector) Pack {
  number_t at[kVector];

  __device__ static bool fits(const number_t* pointer) {
    return kVector == 1 || reinterpret_cast<uintptr_t>(pointer) % sizeof(Pack) == 0;
  }
};

// A slice, or a feature's columns, may begin where a pack is not aligned: then its numbers move one by one.
template <int kVector, typename number_t, typename real>
__device__ void load(const number_t* from, real (&to)[kVector]) {
  if (Pack<number_t, kVector>::fits(from)) {
    const auto pack = *reinterpret_cast<const Pack<number_t, kVector>*>(from);
    for (int i = 0; i < kVector; ++i) to[i] = static_cast<real>(pack.at[i]);
  } else {
    for (int i = 0; i < kVector; ++i) to[i] = static_cast<real>(from[i]);
  }
}

// The same from several places, 0 where one is nullptr: no load waits for another.
template <int kVector, int kPlaces, typename number_t, typename real>
__device__ void load_all(const number_t* const (&from)[kPlaces], real (&to)[kPlaces][kVector]) {
  using Numbers = Pack<number_t, kVector>;
  Numbers packs[kPlaces] = {};
  bool fits = true;
  UNROLL for (int p = 0; p < kPlaces; ++p) fits = fits && Numbers::fits(from[p]);
  if (fits) {
    UNROLL for (int p = 0; p < kPlaces; ++p) {
      if (from[p]) packs[p] = *reinterpret_cast<const Numbers*>(from[p]);
    }
  } else {
    UNROLL for (int p = 0; p < kPlaces; ++p) {
      for (int i = 0; i < kVector; ++i) packs[p].at[i] = from[p] ? from[p][i] : number_t(0);
    }
  }
  UNROLL for (int p = 0; p < kPlaces; ++p) {
    for (int i = 0; i < kVector; ++i) to[p][i] = static_cast<real>(packs[p].at[i]);
  }
}

template <int kVector, typename number_t, typename real>
__device__ void store(number_t* to, const real (&from)[kVector]) {
  if (Pack<number_t, kVector>::fits(to)) {
    Pack<number_t, kVector> pack;
    for (int i = 0; i < kVector; ++i) pack.at[i] = static_cast<number_t>(from[i]);
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(pack) % sizeof(int4) == 0) {  // by its name: merged with the other branch it is no longer wide
      for (size_t i = 0; i < sizeof(pack) / sizeof(int4); ++i) {
        __stwb(reinterpret_cast<int4*>(to) + i, reinterpret_cast<const int4*>(&pack)[i]);
      }
      return;
    }
#endif
    *reinterpret_cast<Pack<number_t, kVector>*>(to) = pack;
  } else {
    for (int i = 0; i < kVector; ++i) to[i] = static_cast<number_t>(from[i]);
  }
}

// Calls function(std::integral_constant<int, kVector>, d) for every pack d.. of kVector numbers that is this lane's, of
// the first `size` of a vector whose slots are `width` wide. No pack crosses a slot's end.
template <typename number_t, typename Function>
__device__ void for_each_pack(const Group& group, int64_t width, int64_t size, Function function) {
  constexpr int kWide = 16 / sizeof(number_t);
  if (width % kWide == 0) {
    for (int d = group.lane * kWide; d < size; d += group.lanes * kWide) {
      function(std::integral_constant<int, kWide>{}, d);
    }
  } else {
    for (int d = group.lane; d < size; d += group.lanes) function(std::integral_constant<int, 1>{}, d);
  }
}

template <typename real, int kVector>
__device__ void scale(real (&v)[kVector], real by) {
  for (int i = 0; i < kVector; ++i) v[i] *= by;
}

template <typename real, int kVector>
__device__ void multiply(real (&v)[kVector], const real (&by)[kVector]) {
  for (int i = 0; i < kVector; ++i) v[i] *= by[i];
}

template <typename real, int kVector>
__device__ void negate_if(bool negative, real (&v)[kVector]) {
  for (int i = 0; i < kVector; ++i) v[i] = negative ? -v[i] : v[i];
}

// What position n passes back of a bag's gradient [B, columns], from number `first` on, but for a mean's division.
// argmax and sample_weights as in a Lookup.
template <typename real, int kVector>
__device__ void load_share(const real* grad, const int64_t* argmax, const real* sample_weights, int64_t first,
                           int64_t n, real (&to)[kVector]) {
  load(grad + first, to);
  if (argmax) {
    for (int i = 0; i < kVector; ++i) to[i] = argmax[first + i] == n ? to[i] : real(0);
  }
  if (sample_weights) scale(to, sample_weights[n]);
}

// Sums in the order of index_map.h, kVector numbers at a time.
template <typename real, int kVector>
struct OrderedSum {
  real total[kVector], run[kVector];
  int64_t count = 0;

  __device__ void add(const real (&v)[kVector]) {
    const bool begins = count % kRun == 0;
    if (begins && count) close_run();
    for (int i = 0; i < kVector; ++i) run[i] = begins ? v[i] : run[i] + v[i];
    ++count;
  }
  __device__ void finish(real (&sum)[kVector]) {
    if (count > kRun) close_run();
    for (int i = 0; i < kVector; ++i) sum[i] = count == 0 ? real(0) : count > kRun ? total[i] : run[i];
  }
  __device__ void close_run() {
    for (int i = 0; i < kVector; ++i) total[i] = count <= kRun ? run[i] : total[i] + run[i];
  }
};

// --- one call --------------------------------------------------------------------------------------------------------

// Sample b of the slab's feature f: the ids at positions [begin, end), none if the bag is bad.
struct Bag {
  int64_t f, b, begin, end;
};

// The ids of a call and how they are read.
template <typename Map>
struct Batch {
  Ids at;
  Map map;
  int64_t unit, columns, chunks, combine, pooling;
  int64_t num_positions;  // features of the batch
  FirstError* error;

  __device__ void note(ErrorKind kind, int64_t f, int64_t place, int64_t first, int64_t second = 0) const {
    error->note(kind, f, place, first, second, at.num_ids);
  }

  __device__ bool has_bags(int64_t f) const {
    const int64_t position = at.table(f, 0).position;
    return position >= 0 && position < num_positions;
  }

  // Positions [begin, end) of all ids of a feature that has bags, none if its outermost offsets are bad.
  __device__ Bag whole(int64_t f) const {
    const int64_t begin = at.begin(f, 0), end = at.end(f, at.batch_size - 1);
    return begin >= 0 && begin <= end && end <= at.num_ids ? Bag{f, 0, begin, end} : Bag{f, 0, 0, 0};
  }

  // Also notes, once per feature, one that the batch has no bags for, and offsets that do not cover all ids.
  __device__ Bag bag(int64_t f, int64_t b) const {
    if (!has_bags(f)) {
      note(kNoBags, f, b, at.table(f, 0).position);
      return {f, b, 0, 0};
    }
    const int64_t begin = at.begin(f, b), end = at.end(f, b);
    if (begin < 0 || begin > end || end > at.num_ids) {
      note(kBadBag, f, b, begin, end);
      return {f, b, 0, 0};
    }
    if (b == 0 && at.offsets && (at.offsets[0] != 0 || at.offsets[at.num_bags] != at.num_ids)) {
      note(kNotCovered, f, b, at.offsets[0], at.offsets[at.num_bags]);
    }
    return {f, b, begin, end};
  }

  // Calls function(f, part) for this thread's share of `parts` of every feature, which are the grid's rows.
  template <typename Function>
  __device__ void for_each_part(int64_t parts, Function function) const {
    const auto divisor = static_cast<uint32_t>(parts);
    for (int64_t row = blockIdx.y; row < at.num_features * parts; row += gridDim.y) {
      const uint32_t f = static_cast<uint32_t>(row) / divisor;
      function(static_cast<int64_t>(f), row - f * parts);
    }
  }

  // Calls function(bag, part) for the group's share of `parts` of every bag.
  template <typename Function>
  __device__ void for_each_bag(const Group& group, int64_t parts, Function function) const {
    for_each_part(parts, [&](int64_t f, int64_t part) {
      for (int64_t b = group.index; b < at.batch_size; b += group.count) function(bag(f, b), part);
    });
  }

  // Whether an id at position n has weights; notes one that has not.
  __device__ bool has_weights(int64_t f, int64_t n, int64_t id) const {
    if (!Map::ranged || (id >= 0 && id < at.table(f, 0).num_embeddings)) return true;
    note(kBadId, f, n, id, at.table(f, 0).num_embeddings);
    return false;
  }

  // The ids at positions n.. before `end`; wanted: which of these there are, and have weights.
  template <int kIds>
  __device__ void load_ids(int64_t f, int64_t n, int64_t end, int64_t (&ids)[kIds], bool (&wanted)[kIds]) const {
    UNROLL for (int i = 0; i < kIds; ++i) ids[i] = n + i < end ? at.id(n + i) : 0;
    UNROLL for (int i = 0; i < kIds; ++i) wanted[i] = n + i < end && has_weights(f, n + i, ids[i]);
  }

  // Calls function(n, id) for every id of the bag that has weights, in order.
  template <typename Function>
  __device__ void for_each_id(const Bag& bag, Function function) const {
    for (int64_t n = bag.begin; n < bag.end; ++n) {
      const int64_t id = at.id(n);
      if (has_weights(bag.f, n, id)) function(n, id);
    }
  }
};

// The same with the weights. A part is a vector of the output: a feature's, combined of all its probes', or one
// probe's (kCombines false: there is one probe, or each has its own columns). Numbers of a part are counted in 32 bits:
// 64-bit divisions are several times slower.
template <typename number_t, typename Map, bool kCombines>
struct Lookup : Batch<Map> {
  using weight_t = number_t;
  using real = typename Accumulator<weight_t>::type;
  using Batch<Map>::at, Batch<Map>::map, Batch<Map>::columns, Batch<Map>::combine, Batch<Map>::pooling;
  static constexpr bool kAdds = kCombines;  // several probes' vectors to one
  // ids whose rows a thread has on their way together; of 16 bits, 8 numbers to a pack, more would not fit in registers
  static constexpr int kAhead = kCombines && sizeof(weight_t) == 2 ? 2 : 4;
  struct Slot {
    const weight_t* numbers;
    bool negative;
  };

  const weight_t* __restrict__ slab;        // [S, Z]
  const real* __restrict__ sample_weights;  // [N] or nullptr
  const real* __restrict__ grad;            // [B, columns] of a backward
  const int64_t* __restrict__ argmax;       // [B, columns] of a backward of max, else nullptr

  __host__ __device__ int64_t parts() const { return kCombines ? 1 : at.probes; }
  __device__ bool is_importance(int64_t k) const { return combine == kWeighted && k == at.probes - 1; }

  __device__ Slot slot(const Table& table, int64_t id, int chunk) const {
    const Read read = map.read(table, map.key(table, id), chunk);
    return {slab + table.begin + read.slot * table.width, read.negative};
  }

  // Numbers d.. of the vector that an id reads from a table.
  template <int kVector>
  __device__ void read(const Table& table, int64_t id, int d, real (&to)[kVector]) const {
    const int width = static_cast<int>(table.width), chunk = d / width;
    const Slot from = slot(table, id, chunk);
    load(from.numbers + (d - chunk * width), to);
    negate_if(from.negative, to);
  }

  // What weighted probe k's vector is multiplied by.
  __device__ real importance(int64_t f, int64_t id, int64_t k) const {
    const Slot from = slot(at.table(f, at.probes - 1), id, 0);
    const real p = static_cast<real>(from.numbers[k]);
    return from.negative ? -p : p;
  }

  // `read` of several ids, 0 of one that is not wanted: no row waits for another.
  template <int kVector, int kIds>
  __device__ void read_all(const Table& table, const int64_t (&ids)[kIds], const bool (&wanted)[kIds], int d,
                           real (&to)[kIds][kVector]) const {
    const int width = static_cast<int>(table.width), chunk = d / width;
    const weight_t* numbers[kIds];
    bool negative[kIds];
    UNROLL for (int i = 0; i < kIds; ++i) {
      const Slot from = slot(table, ids[i], chunk);  // of any: in a branch of each they would wait for one another
      negative[i] = wanted[i] && from.negative;
      numbers[i] = wanted[i] ? from.numbers + (d - chunk * width) : nullptr;
    }
    load_all(numbers, to);
    UNROLL for (int i = 0; i < kIds; ++i) negate_if(negative[i], to[i]);
  }

  // Numbers d.. of a part for each id that is wanted, probe by probe.
  template <int kVector, int kIds>
  __device__ void vectors(int64_t f, int64_t part, const int64_t (&ids)[kIds], const bool (&wanted)[kIds], int d,
                          real (&v)[kIds][kVector]) const {
    const Table table = at.table(f, part);  // a copy, and so read once
    read_all(table, ids, wanted, d, v);
    if constexpr (kCombines) {
      weigh(f, ids, wanted, 0, v);
      for (int64_t k = 1; k < at.probes && !is_importance(k); ++k) {
        real r[kIds][kVector];
        const Table other = at.table(f, k);
        read_all(other, ids, wanted, d, r);
        weigh(f, ids, wanted, k, r);
        UNROLL for (int i = 0; i < kIds; ++i) {
          for (int j = 0; j < kVector; ++j) v[i][j] = combine == kMultiply ? v[i][j] * r[i][j] : v[i][j] + r[i][j];
        }
      }
    }
  }

  // Probe k's vectors times their importance, under combine=weighted.
  template <int kVector, int kIds>
  __device__ void weigh(int64_t f, const int64_t (&ids)[kIds], const bool (&wanted)[kIds], int64_t k,
                        real (&v)[kIds][kVector]) const {
    if (combine != kWeighted) return;
    UNROLL for (int i = 0; i < kIds; ++i) {
      if (wanted[i]) scale(v[i], importance(f, ids[i], k));
    }
  }

  // Calls function(n, v) for every id of the bag that has weights, in order. v: numbers d.. of its part.
  template <int kVector, typename Function>
  __device__ void for_each_vector(const Bag& bag, int64_t part, int d, Function function) const {
    for (int64_t n = bag.begin; n < bag.end; n += kAhead) {
      int64_t ids[kAhead];
      bool wanted[kAhead];
      this->load_ids(bag.f, n, bag.end, ids, wanted);
      real v[kAhead][kVector];
      vectors(bag.f, part, ids, wanted, d, v);
      UNROLL for (int i = 0; i < kAhead; ++i) {
        if (wanted[i]) function(n + i, v[i]);
      }
    }
  }

  // What position n passes back to numbers d.. of a part that begins in column `column`.
  template <int kVector>
  __device__ void passed_back(const Bag& bag, int64_t n, int64_t column, int d, real (&to)[kVector]) const {
    load_share(grad, argmax, sample_weights, bag.b * columns + column + d, n, to);
    const real divisor = at.template divisor<real>(bag.f, bag.b, pooling);
    if (divisor != real(1)) {
      for (int i = 0; i < kVector; ++i) to[i] /= divisor;
    }
  }

  // What position n adds to the gradient of numbers d.. of its probe k's vector, but for the sign of their chunk.
  template <int kVector>
  __device__ void contribution(const Bag& bag, int64_t n, int64_t k, int d, real (&to)[kVector]) const {
    if constexpr (kCombines) {
      if (is_importance(k)) {
        for (int i = 0; i < kVector; ++i) to[i] = importance_contribution(bag, n, d + i);
        return;
      }
    }
    passed_back(bag, n, at.table(bag.f, k).column, d, to);
    if constexpr (kCombines) {
      if (combine == kWeighted) scale(to, importance(bag.f, at.id(n), k));
      if (combine == kMultiply) {
        real product[kVector], r[kVector];
        const int64_t first = k == 0 ? 1 : 0;
        read(at.table(bag.f, first), at.id(n), d, product);
        for (int64_t j = first + 1; j < at.probes; ++j) {
          if (j == k) continue;
          read(at.table(bag.f, j), at.id(n), d, r);
          multiply(product, r);
        }
        multiply(to, product);
      }
    }
  }

  __device__ real importance_contribution(const Bag& bag, int64_t n, int64_t k) const {
    const Table& table = at.table(bag.f, k);
    OrderedSum<real, 1> sum;
    for_each_pack<weight_t>(Group{0, 1, 0, 1}, table.width, table.dim, [&](auto pack, int d) {
      real v[pack], r[pack];
      passed_back(bag, n, table.column, d, v);
      read(table, at.id(n), d, r);
      for (int i = 0; i < pack; ++i) sum.add({v[i] * r[i]});
    });
    real total[1];
    sum.finish(total);
    return total[0];
  }
};

}  // namespace embeddings::inline cuda
