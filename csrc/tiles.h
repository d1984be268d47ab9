#pragma once

// Any number of tensors as one sequence of tiles that the blocks of a kernel share evenly: a table on the device with a
// row for each tensor.

#include <cstdint>
#include <type_traits>

#include "block.h"

namespace rpg_fast {

constexpr int64_t kTile = 4096;                            // elements; a tensor's last tile may have fewer
constexpr int kOctet = 8;                                  // elements that a thread takes at a time: one byte of bits
constexpr int kOctets = static_cast<int>(kTile) / kOctet;  // of a tile

/// How the elements of a tensor are stored.
enum class Storage : int64_t { kFloat32, kFloat64, kFloat16, kBFloat16, kBytes };

/// One contiguous tensor.
struct TensorRow {
  int64_t data;  // its address, aligned to kAlignment
  int64_t numel;
  int64_t first_tile;  // the number of tiles of the rows before
  int64_t offset;      // the byte where its bits start
  Storage storage;
};
constexpr int64_t kRowColumns = sizeof(TensorRow) / sizeof(int64_t);
constexpr int kAlignment = 16;  // bytes of a vector load

struct Tensors {
  const int64_t* table;
  int64_t count, tiles;

  RPG_FAST_HOST_DEVICE const TensorRow& row(int64_t i) const { return reinterpret_cast<const TensorRow*>(table)[i]; }
  RPG_FAST_HOST_DEVICE int64_t first_tile(int64_t i) const { return i < count ? row(i).first_tile : tiles; }

  /// The tensor that a tile belongs to.
  RPG_FAST_HOST_DEVICE int64_t find(int64_t tile) const {
    int64_t low = 0, high = count;  // first_tile(low) <= tile < first_tile(high)
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (first_tile(middle) <= tile ? low : high) = middle;
    }
    return low;
  }

  /// visit(row, first, n, byte) for this thread's octets of a block's tiles: elements [first, first + n) of a tensor,
  /// whose bits are byte `byte` of a buffer.
  template <class Block, class Visit>
  RPG_FAST_HOST_DEVICE void for_each_octet(const Block& block, int64_t b, int64_t blocks, const Visit& visit) const {
    for_each_tile(b, blocks, [&](int64_t tensor, int64_t tile) {
      const int64_t start = (tile - row(tensor).first_tile) * kTile;
      for (int octet = block.lane(); octet < kOctets; octet += block.count()) {
        const int64_t first = start + octet * kOctet, left = row(tensor).numel - first;
        if (left <= 0) break;
        visit(row(tensor), first, left < kOctet ? static_cast<int>(left) : kOctet, row(tensor).offset + first / kOctet);
      }
    });
  }

  /// visit(tensor, tile) for the tiles of block b of `blocks`, in order.
  template <class Visit>
  RPG_FAST_HOST_DEVICE void for_each_tile(int64_t b, int64_t blocks, const Visit& visit) const {
    const int64_t begin = b * tiles / blocks, end = (b + 1) * tiles / blocks;
    if (begin == end) return;
    int64_t tensor = find(begin);
    for (int64_t tile = begin; tile < end; ++tile) {
      while (first_tile(tensor + 1) <= tile) ++tensor;
      visit(tensor, tile);
    }
  }
};

/// Adds to a counter that several threads or blocks share; returns what it held before.
template <class T>
RPG_FAST_HOST_DEVICE T add_shared(T* counter, T value) {
#ifdef __CUDA_ARCH__
  using Counter = std::conditional_t<sizeof(T) == 8, unsigned long long, unsigned int>;
  return static_cast<T>(atomicAdd(reinterpret_cast<Counter*>(counter), static_cast<Counter>(value)));
#else
  return __atomic_fetch_add(counter, value, __ATOMIC_RELAXED);
#endif
}

/// Copies kBytes, a multiple of 8, that are aligned to kAlignment, or to 8 if there are 8 of them.
template <int kBytes>
RPG_FAST_HOST_DEVICE void copy_aligned(const void* from, void* to) {
#ifdef __CUDA_ARCH__
  using Vector = std::conditional_t<kBytes % kAlignment == 0, uint4, uint2>;
  constexpr int kVectors = kBytes / sizeof(Vector);
  for (int i = 0; i < kVectors; ++i) static_cast<Vector*>(to)[i] = static_cast<const Vector*>(from)[i];
#else
  __builtin_memcpy(to, from, kBytes);
#endif
}

/// Elements [first, first + n) as they are stored, n up to 8, then zeros. `first` is a multiple of 8.
template <class Word>
RPG_FAST_HOST_DEVICE void load_words(const TensorRow& row, int64_t first, int n, Word (&words)[kOctet]) {
  const Word* data = reinterpret_cast<const Word*>(row.data) + first;
  if (n == kOctet) {
    alignas(kAlignment) Word aligned[kOctet];
    copy_aligned<sizeof(words)>(data, aligned);
    for (int i = 0; i < kOctet; ++i) words[i] = aligned[i];
  } else {
    for (int i = 0; i < kOctet; ++i) words[i] = i < n ? data[i] : Word{0};
  }
}

/// The float32 with the value of these bits of a float16.
RPG_FAST_HOST_DEVICE float float_of_half(uint16_t bits) {
  const uint32_t magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
  const uint32_t shifted = magnitude << 13;
  float value;
  __builtin_memcpy(&value, &shifted, 4);
  value *= 0x1p112f;  // from the exponent's bias of float32 to that of float16, exact for subnormal numbers too
  uint32_t result;
  __builtin_memcpy(&result, &value, 4);
  result = (magnitude < 0x7c00u ? result : shifted | 0x7f800000u) | sign;
  __builtin_memcpy(&value, &result, 4);
  return value;
}

/// Elements [first, first + n) of a floating tensor as A (float, or double for any), n up to 8, then zeros.
/// `first` is a multiple of 8.
template <class A>
RPG_FAST_HOST_DEVICE void load_octet(const TensorRow& row, int64_t first, int n, A (&values)[kOctet]) {
  if (row.storage == Storage::kFloat32) {
    float words[kOctet];
    load_words(row, first, n, words);
    for (int i = 0; i < kOctet; ++i) values[i] = words[i];
  } else if (row.storage == Storage::kFloat64) {
    if constexpr (sizeof(A) == 8) load_words(row, first, n, values);
  } else {
    uint16_t words[kOctet];
    load_words(row, first, n, words);
    for (int i = 0; i < kOctet; ++i) {
      const uint32_t widened = static_cast<uint32_t>(words[i]) << 16;
      float value;
      __builtin_memcpy(&value, &widened, 4);
      values[i] = row.storage == Storage::kBFloat16 ? value : float_of_half(words[i]);
    }
  }
}

}  // namespace rpg_fast
