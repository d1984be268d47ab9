#pragma once

// Unsigned keys in the order of the scores they stand for: -inf < ... < -0.0 == 0.0 < ... < inf < NaN.

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

}  // namespace rpg_fast
