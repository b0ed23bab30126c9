// What the CUDA operators share on the host: the device and stream of a call, how many threads its work gets, and where
// its kernels note errors.
#pragma once

#include <algorithm>
#include <bit>
#include <map>
#include <mutex>
#include <new>

#include "lookup.h"

namespace embeddings::inline cuda {

#ifdef EMBEDDINGS_THREADS_OF_BLOCK
constexpr int kThreads = EMBEDDINGS_THREADS_OF_BLOCK;
#else
constexpr int kThreads = 256;  // of a block
#endif

inline void check(cudaError_t error) {
  if (error != cudaSuccess) fail("CUDA: ", cudaGetErrorString(error));
}

// What a kernel is for: groups of threads for each row of its grid, so that none divides by the batch size.
struct Work {
  int64_t groups, rows = 1;
};

// The device and stream of one call.
class Launch {
 public:
  explicit Launch(const Tensor& on) : guard_(on.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

  // Runs kernel(arguments..., lanes) over the work, if there is any, in groups of `lanes` threads.
  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), Work work, int lanes, Arguments... arguments) const {
    if (work.groups == 0 || work.rows == 0) return;
    const int64_t blocks = std::min((work.groups * lanes + kThreads - 1) / kThreads, kMaxBlocks);
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(std::min(work.rows, kMaxRows)));
#ifdef __CUDACC__
    kernel<<<grid, kThreads, 0, stream_>>>(arguments..., lanes);
#else
    launch_on_host(grid, kThreads, [&] { kernel(arguments..., lanes); });
#endif
    check(cudaGetLastError());
  }

 private:
  static constexpr int64_t kMaxBlocks = 1 << 20, kMaxRows = 65535;  // kernels stride over the rest
  DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Threads for so many packs of numbers: a power of two, at most a warp.
inline int lanes_for(int64_t packs) {
  return static_cast<int>(std::bit_ceil(static_cast<uint64_t>(std::clamp<int64_t>(packs, 1, 32))));
}

// Sizes of the slab if its features are alike, in numbers. The host does not see the tables: these decide how fast a
// call is, not what it gives.
template <typename number_t>
struct Typical {
  int64_t width, dim;  // of a slot; of a vector

  explicit Typical(const Call& call) {
    const int64_t parts = call.at.num_features * (call.combine == kConcat ? call.at.probes : 1);
    const int64_t numbers = call.columns / std::max<int64_t>(parts, 1);  // too many, where other slabs write too
    width = call.unit > 1 ? call.unit : std::max<int64_t>(numbers / call.chunks, 1);
    dim = width * call.chunks;
  }
  // Threads for a slot, and for a vector.
  int slot_lanes() const { return lanes(width); }
  int vector_lanes() const { return lanes(dim); }

 private:
  int lanes(int64_t numbers) const {
    constexpr int64_t kWide = 16 / sizeof(number_t);
    return lanes_for(width % kWide == 0 ? numbers / kWide : numbers);
  }
};

inline Tensor scratch(const Call& call, int64_t numbers) {
  return torch::stable::new_empty(call.weights, {numbers}, ScalarType::Long);
}

// Two-phase cub calls: how much scratch memory, then the work.
template <typename Work>
void with_scratch(const Call& call, Work work) {
  size_t bytes = 0;
  check(work(nullptr, bytes));
  Tensor memory = scratch(call, static_cast<int64_t>(bytes / sizeof(int64_t) + 1));
  check(work(memory.mutable_data_ptr(), bytes));
}

// The record of a slab, named by its features; never freed, since a captured graph may still write to it. Raises what
// an earlier call left in it.
inline FirstError* error_of(const std::string& features) {
  static std::mutex lock;
  static std::map<std::string, FirstError*> records;
  std::lock_guard<std::mutex> guard(lock);
  FirstError*& record = records[features];
  if (record == nullptr) {
    void* memory = nullptr;
    check(cudaHostAlloc(&memory, sizeof(FirstError), cudaHostAllocMapped | cudaHostAllocPortable));
    record = new (memory) FirstError{};
  }
  if (__atomic_load_n(&record->state, __ATOMIC_ACQUIRE) == 2) {
    const FirstError error = *record;
    __atomic_store_n(&record->state, 0, __ATOMIC_RELEASE);  // last: from here on a kernel may write it again
    error.raise(features);
  }
  return record;
}

// The positions of the maxima [B, columns] of a backward of max pooling, else nothing.
std::optional<Tensor> argmax_of(const Launch& launch, const Call& call);

// Calls function(lookup). grad: `summable`, or nothing in a forward; argmax: of `argmax_of`.
template <typename Function>
void with_lookup(const Call& call, const std::optional<Tensor>& grad, const std::optional<Tensor>& argmax,
                 Function function) {
  require(call.columns <= INT32_MAX, "columns must be less than 2^31");
  const int64_t num_positions = call.at.batch_size == 0 ? 0 : call.at.num_bags / call.at.batch_size;
  FirstError* error = error_of(call.features);
  const int64_t* positions = argmax ? argmax->const_data_ptr<int64_t>() : nullptr;
  with_dtype_and_map(call, [&](auto weight, auto map) {
    using weight_t = decltype(weight);
    using real = typename Accumulator<weight_t>::type;
    using Map = decltype(map);
    const Batch<Map> batch{call.at,      map,          call.unit,     call.columns, call.chunks,
                           call.combine, call.pooling, num_positions, error};
    const weight_t* slab = call.weights_at<weight_t>();
    const real *sample_weights = call.sample_weights_at<real>(), *g = grad ? grad->const_data_ptr<real>() : nullptr;
    if (call.combine == kConcat || call.at.probes == 1) {
      function(Lookup<weight_t, Map, false>{batch, slab, sample_weights, g, positions});
    } else {
      function(Lookup<weight_t, Map, true>{batch, slab, sample_weights, g, positions});
    }
  });
}

}  // namespace embeddings::inline cuda
