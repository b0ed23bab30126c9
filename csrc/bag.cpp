// The CPU kernels: forward, gradients of the weights (dense or touched units only) and of the per-sample weights.
#include "bag.h"

#include <algorithm>
#include <array>
#include <mutex>
#include <tuple>
#include <vector>

namespace embeddings {
namespace {

using torch::stable::parallel_for;

// --- what is refused -------------------------------------------------------------------------------------------------

// The first bad bag or id in the order feature, sample, position, whichever thread met it; raised when all have joined.
class FirstError {
 public:
  void bad_id(const Call& call, int64_t f, int64_t b, int64_t n) {
    note({f, b, n, call.at.id(n), call.at.table(f, 0).num_embeddings});
  }
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

// Slots that probes read: those of one feature (bloom's), of several features (a shared pool), or one alone.
struct Slice {
  int64_t begin, num_slots, width;
  std::vector<int64_t> rows;  // of tables, ascending

  int64_t end() const { return begin + num_slots * width; }
  bool holds(const Table& table) const {
    return begin == table.begin && num_slots == table.num_slots && width == table.width;
  }
};

// Adds the table of that row to the slice that it reads. False unless the table can be read, and its slice is equal to
// one so far or behind all.
bool add_table(const Call& call, int64_t row, std::vector<Slice>& slices) {
  const Table& table = call.at.tables[row];
  const int64_t size = call.num_units * call.unit;
  if (table.width < 1 || table.width > table.dim || table.dim % table.width || table.chunks() > call.chunks)
    return false;
  if (table.width % call.unit || table.begin % call.unit || table.divisor < 1) return false;
  if (one_chunk(call.index_map) && table.chunks() > 1) return false;
  if (table.begin < 0 || table.begin > size || table.num_slots < 1) return false;
  if (table.num_slots > (size - table.begin) / table.width) return false;
  if (slices.empty() || table.begin >= slices.back().end()) {
    slices.push_back({table.begin, table.num_slots, table.width, {row}});
    return true;
  }
  const auto slice = std::find_if(slices.rbegin(), slices.rend(), [&](const Slice& s) { return s.holds(table); });
  if (slice == slices.rend()) return false;
  slice->rows.push_back(row);
  return true;
}

// The slices, ascending. The batch must cover every feature, and the features' vectors the output: a few rows, checked
// on every call.
std::vector<Slice> check_tables(const Call& call) {
  std::vector<Slice> slices;
  const int64_t K = call.at.probes;
  const bool concat = call.combine == kConcat;
  int64_t column = 0;
  for (int64_t f = 0; f < call.at.num_features; ++f) {
    const Table& first = call.at.table(f, 0);
    if (first.position < 0 || (call.at.batch_size > 0 && first.position >= call.at.num_bags / call.at.batch_size)) {
      fail("the batch has no bags for feature ", call.feature(f), " at position ", first.position);
    }
    unsigned __int128 num_ids = 1;  // that a ranged map can tell apart
    for (int64_t k = 0; k < K; ++k) {
      const Table& table = call.at.table(f, k);
      const bool own =
          table.position == first.position && table.num_embeddings == first.num_embeddings && table.num_embeddings >= 0;
      if (!own || !add_table(call, f * K + k, slices)) {
        fail("feature ", call.feature(f), ": probe ", k, " of ", table.dim, " numbers in slots of ", table.width, ", [",
             table.begin, ", +", table.num_slots, " slots), does not fit its feature, the slices before or a slab of ",
             call.num_units, " units of ", call.unit);
      }
      num_ids = std::min<unsigned __int128>(num_ids * static_cast<uint64_t>(table.num_slots), uint64_t(1) << 63);
      const bool importance = call.combine == kWeighted && k == K - 1;
      const bool alike =
          importance ? table.dim == k && table.width == k : table.dim == first.dim && table.width == first.width;
      if (table.column != column || (table.dim > call.columns && !importance) || !(concat || alike)) {
        fail("feature ", call.feature(f), ": probe ", k, " of ", table.dim, " numbers at column ", table.column,
             " does not fit the others");
      }
      if (concat) column += table.dim;
    }
    if (!concat) column += first.dim;
    if (is_ranged(call.index_map) && first.num_embeddings > 0 &&
        num_ids < static_cast<uint64_t>(first.num_embeddings)) {
      fail("feature ", call.feature(f), ": its slots tell ", static_cast<uint64_t>(num_ids), " ids apart, not ",
           first.num_embeddings);
    }
  }
  if (column != call.columns) fail("the features' vectors take ", column, " columns of ", call.columns);
  return slices;
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

// --- sums in one order -----------------------------------------------------------------------------------------------

// Adds vectors in the order that index_map.h fixes: runs of kRun, then the runs. kPiece numbers are moved at once.
template <typename real, int kPiece>
class OrderedSum {
 public:
  explicit OrderedSum(int64_t capacity) : total_(capacity), run_(capacity) {}
  void clear(int64_t size) { size_ = size, count_ = 0; }

  // The next vector begins; put() gives its numbers, all of them.
  void next() {
    starts_run_ = count_ % kRun == 0;
    if (starts_run_ && count_) close_run();
    ++count_;
  }
  // fill(z, piece): the vector's numbers d + z, d + z + 1, ... go to an array of kPiece numbers, or of one.
  template <typename Fill>
  void put(int64_t d, int64_t size, Fill fill) {
    int64_t z = 0;
    for (; z + kPiece <= size; z += kPiece) {
      add<kPiece>(d, z, fill);
      __asm__ volatile(
          "");  // else gcc gathers the pieces' first numbers, second numbers, ... into vectors: half as fast
    }
    for (; z < size; ++z) add<1>(d, z, fill);
  }
  // The sum; zeros if nothing was added.
  const real* finish() {
    if (count_ == 0) std::fill_n(run_.begin(), size_, real(0));
    if (count_ <= kRun) return run_.data();
    close_run();
    return total_.data();
  }
  // Room for a result that is no sum (max pooling).
  real* scratch() { return run_.data(); }

 private:
  template <int kNumbers, typename Fill>
  HOST_DEVICE void add(int64_t d, int64_t z, Fill& fill) {
    real piece[kNumbers];  // a copy, so that the compiler need not ask whether `to` overlaps the slab
    fill(z, piece);
    real* to = run_.data() + d + z;
    if (starts_run_) {
      for (int i = 0; i < kNumbers; ++i) to[i] = piece[i];
    } else {
      for (int i = 0; i < kNumbers; ++i) to[i] += piece[i];
    }
  }
  void close_run() {
    const bool first = count_ <= kRun;
    for (int64_t d = 0; d < size_; ++d) total_[d] = first ? run_[d] : total_[d] + run_[d];
  }
  std::vector<real> total_, run_;
  int64_t size_ = 0, count_ = 0;
  bool starts_run_ = false;
};

// An ordered sum of single numbers.
template <typename real>
class OrderedNumber {
 public:
  void add(real v) {
    sum_.next();
    sum_.put(0, 1, [v](int64_t, auto& piece) { piece[0] = v; });
  }
  void clear() { sum_.clear(1); }
  real finish() { return *sum_.finish(); }

 private:
  OrderedSum<real, 1> sum_{1};
};

// --- one id's vector -------------------------------------------------------------------------------------------------

// Numbers of one slot, in the accumulator's type.
template <typename weight_t>
struct Chunk {
  using real = typename Accumulator<weight_t>::type;
  const weight_t* numbers;
  real sign;

  real operator[](int64_t z) const { return static_cast<real>(numbers[z]) * sign; }  // * 1 is exact
};

// Reads the vectors of one feature's ids, chunk by chunk. kOne: ids have one probe, as most have; its loops are then
// none.
template <typename weight_t, typename Map, bool kOne>
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

  HOST_DEVICE int64_t probes() const { return kOne ? 1 : probes_; }
  HOST_DEVICE const Table& table(int64_t k) const { return kOne ? first_ : tables_[k]; }

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
    if (kOne || combine_ == kConcat) {
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
  uint64_t keys_[kOne ? 1 : kMaxProbes];
};

// --- forward ---------------------------------------------------------------------------------------------------------

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

// Sums the bag into `sum`, each vector times its sample weight. last: where the feature's ids end.
template <typename weight_t, typename Reader, typename Sum>
HOST_DEVICE void sum_of_bag(const Call& call, Reader& reader, Reader& ahead, const weight_t* sample_weights, int64_t f,
                            int64_t b, int64_t last, Sum& sum, FirstError& error) {
  using real = typename Accumulator<weight_t>::type;
  constexpr int64_t kAhead = 16;  // ids: about the time of one cold read, which costs more to wait for than to add
  for (int64_t n = call.at.begin(f, b), end = call.at.end(f, b); n < end; ++n) {
    if (n + kAhead < last && ahead.look_up(call.at.id(n + kAhead))) ahead.prefetch();
    if (!reader.look_up(call.at.id(n))) {
      error.bad_id(call, f, b, n);
      continue;
    }
    const real w = sample_weights ? static_cast<real>(sample_weights[n]) : real(1);
    sum.next();
    reader.read([&](int64_t d, int64_t size, auto fill) {
      sum.put(d, size, [&fill, w](int64_t z, auto& piece) {
        fill(z, piece);
        for (auto& number : piece) number *= w;  // * 1 is exact
      });
    });
  }
}

template <typename weight_t, bool kOne, int kPiece, typename Map>
void forward(const Call& call, const Map& map, weight_t* out) {
  using real = typename Accumulator<weight_t>::type;
  const auto* sample_weights = call.sample_weights_at<weight_t>();
  const int64_t B = call.at.batch_size;
  FirstError error;
  parallel_for(0, call.at.num_features * B, 512, [&](int64_t first, int64_t last) {
    OrderedSum<real, kPiece> sum(call.columns);
    for (int64_t f = first / B; f * B < last; ++f) {
      Reader<weight_t, Map, kOne> reader(call, map, f), ahead(call, map, f);
      const int64_t length = call.length(f), column = call.at.table(f, 0).column;
      const int64_t end = std::min(call.at.end(f, B - 1), call.at.num_ids);
      for (int64_t b = std::max(first - f * B, int64_t(0)); b < std::min(last - f * B, B); ++b) {
        if (!valid_bag(call, f, b, error)) continue;
        sum.clear(length);
        const real* pooled = sum.scratch();
        if (call.pooling == kMax) {
          max_of_bag(call, reader, f, b, sum.scratch(), nullptr, error);
        } else {
          sum_of_bag(call, reader, ahead, sample_weights, f, b, end, sum, error);
          pooled = sum.finish();
        }
        weight_t* to = out + b * call.columns + column;
        const real divisor = call.at.divisor<real>(f, b, call.pooling);
        if (divisor == real(1)) {
          for (int64_t d = 0; d < length; ++d) to[d] = static_cast<weight_t>(pooled[d]);
        } else {
          for (int64_t d = 0; d < length; ++d) to[d] = static_cast<weight_t>(pooled[d] / divisor);
        }
      }
    }
  });
  error.raise(call);
  check_cover(call);
}

// --- gradients -------------------------------------------------------------------------------------------------------

// Where each number of the output came from under max pooling, [B, columns] (-1 in an empty bag); else nothing.
template <typename weight_t, bool kOne, typename Map>
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
      Reader<weight_t, Map, kOne> reader(call, map, f);
      max_of_bag(call, reader, f, b, best.data(), to, error);
    }
  });
  return argmax;
}

// One chunk of one probe of one id: the slot that it reads, and its place in the order of sums.
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

struct Occurrence {
  int64_t f, b, n;
};

// The touches of one slice, sorted by slot, and what it takes to sum them.
struct SortedSlice {
  std::vector<Occurrence> occurrences;
  std::vector<Touch> touches;  // place = (occurrence * K + k) * chunks + c
  int64_t chunks = 1;          // the most of any probe
  int64_t num_unique = 0;
};

template <typename Map>
SortedSlice sort_slice(const Call& call, const Map& map, const Slice& slice, FirstError& error) {
  SortedSlice sorted;
  const int64_t B = call.at.batch_size, K = call.at.probes;
  for (const int64_t row : slice.rows) sorted.chunks = std::max(sorted.chunks, call.at.tables[row].chunks());
  const int64_t C = sorted.chunks;
  for (size_t row = 0; row < slice.rows.size();) {  // the probes of one feature after another
    const int64_t f = slice.rows[row] / K;
    size_t next = row;
    while (next < slice.rows.size() && slice.rows[next] / K == f) ++next;
    const int64_t limit = call.at.table(f, 0).num_embeddings;
    if (row == 0) {
      const int64_t begin = B > 0 ? call.at.begin(f, 0) : 0, end = B > 0 ? call.at.end(f, B - 1) : 0;
      const bool sane = begin >= 0 && begin <= end && end <= call.at.num_ids;  // offsets are checked bag by bag
      sorted.occurrences.reserve(sane ? end - begin : 0);
      sorted.touches.reserve(sane ? (end - begin) * (next - row) * C : 0);
    }
    for (int64_t b = 0; b < B; ++b) {
      if (!valid_bag(call, f, b, error)) continue;
      for (int64_t n = call.at.begin(f, b); n < call.at.end(f, b); ++n) {
        const int64_t id = call.at.id(n);
        if (Map::ranged && (id < 0 || id >= limit)) {
          error.bad_id(call, f, b, n);
          continue;
        }
        const auto occurrence = static_cast<int64_t>(sorted.occurrences.size());
        sorted.occurrences.push_back({f, b, n});
        for (size_t i = row; i < next; ++i) {
          const int64_t k = slice.rows[i] % K;
          const Table& table = call.at.table(f, k);
          const uint64_t key = map.key(table, id);
          for (int64_t c = 0, chunks = table.chunks(); c < chunks; ++c) {
            sorted.touches.push_back({static_cast<uint64_t>(map.read(table, key, c).slot),
                                      static_cast<uint64_t>((occurrence * K + k) * C + c)});
          }
        }
      }
    }
    row = next;
  }
  sort_by_slot(sorted.touches, static_cast<uint64_t>(slice.num_slots));
  for (size_t i = 0; i < sorted.touches.size(); ++i) {
    sorted.num_unique += i == 0 || sorted.touches[i].slot != sorted.touches[i - 1].slot;
  }
  return sorted;
}

// What positions of the batch add to the gradients of the weights they read.
template <typename weight_t, typename Map, bool kOne>
struct Contributions {
  using real = typename Accumulator<weight_t>::type;
  const Call& call;
  const Map& map;
  const weight_t* grad;            // [B, columns]
  const weight_t* sample_weights;  // [N] or nullptr
  const int64_t* argmax;           // [B, columns] or nullptr

  // sum += what position n of sample b adds to the slot of chunk c of its probe k.
  template <typename Sum>
  void add_to(Sum& sum, const Occurrence& at, int64_t k, int64_t c) const {
    const Table& table = call.at.table(at.f, k);
    const auto base = base_of(at, table.column + c * table.width);
    if (kOne || call.combine == kConcat || call.combine == kAdd) {
      return put(sum, at, k, c, base);
    }
    Reader<weight_t, Map, kOne> reader(call, map, at.f);
    reader.look_up(call.at.id(at.n));
    if (call.combine == kMultiply) {
      const typename Reader<weight_t, Map, kOne>::Chunks factors(reader, call.at.probes, c, k);
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
    const weight_t* g = grad + at.b * call.columns + column;
    const int64_t* winner = argmax ? argmax + at.b * call.columns + column : nullptr;
    const real w = sample_weights ? static_cast<real>(sample_weights[at.n]) : real(1);
    const real divisor = call.at.divisor<real>(at.f, at.b, call.pooling);
    return [=, n = at.n](int64_t z, auto& piece) {
      for (size_t i = 0; i < std::size(piece); ++i) piece[i] = static_cast<real>(g[z + i]) * w;  // * 1 is exact
      if (winner) {
        for (size_t i = 0; i < std::size(piece); ++i) piece[i] = winner[z + i] == n ? piece[i] : real(0);
      } else if (divisor != real(1)) {
        for (auto& number : piece) number /= divisor;
      }
    };
  }
  // The gradient of number k of the importance vector: of the weight of probe k.
  real dot(const Reader<weight_t, Map, kOne>& reader, const Occurrence& at, int64_t k) const {
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

// Sums each touched slot's contributions in order and hands them on: write(u, slot, sum [width]), u counts the slice's
// touched slots.
template <int kPiece, typename weight_t, typename Map, bool kOne, typename Write>
void reduce_slice(const Contributions<weight_t, Map, kOne>& contributions, const Slice& slice,
                  const SortedSlice& sorted, Write write) {
  const Call& call = contributions.call;
  const int64_t K = kOne ? 1 : call.at.probes, C = Map::one_chunk ? 1 : sorted.chunks;
  OrderedSum<typename Accumulator<weight_t>::type, kPiece> sum(slice.width);
  int64_t u = 0;
  for (size_t i = 0; i < sorted.touches.size(); ++u) {
    const uint64_t slot = sorted.touches[i].slot;
    sum.clear(slice.width);
    for (; i < sorted.touches.size() && sorted.touches[i].slot == slot; ++i) {
      const auto place = static_cast<int64_t>(sorted.touches[i].place);
      const int64_t probe = place / C;  // occurrence * K + k
      contributions.add_to(sum, sorted.occurrences[probe / K], probe % K, place % C);
    }
    write(u, static_cast<int64_t>(slot), sum.finish());
  }
}

// The gradient, slice by slice (in parallel: slices do not overlap). prepare(slices, sorted) makes room for it;
// write(s, u, slot, sum) takes the u-th touched slot of slice s.
template <typename weight_t, bool kOne, int kPiece, typename Map, typename Prepare, typename Write>
void backward(const Call& call, const Map& map, const Tensor& grad, Prepare prepare, Write write) {
  const std::vector<Slice> slices = check_tables(call);
  const auto num_slices = static_cast<int64_t>(slices.size());
  FirstError error;
  std::vector<SortedSlice> sorted(slices.size());
  parallel_for(0, num_slices, 1, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) sorted[s] = sort_slice(call, map, slices[s], error);
  });
  error.raise(call);
  check_cover(call);
  prepare(slices, sorted);
  const std::vector<int64_t> argmax = argmax_of<weight_t, kOne>(call, map, error);
  const Contributions<weight_t, Map, kOne> contributions{call, map, grad.const_data_ptr<weight_t>(),
                                                         call.sample_weights_at<weight_t>(),
                                                         argmax.empty() ? nullptr : argmax.data()};
  parallel_for(0, num_slices, 1, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      reduce_slice<kPiece>(contributions, slices[s], sorted[s],
                           [&](int64_t u, int64_t slot, const auto* sum) { write(slices[s], s, u, slot, sum); });
    }
  });
}

// What a kernel is compiled for, beside dtype and map: ids of one probe, and the numbers of a slot moved at once.
template <bool kOne_, int kPiece_>
struct Variant {
  static constexpr bool kOne = kOne_;
  static constexpr int kPiece = kPiece_;
};

// Calls function(weight_t{}, map, Variant{}).
template <typename Function>
void with_kernel(const Call& call, Function function) {
  with_dtype_and_map(call, [&](auto weight, auto map) {
    if (call.at.probes > 1) return function(weight, map, Variant<false, 8>{});
    if (call.unit % 16 == 0) return function(weight, map, Variant<true, 16>{});
    if (call.unit % 8) return function(weight, map, Variant<true, 4>{});
    function(weight, map, Variant<true, 8>{});
  });
}

// --- the operators: arguments as in embeddings/ops.py ----------------------------------------------------------------

Tensor bag(const Tensor& weights, const Tensor& ids, std::optional<Tensor> offsets,
           std::optional<Tensor> sample_weights, const Tensor& tables, int64_t batch_size, int64_t columns,
           int64_t probes, int64_t chunks, int64_t index_map, int64_t combine, int64_t pooling, int64_t /*accumulate*/,
           std::string features) {
  const Call call = make_call(weights, ids, offsets, sample_weights, tables, batch_size, columns,
                              {probes, chunks, index_map, combine, pooling}, features);
  check_tables(call);  // before `columns` is believed
  Tensor out = torch::stable::new_empty(weights, {batch_size, columns});
  with_kernel(call, [&](auto weight, auto map, auto variant) {
    using weight_t = decltype(weight);
    forward<weight_t, variant.kOne, variant.kPiece>(call, map, out.mutable_data_ptr<weight_t>());
  });
  return out;
}

Tensor bag_backward(const Tensor& grad, const Tensor& weights, const Tensor& ids, std::optional<Tensor> offsets,
                    std::optional<Tensor> sample_weights, const Tensor& tables, int64_t probes, int64_t chunks,
                    int64_t index_map, int64_t combine, int64_t pooling,
                    bool /*atomic: on the CPU the sorted sum serves both*/, std::string features) {
  const Call call = make_backward_call(grad, weights, ids, offsets, sample_weights, tables,
                                       {probes, chunks, index_map, combine, pooling}, features);
  const Tensor dense = torch::stable::contiguous(grad);
  Tensor out = torch::stable::new_zeros(weights, {call.num_units, call.unit});
  with_kernel(call, [&](auto weight, auto map, auto variant) {
    using weight_t = decltype(weight);
    auto* to = out.mutable_data_ptr<weight_t>();
    backward<weight_t, variant.kOne, variant.kPiece>(
        call, map, dense, [](const auto&, const auto&) {},
        [&](const Slice& slice, int64_t, int64_t, int64_t slot, const auto* sum) {
          for (int64_t z = 0, at = slice.begin + slot * slice.width; z < slice.width; ++z) {
            to[at + z] = static_cast<weight_t>(sum[z]);
          }
        });
  });
  return out;
}

std::tuple<Tensor, Tensor> bag_backward_rows(const Tensor& grad, const Tensor& weights, const Tensor& ids,
                                             std::optional<Tensor> offsets, std::optional<Tensor> sample_weights,
                                             const Tensor& tables, int64_t probes, int64_t chunks, int64_t index_map,
                                             int64_t combine, int64_t pooling, std::string features) {
  const Call call = make_backward_call(grad, weights, ids, offsets, sample_weights, tables,
                                       {probes, chunks, index_map, combine, pooling}, features);
  const Tensor dense = torch::stable::contiguous(grad);
  std::optional<Tensor> units, values;
  with_kernel(call, [&](auto weight, auto map, auto variant) {
    using weight_t = decltype(weight);
    std::vector<int64_t> starts;  // numbers of the touched slots of the slices before
    int64_t* to_units = nullptr;
    weight_t* to = nullptr;
    backward<weight_t, variant.kOne, variant.kPiece>(
        call, map, dense,
        [&](const std::vector<Slice>& slices, const std::vector<SortedSlice>& sorted) {
          int64_t size = 0;
          for (size_t s = 0; s < slices.size(); ++s) {
            starts.push_back(size);
            size += sorted[s].num_unique * slices[s].width;
          }
          units = torch::stable::new_empty(weights, {size / call.unit}, ScalarType::Long);
          values = torch::stable::new_empty(weights, {size / call.unit, call.unit});
          to_units = units->mutable_data_ptr<int64_t>();
          to = values->mutable_data_ptr<weight_t>();
        },
        [&](const Slice& slice, int64_t s, int64_t u, int64_t slot, const auto* sum) {
          const int64_t start = starts[s] + u * slice.width;
          const int64_t first_unit = (slice.begin + slot * slice.width) / call.unit;
          for (int64_t i = 0; i < slice.width / call.unit; ++i) to_units[start / call.unit + i] = first_unit + i;
          for (int64_t z = 0; z < slice.width; ++z) to[start + z] = static_cast<weight_t>(sum[z]);
        });
  });
  return {*units, *values};
}

Tensor bag_backward_sample_weights(const Tensor& grad, const Tensor& weights, const Tensor& ids,
                                   std::optional<Tensor> offsets, const Tensor& tables, int64_t probes, int64_t chunks,
                                   int64_t index_map, int64_t combine, int64_t pooling, std::string features) {
  const Call call = make_backward_call(grad, weights, ids, offsets, std::nullopt, tables,
                                       {probes, chunks, index_map, combine, pooling}, features);
  const Tensor dense = torch::stable::contiguous(grad);
  Tensor out = torch::stable::new_zeros(weights, {call.at.num_ids});
  check_tables(call);
  with_dtype_and_map(call, [&](auto weight, auto map) {
    using weight_t = decltype(weight);
    using Map = decltype(map);
    using real = typename Accumulator<weight_t>::type;
    const auto* grads = dense.const_data_ptr<weight_t>();
    auto* to = out.mutable_data_ptr<weight_t>();
    FirstError error;
    parallel_for(0, call.at.num_features * call.at.batch_size, 512, [&](int64_t first, int64_t last) {
      OrderedNumber<real> sum;
      for (int64_t bag = first; bag < last; ++bag) {
        const int64_t f = bag / call.at.batch_size, b = bag % call.at.batch_size;
        if (!valid_bag(call, f, b, error)) continue;
        Reader<weight_t, Map, false> reader(call, map, f);
        const weight_t* g = grads + b * call.columns + call.at.table(f, 0).column;
        const real divisor = call.at.divisor<real>(f, b, call.pooling);
        for (int64_t n = call.at.begin(f, b); n < call.at.end(f, b); ++n) {
          if (!reader.look_up(call.at.id(n))) {
            error.bad_id(call, f, b, n);
            continue;
          }
          sum.clear();
          reader.read([&](int64_t d, int64_t size, auto fill) {
            for (int64_t z = 0; z < size; ++z) {
              real v[1];
              fill(z, v);
              sum.add(v[0] * static_cast<real>(g[d + z]) / divisor);
            }
          });
          to[n] = static_cast<weight_t>(sum.finish());
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
