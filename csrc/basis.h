#pragma once

// Orthonormal bases of thin matrices Z [m, w] by one block each: Gram matrix, pivoted Cholesky factor and, for the
// principal directions, the eigenvectors of the factor, all in float64; sums have an order of their own, which does not
// depend on the number of threads.

#include "jacobi.h"

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
  double factor[kWidth * kPitch];  // the Gram matrix, then the rows of its Cholesky factor, at their pivots' places
  double partials[kTiles * kParts * kQuad * kQuad];
  double diagonals[2][kWidth];
  double pivots[kWidth];  // descending
  int row[kWidth];        // where the i-th pivot was found
  int turn[kWidth];       // and when: w if never
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

/// The place of the largest of those values [w] that are not yet done; the first one of equals. NaN is the largest.
template <class Block>
RPG_FAST_HOST_DEVICE int largest_of(const Block& block, const double* values, int w, uint64_t done) {
  constexpr uint64_t kPlace = 63;  // the lowest bits of a value give way to its place
  uint64_t best = 0;
  for (int i = block.lane() % Block::kWarp; i < w; i += Block::kWarp) {
    const bool open = (done >> i & 1) == 0, negative = values[i] < 0;
    const uint64_t key = open ? ((negative ? 0 : magnitude_bits(values[i])) | kPlace) - i : 0;
    best = key > best ? key : best;
  }
  for (int mask = Block::kWarp / 2; mask > 0; mask /= 2) {
    const uint64_t other = block.shuffle_xor(best, mask);
    best = other > best ? other : best;
  }
  return static_cast<int>(kPlace - (best & kPlace));
}

/// Cholesky's factorisation of the Gram matrix in work.factor, of which the lower triangle is read, the largest pivot
/// next, until one is not above `absolute` and `relative` times the first. Row i of the factor is
/// work.factor[work.row[i]] over sqrt(work.pivots[i]), with zeros where work.turn is below i. With kInverse, the
/// rows of work.eigen.V under the same rule are orthonormal in the sense of the Gram matrix. Returns the rank.
template <bool kInverse, class Block>
RPG_FAST_HOST_DEVICE int factorise(const Block& block, int w, double absolute, double relative, BasisWork& work) {
  const int warp = block.lane() / Block::kWarp, warps = block.count() / Block::kWarp;
  const int column = block.lane() % Block::kWarp;
  double *A = work.factor, *E = work.eigen.V;
  for (int i = warp; i < w; i += warps) {
    for (int j = column; j < w; j += Block::kWarp) {
      if (j > i) A[i * kPitch + j] = A[j * kPitch + i];
      if (kInverse) E[i * kPitch + j] = i == j ? 1 : 0;
    }
    if (column == 0) work.diagonals[0][i] = A[i * kPitch + i];
    if (column == 0) work.turn[i] = w;
  }
  block.sync();

  uint64_t done = 0;
  double least = absolute;
  int rank = 0;
  for (; rank < w; ++rank) {
    const int p = largest_of(block, work.diagonals[rank % 2], w, done);
    const double pivot = work.diagonals[rank % 2][p], inverse = 1 / pivot;
    if (rank == 0 && relative * pivot > least) least = relative * pivot;
    if (!(pivot > least && pivot < from_bits(kInfinity))) break;
    done |= uint64_t{1} << p;
    if (block.lane() == 0) {
      work.pivots[rank] = pivot;
      work.row[rank] = p;
      work.turn[p] = rank;
    }
    for (int i = warp; i < w; i += warps) {
      if (done >> i & 1) continue;
      const double factor = A[p * kPitch + i] * inverse;
      for (int j = column; j < w; j += Block::kWarp) {
        const double a = A[i * kPitch + j] -= factor * A[p * kPitch + j];
        if (i == j) work.diagonals[(rank + 1) % 2][i] = a;
        if (kInverse) E[i * kPitch + j] -= factor * E[p * kPitch + j];
      }
    }
    block.sync();
  }
  return rank;
}

/// Q [m, w]: an orthonormal basis of the columns of Z [m, w] without those that the others span but for a squared
/// distance of `floor` times the largest squared norm; zeros in the columns that are left. Where Z is not finite, Q is
/// zero.
template <class Block>
RPG_FAST_HOST_DEVICE void range_basis(const Block& block, const float* Z, int m, int w, double floor, BasisWork& work,
                                      float* Q) {
  lower_product(block, Z, Z, m, w, work.partials, work.factor);
  const int rank = factorise<true>(block, w, 0, floor, work);
  if (rank == 0) return clear(block, static_cast<int64_t>(m) * w, Q);  // zero times NaN would be NaN
  double* T = work.eigen.A;
  for (int item = block.lane(); item < w * w; item += block.count()) {
    const int c = item / w, k = item % w;
    T[c * kPitch + k] = k < rank ? work.eigen.V[work.row[k] * kPitch + c] / __builtin_sqrt(work.pivots[k]) : 0;
  }
  block.sync();
  thin_product(block, Z, T, static_cast<const float*>(nullptr), m, w, Q);
}

struct Principal {
  int found;
  double energy;  // the sum of the squared singular values of those found
};

/// Q [m, w]: the left singular vectors of Z [m, w] whose squared singular value is above `floor`, descending, then
/// zeros. Z = Q0 R with the Cholesky factor R of its Gram matrix; the singular vectors of R are the eigenvectors of
/// R R^T, which is so near to diagonal that few sweeps do (Veselic and Hari, 1989). Where Z is not finite, none is
/// found.
template <class Block>
RPG_FAST_HOST_DEVICE Principal principal_basis(const Block& block, const float* Z, int m, int w, double floor,
                                               BasisWork& work, float* Q) {
  lower_product(block, Z, Z, m, w, work.partials, work.factor);
  const int rank = factorise<false>(block, w, kNegligible * floor, 1e-15, work);
  Eigen<kWidth>& eigen = work.eigen;
  double* R = work.factor;
  for (int item = block.lane(); item < rank * w; item += block.count()) {
    const int a = item / w, c = item % w;
    double& r = R[work.row[a] * kPitch + c];
    r = work.turn[c] >= a ? r / __builtin_sqrt(work.pivots[a]) : 0;
  }
  block.sync();
  for (int item = block.lane(); item < rank * (rank + 1) / 2; item += block.count()) {
    const LowerPlace at = lower_place(item, rank);
    const double *left = R + work.row[at.i] * kPitch, *right = R + work.row[at.j] * kPitch;
    double sum = 0;
    for (int c = 0; c < w; ++c) sum += left[c] * right[c];
    eigen.at(at.i, at.j) = sum;
  }
  solve(block, rank, eigen);

  Principal result{0, 0};
  while (result.found < rank && eigen.values[result.found] > floor) result.energy += eigen.values[result.found++];
  if (result.found == 0) {
    clear(block, static_cast<int64_t>(m) * w, Q);
    return result;
  }
  double* T = eigen.A;
  for (int item = block.lane(); item < w * w; item += block.count()) {
    const int c = item / w, k = item % w;
    double sum = 0;
    for (int a = 0; k < result.found && a < rank; ++a) sum += R[work.row[a] * kPitch + c] * eigen.vector(k)[a];
    T[c * kPitch + k] = k < result.found ? sum / eigen.values[k] : 0;
  }
  block.sync();
  thin_product(block, Z, T, static_cast<const float*>(nullptr), m, w, Q);
  return result;
}

}  // namespace rpg_fast
