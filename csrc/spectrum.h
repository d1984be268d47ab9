#pragma once

// The projector of a small matrix from its whole spectrum, by one block.

#include "cholesky.h"

namespace rpg_fast {

constexpr int kSmall = 64;  // m at most; the pitch of its matrices
// Of the largest entry: G + kShift I is positive, whatever the rounding errors of G.
constexpr double kShift = 1.0 / (1 << 20);
constexpr double kRounding = 1.0 / (1 << 24);  // eigenvalues below this fraction of the largest are rounding errors

struct SmallWork {
  Eigen<kSmall> eigen;
  Pivots<kSmall> pivots;
  int k;
  double e;
};

/// k and the e at k: `reference.nearest_rank` of energies [m], descending, each `shift` less than given, those that are
/// rounding errors set to zero.
RPG_FAST_HOST_DEVICE void nearest_rank(const double* energies, double shift, int m, double target, int& k, double& e) {
  double tail = 0, nearest = 0;
  for (int j = m - 1; j >= 0; --j) {
    const double energy = energies[j] - shift;
    tail += energy > kRounding * (energies[0] - shift) ? energy : 0;
    const double distance = fabs(tail - target);
    if (j < m - 1 && !(distance < nearest)) continue;  // the larger k on a tie
    nearest = distance;
    k = j;
    e = tail;
  }
}

/// k, e and N = 2 P - 2 (1 - e) I [m, m] of G = (hi + lo / 2048) / scale [m, m] at a pitch of kSmall. A zero
/// matrix has k = 0, e = 0 and N = 0, one that is not finite k = -1, e = NaN and N = NaN.
template <class Block, class Load>
RPG_FAST_HOST_DEVICE void small_spectrum(const Block& block, const Load& load, int m, double norm, double scale,
                                         double target, SmallWork& work, double& k, double& e, float* N) {
  Eigen<kSmall>& eigen = work.eigen;
  const bool finite = magnitude_bits(norm) < kInfinity;
  const double nan = from_bits(kInfinity + 1);
  if (!finite || norm == 0) {
    for (int item = block.lane(); item < m * m; item += block.count()) N[item] = static_cast<float>(finite ? 0.0 : nan);
    if (block.lane() == 0) {
      k = finite ? 0 : -1;
      e = finite ? 0 : nan;
    }
    return;
  }
  for (int item = block.lane(); item < m * m; item += block.count()) {
    const int i = item / m, j = item % m;
    if (j <= i) eigen.at(i, j) = (load(i * kSmall + j) + (i == j ? kShift : 0)) / scale;
  }
  block.sync();
  const int rank = precondition(block, m, 0, 0, work.pivots, eigen);
  solve<true>(block, rank, eigen, m);
  if (block.lane() == 0) {
    nearest_rank(eigen.values, kShift / scale, rank, target, work.k, work.e);
    k = work.k;
    e = work.e;
  }
  block.sync();
  // The fewer of the leading and the other eigenvectors.
  const bool leading = 2 * work.k <= rank;
  const int first = leading ? 0 : work.k, last = leading ? work.k : rank;
  for (int item = block.lane(); item < m * (m + 1) / 2; item += block.count()) {
    const LowerPlace at = lower_place(item, m);
    double sum = 0;
    for (int a = first; a < last; ++a) {
      sum += eigen.vector(a)[at.i] * eigen.vector(a)[at.j] / eigen.values[a];
    }
    const double P = leading ? sum : (at.i == at.j) - sum;
    const float value = static_cast<float>(2 * P - (at.i == at.j ? 2 * (1 - work.e) : 0));
    N[at.i * m + at.j] = N[at.j * m + at.i] = value;
  }
}

}  // namespace rpg_fast
