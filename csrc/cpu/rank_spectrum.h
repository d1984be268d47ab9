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

/// The smaller side S of a split of approximate eigenvectors, with the pieces of its correction.
struct Refinement {
  const Eigen<float>& eigen;
  int64_t m, k;
  bool bottom;
  int64_t count;                 // vectors in S
  std::vector<double> energies;  // Rayleigh quotients of S
  double across = 0;             // ... and of the nearest vector of the other side
  double residual = 0;           // the largest ||G v - rho v|| in S
  std::vector<float> residuals;  // G v - rho v [count, m]

  int64_t first() const { return bottom ? 0 : m - k; }
  int64_t other() const { return bottom ? m - k : 0; }
  const float* S() const { return eigen.vectors() + first() * m; }
  const float* C() const { return eigen.vectors() + other() * m; }
  double inner() const { return bottom ? energies.back() : energies.front(); }
  double gap() const { return std::abs(across - inner()); }
  double sum() const { return std::accumulate(energies.begin(), energies.end(), 0.0); }
  double tail_energy() const { return bottom ? sum() : 1 - sum(); }
};

/// Rayleigh quotients and residuals, in float64, of S and of its neighbour on the other side.
inline void measure(const double* G, Refinement& r) {
  const int64_t m = r.m, rows = r.count + 1;
  const float* block = r.bottom ? r.S() : r.S() - m;  // S and its neighbour, in ascending order
  std::vector<double> V(block, block + rows * m), image(rows * m);
  multiply(borrow(V.data(), rows, m), borrow(G, m, m), borrow(image.data(), rows, m));
  r.residuals.resize(r.count * m);
  float* residuals = r.residuals.data();
  for (int64_t i = 0; i < rows; ++i) {
    const double* v = V.data() + i * m;
    const double* Gv = image.data() + i * m;
    double square = 0, energy = 0, error = 0;
    for (int64_t c = 0; c < m; ++c) square += v[c] * v[c], energy += v[c] * Gv[c];
    energy /= square;
    if (i == (r.bottom ? r.count : 0)) {
      r.across = energy;
      continue;
    }
    for (int64_t c = 0; c < m; ++c) {
      const double difference = Gv[c] - energy * v[c];
      error += difference * difference;
      *residuals++ = static_cast<float>(difference);
    }
    r.energies.push_back(energy);
    r.residual = std::max(r.residual, std::sqrt(error));
  }
}

/// The target picks k and neither neighbour, by more than the error of the energies.
inline bool is_nearest(const Refinement& r, double error, double target) {
  const double e = r.tail_energy(), below = r.bottom ? r.inner() : r.across, above = r.bottom ? r.across : r.inner();
  const double distance = std::abs(e - target) + error;
  return distance < std::abs(e + above - target) && distance < std::abs(e - below - target);
}

/// S <- S + Z C, Z the first-order rotation that removes the coupling of S to the other side C, then S orthonormal to first order.
/// Nothing if what remains could reach `tolerance`.
inline std::optional<std::vector<float>> rotate(const Refinement& r, double target, double tolerance) {
  const int64_t m = r.m, others = m - r.count;
  std::vector<float> Z(r.count * others), S(r.count * m), overlap(r.count * r.count), excess(r.count * m);
  multiply(borrow(r.residuals.data(), r.count, m), borrow_transposed(r.C(), others, m), borrow(Z.data(), r.count, others));
  const float* others_energies = r.eigen.values() + r.other();
  const int64_t neighbour = r.bottom ? 0 : others - 1;
  double square = 0, shift = 0;
  for (int64_t s = 0; s < r.count; ++s) {
    for (int64_t c = 0; c < others; ++c) {
      const double gap = r.energies[s] - (c == neighbour ? r.across : others_energies[c]);
      const double z = Z[s * others + c] / gap;
      Z[s * others + c] = static_cast<float>(z);
      square += z * z;
      shift += z * z * std::abs(gap);
    }
  }
  const double angle = std::sqrt(square);
  if (!(angle * (angle + 2 * r.residual / r.gap()) < tolerance) || !is_nearest(r, 4 * shift + 1e-10, target)) return {};
  multiply(borrow(Z.data(), r.count, others), borrow(r.C(), others, m), borrow(S.data(), r.count, m));
  for (int64_t i = 0; i < r.count * m; ++i) S[i] += r.S()[i];
  multiply(borrow(S.data(), r.count, m), borrow_transposed(S.data(), r.count, m), borrow(overlap.data(), r.count, r.count));
  for (int64_t i = 0; i < r.count; ++i) overlap[i * r.count + i] -= 1;
  multiply(borrow(overlap.data(), r.count, r.count), borrow(S.data(), r.count, m), borrow(excess.data(), r.count, m));
  for (int64_t i = 0; i < r.count * m; ++i) S[i] -= excess[i] / 2;
  return S;
}

/// By an eigendecomposition in float32 and one step of refinement in float64, at about half the cost. Nothing where that is not
/// certain to be enough: a gap too small at k, a target too near to the middle between two ranks, a failed decomposition.
inline std::optional<Split<float>> split_refined(const double* G, int64_t live, int64_t m, double target) {
  constexpr double kTolerance = 2e-6;  // of the projector, Frobenius
  Eigen<float> eigen;
  try {
    const std::vector<float> rounded(G, G + live * live);
    eigen = eigh(rounded.data(), live);
  } catch (const std::exception&) {
    return {};
  }
  const int64_t k = nearest_rank(eigen.values(), live, m, target).k;
  if (k < 1 || k >= live) return {};
  const bool bottom = live - k < k;
  Refinement refinement{eigen, live, k, bottom, bottom ? live - k : k, {}, 0, 0, {}};
  measure(G, refinement);
  auto basis = rotate(refinement, target, kTolerance);
  if (!basis) return {};
  return Split<float>{{k, refinement.tail_energy()}, bottom, refinement.count, std::move(*basis)};
}

/// N = -2 ((1 - e) I - P) [m, m] of a split of the live rows. Of a k above their number, what remains falls on the first zero rows.
template <class T>
void write_projector(const Split<T>& split, const std::vector<int32_t>& live, int64_t m, T* N) {
  const int64_t r = static_cast<int64_t>(live.size()), count = split.count;
  std::vector<T> P(r * r);
  if (count > 0) {
    multiply(borrow_transposed(split.basis.data(), count, r), borrow(split.basis.data(), count, r), borrow(P.data(), r, r));
  }
  const T sign = split.bottom ? -2 : 2;
  std::fill_n(N, m * m, T{0});
  int64_t spare = std::max<int64_t>(0, split.rank.k - r);
  for (int64_t i = 0, row = 0; i < m; ++i) {
    const bool is_live = row < r && live[row] == i;
    const bool projected = is_live ? split.bottom : spare-- > 0;
    if (is_live) {
      for (int64_t column = 0; column < r; ++column) N[i * m + live[column]] = sign * P[row * r + column];
      ++row;
    }
    N[i * m + i] += static_cast<T>((projected ? 2.0 : 0.0) - 2 * (1 - split.rank.tail_energy));
  }
}

}  // namespace rpg_fast::rank
