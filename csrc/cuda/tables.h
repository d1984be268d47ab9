#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>

#include "../common.h"
#include "../tiles.h"

namespace rpg_fast {

/// int64 [n] on the device of `like`. Kernel arguments carry the values: no copy from the host, so it may be captured.
Tensor device_table(Tensor like, std::vector<int64_t> values);

inline cudaStream_t current_stream(const Tensor& like) {
  return static_cast<cudaStream_t>(current_cuda_stream(like.get_device_index()));
}

inline void check_cuda(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

inline Storage storage_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Storage::kFloat32;
    case ScalarType::Double:
      return Storage::kFloat64;
    case ScalarType::Half:
      return Storage::kFloat16;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    default:
      return Storage::kBytes;
  }
}

/// Collects the rows of a table of tensors whose bits start at `offset`.
class TensorTable {
 public:
  /// A tensor with other strides, or that starts in the middle of a vector, is copied; the copy lives as long as this.
  void add(const Tensor& tensor, int64_t offset) {
    Tensor plain = torch::stable::contiguous(tensor);
    if (reinterpret_cast<uintptr_t>(plain.const_data_ptr()) % kAlignment != 0) plain = torch::stable::clone(plain);
    add(plain.const_data_ptr(), tensor.numel(), offset, storage_of(tensor));
    tensors_.push_back(plain);
  }

  void add(const void* data, int64_t numel, int64_t offset, Storage storage) {
    rows_.push_back({static_cast<int64_t>(reinterpret_cast<intptr_t>(data)), numel, tiles_, offset, storage});
    tiles_ += (numel + kTile - 1) / kTile;
  }

  /// Moves the rows to the device of `like`.
  Tensors upload(const Tensor& like);

 private:
  std::vector<TensorRow> rows_;
  std::vector<Tensor> tensors_;
  Tensor table_;
  int64_t tiles_ = 0;
};

/// The multiprocessors of the current device.
inline int64_t multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

constexpr int kThreadsPerMultiprocessor = 1024;  // at least; enough loads on their way, and 64 registers for each

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, kThreadsPerMultiprocessor / Kernel::kThreads)
    tile_kernel(const Kernel kernel) {
  __shared__ typename Kernel::Work work;
  kernel.run(CudaBlock{}, blockIdx.x, gridDim.x, work);
}

/// A kernel on `blocks` blocks; none is no launch.
template <class Kernel>
void launch_blocks(const char* op, const Kernel& kernel, int64_t blocks, cudaStream_t stream) {
  if (blocks == 0) return;
  tile_kernel<<<static_cast<unsigned>(blocks), Kernel::kThreads, 0, stream>>>(kernel);
  check_cuda(op, cudaGetLastError());
}

/// A kernel whose blocks share all tiles: as many as fit at a time.
template <class Kernel>
void launch_on_tiles(const char* op, const Kernel& kernel, int64_t tiles, cudaStream_t stream) {
  int resident = 1;
  check_cuda(op, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, tile_kernel<Kernel>, Kernel::kThreads, 0));
  launch_blocks(op, kernel, std::min(tiles, resident * multiprocessors()), stream);
}

}  // namespace rpg_fast
