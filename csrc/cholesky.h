#pragma once

// Cholesky's factor of one small positive matrix by a block of threads, with pivoting, and what it is good for: it
// tells the rank, and the eigenproblem of its product with itself from the other side is almost diagonal.

#include "jacobi.h"

namespace rpg_fast {

template <int kMax>
struct Pivots {
  double diagonals[2][kMax];
  double values[kMax];  // descending
  int row[kMax];        // where the i-th pivot was found
  int turn[kMax];       // and when: w if never
};

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

/// Factorises A [w, w], of which the lower triangle is read, the largest pivot next, until one is not above `absolute`
/// and `relative` times the first. Row i of the factor is A[row[i]] over sqrt(values[i]), with zeros where `turn` is
/// below i. With kInverse, the rows of E under the same rule are orthonormal in the sense of A. Returns the rank.
template <bool kInverse, class Block, int kMax>
RPG_FAST_HOST_DEVICE int factorise(const Block& block, int w, double absolute, double relative, double* A, double* E,
                                   Pivots<kMax>& pivots) {
  constexpr int kPitch = Eigen<kMax>::kPitch;
  const int warp = block.lane() / Block::kWarp, warps = block.count() / Block::kWarp;
  const int column = block.lane() % Block::kWarp;
  for (int i = warp; i < w; i += warps) {
    for (int j = column; j < w; j += Block::kWarp) {
      if (j > i) A[i * kPitch + j] = A[j * kPitch + i];
      if (kInverse) E[i * kPitch + j] = i == j ? 1 : 0;
    }
    if (column == 0) pivots.diagonals[0][i] = A[i * kPitch + i];
    if (column == 0) pivots.turn[i] = w;
  }
  block.sync();

  uint64_t done = 0;
  double least = absolute;
  int rank = 0;
  for (; rank < w; ++rank) {
    const int p = largest_of(block, pivots.diagonals[rank % 2], w, done);
    const double pivot = pivots.diagonals[rank % 2][p], inverse = 1 / pivot;
    if (rank == 0 && relative * pivot > least) least = relative * pivot;
    if (!(pivot > least && pivot < from_bits(kInfinity))) break;
    done |= uint64_t{1} << p;
    if (block.lane() == 0) {
      pivots.values[rank] = pivot;
      pivots.row[rank] = p;
      pivots.turn[p] = rank;
    }
    for (int i = warp; i < w; i += warps) {
      if (done >> i & 1) continue;
      const double factor = A[p * kPitch + i] * inverse;
      for (int j = column; j < w; j += Block::kWarp) {
        const double a = A[i * kPitch + j] -= factor * A[p * kPitch + j];
        if (i == j) pivots.diagonals[(rank + 1) % 2][i] = a;
        if (kInverse) E[i * kPitch + j] -= factor * E[p * kPitch + j];
      }
    }
    block.sync();
  }
  return rank;
}

/// eigen.V <- the factor R [rank, w] of eigen.A and eigen.A <- R R^T [rank, rank], whose eigenvalues are those of A
/// that are not zero: `solve` with V given takes R to the rows sqrt(lambda) v (Veselic and Hari, 1989). Returns the
/// rank.
template <class Block, int kMax>
RPG_FAST_HOST_DEVICE int precondition(const Block& block, int w, double absolute, double relative, Pivots<kMax>& pivots,
                                      Eigen<kMax>& eigen) {
  constexpr int kPitch = Eigen<kMax>::kPitch;
  const int rank = factorise<false>(block, w, absolute, relative, eigen.A, eigen.V, pivots);
  double* R = eigen.V;
  for (int item = block.lane(); item < rank * w; item += block.count()) {
    const int a = item / w, c = item % w;
    const double root = __builtin_sqrt(pivots.values[a]);
    R[a * kPitch + c] = pivots.turn[c] >= a ? eigen.A[pivots.row[a] * kPitch + c] / root : 0;
  }
  block.sync();
  for (int item = block.lane(); item < rank * (rank + 1) / 2; item += block.count()) {
    const LowerPlace at = lower_place(item, rank);
    double sum = 0;
    for (int c = 0; c < w; ++c) sum += R[at.i * kPitch + c] * R[at.j * kPitch + c];
    eigen.at(at.i, at.j) = sum;
  }
  return rank;
}

}  // namespace rpg_fast
