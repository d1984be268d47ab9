#include <memory>

#include "../pieces.h"
#include "elements.h"

namespace rpg_fast {
namespace {

template <class Piece>
void launch(const char*, const Piece& piece, const Tensor&) {
  parallel_items(piece.count(), [&](int64_t item) {
    const auto work = std::make_unique<typename Piece::Work>();
    piece.run(SerialBlock{}, item, *work);
  });
}

}  // namespace
}  // namespace rpg_fast

#include "../piece_ops.h"

STABLE_TORCH_LIBRARY_IMPL(rpg_fast, CPU, m) {
  m.impl("filter_open_", TORCH_BOX(&rpg_fast::filter_open_));
  m.impl("filter_range_", TORCH_BOX(&rpg_fast::filter_range_));
  m.impl("filter_principal_", TORCH_BOX(&rpg_fast::filter_principal_));
  m.impl("filter_conclude_", TORCH_BOX(&rpg_fast::filter_conclude_));
  m.impl("small_spectrum_", TORCH_BOX(&rpg_fast::small_spectrum_));
  m.impl("small_eigh_", TORCH_BOX(&rpg_fast::small_eigh_));
}
