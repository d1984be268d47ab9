#pragma once

// The Block policy: what a kernel template may ask of the threads that run it together. Every policy has
//   lane(), count()        this thread's number and how many there are
//   sync()                 a barrier that also orders memory
//   kWarp                  threads that shuffle without a barrier: 32 on CUDA, 1 on the host
//   shuffle_xor(value, m)  the value of the warp's thread `lane ^ m`
// CudaBlock runs kernels under nvcc; SerialBlock and ThreadBlock run the same templates on the host.

#ifdef __CUDACC__
#define RPG_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RPG_FAST_HOST_DEVICE inline __attribute__((always_inline))
#include <barrier>
#include <thread>
#include <vector>
#endif

namespace rpg_fast {

struct SerialBlock {
  static constexpr int kWarp = 1;
  RPG_FAST_HOST_DEVICE int lane() const { return 0; }
  RPG_FAST_HOST_DEVICE int count() const { return 1; }
  RPG_FAST_HOST_DEVICE void sync() const {}
  template <class T>
  RPG_FAST_HOST_DEVICE T shuffle_xor(T value, int) const {
    return value;
  }
};

#ifdef __CUDACC__
struct CudaBlock {
  static constexpr int kWarp = 32;
  __device__ __forceinline__ int lane() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int count() const { return static_cast<int>(blockDim.x); }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  template <class T>
  __device__ __forceinline__ T shuffle_xor(T value, int mask) const {
    return __shfl_xor_sync(0xffffffffu, value, mask);
  }
};
#else
class ThreadBlock {
 public:
  static constexpr int kWarp = 1;
  ThreadBlock(int lane, int count, std::barrier<>& barrier) : lane_(lane), count_(count), barrier_(&barrier) {}
  int lane() const { return lane_; }
  int count() const { return count_; }
  void sync() const { barrier_->arrive_and_wait(); }
  template <class T>
  T shuffle_xor(T value, int) const {
    return value;
  }

 private:
  int lane_, count_;
  std::barrier<>* barrier_;
};

/// kernel(Block) on `count` threads that share one barrier.
template <class Block = ThreadBlock, class Kernel>
void launch_threads(int count, const Kernel& kernel) {
  std::barrier<> barrier(count);
  std::vector<std::thread> threads;
  threads.reserve(count);
  for (int lane = 0; lane < count; ++lane) {
    threads.emplace_back([&, lane] {
      kernel(Block(lane, count, barrier));
      barrier.arrive_and_drop();  // nobody waits for a thread that took another way, as under the test of the barriers
    });
  }
  for (std::thread& thread : threads) thread.join();
}
#endif

/// combine(a, b) over the values of all threads of the block, known to every thread. `count()` is a multiple of kWarp;
/// `scratch`, shared by the block, holds count() / kWarp values and may be reused after the next sync().
template <class Block, class T, class Combine>
RPG_FAST_HOST_DEVICE T block_reduce(const Block& block, T value, T* scratch, const Combine& combine) {
  for (int mask = Block::kWarp / 2; mask > 0; mask /= 2) value = combine(value, block.shuffle_xor(value, mask));
  if (block.lane() % Block::kWarp == 0) scratch[block.lane() / Block::kWarp] = value;
  block.sync();
  T result = scratch[0];
  for (int warp = 1; warp < block.count() / Block::kWarp; ++warp) result = combine(result, scratch[warp]);
  return result;
}

template <class Block, class T>
RPG_FAST_HOST_DEVICE T block_sum(const Block& block, T value, T* scratch) {
  return block_reduce(block, value, scratch, [](T a, T b) { return a + b; });
}

template <class Block, class T>
RPG_FAST_HOST_DEVICE T block_max(const Block& block, T value, T* scratch) {
  return block_reduce(block, value, scratch, [](T a, T b) { return a > b ? a : b; });
}

}  // namespace rpg_fast
