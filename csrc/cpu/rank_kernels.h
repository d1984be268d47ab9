// The hot loops of the exact rank loss on the CPU, on plain pointers.
#pragma once

#include <cstdint>
#include <type_traits>

namespace rpg_fast::rank {

template <class T>
using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

/// Of the magnitudes |row| [n] as bit patterns: raises `peak`, counts `nonzeros`, and joins them into `seen` [n].
void scan_row(const float* row, int64_t n, uint32_t* seen, uint32_t& peak, int64_t& nonzeros);
void scan_row(const double* row, int64_t n, uint64_t* seen, uint64_t& peak, int64_t& nonzeros);

/// A matrix by its columns: those of column j are entries start[j] .. start[j + 1] - 1, rows ascending.
template <class T>
struct Columns {
  const int64_t* start;
  const int32_t* row;
  const T* value;
};

constexpr int64_t kGramRows = 8;

/// products[i][l] += sum_j X[i, j] panel[j][l] over the columns j of `touched` [count] and their entries before
/// stop[j]; clears those rows of `panel` [n][kGramRows]. Both 64-byte aligned.
void gram_rows(const Columns<double>& X, const int64_t* stop, const int32_t* touched, int64_t count, double* panel,
               double* products);

/// Rows of a projector that one pass computes: two cache lines.
template <class T>
constexpr int64_t kTileRows = 128 / sizeof(T);

/// out[j][l] = sum_i X[i, j] panel[i][l] for j < columns; `panel` [m][kTileRows] and `out` [columns][kTileRows]
/// aligned.
void apply_tile(const Columns<float>& X, int64_t columns, const float* panel, float* out);
void apply_tile(const Columns<double>& X, int64_t columns, const double* panel, double* out);

}  // namespace rpg_fast::rank
