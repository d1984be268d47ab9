#include "../select.h"

#include <cstring>
#include <numeric>
#include <optional>

#include "bits.h"
#include "elements.h"

// Radix selection: histograms of the keys' digits, highest first, narrow down the key of the last chosen element; one
// more pass writes the bits of all above it and, of those equal to it, the first ones.

namespace rpg_fast {
namespace {

using Count = int64_t;

RPG_FAST_CLONES void order_keys(const float* scores, bool absolute, int64_t n, uint32_t* keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = order_key<uint32_t>(scores[i], absolute);
}

RPG_FAST_CLONES void order_keys(const double* scores, bool absolute, int64_t n, uint64_t* keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = order_key<uint64_t>(scores[i], absolute);
}

RPG_FAST_CLONES void flag_above(const uint32_t* keys, uint32_t bound, int64_t n, uint8_t* flags) {
  for (int64_t i = 0; i < n; ++i) flags[i] = keys[i] > bound;
}

RPG_FAST_CLONES void flag_above(const uint64_t* keys, uint64_t bound, int64_t n, uint8_t* flags) {
  for (int64_t i = 0; i < n; ++i) flags[i] = keys[i] > bound;
}

RPG_FAST_CLONES void flag_equal(const uint32_t* keys, uint32_t key, int64_t n, uint8_t* flags) {
  for (int64_t i = 0; i < n; ++i) flags[i] = keys[i] == key;
}

RPG_FAST_CLONES void flag_equal(const uint64_t* keys, uint64_t key, int64_t n, uint8_t* flags) {
  for (int64_t i = 0; i < n; ++i) flags[i] = keys[i] == key;
}

/// One tensor of a selection. The buffers of bits start where its segment does.
struct Candidates {
  Elements scores;
  const uint8_t* eligible;  // null: all are
  uint8_t* chosen;          // zero at the start
};

template <class Key>
using Score = std::conditional_t<sizeof(Key) == 4, float, double>;

template <class Key>
void load_keys(const Candidates& from, bool absolute, int64_t begin, int64_t n, Key* keys) {
  Score<Key> stage[kBlock];
  order_keys(load(from.scores, begin, n, stage), absolute, n, keys);
}

/// Moves the keys of eligible elements to the front; returns how many there are. `bits` start at the first key.
template <class Key>
int64_t compact(const uint8_t* bits, int64_t n, Key* keys) {
  int64_t kept = 0;
  for (int64_t first = 0; first < n; first += 64) {
    const int64_t length = std::min<int64_t>(64, n - first);
    uint64_t word = 0;
    std::memcpy(&word, bits + first / 8, (length + 7) / 8);
    if (length < 64) word &= (uint64_t{1} << length) - 1;
    if (__builtin_popcountll(word) < 16) {
      for (; word != 0; word &= word - 1) keys[kept++] = keys[first + __builtin_ctzll(word)];
    } else {
      for (int64_t i = 0; i < length; ++i) {
        keys[kept] = keys[first + i];
        kept += word >> i & 1;
      }
    }
  }
  return kept;
}

/// What is known of the last chosen element's key, and what is left to choose below that.
template <class Key>
struct Threshold {
  Key prefix = 0;                      // its digits so far, at their places
  int unknown_bits = 8 * sizeof(Key);  // below the prefix
  Count wanted = 0;                    // elements to choose among those with this prefix
  Count available = 0;                 // elements with this prefix
  bool takes_all() const { return wanted == available; }
};

template <class Key>
class Selection {
 public:
  Selection(const std::vector<Candidates>& tensors, bool absolute, int64_t workers)
      : tensors_(tensors), absolute_(absolute), workers_(workers) {
    std::vector<int64_t> numels;
    for (const Candidates& tensor : tensors) numels.push_back(tensor.scores.numel());
    chunks_ = chunks_of(numels);
    const Count total = std::accumulate(numels.begin(), numels.end(), Count{0});
    digit_bits_ = total > kManyElements ? 16 : 11;
  }

  void choose(Count count) {
    if (count <= 0 || chunks_.empty()) return;
    Threshold<Key> threshold;
    threshold.wanted = count;
    do refine(threshold);
    while (!threshold.takes_all() && threshold.unknown_bits > 0);
    if (threshold.available == 0) return;
    write(threshold);
  }

 private:
  static constexpr Count kManyElements = 1 << 17;  // from here on, clearing 2^16 counters costs less than a pass

  void refine(Threshold<Key>& threshold);
  void count_chunk(const Threshold<Key>& threshold, int digit_bits, const Chunk& chunk, Count* histogram) const;
  void write(const Threshold<Key>& threshold) const;
  Count write_chunk(const Threshold<Key>& threshold, const Chunk& chunk) const;
  void write_ties(Key key, Count count, const Chunk& chunk) const;

  const std::vector<Candidates>& tensors_;
  bool absolute_;
  int64_t workers_;
  std::vector<Chunk> chunks_;
  int digit_bits_;
};

template <class Key>
void Selection<Key>::count_chunk(const Threshold<Key>& threshold, int digit_bits, const Chunk& chunk,
                                 Count* histogram) const {
  const Candidates& tensor = tensors_[chunk.tensor];
  const int shift = threshold.unknown_bits - digit_bits;
  const Key digit_mask = (Key{1} << digit_bits) - 1;
  const bool first_digit = threshold.unknown_bits == 8 * sizeof(Key);
  const Key prefix = first_digit ? 0 : threshold.prefix >> threshold.unknown_bits;
  Key keys[kBlock];
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kBlock) {
    int64_t n = std::min(kBlock, chunk.end - begin);
    load_keys(tensor, absolute_, begin, n, keys);
    if (tensor.eligible != nullptr) n = compact(tensor.eligible + begin / 8, n, keys);
    if (first_digit) {
      for (int64_t i = 0; i < n; ++i) ++histogram[keys[i] >> shift];
    } else {
      for (int64_t i = 0; i < n; ++i) {
        if (keys[i] >> threshold.unknown_bits == prefix) ++histogram[keys[i] >> shift & digit_mask];
      }
    }
  }
}

/// Finds one more digit of the threshold.
template <class Key>
void Selection<Key>::refine(Threshold<Key>& threshold) {
  const int digit_bits = std::min(digit_bits_, threshold.unknown_bits);
  const int64_t bins = int64_t{1} << digit_bits;
  const int64_t workers = std::min<int64_t>(workers_, chunks_.size());
  std::vector<Count> histograms(workers * bins);  // [workers, bins]
  parallel_items(chunks_.size(), workers, [&](int64_t worker, int64_t item) {
    count_chunk(threshold, digit_bits, chunks_[item], histograms.data() + worker * bins);
  });
  for (int64_t worker = 1; worker < workers; ++worker) {
    for (int64_t bin = 0; bin < bins; ++bin) histograms[bin] += histograms[worker * bins + bin];
  }
  const Count total = std::accumulate(histograms.begin(), histograms.begin() + bins, Count{0});
  threshold.wanted = std::min(threshold.wanted, total);
  int64_t digit = bins - 1;
  while (digit > 0 && histograms[digit] < threshold.wanted) threshold.wanted -= histograms[digit--];
  threshold.available = histograms[digit];
  threshold.unknown_bits -= digit_bits;
  threshold.prefix |= static_cast<Key>(digit) << threshold.unknown_bits;
}

/// Writes the bits of a chunk's elements above the threshold, and of those at it if all of them are taken; else returns
/// their number.
template <class Key>
Count Selection<Key>::write_chunk(const Threshold<Key>& threshold, const Chunk& chunk) const {
  const Candidates& tensor = tensors_[chunk.tensor];
  const bool inclusive = threshold.takes_all();
  Key keys[kBlock];
  uint8_t flags[kBlock], bits[kBlock / 8];
  Count ties = 0;
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kBlock) {
    const int64_t n = std::min(kBlock, chunk.end - begin), bytes = (n + 7) / 8;
    const uint8_t* eligible = tensor.eligible == nullptr ? nullptr : tensor.eligible + begin / 8;
    load_keys(tensor, absolute_, begin, n, keys);
    // No key is 0: those of scores start at -inf's.
    flag_above(keys, inclusive ? threshold.prefix - (threshold.prefix != 0) : threshold.prefix, n, flags);
    uint8_t* chosen = tensor.chosen + begin / 8;
    pack_bits(flags, n, chosen);
    for (int64_t i = 0; eligible != nullptr && i < bytes; ++i) chosen[i] &= eligible[i];
    if (inclusive) continue;
    flag_equal(keys, threshold.prefix, n, flags);
    pack_bits(flags, n, bits);
    for (int64_t i = 0; i < bytes; ++i)
      ties += __builtin_popcount(eligible == nullptr ? bits[i] : bits[i] & eligible[i]);
  }
  return ties;
}

/// Chooses the first `count` elements of a chunk that have this key.
template <class Key>
void Selection<Key>::write_ties(Key key, Count count, const Chunk& chunk) const {
  const Candidates& tensor = tensors_[chunk.tensor];
  Key keys[kBlock];
  for (int64_t begin = chunk.begin; begin < chunk.end && count > 0; begin += kBlock) {
    const int64_t n = std::min(kBlock, chunk.end - begin);
    load_keys(tensor, absolute_, begin, n, keys);
    for (int64_t i = 0; i < n && count > 0; ++i) {
      const int64_t byte = (begin + i) / 8;
      const uint8_t bit = static_cast<uint8_t>(1u << i % 8);
      if (keys[i] != key || (tensor.eligible != nullptr && !(tensor.eligible[byte] & bit))) continue;
      tensor.chosen[byte] |= bit;
      --count;
    }
  }
}

template <class Key>
void Selection<Key>::write(const Threshold<Key>& threshold) const {
  std::vector<Count> ties(chunks_.size());  // at first what a chunk has, then what it takes
  parallel_items(chunks_.size(), workers_,
                 [&](int64_t, int64_t item) { ties[item] = write_chunk(threshold, chunks_[item]); });
  if (threshold.takes_all()) return;
  Count left = threshold.wanted;
  for (Count& tied : ties) {
    tied = std::min(tied, left);
    left -= tied;
  }
  parallel_items(chunks_.size(), workers_, [&](int64_t, int64_t item) {
    if (ties[item] > 0) write_ties(threshold.prefix, ties[item], chunks_[item]);
  });
}

void select(const std::vector<Candidates>& tensors, Count count, bool absolute, int64_t workers) {
  if (tensors.empty()) return;
  if (tensors[0].scores.dtype() == ScalarType::Double) {
    Selection<uint64_t>(tensors, absolute, workers).choose(count);
  } else {
    Selection<uint32_t>(tensors, absolute, workers).choose(count);
  }
}

/// A tensor above its fair share of the work is selected from by all threads, the others by one thread each, the
/// largest first.
void select_per_tensor(const std::vector<Candidates>& tensors, const Count* counts, bool absolute) {
  const int64_t workers = torch::stable::get_num_threads();
  Count total = 0;
  for (const Candidates& tensor : tensors) total += tensor.scores.numel();
  std::vector<size_t> small;
  for (size_t b = 0; b < tensors.size(); ++b) {
    if (tensors[b].scores.numel() > total / workers) {
      select({tensors[b]}, counts[b], absolute, workers);
    } else {
      small.push_back(b);
    }
  }
  std::stable_sort(small.begin(), small.end(),
                   [&](size_t a, size_t b) { return tensors[a].scores.numel() > tensors[b].scores.numel(); });
  parallel_items(small.size(), workers, [&](int64_t, int64_t item) {
    const size_t b = small[item];
    select({tensors[b]}, counts[b], absolute, 1);
  });
}

Tensor select_topk(std::vector<Tensor> scores, Tensor counts, std::vector<int64_t> offsets, int64_t nbytes,
                   std::optional<Tensor> eligible, bool absolute, bool per_tensor) {
  check_length("select_topk", "offsets", offsets.size(), scores.size());
  const int64_t wanted = per_tensor ? static_cast<int64_t>(scores.size()) : 1;
  STD_TORCH_CHECK(counts.is_cpu() && counts.scalar_type() == ScalarType::Long && counts.is_contiguous() &&
                      counts.dim() == 1 && counts.numel() == wanted,
                  "select_topk: counts must be int64 [", wanted, "] on the CPU, got ", describe(counts));
  STD_TORCH_CHECK(!eligible || (check_bits("select_topk", "eligible", *eligible) >= nbytes && eligible->is_cpu()),
                  "select_topk: eligible must be uint8 of at least ", nbytes, " bytes on the CPU, got ",
                  describe(*eligible));
  Tensor bits = zero_bits("select_topk", nbytes);
  auto* chosen = static_cast<uint8_t*>(bits.mutable_data_ptr());
  const auto* open = eligible ? static_cast<const uint8_t*>(eligible->const_data_ptr()) : nullptr;
  std::vector<Candidates> tensors;
  for (size_t i = 0; i < scores.size(); ++i) {
    STD_TORCH_CHECK(scores[i].is_cpu() && is_floating(scores[i].scalar_type()), "select_topk: scores[", i,
                    "] must be floating on the CPU, got ", describe(scores[i]));
    const bool one_kind = per_tensor || (scores[i].scalar_type() == ScalarType::Double) ==
                                            (scores[0].scalar_type() == ScalarType::Double);
    STD_TORCH_CHECK(one_kind, "select_topk: float64 scores cannot be ranked with others: scores[0] is ",
                    describe(scores[0]), ", scores[", i, "] is ", describe(scores[i]));
    check_segment("select_topk", i, offsets[i], scores[i].numel(), nbytes);
    tensors.push_back({Elements(scores[i]), open == nullptr ? nullptr : open + offsets[i], chosen + offsets[i]});
  }
  const auto* count = static_cast<const int64_t*>(counts.const_data_ptr());
  if (per_tensor) {
    select_per_tensor(tensors, count, absolute);
  } else {
    select(tensors, *count, absolute, torch::stable::get_num_threads());
  }
  return bits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rpg_fast, CPU, m) { m.impl("select_topk", TORCH_BOX(&select_topk)); }

}  // namespace rpg_fast
