// The CUDA kernels of fused updates: bag_update.cpp's operator, with its bits. Nothing waits for the device, and what
// changes from step to step is read there, so a captured graph may hold it.
#include "cuda_touches.h"
#include "update.h"

namespace embeddings::inline cuda {
namespace {

// What a step moves.
template <typename number_t>
struct Moved {
  using weight_t = number_t;
  using real = typename Accumulator<weight_t>::type;
  weight_t* __restrict__ weights;  // [S, Z]
  real* __restrict__ first;        // the rule's state, per number or per unit, or nullptr
  real* __restrict__ second;
  const Step* __restrict__ step;
  int64_t rule;
  int unit;  // Z
};

// Sums that were kept: `values` of slots_kernel.
template <typename number_t>
struct KeptSums {
  using weight_t = number_t;
  using real = typename Accumulator<weight_t>::type;
  Touches touches;
  const int64_t* __restrict__ rows;
  const real* __restrict__ values;
  int64_t unit;

  __device__ int64_t row(int64_t first) const { return first == 0 ? 0 : rows[first - 1]; }
  __device__ int64_t width(int64_t first) const { return (rows[first] - row(first)) * unit; }
  template <int kVector>
  __device__ void sum(int64_t first, int64_t, int z, real (&sum)[kVector]) const {
    load(values + row(first) * unit + z, sum);
  }
};

// --- a row's squares -------------------------------------------------------------------------------------------------

constexpr int kMaxLevels = 7;  // of packs of a lane, folded

// The packs lane, lane + lanes, ... of num_packs, added by halves as `fold` of cpu_sums.h does: pack(p, v). Where there
// is none, 0.
template <typename real, int kVector, typename Pack>
__device__ void fold_lane(int lane, int lanes, int num_packs, Pack pack, real (&total)[kVector]) {
  int levels = 0;
  while ((lanes << levels) < num_packs) ++levels;
  real waiting[kMaxLevels][kVector];
  for (int i = 0; i < 1 << levels; ++i) {
    int round = 0;  // i with its bits reversed: of two that are added, the first one comes just before
    for (int bit = 0; bit < levels; ++bit) round |= (i >> bit & 1) << (levels - 1 - bit);
    const int p = lane + round * lanes;
    for (int j = 0; j < kVector; ++j) total[j] = 0;
    if (p < num_packs) pack(p, total);
    bool goes_on = true;
    for (int level = 0; level < kMaxLevels; ++level) {  // a bound that is known keeps `waiting` in registers
      if (!goes_on || level >= levels) break;
      goes_on = i >> level & 1;
      for (int j = 0; j < kVector; ++j) {
        if (goes_on) {
          total[j] += waiting[level][j];
        } else {
          waiting[level][j] = total[j];
        }
      }
    }
  }
}

#if defined(__CUDACC__) || defined(EMBEDDINGS_THREADS)
// For all lanes of a group: what finish(v) makes of the lanes' numbers added by halves, of which partial(lane, v) gives
// one's. finish is called once, after every partial.
template <typename real, int kVector, typename Partial, typename Finish>
__device__ real over_lanes(const Group& group, Partial partial, Finish finish) {
  const int first = static_cast<int>(threadIdx.x) % 32 / group.lanes * group.lanes;
  const unsigned mask = (group.lanes == 32 ? ~0u : (1u << group.lanes) - 1) << first;
  real v[kVector];
  partial(group.lane, v);
  for (int half = group.lanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < kVector; ++i) v[i] += __shfl_xor_sync(mask, v[i], half);
  }
  const real result = group.lane == 0 ? finish(v) : real(0);
  return __shfl_sync(mask, result, first);
}
#endif

// How the squares of a unit's gradient are added up: not at all, of one pack for each lane, or of more.
enum class Squares { kNone, kOnePack, kFolded };

// Adds to a unit's state, which is `before`, the mean of its gradient's squares; what its gradient is then multiplied
// by. partial(lane, v): the squares of a lane.
template <int kVector, typename weight_t, typename real, typename Partial>
__device__ real row_rate(const Group& group, const Moved<weight_t>& to, const Step& step, int64_t unit, real before,
                         Partial partial) {
  return over_lanes<real, kVector>(group, partial, [&](real(&sum)[kVector]) {
    for (int half = kVector / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
    }
    const real total = before + sum[0] / static_cast<real>(to.unit);
    to.first[unit] = total;
    return 1 / (std::sqrt(total) + static_cast<real>(step.eps)) * static_cast<real>(step.lr);
  });
}

// Packs of a unit, as of for_each_pack.
template <typename weight_t>
int packs_of(const Moved<weight_t>& to) {
  constexpr int kWide = 16 / sizeof(weight_t);
  return to.unit % kWide == 0 ? to.unit / kWide : to.unit;
}

// --- one step --------------------------------------------------------------------------------------------------------

// A pack of numbers as they are before the step. They are loaded before their gradient is summed: neither waits for the
// other.
template <typename weight_t, int kVector>
struct Held {
  using real = typename Accumulator<weight_t>::type;
  weight_t weights[kVector];  // as they are: to convert them is to wait for them
  real first[kVector], second[kVector];

  __device__ void load_from(const Moved<weight_t>& to, int64_t rule, int64_t at) {
    load(to.weights + at, weights);
    if (rule == kAdagrad || rule == kAdam) load(to.first + at, first);
    if (rule == kAdam) load(to.second + at, second);
  }
};

// The step of a pack. g: its gradient, with the weight decay's; rate: what SGD and row-wise Adagrad multiply it by.
template <typename weight_t, typename real, int kVector>
__device__ void move_pack(const Moved<weight_t>& to, int64_t rule, const Step& step, int64_t at, real rate,
                          Held<weight_t, kVector>& held, real (&g)[kVector]) {
  real(&first)[kVector] = held.first, (&second)[kVector] = held.second;
  const real lr = static_cast<real>(step.lr), eps = static_cast<real>(step.eps);
  if (rule == kAdagrad) {
    for (int i = 0; i < kVector; ++i) {
      first[i] += g[i] * g[i];
      g[i] = lr * g[i] / (std::sqrt(first[i]) + eps);
    }
    store(to.first + at, first);
  } else if (rule == kAdam) {
    const real keep1 = static_cast<real>(step.beta1), take1 = static_cast<real>(1 - step.beta1);
    const real keep2 = static_cast<real>(step.beta2), take2 = static_cast<real>(1 - step.beta2);
    const real correction = static_cast<real>(step.correction);
    for (int i = 0; i < kVector; ++i) {
      first[i] = first[i] * keep1 + g[i] * take1;
      second[i] = second[i] * keep2 + g[i] * g[i] * take2;
      g[i] = lr * first[i] / (std::sqrt(second[i] / correction) + eps);
    }
    store(to.first + at, first);
    store(to.second + at, second);
  } else {
    scale(g, rate);
  }
  weight_t moved[kVector];
  for (int i = 0; i < kVector; ++i) {
    moved[i] = rounded<weight_t>(static_cast<real>(held.weights[i]) - g[i], static_cast<int64_t>(step.draw), at + i);
  }
  store(to.weights + at, moved);
}

// The step of a unit. sum(z, v): numbers z.. of its gradient's sum.
template <Squares kSquares, typename weight_t, typename Sum>
__device__ void move(const Group& group, const Moved<weight_t>& to, const Step& step, int64_t unit, Sum sum) {
  using real = typename Accumulator<weight_t>::type;
  const int64_t at = unit * to.unit, rule = kSquares == Squares::kNone ? to.rule : kRowWiseAdagrad;
  const real before = kSquares == Squares::kNone ? real(0) : to.first[unit];
  const real weight_decay = static_cast<real>(step.weight_decay);
  const auto gradient = [&](int z, auto& g) {
    sum(z, g);
    if (weight_decay != 0) {
      constexpr int kVector = sizeof(g) / sizeof(real);
      real w[kVector];
      load(to.weights + at + z, w);
      for (int i = 0; i < kVector; ++i) g[i] = g[i] + w[i] * weight_decay;
    }
  };
  const auto with_pack = [&](auto function) {
    constexpr int kWide = 16 / sizeof(weight_t);
    if (to.unit % kWide == 0) return function(std::integral_constant<int, kWide>{});
    return function(std::integral_constant<int, 1>{});
  };
  if constexpr (kSquares == Squares::kOnePack) {  // the sum stays in registers
    with_pack([&](auto pack) {
      constexpr int kVector = decltype(pack)::value;
      const int z = group.lane * kVector;
      const bool has_pack = z < to.unit;
      Held<weight_t, kVector> held;
      real g[kVector] = {};
      if (has_pack) {
        held.load_from(to, rule, at + z);
        gradient(z, g);
      }
      const real rate = row_rate<kVector>(group, to, step, unit, before, [&](int lane, real(&v)[kVector]) {
        for (int i = 0; i < kVector; ++i) v[i] = g[i];
        const int other = lane * kVector;  // not z only on a host, where one thread plays all lanes
        if (other != z && other < to.unit) gradient(other, v);
        if (other != z && other >= to.unit) scale(v, real(0));
        multiply(v, v);
      });
      if (has_pack) move_pack(to, rule, step, at + z, rate, held, g);
    });
  } else {
    real rate = static_cast<real>(step.lr);
    if constexpr (kSquares == Squares::kFolded) {
      with_pack([&](auto pack) {
        constexpr int kVector = decltype(pack)::value;
        rate = row_rate<kVector>(group, to, step, unit, before, [&](int lane, real(&total)[kVector]) {
          const auto squares = [&](int p, real(&v)[kVector]) {
            gradient(p * kVector, v);
            multiply(v, v);
          };
          fold_lane<real, kVector>(lane, group.lanes, to.unit / kVector, squares, total);
        });
      });
    }
    for_each_pack<weight_t>(group, to.unit, to.unit, [&](auto pack, int z) {
      Held<weight_t, pack> held;
      held.load_from(to, rule, at + z);
      real g[pack];
      gradient(z, g);
      move_pack(to, rule, step, at + z, rate, held, g);
    });
  }
}

template <Squares kSquares, typename Sums>
__global__ void __launch_bounds__(kThreads) update_kernel(Sums sums, Moved<typename Sums::weight_t> to, int lanes) {
  const Group group = group_of(lanes);
  const Touches& touches = sums.touches;
  const Step& step = *to.step;
  for (int64_t first = group.index; first < touches.count; first += group.count) {
    if (!touches.begins_slot(first)) continue;
    const int64_t width = sums.width(first), slot = touches.slot(first);
    for (int z = 0; z < width; z += to.unit) {
      move<kSquares>(group, to, step, slot + z / to.unit,
                     [&](int d, auto& sum) { sums.sum(first, width, z + d, sum); });
    }
  }
}

// --- the operator: arguments as in embeddings/ops.py -----------------------------------------------------------------

template <typename Sums>
void update(const Launch& launch, int64_t count, int lanes, const Sums& sums,
            const Moved<typename Sums::weight_t>& to) {
  if (to.rule != kRowWiseAdagrad) return launch(update_kernel<Squares::kNone, Sums>, {count}, lanes, sums, to);
  if (packs_of(to) <= lanes) return launch(update_kernel<Squares::kOnePack, Sums>, {count}, lanes, sums, to);
  launch(update_kernel<Squares::kFolded, Sums>, {count}, lanes, sums, to);
}

void bag_update(const Tensor& grad, Tensor weights, std::optional<Tensor> first, std::optional<Tensor> second,
                const Tensor& ids, std::optional<Tensor> offsets, std::optional<Tensor> sample_weights,
                const Tensor& tables, int64_t probes, int64_t chunks, int64_t index_map, int64_t combine,
                int64_t pooling, int64_t rule, const Tensor& numbers, Names features) {
  const Launch launch(weights);
  const Call call = make_backward_call(grad, weights, ids, offsets, sample_weights, tables,
                                       {probes, chunks, index_map, combine, pooling}, features);
  check_state(weights, first, second, rule, numbers);
  const Tensor dense = summable(grad, weights);
  with_lookup(call, dense, argmax_of(launch, call), [&](auto lookup) {
    using Lookup = decltype(lookup);
    using weight_t = typename Lookup::weight_t;
    using real = typename Lookup::real;
    const Moved<weight_t> to{weights.mutable_data_ptr<weight_t>(),
                             first ? first->mutable_data_ptr<real>() : nullptr,
                             second ? second->mutable_data_ptr<real>() : nullptr,
                             static_cast<const Step*>(numbers.const_data_ptr()),
                             rule,
                             static_cast<int>(call.unit)};
    const int lanes = Typical<weight_t>(call).slot_lanes();
    require(rule != kRowWiseAdagrad || packs_of(to) <= lanes << kMaxLevels,
            "row-wise adagrad on CUDA takes rows of at most 4096 * 16 bytes, or 4096 numbers where those are no whole "
            "number of 16 bytes");
    SortedTouches sorted = sort_touches(launch, call, lookup);
    const int64_t count = sorted.touches.count;
    if (count == 0) return;
    with_passed_back(call, lookup, [&](auto passed_back) {
      using PassedBack = decltype(passed_back);
      using number_t = typename PassedBack::weight_t;
      using sum_t = typename PassedBack::real;
      const SlotSums<PassedBack> sums = sums_of_slots(launch, call, passed_back, sorted);
      if constexpr (std::is_same_v<PassedBack, Shares<number_t>>) {
        update(launch, count, lanes, sums, to);
      } else {  // all sums must be there before a slot moves
        const int64_t* rows = number_rows(launch, call, lookup, sorted);
        // no more than the slab has, nor than the batch reads: of a vector's numbers, or of one per other probe
        const int64_t longest = call.columns + call.at.num_features * call.at.probes;
        const int64_t reads = call.at.probes * longest * (call.offsets ? call.at.num_ids : call.at.batch_size);
        sum_t* values = sorted.allocate<sum_t>(call, std::min(call.num_units * call.unit, reads));
        int64_t* units = nullptr;
        launch(slots_kernel<PassedBack, sum_t>, {count}, lanes, sums, rows, units, values);
        update(launch, count, lanes, KeptSums<number_t>{sorted.touches, rows, values, call.unit}, to);
      }
    });
  });
}

}  // namespace
}  // namespace embeddings::inline cuda

STABLE_TORCH_LIBRARY_IMPL(EMBEDDINGS_LIBRARY, EMBEDDINGS_DEVICE, m) {
  m.impl("bag_update", TORCH_BOX(&embeddings::bag_update));
}
