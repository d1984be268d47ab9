#include <cuda_runtime.h>

#include "../pieces.h"

namespace rpg_fast {
namespace {

template <class Piece>
__global__ void __launch_bounds__(Piece::kThreads) piece_kernel(const Piece piece) {
  extern __shared__ uint4 memory[];
  piece.run(CudaBlock{}, blockIdx.x, *reinterpret_cast<typename Piece::Work*>(memory));
}

/// One block a matrix.
template <class Piece>
void launch(const char* op, const Piece& piece, const Tensor& like) {
  if (piece.count() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const auto stream = static_cast<cudaStream_t>(current_cuda_stream(like.get_device_index()));
  constexpr int kMemory = sizeof(typename Piece::Work);
  cudaError_t error = cudaSuccess;
  if (kMemory > 48 * 1024) {
    error = cudaFuncSetAttribute(piece_kernel<Piece>, cudaFuncAttributeMaxDynamicSharedMemorySize, kMemory);
    STD_TORCH_CHECK(error == cudaSuccess, op, ": ", kMemory, " bytes of shared memory: ", cudaGetErrorString(error));
  }
  piece_kernel<<<static_cast<unsigned>(piece.count()), Piece::kThreads, kMemory, stream>>>(piece);
  error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

}  // namespace
}  // namespace rpg_fast

#include "../piece_ops.h"

STABLE_TORCH_LIBRARY_IMPL(rpg_fast, CUDA, m) {
  m.impl("filter_open_", TORCH_BOX(&rpg_fast::filter_open_));
  m.impl("filter_range_", TORCH_BOX(&rpg_fast::filter_range_));
  m.impl("filter_principal_", TORCH_BOX(&rpg_fast::filter_principal_));
  m.impl("filter_conclude_", TORCH_BOX(&rpg_fast::filter_conclude_));
  m.impl("small_spectrum_", TORCH_BOX(&rpg_fast::small_spectrum_));
  m.impl("small_eigh_", TORCH_BOX(&rpg_fast::small_eigh_));
}
