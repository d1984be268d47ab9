#include "elements.h"

namespace rpg_fast {

RPG_FAST_CLONES void widen(const BFloat16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = c10::detail::f32_from_bits(from[i].x);
}

RPG_FAST_CLONES void widen(const Half* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = c10::detail::fp16_ieee_to_fp32_value(from[i].x);
}

RPG_FAST_CLONES void narrow(const float* from, BFloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i].x = c10::detail::round_to_nearest_even(from[i]);
}

RPG_FAST_CLONES void narrow(const float* from, Half* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i].x = c10::detail::fp16_ieee_from_fp32_value(from[i]);
}

}  // namespace rpg_fast
