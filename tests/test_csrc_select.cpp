// The kernels of csrc/radix.h and csrc/masks.h on the host, block after block: as a library for the comparison with the
// meaning of the ops, as a program for the compilers' sanitizers, which exits with 1 on a wrong result.
// With an argument it leaves out one barrier after the other, for ThreadSanitizer to miss it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "radix.h"

namespace {

using namespace rpg_fast;

struct TestedBlock : ThreadBlock {
  using ThreadBlock::ThreadBlock;
  inline static int omitted = -1;  // which sync() of every thread does nothing
  inline static thread_local int calls = 0;
  void sync() const {
    if (calls++ != omitted) ThreadBlock::sync();
  }
};

/// Blocks one after another, each on `threads` threads; 0: on none but this one.
struct Host {
  int threads;
  bool omits = false;  // first runs each kernel of a selection once without each of its barriers
  inline static int kernels = 0;

  template <class Kernel>
  void launch(const Kernel& kernel, int64_t blocks) const {
    const auto work = std::make_unique<typename Kernel::Work>();
    for (int64_t b = 0; b < blocks; ++b) {
      if (threads == 0) {
        kernel.run(SerialBlock{}, b, blocks, *work);
      } else {
        launch_threads<TestedBlock>(threads, [&](TestedBlock block) { kernel.run(block, b, blocks, *work); });
      }
    }
  }

  /// The whole selection with `blocks` blocks sharing the tiles.
  template <class Key>
  void select(Selection<Key> selection, int64_t blocks) const {
    const int64_t bytes = selection.lay_out(nullptr);
    const std::unique_ptr<uint8_t, decltype(&std::free)> workspace(
        static_cast<uint8_t*>(std::aligned_alloc(kAlignment, bytes)), &std::free);
    selection.lay_out(workspace.get());
    std::fill_n(selection.histograms, kBins * selection.problems(), int64_t{0});
    const auto omit = [&](const auto& kernel) {
      if (omits) omit_barriers(kernel, {workspace.get(), workspace.get() + bytes}, workspace.get());
    };
    run_selection(
        selection,
        [&](const auto& kernel) {
          omit(kernel);
          launch(kernel, std::min(blocks, selection.tensors.tiles));
        },
        [&](const auto& kernel) {
          omit(kernel);
          launch(kernel, selection.problems());
        });
  }

  /// One block of a kernel without its first barrier, without its second, and so on, each from the same workspace.
  template <class Kernel>
  void omit_barriers(const Kernel& kernel, const std::vector<uint8_t>& before, uint8_t* workspace) const {
    const auto work = std::make_unique<typename Kernel::Work>();
    int barriers = 0;
    launch_threads<TestedBlock>(threads, [&](TestedBlock block) {
      kernel.run(block, 0, 1, *work);
      if (block.lane() == 0) barriers = TestedBlock::calls;
    });
    ++kernels;
    for (TestedBlock::omitted = 0; TestedBlock::omitted < barriers; ++TestedBlock::omitted) {
      std::copy(before.begin(), before.end(), workspace);
      std::fprintf(stderr, "\nomitted kernel_%d %d\n", kernels, TestedBlock::omitted);
      launch_threads<TestedBlock>(threads, [&](TestedBlock block) { kernel.run(block, 0, 1, *work); });
    }
    TestedBlock::omitted = -1;
    std::copy(before.begin(), before.end(), workspace);
  }
};

std::vector<int64_t> table_of(std::vector<TensorRow> rows, int64_t& tiles) {
  tiles = 0;
  for (TensorRow& row : rows) {
    row.first_tile = tiles;
    tiles += (row.numel + kTile - 1) / kTile;
  }
  std::vector<int64_t> table(kRowColumns * rows.size());
  if (!rows.empty()) std::memcpy(table.data(), rows.data(), rows.size() * sizeof(TensorRow));
  return table;
}

}  // namespace

/// rpg_fast::select_topk on contiguous scores; rows of [address, numel, 0, offset, storage].
extern "C" __attribute__((visibility("default"))) void select_on_host(const int64_t* rows, int64_t count,
                                                                      const int64_t* counts, const uint8_t* eligible,
                                                                      uint8_t* chosen, bool absolute, bool per_tensor,
                                                                      int64_t blocks, int threads) {
  const auto* first = reinterpret_cast<const TensorRow*>(rows);
  int64_t tiles;
  const std::vector<int64_t> table = table_of({first, first + count}, tiles);
  const bool has_double =
      std::any_of(first, first + count, [](const TensorRow& row) { return row.storage == Storage::kFloat64; });
  const Tensors tensors{table.data(), count, tiles};
  if (tiles == 0) return;
  if (has_double) {
    Host{.threads = threads}.select(Selection<uint64_t>{tensors, eligible, chosen, counts, absolute, per_tensor},
                                    blocks);
  } else {
    Host{.threads = threads}.select(Selection<uint32_t>{tensors, eligible, chosen, counts, absolute, per_tensor},
                                    blocks);
  }
}

namespace {

template <class Score>
struct Case {
  std::vector<std::vector<Score>> scores;
  std::vector<int64_t> offsets, counts;
  std::vector<uint8_t> eligible;  // none: all are
  bool absolute, per_tensor;

  bool open(size_t tensor, size_t i) const {
    return eligible.empty() || (eligible[offsets[tensor] + i / 8] >> i % 8 & 1);
  }
};

/// By comparing scores, one problem after another.
template <class Score>
std::vector<uint8_t> sorted_selection(const Case<Score>& c, size_t nbytes) {
  std::vector<uint8_t> chosen(nbytes, 0);
  const auto value = [&](const std::pair<size_t, size_t>& at) {
    const Score score = c.scores[at.first][at.second];
    return c.absolute ? std::abs(score) : score;
  };
  const auto better = [&](const auto& a, const auto& b) {
    const Score x = value(a), y = value(b);
    return std::isnan(x) ? !std::isnan(y) : x > y;
  };
  for (size_t problem = 0; problem < c.counts.size(); ++problem) {
    std::vector<std::pair<size_t, size_t>> candidates;
    for (size_t t = 0; t < c.scores.size(); ++t) {
      if (c.per_tensor && t != problem) continue;
      for (size_t i = 0; i < c.scores[t].size(); ++i) {
        if (c.open(t, i)) candidates.emplace_back(t, i);
      }
    }
    std::stable_sort(candidates.begin(), candidates.end(), better);
    const int64_t wanted = std::clamp<int64_t>(c.counts[problem], 0, static_cast<int64_t>(candidates.size()));
    for (int64_t j = 0; j < wanted; ++j) {
      const auto [t, i] = candidates[j];
      chosen[c.offsets[t] + i / 8] |= static_cast<uint8_t>(1u << i % 8);
    }
  }
  return chosen;
}

/// `kind`: 0 normal values, 1 few values, 2 all equal, 3 equal but for their last digits; some special ones among them.
template <class Score>
int failures_of(int kind, bool absolute, bool per_tensor, bool restricted, std::mt19937& random) {
  using Limits = std::numeric_limits<Score>;
  const Score special[] = {Limits::quiet_NaN(),  Limits::infinity(),   -Limits::infinity(), Score(-0.0), Score(0),
                           Limits::denorm_min(), -Limits::denorm_min()};
  std::normal_distribution<double> normal;
  Case<Score> c{{}, {}, {}, {}, absolute, per_tensor};
  std::vector<TensorRow> rows;
  std::vector<std::unique_ptr<Score, decltype(&std::free)>> memory;  // exact, so that ASan sees where it ends
  int64_t nbytes = 0, numel = 0;
  for (const int64_t n : {4096 + 333, 0, 77, 9000}) {
    std::vector<Score> scores(n);
    for (Score& score : scores) {
      score = static_cast<Score>(kind == 0   ? normal(random)
                                 : kind == 1 ? std::round(normal(random))
                                 : kind == 2 ? 1.0
                                             : 1.0 + std::ldexp(static_cast<double>(random() % 1000), -40));
      if (kind != 2 && random() % 50 == 0) score = special[random() % std::size(special)];
    }
    auto* data = static_cast<Score*>(std::aligned_alloc(kAlignment, (n * sizeof(Score) + 15) / 16 * 16));
    memory.emplace_back(data, &std::free);
    std::copy(scores.begin(), scores.end(), data);
    c.offsets.push_back(nbytes + 3);
    const Storage storage = sizeof(Score) == 4 ? Storage::kFloat32 : Storage::kFloat64;
    rows.push_back({reinterpret_cast<intptr_t>(data), n, 0, nbytes + 3, storage});
    nbytes += 3 + (n + 7) / 8;
    numel += n;
    c.scores.push_back(std::move(scores));
  }
  if (restricted) {
    c.eligible.resize(nbytes);
    for (uint8_t& byte : c.eligible) byte = static_cast<uint8_t>(random() & (random() % 3 == 0 ? 0 : 255));
  }
  for (size_t i = 0; i < (per_tensor ? c.scores.size() : 1); ++i) {
    const auto limit = per_tensor ? static_cast<int64_t>(c.scores[i].size()) : numel;
    c.counts.push_back(static_cast<int64_t>(random() % (limit + 4)) - 1);
  }
  const std::vector<uint8_t> want = sorted_selection(c, nbytes);
  int failures = 0;
  for (const int threads : {0, 1, 3}) {
    std::vector<uint8_t> got(nbytes, 0);
    select_on_host(reinterpret_cast<const int64_t*>(rows.data()), static_cast<int64_t>(rows.size()), c.counts.data(),
                   restricted ? c.eligible.data() : nullptr, got.data(), absolute, per_tensor, 3, threads);
    failures += got != want;
  }
  return failures;
}

int selection_failures() {
  std::mt19937 random(0);
  int failures = 0;
  for (int i = 0; i < 32; ++i) {
    const bool absolute = i % 2, per_tensor = i / 2 % 2, restricted = i / 4 % 2;
    failures += failures_of<float>(i / 8, absolute, per_tensor, restricted, random);
    failures += failures_of<double>(i / 8, absolute, per_tensor, restricted, random);
  }
  return failures;
}

/// Masks of all sizes to bits and back, and their ones.
int mask_failures() {
  std::mt19937 random(0);
  const std::vector<int64_t> numels = {0, 1, 7, 8, 9, 4095, 4096, 4097, 0, 9000, 20000};
  std::vector<std::unique_ptr<uint8_t, decltype(&std::free)>> masks, copies;
  std::vector<TensorRow> rows, copied;
  std::vector<int64_t> ones;
  int64_t nbytes = 0, tiles;
  for (const int64_t n : numels) {
    const int64_t bytes = (n + kAlignment - 1) / kAlignment * kAlignment;
    masks.emplace_back(static_cast<uint8_t*>(std::aligned_alloc(kAlignment, bytes)), &std::free);
    copies.emplace_back(static_cast<uint8_t*>(std::aligned_alloc(kAlignment, bytes)), &std::free);
    std::generate_n(masks.back().get(), n, [&] { return static_cast<uint8_t>(random() % 2); });
    ones.push_back(std::count(masks.back().get(), masks.back().get() + n, 1));
    rows.push_back({reinterpret_cast<intptr_t>(masks.back().get()), n, 0, nbytes + 3, Storage::kBytes});
    copied.push_back(rows.back());
    copied.back().data = reinterpret_cast<intptr_t>(copies.back().get());
    nbytes += 3 + (n + 7) / 8;
  }
  const std::vector<int64_t> table = table_of(rows, tiles), copied_table = table_of(copied, tiles);
  const auto count = static_cast<int64_t>(numels.size());
  int failures = 0;
  for (const int threads : {0, 1, 3}) {
    for (const int64_t blocks : {int64_t{1}, int64_t{3}, tiles}) {
      const Host host{.threads = threads};
      std::vector<uint8_t> bits(nbytes, 0);
      host.launch(PackTiles{{table.data(), count, tiles}, bits.data()}, blocks);
      host.launch(UnpackTiles{{copied_table.data(), count, tiles}, bits.data()}, blocks);
      for (size_t i = 0; i < numels.size(); ++i) {
        failures += !std::equal(masks[i].get(), masks[i].get() + numels[i], copies[i].get());
        const int64_t start = rows[i].offset, end = start + (numels[i] + 7) / 8;
        for (int64_t j = 0; j < 3; ++j) failures += bits[start - 3 + j] != 0;
        if (numels[i] % 8 != 0) {
          failures += bits[end - 1] >> numels[i] % 8 != 0;
          bits[end - 1] |= static_cast<uint8_t>(255u << numels[i] % 8);  // what lies behind is not counted
        }
      }
      std::vector<int64_t> counts(count, 0);
      host.launch(PopcountTiles{{table.data(), count, tiles}, bits.data(), counts.data()}, blocks);
      failures += counts != ones;
    }
  }
  return failures;
}

/// Many ties, some of them chosen, in two tiles of two problems.
void omit_barriers() {
  std::vector<int64_t> counts = {1500, 30}, table;
  std::vector<TensorRow> rows;
  std::vector<float> scores[2] = {std::vector<float>(4000), std::vector<float>(70)};
  for (std::vector<float>& tensor : scores) {
    for (size_t i = 0; i < tensor.size(); ++i) tensor[i] = static_cast<float>(i % 3);
    const auto numel = static_cast<int64_t>(tensor.size());
    rows.push_back({reinterpret_cast<intptr_t>(tensor.data()), numel, 0, rows.empty() ? 0 : 500, Storage::kFloat32});
  }
  int64_t tiles;
  table = table_of(rows, tiles);
  uint8_t chosen[600] = {};
  Host{.threads = 7, .omits = true}.select(
      Selection<uint32_t>{{table.data(), 2, tiles}, nullptr, chosen, counts.data(), true, true}, 1);
}

}  // namespace

int main(int argc, char**) {
  if (argc > 1) {
    omit_barriers();
    return 0;
  }
  const int failures = selection_failures() + mask_failures();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
