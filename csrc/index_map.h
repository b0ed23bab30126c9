// Which weights an id reads: integer arithmetic only, one source for bag.cpp and bag.cu; embeddings/index_map.py holds
// the twin in torch int64. An id reads K probes; probe k is a vector of `dim` numbers, dim / width chunks of `width`
// numbers, each chunk one slot of the probe's slice of the slab. A map is a struct with:
//   ranged, one_chunk       true if only ids 0 <= id < num_embeddings have weights; if dim == width
//   key(table, id)          computed once per id and probe
//   read(table, key, chunk) the slot, relative to the slice, and whether its numbers count negatively
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#define UNROLL
#endif

namespace embeddings {

// One row of the int64 tensor `tables` [F * K, 9]: probe k of the slab's feature f is row f * K + k. The columns are
// named in embeddings/index_map.py.
struct Table {
  int64_t position;        // the feature's place in the batch
  int64_t column;          // where the vector's numbers begin in a row of the output
  int64_t dim;             // how many they are
  int64_t width;           // numbers of a slot, a divisor of dim
  int64_t begin;           // first number of the slice in the slab
  int64_t num_slots;       // length of the slice
  int64_t num_embeddings;  // ids of a ranged map are 0 <= id < num_embeddings
  int64_t divisor;         // of a partition
  int64_t seed;            // of a hash

  HOST_DEVICE int64_t end() const { return begin + num_slots * width; }
  HOST_DEVICE int64_t chunks() const { return dim / width; }
};
constexpr int64_t kTableColumns = 9;

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

// The hash of HashedEmbeddingBag and dlrm_ssm, to repeat their numbers: linear in id and column, so whole rows collide.
HOST_DEVICE uint64_t affine(uint64_t id, uint64_t column) {
  return (id * 9824516537ull + column * 57857966300227ull + 104729ull) % 117130198221199ull;
}

// One 4-byte block of MurmurHash3_x86_32 (Appleby, 2011, public domain).
HOST_DEVICE uint32_t murmur3_block(uint32_t hash, uint32_t block) {
  block *= 0xcc9e2d51u;
  block = (block << 15) | (block >> 17);
  hash ^= block * 0x1b873593u;
  hash = (hash << 13) | (hash >> 19);
  return hash * 5 + 0xe6546b64u;
}

// MurmurHash3_x86_32 of the id's 4 little-endian bytes, as Spotlight has it; of all 8 if the id needs them.
HOST_DEVICE uint32_t murmur3(int64_t id, uint32_t seed) {
  uint32_t hash = murmur3_block(seed, static_cast<uint32_t>(id));
  const bool is_long = id != static_cast<int32_t>(id);
  if (is_long) hash = murmur3_block(hash, static_cast<uint32_t>(static_cast<uint64_t>(id) >> 32));
  hash ^= is_long ? 8 : 4;
  hash = (hash ^ (hash >> 16)) * 0x85ebca6bu;
  hash = (hash ^ (hash >> 13)) * 0xc2b2ae35u;
  return hash ^ (hash >> 16);
}

struct Read {
  int64_t slot;
  bool negative;
};

// One digit of the id in a mixed radix: (id / divisor) % num_slots, in one chunk. A dense table is the only digit;
// quotient and remainder are two.
struct PartitionMap {
  static constexpr bool ranged = true, one_chunk = true;
  HOST_DEVICE uint64_t key(const Table& table, int64_t id) const {
    auto slot = static_cast<uint64_t>(id);
    if (table.divisor != 1) slot /= static_cast<uint64_t>(table.divisor);
    const auto num_slots = static_cast<uint64_t>(table.num_slots);
    return slot < num_slots ? slot : slot % num_slots;
  }
  HOST_DEVICE Read read(const Table&, uint64_t key, int64_t) const { return {static_cast<int64_t>(key), false}; }
};

// The numbers that name a map in the operators' schema: IndexMap in embeddings/kinds.py.
enum IndexMap : int64_t { kPartition = 0, kMixed = 1, kSigned = 2, kAffine = 3, kMurmur3 = 4, kNumMaps = 5 };

inline bool is_ranged(int64_t index_map) {
  return index_map == kPartition;
}
inline bool one_chunk(int64_t index_map) {
  return index_map == kPartition || index_map == kMurmur3;
}

// Any 64-bit id has weights. mixed: chunk c is number c of the SplitMix64 stream that the id picks from the table's
// stream; signed: the same slot, negative by the hash's lowest bit; affine and murmur3: upstream's, see above.
struct HashMap {
  static constexpr bool ranged = false, one_chunk = false;
  IndexMap kind;

  HOST_DEVICE uint64_t key(const Table& table, int64_t id) const {
    if (kind == kMurmur3) return murmur3(id, static_cast<uint32_t>(table.seed));
    if (kind == kAffine) return static_cast<uint64_t>(id);
    return splitmix64(static_cast<uint64_t>(table.seed), static_cast<uint64_t>(id));
  }
  HOST_DEVICE Read read(const Table& table, uint64_t key, int64_t chunk) const {
    if (kind == kMurmur3) {
      const int64_t slot = static_cast<int32_t>(static_cast<uint32_t>(key)) % table.num_slots;
      return {slot < 0 ? slot + table.num_slots : slot, false};
    }
    if (kind == kAffine) {
      const uint64_t hash = affine(key, static_cast<uint64_t>(chunk));
      return {static_cast<int64_t>(hash % static_cast<uint64_t>(table.num_slots)), false};
    }
    const uint64_t hash = splitmix64(key, static_cast<uint64_t>(chunk));
    return {reduce_range(hash, table.num_slots), kind == kSigned && (hash & 1)};
  }
};

// Calls function(map) with the map of that number, which make_call has checked.
template <typename Function>
inline void with_map(int64_t index_map, Function function) {
  if (index_map == kPartition) {
    function(PartitionMap{});
  } else {
    function(HashMap{static_cast<IndexMap>(index_map)});
  }
}

}  // namespace embeddings
