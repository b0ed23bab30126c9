// Packs of numbers, as one instruction of the CPU takes them, and the transpose of a square of them in registers.
#pragma once

#include <cstdint>
#include <utility>

namespace embeddings::inline cpu {

#ifdef __AVX512F__
constexpr int64_t kPackBytes = 64;
#else
constexpr int64_t kPackBytes = 32;
#endif
template <typename real>
constexpr int64_t kLanes = kPackBytes / sizeof(real);
template <typename real>
struct PackOf {
  typedef real type __attribute__((vector_size(kPackBytes)));
  typedef real anywhere __attribute__((vector_size(kPackBytes), aligned(sizeof(real)), may_alias));
};
template <typename real>
using Pack = typename PackOf<real>::type;

template <typename real>
void store(real* to, const Pack<real>& from) {
  *reinterpret_cast<typename PackOf<real>::anywhere*>(to) = from;
}
template <typename real>
void load(const real* from, Pack<real>& to) {
  to = *reinterpret_cast<const typename PackOf<real>::anywhere*>(from);
}

// Of packs a and b, n apart: the numbers with bit n of their place clear go to a, the others to b.
template <int64_t n, typename real, size_t... lane>
void exchange(Pack<real>& a, Pack<real>& b, std::index_sequence<lane...>) {
#if __has_builtin(__builtin_shufflevector)
  constexpr size_t lanes = sizeof...(lane);  // the numbers of b count from here
  const Pack<real> first = __builtin_shufflevector(a, b, (lane & n ? lanes + (lane ^ n) : lane)...);
  b = __builtin_shufflevector(a, b, (lane & n ? lanes + lane : lane ^ n)...);
#else  // GCC 11
  const Pack<real> first = {(lane & n ? b[lane ^ n] : a[lane])...};
  b = {(lane & n ? b[lane] : a[lane ^ n])...};
#endif
  a = first;
}

template <typename real, int64_t n = 1>
void transpose(Pack<real> (&packs)[kLanes<real>]) {
  if constexpr (n < kLanes<real>) {
    for (int64_t i = 0; i < kLanes<real>; ++i) {
      if (!(i & n)) exchange<n, real>(packs[i], packs[i + n], std::make_index_sequence<kLanes<real>>());
    }
    transpose<real, n * 2>(packs);
  }
}

}  // namespace embeddings::inline cpu
