#pragma once

// The ops themselves, for the back end that defines `launch(op, piece, like)`.

#include "pieces.h"

namespace rpg_fast {
namespace {

void filter_open_(Tensor ledger, Tensor stages, Tensor settled, Tensor aims, Tensor coefficients, Tensor moments,
                  Tensor tile_starts, Tensor orders, Tensor norms, Tensor scales, Tensor target, Tensor windows,
                  Tensor grid, Tensor table) {
  const Rounds rounds("filter_open_", ledger, stages, settled, aims, coefficients, moments, tile_starts, orders, target,
                      grid, table);
  launch("filter_open_", OpenWindow(rounds, norms, scales, windows, ledger), ledger);
}

void filter_range_(Tensor Q, Tensor Z, Tensor orders, Tensor row_starts, Tensor stages, double floor) {
  launch("filter_range_", RangeBasis(Q, Z, orders, row_starts, stages, floor), Q);
}

void filter_principal_(Tensor Q, Tensor ledger, Tensor Z, Tensor orders, Tensor row_starts, Tensor stages,
                       double floor) {
  launch("filter_principal_", PrincipalBasis(Q, ledger, Z, orders, row_starts, stages, floor), Q);
}

void filter_conclude_(Tensor ledger, Tensor stages, Tensor settled, Tensor aims, Tensor coefficients, Tensor Z,
                      Tensor Q, Tensor images, Tensor traces, Tensor tile_starts, Tensor orders, Tensor row_starts,
                      Tensor target, Tensor grid, Tensor table) {
  const Rounds rounds("filter_conclude_", ledger, stages, settled, aims, coefficients, traces, tile_starts, orders,
                      target, grid, table);
  launch("filter_conclude_", ConcludeWindow(rounds, Z, Q, images, orders, row_starts, stages), ledger);
}

void small_spectrum_(Tensor ledger, Tensor projector, Tensor members, Tensor pairs, Tensor tiles, Tensor tile_starts,
                     Tensor orders, Tensor offsets, Tensor norms, Tensor scales, Tensor target) {
  launch("small_spectrum_",
         SmallSpectrum(ledger, projector, members, pairs, tiles, tile_starts, orders, offsets, norms, scales, target),
         ledger);
}

void small_eigh_(Tensor values, Tensor vectors, Tensor matrices) {
  if (matrices.dim() == 3 && matrices.sizes()[2] <= 32) {
    launch("small_eigh_", SmallEigh<32>(values, vectors, matrices), matrices);
  } else {
    launch("small_eigh_", SmallEigh<kSmall>(values, vectors, matrices), matrices);
  }
}

}  // namespace
}  // namespace rpg_fast
