// From a Gram matrix to the projector of the rank loss, for one matrix on one thread.
#pragma once

#include <optional>

#include "rank_gram.h"

namespace rpg_fast::rank {

struct Rank {
  int64_t k;
  double tail_energy;
};

/// reference.nearest_rank for m eigenvalues of which the smallest m - live are zero; `eigenvalues` [live] ascending.
template <class T>
Rank nearest_rank(const T* eigenvalues, int64_t live, int64_t m, double target) {
  const double noise = m * std::numeric_limits<double>::epsilon();
  double tail = 0, best = std::numeric_limits<double>::infinity();
  Rank chosen{m - 1, 0};
  for (int64_t j = 0; j < m; ++j) {
    const int64_t i = j - (m - live);
    if (i >= 0 && eigenvalues[i] > noise) tail += eigenvalues[i];
    if (j == 0) chosen.tail_energy = tail;
    if (std::abs(tail - target) < best) {
      best = std::abs(tail - target);
      chosen = {m - 1 - j, tail};
    }
  }
  return chosen;
}

/// An orthonormal basis [count, live] of the span of the k leading eigenvectors, or, if `bottom`, of its complement.
template <class T>
struct Split {
  Rank rank;
  bool bottom;
  int64_t count;
  std::vector<T> basis;
};

/// By an eigendecomposition in float64.
template <class T>
Split<T> split(const double* G, int64_t live, int64_t m, double target) {
  const Eigen<double> eigen = eigh(G, live);
  const Rank rank = nearest_rank(eigen.values(), live, m, target);
  const int64_t top = std::min(rank.k, live);
  const bool bottom = live - top < top;
  const int64_t count = bottom ? live - top : top;
  const double* first = bottom ? eigen.vectors() : eigen.vectors() + (live - top) * live;
  return {rank, bottom, count, std::vector<T>(first, first + count * live)};
}

/// S [count, m], approximate eigenvectors on the smaller side of a split, to be refined against the other side C
/// [others, m].
struct Refinement {
  const double* G;
  int64_t m, count, others;
  bool bottom;  // S holds the lower eigenvalues
  std::vector<float> S;
  float* C;
  const float* C_energies;  // ascending
  int64_t neighbour;        // the one in C that is nearest to S

  std::vector<double> energies{};  // Rayleigh quotients of S
  double neighbour_energy = 0;
  std::vector<float> residuals{};  // G v - rho v [count, m]
  double largest_residual = 0;     // its norm

  double inner() const {
    return bottom ? *std::max_element(energies.begin(), energies.end())
                  : *std::min_element(energies.begin(), energies.end());
  }
  /// All of C lies beyond all of S: rounding in float32 has not swapped two eigenvectors across the boundary.
  bool ordered(double margin) const {
    const double sign = bottom ? 1 : -1, edge = inner();
    if (!(sign * (neighbour_energy - edge) > margin)) return false;
    for (int64_t c = 0; c < others; ++c) {
      if (c != neighbour && !(sign * (C_energies[c] - edge) > margin)) return false;
    }
    return true;
  }
  double gap() const { return std::abs(neighbour_energy - inner()); }
  double tail_energy() const {
    const double sum = std::accumulate(energies.begin(), energies.end(), 0.0);
    return bottom ? sum : 1 - sum;
  }
};

/// Rayleigh quotients and residuals, in float64.
inline void measure(Refinement& r) {
  const int64_t m = r.m, rows = r.count + 1;
  std::vector<double> V(rows * m), image(rows * m);
  std::copy_n(r.S.data(), r.count * m, V.data());
  std::copy_n(r.C + r.neighbour * m, m, V.data() + r.count * m);
  multiply(borrow(V.data(), rows, m), borrow(r.G, m, m), borrow(image.data(), rows, m));
  r.energies.resize(r.count);
  r.residuals.resize(r.count * m);
  r.largest_residual = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const double* v = V.data() + i * m;
    const double* Gv = image.data() + i * m;
    double square = 0, energy = 0, error = 0;
    for (int64_t c = 0; c < m; ++c) square += v[c] * v[c], energy += v[c] * Gv[c];
    energy /= square;
    if (i == r.count) {
      r.neighbour_energy = energy;
      break;
    }
    r.energies[i] = energy;
    for (int64_t c = 0; c < m; ++c) {
      const double difference = Gv[c] - energy * v[c];
      error += difference * difference;
      r.residuals[i * m + c] = static_cast<float>(difference);
    }
    r.largest_residual = std::max(r.largest_residual, std::sqrt(error));
  }
}

/// What a rotation tells: what is left of the angle between S and the invariant subspace, and by how much the energies
/// were off.
struct Rotation {
  double left, shift;
};

/// S <- S + Z C, Z the first-order rotation that removes the coupling of S to C; then S orthonormal to first order.
/// Where more than `tolerance` is left, C <- C - Z^T S as well, for the next step: a C that is not orthogonal to S
/// would mistake the couplings within S for its own.
inline Rotation rotate(Refinement& r, double tolerance) {
  const int64_t m = r.m, n = r.count;
  std::vector<float> Z(n * r.others), change(n * m), overlap(n * n);
  multiply(borrow(r.residuals.data(), n, m), borrow_transposed(r.C, r.others, m), borrow(Z.data(), n, r.others));
  double square = 0, shift = 0;
  for (int64_t s = 0; s < n; ++s) {
    for (int64_t c = 0; c < r.others; ++c) {
      const double gap = r.energies[s] - (c == r.neighbour ? r.neighbour_energy : r.C_energies[c]);
      const double z = Z[s * r.others + c] / gap;
      Z[s * r.others + c] = static_cast<float>(z);
      square += z * z;
      shift += z * z * std::abs(gap);
    }
  }
  const double angle = std::sqrt(square);
  const double left = angle * (angle + 2 * r.largest_residual / r.gap());
  multiply(borrow(Z.data(), n, r.others), borrow(r.C, r.others, m), borrow(change.data(), n, m));
  if (left >= tolerance) {
    std::vector<float> back(r.others * m);
    multiply(borrow_transposed(Z.data(), n, r.others), borrow(r.S.data(), n, m), borrow(back.data(), r.others, m));
    for (int64_t i = 0; i < r.others * m; ++i) r.C[i] -= back[i];
  }
  for (int64_t i = 0; i < n * m; ++i) r.S[i] += change[i];
  multiply(borrow(r.S.data(), n, m), borrow_transposed(r.S.data(), n, m), borrow(overlap.data(), n, n));
  for (int64_t i = 0; i < n; ++i) overlap[i * n + i] -= 1;
  multiply(borrow(overlap.data(), n, n), borrow(r.S.data(), n, m), borrow(change.data(), n, m));
  for (int64_t i = 0; i < n * m; ++i) r.S[i] -= change[i] / 2;
  return {left, shift};
}

/// The target picks this split and neither neighbouring one, by more than `error` in the energies.
inline bool is_nearest(const Refinement& r, double error, double target) {
  const double e = r.tail_energy(), distance = std::abs(e - target) + error;
  const double below = r.bottom ? r.inner() : r.neighbour_energy, above = r.bottom ? r.neighbour_energy : r.inner();
  return distance < std::abs(e + above - target) && distance < std::abs(e - below - target);
}

/// By an eigendecomposition in float32 and a few steps of refinement in float64, at about half the cost. Nothing where
/// that is not certain to be enough: a gap too small at k, a target too near to the middle between two ranks, a failed
/// decomposition.
inline std::optional<Split<float>> split_refined(const double* G, int64_t live, int64_t m, double target) {
  constexpr double kTolerance = 2e-6;  // of the projector, Frobenius norm
  constexpr int kSteps = 3;
  constexpr double kMargin = 1e-6;  // of the largest eigenvalue, a few roundings of float32
  Eigen<float> eigen;
  try {
    const std::vector<float> rounded(G, G + live * live);
    eigen = eigh(rounded.data(), live);
  } catch (const std::exception&) {
    return {};
  }
  const int64_t k = nearest_rank(eigen.values(), live, m, target).k;
  const double largest = eigen.values()[live - 1];
  if (k < 1 || k >= live) return {};
  const bool bottom = live - k < k;
  const int64_t cut = live - k, count = std::min(k, cut), others = live - count;
  float* upper = eigen.vectors() + cut * live;
  Refinement r{G,
               live,
               count,
               others,
               bottom,
               {},
               bottom ? upper : eigen.vectors(),
               eigen.values() + (bottom ? cut : 0),
               bottom ? 0 : others - 1};
  r.S.assign(bottom ? eigen.vectors() : upper, (bottom ? eigen.vectors() : upper) + count * live);
  for (int step = 0; step < kSteps; ++step) {
    measure(r);
    if (!r.ordered(kMargin * largest)) return {};
    const Rotation rotation = rotate(r, kTolerance);
    if (!(rotation.left < 0.1)) return {};
    if (rotation.left < kTolerance) {
      if (!is_nearest(r, 4 * rotation.shift + 1e-10, target)) return {};
      return Split<float>{{k, r.tail_energy()}, bottom, count, std::move(r.S)};
    }
  }
  return {};
}

/// A matrix [live, live] at the front of A, in place, to the live rows and columns of A [m, m]; zeros elsewhere. From
/// the end on, because no element moves towards the front.
template <class T>
void spread(const std::vector<int32_t>& live, int64_t m, T* A) {
  const int64_t r = static_cast<int64_t>(live.size());
  for (int64_t i = m - 1, row = r - 1; i >= 0; --i) {
    const bool is_live = row >= 0 && live[row] == i;
    for (int64_t j = m - 1, column = r - 1; j >= 0; --j) {
      const bool moves = is_live && column >= 0 && live[column] == j;
      A[i * m + j] = moves ? A[row * r + column--] : T{0};
    }
    if (is_live) --row;
  }
}

/// N = -2 ((1 - e) I - P) [m, m] of a split of the live rows. Of a k above their number, what remains falls on the
/// first zero rows.
template <class T>
void write_projector(const Split<T>& split, const std::vector<int32_t>& live, int64_t m, T* N) {
  const int64_t r = static_cast<int64_t>(live.size()), count = split.count;
  const T* basis = split.basis.data();
  std::vector<T> scaled(basis, basis + count * r);
  for (T& x : scaled) x *= split.bottom ? -2 : 2;
  if (count > 0) {
    multiply(borrow_transposed(scaled.data(), count, r), borrow(basis, count, r), borrow(N, r, r));
  } else {
    std::fill_n(N, r * r, T{0});
  }
  if (r < m) spread(live, m, N);
  int64_t spare = std::max<int64_t>(0, split.rank.k - r);
  for (int64_t i = 0, row = 0; i < m; ++i) {
    const bool is_live = row < r && live[row] == i;
    const bool projected = is_live ? split.bottom : spare-- > 0;
    N[i * m + i] += static_cast<T>((projected ? 2.0 : 0.0) - 2 * (1 - split.rank.tail_energy));
    row += is_live;
  }
}

}  // namespace rpg_fast::rank
