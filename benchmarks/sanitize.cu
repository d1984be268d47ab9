// The device templates of csrc in CUDA kernels without torch, for compute-sanitizer to watch: awkward sizes,
// allocations that end where the data does, results compared with those of the same templates on the host. Exits with 1
// on a wrong result, with 2 if CUDA fails.
//
//   nvcc -std=c++20 -arch=native -lineinfo -I csrc benchmarks/sanitize.cu -o sanitize && compute-sanitizer ./sanitize
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "jacobi.h"
#include "masks.h"

namespace {

using namespace rpg_fast;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

/// An allocation of its own on the device, as long as its content.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count) : count_(count) {
    if (count > 0) check(cudaMalloc(&data_, count * sizeof(T)), "cudaMalloc");
    if (count > 0) check(cudaMemset(data_, 0xff, count * sizeof(T)), "cudaMemset");  // NaN, or -1
  }
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
    if (count_ > 0) check(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }

  T* data() { return data_; }
  std::vector<T> read() const {
    std::vector<T> values(count_);
    if (count_ > 0) check(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t count_;
};

void finish(const char* what) {
  check(cudaGetLastError(), what);
  check(cudaDeviceSynchronize(), what);
}

// ---- masks.h
// ---------------------------------------------------------------------------------------------------------

__global__ void count_kernel(const uint8_t* bits, int64_t numel, int64_t* counts) {
  __shared__ int64_t scratch[1024 / CudaBlock::kWarp];
  counts[threadIdx.x] = count_ones(CudaBlock{}, bits, numel, scratch);
}

int count_failures() {
  std::mt19937 random(0);
  int failures = 0;
  for (const int64_t numel : {0, 1, 7, 8, 9, 63, 64, 65, 127, 1023, 1024, 1025, 40000}) {
    for (const int misalignment : {0, 1, 3, 7}) {
      std::vector<uint8_t> bytes(misalignment + (numel + 7) / 8);
      std::generate(bytes.begin(), bytes.end(), [&] { return static_cast<uint8_t>(random()); });
      int64_t scratch[1];
      const int64_t want = count_ones(SerialBlock{}, bytes.data() + misalignment, numel, scratch);
      Buffer<uint8_t> bits(bytes);
      for (const int threads : {32, 96, 1024}) {
        Buffer<int64_t> counts(threads);
        count_kernel<<<1, threads>>>(bits.data() + misalignment, numel, counts.data());
        finish("count_ones");
        for (const int64_t got : counts.read()) failures += got != want;
      }
    }
  }
  return failures;
}

// ---- jacobi.h
// --------------------------------------------------------------------------------------------------------

/// One block a matrix [w, w]: values [w], vectors as rows [w, w].
template <int kMax>
__global__ void eigen_kernel(const double* matrices, int w, double* values, double* vectors) {
  extern __shared__ char memory[];
  auto& eigen = *reinterpret_cast<Eigen<kMax>*>(memory);
  const CudaBlock block;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * w;
  for (int i = block.lane(); i < w * w; i += block.count()) eigen.at(i / w, i % w) = matrices[first * w + i];
  solve(block, w, eigen);
  for (int i = block.lane(); i < w; i += block.count()) values[first + i] = eigen.values[i];
  for (int i = block.lane(); i < w * w; i += block.count()) vectors[first * w + i] = eigen.vector(i / w)[i % w];
}

/// Random, rank one, identity, zero, huge, tiny and NaN, one after another.
std::vector<double> hostile_matrices(int w, int count) {
  std::mt19937 random(w);
  std::normal_distribution<double> normal;
  std::vector<double> all;
  for (int kind = 0; kind < count; ++kind) {
    std::vector<double> A(w * w), x(w);
    for (double& value : x) value = normal(random);
    for (int i = 0; i < w; ++i) {
      for (int j = 0; j <= i; ++j) {
        const double values[] = {normal(random), x[i] * x[j],   i == j ? 1.0 : 0.0, 0.0,
                                 1e300 * x[i],   1e-300 * x[j], normal(random)};
        A[i * w + j] = A[j * w + i] = values[kind];
      }
    }
    if (kind == 6) A[w * w - 1] = std::numeric_limits<double>::quiet_NaN();
    all.insert(all.end(), A.begin(), A.end());
  }
  return all;
}

/// Whether the values are the host's, and A v = lambda v; all NaN for a matrix that is not finite.
template <int kMax>
bool eigen_is_right(const double* A, int w, const double* values, const double* vectors) {
  const auto host = std::make_unique<Eigen<kMax>>();
  double size = 0;
  for (int i = 0; i < w * w; ++i) {
    host->at(i / w, i % w) = A[i];
    size = std::fmax(size, std::fabs(A[i]));
  }
  solve(SerialBlock{}, w, *host);
  const bool finite = std::all_of(A, A + w * w, [](double a) { return std::isfinite(a); });
  const double slack = 1e-12 * w * size;
  for (int i = 0; i < w; ++i) {
    if (finite ? !(std::fabs(values[i] - host->values[i]) <= slack) : !std::isnan(values[i])) return false;
    for (int row = 0; row < w; ++row) {
      double residual = -values[i] * vectors[i * w + row];
      for (int j = 0; j < w; ++j) residual += A[row * w + j] * vectors[i * w + j];
      if (finite ? !(std::fabs(residual) <= slack) : !std::isnan(vectors[i * w + row])) return false;
    }
  }
  return true;
}

template <int kMax>
int eigen_failures() {
  constexpr int kKinds = 7;
  constexpr int kBytes = static_cast<int>(sizeof(Eigen<kMax>));
  check(cudaFuncSetAttribute(eigen_kernel<kMax>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), "attribute");
  int failures = 0;
  for (const int w : {1, 2, 3, 7, 31, kMax - 1, kMax}) {
    const std::vector<double> matrices = hostile_matrices(w, kKinds);
    Buffer<double> input(matrices);
    for (const int threads : {32, 128, 1024}) {
      Buffer<double> values(kKinds * w), vectors(kKinds * w * w);
      eigen_kernel<kMax><<<kKinds, threads, kBytes>>>(input.data(), w, values.data(), vectors.data());
      finish("solve");
      const std::vector<double> lambda = values.read(), V = vectors.read();
      for (int kind = 0; kind < kKinds; ++kind) {
        const int square = kind * w * w;
        failures += !eigen_is_right<kMax>(&matrices[square], w, &lambda[kind * w], &V[square]);
      }
    }
  }
  return failures;
}

}  // namespace

int main() {
  const std::pair<const char*, int> results[] = {
      {"masks.h", count_failures()},
      {"jacobi.h, w up to 32", eigen_failures<32>()},
      {"jacobi.h, w up to 64", eigen_failures<64>()},
  };
  int failures = 0;
  for (const auto& [name, wrong] : results) {
    std::printf("%s: %d failures\n", name, wrong);
    failures += wrong;
  }
  return failures != 0;
}
