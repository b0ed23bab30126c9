// What the CPU's translation units share: what is refused, and how work is dealt to threads.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>
#include <vector>

#include "bag.h"

namespace embeddings::inline cpu {

using torch::stable::parallel_for;

// --- threads ---------------------------------------------------------------------------------------------------------

// Work that costs less than waking a thread, in numbers moved.
constexpr int64_t kSmallWork = 16384;

// Calls function(i) for 0 <= i < count. A thread that is done takes the next, so that unequal tasks, or a core that is
// shared, do not make the others wait. work: of all tasks, in numbers moved.
template <typename Function>
void for_each_task(int64_t count, int64_t work, const Function& function) {
  const int64_t threads = work < kSmallWork ? 1 : std::min<int64_t>(count, torch::stable::get_num_threads());
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) function(i);
    return;
  }
  std::atomic<int64_t> next{0};
  parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) function(i);
  });
}

// --- what is refused -------------------------------------------------------------------------------------------------

// The first bad bag or id in the order feature, sample, position, whichever thread met it; raised when all have joined.
class FirstError {
 public:
  void bad_id(const Call& call, int64_t f, int64_t b, int64_t n) {
    note({f, b, n, call.at.id(n), call.at.table(f, 0).num_embeddings});
  }
  void bad_bag(int64_t f, int64_t b, int64_t begin, int64_t end) { note({f, b, -1, begin, end}); }
  bool found() const { return found_.load(std::memory_order_relaxed); }
  void raise(const Call& call) const {
    if (!found()) return;
    const auto [f, b, n, first, second] = error_;
    if (n >= 0) call.fail_id(f, n, first, second);
    call.fail_offsets(f, b, first, second);
  }

 private:
  using Error = std::array<int64_t, 5>;  // feature, sample, position or -1, then id and limit, or begin and end
  void note(const Error& error) {
    std::lock_guard<std::mutex> guard(lock_);
    if (!found() || error < error_) error_ = error;
    found_ = true;
  }
  std::mutex lock_;
  std::atomic<bool> found_{false};
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
inline bool add_table(const Call& call, int64_t row, std::vector<Slice>& slices) {
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

// Whether the features' vectors take all columns of the output, or others share it with them.
enum class Columns { kAll, kSome };

// The slices, ascending. The batch must cover every feature, and the features' vectors must lie side by side in the
// output, without gaps if they take all of it: a few rows, checked on every call.
inline std::vector<Slice> check_tables(const Call& call, Columns columns) {
  std::vector<Slice> slices;
  const int64_t K = call.at.probes;
  const bool concat = call.combine == kConcat;
  __int128 column = 0;  // the sum of any dims
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
      const bool gap = columns == Columns::kSome && k == 0 && table.column > column && table.column <= call.columns;
      if (gap) column = table.column;
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
  if (columns == Columns::kAll ? column != call.columns : column > call.columns)
    fail("the features' vectors take ", static_cast<int64_t>(std::min<__int128>(column, INT64_MAX)), " columns of ",
         call.columns);
  return slices;
}

// Offsets that pass bag by bag must also cover all ids.
inline void check_cover(const Call& call) {
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

}  // namespace embeddings::inline cpu
