// What random rows cost on this machine: ROW_BANDWIDTH TABLE_BYTES ROW_BYTES THREADS HUGE PREFETCH prints nanoseconds
// per row, the least of several passes over fresh random rows, of  read  copy  update:
//   read    the row is summed into registers (a bag's forward pass, without its output)
//   copy    the row goes to the next place of an output (bags of one id)
//   update  the row gets the next row of a gradient added (SGD's update)
// HUGE = 1 asks for huge pages; PREFETCH = 1 asks for a row some rows before it is used.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kRows = 1 << 18;  // of a pass
constexpr int kPasses = 15;
constexpr int64_t kAhead = 16;  // rows; 8 to 32 are equally good
volatile float sink;

void* allocate(int64_t num_bytes, bool huge) {
  constexpr int64_t kHuge = 1 << 21;
  num_bytes = (num_bytes + kHuge - 1) / kHuge * kHuge;
  void* memory = nullptr;
  if (posix_memalign(&memory, kHuge, num_bytes) != 0) std::exit(1);
  madvise(memory, num_bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  std::fill_n(static_cast<float*>(memory), num_bytes / 4, 0.0f);
  return memory;
}

using Vector = float __attribute__((vector_size(32), may_alias));

// W vectors per row. kind: 0 read, 1 copy, 2 update
template <int W, int kind, bool prefetch>
void pass(Vector* table, const int64_t* rows, Vector* other, int64_t first, int64_t last) {
  Vector sum[4] = {};
  for (int64_t i = first; i < last; ++i) {
    if (prefetch && i + kAhead < last)
      for (int line = 0; line < W; line += 2) __builtin_prefetch(table + rows[i + kAhead] * W + line, kind == 2);
    Vector* row = table + rows[i] * W;
    for (int d = 0; d < W; ++d) {
      if constexpr (kind == 0) sum[d % 4] += row[d];
      if constexpr (kind == 1) other[i * W + d] = row[d];
      if constexpr (kind == 2) row[d] += other[i * W + d];
    }
  }
  sum[0] += sum[1] + sum[2] + sum[3];
  if (sum[0][0] == 1e30f) sink = sum[0][0];  // never, but then the sums are not for nothing
}

template <int W, int kind>
void pass(bool prefetch, Vector* table, const int64_t* rows, Vector* other, int64_t first, int64_t last) {
  (prefetch ? pass<W, kind, true> : pass<W, kind, false>)(table, rows, other, first, last);
}

template <int W>
void measure(int64_t table_bytes, int num_threads, bool huge, bool prefetch) {
  const int64_t num_rows = table_bytes / (W * 32);
  Vector* table = static_cast<Vector*>(allocate(table_bytes, huge));
  Vector* other = static_cast<Vector*>(allocate(kRows * W * 32, huge));
  std::vector<int64_t> rows(kRows);
  uint64_t state = 1;
  constexpr decltype(&pass<W, 0>) kinds[] = {pass<W, 0>, pass<W, 1>, pass<W, 2>};
  for (int kind = 0; kind < 3; ++kind) {
    std::vector<double> times;
    for (int i = 0; i < kPasses; ++i) {
      for (auto& row : rows) {
        state += 0x9E3779B97F4A7C15u;  // SplitMix64
        uint64_t x = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9u;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
        row = static_cast<int64_t>((x ^ (x >> 31)) % static_cast<uint64_t>(num_rows));
      }
      const auto began = std::chrono::steady_clock::now();
      std::vector<std::thread> threads;
      for (int t = 0; t < num_threads; ++t)
        threads.emplace_back([&, t] {
          const int64_t first = kRows * t / num_threads, last = kRows * (t + 1) / num_threads;
          kinds[kind](prefetch, table, rows.data(), other, first, last);
        });
      for (auto& thread : threads) thread.join();
      times.push_back(std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - began).count());
    }
    std::printf("%.2f ", *std::min_element(times.begin(), times.end()) / kRows);
  }
  std::printf("\n");
}

}  // namespace

int main(int, char** argument) {
  const int64_t table_bytes = std::atoll(argument[1]);
  const int row_bytes = std::atoi(argument[2]), threads = std::atoi(argument[3]);
  const bool huge = std::atoi(argument[4]), prefetch = std::atoi(argument[5]);
  if (row_bytes == 64)
    measure<2>(table_bytes, threads, huge, prefetch);
  else if (row_bytes == 256)
    measure<8>(table_bytes, threads, huge, prefetch);
  else if (row_bytes == 512)
    measure<16>(table_bytes, threads, huge, prefetch);
  else
    return 1;
}
