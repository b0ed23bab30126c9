// One id's vector on the CPU, whatever the map, the probes and how they are combined.
#pragma once

#include "cpu_call.h"

namespace embeddings::inline cpu {

// Numbers of one slot, in the accumulator's type.
template <typename weight_t>
struct Chunk {
  using real = typename Accumulator<weight_t>::type;
  const weight_t* numbers;
  real sign;

  real operator[](int64_t z) const { return static_cast<real>(numbers[z]) * sign; }  // * 1 is exact
};

// Reads the vectors of one feature's ids, chunk by chunk.
template <typename weight_t, typename Map>
class Reader {
 public:
  using real = typename Accumulator<weight_t>::type;

  HOST_DEVICE Reader(const Call& call, const Map& map, int64_t f)
      : map_(map),
        combine_(call.combine),
        probes_(call.at.probes),
        first_(call.at.table(f, 0)),
        tables_(&call.at.table(f, 0)),
        slab_(call.weights_at<weight_t>()) {}

  HOST_DEVICE int64_t probes() const { return probes_; }
  HOST_DEVICE const Table& table(int64_t k) const { return tables_[k]; }

  // From here on that id is read; false if it has no weights.
  HOST_DEVICE bool look_up(int64_t id) {
    if (Map::ranged && (id < 0 || id >= first_.num_embeddings)) return false;
    if (probes() < 1) __builtin_unreachable();  // make_call has checked
    for (int64_t k = 0; k < probes(); ++k) keys_[k] = map_.key(table(k), id);
    return true;
  }
  // Asks for its weights. Forced inline: gcc drops a call whose only effect is a prefetch.
  HOST_DEVICE void prefetch() const {
    for (int64_t k = 0; k < probes(); ++k) {
      for (int64_t c = 0, chunks = table(k).chunks(); c < chunks; ++c) {
        const char* from = reinterpret_cast<const char*>(chunk(k, c).numbers);
        for (size_t line = 0; line < table(k).width * sizeof(weight_t); line += 64) __builtin_prefetch(from + line);
      }
    }
  }

  HOST_DEVICE Chunk<weight_t> chunk(int64_t k, int64_t c) const {
    const Read read = map_.read(table(k), keys_[k], c);
    return {slab_ + table(k).begin + read.slot * table(k).width, read.negative ? real(-1) : real(1)};
  }

  // Calls put(d, size, fill) for every chunk of the id's vector, d ascending; fill as in OrderedSum.
  template <typename Put>
  HOST_DEVICE void read(Put put) const {
    const int64_t K = probes();
    if (probes_ == 1 || combine_ == kConcat) {
      for (int64_t k = 0, d = 0; k < K; ++k) {
        const int64_t width = table(k).width;
        for (int64_t c = 0, chunks = Map::one_chunk ? 1 : table(k).chunks(); c < chunks; ++c, d += width) {
          const Chunk<weight_t> from = chunk(k, c);
          put(d, width, [from](int64_t z, auto& piece) {
            for (size_t i = 0; i < std::size(piece); ++i) piece[i] = from[z + i];
          });
        }
      }
      return;
    }
    const int64_t width = first_.width, rows = combine_ == kWeighted ? K - 1 : K;
    for (int64_t c = 0, d = 0; d < first_.dim; ++c, d += width) {
      const Chunks from(*this, rows, c);
      if (combine_ == kMultiply) {
        put(d, width, [&](int64_t z, auto& piece) { from.multiply(z, piece); });
      } else if (combine_ == kAdd) {
        put(d, width, [&](int64_t z, auto& piece) { from.add(z, piece, [](int64_t) { return real(1); }); });
      } else {
        const Chunk<weight_t> importance = chunk(rows, 0);
        put(d, width, [&](int64_t z, auto& piece) { from.add(z, piece, [&](int64_t k) { return importance[k]; }); });
      }
    }
  }

  // Chunk c of probes 0..num_probes, but for one: left to right.
  class Chunks {
   public:
    HOST_DEVICE Chunks(const Reader& reader, int64_t num_probes, int64_t c, int64_t except = -1)
        : first_(reader.chunk(except == 0 ? 1 : 0, c)) {
      for (int64_t k = except == 0 ? 2 : 1; k < num_probes; ++k) {
        if (k != except) others_[num_others_++] = reader.chunk(k, c);
      }
    }
    template <typename Piece>
    HOST_DEVICE void multiply(int64_t z, Piece& piece) const {
      for (size_t i = 0; i < std::size(piece); ++i) piece[i] = first_[z + i];
      for (int64_t k = 0; k < num_others_; ++k) {
        for (size_t i = 0; i < std::size(piece); ++i) piece[i] *= others_[k][z + i];
      }
    }
    // Chunk k times weight(k).
    template <typename Piece, typename Weight>
    HOST_DEVICE void add(int64_t z, Piece& piece, Weight weight) const {
      for (size_t i = 0; i < std::size(piece); ++i) piece[i] = first_[z + i] * weight(0);  // * 1 is exact
      for (int64_t k = 0; k < num_others_; ++k) {
        for (size_t i = 0; i < std::size(piece); ++i) piece[i] += others_[k][z + i] * weight(k + 1);
      }
    }

   private:
    Chunk<weight_t> first_, others_[kMaxProbes];
    int64_t num_others_ = 0;
  };

 private:
  const Map map_;
  const int64_t combine_, probes_;
  const Table first_;  // a copy: what is read for every id need not be loaded for every id
  const Table* tables_;
  const weight_t* slab_;
  uint64_t keys_[kMaxProbes];
};

// v replaces best: the first of equals wins, and a NaN, once met, stays.
template <typename real>
bool replaces(real v, real best) {
  return best == best && !(v <= best);
}

// Writes max over the bag to best [L] and, if wanted, where each maximum came from to argmax [L] (-1 in an empty bag).
template <typename Reader, typename real>
void max_of_bag(const Call& call, Reader& reader, int64_t f, int64_t b, real* best, int64_t* argmax,
                FirstError& error) {
  bool any = false;
  for (int64_t n = call.at.begin(f, b); n < call.at.end(f, b); ++n) {
    if (!reader.look_up(call.at.id(n))) {
      error.bad_id(call, f, b, n);
      continue;
    }
    reader.read([&](int64_t d, int64_t size, auto fill) {
      for (int64_t z = 0; z < size; ++z) {
        real v[1];
        fill(z, v);
        if (any && !replaces(v[0], best[d + z])) continue;
        best[d + z] = v[0];
        if (argmax) argmax[d + z] = n;
      }
    });
    any = true;
  }
  if (any) return;
  std::fill_n(best, call.length(f), real(0));
  if (argmax) std::fill_n(argmax, call.length(f), int64_t(-1));
}

}  // namespace embeddings::inline cpu
