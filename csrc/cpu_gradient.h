// Gradients of the slots that a batch touches, on the CPU: found, sorted, summed in order, and handed on.
#pragma once

#include <functional>

#include "cpu_call.h"
#include "cpu_reader.h"
#include "cpu_sums.h"
#include "cpu_touches.h"

namespace embeddings::inline cpu {

// --- what a touch adds, whatever the map, the probes and how they are combined ---------------------------------------

// Where each number of the output came from under max pooling, [B, columns] (-1 in an empty bag); else nothing.
template <typename weight_t, typename Map>
std::vector<int64_t> argmax_of(const Call& call, const Map& map, FirstError& error) {
  using real = typename Accumulator<weight_t>::type;
  if (call.pooling != kMax) return {};
  const int64_t B = call.at.batch_size;
  std::vector<int64_t> argmax(B * call.columns);
  parallel_for(0, call.at.num_features * B, 512, [&](int64_t first, int64_t last) {
    std::vector<real> best(call.columns);
    for (int64_t bag = first; bag < last; ++bag) {
      const int64_t f = bag / B, b = bag % B;
      int64_t* to = argmax.data() + b * call.columns + call.at.table(f, 0).column;
      Reader<weight_t, Map> reader(call, map, f);
      max_of_bag(call, reader, f, b, best.data(), to, error);
    }
  });
  return argmax;
}

struct Occurrence {
  int64_t f, b, n;
};

// What positions of the batch add to the gradients of the weights they read.
template <typename weight_t, typename Map>
struct Contributions {
  using real = typename Accumulator<weight_t>::type;
  const Call& call;
  const Map& map;
  const real* grad;            // [B, columns]
  const real* sample_weights;  // [N] or nullptr
  const int64_t* argmax;       // [B, columns] or nullptr

  // sum += what position n of sample b adds to the slot of chunk c of its probe k.
  template <typename Sum>
  void add_to(Sum& sum, const Occurrence& at, int64_t k, int64_t c) const {
    const Table& table = call.at.table(at.f, k);
    const auto base = base_of(at, table.column + c * table.width);
    if (call.at.probes == 1 || call.combine == kConcat || call.combine == kAdd) {
      return put(sum, at, k, c, base);
    }
    Reader<weight_t, Map> reader(call, map, at.f);
    reader.look_up(call.at.id(at.n));
    if (call.combine == kMultiply) {
      const typename Reader<weight_t, Map>::Chunks factors(reader, call.at.probes, c, k);
      return put(sum, at, k, c, [&](int64_t z, auto& piece) {
        real others[std::extent_v<std::remove_reference_t<decltype(piece)>>];
        factors.multiply(z, others);
        base(z, piece);
        for (size_t i = 0; i < std::size(piece); ++i) piece[i] *= others[i];
      });
    }
    if (k < call.at.probes - 1) {
      const real importance = reader.chunk(call.at.probes - 1, 0)[k];
      return put(sum, at, k, c, [&](int64_t z, auto& piece) {
        base(z, piece);
        for (auto& number : piece) number *= importance;
      });
    }
    put(sum, at, k, c, [&](int64_t z, auto& piece) {
      for (size_t i = 0; i < std::size(piece); ++i) piece[i] = dot(reader, at, z + i);
    });
  }

 private:
  // The gradient of numbers column, column + 1, ... of the vector of one id of the bag, as a fill of OrderedSum.
  auto base_of(const Occurrence& at, int64_t column) const {
    const real* g = grad + at.b * call.columns + column;
    const int64_t* winner = argmax ? argmax + at.b * call.columns + column : nullptr;
    const real w = sample_weights ? sample_weights[at.n] : real(1);
    const real divisor = call.at.divisor<real>(at.f, at.b, call.pooling);
    return [=, n = at.n](int64_t z, auto& piece) {
      for (size_t i = 0; i < std::size(piece); ++i) piece[i] = g[z + i] * w;  // * 1 is exact
      if (winner) {
        for (size_t i = 0; i < std::size(piece); ++i) piece[i] = winner[z + i] == n ? piece[i] : real(0);
      } else if (divisor != real(1)) {
        for (auto& number : piece) number /= divisor;
      }
    };
  }
  // The gradient of number k of the importance vector: of the weight of probe k.
  real dot(const Reader<weight_t, Map>& reader, const Occurrence& at, int64_t k) const {
    const Table& table = call.at.table(at.f, k);
    OrderedNumber<real> sum;
    sum.clear();
    for (int64_t c = 0, chunks = table.chunks(); c < chunks; ++c) {
      const auto base = base_of(at, table.column + c * table.width);
      const Chunk<weight_t> from = reader.chunk(k, c);
      for (int64_t z = 0; z < table.width; ++z) {
        real g[1];
        base(z, g);
        sum.add(g[0] * from[z]);
      }
    }
    return sum.finish();
  }
  template <typename Sum, typename Fill>
  void put(Sum& sum, const Occurrence& at, int64_t k, int64_t c, Fill fill) const {
    const Table& table = call.at.table(at.f, k);
    sum.next();
    if (call.index_map != kSigned || !map.read(table, map.key(table, call.at.id(at.n)), c).negative) {
      return sum.put(0, table.width, fill);
    }
    sum.put(0, table.width, [&](int64_t z, auto& piece) {
      fill(z, piece);
      for (auto& number : piece) number = -number;
    });
  }
};

// Who made touch i of its slice: position n in the bag of sample b of feature f, chunk c of its probe k.
struct Origin {
  Occurrence at;
  int64_t k, c;
};

inline Origin origin_of(const Call& call, const Slice& slice, const Touches& touches, int64_t s, int64_t i) {
  const Touches::Run& run = touches.run_of(s, i);
  int64_t rest = touches.first_of(s) + i - run.begin;
  const int64_t n = run.first_id + rest / run.per_id;
  rest %= run.per_id;
  int64_t row = run.first_row;
  while (rest >= call.at.tables[slice.rows[row]].chunks()) rest -= call.at.tables[slice.rows[row++]].chunks();
  return {{run.f, call.bag_of(run.f, n), n}, slice.rows[row] % call.at.probes, rest};
}

// --- sums ------------------------------------------------------------------------------------------------------------

// Takes the sums of the slots that a part touches, ascending, some at a time. One slice's alone.
template <typename real>
struct Sink {
  static constexpr int64_t kMost = 32;  // slots at a time: as many reads as a core has under way, and some
  virtual ~Sink() = default;
  // They will be put soon.
  virtual void prefetch(const int64_t* /*slots*/, int64_t /*count*/) {}
  // sums: [count, width]
  virtual void put(const int64_t* slots, int64_t count, const real* sums) = 0;
};

// Slots of the touches [begin, end): few, so that those of the next are on their way while these are summed.
struct Ahead {
  const uint64_t *begin, *end;
  int64_t count, slots[Sink<float>::kMost];
};

inline Ahead look_ahead(const Touches& touches, const uint64_t* begin, const uint64_t* last, int64_t most) {
  Ahead ahead{begin, begin, 0, {}};
  for (; ahead.end < last; ++ahead.end) {
    const auto slot = static_cast<int64_t>(touches.slot(*ahead.end));
    if (ahead.count && ahead.slots[ahead.count - 1] == slot) continue;
    if (ahead.count == most) break;
    ahead.slots[ahead.count++] = slot;
  }
  return ahead;
}

// to [width] = the sum of what the touches [touch, end) of one slot add: vectors of the gradient as they are.
template <int kWidth, typename real>
HOST_DEVICE void sum_vectors(const Touches& touches, const uint64_t* touch, const uint64_t* end, const real* grad,
                             int64_t width, real* to) {
  const auto from = [&](const uint64_t* t) { return grad + (touches.kept(*t) >> 1); };
  const auto negative = [&](const uint64_t* t) { return touches.kept(*t) & 1; };
  constexpr int64_t kNear = 16;  // touches of a slot that were not asked for while it was ahead
  if constexpr (kWidth > 0) {
    const auto read = [&] {
      if (touch + kNear < end) __builtin_prefetch(from(touch + kNear));
      Numbers<real, kWidth> v;
      v.load(from(touch));
      if (negative(touch)) v.negate();
      return v;
    };
    RegisterSum<real, kWidth> sum(read());
    while (++touch < end) sum.add(read());
    sum.finish().store(to);
  } else {
    for (int64_t z = 0; z < width; ++z) {  // a number at a time: rare widths only
      real run = 0, total = 0;
      for (int64_t i = 0; touch + i < end; ++i) {
        const real v = from(touch + i)[z], signed_v = negative(touch + i) ? -v : v;
        if (i % kRun == 0) {
          if (i) total = i == kRun ? run : total + run;
          run = signed_v;
        } else {
          run += signed_v;
        }
      }
      to[z] = end - touch > kRun ? total + run : run;
    }
  }
}

template <int kWidth, typename real>
void sum_part(const Touches& touches, const Touches::Part& part, const real* grad, int64_t width, Sink<real>& sink) {
  constexpr int64_t kMost = Sink<real>::kMost, kNear = 4 * kMost;
  const int64_t most = std::clamp<int64_t>(4096 / width, 1, kMost);
  std::vector<real> sums(most * width);
  const uint64_t* last = touches.at(part) + (part.end - part.begin);
  const auto look = [&](const uint64_t* begin) {
    const Ahead ahead = look_ahead(touches, begin, last, most);
    for (const uint64_t* touch = begin; touch < std::min(ahead.end, begin + kNear); ++touch) {
      const char* vector = reinterpret_cast<const char*>(grad + (touches.kept(*touch) >> 1));
      for (size_t line = 0; line < width * sizeof(real); line += 64) __builtin_prefetch(vector + line);
    }
    sink.prefetch(ahead.slots, ahead.count);
    return ahead;
  };
  for (Ahead now, next = look(touches.at(part)); next.count;) {
    now = next;
    next = look(now.end);
    const uint64_t* touch = now.begin;
    for (int64_t i = 0; i < now.count; ++i) {
      const uint64_t* end = touch + 1;
      while (end < now.end && static_cast<int64_t>(touches.slot(*end)) == now.slots[i]) ++end;
      sum_vectors<kWidth>(touches, touch, end, grad, width, sums.data() + i * width);
      touch = end;
    }
    sink.put(now.slots, now.count, sums.data());
  }
}

template <typename weight_t, typename Map>
void sum_contributions(const Contributions<weight_t, Map>& contributions, const Slice& slice, const Touches& touches,
                       const Touches::Part& part, Sink<typename Accumulator<weight_t>::type>& sink) {
  const uint64_t *touch = touches.at(part), *end = touches.at(part) + (part.end - part.begin);
  OrderedSum<typename Accumulator<weight_t>::type> sum(slice.width);
  while (touch < end) {
    const auto slot = static_cast<int64_t>(touches.slot(*touch));
    sum.clear(slice.width);
    for (; touch < end && static_cast<int64_t>(touches.slot(*touch)) == slot; ++touch) {
      const auto i = static_cast<int64_t>(touches.kept(*touch));
      const auto [at, k, c] = origin_of(contributions.call, slice, touches, part.slice, i);
      contributions.add_to(sum, at, k, c);
    }
    sink.put(&slot, 1, sum.finish());
  }
}

// --- one backward ----------------------------------------------------------------------------------------------------

// True if every touch adds a vector of the gradient as it is.
inline bool adds_vectors(const Call& call) {
  return call.pooling != kMax && !call.sample_weights && !reads_others(call);
}

// grad [B, columns] over the number of ids of each bag: what every id of it gets under mean pooling.
template <typename real>
std::unique_ptr<real[]> divided(const Call& call, const real* grad) {
  if (call.pooling != kMean || !call.offsets) return nullptr;
  const int64_t B = call.at.batch_size;
  auto out = std::make_unique_for_overwrite<real[]>(B * call.columns);
  parallel_for(0, B, 64, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      for (int64_t f = 0; f < call.at.num_features; ++f) {
        const real divisor = call.at.divisor<real>(f, b, call.pooling);
        const int64_t begin = b * call.columns + call.at.table(f, 0).column;
        for (int64_t d = begin, end = begin + call.length(f); d < end; ++d) {
          out[d] = divisor == real(1) ? grad[d] : grad[d] / divisor;
        }
      }
    }
  });
  return out;
}

// What a touch keeps, where it adds a vector of the gradient as it is: where the vector begins, and its sign.
struct KeptVector {
  const Call& call;
  int bits(int64_t) const { return bits_of(call.at.batch_size * call.columns) + 1; }
  uint64_t operator()(const Table& table, int64_t b, int64_t c, int64_t, bool negative) const {
    return static_cast<uint64_t>(b * call.columns + table.column + c * table.width) << 1 | negative;
  }
};
// Elsewhere: who made it, as `origin_of` tells.
struct KeptPlace {
  int bits(int64_t touches) const { return bits_of(touches); }
  uint64_t operator()(const Table&, int64_t, int64_t, int64_t i, bool) const { return static_cast<uint64_t>(i); }
};

// Sums a part, which has been sorted.
template <typename real>
using SumPart = std::function<void(const Touches::Part&, Sink<real>&)>;

// Finds what the batch touches and calls consume(touches, sum).
template <typename weight_t>
void backward(const Call& call, const std::vector<Slice>& slices, const typename Accumulator<weight_t>::type* grad,
              const std::function<void(Touches&, const SumPart<typename Accumulator<weight_t>::type>&)>& consume) {
  std::optional<Touches> touches;
  using real = typename Accumulator<weight_t>::type;
  if (adds_vectors(call)) {
    with_map(call.index_map, [&](auto map) { touches.emplace(call, map, slices, KeptVector{call}); });
    const auto scaled = divided(call, grad);
    const real* from = scaled ? scaled.get() : grad;
    return consume(*touches, [&](const Touches::Part& part, auto& sink) {
      const int64_t width = slices[part.slice].width;
      with_width(width, [&](auto known) { sum_part<known.value>(*touches, part, from, width, sink); });
    });
  }
  with_map(call.index_map, [&](auto map) {
    touches.emplace(call, map, slices, KeptPlace{});
    FirstError none;
    const std::vector<int64_t> argmax = argmax_of<weight_t>(call, map, none);
    const Contributions<weight_t, decltype(map)> contributions{call, map, grad, call.sample_weights_at<real>(),
                                                               argmax.empty() ? nullptr : argmax.data()};
    consume(*touches, [&](const Touches::Part& part, auto& sink) {
      sum_contributions(contributions, slices[part.slice], *touches, part, sink);
    });
  });
}

// Calls function(p, part) for every part that has touches. unit: numbers of a touch, about.
template <typename Function>
void for_each_part(const Touches& touches, int64_t unit, const Function& function) {
  for_each_task(static_cast<int64_t>(touches.parts().size()), touches.count() * unit, [&](int64_t p) {
    const Touches::Part& part = touches.parts()[p];
    if (part.begin < part.end) function(p, part);
  });
}

// Sorts all parts. Returns how many numbers the touched slots of the parts before each one have, and of all.
inline std::vector<int64_t> sort_and_count(Touches& touches, const std::vector<Slice>& slices, int64_t unit) {
  std::vector<int64_t> starts(touches.parts().size() + 1);
  for_each_part(touches, unit, [&](int64_t p, const Touches::Part& part) {
    touches.sort(part);
    const uint64_t* touch = touches.at(part);
    int64_t unique = 1;
    for (int64_t i = 1; i < part.end - part.begin; ++i) unique += touches.slot(touch[i]) != touches.slot(touch[i - 1]);
    starts[p + 1] = unique * slices[part.slice].width;
  });
  for (size_t p = 1; p < starts.size(); ++p) starts[p] += starts[p - 1];
  return starts;
}

}  // namespace embeddings::inline cpu
