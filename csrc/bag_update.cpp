// The CPU kernel of fused updates: a slab's optimizer steps as its gradient is summed, so that no gradient is kept.
#include "cpu_gradient.h"
#include "update.h"

namespace embeddings::inline cpu {
namespace {

// Applies sums to the slots of a slice.
template <Rule kRule, typename weight_t>
class Updater : public Sink<typename Accumulator<weight_t>::type> {
 public:
  using real = typename Accumulator<weight_t>::type;

  // first, second: the rule's state, per number or per unit, or nullptr
  Updater(weight_t* slab, void* first, void* second, const Slice& slice, int64_t unit, const Step& step)
      : slab_(slab),
        first_(static_cast<real*>(first)),
        second_(static_cast<real*>(second)),
        begin_(slice.begin),
        width_(slice.width),
        unit_(unit),
        step_(step),
        lr_(static_cast<real>(step.lr)),
        weight_decay_(static_cast<real>(step.weight_decay)),
        eps_(static_cast<real>(step.eps)),
        draw_(static_cast<int64_t>(step.draw)),
        squares_(unit) {}

  void prefetch(const int64_t* slots, int64_t count) override {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = begin_ + slots[i] * width_;
      ask_for(slab_ + at);
      if constexpr (kRule == kRowWiseAdagrad) __builtin_prefetch(first_ + at / unit_, 1);
      if constexpr (kRule == kAdagrad || kRule == kAdam) ask_for(first_ + at);
      if constexpr (kRule == kAdam) ask_for(second_ + at);
    }
  }

  void put(const int64_t* slots, int64_t count, const real* sums) override {
    with_width(unit_, [&](auto unit) {
      for (int64_t i = 0; i < count; ++i, sums += width_) {
        const int64_t at = begin_ + slots[i] * width_;
        for (int64_t z = 0; z < width_; z += unit_) step<unit.value>(at + z, sums + z);
      }
    });
  }

 private:
  template <typename number_t>
  HOST_DEVICE void ask_for(const number_t* numbers) const {
    for (int64_t z = 0; z < width_; z += 64 / sizeof(number_t)) __builtin_prefetch(numbers + z, 1);
  }

  // On the unit whose first number is `at`; kUnit: its size, if known.
  template <int kUnit>
  void step(int64_t at, const real* __restrict__ sum) {
    const int64_t size = kUnit ? kUnit : unit_;
    weight_t* __restrict__ w = slab_ + at;
    const auto gradient = [&](int64_t z) {
      return weight_decay_ == 0 ? sum[z] : sum[z] + static_cast<real>(w[z]) * weight_decay_;
    };
    const auto subtract = [&](int64_t z, real change) {
      w[z] = rounded<weight_t>(static_cast<real>(w[z]) - change, draw_, at + z);
    };
    if constexpr (kRule == kSgd) {
      for (int64_t z = 0; z < size; ++z) subtract(z, gradient(z) * lr_);
    } else if constexpr (kRule == kAdagrad) {
      real* __restrict__ total = first_ + at;
      for (int64_t z = 0; z < size; ++z) {
        const real g = gradient(z);
        total[z] += g * g;
        subtract(z, lr_ * g / (std::sqrt(total[z]) + eps_));
      }
    } else if constexpr (kRule == kRowWiseAdagrad) {
      real known[kUnit ? kUnit : 1];
      real* squares = kUnit ? known : squares_.data();
      for (int64_t z = 0; z < size; ++z) squares[z] = gradient(z) * gradient(z);
      real& total = first_[at / unit_];
      total += fold(squares, size) / static_cast<real>(size);
      const real rate = 1 / (std::sqrt(total) + eps_) * lr_;  // as torch divides a number by a tensor
      for (int64_t z = 0; z < size; ++z) subtract(z, gradient(z) * rate);
    } else {
      real* __restrict__ mean = first_ + at, * __restrict__ square = second_ + at;
      const real keep1 = static_cast<real>(step_.beta1), take1 = static_cast<real>(1 - step_.beta1);
      const real keep2 = static_cast<real>(step_.beta2), take2 = static_cast<real>(1 - step_.beta2);
      const real correction = static_cast<real>(step_.correction);
      for (int64_t z = 0; z < size; ++z) {
        const real g = gradient(z);
        mean[z] = mean[z] * keep1 + g * take1;
        square[z] = square[z] * keep2 + g * g * take2;
        subtract(z, lr_ * mean[z] / (std::sqrt(square[z] / correction) + eps_));
      }
    }
  }

  weight_t* slab_;
  real *first_, *second_;
  const int64_t begin_, width_, unit_;
  const Step step_;
  const real lr_, weight_decay_, eps_;
  const int64_t draw_;
  std::vector<real> squares_;
};

// Keeps sums until all are there.
template <typename real>
struct Keeper : Sink<real> {
  int64_t* slots;
  real* sums;
  int64_t width;

  Keeper(int64_t* slots, real* sums, int64_t width) : slots(slots), sums(sums), width(width) {}
  void put(const int64_t* some, int64_t count, const real* their_sums) override {
    slots = std::copy_n(some, count, slots);
    sums = std::copy_n(their_sums, count * width, sums);
  }
};

// updater(part): the sink that updates a part's slots.
template <typename weight_t, typename MakeUpdater>
void update(const Call& call, const std::vector<Slice>& slices, const Tensor& grad, const MakeUpdater& updater) {
  using real = typename Accumulator<weight_t>::type;
  backward<weight_t>(call, slices, grad.const_data_ptr<real>(), [&](Touches& touches, const SumPart<real>& sum) {
    if (!reads_others(call)) {
      return for_each_part(touches, call.unit, [&](int64_t, const Touches::Part& part) {
        touches.sort(part);
        sum(part, *updater(part));
      });
    }
    const std::vector<int64_t> starts = sort_and_count(touches, slices, call.unit);
    const auto sums = std::make_unique_for_overwrite<real[]>(starts.back());
    const auto slots = std::make_unique_for_overwrite<int64_t[]>(starts.back() / call.unit);
    for_each_part(touches, call.unit, [&](int64_t p, const Touches::Part& part) {
      Keeper<real> sink(slots.get() + starts[p] / call.unit, sums.get() + starts[p], slices[part.slice].width);
      sum(part, sink);
    });
    for_each_part(touches, call.unit, [&](int64_t p, const Touches::Part& part) {
      const int64_t count = (starts[p + 1] - starts[p]) / slices[part.slice].width;
      updater(part)->put(slots.get() + starts[p] / call.unit, count, sums.get() + starts[p]);
    });
  });
}

template <typename Function>
void with_rule(int64_t rule, const Function& function) {
  switch (rule) {
    case kSgd: return function(std::integral_constant<Rule, kSgd>{});
    case kAdagrad: return function(std::integral_constant<Rule, kAdagrad>{});
    case kRowWiseAdagrad: return function(std::integral_constant<Rule, kRowWiseAdagrad>{});
    case kAdam: return function(std::integral_constant<Rule, kAdam>{});
    default: fail("unknown rule");
  }
}

// --- the operator: arguments as in embeddings/ops.py -----------------------------------------------------------------

void bag_update(const Tensor& grad, Tensor weights, std::optional<Tensor> first, std::optional<Tensor> second,
                const Tensor& ids, std::optional<Tensor> offsets, std::optional<Tensor> sample_weights,
                const Tensor& tables, int64_t probes, int64_t chunks, int64_t index_map, int64_t combine,
                int64_t pooling, int64_t rule, const Tensor& numbers, Names features) {
  const Call call = make_backward_call(grad, weights, ids, offsets, sample_weights, tables,
                                       {probes, chunks, index_map, combine, pooling}, features);
  check_state(weights, first, second, rule, numbers);
  const std::vector<Slice> slices = check_tables(call, Columns::kSome);
  const Tensor dense = summable(grad, weights);
  with_dtype(weights.scalar_type(), [&](auto weight) {
    using weight_t = decltype(weight);
    auto* slab = weights.mutable_data_ptr<weight_t>();
    void* first_at = first ? first->mutable_data_ptr() : nullptr;
    void* second_at = second ? second->mutable_data_ptr() : nullptr;
    const Step& step = *static_cast<const Step*>(numbers.const_data_ptr());
    require(step.draw >= 0 && step.draw < 9007199254740992.0, "the step's draw must be a whole number below 2^53");
    update<weight_t>(call, slices, dense, [&](const Touches::Part& part) {
      std::unique_ptr<Sink<typename Accumulator<weight_t>::type>> updater;
      with_rule(rule, [&](auto known) {
        updater = std::make_unique<Updater<known.value, weight_t>>(slab, first_at, second_at, slices[part.slice],
                                                                   call.unit, step);
      });
      return updater;
    });
  });
}

}  // namespace
}  // namespace embeddings::inline cpu

STABLE_TORCH_LIBRARY_IMPL(embeddings, CPU, m) {
  m.impl("bag_update", TORCH_BOX(&embeddings::bag_update));
}
