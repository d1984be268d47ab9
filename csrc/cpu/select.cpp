#include "../select.h"

#include <cstring>
#include <memory>
#include <numeric>
#include <optional>

#include "../masks.h"
#include "bits.h"
#include "elements.h"

// Radix selection: a histogram of the keys' first digit; one more pass sets the bits of the keys above that digit's bin
// and marks those in it, the few among which the rest is found.

namespace rpg_fast {
namespace {

RPG_FAST_CLONES void order_keys(const float* scores, bool absolute, int64_t n, uint32_t* keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = order_key<uint32_t>(scores[i], absolute);
}

RPG_FAST_CLONES void order_keys(const double* scores, bool absolute, int64_t n, uint64_t* keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = order_key<uint64_t>(scores[i], absolute);
}

RPG_FAST_CLONES void zero_unless(const uint8_t* keep, int64_t n, uint32_t* keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = keep[i] ? keys[i] : 0;
}

RPG_FAST_CLONES void zero_unless(const uint8_t* keep, int64_t n, uint64_t* keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = keep[i] ? keys[i] : 0;
}

RPG_FAST_CLONES void flag_above(const uint32_t* keys, uint32_t bound, int64_t n, uint8_t* flags) {
  for (int64_t i = 0; i < n; ++i) flags[i] = keys[i] > bound;
}

RPG_FAST_CLONES void flag_above(const uint64_t* keys, uint64_t bound, int64_t n, uint8_t* flags) {
  for (int64_t i = 0; i < n; ++i) flags[i] = keys[i] > bound;
}

/// A bound that `key` is above. No score has the key 0.
template <class Key>
Key just_below(Key key) {
  return key == 0 ? 0 : key - 1;
}

/// Up to 64 bits from a byte on, and putting them back.
uint64_t load_bits(const uint8_t* bits, int64_t n) {
  uint64_t word = 0;
  std::memcpy(&word, bits, (n + 7) / 8);
  return n < 64 ? word & ((uint64_t{1} << n) - 1) : word;
}

void store_bits(uint64_t word, int64_t n, uint8_t* bits) { std::memcpy(bits, &word, (n + 7) / 8); }

RPG_FAST_CLONES_FOR("popcnt", "default") int64_t count_bits(const uint8_t* bits, int64_t n) {
  int64_t ones = 0;
  for (int64_t i = 0; i < n; i += 64) ones += popcount64(load_bits(bits + i / 8, std::min<int64_t>(64, n - i)));
  return ones;
}

bool any_bits(const uint8_t* bits, int64_t n) {
  uint64_t any = 0;
  for (int64_t i = 0; i < n; i += 64) any |= load_bits(bits + i / 8, std::min<int64_t>(64, n - i));
  return any != 0;
}

/// One tensor of a selection. The buffers of bits start where its segment does.
struct Candidates {
  Elements scores;
  const uint8_t* eligible;  // null: all are
  uint8_t* chosen;          // zero at the start
  uint8_t* marked;          // written before it is read
};

template <class Key>
using Score = std::conditional_t<sizeof(Key) == 4, float, double>;

/// The keys of elements [begin, begin + n).
template <class Key>
void load_keys(const Candidates& from, bool absolute, int64_t begin, int64_t n, Key* keys) {
  Score<Key> stage[kBlock];
  order_keys(load(from.scores, begin, n, stage), absolute, n, keys);
}

/// Moves the values whose bits are set to the front of `kept`, which may be `values`; returns how many.
template <class T>
int64_t gather(const T* values, int64_t n, const uint8_t* bits, T* kept) {
  int64_t count = 0;
  for (int64_t first = 0; first < n; first += 64) {
    uint64_t word = load_bits(bits + first / 8, std::min<int64_t>(64, n - first));
    for (; word != 0; word &= word - 1) kept[count++] = values[first + __builtin_ctzll(word)];
  }
  return count;
}

/// The keys of those elements [begin, begin + n) whose bits are set; returns how many.
template <class Key>
int64_t load_keys(const Candidates& from, bool absolute, int64_t begin, int64_t n, const uint8_t* bits, Key* keys) {
  Score<Key> stage[kBlock], kept[kBlock];
  const int64_t count = gather<Score<Key>>(load(from.scores, begin, n, stage), n, bits, kept);
  order_keys(kept, absolute, count, keys);
  return count;
}

/// Histograms of one thread. Neighbours are counted in different tables: the same counter again would wait for itself.
struct Histograms {
  static constexpr int kTables = 4;
  int64_t counts[kTables][kBins] = {};

  template <class Key>
  void count_first(const Key* keys, int64_t n) {
    for (int64_t i = 0; i < n; ++i) ++counts[i % kTables][keys[i] >> (8 * sizeof(Key) - kDigitBits)];
  }

  template <class Key>
  void count(const Threshold<Key>& threshold, const Key* keys, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      if (threshold.contains(keys[i])) ++counts[i % kTables][threshold.digit(keys[i])];
    }
  }
};

template <class Key>
class Selection {
 public:
  Selection(const std::vector<Candidates>& tensors, bool absolute, int64_t workers)
      : tensors_(tensors), absolute_(absolute) {
    std::vector<int64_t> numels;
    for (const Candidates& tensor : tensors) numels.push_back(tensor.scores.numel());
    chunks_ = chunks_of(numels);
    workers_ = std::min<int64_t>(workers, chunks_.size());
  }

  void choose(int64_t count) {
    if (count <= 0 || chunks_.empty()) return;
    threshold_ = Threshold<Key>::unknown(count);
    histograms_.resize(workers_);
    sweep([&](const Chunk& chunk, Histograms& histograms) { count_first(chunk, histograms); });
    choose_digit();
    sweep([&](const Chunk& chunk, Histograms& histograms) { split(chunk, histograms); });
    if (threshold_.takes_all()) return;
    choose_digit();
    while (!threshold_.settled()) {
      sweep([&](const Chunk& chunk, Histograms& histograms) { count_marked(chunk, histograms); });
      choose_digit();
    }
    write();
  }

 private:
  /// body(chunk, histograms of the thread) for all chunks.
  template <class Body>
  void sweep(const Body& body) {
    parallel_items(chunks_.size(), workers_,
                   [&](int64_t worker, int64_t item) { body(chunks_[item], histograms_[worker]); });
  }

  /// visit(begin, n) for the blocks of a chunk.
  template <class Visit>
  static void for_each_block(const Chunk& chunk, const Visit& visit) {
    for (int64_t begin = chunk.begin; begin < chunk.end; begin += kBlock) {
      visit(begin, std::min(kBlock, chunk.end - begin));
    }
  }

  void choose_digit();
  void count_first(const Chunk& chunk, Histograms& histograms) const;
  void split(const Chunk& chunk, Histograms& histograms) const;
  void count_marked(const Chunk& chunk, Histograms& histograms) const;
  void write() const;
  int64_t write_marked(const Chunk& chunk) const;
  void write_ties(int64_t count, const Chunk& chunk) const;

  const std::vector<Candidates>& tensors_;
  bool absolute_;
  int64_t workers_;
  std::vector<Chunk> chunks_;
  std::vector<Histograms> histograms_;  // [workers]
  Threshold<Key> threshold_;
};

/// Finds one more digit of the threshold, and clears the histograms.
template <class Key>
void Selection<Key>::choose_digit() {
  int64_t* total = histograms_[0].counts[0];
  for (int64_t table = 1; table < Histograms::kTables * workers_; ++table) {
    int64_t* counts = histograms_[table / Histograms::kTables].counts[table % Histograms::kTables];
    for (int bin = 0; bin < kBins; ++bin) total[bin] += counts[bin];
    std::fill_n(counts, kBins, int64_t{0});
  }
  int64_t scratch[1];
  rpg_fast::choose_digit(SerialBlock{}, total, &threshold_, scratch);
}

template <class Key>
void Selection<Key>::count_first(const Chunk& chunk, Histograms& histograms) const {
  const Candidates& tensor = tensors_[chunk.tensor];
  for_each_block(chunk, [&](int64_t begin, int64_t n) {
    Key keys[kBlock];
    const uint8_t* eligible = tensor.eligible == nullptr ? nullptr : tensor.eligible + begin / 8;
    const int64_t count = eligible == nullptr ? n : count_bits(eligible, n);
    if (count == 0) return;
    if (count <= n / 2) {
      load_keys(tensor, absolute_, begin, n, eligible, keys);
      histograms.count_first(keys, count);
    } else {
      load_keys(tensor, absolute_, begin, n, keys);
      uint8_t keep[kBlock];
      if (count < n) expand_bits(eligible, n, keep);
      if (count < n) zero_unless(keep, n, keys);
      histograms.count_first(keys, n);
      histograms.counts[0][0] -= n - count;
    }
  });
}

/// Chooses what is above the threshold, and what may be the threshold itself if all of it is taken; else marks that and
/// counts its next digit.
template <class Key>
void Selection<Key>::split(const Chunk& chunk, Histograms& histograms) const {
  const Candidates& tensor = tensors_[chunk.tensor];
  for_each_block(chunk, [&](int64_t begin, int64_t n) {
    const uint8_t* eligible = tensor.eligible == nullptr ? nullptr : tensor.eligible + begin / 8;
    uint8_t *chosen = tensor.chosen + begin / 8, *marked = tensor.marked + begin / 8;
    const int64_t bytes = (n + 7) / 8;
    if (eligible != nullptr && !any_bits(eligible, n)) {
      std::fill_n(marked, bytes, uint8_t{0});
      return;
    }
    Key keys[kBlock];
    uint8_t flags[kBlock];
    load_keys(tensor, absolute_, begin, n, keys);
    flag_above(keys, threshold_.takes_all() ? just_below(threshold_.first) : threshold_.last, n, flags);
    pack_bits(flags, n, chosen);
    for (int64_t i = 0; eligible != nullptr && i < bytes; ++i) chosen[i] &= eligible[i];
    if (threshold_.takes_all()) return;
    flag_above(keys, just_below(threshold_.first), n, flags);
    pack_bits(flags, n, marked);
    for (int64_t i = 0; eligible != nullptr && i < bytes; ++i) marked[i] &= eligible[i];
    for (int64_t i = 0; i < bytes; ++i) marked[i] ^= chosen[i];
    histograms.count(threshold_, keys, gather(keys, n, marked, keys));
  });
}

template <class Key>
void Selection<Key>::count_marked(const Chunk& chunk, Histograms& histograms) const {
  const Candidates& tensor = tensors_[chunk.tensor];
  for_each_block(chunk, [&](int64_t begin, int64_t n) {
    const uint8_t* marked = tensor.marked + begin / 8;
    if (!any_bits(marked, n)) return;
    Key keys[kBlock];
    histograms.count(threshold_, keys, load_keys(tensor, absolute_, begin, n, marked, keys));
  });
}

/// Chooses the marked elements above the threshold, and those at it if all of them are taken; else only those stay
/// marked, and their number is returned.
template <class Key>
int64_t Selection<Key>::write_marked(const Chunk& chunk) const {
  const Candidates& tensor = tensors_[chunk.tensor];
  const bool inclusive = threshold_.takes_all();
  const Key bound = inclusive ? just_below(threshold_.first) : threshold_.last;
  int64_t ties = 0;
  for_each_block(chunk, [&](int64_t begin, int64_t n) {
    uint8_t *chosen = tensor.chosen + begin / 8, *marked = tensor.marked + begin / 8;
    if (!any_bits(marked, n)) return;
    Key keys[kBlock];
    load_keys(tensor, absolute_, begin, n, marked, keys);
    const Key* key = keys;
    for (int64_t i = 0; i < n; i += 64) {
      const int64_t length = std::min<int64_t>(64, n - i);
      uint64_t above = 0, tied = 0;
      for (uint64_t word = load_bits(marked + i / 8, length); word != 0; word &= word - 1, ++key) {
        const bool tie = !inclusive && *key == threshold_.first;
        above |= *key > bound ? word & -word : 0;
        tied |= tie ? word & -word : 0;
        ties += tie;
      }
      store_bits(load_bits(chosen + i / 8, length) | above, length, chosen + i / 8);
      store_bits(tied, length, marked + i / 8);
    }
  });
  return ties;
}

/// Chooses the first `count` marked elements of a chunk.
template <class Key>
void Selection<Key>::write_ties(int64_t count, const Chunk& chunk) const {
  const Candidates& tensor = tensors_[chunk.tensor];
  for (int64_t i = chunk.begin; i < chunk.end && count > 0; i += 64) {
    const int64_t length = std::min<int64_t>(64, chunk.end - i);
    uint64_t chosen = load_bits(tensor.chosen + i / 8, length);
    for (uint64_t tied = load_bits(tensor.marked + i / 8, length); tied != 0 && count > 0; tied &= tied - 1, --count) {
      chosen |= tied & -tied;
    }
    store_bits(chosen, length, tensor.chosen + i / 8);
  }
}

template <class Key>
void Selection<Key>::write() const {
  std::vector<int64_t> ties(chunks_.size());  // at first what a chunk has, then what it takes
  parallel_items(chunks_.size(), workers_, [&](int64_t, int64_t item) { ties[item] = write_marked(chunks_[item]); });
  int64_t left = threshold_.wanted;
  for (int64_t& tied : ties) {
    tied = std::min(tied, left);
    left -= tied;
  }
  parallel_items(chunks_.size(), workers_, [&](int64_t, int64_t item) { write_ties(ties[item], chunks_[item]); });
}

void select(const std::vector<Candidates>& tensors, int64_t count, bool absolute, int64_t workers) {
  if (tensors.empty()) return;
  if (tensors[0].scores.dtype() == ScalarType::Double) {
    Selection<uint64_t>(tensors, absolute, workers).choose(count);
  } else {
    Selection<uint32_t>(tensors, absolute, workers).choose(count);
  }
}

/// A tensor above its fair share of the work is selected from by all threads, the others by one thread each, the
/// largest first.
void select_per_tensor(const std::vector<Candidates>& tensors, const int64_t* counts, bool absolute) {
  const int64_t workers = torch::stable::get_num_threads();
  int64_t total = 0;
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
  check_selection("select_topk", scores, counts, offsets, nbytes, eligible, per_tensor);
  Tensor bits = zero_bits("select_topk", nbytes);
  const std::unique_ptr<uint8_t[]> marked(new uint8_t[nbytes]);
  auto* chosen = static_cast<uint8_t*>(bits.mutable_data_ptr());
  const auto* open = eligible ? static_cast<const uint8_t*>(eligible->const_data_ptr()) : nullptr;
  std::vector<Candidates> tensors;
  for (size_t i = 0; i < scores.size(); ++i) {
    const int64_t at = offsets[i];
    tensors.push_back({Elements(scores[i]), open == nullptr ? nullptr : open + at, chosen + at, marked.get() + at});
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
