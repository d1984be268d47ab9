#include "tables.h"

namespace rpg_fast {
namespace {

constexpr int kValuesPerLaunch = 480;  // with the other arguments below the 4 KiB that any driver takes as parameters

struct Values {
  int64_t value[kValuesPerLaunch];
};

__global__ void __launch_bounds__(kValuesPerLaunch) table_kernel(const Values values, int count, int64_t* table) {
  if (static_cast<int>(threadIdx.x) < count) table[threadIdx.x] = values.value[threadIdx.x];
}

}  // namespace

Tensor device_table(Tensor like, std::vector<int64_t> values) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const auto stream = static_cast<cudaStream_t>(current_cuda_stream(like.get_device_index()));
  const int64_t count = static_cast<int64_t>(values.size());
  Tensor table = torch::stable::new_empty(like, {count}, ScalarType::Long);  // [n]
  auto* out = static_cast<int64_t*>(table.mutable_data_ptr());
  for (int64_t first = 0; first < count; first += kValuesPerLaunch) {
    const int length = static_cast<int>(count - first < kValuesPerLaunch ? count - first : kValuesPerLaunch);
    Values part;
    for (int i = 0; i < length; ++i) part.value[i] = values[first + i];
    table_kernel<<<1, kValuesPerLaunch, 0, stream>>>(part, length, out + first);
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "device_table: ", cudaGetErrorString(error));
  }
  return table;
}

Tensors TensorTable::upload(const Tensor& like) {
  std::vector<int64_t> values(kRowColumns * rows_.size());
  std::memcpy(values.data(), rows_.data(), values.size() * sizeof(int64_t));
  table_ = device_table(like, values);
  return {static_cast<const int64_t*>(table_.const_data_ptr()), static_cast<int64_t>(rows_.size()), tiles_};
}

STABLE_TORCH_LIBRARY_IMPL(rpg_fast, CUDA, m) { m.impl("device_table", TORCH_BOX(&device_table)); }

}  // namespace rpg_fast
