#pragma once

// `select_topk` as a fixed number of kernels, whatever the scores:
//   a histogram of the first digit of all keys; then one pass sets the bits of the keys above that digit's bin and
//   lists those in it, each tile in a slot of its own; the remaining digits and the ties are read from the slots. A
//   tile whose slot is too small is read again instead. So two passes over the scores is all that most calls need.
// Blocks add up integers and write to places of their own, so the bits are the same each time.

#include <type_traits>

#include "masks.h"
#include "select.h"
#include "tiles.h"

namespace rpg_fast {

RPG_FAST_HOST_DEVICE void set_bits(uint32_t* word, uint32_t bits) {
#ifdef __CUDA_ARCH__
  atomicOr(word, bits);
#else
  __atomic_fetch_or(word, bits, __ATOMIC_RELAXED);
#endif
}

/// A digit's counters in shared memory.
struct Histogram {
  uint32_t counts[kBins];

  template <class Block>
  RPG_FAST_HOST_DEVICE void clear(const Block& block) {
    for (int bin = block.lane(); bin < kBins; bin += block.count()) counts[bin] = 0;
    block.sync();
  }

  /// Moves everything to `totals` [kBins].
  template <class Block>
  RPG_FAST_HOST_DEVICE void flush(const Block& block, int64_t* totals) {
    block.sync();
    for (int bin = block.lane(); bin < kBins; bin += block.count()) {
      if (counts[bin] > 0) add_shared(totals + bin, static_cast<int64_t>(counts[bin]));
      counts[bin] = 0;
    }
    block.sync();
  }
};

/// One thread's way into a histogram: equal digits in a row are added at once, so that equal scores do not queue up.
class Tally {
 public:
  explicit RPG_FAST_HOST_DEVICE Tally(Histogram& histogram) : histogram_(histogram) {}
  RPG_FAST_HOST_DEVICE void count(int digit) {
    if (digit != digit_) flush();
    digit_ = digit;
    ++length_;
  }
  RPG_FAST_HOST_DEVICE void flush() {
    if (length_ > 0) add_shared(histogram_.counts + digit_, length_);
    length_ = 0;
  }

 private:
  Histogram& histogram_;
  int digit_ = -1;
  uint32_t length_ = 0;
};

/// A whole selection: its arguments and its workspace. A problem is one tensor, or all of them together.
template <class Key>
struct Selection {
  static constexpr int kKeyBits = 8 * sizeof(Key);
  static constexpr int kSlot = 512;  // listed keys of a tile; smooth distributions have 4 to 6 % of it in a bin
  using Score = std::conditional_t<sizeof(Key) == 4, float, double>;

  Tensors tensors;
  const uint8_t* eligible;  // null: all are
  uint8_t* chosen;          // zero at the start
  const int64_t* counts;    // [problems]
  bool absolute, per_tensor;

  int64_t* histograms = nullptr;         // [problems, kBins], zero at the start and after each choice of a digit
  Threshold<Key>* thresholds = nullptr;  // [problems]
  Key* slots = nullptr;                  // [tiles, kSlot], a key's digits but the first above its position in the tile
  int32_t* sizes = nullptr;  // [tiles], keys in a tile that share the first digit; above kSlot they are not all there
  int32_t* ties = nullptr;   // [tiles], keys in a tile that equal the threshold; then how many of them are chosen

  RPG_FAST_HOST_DEVICE int64_t problems() const { return per_tensor ? tensors.count : 1; }
  RPG_FAST_HOST_DEVICE int64_t problem_of(int64_t tensor) const { return per_tensor ? tensor : 0; }

  /// Lays the workspace out from `base` on, 16-byte aligned; returns its size. The first problems() * kBins * 8 bytes
  /// are to be cleared.
  int64_t lay_out(uint8_t* base) {
    int64_t end = 0;
    const auto take = [&](auto*& pointer, int64_t length) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + end);
      end += (length * static_cast<int64_t>(sizeof(*pointer)) + kAlignment - 1) / kAlignment * kAlignment;
    };
    take(histograms, problems() * kBins);
    take(thresholds, problems());
    take(slots, tensors.tiles * kSlot);
    take(sizes, tensors.tiles);
    take(ties, tensors.tiles);
    return end;
  }

  /// visit(octet, keys, bits) for this thread's octets of a tile; bit i says that keys[i] takes part.
  template <class Block, class Visit>
  RPG_FAST_HOST_DEVICE void for_each_octet(const Block& block, int64_t tensor, int64_t tile, const Visit& visit) const {
    const TensorRow& row = tensors.row(tensor);
    const int64_t start = (tile - row.first_tile) * kTile;
    const uint8_t* open = eligible == nullptr ? nullptr : eligible + row.offset + start / kOctet;
    for (int octet = block.lane(); octet < kOctets; octet += block.count()) {
      const int64_t first = start + octet * kOctet, left = row.numel - first;
      if (left <= 0) break;
      const int n = left < kOctet ? static_cast<int>(left) : kOctet;
      const uint32_t bits = (open == nullptr ? 0xffu : open[octet]) & (0xffu >> (kOctet - n));
      Key keys[kOctet] = {};
      if (bits != 0) {  // else the scores are not even read
        Score scores[kOctet];
        load_octet(row, first, n, scores);
        for (int i = 0; i < kOctet; ++i) keys[i] = order_key<Key>(scores[i], absolute);
      }
      visit(octet, keys, bits);
    }
  }

  /// visit(key, position) for this thread's share of a tile's keys that have the first digit of `threshold`, and maybe
  /// of others.
  template <class Block, class Visit>
  RPG_FAST_HOST_DEVICE void for_each_listed(const Block& block, int64_t tensor, int64_t tile,
                                            const Threshold<Key>& threshold, const Visit& visit) const {
    if (sizes[tile] <= kSlot) {
      const Key first_digit = threshold.first >> (kKeyBits - kDigitBits) << (kKeyBits - kDigitBits);
      const Key* slot = slots + tile * kSlot;
      for (int i = block.lane(); i < sizes[tile]; i += block.count()) {
        visit(static_cast<Key>(first_digit | slot[i] >> kDigitBits), static_cast<int>(slot[i] % kTile));
      }
    } else {
      for_each_octet(block, tensor, tile, [&](int octet, const Key(&keys)[kOctet], uint32_t bits) {
        for (int i = 0; i < kOctet; ++i) {
          if (bits >> i & 1) visit(keys[i], octet * kOctet + i);
        }
      });
    }
  }

  /// body(tensor, tile, threshold) for the block's tiles, with before(problem) and after(problem) around each
  /// problem's.
  template <class Before, class Body, class After>
  RPG_FAST_HOST_DEVICE void for_each_problem(int64_t b, int64_t blocks, const Before& before, const Body& body,
                                             const After& after) const {
    int64_t current = -1;
    tensors.for_each_tile(b, blocks, [&](int64_t tensor, int64_t tile) {
      const int64_t problem = problem_of(tensor);
      if (problem != current && current >= 0) after(current);
      if (problem != current) before(problem);
      current = problem;
      body(tensor, tile);
    });
    if (current >= 0) after(current);
  }
};
static_assert(kTile == int64_t{1} << kDigitBits, "a position in the tile takes the place of the first digit");

// ---- the kernels: run(block, b, blocks, work) with `work` shared by the block's threads; tiles are shared evenly by
// ---- the blocks, a problem has a block of its own

/// Counts the first digit of all keys.
template <class Key>
struct CountFirstDigit {
  using Work = Histogram;
  static constexpr int kThreads = 256;
  Selection<Key> selection;

  template <class Block>
  RPG_FAST_HOST_DEVICE void run(const Block& block, int64_t b, int64_t blocks, Work& work) const {
    const auto all = Threshold<Key>::unknown(0);
    work.clear(block);
    const auto body = [&](int64_t tensor, int64_t tile) {
      Tally tally(work);
      selection.for_each_octet(block, tensor, tile, [&](int, const Key(&keys)[kOctet], uint32_t bits) {
        for (int i = 0; i < kOctet; ++i) {
          if (bits >> i & 1) tally.count(all.digit(keys[i]));
        }
      });
      tally.flush();
    };
    selection.for_each_problem(
        b, blocks, [](int64_t) {}, body,
        [&](int64_t problem) { work.flush(block, selection.histograms + problem * kBins); });
  }
};

/// Chooses a digit of each problem's threshold.
template <class Key>
struct ChooseDigit {
  static constexpr int kThreads = 512;
  struct Work {
    int64_t scratch[kThreads];
  };
  Selection<Key> selection;
  bool first;

  template <class Block>
  RPG_FAST_HOST_DEVICE void run(const Block& block, int64_t b, int64_t, Work& work) const {
    Threshold<Key>* threshold = selection.thresholds + b;
    if (first) {
      if (block.lane() == 0) *threshold = Threshold<Key>::unknown(selection.counts[b]);
      block.sync();
    } else if (threshold->settled()) {
      return;
    }
    choose_digit(block, selection.histograms + b * kBins, threshold, work.scratch);
  }
};

/// Sets the bits above the first digit's bin, lists the keys within it and counts their second digit.
template <class Key>
struct Split {
  struct Work {
    Histogram histogram;
    int32_t size;
  };
  static constexpr int kThreads = 256;
  Selection<Key> selection;

  template <class Block>
  RPG_FAST_HOST_DEVICE void run(const Block& block, int64_t b, int64_t blocks, Work& work) const {
    Threshold<Key> threshold;
    if (block.lane() == 0) work.size = 0;
    work.histogram.clear(block);
    selection.for_each_problem(
        b, blocks, [&](int64_t problem) { threshold = selection.thresholds[problem]; },
        [&](int64_t tensor, int64_t tile) { split(block, tensor, tile, threshold, work); },
        [&](int64_t problem) { work.histogram.flush(block, selection.histograms + problem * kBins); });
  }

  template <class Block>
  RPG_FAST_HOST_DEVICE void split(const Block& block, int64_t tensor, int64_t tile, const Threshold<Key>& threshold,
                                  Work& work) const {
    const TensorRow& row = selection.tensors.row(tensor);
    uint8_t* out = selection.chosen + row.offset + (tile - row.first_tile) * kOctets;
    Tally tally(work.histogram);
    selection.for_each_octet(block, tensor, tile, [&](int octet, const Key(&keys)[kOctet], uint32_t bits) {
      uint32_t above = 0, within = 0;
      for (int i = 0; i < kOctet; ++i) {
        above |= static_cast<uint32_t>(keys[i] > threshold.last) << i;
        within |= static_cast<uint32_t>(threshold.contains(keys[i])) << i;
      }
      above &= bits;
      within &= bits;
      if (threshold.takes_all()) above |= within;
      out[octet] = static_cast<uint8_t>(above);
      if (threshold.takes_all() || within == 0) return;
      list(keys, within, octet, selection.slots + tile * Selection<Key>::kSlot, work.size);
      for (int i = 0; i < kOctet; ++i) {
        if (within >> i & 1) tally.count(threshold.digit(keys[i]));
      }
    });
    tally.flush();
    block.sync();
    if (block.lane() == 0) {
      selection.sizes[tile] = work.size;
      work.size = 0;
    }
    block.sync();
  }

  RPG_FAST_HOST_DEVICE void list(const Key (&keys)[kOctet], uint32_t within, int octet, Key* slot,
                                 int32_t& size) const {
    int at = add_shared(&size, static_cast<int32_t>(popcount64(within)));
    for (int i = 0; i < kOctet; ++i) {
      if ((within >> i & 1) == 0) continue;
      if (at < Selection<Key>::kSlot) slot[at] = keys[i] << kDigitBits | static_cast<Key>(octet * kOctet + i);
      ++at;
    }
  }
};

/// Counts one more digit of the keys that share those known.
template <class Key>
struct CountDigit {
  using Work = Histogram;
  static constexpr int kThreads = 256;
  Selection<Key> selection;

  template <class Block>
  RPG_FAST_HOST_DEVICE void run(const Block& block, int64_t b, int64_t blocks, Work& work) const {
    Threshold<Key> threshold;
    work.clear(block);
    const auto body = [&](int64_t tensor, int64_t tile) {
      if (threshold.settled()) return;
      Tally tally(work);
      selection.for_each_listed(block, tensor, tile, threshold, [&](Key key, int) {
        if (threshold.contains(key)) tally.count(threshold.digit(key));
      });
      tally.flush();
    };
    selection.for_each_problem(
        b, blocks, [&](int64_t problem) { threshold = selection.thresholds[problem]; }, body,
        [&](int64_t problem) {
          if (!threshold.settled()) work.flush(block, selection.histograms + problem * kBins);
        });
  }
};

/// Counts the keys in each tile that equal a threshold of which not all are chosen.
template <class Key>
struct CountTies {
  struct Work {
    int32_t scratch[256];
  };
  static constexpr int kThreads = 256;
  Selection<Key> selection;

  template <class Block>
  RPG_FAST_HOST_DEVICE void run(const Block& block, int64_t b, int64_t blocks, Work& work) const {
    selection.tensors.for_each_tile(b, blocks, [&](int64_t tensor, int64_t tile) {
      const Threshold<Key> threshold = selection.thresholds[selection.problem_of(tensor)];
      if (threshold.takes_all()) return;
      int32_t ties = 0;
      selection.for_each_listed(block, tensor, tile, threshold,
                                [&](Key key, int) { ties += static_cast<int32_t>(key == threshold.first); });
      ties = block_sum(block, ties, work.scratch);
      if (block.lane() == 0) selection.ties[tile] = ties;
      block.sync();
    });
  }
};

/// Gives what is left to choose to the ties of the first tiles.
template <class Key>
struct ShareTies {
  static constexpr int kThreads = 512;
  struct Work {
    int64_t scratch[kThreads];
  };
  Selection<Key> selection;

  template <class Block>
  RPG_FAST_HOST_DEVICE void run(const Block& block, int64_t b, int64_t, Work& work) const {
    const Threshold<Key> threshold = selection.thresholds[b];
    if (threshold.takes_all()) return;
    const Tensors& tensors = selection.tensors;
    const int64_t begin = selection.per_tensor ? tensors.first_tile(b) : 0;
    const int64_t end = selection.per_tensor ? tensors.first_tile(b + 1) : tensors.tiles;
    const int64_t share = (end - begin + block.count() - 1) / block.count();
    const int64_t first = begin + block.lane() * share;
    const int64_t stop = first + share < end ? first + share : end;
    int64_t sum = 0, total;
    for (int64_t tile = first; tile < stop; ++tile) sum += selection.ties[tile];
    int64_t left = threshold.wanted - block_sum_before(block, sum, work.scratch, total);
    for (int64_t tile = first; tile < stop; ++tile) {
      const int32_t ties = selection.ties[tile];
      selection.ties[tile] = static_cast<int32_t>(left <= 0 ? 0 : left < ties ? left : ties);
      left -= ties;
    }
  }
};

/// Sets the bits of the listed keys above the thresholds, and of the ties that are chosen.
template <class Key>
struct Finish {
  static constexpr int kThreads = 256;
  static constexpr int kWords = static_cast<int>(kTile) / 32;
  struct Work {
    uint32_t chosen[kWords], tied[kWords];  // bits of the tile
    int32_t scratch[kThreads];
  };
  Selection<Key> selection;

  template <class Block>
  RPG_FAST_HOST_DEVICE void run(const Block& block, int64_t b, int64_t blocks, Work& work) const {
    selection.tensors.for_each_tile(b, blocks, [&](int64_t tensor, int64_t tile) {
      const Threshold<Key> threshold = selection.thresholds[selection.problem_of(tensor)];
      if (selection.sizes[tile] > 0) finish(block, tensor, tile, threshold, work);
    });
  }

  template <class Block>
  RPG_FAST_HOST_DEVICE void finish(const Block& block, int64_t tensor, int64_t tile, const Threshold<Key>& threshold,
                                   Work& work) const {
    for (int word = block.lane(); word < kWords; word += block.count()) work.chosen[word] = work.tied[word] = 0;
    block.sync();
    selection.for_each_listed(block, tensor, tile, threshold, [&](Key key, int position) {
      const bool tied = threshold.contains(key);
      if (key > threshold.last || (tied && threshold.takes_all())) {
        set_bits(work.chosen + position / 32, uint32_t{1} << position % 32);
      } else if (tied) {
        set_bits(work.tied + position / 32, uint32_t{1} << position % 32);
      }
    });
    block.sync();
    if (!threshold.takes_all() && selection.ties[tile] > 0) choose_ties(block, selection.ties[tile], work);
    const TensorRow& row = selection.tensors.row(tensor);
    uint8_t* out = selection.chosen + row.offset + (tile - row.first_tile) * kOctets;
    for (int octet = block.lane(); octet < kOctets; octet += block.count()) {
      const uint32_t bits = work.chosen[octet / 4] >> octet % 4 * kOctet & 0xffu;
      if (bits != 0) out[octet] = static_cast<uint8_t>(out[octet] | bits);
    }
    block.sync();
  }

  /// Moves the first `wanted` of the tied bits to the chosen ones.
  template <class Block>
  RPG_FAST_HOST_DEVICE void choose_ties(const Block& block, int32_t wanted, Work& work) const {
    const int share = (kWords + block.count() - 1) / block.count();
    const int first = block.lane() * share, stop = first + share < kWords ? first + share : kWords;
    int32_t sum = 0, total;
    for (int word = first; word < stop; ++word) sum += popcount64(work.tied[word]);
    int32_t left = wanted - block_sum_before(block, sum, work.scratch, total);
    for (int word = first; word < stop; ++word) {
      for (uint32_t tied = work.tied[word]; tied != 0 && left > 0; tied &= tied - 1, --left) {
        work.chosen[word] |= tied & -tied;
      }
    }
    block.sync();
  }
};

/// The whole selection: launch_tiles(kernel) runs a kernel over all tiles, launch_problems(kernel) over all problems.
template <class Key, class LaunchTiles, class LaunchProblems>
void run_selection(const Selection<Key>& selection, const LaunchTiles& launch_tiles,
                   const LaunchProblems& launch_problems) {
  constexpr int kDigits = (Selection<Key>::kKeyBits + kDigitBits - 1) / kDigitBits;
  launch_tiles(CountFirstDigit<Key>{selection});
  launch_problems(ChooseDigit<Key>{selection, true});
  launch_tiles(Split<Key>{selection});
  launch_problems(ChooseDigit<Key>{selection, false});
  for (int digit = 2; digit < kDigits; ++digit) {
    launch_tiles(CountDigit<Key>{selection});
    launch_problems(ChooseDigit<Key>{selection, false});
  }
  launch_tiles(CountTies<Key>{selection});
  launch_problems(ShareTies<Key>{selection});
  launch_tiles(Finish<Key>{selection});
}

}  // namespace rpg_fast
