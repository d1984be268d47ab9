#pragma once

// Eigenvalues and eigenvectors of one small symmetric matrix by a block of threads: cyclic Jacobi rotations in float64,
// w / 2 at a time in the round-robin order, which converges as the order by rows does (Luk and Park, 1989).

#include <cstdint>

#include "block.h"

namespace rpg_fast {

constexpr int kMaxSweeps = 40;          // 6 to 8 do, up to 18 where the spectrum is steep
constexpr double kOffDiagonal = 4e-15;  // converged: the Frobenius norm off the diagonal over that of the matrix
constexpr int kMaxWarps = 32;

struct alignas(16) Rotation {
  double cosine, sine;
};

/// The eigenproblem of a matrix [w, w], w <= kMax, in memory that the block shares.
template <int kMax>
struct Eigen {
  static constexpr int kPitch = kMax + 1;  // odd: neither the rows nor the columns of doubles share a bank
  double A[kMax * kPitch];                 // only the lower triangle is used
  double V[kMax * kPitch];                 // rows: the eigenvectors
  double values[kMax];                     // descending
  int row[kMax];                           // values[i] belongs to the eigenvector V[row[i]]
  Rotation rotations[2][kMax / 2];
  double sums[2][kMaxWarps];
  uint64_t peaks[kMaxWarps];

  RPG_FAST_HOST_DEVICE double& at(int i, int j) { return A[i >= j ? i * kPitch + j : j * kPitch + i]; }
  RPG_FAST_HOST_DEVICE double* vector(int i) { return V + row[i] * kPitch; }
};

RPG_FAST_HOST_DEVICE uint64_t magnitude_bits(double x) {
  uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof(x));
  return bits & ~(uint64_t{1} << 63);
}

RPG_FAST_HOST_DEVICE double from_bits(uint64_t bits) {
  double x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

constexpr uint64_t kInfinity = uint64_t{0x7ff} << 52;  // bits; those of NaN are larger

/// A power of two that brings |x| of these bits into [1, 2), or as near to it as its own range allows.
RPG_FAST_HOST_DEVICE double unit_scale(uint64_t magnitude) {
  const int exponent = 2046 - static_cast<int>(magnitude >> 52);
  return from_bits(static_cast<uint64_t>(exponent < 1 ? 1 : exponent > 2045 ? 2045 : exponent) << 52);
}

RPG_FAST_HOST_DEVICE float reciprocal_root(float x) {
#ifdef __CUDA_ARCH__
  return rsqrtf(x);
#else
  return 1.0f / __builtin_sqrtf(x);
#endif
}

/// The rotation in the plane of p and q that takes a_pq away, (p, q) <- (c p - s q, s p + c q). The angle is float32,
/// since the next sweep sees what it leaves of a_pq; cosine and sine are float64, since V has to stay orthogonal.
RPG_FAST_HOST_DEVICE Rotation annihilate(double pp, double qq, double pq) {
  const double gap = qq - pp, twice = pq + pq;
  const uint64_t a = magnitude_bits(gap), b = magnitude_bits(twice);
  const double scale = unit_scale(a > b ? a : b);
  const float x = static_cast<float>(gap * scale), y = static_cast<float>(twice * scale);
  const float square = x * x + y * y;  // [1, 8), or 0
  const float length = (x < 0 ? -x : x) + square * reciprocal_root(square);
  const double tangent = square > 0 ? (x < 0 ? -y : y) / length : 0.0f;  // at most 1: the smaller angle

  const double secant = 1 + tangent * tangent;  // squared
  const double guess = reciprocal_root(static_cast<float>(secant));
  const double error = 1 - secant * (guess * guess);
  const double cosine = guess + guess * error * (0.5 + 0.375 * error);
  return {cosine, tangent * cosine};
}

struct Plane {
  int p, q;
};

/// The i-th of the n / 2 disjoint planes of a round; over n - 1 rounds every plane comes once.
RPG_FAST_HOST_DEVICE Plane plane_of(int i, int round, int n) {
  if (i == 0) return {n - 1, round};
  const int p = round + i, q = round - i;
  return {p < n - 1 ? p : p - (n - 1), q >= 0 ? q : q + (n - 1)};
}

struct LowerPlace {
  int i, j;  // j <= i
};

/// The lower triangle [size, size] as a list: row i and the row of its missing length make a whole one.
RPG_FAST_HOST_DEVICE LowerPlace lower_place(int item, int size) {
  const int fold = static_cast<int>((static_cast<float>(item) + 0.5f) / static_cast<float>(size + 1));
  const int rest = item - fold * (size + 1);
  return rest <= fold ? LowerPlace{fold, rest} : LowerPlace{size - 1 - fold, rest - fold - 1};
}

/// A <- J^T A J for all rotations of a round: every 2 x 2 block of two planes is turned from both sides at once.
template <class Block, int kMax>
RPG_FAST_HOST_DEVICE void rotate_matrix(const Block& block, int n, int round, const Rotation* rotations,
                                        Eigen<kMax>& eigen) {
  const int half = n / 2;
  for (int item = block.lane(); item < half * (half + 1) / 2; item += block.count()) {
    const auto [i, j] = lower_place(item, half);
    const Plane left = plane_of(i, round, n), right = plane_of(j, round, n);
    const Rotation l = rotations[i], r = rotations[j];
    double &pp = eigen.at(left.p, right.p), &pq = eigen.at(left.p, right.q);
    double &qp = eigen.at(left.q, right.p), &qq = eigen.at(left.q, right.q);
    const double top_p = r.cosine * pp - r.sine * pq, top_q = r.sine * pp + r.cosine * pq;
    const double low_p = r.cosine * qp - r.sine * qq, low_q = r.sine * qp + r.cosine * qq;
    pp = l.cosine * top_p - l.sine * low_p;
    pq = l.cosine * top_q - l.sine * low_q;
    qp = l.sine * top_p + l.cosine * low_p;
    qq = l.sine * top_q + l.cosine * low_q;
  }
}

/// V <- J^T V for all rotations of a round, by `workers` warps of which this thread is in number `worker`.
template <class Block, int kMax>
RPG_FAST_HOST_DEVICE void rotate_vectors(const Block& block, int n, int columns, int round, const Rotation* rotations,
                                         int worker, int workers, Eigen<kMax>& eigen) {
  for (int i = worker; i < n / 2; i += workers) {
    const Plane plane = plane_of(i, round, n);
    const Rotation r = rotations[i];
    double *p = eigen.V + plane.p * eigen.kPitch, *q = eigen.V + plane.q * eigen.kPitch;
    for (int c = block.lane() % Block::kWarp; c < columns; c += Block::kWarp) {
      const double x = p[c], y = q[c];
      p[c] = r.cosine * x - r.sine * y;
      q[c] = r.sine * x + r.cosine * y;
    }
  }
}

/// All planes once. The first warp finds a round's rotations while the others turn V by those of the round before.
template <class Block, int kMax>
RPG_FAST_HOST_DEVICE void sweep(const Block& block, int n, int columns, Eigen<kMax>& eigen) {
  const int warp = block.lane() / Block::kWarp, warps = block.count() / Block::kWarp;
  const int workers = warps > 1 ? warps - 1 : 1, worker = warps > 1 ? warp - 1 : 0;
  const auto turn_vectors = [&](int round) {
    if (worker >= 0) rotate_vectors(block, n, columns, round, eigen.rotations[round % 2], worker, workers, eigen);
  };
  for (int round = 0; round < n - 1; ++round) {
    Rotation* rotations = eigen.rotations[round % 2];
    for (int i = block.lane(); warp == 0 && i < n / 2; i += Block::kWarp) {
      const Plane plane = plane_of(i, round, n);
      rotations[i] = annihilate(eigen.at(plane.p, plane.p), eigen.at(plane.q, plane.q), eigen.at(plane.p, plane.q));
    }
    if (round > 0) turn_vectors(round - 1);
    block.sync();
    rotate_matrix(block, n, round, rotations, eigen);
    block.sync();
  }
  turn_vectors(n - 2);
}

/// Solves for eigen.A [w, w], of which the lower triangle is read and which is lost: eigen.values, descending, and the
/// unit eigenvectors eigen.vector(i). With kGiven, eigen.V holds R [w, columns] and eigen.vector(i) becomes what the
/// eigenvector makes of R, v^T R. NaN everywhere if A holds an infinity or NaN. Returns the sweeps that it took, the
/// same in every thread. Begins and ends with a sync().
template <bool kGiven = false, class Block, int kMax>
RPG_FAST_HOST_DEVICE int solve(const Block& block, int w, Eigen<kMax>& eigen, int columns = 0) {
  const int n = w + w % 2, lane = block.lane(), count = block.count();  // an odd w: one more row of zeros
  block.sync();
  uint64_t peak = 0;
  for (int item = lane; item < w * w; item += count) {
    const int i = item / w, j = item % w;
    const uint64_t bits = j <= i ? magnitude_bits(eigen.at(i, j)) : 0;
    peak = bits > peak ? bits : peak;
  }
  peak = block_max(block, peak, eigen.peaks);
  const double scale = unit_scale(peak);
  double square = 0;
  for (int item = lane; item < n * n; item += count) {
    const int i = item / n, j = item % n;
    if (!kGiven) eigen.V[i * eigen.kPitch + j] = i == j ? 1 : 0;
    if (j > i) continue;
    double& a = eigen.at(i, j);
    a = i < w ? a * scale : 0;
    square += (i == j ? 1 : 2) * a * a;
  }
  for (int c = lane; kGiven && n > w && c < columns; c += count) eigen.V[w * eigen.kPitch + c] = 0;
  square = block_sum(block, square, eigen.sums[0]);

  int sweeps = 0;
  for (; peak < kInfinity && sweeps < kMaxSweeps; ++sweeps) {
    double off = 0;
    for (int item = lane; item < n * n; item += count) {
      const int i = item / n, j = item % n;
      if (j < i) off += 2 * eigen.at(i, j) * eigen.at(i, j);
    }
    off = block_sum(block, off, eigen.sums[1]);
    if (!(off > kOffDiagonal * kOffDiagonal * square)) break;
    sweep(block, n, kGiven ? columns : n, eigen);
  }

  const double nan = from_bits(kInfinity + 1), unit = peak < kInfinity ? 1 / scale : nan;
  for (int i = lane; i < w; i += count) {
    int place = 0;
    for (int j = 0; j < w; ++j) place += eigen.at(j, j) > eigen.at(i, i) || (eigen.at(j, j) == eigen.at(i, i) && j < i);
    if (!(peak < kInfinity)) place = i;
    eigen.values[place] = eigen.at(i, i) * unit;
    eigen.row[place] = i;
  }
  for (int item = lane; !(peak < kInfinity) && item < w * w; item += count) {
    eigen.V[item / w * eigen.kPitch + item % w] = nan;
  }
  block.sync();
  return sweeps;
}

}  // namespace rpg_fast
