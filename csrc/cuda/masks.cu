#include "../masks.h"
#include "tables.h"

namespace rpg_fast {
namespace {

Tensor pack_cuda(std::vector<Tensor> masks, std::vector<int64_t> offsets, int64_t nbytes) {
  check_length("pack", "offsets", offsets.size(), masks.size());
  STD_TORCH_CHECK(nbytes >= 0, "pack: nbytes must not be negative, got ", nbytes);
  const torch::stable::accelerator::DeviceGuard guard(masks[0].get_device_index());
  TensorTable rows;
  for (size_t i = 0; i < masks.size(); ++i) {
    STD_TORCH_CHECK(on_same_device(masks[i], masks[0]) && masks[i].scalar_type() == ScalarType::Bool, "pack: masks[", i,
                    "] must be bool where masks[0] is, got ", describe(masks[i]));
    check_segment("pack", i, offsets[i], masks[i].numel(), nbytes);
    rows.add(masks[i], offsets[i]);
  }
  const cudaStream_t stream = current_stream(masks[0]);
  Tensor bits = torch::stable::new_empty(masks[0], {nbytes}, ScalarType::Byte);
  auto* out = static_cast<uint8_t*>(bits.mutable_data_ptr());
  check_cuda("pack", cudaMemsetAsync(out, 0, nbytes, stream));
  const Tensors tensors = rows.upload(bits);
  launch_on_tiles("pack", PackTiles{tensors, out}, tensors.tiles, stream);
  return bits;
}

std::vector<Tensor> unpack_cuda(Tensor bits, std::vector<int64_t> offsets, std::vector<int64_t> numels) {
  check_segments("unpack", bits, offsets, numels);
  const torch::stable::accelerator::DeviceGuard guard(bits.get_device_index());
  TensorTable rows;
  std::vector<Tensor> masks;
  for (size_t i = 0; i < numels.size(); ++i) {
    masks.push_back(torch::stable::new_empty(bits, {numels[i]}, ScalarType::Bool));
    rows.add(masks.back().mutable_data_ptr(), numels[i], offsets[i], Storage::kBytes);
  }
  const auto* in = static_cast<const uint8_t*>(bits.const_data_ptr());
  const Tensors tensors = rows.upload(bits);
  launch_on_tiles("unpack", UnpackTiles{tensors, in}, tensors.tiles, current_stream(bits));
  return masks;
}

Tensor popcount_cuda(Tensor bits, std::vector<int64_t> offsets, std::vector<int64_t> numels) {
  check_segments("popcount", bits, offsets, numels);
  const torch::stable::accelerator::DeviceGuard guard(bits.get_device_index());
  const cudaStream_t stream = current_stream(bits);
  TensorTable rows;
  for (size_t i = 0; i < numels.size(); ++i) rows.add(nullptr, numels[i], offsets[i], Storage::kBytes);
  const auto batch = static_cast<int64_t>(offsets.size());
  Tensor counts = torch::stable::new_empty(bits, {batch}, ScalarType::Long);  // [B]
  auto* out = static_cast<int64_t*>(counts.mutable_data_ptr());
  check_cuda("popcount", cudaMemsetAsync(out, 0, batch * sizeof(int64_t), stream));
  const auto* in = static_cast<const uint8_t*>(bits.const_data_ptr());
  const Tensors tensors = rows.upload(bits);
  launch_on_tiles("popcount", PopcountTiles{tensors, in, out}, tensors.tiles, stream);
  return counts;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rpg_fast, CUDA, m) {
  m.impl("pack", TORCH_BOX(&pack_cuda));
  m.impl("unpack", TORCH_BOX(&unpack_cuda));
  m.impl("popcount", TORCH_BOX(&popcount_cuda));
}

}  // namespace rpg_fast
