// Which weights an id reads: integer arithmetic only, one source for bag.cpp and bag.cu; embeddings/index_map.py holds
// the twin in torch int64. A slab of weights is [num_slots, width]; a vector of dim numbers is dim / width chunks, and
// a map says which slot chunk c of an id is. Every map is a struct with:
//   ranged                  true if only ids 0 <= id < num_embeddings have weights
//   key(table, id)          computed once per id
//   slot(table, key, chunk) in [0, num_slots), relative to the table's first slot
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace embeddings {

// One row of the int64 tensor `tables` [F, 5]; the columns are named in embeddings/index_map.py.
struct Table {
  int64_t position;        // the feature's place in the batch
  int64_t first_slot;      // where its slice of the slab begins
  int64_t num_slots;       // length of the slice
  int64_t num_embeddings;  // ids of a ranged map are 0 <= id < num_embeddings
  int64_t seed;            // of the hash
};
constexpr int64_t kTableColumns = 5;

// Numbers are added in one order everywhere: runs of kRun contributions are summed left to right, then the runs' sums
// are. A run bounds the serial chain, so a GPU can sum one hot slot in parallel and still give the CPU's bits.
constexpr int64_t kRun = 64;

// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): number i of the stream that starts at `seed`.
HOST_DEVICE uint64_t splitmix64(uint64_t seed, uint64_t i) {
  uint64_t z = seed + (i + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// hash -> [0, n) without a division: the high half of hash * n (Lemire, ACM TOMACS 2019).
HOST_DEVICE int64_t reduce_range(uint64_t hash, int64_t n) {
#ifdef __CUDA_ARCH__
  return static_cast<int64_t>(__umul64hi(hash, static_cast<uint64_t>(n)));
#else
  return static_cast<int64_t>((static_cast<unsigned __int128>(hash) * static_cast<uint64_t>(n)) >> 64);
#endif
}

// Row `id`, in one chunk.
struct DenseMap {
  static constexpr bool ranged = true;
  HOST_DEVICE static uint64_t key(const Table&, int64_t id) { return static_cast<uint64_t>(id); }
  HOST_DEVICE static int64_t slot(const Table&, uint64_t key, int64_t) { return static_cast<int64_t>(key); }
};

// Chunk c of an id is number c of the SplitMix64 stream that the id itself picks from the table's stream: any 64-bit
// id.
struct HashedMap {
  static constexpr bool ranged = false;
  HOST_DEVICE static uint64_t key(const Table& table, int64_t id) {
    return splitmix64(static_cast<uint64_t>(table.seed), static_cast<uint64_t>(id));
  }
  HOST_DEVICE static int64_t slot(const Table& table, uint64_t key, int64_t chunk) {
    return reduce_range(splitmix64(key, static_cast<uint64_t>(chunk)), table.num_slots);
  }
};

// The numbers that name a map in the operators' schema, in the order of embeddings/ops.py.
template <typename Function>
inline bool with_map(int64_t index_map, Function function) {
  switch (index_map) {
    case 0: function(DenseMap{}); return true;
    case 1: function(HashedMap{}); return true;
    default: return false;
  }
}

}  // namespace embeddings
