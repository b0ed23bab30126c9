// The CUDA kernels of fused updates: bag_update.cpp's operator, with its bits. Nothing waits for the device, and what
// changes from step to step is read there, so a captured graph may hold it.
#include "cuda_touches.h"
#include "update.h"

namespace embeddings {
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

// Adds to a unit's state the mean of its gradient's squares; what its gradient is then multiplied by. gradient(z, v)
template <typename weight_t, typename Gradient>
__device__ typename Accumulator<weight_t>::type row_rate(const Group& group, const Moved<weight_t>& to,
                                                         const Step& step, int64_t at, Gradient gradient) {
  using real = typename Accumulator<weight_t>::type;
  real rate = 0;
  const auto with_pack = [&](auto known) {
    constexpr int pack = decltype(known)::value;
    rate = over_lanes<real, pack>(
        group,
        [&](int lane, real(&total)[pack]) {
          fold_lane<real, pack>(
              lane, group.lanes, to.unit / pack,
              [&](int p, real(&squares)[pack]) {
                gradient(p * pack, squares);
                for (int i = 0; i < pack; ++i) squares[i] *= squares[i];
              },
              total);
        },
        [&](real(&sum)[pack]) {
          for (int half = pack / 2; half > 0; half /= 2) {
            for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
          }
          real& total = to.first[at / to.unit];
          total += sum[0] / static_cast<real>(to.unit);
          return 1 / (std::sqrt(total) + static_cast<real>(step.eps)) * static_cast<real>(step.lr);
        });
  };
  constexpr int kWide = 16 / sizeof(weight_t);
  if (to.unit % kWide == 0) {
    with_pack(std::integral_constant<int, kWide>{});
  } else {
    with_pack(std::integral_constant<int, 1>{});
  }
  return rate;
}

// --- one step --------------------------------------------------------------------------------------------------------

// On the unit whose first number is `at`. sum(z, v): numbers z.. of its gradient's sum.
template <typename weight_t, typename Sum>
__device__ void move(const Group& group, const Moved<weight_t>& to, const Step& step, int64_t at, Sum sum) {
  using real = typename Accumulator<weight_t>::type;
  const real lr = static_cast<real>(step.lr), eps = static_cast<real>(step.eps);
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
  const real rate = to.rule == kRowWiseAdagrad ? row_rate(group, to, step, at, gradient) : lr;
  for_each_pack<weight_t>(group, to.unit, to.unit, [&](auto pack, int z) {
    real change[pack], w[pack], state[pack], square[pack];
    weight_t moved[pack];
    gradient(z, change);
    load(to.weights + at + z, w);
    if (to.rule == kAdagrad) {
      load(to.first + at + z, state);
      for (int i = 0; i < pack; ++i) {
        state[i] += change[i] * change[i];
        change[i] = lr * change[i] / (std::sqrt(state[i]) + eps);
      }
      store(to.first + at + z, state);
    } else if (to.rule == kAdam) {
      const real keep1 = static_cast<real>(step.beta1), take1 = static_cast<real>(1 - step.beta1);
      const real keep2 = static_cast<real>(step.beta2), take2 = static_cast<real>(1 - step.beta2);
      const real correction = static_cast<real>(step.correction);
      load(to.first + at + z, state);
      load(to.second + at + z, square);
      for (int i = 0; i < pack; ++i) {
        state[i] = state[i] * keep1 + change[i] * take1;
        square[i] = square[i] * keep2 + change[i] * change[i] * take2;
        change[i] = lr * state[i] / (std::sqrt(square[i] / correction) + eps);
      }
      store(to.first + at + z, state);
      store(to.second + at + z, square);
    } else {
      for (int i = 0; i < pack; ++i) change[i] *= rate;
    }
    for (int i = 0; i < pack; ++i) {
      moved[i] = rounded<weight_t>(w[i] - change[i], static_cast<int64_t>(step.draw), at + z + i);
    }
    store(to.weights + at + z, moved);
  });
}

template <typename Sums>
__global__ void __launch_bounds__(kThreads) update_kernel(Sums sums, Moved<typename Sums::weight_t> to, int lanes) {
  const Group group = group_of(lanes);
  const Touches& touches = sums.touches;
  const Step step = *to.step;
  for (int64_t first = group.index; first < touches.count; first += group.count) {
    if (!touches.begins_slot(first)) continue;
    const int64_t width = sums.width(first), begin = static_cast<int64_t>(touches.slots[first]) * to.unit;
    for (int z = 0; z < width; z += to.unit) {
      move(group, to, step, begin + z, [&](int d, auto& sum) { sums.sum(first, width, z + d, sum); });
    }
  }
}

// --- the operator: arguments as in embeddings/ops.py -----------------------------------------------------------------

// Whether a slot's gradient hangs on other slots' weights, so that all sums must be there before one moves.
bool reads_others(const Call& call) {
  return call.at.probes > 1 && (call.combine == kMultiply || call.combine == kWeighted);
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
    const int lanes = Typical<weight_t>(call).slot_lanes();
    constexpr int64_t kWide = 16 / sizeof(weight_t);
    const int64_t packs = call.unit % kWide == 0 ? call.unit / kWide : call.unit;
    require(rule != kRowWiseAdagrad || packs <= lanes << kMaxLevels,
            "row-wise adagrad on CUDA takes rows of at most 4096 * 16 bytes, or 4096 numbers where those are no whole "
            "number of 16 bytes");
    SortedTouches sorted = sort_touches(launch, call, lookup);
    const int64_t count = sorted.touches.count;
    if (count == 0) return;
    const Moved<weight_t> to{weights.mutable_data_ptr<weight_t>(),
                             first ? first->mutable_data_ptr<real>() : nullptr,
                             second ? second->mutable_data_ptr<real>() : nullptr,
                             static_cast<const Step*>(numbers.const_data_ptr()),
                             rule,
                             static_cast<int>(call.unit)};
    const SlotSums<Lookup> sums = sums_of_slots(launch, call, lookup, sorted);
    if (!reads_others(call)) return launch(update_kernel<SlotSums<Lookup>>, count, lanes, sums, to);
    const int64_t* rows = number_rows(launch, call, lookup, sorted);
    // no more than the slab has, nor than the batch reads: of a vector's numbers, or of one per other probe
    const int64_t longest = call.columns + call.at.num_features * call.at.probes;
    const int64_t reads = call.at.probes * longest * (call.offsets ? call.at.num_ids : call.at.batch_size);
    real* values = sorted.allocate<real>(call, std::min(call.num_units * call.unit, reads));
    int64_t* units = nullptr;
    launch(slots_kernel<Lookup, real>, count, lanes, sums, rows, units, values);
    launch(update_kernel<KeptSums<weight_t>>, count, lanes, KeptSums<weight_t>{sorted.touches, rows, values, call.unit},
           to);
  });
}

}  // namespace
}  // namespace embeddings

STABLE_TORCH_LIBRARY_IMPL(EMBEDDINGS_LIBRARY, EMBEDDINGS_DEVICE, m) {
  m.impl("bag_update", TORCH_BOX(&embeddings::bag_update));
}
