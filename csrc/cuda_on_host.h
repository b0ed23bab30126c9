// CUDA's words in C++, for building *.cu without nvcc: a launch is a loop over blocks and threads. Slow, and it shows
// neither races, but for those that cuda_on_threads.h shows, nor timing, but a sanitizer sees every index. Its
// operators are torch.ops.embeddings_host, on CPU tensors.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <utility>
#include <vector>

#define EMBEDDINGS_LIBRARY embeddings_host
#define EMBEDDINGS_DEVICE CPU

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x, y;
};
#ifdef EMBEDDINGS_THREADS
#include "cuda_on_threads.h"
#else
inline dim3 blockIdx, threadIdx, gridDim, blockDim;

// A group's results of `over_lanes`, by its number and that of the call.
inline std::map<std::pair<int64_t, int64_t>, double> group_results;
inline int64_t group_calls;  // of this thread

// Few blocks, so that kernels stride over their work; last thread first, so that no result hangs on the order.
template <typename Kernel>
void launch_on_host(dim3 grid, unsigned threads, Kernel kernel) {
  gridDim = {std::min(grid.x, 3u), std::min(grid.y, 2u)}, blockDim = {threads, 1};
  group_results.clear();
  for (unsigned block = gridDim.x * gridDim.y; block-- > 0;) {
    blockIdx = {block % gridDim.x, block / gridDim.x};
    for (threadIdx = {threads, 0}; threadIdx.x-- > 0;) {
      group_calls = 0;
      kernel();
    }
  }
}

// As bag_update.cu's: the group's first thread to come does it for all lanes.
template <typename real, int kVector, typename Group, typename Partial, typename Finish>
real over_lanes(const Group& group, Partial partial, Finish finish) {
  const auto [result, is_first] = group_results.try_emplace({group.index, group_calls++});
  if (is_first) {
    struct Numbers {
      real at[kVector];
    };
    std::vector<Numbers> lanes(group.lanes);
    for (int lane = 0; lane < group.lanes; ++lane) partial(lane, lanes[lane].at);
    for (int half = group.lanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) {
        for (int i = 0; i < kVector; ++i) lanes[lane].at[i] += lanes[lane + half].at[i];
      }
    }
    result->second = finish(lanes[0].at);
  }
  return static_cast<real>(result->second);
}

// A kernel whose threads share memory goes in steps: each(step) is a loop over the threads of the block, and what
// a thread keeps between two steps is its State.
inline void* shared_on_host;
template <typename Kernel>
void launch_blocks_on_host(unsigned blocks, unsigned threads, size_t shared_bytes, Kernel kernel) {
  gridDim = {std::min(blocks, 3u), 1}, blockDim = {threads, 1};
  for (blockIdx = {gridDim.x, 0}; blockIdx.x-- > 0;) {
    shared_on_host = std::malloc(shared_bytes);
    kernel();
    std::free(shared_on_host);
  }
}
inline void* shared_memory() {
  return shared_on_host;
}

template <typename State>
struct Threads {
  std::vector<State> states{blockDim.x};

  template <typename Step>
  void each(Step step) {
    for (unsigned thread = blockDim.x; thread-- > 0;) step(static_cast<int>(thread), states[thread]);
  }
};

// one thread runs at a time
inline int atomicCAS_system(int* at, int expected, int desired) {
  return *at == expected ? std::exchange(*at, desired) : *at;
}
inline int atomicExch_system(int* at, int desired) {
  return std::exchange(*at, desired);
}
template <typename number_t>
void atomicAdd(number_t* to, number_t v) {
  *to += v;
}
#endif

// --- runtime ---------------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
constexpr unsigned cudaHostAllocMapped = 1, cudaHostAllocPortable = 2;

inline const char* cudaGetErrorString(cudaError_t) {
  return "out of memory";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = std::malloc(bytes);
  return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t) {
  std::memset(to, byte, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

// --- between threads -------------------------------------------------------------------------------------------------

inline void __threadfence_system() {}
inline int __ffs(int v) {
  return __builtin_ffs(v);
}

namespace cooperative_groups {
struct Alone {
  int size() const { return 1; }
  int thread_rank() const { return 0; }
};
template <typename number_t>
struct plus {};

inline Alone coalesced_threads() {
  return {};
}
template <typename Label>
Alone labeled_partition(Alone group, Label) {
  return group;
}
template <typename number_t, typename Operation>
number_t reduce(Alone, number_t v, Operation) {
  return v;
}
}  // namespace cooperative_groups

// --- cub -------------------------------------------------------------------------------------------------------------

namespace cub {
template <typename number_t>
struct DoubleBuffer {
  number_t *current, *alternate;
  DoubleBuffer(number_t* first, number_t* second) : current(first), alternate(second) {}
  number_t* Current() const { return current; }
};

struct DeviceRadixSort {
  template <typename key_t, typename value_t>
  static cudaError_t SortPairs(void* memory, size_t& bytes, DoubleBuffer<key_t>& keys, DoubleBuffer<value_t>& values,
                               int64_t count, int begin_bit, int end_bit, cudaStream_t) {
    bytes = 1;
    if (memory == nullptr) return cudaSuccess;
    const uint64_t mask = end_bit - begin_bit < 64 ? (uint64_t{1} << (end_bit - begin_bit)) - 1 : ~uint64_t{0};
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return (keys.current[a] >> begin_bit & mask) < (keys.current[b] >> begin_bit & mask);
    });
    for (int64_t i = 0; i < count; ++i) {
      keys.alternate[i] = keys.current[order[i]];
      values.alternate[i] = values.current[order[i]];
    }
    std::swap(keys.current, keys.alternate);
    std::swap(values.current, values.alternate);
    return cudaSuccess;
  }
};

struct DeviceScan {
  static cudaError_t InclusiveSum(void* memory, size_t& bytes, const int64_t* from, int64_t* to, int64_t count,
                                  cudaStream_t) {
    bytes = 1;
    if (memory != nullptr) std::partial_sum(from, from + count, to);
    return cudaSuccess;
  }
};
}  // namespace cub
