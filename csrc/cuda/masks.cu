#include <cuda_runtime.h>

#include "../common.h"
#include "../masks.h"

namespace rpg_fast {
namespace {

constexpr int kThreads = 1024;
constexpr int kSegmentsPerLaunch = 240;  // with the pointers just below the 4 KiB that any driver takes as parameters

struct Segments {
  int64_t offset[kSegmentsPerLaunch];
  int64_t numel[kSegmentsPerLaunch];
};

/// One block a segment.
__global__ void __launch_bounds__(kThreads)
    popcount_kernel(const uint8_t* __restrict__ bits, const Segments segments, int64_t* __restrict__ counts) {
  __shared__ int64_t scratch[kThreads / CudaBlock::kWarp];
  const int64_t ones = count_ones(CudaBlock{}, bits + segments.offset[blockIdx.x], segments.numel[blockIdx.x], scratch);
  if (threadIdx.x == 0) counts[blockIdx.x] = ones;
}

Tensor popcount_cuda(Tensor bits, std::vector<int64_t> offsets, std::vector<int64_t> numels) {
  check_segments("popcount", bits, offsets, numels);
  const torch::stable::accelerator::DeviceGuard guard(bits.get_device_index());
  const auto stream = static_cast<cudaStream_t>(current_cuda_stream(bits.get_device_index()));
  const int64_t batch = static_cast<int64_t>(offsets.size());
  Tensor counts = torch::stable::new_empty(bits, {batch}, ScalarType::Long);  // [B]
  auto* out = static_cast<int64_t*>(counts.mutable_data_ptr());
  const auto* in = static_cast<const uint8_t*>(bits.const_data_ptr());
  for (int64_t first = 0; first < batch; first += kSegmentsPerLaunch) {
    const int blocks = static_cast<int>(batch - first < kSegmentsPerLaunch ? batch - first : kSegmentsPerLaunch);
    Segments segments;
    for (int i = 0; i < blocks; ++i) {
      segments.offset[i] = offsets[first + i];
      segments.numel[i] = numels[first + i];
    }
    popcount_kernel<<<blocks, kThreads, 0, stream>>>(in, segments, out + first);
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "popcount: ", cudaGetErrorString(error));
  }
  return counts;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rpg_fast, CUDA, m) { m.impl("popcount", TORCH_BOX(&popcount_cuda)); }

}  // namespace rpg_fast
