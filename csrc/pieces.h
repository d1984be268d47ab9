#pragma once

// The pieces of `rank_filter` that a block does for one matrix: arguments as they come from torch, checked, and `run`.
// What each means is in `rpg_fast/ledger.py`.

#include <initializer_list>

#include "common.h"
#include "spectrum.h"
#include "window.h"

namespace rpg_fast {

constexpr int64_t kAny = -1;  // a size that a check leaves open

/// A contiguous tensor of this dtype and shape on the device of `like`.
inline void check_argument(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                           std::initializer_list<int64_t> shape, const Tensor& like) {
  const auto sizes = tensor.sizes();
  bool fits = tensor.scalar_type() == dtype && tensor.is_contiguous() && sizes.size() == shape.size() &&
              tensor.is_cpu() == like.is_cpu() && tensor.get_device_index() == like.get_device_index();
  std::ostringstream wanted;
  size_t d = 0;
  for (const int64_t size : shape) {
    fits = fits && (size == kAny || sizes[d] == size);
    wanted << (d++ == 0 ? "" : ", ") << (size == kAny ? "*" : std::to_string(size));
  }
  STD_TORCH_CHECK(fits, op, ": ", name, " must be a contiguous ", dtype_name(dtype), " [", wanted.str(), "] where ",
                  "the other tensors lie, got ", describe(tensor));
}

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
}

/// Which rows of a thin buffer [rows, w] belong to matrix b, and whether it takes part.
struct ThinRows {
  const int *orders, *first_rows, *stages;
  int64_t batch;
  int w;

  ThinRows(const char* op, const Tensor& Q, const Tensor& orders_, const Tensor& first_rows_, const Tensor& stages_)
      : orders(data_of<int>(orders_)),
        first_rows(data_of<int>(first_rows_)),
        stages(data_of<int>(stages_)),
        batch(orders_.numel()),
        w(Q.dim() == 2 ? static_cast<int>(Q.sizes()[1]) : 0) {
    STD_TORCH_CHECK(w > 0 && w <= kWidth && w % kQuad == 0, op, ": Q must be [rows, w] with w a multiple of ", kQuad,
                    " up to ", kWidth, ", got ", describe(Q));
    check_argument(op, "orders", orders_, ScalarType::Int, {kAny}, Q);
    check_argument(op, "row_starts", first_rows_, ScalarType::Int, {batch}, Q);
    check_argument(op, "stages", stages_, ScalarType::Int, {batch}, Q);
  }

  RPG_FAST_HOST_DEVICE int64_t offset(int64_t b) const { return static_cast<int64_t>(first_rows[b]) * w; }
};

struct RangeBasis {
  using Work = BasisWork;
  static constexpr int kThreads = 256;
  ThinRows thin;
  const float* Z;
  float* Q;
  double floor;

  RangeBasis(const Tensor& Q_, const Tensor& Z_, const Tensor& orders, const Tensor& row_starts, const Tensor& stages,
             double floor_)
      : thin("filter_range_", Q_, orders, row_starts, stages),
        Z(data_of<float>(Z_)),
        Q(data_of<float>(Q_)),
        floor(floor_) {
    check_argument("filter_range_", "Q", Q_, ScalarType::Float, {kAny, thin.w}, Q_);
    check_argument("filter_range_", "Z", Z_, ScalarType::Float, {Q_.sizes()[0], thin.w}, Q_);
  }

  int64_t count() const { return thin.batch; }

  template <class Block>
  RPG_FAST_HOST_DEVICE void run(const Block& block, int64_t b, Work& work) const {
    if (thin.stages[b] == 0) return;
    const int64_t at = thin.offset(b);
    range_basis(block, Z + at, thin.orders[b], thin.w, floor, work, Q + at);
  }
};

struct PrincipalBasis {
  using Work = BasisWork;
  static constexpr int kThreads = 256;
  RangeBasis range;
  Ledger* ledger;

  PrincipalBasis(const Tensor& Q, const Tensor& ledger_, const Tensor& Z, const Tensor& orders,
                 const Tensor& row_starts, const Tensor& stages, double floor)
      : range(Q, Z, orders, row_starts, stages, floor), ledger(data_of<Ledger>(ledger_)) {
    check_argument("filter_principal_", "ledger", ledger_, ScalarType::Double, {range.count(), kLedgerColumns}, Q);
  }

  int64_t count() const { return range.count(); }

  template <class Block>
  RPG_FAST_HOST_DEVICE void run(const Block& block, int64_t b, Work& work) const {
    const ThinRows& thin = range.thin;
    if (thin.stages[b] == 0) return;
    const int64_t at = thin.offset(b);
    const Principal found =
        principal_basis(block, range.Z + at, thin.orders[b], thin.w, range.floor, work, range.Q + at);
    if (block.lane() == 0) ledger[b].found = found.found;
    if (block.lane() == 0) ledger[b].seen = found.energy;
  }
};

/// What `filter_open_` and `filter_conclude_` share: the matrices' ledger and the steps that they choose.
struct Rounds {
  Ledger* ledger;
  int *stages, *settled;
  float *aims, *coefficients;
  const float* traces;  // [T, 3]
  const int* tiles;     // [B, 2]
  const int* orders;    // [B]
  const double* target;
  Steps steps;
  int64_t batch;

  Rounds(const char* op, const Tensor& ledger_, const Tensor& stages_, const Tensor& settled_, const Tensor& aims_,
         const Tensor& coefficients_, const Tensor& traces_, const Tensor& tile_starts, const Tensor& orders_,
         const Tensor& target_, const Tensor& grid, const Tensor& table)
      : ledger(data_of<Ledger>(ledger_)),
        stages(data_of<int>(stages_)),
        settled(data_of<int>(settled_)),
        aims(data_of<float>(aims_)),
        coefficients(data_of<float>(coefficients_)),
        traces(data_of<float>(traces_)),
        tiles(data_of<int>(tile_starts)),
        orders(data_of<int>(orders_)),
        target(data_of<double>(target_)),
        batch(orders_.numel()) {
    const Tensor& like = ledger_;
    const int64_t rows = grid.numel(), depth = table.dim() == 3 ? table.sizes()[1] : 0;
    steps = {data_of<double>(grid), data_of<double>(table), static_cast<int>(rows), static_cast<int>(depth)};
    check_argument(op, "ledger", ledger_, ScalarType::Double, {batch, kLedgerColumns}, like);
    check_argument(op, "stages", stages_, ScalarType::Int, {batch}, like);
    check_argument(op, "settled", settled_, ScalarType::Int, {batch}, like);
    check_argument(op, "aims", aims_, ScalarType::Float, {batch, 2}, like);
    check_argument(op, "coefficients", coefficients_, ScalarType::Float, {batch, depth, 3}, like);
    check_argument(op, "traces", traces_, ScalarType::Float, {kAny, kTraces}, like);
    check_argument(op, "tile_starts", tile_starts, ScalarType::Int, {batch, 2}, like);
    check_argument(op, "orders", orders_, ScalarType::Int, {batch}, like);
    check_argument(op, "target", target_, ScalarType::Double, {}, like);
    check_argument(op, "grid", grid, ScalarType::Double, {rows}, like);
    check_argument(op, "table", table, ScalarType::Double, {rows, depth, 3}, like);
    STD_TORCH_CHECK(rows > 0, op, ": grid must not be empty");
  }

  RPG_FAST_HOST_DEVICE Aim aim(int64_t b) const {
    return {aims + 2 * b, coefficients + 3 * steps.depth * b, stages + b, settled + b};
  }
};

struct OpenWindow {
  struct Work {
    double parts[kSumParts * kTraces];
  };
  static constexpr int kThreads = 96;
  Rounds rounds;
  const double* norms;
  const float* scales;
  const double* windows;  // [B, 2]

  OpenWindow(const Rounds& rounds_, const Tensor& norms_, const Tensor& scales_, const Tensor& windows_,
             const Tensor& like)
      : rounds(rounds_),
        norms(data_of<double>(norms_)),
        scales(data_of<float>(scales_)),
        windows(data_of<double>(windows_)) {
    check_argument("filter_open_", "norms", norms_, ScalarType::Double, {rounds.batch}, like);
    check_argument("filter_open_", "scales", scales_, ScalarType::Float, {rounds.batch}, like);
    check_argument("filter_open_", "windows", windows_, ScalarType::Double, {rounds.batch, 2}, like);
  }

  int64_t count() const { return rounds.batch; }

  template <class Block>
  RPG_FAST_HOST_DEVICE void run(const Block& block, int64_t b, Work& work) const {
    open_window(block, rounds.traces, rounds.tiles + 2 * b, rounds.orders[b], norms[b], scales[b], *rounds.target,
                windows + 2 * b, rounds.steps, work.parts, rounds.ledger[b], rounds.aim(b));
  }
};

struct ConcludeWindow {
  using Work = WindowWork;
  static constexpr int kThreads = 256;
  Rounds rounds;
  ThinRows thin;
  float* Z;
  const float *Q, *images;  // [rows, w], [2, rows, w]
  int64_t numel;            // of Q

  ConcludeWindow(const Rounds& rounds_, const Tensor& Z_, const Tensor& Q_, const Tensor& images_, const Tensor& orders,
                 const Tensor& row_starts, const Tensor& stages)
      : rounds(rounds_),
        thin("filter_conclude_", Q_, orders, row_starts, stages),
        Z(data_of<float>(Z_)),
        Q(data_of<float>(Q_)),
        images(data_of<float>(images_)),
        numel(Q_.numel()) {
    const int64_t rows = Q_.sizes()[0];
    check_argument("filter_conclude_", "Q", Q_, ScalarType::Float, {rows, thin.w}, Q_);
    check_argument("filter_conclude_", "Z", Z_, ScalarType::Float, {rows, thin.w}, Q_);
    check_argument("filter_conclude_", "images", images_, ScalarType::Float, {2, rows, thin.w}, Q_);
  }

  int64_t count() const { return rounds.batch; }

  template <class Block>
  RPG_FAST_HOST_DEVICE void run(const Block& block, int64_t b, Work& work) const {
    if (thin.stages[b] == 0) return;
    const int64_t at = thin.offset(b);
    conclude_window(block, Images{Q + at, images + at, images + numel + at, thin.orders[b], thin.w}, rounds.traces,
                    rounds.tiles + 2 * b, *rounds.target, rounds.steps, work, rounds.ledger[b], rounds.aim(b), Z + at);
  }
};

struct SmallSpectrum {
  using Work = SmallWork;
  static constexpr int kThreads = 512;
  Ledger* ledger;
  float* projector;
  const int* members;  // [S]
  const Half* pairs;   // [2, numel]
  const int *tiles, *tile_starts, *orders;
  const int64_t* offsets;
  const double *norms, *target;
  const float* scales;
  int64_t size, numel;

  SmallSpectrum(const Tensor& ledger_, const Tensor& projector_, const Tensor& members_, const Tensor& pairs_,
                const Tensor& tiles_, const Tensor& tile_starts_, const Tensor& orders_, const Tensor& offsets_,
                const Tensor& norms_, const Tensor& scales_, const Tensor& target_)
      : ledger(data_of<Ledger>(ledger_)),
        projector(data_of<float>(projector_)),
        members(data_of<int>(members_)),
        pairs(data_of<Half>(pairs_)),
        tiles(data_of<int>(tiles_)),
        tile_starts(data_of<int>(tile_starts_)),
        orders(data_of<int>(orders_)),
        offsets(data_of<int64_t>(offsets_)),
        norms(data_of<double>(norms_)),
        target(data_of<double>(target_)),
        scales(data_of<float>(scales_)),
        size(members_.numel()),
        numel(pairs_.numel() / 2) {
    const char* op = "small_spectrum_";
    const Tensor& like = ledger_;
    const int64_t batch = orders_.numel();
    check_argument(op, "ledger", ledger_, ScalarType::Double, {batch, kLedgerColumns}, like);
    check_argument(op, "projector", projector_, ScalarType::Float, {kAny}, like);
    check_argument(op, "members", members_, ScalarType::Int, {size}, like);
    check_argument(op, "pairs", pairs_, ScalarType::Half, {2, numel}, like);
    check_argument(op, "tiles", tiles_, ScalarType::Int, {kAny, 5}, like);
    check_argument(op, "tile_starts", tile_starts_, ScalarType::Int, {batch, 2}, like);
    check_argument(op, "orders", orders_, ScalarType::Int, {batch}, like);
    check_argument(op, "offsets", offsets_, ScalarType::Long, {batch}, like);
    check_argument(op, "norms", norms_, ScalarType::Double, {batch}, like);
    check_argument(op, "scales", scales_, ScalarType::Float, {batch}, like);
    check_argument(op, "target", target_, ScalarType::Double, {}, like);
  }

  int64_t count() const { return size; }

  template <class Block>
  RPG_FAST_HOST_DEVICE void run(const Block& block, int64_t item, Work& work) const {
    const int b = members[item];
    const Half* hi = pairs + static_cast<int64_t>(tiles[5 * tile_starts[2 * b]]) * (kSmall * kSmall);
    const Half* lo = hi + numel;
    const auto load = [&](int at) { return static_cast<double>(hi[at]) + static_cast<double>(lo[at]) / 2048; };
    small_spectrum(block, load, orders[b], norms[b], scales[b], *target, work, ledger[b].k, ledger[b].e,
                   projector + offsets[b]);
  }
};

/// Symmetric eigenproblems [w, w] with w <= kMax.
template <int kMax>
struct SmallEigh {
  using Work = Eigen<kMax>;
  static constexpr int kThreads = kMax <= 32 ? 160 : 288;  // all 2 x 2 blocks of a round in one pass, or two
  double *values, *vectors;                                // [B, w], [B, w, w]
  const double* matrices;
  int64_t batch;
  int w;

  SmallEigh(const Tensor& values_, const Tensor& vectors_, const Tensor& matrices_)
      : values(data_of<double>(values_)),
        vectors(data_of<double>(vectors_)),
        matrices(data_of<double>(matrices_)),
        batch(matrices_.dim() == 3 ? matrices_.sizes()[0] : 0),
        w(matrices_.dim() == 3 ? static_cast<int>(matrices_.sizes()[2]) : 0) {
    const char* op = "small_eigh_";
    STD_TORCH_CHECK(w > 0 && w <= kMax, op, ": matrices must be [B, w, w] with w from 1 to ", kSmall, ", got ",
                    describe(matrices_));
    check_argument(op, "matrices", matrices_, ScalarType::Double, {batch, w, w}, matrices_);
    check_argument(op, "values", values_, ScalarType::Double, {batch, w}, matrices_);
    check_argument(op, "vectors", vectors_, ScalarType::Double, {batch, w, w}, matrices_);
  }

  int64_t count() const { return batch; }

  template <class Block>
  RPG_FAST_HOST_DEVICE void run(const Block& block, int64_t b, Work& eigen) const {
    const int size = w * w;
    const double* matrix = matrices + b * size;
    for (int item = block.lane(); item < size; item += block.count()) {
      const int i = item / w, j = item % w;
      if (j <= i) eigen.at(i, j) = matrix[item];
    }
    solve(block, w, eigen);
    double* rows = vectors + b * size;
    for (int item = block.lane(); item < size; item += block.count()) rows[item] = eigen.vector(item / w)[item % w];
    for (int i = block.lane(); i < w; i += block.count()) values[b * w + i] = eigen.values[i];
  }
};

}  // namespace rpg_fast
