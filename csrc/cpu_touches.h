// Which slots a batch touches, and who touches each, in the order of sums: an integer per touch, sorted.
#pragma once

#include <bit>
#include <memory>

#include "cpu_call.h"

namespace embeddings::inline cpu {

inline int bits_of(int64_t number) {
  return static_cast<int>(std::bit_width(static_cast<uint64_t>(number)));
}

// A touch is one chunk of one probe of one id: the slot that it reads, relative to its slice, above kept bits of what
// the sum needs of it. Touches of a slot keep their order: that of their features, ids, probes and chunks.
//
// A slice's touches are split by the slots' leading bits into parts small enough for a core's cache, which threads sort
// and sum one by one. What is summed, and in which order, does not depend on their number.
class Touches {
 public:
  struct Part {
    int64_t slice, begin, end;  // of its touches
    int bits;                   // of a slot that differ within it
  };

  // kept(table, b, c, i, negative) < 2^kept.bits(touches of all slices): of chunk c of a probe's table, read by an id
  // of sample b, which is touch i of its slice. Raises what is wrong with ids and offsets.
  template <typename Map, typename Kept>
  Touches(const Call& call, const Map& map, const std::vector<Slice>& slices, const Kept& kept) {
    plan(call, slices);
    kept_bits_ = kept.bits(count_);
    for (const Slice& slice : slices) {
      if (bits_of(slice.num_slots - 1) + kept_bits_ > 64) {
        fail("a batch of ", count_, " reads is too large for ", slice.num_slots, " slots");
      }
    }
    find(call, map, slices, kept);
    split(slices);
  }

  const std::vector<Part>& parts() const { return parts_; }
  int64_t count() const { return count_; }
  uint64_t slot(uint64_t touch) const { return touch >> kept_bits_; }
  uint64_t kept(uint64_t touch) const { return touch & ((uint64_t(1) << kept_bits_) - 1); }
  const uint64_t* at(const Part& part) const { return touches_.get() + part.begin; }

  // One feature's touches of one slice, and where they begin.
  struct Run {
    int64_t slice, f, first_row, last_row;  // rows [first_row, last_row) of the slice's: the feature's probes
    int64_t begin, first_id, num_ids, per_id;
    bool direct;  // its slice is one part: its touches need not move
  };
  int64_t first_of(int64_t s) const { return firsts_[s]; }
  // The feature that made touch i of slice s.
  const Run& run_of(int64_t s, int64_t i) const {
    const Run* run = &runs_[first_run_[s]];
    while (firsts_[s] + i >= run->begin + run->num_ids * run->per_id) ++run;
    return *run;
  }

  // Sorts a part's touches by slot, stably: least significant digit first.
  void sort(const Part& part) {
    uint64_t* touches = touches_.get() + part.begin;
    const int64_t size = part.end - part.begin;
    if (size <= 32) return insert(touches, size);
    const int digit = size < 8192 ? 8 : 11, digits = (part.bits + digit - 1) / digit;
    const uint64_t mask = (uint64_t(1) << digit) - 1;
    std::vector<uint32_t> counts(static_cast<size_t>(digits) << digit);
    for (int64_t i = 0; i < size; ++i) {
      uint64_t slot = touches[i] >> kept_bits_;
      for (int d = 0; d < digits; ++d, slot >>= digit) ++counts[(static_cast<uint64_t>(d) << digit) + (slot & mask)];
    }
    const auto scratch = std::make_unique_for_overwrite<uint64_t[]>(size);
    uint64_t *from = touches, *to = scratch.get();
    for (int d = 0; d < digits; ++d) {
      uint32_t* places = counts.data() + (static_cast<uint64_t>(d) << digit);
      const int shift = kept_bits_ + d * digit;
      if (places[(from[0] >> shift) & mask] == size) continue;  // all have that digit
      for (uint32_t i = 0, sum = 0; i <= mask; ++i) sum += std::exchange(places[i], sum);
      for (int64_t i = 0; i < size; ++i) to[places[(from[i] >> shift) & mask]++] = from[i];
      std::swap(from, to);
    }
    if (from != touches) std::copy_n(from, size, touches);
  }

 private:
  static constexpr int64_t kPart = 4096;  // touches: 32 KiB, and as much to sort them

  void plan(const Call& call, const std::vector<Slice>& slices) {
    const int64_t B = call.at.batch_size, K = call.at.probes;
    for (size_t s = 0; s < slices.size() && B > 0; ++s) {
      const Slice& slice = slices[s];
      const int64_t begin = count_;
      const size_t first_run = runs_.size();
      for (size_t row = 0, next; row < slice.rows.size(); row = next) {
        const int64_t f = slice.rows[row] / K;
        int64_t per_id = 0;
        for (next = row; next < slice.rows.size() && slice.rows[next] / K == f; ++next) {
          per_id += call.at.tables[slice.rows[next]].chunks();
        }
        const int64_t first = call.at.begin(f, 0), last = call.at.end(f, B - 1);
        const bool sane = first >= 0 && first <= last && last <= call.at.num_ids;  // bags are checked one by one
        const int64_t num_ids = sane ? last - first : 0;
        runs_.push_back({static_cast<int64_t>(s), f, static_cast<int64_t>(row), static_cast<int64_t>(next), count_,
                         first, num_ids, per_id, true});
        count_ += num_ids * per_id;
      }
      const int bits = bits_of(slice.num_slots - 1);
      const int64_t wanted = (count_ - begin) / kPart;
      const int split = std::min(bits, bits_of(wanted));
      firsts_.push_back(begin);
      first_run_.push_back(first_run);
      first_part_.push_back(static_cast<int64_t>(parts_.size()));
      for (int64_t p = 0; p <= (slice.num_slots - 1) >> (bits - split); ++p) {
        parts_.push_back({static_cast<int64_t>(s), begin, count_, bits - split});
      }
      for (size_t r = first_run; r < runs_.size(); ++r) runs_[r].direct = split == 0;
    }
    touches_ = std::make_unique_for_overwrite<uint64_t[]>(count_);
  }

  template <typename Map, typename Kept>
  void find(const Call& call, const Map& map, const std::vector<Slice>& slices, const Kept& kept) {
    const int64_t B = call.at.batch_size, size = 1024, tasks = (B + size - 1) / size;  // bags of a task
    FirstError error;
    for_each_task(static_cast<int64_t>(runs_.size()) * tasks, count_, [&](int64_t task) {
      const Run& run = runs_[task / tasks];
      const Slice& slice = slices[run.slice];
      const int64_t first = task % tasks * size, last = std::min(first + size, B);
      const int64_t begin_of_slice = firsts_[run.slice], limit = call.at.table(run.f, 0).num_embeddings;
      int64_t before = 0;  // touches of the id by rows before
      for (int64_t row = run.first_row; row < run.last_row; ++row) {
        const Table table = call.at.tables[slice.rows[row]];
        const int64_t chunks = Map::one_chunk ? 1 : table.chunks();
        for (int64_t b = first; b < last; ++b) {
          if (!valid_bag(call, run.f, b, error)) continue;
          const int64_t begin = call.at.begin(run.f, b), end = call.at.end(run.f, b);
          if (begin < run.first_id || end > run.first_id + run.num_ids) continue;  // then some other bag is refused
          for (int64_t n = begin; n < end; ++n) {
            const int64_t id = call.at.id(n);
            if (Map::ranged && (id < 0 || id >= limit)) {
              error.bad_id(call, run.f, b, n);
              continue;
            }
            const uint64_t key = map.key(table, id);
            int64_t i = run.begin + (n - run.first_id) * run.per_id + before;
            for (int64_t c = 0; c < chunks; ++c, ++i) {
              const Read read = map.read(table, key, c);
              touches_[i] =
                  static_cast<uint64_t>(read.slot) << kept_bits_ | kept(table, b, c, i - begin_of_slice, read.negative);
            }
          }
        }
        before += chunks;
      }
    });
    error.raise(call);
    check_cover(call);
  }

  // Moves the touches of each slice of several parts to their parts, in order.
  void split(const std::vector<Slice>& slices) {
    if (slices.empty() || parts_.empty() || parts_.size() == first_part_.size()) return;
    struct Piece {
      int64_t slice, begin, end;
      std::vector<int64_t> places;  // of each part's next touch
    };
    std::vector<Piece> pieces;
    for (size_t s = 0; s < first_part_.size(); ++s) {
      if (num_parts(s) == 1) continue;
      const auto [slice, begin, end, bits] = parts_[first_part_[s]];
      for (int64_t i = begin; i < end; i += 4 * kPart) {
        pieces.push_back({slice, i, std::min(i + 4 * kPart, end), std::vector<int64_t>(num_parts(s))});
      }
    }
    const auto part_of = [&](const Piece& piece, int64_t i) {
      return static_cast<size_t>(slot(touches_[i]) >> parts_[first_part_[piece.slice]].bits);
    };
    for_each_task(static_cast<int64_t>(pieces.size()), count_, [&](int64_t p) {
      Piece& piece = pieces[p];
      for (int64_t i = piece.begin; i < piece.end; ++i) ++piece.places[part_of(piece, i)];
    });
    for (size_t first = 0, next; first < pieces.size(); first = next) {
      const int64_t s = pieces[first].slice;
      for (next = first; next < pieces.size() && pieces[next].slice == s;) ++next;
      int64_t place = pieces[first].begin;
      for (int64_t part = 0; part < num_parts(s); ++part) {
        parts_[first_part_[s] + part].begin = place;
        for (size_t p = first; p < next; ++p) place += std::exchange(pieces[p].places[part], place);
        parts_[first_part_[s] + part].end = place;
      }
    }
    auto moved = std::make_unique_for_overwrite<uint64_t[]>(count_);
    for_each_task(static_cast<int64_t>(pieces.size()), count_, [&](int64_t p) {
      Piece& piece = pieces[p];
      for (int64_t i = piece.begin; i < piece.end; ++i) moved[piece.places[part_of(piece, i)]++] = touches_[i];
    });
    for (const Run& run : runs_) {
      if (run.direct) std::copy_n(touches_.get() + run.begin, run.num_ids * run.per_id, moved.get() + run.begin);
    }
    touches_ = std::move(moved);
  }

  int64_t num_parts(size_t s) const {
    const auto end = s + 1 < first_part_.size() ? first_part_[s + 1] : static_cast<int64_t>(parts_.size());
    return end - first_part_[s];
  }

  void insert(uint64_t* touches, int64_t size) const {
    for (int64_t i = 1; i < size; ++i) {
      const uint64_t touch = touches[i];
      int64_t j = i;
      for (; j > 0 && slot(touches[j - 1]) > slot(touch); --j) touches[j] = touches[j - 1];
      touches[j] = touch;
    }
  }

  int kept_bits_ = 0;
  int64_t count_ = 0;
  std::vector<Run> runs_;
  std::vector<Part> parts_;                               // of each slice in turn
  std::vector<int64_t> firsts_, first_run_, first_part_;  // of each slice: touch, run, part
  std::unique_ptr<uint64_t[]> touches_;
};

}  // namespace embeddings::inline cpu
