#pragma once

// One round of the filtered power iteration for one matrix by one block: where its window lies, and what was seen in
// it. The meaning, with all reasons, is in `rpg_fast/filtered.py`; the names are the same here.

#include <cmath>

#include "basis.h"

namespace rpg_fast {

constexpr double kNarrowest = 1e-5, kWidest = 0.3;
constexpr double kFirst = 5.0, kSearch = 0.3, kFill = 0.45, kDensity = 0.026, kLeak = 2e-5;
constexpr double kBlur = 1e-8, kBlurred = 2e-12, kLoss = 2e-5, kAbsolute = 1e-7;
constexpr double kRoundingOfSums = 3e-6;
constexpr int kRoom = 12;
constexpr int kSumParts = 32;
constexpr int kTraces = 3;  // sums that a kernel leaves of a tile

/// What is known of a matrix from round to round: a row of a float64 tensor. Energies and eigenvalues are those of G,
/// of trace 1; the kernels see scale * G.
struct Ledger {
  double tau, half;  // the window of the next round; once resolved, of the next call
  double used_half;  // what the table made of half
  double k, e;       // -1 and 1 while it is open
  double start, low, high, low_gap, high_gap, last, last_gap, restarted;  // `Search`
  double scale, second, third, fourth;                                    // `Spectrum.moments`
  double found, seen;                                                     // of the principal basis
};
constexpr int kLedgerColumns = sizeof(Ledger) / sizeof(double);

/// The table of steps and what the kernels of a round take from it.
struct Steps {
  const double* grid;   // [rows] half-widths, ascending
  const double* table;  // [rows, depth, 3]
  int rows, depth;
};

struct Aim {
  float* aims;          // [2] tau and 1 / u, in the scale of the kernels
  float* coefficients;  // [depth, 3]
  int* stages;          // how many of them are to be composed; 0: no round
  int* settled;         // how many they were in the round that resolved the matrix
};

RPG_FAST_HOST_DEVICE double clamp(double x, double low, double high) { return fmin(fmax(x, low), high); }

/// The sums over a matrix's tiles [first, last) of `traces` [T, kTraces], known to every thread. Contains a sync();
/// `parts` [kSumParts * kTraces] may be reused after the next one.
template <class Block>
RPG_FAST_HOST_DEVICE void sum_tiles(const Block& block, const float* traces, const int* range, double* parts,
                                    double* sums) {
  for (int item = block.lane(); item < kSumParts * kTraces; item += block.count()) {
    double sum = 0;
    for (int64_t tile = range[0] + item / kTraces; tile < range[1]; tile += kSumParts) {
      sum += static_cast<double>(traces[tile * kTraces + item % kTraces]);
    }
    parts[item] = sum;
  }
  block.sync();
  for (int i = 0; i < kTraces; ++i) {
    sums[i] = 0;
    for (int part = 0; part < kSumParts; ++part) sums[i] += parts[part * kTraces + i];
  }
}

/// The step for the ledger's window. One thread.
RPG_FAST_HOST_DEVICE void choose_step(Ledger& ledger, int m, const Steps& steps, const Aim& aim) {
  const double tau = ledger.tau, square = tau * tau;
  const double terms[] = {ledger.fourth, -4 * tau * ledger.third, 6 * square * ledger.second, -4 * tau * square,
                          m * square * square};
  double sum = 0, size = 0;
  for (const double term : terms) {
    sum += term;
    size += fabs(term);
  }
  const double bound = 1.01 * sqrt(sqrt(fmax(sum, 0.0) + 1e-5 * size));
  const double wanted = clamp(ledger.half / bound, kNarrowest, kWidest);
  int row = 0;
  for (int beyond = steps.rows; beyond - row > 1;) {
    const int middle = (row + beyond) / 2;
    (steps.grid[middle] <= wanted ? row : beyond) = middle;
  }
  ledger.used_half = steps.grid[row] * bound;
  aim.aims[0] = static_cast<float>(tau * ledger.scale);
  aim.aims[1] = static_cast<float>(1 / (bound * ledger.scale));
  int stages = 0;
  for (int s = 0; s < steps.depth; ++s) {
    const double* abc = steps.table + (row * steps.depth + s) * 3;
    for (int i = 0; i < 3; ++i) aim.coefficients[3 * s + i] = static_cast<float>(abc[i]);
    if (abc[1] != 0 || abc[2] != 0) stages = s + 1;
  }
  *aim.stages = stages;
}

/// `Search.begin`, from the traces of G^2, G^3 and G^4 and the last call's window [2]; zeros: from scratch. A matrix
/// with *aim.stages == 0 or a norm that is zero or not finite takes no part.
template <class Block>
RPG_FAST_HOST_DEVICE void open_window(const Block& block, const float* moments, const int* tiles, int m, double norm,
                                      double scale, double target, const double* window, const Steps& steps,
                                      double* parts, Ledger& ledger, const Aim& aim) {
  double sums[kTraces];
  sum_tiles(block, moments, tiles, parts, sums);
  if (block.lane() != 0) return;
  *aim.settled = 0;
  const double nan = from_bits(kInfinity + 1);
  const bool finite = magnitude_bits(norm) < kInfinity, there = *aim.stages != 0 && finite && norm > 0;
  const double second = sums[0] / (scale * scale), third = sums[1] / (scale * scale * scale);
  const double fourth = sums[2] / (scale * scale * scale * scale);
  const double aimed = fmax(target, 1e-9), low = log(aimed / m);
  const double high = fmax(log(1.01 * sqrt(sqrt(fourth))), low);
  const double start = fmin(log(kFirst * aimed / m), high - 0.35);
  const bool cold = !(window[1] > 0 && window[0] > 0);
  const double tau = cold ? exp(start) : window[0];
  ledger = {tau,
            cold ? kSearch * tau : window[1],
            0,
            finite && norm == 0 ? 0.0 : -1,
            finite ? (norm == 0 ? 0.0 : 1.0) : nan,
            start,
            low,
            high,
            nan,
            nan,
            nan,
            nan,
            0,
            scale,
            second,
            third,
            fourth,
            0,
            0};
  if (there) {
    choose_step(ledger, m, steps, aim);
  } else {
    ledger.tau = ledger.half = 0;
    *aim.stages = 0;
  }
}

/// What the window shows, for `advance`.
struct View {
  double soft_tail, density;
  int edge;
};

/// `Search.advance`: the next window of a matrix that is still open. One thread.
RPG_FAST_HOST_DEVICE void advance(const View& view, double target, Ledger& ledger) {
  const double tau = ledger.tau, half = ledger.used_half, x = log(tau);
  const double soft_tail = fmax(view.soft_tail, 1e-12), gap = log(soft_tail / fmax(target, 1e-9));
  (gap > 0 ? ledger.high : ledger.low) = x;
  (gap > 0 ? ledger.high_gap : ledger.low_gap) = gap;
  const double low = ledger.low, high = ledger.high, low_gap = ledger.low_gap, high_gap = ledger.high_gap;

  const double secant = (gap - ledger.last_gap) / (x - ledger.last);
  const bool usable = secant > 0 && magnitude_bits(secant) < kInfinity;
  const double slope = clamp(usable ? secant : tau * tau * view.density / soft_tail, 0.5, 60);
  const double step = x - gap / slope;

  double next;
  if (low_gap == low_gap && high_gap == high_gap) {
    const double width = high - low, part = clamp(low_gap / (low_gap - high_gap), 0.1, 0.9);
    next = clamp(low < step && step < high ? step : low + part * width, low + 0.02 * width, high - 0.02 * width);
  } else if (fabs(gap) > 1 && fabs(x - ledger.start) > 0.5 && low < ledger.start && ledger.start < high &&
             ledger.restarted == 0) {
    next = ledger.start;
    ledger.restarted = 1;
  } else {
    next = fmin(fmax(clamp(step, x - 1.5, x + 1.5), low), high);
  }
  if (view.edge < 0) next = fmin(next, log(fmax(tau - 0.9 * half, tau / 10)));
  if (view.edge > 0) next = fmax(next, log(tau + 0.9 * half));
  ledger.last = x;
  ledger.last_gap = gap;
  ledger.tau = exp(next);
  ledger.half = fmin(kFill / 2 * kWidth / fmax(view.density, 1e-300), kSearch * ledger.tau);
}

struct WindowWork {
  Eigen<kWidth> eigen;
  double G[kWidth * kPitch], Y[kWidth * kPitch];  // Q^T G Q and Q^T Y Q, lower triangles
  double partials[kTiles * kParts * kQuad * kQuad];
  double parts[kSumParts * kTraces];
  double rows[kWidth];     // of <H_P, H_G>
  double crossed[kWidth];  // partial sums of <Y Q, G Q>
  double mixed[kWidth];    // partial sums of ||Y Q - Q Q^T Y Q||_F^2
  int best;                // how many of the window belong to the k leading eigenvectors; -1: open
};

/// The thin matrices [m, w] of a round, in the scale of the kernels.
struct Images {
  const float *Q, *GQ, *YQ;
  int m, w;
};

/// The sums that `conclude_window` needs of the window, in the scale of G, into `rows`, `crossed` and `mixed`; with
/// sync()s.
template <class Block>
RPG_FAST_HOST_DEVICE void contract(const Block& block, const Images& images, double scale, int found,
                                   WindowWork& work) {
  const auto [Q, GQ, YQ, m, w] = images;
  lower_product(block, Q, GQ, m, w, work.partials, work.G);
  lower_product(block, Q, YQ, m, w, work.partials, work.Y);
  for (int part = block.lane(); part < kWidth * kWidth; part += block.count()) {
    double crossed = 0, mixed = 0;
    for (int64_t i = part; i < static_cast<int64_t>(m) * w; i += kWidth * kWidth) {
      const double y = static_cast<double>(YQ[i]);
      crossed += y * static_cast<double>(GQ[i]);
      const int column = static_cast<int>(i % w);
      const float* row = Q + (i - column);
      double rest = y;
      for (int a = 0; a < found; ++a) {
        rest -= static_cast<double>(row[a]) * work.Y[a >= column ? a * kPitch + column : column * kPitch + a];
      }
      if (column < found) mixed += rest * rest;
    }
    work.partials[part] = crossed / scale;
    work.partials[kWidth * kWidth + part] = mixed;
  }
  block.sync();
  for (int i = block.lane(); i < kWidth; i += block.count()) {
    work.crossed[i] = work.mixed[i] = 0;
    for (int j = 0; j < kWidth; ++j) {
      work.crossed[i] += work.partials[i * kWidth + j];
      work.mixed[i] += work.partials[(kWidth + i) * kWidth + j];
    }
  }
  for (int i = block.lane(); i < found; i += block.count()) {
    double sum = 0;
    for (int j = 0; j <= i; ++j) {
      const double G = work.G[i * kPitch + j] / scale, P = ((i == j) + work.Y[i * kPitch + j]) / 2;
      sum += (i == j ? 1 : 2) * P * G;
      work.eigen.at(i, j) = G;
    }
    work.rows[i] = sum;
  }
}

/// `conclude_round` without Z: the rank rule. One thread. Writes k, e and the next window if that resolves the matrix,
/// and the window of the next round if not; returns how many of the window belong to the k leading ones, or -1.
RPG_FAST_HOST_DEVICE int apply_rank_rule(const double* traces, int m, int w, double target, const WindowWork& work,
                                         Ledger& ledger) {
  const double trace_Y = traces[0], energy_Y = traces[1] / ledger.scale, inside = traces[2];
  const double tau = ledger.tau, half = ledger.used_half, *ritz = work.eigen.values;
  const int found = static_cast<int>(ledger.found);
  double trace = (m + trace_Y) / 2, e_above = 1 - (1 + energy_Y) / 2, mixed = 0;
  for (int part = 0; part < kWidth; ++part) {
    e_above += work.crossed[part];
    mixed += work.mixed[part];
  }
  for (int i = 0; i < found; ++i) {
    trace -= (1 + work.Y[i * kPitch + i]) / 2;
    e_above += work.G[i * kPitch + i] / ledger.scale - work.rows[i];
  }
  const double k_above = rint(trace);

  int best = -1;
  double e = 0, nearest = 0, tail = e_above;
  for (int j = 0; j <= found && k_above + j < m; ++j) {
    if (j > 0) tail -= ritz[j - 1];
    const double distance = fabs(tail - target);
    if (j > 0 && distance > nearest) continue;  // the larger j on a tie
    best = j;
    nearest = distance;
    e = tail;
  }
  const double below = m - k_above - found;
  const bool lower_known = best < found || below <= 1 || e <= target || 2 * (e - target) <= e / below;
  const bool upper_known = best > 0 || k_above == 0 || e >= target || 2 * (target - e) <= tau;
  const bool clear = found <= w - kRoom && fabs(trace - k_above) <= 0.1 && inside - ledger.seen <= kLeak && best >= 0;
  const bool resolved = clear && lower_known && upper_known;
  e = clamp(e, 0, 1);
  const bool sharp = mixed <= fmax(kBlur * e * (1 - e) / tau, kBlurred * m) &&
                     inside - ledger.seen <= (kLoss * e + kAbsolute) / (3 * (tau + half)) + kRoundingOfSums * inside;
  const double last_in = best > 0 ? ritz[best - 1] : tau + half, first_out = best < found ? ritz[best] : tau - half;
  const double boundary = (last_in + first_out) / 2;
  if (resolved && sharp) {
    ledger.tau = boundary;
    ledger.half = fmin(half * clamp(kFill * w / (found > 0 ? found : 1), 0.4, 1.4), boundary / 2);
    ledger.k = k_above + best;
    ledger.e = e;
    return best;
  }
  const int edge = !clear ? 0 : !lower_known ? -1 : !upper_known ? 1 : 0;
  advance({(1 - energy_Y) / 2, inside / (kDensity * half), edge}, target, ledger);
  if (resolved) {
    ledger.tau = boundary;
    ledger.half = half / 2;
  }
  return -1;
}

/// A round's end for a matrix that takes part, *aim.stages > 0. Resolved: k, e and Z [m, w], with which the projector
/// on the k leading eigenvectors is (I + Y) / 2 - Z Q^T - Q Z^T; *aim.stages moves to *aim.settled. Still open: the
/// next window.
template <class Block>
RPG_FAST_HOST_DEVICE void conclude_window(const Block& block, const Images& images, const float* traces,
                                          const int* tiles, double target, const Steps& steps, WindowWork& work,
                                          Ledger& ledger, const Aim& aim, float* Z) {
  const auto [Q, GQ, YQ, m, w] = images;
  const int found = static_cast<int>(ledger.found);
  double sums[kTraces];
  sum_tiles(block, traces, tiles, work.parts, sums);
  contract(block, images, ledger.scale, found, work);
  solve(block, found, work.eigen);
  if (block.lane() == 0) {
    work.best = apply_rank_rule(sums, m, w, target, work, ledger);
    if (work.best >= 0) {
      *aim.settled = *aim.stages;
      *aim.stages = 0;
    } else {
      choose_step(ledger, m, steps, aim);
    }
  }
  block.sync();
  if (work.best < 0) return;
  double* S = work.eigen.A;  // (I - H_P - R L R^T) / 2, L the leading ones
  for (int item = block.lane(); item < w * w; item += block.count()) {
    const int i = item / w, j = item % w;
    double sum = 0;
    if (i < found && j < found) {
      sum = ((i == j) - work.Y[i >= j ? i * kPitch + j : j * kPitch + i]) / 2;
      for (int a = 0; a < work.best; ++a) sum -= work.eigen.vector(a)[i] * work.eigen.vector(a)[j];
    }
    S[i * kPitch + j] = sum / 2;
  }
  block.sync();
  thin_product(block, Q, S, YQ, m, w, Z);
}

}  // namespace rpg_fast
