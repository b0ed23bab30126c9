// Part of cuda_on_host.h, for a thread sanitizer: each of a kernel's threads is one of the CPU's, so that two that
// write one number are seen, and what the lanes of a warp exchange is exchanged. Few threads in few blocks: it is slow.
#pragma once

#include <atomic>
#include <barrier>
#include <bit>
#include <memory>
#include <mutex>
#include <thread>
#include <tuple>

#define EMBEDDINGS_THREADS_OF_BLOCK 32
#define EMBEDDINGS_NARROW_UNITS 0  // so that slots of 64 bits are tested, too

inline thread_local dim3 blockIdx, threadIdx;
inline dim3 gridDim, blockDim;

// Threads that wait for each other, and what each has brought.
struct Meeting {
  explicit Meeting(ptrdiff_t count) : all(count) {}
  std::barrier<> all;
  double brought[32]{};
};

class Meetings {
 public:
  Meeting& of(unsigned group, unsigned mask, ptrdiff_t count) {
    std::lock_guard<std::mutex> guard(lock_);
    auto& meeting = meetings_[{blockIdx.y * gridDim.x + blockIdx.x, group, mask}];
    if (!meeting) meeting = std::make_unique<Meeting>(count);
    return *meeting;
  }
  void clear() { meetings_.clear(); }

 private:
  std::mutex lock_;
  std::map<std::tuple<unsigned, unsigned, unsigned>, std::unique_ptr<Meeting>> meetings_;
};
inline Meetings meetings;

template <typename Kernel>
void launch_on_host(dim3 grid, unsigned threads, Kernel kernel) {
  gridDim = {std::min(grid.x, 2u), std::min(grid.y, 2u)}, blockDim = {threads, 1};
  std::vector<std::thread> running;
  for (unsigned block = 0; block < gridDim.x * gridDim.y; ++block) {
    for (unsigned thread = 0; thread < threads; ++thread) {
      running.emplace_back([=] {
        blockIdx = {block % gridDim.x, block / gridDim.x}, threadIdx = {thread, 0};
        kernel();
      });
    }
  }
  for (std::thread& thread : running) thread.join();
  meetings.clear();
}

// --- a warp ----------------------------------------------------------------------------------------------------------

// What the lane brings that `from` names, a lane of mask.
template <typename number_t>
number_t exchange(unsigned mask, number_t v, unsigned from) {
  Meeting& meeting = meetings.of(threadIdx.x / 32, mask, std::popcount(mask));
  meeting.brought[threadIdx.x % 32] = v;
  meeting.all.arrive_and_wait();
  const auto result = static_cast<number_t>(meeting.brought[from]);
  meeting.all.arrive_and_wait();
  return result;
}
template <typename number_t>
number_t __shfl_xor_sync(unsigned mask, number_t v, int lanes) {
  return exchange(mask, v, threadIdx.x % 32 ^ static_cast<unsigned>(lanes));
}
template <typename number_t>
number_t __shfl_sync(unsigned mask, number_t v, int lane) {
  return exchange(mask, v, static_cast<unsigned>(lane));
}

template <typename number_t>
void atomicAdd(number_t* to, number_t v) {
  std::atomic_ref<number_t>(*to).fetch_add(v, std::memory_order_relaxed);
}
inline int atomicCAS_system(int* at, int expected, int desired) {
  std::atomic_ref<int>(*at).compare_exchange_strong(expected, desired);
  return expected;
}
inline int atomicExch_system(int* at, int desired) {
  return std::atomic_ref<int>(*at).exchange(desired);
}

// --- a block ---------------------------------------------------------------------------------------------------------

inline std::vector<std::unique_ptr<char[]>> shared_by_block;

template <typename Kernel>
void launch_blocks_on_host(unsigned blocks, unsigned threads, size_t shared_bytes, Kernel kernel) {
  for (unsigned block = 0; block < std::min(blocks, 2u); ++block) {
    shared_by_block.push_back(std::make_unique<char[]>(shared_bytes));
  }
  launch_on_host({blocks, 1}, threads, kernel);
  shared_by_block.clear();
}
inline void* shared_memory() {
  return shared_by_block[blockIdx.x].get();
}

template <typename State>
struct Threads {
  State state;

  template <typename Step>
  void each(Step step) {
    step(static_cast<int>(threadIdx.x), state);
    meetings.of(0, 0, blockDim.x).all.arrive_and_wait();
  }
};
