#pragma once

// Bit masks: bit i % 8 of byte i / 8 of a segment belongs to element i.

#include <cstdint>

#include "block.h"

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

}  // namespace rpg_fast
