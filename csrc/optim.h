#pragma once

// One element's step, in the order of operations of torch's own optimizers. `keep` is its mask bit, 0 or 1.

#include <cstdint>

#include "block.h"

namespace rpg_fast {

/// x where keep is 1 and zero where it is 0, whatever x holds. Bit arithmetic, since a vectorised loop must not branch.
RPG_FAST_HOST_DEVICE float zero_unless(uint8_t keep, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(x));
  bits &= 0u - keep;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}
RPG_FAST_HOST_DEVICE double zero_unless(uint8_t keep, double x) {
  uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof(x));
  bits &= uint64_t{0} - keep;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

RPG_FAST_HOST_DEVICE float square_root(float x) { return __builtin_sqrtf(x); }
RPG_FAST_HOST_DEVICE double square_root(double x) { return __builtin_sqrt(x); }

template <class A>
struct SgdStep {
  A sign;  // -1 to maximize
  A weight_decay, momentum;
  A fresh;  // 1 - dampening
  A lr;
};

template <bool kDecay, bool kMomentum, bool kNesterov, class A>
RPG_FAST_HOST_DEVICE void sgd_element(const SgdStep<A>& step, uint8_t keep, A g, A& m, A& p) {
  g = step.sign * g;
  if constexpr (kDecay) g = g + step.weight_decay * p;
  if constexpr (kMomentum) {
    const A updated = step.momentum * m + step.fresh * g;
    m = zero_unless(keep, updated);
    g = kNesterov ? g + step.momentum * updated : updated;
  }
  p = zero_unless(keep, p - step.lr * g);
}

template <class A>
struct AdamwStep {
  A sign;           // -1 to maximize
  A decay;          // lr * weight_decay
  A fresh1;         // 1 - beta1
  A beta2, fresh2;  // fresh2 = 1 - beta2
  A eps;
  A rate;   // lr / (1 - beta1^t)
  A root2;  // sqrt(1 - beta2^t)
};

template <bool kAmsgrad, class A>
RPG_FAST_HOST_DEVICE void adamw_element(const AdamwStep<A>& step, uint8_t keep, A g, A& m, A& v, A& v_max, A& p) {
  g = step.sign * g;
  const A decayed = p - step.decay * p;
  const A mean = m + step.fresh1 * (g - m);
  A square = step.beta2 * v + step.fresh2 * g * g;
  m = zero_unless(keep, mean);
  v = zero_unless(keep, square);
  if constexpr (kAmsgrad) {
    square = (v_max > square) | (v_max != v_max) ? v_max : square;  // NaN wins, as in torch.maximum
    v_max = zero_unless(keep, square);
  }
  const A denominator = square_root(square) / step.root2 + step.eps;
  p = zero_unless(keep, decayed - step.rate * mean / denominator);
}

}  // namespace rpg_fast
