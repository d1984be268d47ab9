// The host/device templates of csrc on the host, one thread and many: exits with the number of wrong results.
// -DOMIT_SYNC takes the barriers away, to prove that ThreadSanitizer would report a missing one.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>

#include "masks.h"
#include "select.h"

namespace {

using namespace rpg_fast;

#ifdef OMIT_SYNC
struct TestedBlock : ThreadBlock {
  using ThreadBlock::ThreadBlock;
  void sync() const {}
};
#else
using TestedBlock = ThreadBlock;
#endif

int64_t count_one_by_one(const uint8_t* bits, int64_t numel) {
  int64_t ones = 0;
  for (int64_t i = 0; i < numel; ++i) ones += bits[i / 8] >> i % 8 & 1;
  return ones;
}

int popcount_failures() {
  std::mt19937 random(0);
  int failures = 0;
  for (const int64_t numel : {0, 1, 7, 8, 9, 63, 64, 65, 127, 200, 1000, 4099}) {
    for (int misalignment = 0; misalignment < 8; ++misalignment) {
      const int64_t bytes = (numel + 7) / 8;
      const std::unique_ptr<uint8_t[]> buffer(new uint8_t[misalignment + bytes]);  // exact, so that ASan sees its end
      std::generate_n(buffer.get(), misalignment + bytes, [&] { return static_cast<uint8_t>(random()); });
      const uint8_t* bits = buffer.get() + misalignment;
      const int64_t want = count_one_by_one(bits, numel);
      int64_t scratch[8];
      failures += count_ones(SerialBlock{}, bits, numel, scratch) != want;
      for (const int threads : {1, 2, 3, 8}) {
        int64_t got[8];
        launch_threads<TestedBlock>(
            threads, [&](TestedBlock block) { got[block.lane()] = count_ones(block, bits, numel, scratch); });
        failures += static_cast<int>(std::count_if(got, got + threads, [&](int64_t ones) { return ones != want; }));
      }
    }
  }
  return failures;
}

template <class Key, class Score>
int order_failures() {
  using Limits = std::numeric_limits<Score>;
  const Score ascending[] = {
      -Limits::infinity(),  Limits::lowest(), Score(-1), -Limits::min(), -Limits::denorm_min(), Score(0),
      Limits::denorm_min(), Limits::min(),    Score(1),  Limits::max(),  Limits::infinity(),    Limits::quiet_NaN()};
  int failures = order_key<Key>(Score(-0.0), false) != order_key<Key>(Score(0), false);
  failures += order_key<Key>(-Limits::quiet_NaN(), false) != order_key<Key>(Limits::quiet_NaN(), false);
  failures += order_key<Key>(-Limits::infinity(), false) == 0;
  for (const Score score : ascending) {
    failures += order_key<Key>(score, true) != order_key<Key>(std::abs(score), false);
  }
  for (const Score* a = ascending; a + 1 != std::end(ascending); ++a) {
    failures += order_key<Key>(a[0], false) >= order_key<Key>(a[1], false);
  }
  return failures;
}

}  // namespace

int main() {
  const int failures = popcount_failures() + order_failures<uint32_t, float>() + order_failures<uint64_t, double>();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
