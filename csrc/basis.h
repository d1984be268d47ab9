#pragma once

// Orthonormal bases of thin matrices Z [m, w] by one block each: Gram matrix, pivoted Cholesky factor and, for the
// principal directions, the eigenvectors of the factor, all in float64; sums have an order of their own, which does not
// depend on the number of threads.

#include "cholesky.h"

namespace rpg_fast {

constexpr int kWidth = 32;  // w at most; a multiple of kQuad
constexpr int kQuad = 4;    // neighbours in a row that are read at once
constexpr int kParts = 7;   // partial sums over the rows, r modulo kParts
constexpr int kTiles = (kWidth / kQuad) * (kWidth / kQuad + 1) / 2;
constexpr int kPitch = Eigen<kWidth>::kPitch;
constexpr double kNegligible = 1e-6;  // pivots that a principal direction may ignore, over the least that it may have

struct alignas(16) Quad {
  float x[kQuad];
};

struct BasisWork {
  Eigen<kWidth> eigen;
  Pivots<kWidth> pivots;
  double partials[kTiles * kParts * kQuad * kQuad];
};

/// The lower triangle of X^T Y in float64, [w, w] at a pitch of kPitch, of thin X and Y [m, w]. Ends with a sync().
template <class Block>
RPG_FAST_HOST_DEVICE void lower_product(const Block& block, const float* X, const float* Y, int m, int w,
                                        double* partials, double* product) {
  const int side = w / kQuad, tiles = side * (side + 1) / 2;
  for (int item = block.lane(); item < tiles * kParts; item += block.count()) {
    const int part = item / tiles;
    const LowerPlace at = lower_place(item - part * tiles, side);
    double sums[kQuad][kQuad] = {};
    for (int64_t r = part; r < m; r += kParts) {
      const Quad x = *reinterpret_cast<const Quad*>(X + r * w + kQuad * at.i);
      const Quad y = *reinterpret_cast<const Quad*>(Y + r * w + kQuad * at.j);
      for (int a = 0; a < kQuad; ++a) {
        for (int b = 0; b < kQuad; ++b) sums[a][b] += static_cast<double>(x.x[a]) * static_cast<double>(y.x[b]);
      }
    }
    for (int a = 0; a < kQuad; ++a) {
      for (int b = 0; b < kQuad; ++b) partials[(kQuad * a + b) * tiles * kParts + item] = sums[a][b];
    }
  }
  block.sync();
  for (int item = block.lane(); item < tiles * kQuad * kQuad; item += block.count()) {
    const int element = item / tiles, tile = item - element * tiles;
    const LowerPlace at = lower_place(tile, side);
    double sum = 0;
    for (int part = 0; part < kParts; ++part) sum += partials[(element * kParts + part) * tiles + tile];
    product[(kQuad * at.i + element / kQuad) * kPitch + kQuad * at.j + element % kQuad] = sum;
  }
  block.sync();
}

/// out <- X T + Y / 2, or X T where Y is null, for thin X, Y, out [m, w] and T [w, w] at a pitch of kPitch.
template <class Block>
RPG_FAST_HOST_DEVICE void thin_product(const Block& block, const float* X, const double* T, const float* Y, int m,
                                       int w, float* out) {
  const int side = w / kQuad;
  for (int item = block.lane(); item < (m + kQuad - 1) / kQuad * side; item += block.count()) {
    const int first = item / side * kQuad, k = item % side;  // columns k, k + side, ..: neighbours read neighbours
    double sums[kQuad][kQuad] = {};
    for (int c = 0; c < w; c += kQuad) {
      Quad x[kQuad] = {};
      for (int a = 0; a < kQuad; ++a) {
        if (first + a < m) x[a] = *reinterpret_cast<const Quad*>(X + static_cast<int64_t>(first + a) * w + c);
      }
      for (int i = 0; i < kQuad; ++i) {
        for (int b = 0; b < kQuad; ++b) {
          const double t = T[(c + i) * kPitch + k + b * side];
          for (int a = 0; a < kQuad; ++a) sums[a][b] += static_cast<double>(x[a].x[i]) * t;
        }
      }
    }
    for (int a = 0; a < kQuad && first + a < m; ++a) {
      for (int b = 0; b < kQuad; ++b) {
        const int64_t at = static_cast<int64_t>(first + a) * w + k + b * side;
        out[at] = static_cast<float>(Y == nullptr ? sums[a][b] : sums[a][b] + static_cast<double>(Y[at]) / 2);
      }
    }
  }
}

template <class Block>
RPG_FAST_HOST_DEVICE void clear(const Block& block, int64_t numel, float* out) {
  for (int64_t i = block.lane(); i < numel; i += block.count()) out[i] = 0;
}

/// Q [m, w]: an orthonormal basis of the columns of Z [m, w] without those that the others span but for a squared
/// distance of `floor` times the largest squared norm; zeros in the columns that are left. Where Z is not finite, Q is
/// zero.
template <class Block>
RPG_FAST_HOST_DEVICE void range_basis(const Block& block, const float* Z, int m, int w, double floor, BasisWork& work,
                                      float* Q) {
  double *T = work.eigen.A, *E = work.eigen.V;
  lower_product(block, Z, Z, m, w, work.partials, T);
  const int rank = factorise<true>(block, w, 0, floor, T, E, work.pivots);
  if (rank == 0) return clear(block, static_cast<int64_t>(m) * w, Q);  // zero times NaN would be NaN
  for (int item = block.lane(); item < w * w; item += block.count()) {
    const int c = item / w, k = item % w;
    T[c * kPitch + k] = k < rank ? E[work.pivots.row[k] * kPitch + c] / __builtin_sqrt(work.pivots.values[k]) : 0;
  }
  block.sync();
  thin_product(block, Z, T, static_cast<const float*>(nullptr), m, w, Q);
}

struct Principal {
  int found;
  double energy;  // the sum of the squared singular values of those found
};

/// Q [m, w]: the left singular vectors of Z [m, w] whose squared singular value is above `floor`, descending, then
/// zeros. Where Z is not finite, none is found.
template <class Block>
RPG_FAST_HOST_DEVICE Principal principal_basis(const Block& block, const float* Z, int m, int w, double floor,
                                               BasisWork& work, float* Q) {
  Eigen<kWidth>& eigen = work.eigen;
  lower_product(block, Z, Z, m, w, work.partials, eigen.A);
  const int rank = precondition(block, w, kNegligible * floor, 1e-15, work.pivots, eigen);
  solve<true>(block, rank, eigen, w);

  Principal result{0, 0};
  while (result.found < rank && eigen.values[result.found] > floor) result.energy += eigen.values[result.found++];
  if (result.found == 0) {
    clear(block, static_cast<int64_t>(m) * w, Q);
    return result;
  }
  double* T = eigen.A;
  for (int item = block.lane(); item < w * w; item += block.count()) {
    const int c = item / w, k = item % w;
    T[c * kPitch + k] = k < result.found ? eigen.vector(k)[c] / eigen.values[k] : 0;
  }
  block.sync();
  thin_product(block, Z, T, static_cast<const float*>(nullptr), m, w, Q);
  return result;
}

}  // namespace rpg_fast
