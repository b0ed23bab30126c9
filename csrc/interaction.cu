// DLRM's dot interaction on CUDA, in the order of sums of interaction.cpp, so that their bits are the CPU's. A block
// takes several samples; their vectors are staged in shared memory, and a thread has a tile of 4 x 4 results in
// registers.
#include <algorithm>
#include <bit>
#include <cmath>
#include <tuple>

#include "interaction.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define EMBEDDINGS_LIBRARY embeddings
#define EMBEDDINGS_DEVICE CUDA
using torch::stable::accelerator::DeviceGuard;
#else
#include "cuda_on_host.h"
#endif

namespace embeddings::inline cuda {
namespace {

constexpr int kThreads = 256;  // the most of a block
constexpr int kSide = 4;       // of a tile
constexpr int kSharedBytes = 32 * 1024;
constexpr int64_t kMaxBlocks = 1 << 20;  // kernels stride over the rest

#ifdef __CUDACC__
// A block's threads, each with a state of its own; all have done a step before one begins the next.
template <typename State>
struct Threads {
  State state;

  template <typename Step>
  __device__ void each(Step step) {
    step(static_cast<int>(threadIdx.x), state);
    __syncthreads();
  }
};

__device__ inline void* shared_memory() {
  extern __shared__ float4 memory[];
  return memory;
}
#endif

// How one kernel's work is dealt out. Unit of work: `samples` samples, one pass over their tiles, and in a backward one
// slice of their columns; blocks stride over the units.
struct Plan {
  int64_t batch_size, num_vectors, dim, columns;
  int64_t passes, slices;
  int samples, tiles;  // of a unit; of a sample and slice
  int padded;          // V, in whole tiles
  int slice;           // numbers of a vector in a unit; in a forward, those staged at once
  int depth;           // of a backward: vectors staged at once
  int lanes;           // threads that stage a vector
  int threads;
  int64_t shared_numbers;

  HOST_DEVICE int64_t num_units() const { return (batch_size + samples - 1) / samples * passes * slices; }
  HOST_DEVICE int64_t num_pairs() const { return pairs_before(num_vectors); }
  // Whether the products of a unit's samples are collected before they are written.
  HOST_DEVICE bool collects() const { return passes == 1; }
};

template <typename number_t, int kNumbers>
struct alignas(sizeof(number_t) * kNumbers > 16 ? 16 : sizeof(number_t) * kNumbers) Pack {
  number_t at[kNumbers];

  __device__ static bool fits(const number_t* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % alignof(Pack) == 0;
  }
};

// put(d, number) for d < count of a vector, by threads lane, lane + lanes, ...: 16 bytes at a time where they are
// aligned.
template <typename real, typename number_t, typename Put>
__device__ void read_vector(const number_t* __restrict__ from, int count, int lane, int lanes, Put put) {
  constexpr int kNumbers = 16 / sizeof(number_t);
  using Numbers = Pack<number_t, kNumbers>;
  const bool fits = Numbers::fits(from);
  for (int d = lane * kNumbers; d < count; d += lanes * kNumbers) {
    if (fits && d + kNumbers <= count) {
      const Numbers numbers = *reinterpret_cast<const Numbers*>(from + d);
      for (int i = 0; i < kNumbers; ++i) put(d + i, static_cast<real>(numbers.at[i]));
    } else {
      for (int i = d; i < count && i < d + kNumbers; ++i) put(i, static_cast<real>(from[i]));
    }
  }
}

// The vectors of the batch.
template <typename dense_t, typename embedded_t>
struct Vectors {
  const dense_t* __restrict__ dense;        // [B, D]
  const embedded_t* __restrict__ embedded;  // [B, F, D]

  // Number d and the `count - 1` after it of vector v of sample b.
  template <typename real, typename Put>
  __device__ void read(const Plan& plan, int64_t b, int64_t v, int64_t d, int count, int thread, Put put) const {
    const int lane = thread % plan.lanes;
    if (v == 0) {
      read_vector<real>(dense + b * plan.dim + d, count, lane, plan.lanes, put);
    } else {
      read_vector<real>(embedded + (b * (plan.num_vectors - 1) + v - 1) * plan.dim + d, count, lane, plan.lanes, put);
    }
  }
};

template <typename real>
struct Tile {
  real sums[kSide][kSide];
  int64_t row, column;  // its first ones
  int sample;           // of the unit

  __device__ void clear() {
    for (auto& row_sums : sums) {
      for (real& sum : row_sums) sum = 0;
    }
  }
  __device__ void add(const real* left, const real* right) {
    const auto a = *reinterpret_cast<const Pack<real, kSide>*>(left);
    const auto b = *reinterpret_cast<const Pack<real, kSide>*>(right);
    for (int r = 0; r < kSide; ++r) {
      for (int c = 0; c < kSide; ++c) sums[r][c] += a.at[r] * b.at[c];
    }
  }
};

// Of the tiles on and below the diagonal, taken row by row: the row of tile t.
__device__ inline int64_t triangle_row(int64_t t) {
  auto row = static_cast<int64_t>((sqrtf(8 * static_cast<float>(t) + 1) - 1) / 2);
  while (row * (row + 1) / 2 > t) --row;
  while ((row + 1) * (row + 2) / 2 <= t) ++row;
  return row;
}

// out [B, columns]
template <typename dense_t, typename embedded_t, typename real>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(Plan plan, Vectors<dense_t, embedded_t> vectors, dense_t* __restrict__ out) {
  auto* shared = static_cast<real*>(shared_memory());  // [samples, slice, padded], then [samples, P]
  Threads<Tile<real>> threads;
  for (int64_t unit = blockIdx.x; unit < plan.num_units(); unit += gridDim.x) {
    const int64_t first = unit / plan.passes * plan.samples, pass = unit % plan.passes, rest = plan.batch_size - first;
    const int samples = rest < plan.samples ? static_cast<int>(rest) : plan.samples;
    threads.each([&](int thread, Tile<real>& tile) {
      const int64_t t = pass * plan.threads + thread, row = triangle_row(t % plan.tiles);
      tile.sample = static_cast<int>(t / plan.tiles);
      tile.row = row * kSide, tile.column = (t % plan.tiles - row * (row + 1) / 2) * kSide;
      tile.clear();
    });
    for (int64_t d = 0; d < plan.dim; d += plan.slice) {
      const int count = plan.dim - d < plan.slice ? static_cast<int>(plan.dim - d) : plan.slice;
      threads.each([&](int thread, Tile<real>&) {
        const auto num_vectors = static_cast<int>(plan.num_vectors);
        for (int i = thread / plan.lanes; i < samples * num_vectors; i += plan.threads / plan.lanes) {
          const int s = i / num_vectors, v = i % num_vectors;
          real* to = shared + static_cast<int64_t>(s) * plan.slice * plan.padded + v;
          vectors.template read<real>(plan, first + s, v, d, count, thread,
                                      [&](int z, real number) { to[z * plan.padded] = number; });
        }
      });
      threads.each([&](int, Tile<real>& tile) {
        if (tile.sample >= samples) return;
        const real* at = shared + static_cast<int64_t>(tile.sample) * plan.slice * plan.padded;
        for (int z = 0; z < count; ++z, at += plan.padded) tile.add(at + tile.row, at + tile.column);
      });
    }
    threads.each([&](int, Tile<real>& tile) {
      if (tile.sample >= samples) return;
      for (int r = 0; r < kSide; ++r) {
        for (int c = 0; c < kSide; ++c) {
          const int64_t i = tile.row + r, j = tile.column + c, pair = pairs_before(i) + j;
          if (i >= plan.num_vectors || j >= i) continue;
          if (plan.collects()) {
            shared[tile.sample * plan.num_pairs() + pair] = tile.sums[r][c];
          } else {
            out[(first + tile.sample) * plan.columns + plan.dim + pair] = static_cast<dense_t>(tile.sums[r][c]);
          }
        }
      }
    });
    threads.each([&](int thread, Tile<real>&) {
      const int64_t end = plan.dim + plan.num_pairs();  // of what is no zero
      for (int s = 0; s < samples; ++s) {
        const dense_t* dense = vectors.dense + (first + s) * plan.dim;
        const real* products = shared + s * plan.num_pairs() - plan.dim;
        dense_t* to = out + (first + s) * plan.columns;
        for (int64_t c = thread; c < plan.columns; c += plan.threads) {
          if (c >= plan.dim && c < end) {
            if (plan.collects()) to[c] = static_cast<dense_t>(products[c]);
          } else if (pass == 0) {
            to[c] = c < plan.dim ? dense[c] : static_cast<dense_t>(0.0f);
          }
        }
      }
    });
  }
}

// The `count` first numbers of a tile's row.
template <typename real, typename number_t>
__device__ void write(const real (&from)[kSide], int64_t count, number_t* __restrict__ to) {
  if (count >= kSide && Pack<number_t, kSide>::fits(to)) {
    Pack<number_t, kSide> pack;
    for (int i = 0; i < kSide; ++i) pack.at[i] = static_cast<number_t>(from[i]);
    *reinterpret_cast<Pack<number_t, kSide>*>(to) = pack;
  } else {
    for (int i = 0; i < kSide && i < count; ++i) to[i] = static_cast<number_t>(from[i]);
  }
}

// grad [B, columns]; to_dense [B, D], to_embedded [B, F, D]. Vector v's: the sum over j of the gradient of pair (v, j)
// times vector j.
template <typename dense_t, typename embedded_t, typename real>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Plan plan, Vectors<dense_t, embedded_t> vectors, const dense_t* __restrict__ grad,
                    dense_t* __restrict__ to_dense, embedded_t* __restrict__ to_embedded) {
  auto* factors = static_cast<real*>(shared_memory());  // [samples, depth, padded], a symmetric matrix's rows
  real* staged = factors + static_cast<int64_t>(plan.samples) * plan.depth * plan.padded;  // [samples, depth, slice]
  Threads<Tile<real>> threads;
  const int per_row = plan.slice / kSide;
  for (int64_t unit = blockIdx.x; unit < plan.num_units(); unit += gridDim.x) {
    const int64_t pass = unit % plan.passes, begin = unit / plan.passes % plan.slices * plan.slice;
    const int64_t first = unit / plan.passes / plan.slices * plan.samples, rest = plan.batch_size - first;
    const int samples = rest < plan.samples ? static_cast<int>(rest) : plan.samples;
    const int count = plan.dim - begin < plan.slice ? static_cast<int>(plan.dim - begin) : plan.slice;
    threads.each([&](int thread, Tile<real>& tile) {
      const int64_t t = pass * plan.threads + thread;
      tile.sample = static_cast<int>(t / plan.tiles);
      tile.row = t % plan.tiles / per_row * kSide, tile.column = t % plan.tiles % per_row * kSide;
      tile.clear();
    });
    for (int64_t j = 0; j < plan.num_vectors; j += plan.depth) {
      const int64_t left = plan.num_vectors - j;
      const int depth = left < plan.depth ? static_cast<int>(left) : plan.depth;
      threads.each([&](int thread, Tile<real>&) {
        for (int n = thread / 32; n < samples * depth; n += plan.threads / 32) {
          const int s = n / depth, k = n % depth;
          const dense_t* pairs = grad + (first + s) * plan.columns + plan.dim;
          real* to = factors + static_cast<int64_t>(s * plan.depth + k) * plan.padded;
          for (int64_t i = thread % 32; i < plan.num_vectors; i += 32) {
            const int64_t high = i > j + k ? i : j + k, low = i > j + k ? j + k : i;
            to[i] = high == low ? real(0) : static_cast<real>(pairs[pairs_before(high) + low]);
          }
        }
        for (int n = thread / plan.lanes; n < samples * depth; n += plan.threads / plan.lanes) {
          const int s = n / depth, k = n % depth;
          real* to = staged + static_cast<int64_t>(s * plan.depth + k) * plan.slice;
          vectors.template read<real>(plan, first + s, j + k, begin, count, thread,
                                      [&](int z, real number) { to[z] = number; });
        }
      });
      threads.each([&](int, Tile<real>& tile) {
        if (tile.sample >= samples) return;
        const real* left_at = factors + static_cast<int64_t>(tile.sample) * plan.depth * plan.padded + tile.row;
        const real* right_at = staged + static_cast<int64_t>(tile.sample) * plan.depth * plan.slice + tile.column;
        for (int k = 0; k < depth; ++k) tile.add(left_at + k * plan.padded, right_at + k * plan.slice);
      });
    }
    threads.each([&](int, Tile<real>& tile) {
      if (tile.sample >= samples) return;
      const int64_t b = first + tile.sample, d = begin + tile.column, end = plan.dim - d;
      for (int r = 0; r < kSide && tile.row + r < plan.num_vectors; ++r) {
        const int64_t v = tile.row + r;
        if (v > 0) {
          write(tile.sums[r], end, to_embedded + (b * (plan.num_vectors - 1) + v - 1) * plan.dim + d);
          continue;
        }
        for (int c = 0; c < kSide && c < end; ++c) {
          tile.sums[r][c] += static_cast<real>(grad[b * plan.columns + d + c]);
        }
        write(tile.sums[r], end, to_dense + b * plan.dim + d);
      }
    });
  }
}

// --- launches --------------------------------------------------------------------------------------------------------

int64_t ceil_of(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit;
}

Plan plan_of(const Interaction& call) {
  Plan plan{};
  plan.batch_size = call.batch_size, plan.num_vectors = call.num_vectors, plan.dim = call.dim;
  plan.columns = call.columns();
  plan.padded = static_cast<int>(ceil_of(call.num_vectors, kSide) * kSide);
  plan.slices = 1;
  return plan;
}

void deal(Plan& plan, int64_t tiles) {
  plan.tiles = static_cast<int>(tiles);
  plan.samples = static_cast<int>(std::max<int64_t>(kThreads / tiles, 1));
  plan.passes = ceil_of(tiles, kThreads);
  plan.threads = static_cast<int>(std::min<int64_t>(ceil_of(plan.samples * tiles, 32) * 32, kThreads));
}

template <typename number_t>
void read_by(Plan& plan) {
  const int64_t packs = ceil_of(plan.slice * static_cast<int64_t>(sizeof(number_t)), 16);
  plan.lanes = static_cast<int>(std::bit_ceil(static_cast<uint64_t>(std::clamp<int64_t>(packs, 1, 32))));
}

// 16-bit numbers are staged as float, so a row of the shared memory is of `real`.
template <typename embedded_t, typename real>
Plan forward_plan(const Interaction& call) {
  Plan plan = plan_of(call);
  const int64_t side = plan.padded / kSide, limit = kSharedBytes / sizeof(real);
  deal(plan, side * (side + 1) / 2);
  const auto fit = static_cast<uint64_t>(limit / (plan.samples * int64_t{plan.padded}));
  plan.slice = static_cast<int>(
      std::clamp<int64_t>(static_cast<int64_t>(std::bit_floor(fit)), 1, std::max<int64_t>(plan.dim, 1)));
  read_by<embedded_t>(plan);
  plan.shared_numbers =
      std::max(int64_t{plan.samples} * plan.slice * plan.padded, plan.collects() ? plan.samples * plan.num_pairs() : 0);
  return plan;
}

template <typename embedded_t, typename real>
Plan backward_plan(const Interaction& call) {
  Plan plan = plan_of(call);
  const int64_t limit = kSharedBytes / sizeof(real);
  plan.slice = static_cast<int>(std::min<int64_t>(ceil_of(call.dim, kSide) * kSide, 64));
  plan.slices = ceil_of(call.dim, plan.slice);
  deal(plan, int64_t{plan.padded / kSide} * (plan.slice / kSide));
  const int64_t a_vector = int64_t{plan.samples} * (plan.padded + plan.slice);
  const int64_t steps = ceil_of(plan.num_vectors, std::max<int64_t>(limit / a_vector, 1));
  plan.depth = static_cast<int>(ceil_of(plan.num_vectors, steps));
  read_by<embedded_t>(plan);
  plan.shared_numbers = a_vector * plan.depth;
  return plan;
}

template <typename real, typename... Parameters, typename... Arguments>
void launch(const Tensor& on, void (*kernel)(Plan, Parameters...), const Plan& plan, Arguments... arguments) {
  const auto bytes = static_cast<size_t>(plan.shared_numbers) * sizeof(real);
  require(bytes <= 48 * 1024, "dot_interaction: too many vectors for the shared memory of a CUDA block");
  const DeviceGuard guard(on.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  const auto blocks = static_cast<unsigned>(std::min(plan.num_units(), kMaxBlocks));
#ifdef __CUDACC__
  kernel<<<blocks, plan.threads, bytes, static_cast<cudaStream_t>(stream)>>>(plan, arguments...);
#else
  launch_blocks_on_host(blocks, static_cast<unsigned>(plan.threads), bytes, [&] { kernel(plan, arguments...); });
#endif
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) fail("CUDA: ", cudaGetErrorString(error));
}

template <typename dense_t, typename embedded_t>
Vectors<dense_t, embedded_t> vectors_of(const Interaction& call) {
  return {call.dense.const_data_ptr<dense_t>(), call.embedded.const_data_ptr<embedded_t>()};
}

// --- the operators: arguments as in embeddings/interaction.py --------------------------------------------------------

Tensor dot_interaction(const Tensor& dense, const Tensor& embedded, int64_t multiple) {
  const Interaction call = make_interaction(dense, embedded, multiple);
  Tensor out = torch::stable::new_empty(dense, {call.batch_size, call.columns()});
  with_dtypes(call, [&](auto dense_number, auto embedded_number, auto sum) {
    using dense_t = decltype(dense_number);
    using embedded_t = decltype(embedded_number);
    using real = decltype(sum);
    if (out.numel() == 0) return;
    launch<real>(dense, forward_kernel<dense_t, embedded_t, real>, forward_plan<embedded_t, real>(call),
                 vectors_of<dense_t, embedded_t>(call), out.mutable_data_ptr<dense_t>());
  });
  return out;
}

std::tuple<Tensor, Tensor> dot_interaction_backward(const Tensor& grad, const Tensor& dense, const Tensor& embedded,
                                                    int64_t multiple) {
  const Interaction call = make_interaction(dense, embedded, multiple);
  const Tensor grads = checked_grad(grad, call);
  Tensor of_dense = torch::stable::new_empty(dense, {call.batch_size, call.dim});
  Tensor of_embedded = torch::stable::new_empty(embedded, {call.batch_size, call.num_features(), call.dim});
  with_dtypes(call, [&](auto dense_number, auto embedded_number, auto sum) {
    using dense_t = decltype(dense_number);
    using embedded_t = decltype(embedded_number);
    using real = decltype(sum);
    if (of_dense.numel() == 0) return;  // then there are no embeddings' numbers either
    launch<real>(dense, backward_kernel<dense_t, embedded_t, real>, backward_plan<embedded_t, real>(call),
                 vectors_of<dense_t, embedded_t>(call), grads.const_data_ptr<dense_t>(),
                 of_dense.mutable_data_ptr<dense_t>(), of_embedded.mutable_data_ptr<embedded_t>());
  });
  return {of_dense, of_embedded};
}

}  // namespace
}  // namespace embeddings::inline cuda

STABLE_TORCH_LIBRARY_IMPL(EMBEDDINGS_LIBRARY, EMBEDDINGS_DEVICE, m) {
  m.impl("dot_interaction", TORCH_BOX(&embeddings::dot_interaction));
  m.impl("dot_interaction_backward", TORCH_BOX(&embeddings::dot_interaction_backward));
}
