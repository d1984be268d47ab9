#pragma once

// Bit masks: bit i % 8 of byte i / 8 of a segment belongs to element i.

#include <cstdint>

#include "block.h"
#include "tiles.h"

namespace rpg_fast {

/// Eight bytes of a buffer of bits read at once.
typedef uint64_t __attribute__((may_alias)) Octets;

RPG_FAST_HOST_DEVICE int popcount64(uint64_t word) {
#ifdef __CUDA_ARCH__
  return __popcll(word);
#else
  return __builtin_popcountll(word);
#endif
}

/// The ones among the first `numel` bits at `bits`, counted by the whole block; known to every thread.
/// `scratch`: see block_sum.
template <class Block>
RPG_FAST_HOST_DEVICE int64_t count_ones(const Block& block, const uint8_t* bits, int64_t numel, int64_t* scratch) {
  constexpr int64_t kWord = sizeof(Octets);
  const int64_t whole = numel / 8;  // bytes of which every bit counts
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(bits) % kWord);
  const int64_t head = misaligned == 0 ? 0 : (kWord - misaligned < whole ? kWord - misaligned : whole);
  const int64_t words = (whole - head) / kWord;
  const int64_t tail = head + words * kWord;

  int64_t ones = 0;
  const auto* aligned = reinterpret_cast<const Octets*>(bits + head);
  for (int64_t i = block.lane(); i < words; i += block.count()) ones += popcount64(aligned[i]);
  for (int64_t i = block.lane(); i < head; i += block.count()) ones += popcount64(bits[i]);
  for (int64_t i = tail + block.lane(); i < whole; i += block.count()) ones += popcount64(bits[i]);
  if (block.lane() == 0 && numel % 8 != 0) ones += popcount64(bits[whole] & ((1u << (numel % 8)) - 1));
  return block_sum(block, ones, scratch);
}

// ---- kernels over tiles: run(block, b, blocks, work) with `work` shared by the block's threads

/// Bytes, zero or not, of each tensor to its bits.
struct PackTiles {
  struct Work {};
  static constexpr int kThreads = 256;
  Tensors tensors;
  uint8_t* bits;

  template <class Block>
  RPG_FAST_HOST_DEVICE void run(const Block& block, int64_t b, int64_t blocks, Work&) const {
    tensors.for_each_octet(block, b, blocks, [&](const TensorRow& row, int64_t first, int n, int64_t byte) {
      uint8_t values[kOctet];
      load_words(row, first, n, values);
      uint32_t packed = 0;
      for (int i = 0; i < kOctet; ++i) packed |= static_cast<uint32_t>(values[i] != 0) << i;
      bits[byte] = static_cast<uint8_t>(packed);
    });
  }
};

/// The inverse: the tensors' bytes become 0 or 1.
struct UnpackTiles {
  struct Work {};
  static constexpr int kThreads = 256;
  Tensors tensors;
  const uint8_t* bits;

  template <class Block>
  RPG_FAST_HOST_DEVICE void run(const Block& block, int64_t b, int64_t blocks, Work&) const {
    tensors.for_each_octet(block, b, blocks, [&](const TensorRow& row, int64_t first, int n, int64_t byte) {
      const uint32_t packed = bits[byte];
      alignas(kOctet) uint8_t values[kOctet];
      for (int i = 0; i < kOctet; ++i) values[i] = packed >> i & 1;
      auto* out = reinterpret_cast<uint8_t*>(row.data) + first;
      if (n == kOctet) {
        copy_aligned<kOctet>(values, out);
      } else {
        for (int i = 0; i < kOctet; ++i) {
          if (i < n) out[i] = values[i];
        }
      }
    });
  }
};

/// Adds the ones among the bits of each tensor to `counts`.
struct PopcountTiles {
  static constexpr int kThreads = 256;
  struct Work {
    int64_t scratch[kThreads];
  };
  Tensors tensors;
  const uint8_t* bits;
  int64_t* counts;

  template <class Block>
  RPG_FAST_HOST_DEVICE void run(const Block& block, int64_t b, int64_t blocks, Work& work) const {
    const int64_t begin = b * tensors.tiles / blocks, end = (b + 1) * tensors.tiles / blocks;
    for (int64_t tensor = tensors.find(begin); tensor < tensors.count && tensors.first_tile(tensor) < end; ++tensor) {
      const TensorRow& row = tensors.row(tensor);
      const int64_t start = (begin < row.first_tile ? 0 : begin - row.first_tile) * kTile;
      const int64_t limit = (end - row.first_tile) * kTile, stop = limit < row.numel ? limit : row.numel;
      if (start >= stop) continue;
      const int64_t ones = count_ones(block, bits + row.offset + start / 8, stop - start, work.scratch);
      if (block.lane() == 0) add_shared(counts + tensor, ones);
      block.sync();
    }
  }
};

}  // namespace rpg_fast
