#pragma once

#include <cstdint>

#include "../common.h"

namespace rpg_fast {

/// A buffer for an op's result: uint8 [nbytes], zero.
Tensor zero_bits(const char* op, int64_t nbytes);

/// keep[i] = bit i, as 0 or 1.
void expand_bits(const uint8_t* bits, int64_t n, uint8_t* keep);

/// The inverse; the last byte's spare bits become zero.
void pack_bits(const uint8_t* keep, int64_t n, uint8_t* bits);

}  // namespace rpg_fast
