// Sums in the one order that index_map.h fixes, on the CPU: in registers where a slot's width is known to the compiler,
// else piece by piece.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "bag.h"

namespace embeddings::inline cpu {

// --- numbers in registers --------------------------------------------------------------------------------------------

// 32 bytes of numbers, one AVX2 register; wider ones gain nothing, since rows are waited for, not computed.
template <typename real>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(32), aligned(4), may_alias));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(32), aligned(8), may_alias));
};

// kWidth numbers of a slot: kWidth is what Vector's lanes divide.
template <typename real, int kWidth>
struct Numbers {
  using vector = typename Vector<real>::type;
  static constexpr int kLanes = 32 / sizeof(real), kVectors = kWidth / kLanes;
  static_assert(kWidth % kLanes == 0);

  vector at[kVectors];

  template <typename weight_t>
  HOST_DEVICE void load(const weight_t* from) {
    if constexpr (std::is_same_v<weight_t, real>) {
      for (int i = 0; i < kVectors; ++i) at[i] = reinterpret_cast<const vector*>(from)[i];
    } else {
      real numbers[kWidth];
      for (int i = 0; i < kWidth; ++i) numbers[i] = static_cast<real>(from[i]);
      for (int i = 0; i < kVectors; ++i) at[i] = reinterpret_cast<const vector*>(numbers)[i];
    }
  }
  HOST_DEVICE void store(real* to) const {
    for (int i = 0; i < kVectors; ++i) reinterpret_cast<vector*>(to)[i] = at[i];
  }
  HOST_DEVICE void add(const Numbers& other) {
    for (int i = 0; i < kVectors; ++i) at[i] += other.at[i];
  }
  HOST_DEVICE void negate() {
    for (int i = 0; i < kVectors; ++i) at[i] = -at[i];  // auto& would ask for the alignment of a whole vector
  }
  HOST_DEVICE void divide(real by) {
    for (int i = 0; i < kVectors; ++i) at[i] /= by;
  }
};

// Widths that have kernels of their own; 0 stands for every other one.
template <typename Function>
void with_width(int64_t width, const Function& function) {
  switch (width) {
    case 8: return function(std::integral_constant<int, 8>{});
    case 16: return function(std::integral_constant<int, 16>{});
    case 32: return function(std::integral_constant<int, 32>{});
    case 64: return function(std::integral_constant<int, 64>{});
    case 128: return function(std::integral_constant<int, 128>{});
    default: return function(std::integral_constant<int, 0>{});
  }
}

// Adds kWidth numbers at a time in the order of index_map.h.
template <typename real, int kWidth>
class RegisterSum {
 public:
  HOST_DEVICE explicit RegisterSum(const Numbers<real, kWidth>& first) : run_(first) {}

  HOST_DEVICE void add(const Numbers<real, kWidth>& v) {
    if (count_ % kRun) {
      run_.add(v);
    } else {
      close_run();
      run_ = v;
    }
    ++count_;
  }
  HOST_DEVICE const Numbers<real, kWidth>& finish() {
    if (count_ <= kRun) return run_;
    close_run();
    return total_;
  }

 private:
  HOST_DEVICE void close_run() {
    if (count_ <= kRun) {
      total_ = run_;
    } else {
      total_.add(run_);
    }
  }
  Numbers<real, kWidth> run_, total_{};
  uint64_t count_ = 1;
};

// The sum of numbers [size] by halves: the second half is added to the first, until one is left; a missing number is 0.
// It is what a butterfly of a warp's lanes gives. Overwrites them.
template <typename real>
HOST_DEVICE real fold(real* numbers, int64_t size) {
  int64_t half = 1;
  while (half < size) half *= 2;
  for (half /= 2; half >= 1; half /= 2) {
    for (int64_t i = 0; i + half < size; ++i) numbers[i] += numbers[i + half];
    size = half;
  }
  return numbers[0];
}

// --- any number of them ----------------------------------------------------------------------------------------------

// Adds vectors in the order that index_map.h fixes: runs of kRun, then the runs. kPiece numbers are moved at once.
template <typename real, int kPiece = 8>
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

}  // namespace embeddings::inline cpu
