#pragma once

// Radix selection: digits of the keys, highest first, narrow down the key of the last chosen element.
// Keys are unsigned and in the order of the scores they stand for: -inf < ... < -0.0 == 0.0 < ... < inf < NaN.

#include <cstdint>

#include "block.h"

namespace rpg_fast {

template <class Key, class Score>
RPG_FAST_HOST_DEVICE Key order_key(Score score, bool absolute) {
  static_assert(sizeof(Key) == sizeof(Score));
  constexpr Key kSign = Key{1} << (8 * sizeof(Key) - 1);
  constexpr Key kInfinity = sizeof(Key) == 4 ? Key{0x7f800000} : static_cast<Key>(0x7ff0000000000000);
  Key bits;
  __builtin_memcpy(&bits, &score, sizeof(Key));
  const Key magnitude = bits & ~kSign;
  const Key negative = (absolute ? Key{0} : bits >> (8 * sizeof(Key) - 1)) & Key{magnitude != 0};  // 0 or 1
  const Key not_a_number = Key{0} - Key{magnitude > kInfinity};                                    // all ones or none
  return ((magnitude | kSign) ^ (Key{0} - negative)) | not_a_number;
}

constexpr int kDigitBits = 12;
constexpr int kBins = 1 << kDigitBits;

/// What is known of the last chosen element's key, and what is left to choose among the keys that it may be.
template <class Key>
struct Threshold {
  Key first, last;   // it lies between these, both included
  int unknown_bits;  // last - first + 1 = 2^unknown_bits
  int64_t wanted;    // elements to choose of those in between; all above are chosen
  int64_t available;

  static RPG_FAST_HOST_DEVICE Threshold unknown(int64_t wanted) {
    return {Key{0}, static_cast<Key>(~Key{0}), static_cast<int>(8 * sizeof(Key)), wanted, -1};
  }
  RPG_FAST_HOST_DEVICE bool takes_all() const { return wanted == available; }
  RPG_FAST_HOST_DEVICE bool settled() const { return takes_all() || unknown_bits == 0; }
  RPG_FAST_HOST_DEVICE bool contains(Key key) const {
    return static_cast<Key>(key - first) <= static_cast<Key>(last - first);
  }
  RPG_FAST_HOST_DEVICE int digit_bits() const { return unknown_bits < kDigitBits ? unknown_bits : kDigitBits; }
  RPG_FAST_HOST_DEVICE int shift() const { return unknown_bits - digit_bits(); }
  /// The next digit of a key in between.
  RPG_FAST_HOST_DEVICE int digit(Key key) const { return static_cast<int>(static_cast<Key>(key - first) >> shift()); }

  RPG_FAST_HOST_DEVICE Threshold with_digit(int digit, int64_t wanted_, int64_t available_) const {
    const Key start = first + (static_cast<Key>(digit) << shift());
    return {start, static_cast<Key>(start + (Key{1} << shift()) - 1), shift(), wanted_, available_};
  }
};

/// The sum of `value` over the threads before this one; `total` becomes that over all. `scratch`, shared by the block,
/// holds count() values and may be reused after the next sync().
template <class Block, class T>
RPG_FAST_HOST_DEVICE T block_sum_before(const Block& block, T value, T* scratch, T& total) {
  const int lane = block.lane();
  scratch[lane] = value;
  block.sync();
  for (int distance = 1; distance < block.count(); distance *= 2) {
    const T addend = lane >= distance ? scratch[lane - distance] : T{0};
    block.sync();
    scratch[lane] += addend;
    block.sync();
  }
  total = scratch[block.count() - 1];
  return scratch[lane] - value;
}

/// Finds one more digit of `threshold` from the number of its elements with each, and clears `histogram` [kBins].
/// `scratch`: see block_sum_before.
template <class Block, class Key>
RPG_FAST_HOST_DEVICE void choose_digit(const Block& block, int64_t* histogram, Threshold<Key>* threshold,
                                       int64_t* scratch) {
  const Threshold<Key> known = *threshold;
  const int bins = 1 << known.digit_bits();
  const int share = (bins + block.count() - 1) / block.count();
  const int top = bins - 1 - block.lane() * share;  // this thread's bins, downwards
  const int bottom = top - share + 1 > 0 ? top - share + 1 : 0;
  int64_t sum = 0, total;
  for (int bin = top; bin >= bottom; --bin) sum += histogram[bin];
  int64_t above = block_sum_before(block, sum, scratch, total);
  const int64_t wanted = known.wanted < 0 ? 0 : known.wanted < total ? known.wanted : total;
  const bool mine = wanted == 0 ? block.lane() == 0 : above < wanted && wanted <= above + sum;
  if (mine) {
    int digit = top;
    while (above + histogram[digit] < wanted) above += histogram[digit--];
    *threshold = known.with_digit(digit, wanted - above, histogram[digit]);
  }
  for (int bin = top; bin >= bottom; --bin) histogram[bin] = 0;
}

}  // namespace rpg_fast
