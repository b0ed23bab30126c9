// DLRM's dot interaction on the CPU, one sample after another: its vectors fit the first cache, so that the products
// are bound by arithmetic. A tile of the result stays in registers, while its sums go over their terms in order.
#include "interaction.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu_packs.h"

namespace embeddings::inline cpu {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kRows = 4;  // of a tile, times up to 2 packs: 8 sums and 2 packs, of the 16 registers that AVX2 has

int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

template <typename from_t, typename to_t>
void copy(const from_t* __restrict__ from, int64_t n, to_t* __restrict__ to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<to_t>(from[i]);
}

// The first n numbers of a pack.
template <typename real, typename to_t>
void store_first(to_t* to, const Pack<real>& from, int64_t n) {
  if constexpr (std::is_same_v<real, to_t>) {
    if (n >= kLanes<real>) return store<real>(to, from);
  }
  real numbers[kLanes<real>];
  store<real>(numbers, from);
  copy(numbers, std::min(n, kLanes<real>), to);
}

// Splits n packs into tiles of 2 or 1: calls function(integral_constant, first) from the last to the first.
template <typename Function>
void for_each_tile(int64_t n, Function function) {
  if (n % 2) function(std::integral_constant<int, 1>{}, n -= 1);
  while (n > 0) function(std::integral_constant<int, 2>{}, n -= 2);
}

// A thread's working memory for one sample after another.
template <typename real>
struct Workspace {
  int64_t num_vectors, dim;
  int64_t width;                     // D, in whole packs
  int64_t stride;                    // V, in whole packs and tiles
  std::vector<const real*> vectors;  // [stride], of `width` numbers each; beyond V they are zeros
  std::vector<real> memory;
  real *copies, *transposed,
      *pairs;  // [V + 1, width], [width, stride], [P and what tiles reach beyond]; zeros at first

  explicit Workspace(const Interaction& call)
      : num_vectors(call.num_vectors),
        dim(call.dim),
        width(round_up(dim, kLanes<real>)),
        stride(round_up(num_vectors, std::max(kRows, kLanes<real>))),
        vectors(stride),
        memory((num_vectors + 1 + stride) * width + pairs_before(stride) + 4 * kLanes<real>) {
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    transposed = memory.data() + (kPackBytes - address % kPackBytes) % kPackBytes / sizeof(real);
    copies = transposed + width * stride;
    std::fill(vectors.begin() + num_vectors, vectors.end(), copies + num_vectors * width);
    pairs = copies + (num_vectors + 1) * width;
  }

  template <typename dense_t, typename embedded_t>
  void read(const dense_t* dense, const embedded_t* embedded) {
    vectors[0] = as_real(dense, 0);
    for (int64_t v = 1; v < num_vectors; ++v) vectors[v] = as_real(embedded + (v - 1) * dim, v);
  }

 private:
  template <typename from_t>
  const real* as_real(const from_t* from, int64_t v) {
    if constexpr (std::is_same_v<from_t, real>) {
      if (width == dim) return from;
    }
    copy(from, dim, copies + v * width);
    return copies + v * width;
  }
};

template <typename real>
void transpose_vectors(Workspace<real>& work) {
  constexpr int64_t n = kLanes<real>;
  for (int64_t v = 0; v < work.num_vectors; v += n) {
    for (int64_t d = 0; d < work.width; d += n) {
      Pack<real> packs[n];
#pragma GCC unroll 16
      for (int64_t i = 0; i < n; ++i) load(work.vectors[v + i] + d, packs[i]);
      transpose<real>(packs);
      real* to = work.transposed + d * work.stride + v;
#pragma GCC unroll 16
      for (int64_t i = 0; i < n; ++i) store<real>(to + i * work.stride, packs[i]);
    }
  }
}

// Products of vectors i..i + kRows with those of the packs from j on.
template <int kPacks, typename real>
void multiply(Workspace<real>& work, int64_t i, int64_t j) {
  constexpr int64_t n = kLanes<real>;
  Pack<real> sums[kRows][kPacks] = {};
  for (int64_t d = 0; d < work.dim; ++d) {
    const real* at = work.transposed + d * work.stride;
    Pack<real> packs[kPacks];
    for (int p = 0; p < kPacks; ++p) load(at + j + p * n, packs[p]);
    for (int64_t r = 0; r < kRows; ++r) {
      for (int p = 0; p < kPacks; ++p) sums[r][p] += at[i + r] * packs[p];
    }
  }
  // What a pack has beyond its row lands among the first numbers of later rows, which are stored later.
  for (int64_t r = 0; r < kRows; ++r) {
    for (int p = 0; p < kPacks; ++p) store<real>(work.pairs + pairs_before(i + r) + j + p * n, sums[r][p]);
  }
}

// Every pair's product. Tiles are taken from the right to the left.
template <typename real>
void multiply_all(Workspace<real>& work) {
  for (int64_t i = 0; i < work.num_vectors; i += kRows) {
    const int64_t num_packs = round_up(i + kRows - 1, kLanes<real>) / kLanes<real>;  // row i has the pairs j < i
    for_each_tile(num_packs, [&](auto packs, int64_t first) { multiply<packs.value>(work, i, first * kLanes<real>); });
  }
}

// Numbers d.. of the gradients of vectors i..i + kRows: the sum over j of the gradient of pair (i, j) times vector j.
// write(v, d, pack) takes them.
template <int kPacks, typename real, typename Write>
void multiply_pairs(const Workspace<real>& work, int64_t i, int64_t d, Write write) {
  Pack<real> sums[kRows][kPacks] = {};
  const auto add = [&](int64_t j, auto factor_of) {
    Pack<real> packs[kPacks];
    for (int p = 0; p < kPacks; ++p) load(work.vectors[j] + d + p * kLanes<real>, packs[p]);
    for (int64_t r = 0; r < kRows; ++r) {
      const real factor = factor_of(r);
      for (int p = 0; p < kPacks; ++p) sums[r][p] += factor * packs[p];
    }
  };
  const real* rows[kRows];
  for (int64_t r = 0; r < kRows; ++r) rows[r] = work.pairs + pairs_before(i + r);
  for (int64_t j = 0; j < i; ++j) {
    add(j, [&](int64_t r) { return rows[r][j]; });
  }
  const int64_t end = std::min(i + kRows, work.num_vectors);
  for (int64_t k = 0; k < kRows; ++k) {
    if (i + k == end) break;
    add(i + k, [&](int64_t r) { return r == k ? real(0) : r > k ? rows[r][i + k] : rows[k][i + r]; });
  }
  for (int64_t j = end; j < work.num_vectors; ++j) {
    const real* column = work.pairs + pairs_before(j) + i;
    add(j, [&](int64_t r) { return column[r]; });
  }
  for (int64_t r = 0; r < kRows; ++r) {
    if (i + r == end) break;
    for (int p = 0; p < kPacks; ++p) write(i + r, d + p * kLanes<real>, sums[r][p]);
  }
}

template <typename real, typename Write>
void multiply_all_pairs(const Workspace<real>& work, Write write) {
  for (int64_t i = 0; i < work.num_vectors; i += kRows) {
    for_each_tile(work.width / kLanes<real>, [&](auto packs, int64_t first) {
      multiply_pairs<packs.value>(work, i, first * kLanes<real>, write);
    });
  }
}

// Samples that are worth a thread: some ten microseconds.
int64_t grain_of(const Interaction& call) {
  return std::max<int64_t>(1, 500'000 / (call.num_vectors * call.num_vectors * call.dim + 1));
}

// --- the operators: arguments as in embeddings/interaction.py --------------------------------------------------------

Tensor dot_interaction(const Tensor& dense, const Tensor& embedded, int64_t multiple) {
  const Interaction call = make_interaction(dense, embedded, multiple);
  const int64_t columns = call.columns(), row = call.num_features() * call.dim;
  Tensor out = torch::stable::new_empty(dense, {call.batch_size, columns});
  with_dtypes(call, [&](auto dense_number, auto embedded_number, auto sum) {
    using dense_t = decltype(dense_number);
    const auto* from_dense = call.dense.const_data_ptr<dense_t>();
    const auto* from = call.embedded.const_data_ptr<decltype(embedded_number)>();
    auto* to = out.mutable_data_ptr<dense_t>();
    parallel_for(0, columns ? call.batch_size : 0, grain_of(call), [&](int64_t first, int64_t last) {
      Workspace<decltype(sum)> work(call);
      for (int64_t b = first; b < last; ++b) {
        work.read(from_dense + b * call.dim, from + b * row);
        transpose_vectors(work);
        multiply_all(work);
        std::copy_n(from_dense + b * call.dim, call.dim, to + b * columns);
        copy(work.pairs, call.num_pairs(), to + b * columns + call.dim);
        std::fill(to + b * columns + call.num_numbers(), to + (b + 1) * columns, dense_t{});
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> dot_interaction_backward(const Tensor& grad, const Tensor& dense, const Tensor& embedded,
                                                    int64_t multiple) {
  const Interaction call = make_interaction(dense, embedded, multiple);
  const Tensor grads = checked_grad(grad, call);
  const int64_t columns = call.columns(), row = call.num_features() * call.dim;
  Tensor of_dense = torch::stable::new_empty(dense, {call.batch_size, call.dim});
  Tensor of_embedded = torch::stable::new_empty(embedded, {call.batch_size, call.num_features(), call.dim});
  with_dtypes(call, [&](auto dense_number, auto embedded_number, auto sum) {
    using dense_t = decltype(dense_number);
    using embedded_t = decltype(embedded_number);
    using real = decltype(sum);
    const auto *from_dense = call.dense.const_data_ptr<dense_t>(), *g = grads.const_data_ptr<dense_t>();
    const auto* from = call.embedded.const_data_ptr<embedded_t>();
    auto* to_dense = of_dense.mutable_data_ptr<dense_t>();
    auto* to = of_embedded.mutable_data_ptr<embedded_t>();
    parallel_for(0, columns ? call.batch_size : 0, grain_of(call), [&](int64_t first, int64_t last) {
      Workspace<real> work(call);
      for (int64_t b = first; b < last; ++b) {
        work.read(from_dense + b * call.dim, from + b * row);
        copy(g + b * columns + call.dim, call.num_pairs(), work.pairs);
        const dense_t* of_row = g + b * columns;
        multiply_all_pairs(work, [&](int64_t v, int64_t d, Pack<real>& sum) {
          const int64_t n = call.dim - d;
          if (v > 0) return store_first<real>(to + b * row + (v - 1) * call.dim + d, sum, n);
          for (int64_t i = 0; i < std::min(n, kLanes<real>); ++i) sum[i] += static_cast<real>(of_row[d + i]);
          store_first<real>(to_dense + b * call.dim + d, sum, n);
        });
      }
    });
  });
  return {of_dense, of_embedded};
}

}  // namespace
}  // namespace embeddings::inline cpu

STABLE_TORCH_LIBRARY_IMPL(embeddings, CPU, m) {
  m.impl("dot_interaction", TORCH_BOX(&embeddings::dot_interaction));
  m.impl("dot_interaction_backward", TORCH_BOX(&embeddings::dot_interaction_backward));
}
