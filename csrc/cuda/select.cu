#include <optional>

#include "../radix.h"
#include "tables.h"

namespace rpg_fast {
namespace {

template <class Key>
void select(const Tensor& counts, Selection<Key> selection) {
  const cudaStream_t stream = current_stream(counts);
  const int64_t bytes = selection.lay_out(nullptr);
  Tensor workspace = torch::stable::new_empty(counts, {bytes}, ScalarType::Byte);
  selection.lay_out(static_cast<uint8_t*>(workspace.mutable_data_ptr()));
  const size_t to_clear = sizeof(int64_t) * kBins * selection.problems();
  check_cuda("select_topk", cudaMemsetAsync(selection.histograms, 0, to_clear, stream));
  run_selection(
      selection, [&](const auto& kernel) { launch_on_tiles("select_topk", kernel, selection.tensors.tiles, stream); },
      [&](const auto& kernel) { launch_blocks("select_topk", kernel, selection.problems(), stream); });
}

Tensor select_topk_cuda(std::vector<Tensor> scores, Tensor counts, std::vector<int64_t> offsets, int64_t nbytes,
                        std::optional<Tensor> eligible, bool absolute, bool per_tensor) {
  check_selection("select_topk", scores, counts, offsets, nbytes, eligible, per_tensor);
  const torch::stable::accelerator::DeviceGuard guard(counts.get_device_index());
  Tensor bits = torch::stable::new_empty(counts, {nbytes}, ScalarType::Byte);
  auto* chosen = static_cast<uint8_t*>(bits.mutable_data_ptr());
  check_cuda("select_topk", cudaMemsetAsync(chosen, 0, nbytes, current_stream(counts)));
  TensorTable rows;
  bool has_double = false;
  for (size_t i = 0; i < scores.size(); ++i) {
    rows.add(scores[i], offsets[i]);
    has_double = has_double || scores[i].scalar_type() == ScalarType::Double;
  }
  const Tensors tensors = rows.upload(counts);
  if (tensors.tiles == 0) return bits;
  const auto* open = eligible ? static_cast<const uint8_t*>(eligible->const_data_ptr()) : nullptr;
  const auto* wanted = static_cast<const int64_t*>(counts.const_data_ptr());
  if (has_double) {
    select(counts, Selection<uint64_t>{tensors, open, chosen, wanted, absolute, per_tensor});
  } else {
    select(counts, Selection<uint32_t>{tensors, open, chosen, wanted, absolute, per_tensor});
  }
  return bits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rpg_fast, CUDA, m) { m.impl("select_topk", TORCH_BOX(&select_topk_cuda)); }

}  // namespace rpg_fast
