// The device templates of csrc in CUDA kernels without torch, for compute-sanitizer to watch: awkward sizes,
// allocations that end where the data does, results compared with those of the same templates on the host. Exits with 1
// on a wrong result, with 2 if CUDA fails.
//
//   nvcc -std=c++20 -arch=native -lineinfo -I csrc benchmarks/sanitize.cu -o sanitize && compute-sanitizer ./sanitize
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "basis.h"
#include "jacobi.h"
#include "masks.h"
#include "radix.h"
#include "spectrum.h"
#include "window.h"

namespace {

using namespace rpg_fast;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// ---- the same work on the device and on the host -------------------------------------------------------------------

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

/// Values in an allocation of their own on the device, and on the host.
template <class T>
class Twin {
 public:
  explicit Twin(std::vector<T> values) : host_(std::move(values)), bytes_(host_.size() * sizeof(T)) {
    if (bytes_ == 0) return;
    check(cudaMalloc(&device_, bytes_), "cudaMalloc");
    check(cudaMemcpy(device_, host_.data(), bytes_, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Twin(std::initializer_list<T> values) : Twin(std::vector<T>(values)) {}
  Twin(size_t count, T value) : Twin(std::vector<T>(count, value)) {}
  Twin(const Twin&) = delete;
  Twin& operator=(const Twin&) = delete;
  ~Twin() { cudaFree(device_); }

  T* at(bool on_device) { return on_device ? device_ : host_.data(); }

  /// How many values differ by more than `tolerance` times the largest finite one.
  int differences(double tolerance) const {
    std::vector<T> got(host_.size());
    if (bytes_ > 0) check(cudaMemcpy(got.data(), device_, bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy");
    double size = 0;
    for (const T value : host_) {
      if (std::isfinite(static_cast<double>(value))) size = std::fmax(size, std::fabs(static_cast<double>(value)));
    }
    int count = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      const double a = static_cast<double>(got[i]), b = static_cast<double>(host_[i]);
      count += !(a == b || (std::isnan(a) && std::isnan(b)) || std::fabs(a - b) <= tolerance * size);
    }
    return count;
  }

 private:
  std::vector<T> host_;
  size_t bytes_;
  T* device_ = nullptr;
};

template <class Piece>
__global__ void piece_kernel(const Piece piece) {
  extern __shared__ uint4 memory[];
  piece.run(CudaBlock{}, static_cast<int>(blockIdx.x), *reinterpret_cast<typename Piece::Work*>(memory));
}

/// `make(on_device)` gives a piece with the pointers of that side; `blocks` of it on both.
template <class Make>
void run_both(const Make& make, int blocks, int threads) {
  using Piece = decltype(make(true));
  constexpr int kMemory = static_cast<int>(sizeof(typename Piece::Work));
  check(cudaFuncSetAttribute(piece_kernel<Piece>, cudaFuncAttributeMaxDynamicSharedMemorySize, kMemory), "attribute");
  piece_kernel<<<blocks, threads, kMemory>>>(make(true));
  check(cudaGetLastError(), "launch");
  check(cudaDeviceSynchronize(), "kernel");
  const auto work = std::make_unique<typename Piece::Work>();
  for (int b = 0; b < blocks; ++b) make(false).run(SerialBlock{}, b, *work);
}

/// Normal values; the generator is the caller's.
template <class T>
std::vector<T> normal_values(size_t count, std::mt19937& random) {
  std::normal_distribution<double> normal;
  std::vector<T> values(count);
  std::generate(values.begin(), values.end(), [&] { return static_cast<T>(normal(random)); });
  return values;
}

// ---- masks.h -------------------------------------------------------------------------------------------------------

struct CountOnes {
  struct Work {
    int64_t scratch[1024];
  };
  const uint8_t* bits;
  int64_t numel, *count;

  template <class Block>
  RPG_FAST_HOST_DEVICE void run(const Block& block, int, Work& work) const {
    const int64_t ones = count_ones(block, bits, numel, work.scratch);
    if (block.lane() == 0) *count = ones;
  }
};

int count_failures() {
  std::mt19937 random(0);
  int failures = 0;
  for (const int64_t numel : {0, 1, 7, 8, 9, 63, 64, 65, 127, 1023, 1024, 1025, 40000}) {
    for (const int misalignment : {0, 1, 3, 7}) {
      std::vector<uint8_t> bytes(misalignment + (numel + 7) / 8);
      std::generate(bytes.begin(), bytes.end(), [&] { return static_cast<uint8_t>(random()); });
      Twin<uint8_t> bits(bytes);
      for (const int threads : {32, 96, 1024}) {
        Twin<int64_t> count(1, -1);
        run_both([&](bool on) { return CountOnes{bits.at(on) + misalignment, numel, count.at(on)}; }, 1, threads);
        failures += count.differences(0);
      }
    }
  }
  return failures;
}

// ---- kernels over tiles: masks.h and radix.h ------------------------------------------------------------------------

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads) tile_kernel(const Kernel kernel) {
  __shared__ typename Kernel::Work work;
  kernel.run(CudaBlock{}, blockIdx.x, gridDim.x, work);
}

/// A kernel on `blocks` blocks of the device or of the host.
template <class Kernel>
void run_tiles(const Kernel& kernel, int64_t blocks, bool on_device) {
  if (on_device) {
    tile_kernel<<<static_cast<unsigned>(blocks), Kernel::kThreads>>>(kernel);
    check(cudaGetLastError(), "launch");
    check(cudaDeviceSynchronize(), "kernel");
  } else {
    const auto work = std::make_unique<typename Kernel::Work>();
    for (int64_t b = 0; b < blocks; ++b) kernel.run(SerialBlock{}, b, blocks, *work);
  }
}

/// Tensors in allocations of their own with a table of them, on the device and on the host; bits at odd bytes.
template <class T>
struct TwinTensors {
  std::vector<std::unique_ptr<Twin<T>>> tensors;
  std::unique_ptr<Twin<int64_t>> tables[2];  // of the host, of the device
  int64_t tiles = 0, nbytes = 0;

  TwinTensors(const std::vector<std::vector<T>>& values, Storage storage) {
    std::vector<TensorRow> rows;
    for (const std::vector<T>& tensor : values) {
      tensors.push_back(std::make_unique<Twin<T>>(tensor));
      const auto numel = static_cast<int64_t>(tensor.size());
      rows.push_back({0, numel, tiles, nbytes + 1, storage});
      tiles += (numel + kTile - 1) / kTile;
      nbytes += 1 + (numel + 7) / 8;
    }
    for (const bool on : {false, true}) {
      std::vector<int64_t> table(kRowColumns * rows.size());
      for (size_t i = 0; i < rows.size(); ++i) rows[i].data = reinterpret_cast<intptr_t>(tensors[i]->at(on));
      std::memcpy(table.data(), rows.data(), table.size() * sizeof(int64_t));
      tables[on] = std::make_unique<Twin<int64_t>>(table);
    }
  }

  Tensors at(bool on) { return {tables[on]->at(on), static_cast<int64_t>(tensors.size()), tiles}; }

  int differences() const {
    int count = 0;
    for (const auto& tensor : tensors) count += tensor->differences(0);
    return count;
  }
};

int mask_failures() {
  std::mt19937 random(0);
  std::vector<std::vector<uint8_t>> masks, blank;
  for (const int numel : {0, 1, 7, 8, 9, 4095, 4096, 4097, 20000}) {
    masks.emplace_back(numel);
    blank.emplace_back(numel, 7);
    for (uint8_t& value : masks.back()) value = static_cast<uint8_t>(random() % 2);
  }
  int failures = 0;
  for (const int64_t blocks : {1, 3, 13}) {
    TwinTensors<uint8_t> from(masks, Storage::kBytes), to(blank, Storage::kBytes);
    Twin<uint8_t> bits(from.nbytes, 0);
    Twin<int64_t> counts(masks.size(), 0);
    for (const bool on : {true, false}) {
      run_tiles(PackTiles{from.at(on), bits.at(on)}, blocks, on);
      run_tiles(UnpackTiles{to.at(on), bits.at(on)}, blocks, on);
      run_tiles(PopcountTiles{from.at(on), bits.at(on), counts.at(on)}, blocks, on);
    }
    failures += bits.differences(0) + to.differences() + counts.differences(0);
  }
  return failures;
}

/// Normal scores, few values, all equal; of one problem and of three, some not eligible.
template <class Key>
int selection_failures() {
  using Score = typename Selection<Key>::Score;
  int failures = 0;
  for (int kind = 0; kind < 12; ++kind) {
    std::mt19937 random(kind);
    std::vector<std::vector<Score>> values;
    for (const size_t numel : {5000, 3, 20000}) {
      values.push_back(normal_values<Score>(numel, random));
      for (Score& value : values.back()) value = kind % 3 == 0 ? value : kind % 3 == 1 ? std::round(value) : Score(1);
      values.back()[0] = static_cast<Score>(kNan);
    }
    const bool per_tensor = kind / 3 % 2, restricted = kind / 6 % 2;
    TwinTensors<Score> scores(values, sizeof(Score) == 4 ? Storage::kFloat32 : Storage::kFloat64);
    std::vector<uint8_t> open(scores.nbytes);
    for (uint8_t& byte : open) byte = static_cast<uint8_t>(random());
    Twin<uint8_t> eligible(open), chosen(scores.nbytes, 0);
    Twin<int64_t> counts({700, 1, 5000});
    Selection<Key> sized{scores.at(false), nullptr, nullptr, nullptr, true, per_tensor};
    Twin<uint8_t> workspace(sized.lay_out(nullptr), 0);
    for (const bool on : {true, false}) {
      Selection<Key> selection{
          scores.at(on), restricted ? eligible.at(on) : nullptr, chosen.at(on), counts.at(on), true, per_tensor};
      selection.lay_out(workspace.at(on));
      run_selection(
          selection, [&](const auto& kernel) { run_tiles(kernel, 4, on); },
          [&](const auto& kernel) { run_tiles(kernel, selection.problems(), on); });
    }
    failures += chosen.differences(0);
  }
  return failures;
}

// ---- jacobi.h ------------------------------------------------------------------------------------------------------

/// Eigenvalues [w] and V^T diag(values) V [w, w] of each matrix.
template <int kMax>
struct SolveEigen {
  using Work = Eigen<kMax>;
  const double* matrices;
  int w;
  double *values, *rebuilt;

  template <class Block>
  RPG_FAST_HOST_DEVICE void run(const Block& block, int b, Work& eigen) const {
    const double* A = matrices + b * w * w;
    for (int i = block.lane(); i < w * w; i += block.count()) {
      if (i % w <= i / w) eigen.at(i / w, i % w) = A[i];
    }
    solve(block, w, eigen);
    for (int i = block.lane(); i < w; i += block.count()) values[b * w + i] = eigen.values[i];
    for (int i = block.lane(); i < w * w; i += block.count()) {
      double sum = 0;
      for (int a = 0; a < w; ++a) sum += eigen.values[a] * eigen.vector(a)[i / w] * eigen.vector(a)[i % w];
      rebuilt[b * w * w + i] = sum;
    }
  }
};

template <int kMax>
int eigen_failures() {
  int failures = 0;
  for (const int w : {1, 2, 3, 7, 31, kMax - 1, kMax}) {
    for (const double size : {1.0, 1e300, 1e-300, 0.0, kNan}) {
      std::mt19937 random(w);
      std::vector<double> A = normal_values<double>(2 * w * w, random), x = normal_values<double>(w, random);
      for (int i = 0; i < w * w; ++i) A[w * w + i] = x[i / w] * x[i % w];  // the second has rank one
      A[w * w - 1] *= size;                                                // NaN in one place is enough
      for (double& a : A) a = std::isnan(size) ? a : a * size;
      Twin<double> matrices(A);
      for (const int threads : {32, 128, 1024}) {
        Twin<double> values(2 * w, kNan), rebuilt(2 * w * w, kNan);
        const auto make = [&](bool on) { return SolveEigen<kMax>{matrices.at(on), w, values.at(on), rebuilt.at(on)}; };
        run_both(make, 2, threads);
        failures += values.differences(1e-12 * w) + rebuilt.differences(1e-12 * w);
      }
    }
  }
  return failures;
}

// ---- basis.h -------------------------------------------------------------------------------------------------------

struct Bases {
  using Work = BasisWork;
  const float* Z;
  int m, w;
  float *range, *principal;
  double* found;

  template <class Block>
  RPG_FAST_HOST_DEVICE void run(const Block& block, int b, Work& work) const {
    const int64_t at = static_cast<int64_t>(b) * m * w;
    range_basis(block, Z + at, m, w, 1e-11, work, range + at);
    block.sync();
    const Principal result = principal_basis(block, Z + at, m, w, 1e-6, work, principal + at);
    if (block.lane() == 0) found[2 * b] = result.found;
    if (block.lane() == 0) found[2 * b + 1] = result.energy;
  }
};

/// Full rank, rank three, zero and not finite.
int basis_failures() {
  int failures = 0;
  for (const int m : {1, 5, 33, 129, 300}) {
    for (const int w : {4, 8, kWidth}) {
      std::mt19937 random(m + w);
      const size_t numel = static_cast<size_t>(m) * w;
      std::vector<float> all = normal_values<float>(4 * numel, random);
      for (size_t i = 0; i < numel; ++i) {
        const int column = static_cast<int>(i) % w;
        all[i] *= std::pow(0.8f, static_cast<float>(column));
        all[numel + i] = column < 3 ? all[numel + i] : 0.0f;
        all[2 * numel + i] = 0;
      }
      all.back() = static_cast<float>(kNan);
      Twin<float> Z(all);
      for (const int threads : {32, 256}) {
        Twin<float> range(4 * numel, -1), principal(4 * numel, -1);
        Twin<double> found(8, kNan);
        const auto make = [&](bool on) { return Bases{Z.at(on), m, w, range.at(on), principal.at(on), found.at(on)}; };
        run_both(make, 4, threads);
        failures += range.differences(1e-4) + principal.differences(1e-4) + found.differences(1e-9);
      }
    }
  }
  return failures;
}

// ---- spectrum.h ----------------------------------------------------------------------------------------------------

struct Small {
  using Work = SmallWork;
  const float* G;  // [kSmall, kSmall], in its corner [m, m]
  int m;
  const double* norms;
  double *found, target;
  float* N;

  template <class Block>
  RPG_FAST_HOST_DEVICE void run(const Block& block, int b, Work& work) const {
    const auto load = [&](int i) { return static_cast<double>(G[i]); };
    small_spectrum(block, load, m, norms[b], 4.0, target, work, found[2 * b], found[2 * b + 1], N + b * m * m);
  }
};

int small_failures() {
  int failures = 0;
  for (const int m : {1, 2, 17, 63, kSmall}) {
    std::mt19937 random(m);
    const std::vector<double> X = normal_values<double>(2 * m * m, random);  // [m, 2 m]
    std::vector<float> gram(kSmall * kSmall, static_cast<float>(kNan));
    double trace = 0;
    for (const double x : X) trace += x * x;
    for (int item = 0; item < m * m; ++item) {
      double sum = 0;
      for (int c = 0; c < 2 * m; ++c) sum += X[item / m * 2 * m + c] * X[item % m * 2 * m + c];
      gram[item / m * kSmall + item % m] = static_cast<float>(4 * sum / trace);
    }
    Twin<float> G(gram);
    Twin<double> norms({std::sqrt(trace), 0.0, kNan});
    for (const int threads : {32, 512}) {
      Twin<double> found(6, -7);
      Twin<float> N(3 * m * m, -7);
      const auto make = [&](bool on) { return Small{G.at(on), m, norms.at(on), found.at(on), 0.1, N.at(on)}; };
      run_both(make, 3, threads);
      failures += found.differences(1e-9) + N.differences(1e-5);
    }
  }
  return failures;
}

// ---- window.h ------------------------------------------------------------------------------------------------------

struct Windows {
  using Work = WindowWork;
  const float *Q, *GQ, *YQ, *moments, *traces;
  int m, w, found;
  const double *grid, *table, *window;
  Ledger* ledger;
  float *aims, *coefficients, *Z;
  int* counts;  // stages, settled

  template <class Block>
  RPG_FAST_HOST_DEVICE void run(const Block& block, int, Work& work) const {
    const Steps steps{grid, table, 2, 1};
    const Aim aim{aims, coefficients, counts, counts + 1};
    const int tiles[] = {0, 1};
    open_window(block, moments, tiles, m, 1.0, 4.0, 0.1, window, steps, work.parts, *ledger, aim);
    block.sync();
    if (block.lane() == 0) ledger->found = found;
    if (block.lane() == 0) ledger->seen = traces[2];
    block.sync();
    conclude_window(block, Images{Q, GQ, YQ, m, w}, traces, tiles, 0.1, steps, work, *ledger, aim, Z);
  }
};

/// A diagonal G whose window holds five eigenvalues around the boundary, or lies elsewhere.
int window_failures() {
  int failures = 0;
  for (const int m : {40, 65, 200}) {
    for (const int w : {16, kWidth}) {
      std::vector<double> lambda(m);
      double sum = 0, tail = 0;
      for (int i = 0; i < m; ++i) sum += lambda[i] = std::pow(i + 1.0, -1.0);
      for (double& value : lambda) value /= sum;
      int k = m;
      while (tail < 0.1) tail += lambda[--k];
      for (const int first : {k - 2, 2}) {
        std::vector<float> Q(m * w), GQ(m * w), YQ(m * w);
        double moments[3] = {}, traces[3] = {};
        for (int i = 0; i < m; ++i) {
          const int column = i - first;
          const double y = column < 0 ? 1 : column < 5 ? 0.6 - 0.3 * column : -1;
          if (column >= 0 && column < 5) {
            Q[i * w + column] = 1;
            GQ[i * w + column] = static_cast<float>(4 * lambda[i]);
            YQ[i * w + column] = static_cast<float>(y);
          }
          for (int p = 0; p < 3; ++p) moments[p] += std::pow(4 * lambda[i], p + 2);
          traces[0] += y;
          traces[1] += 4 * y * lambda[i];
          traces[2] += std::pow((1 - y * y) / 4, 2);
        }
        const auto three = [](const double* x) {
          return std::vector<float>{static_cast<float>(x[0]), static_cast<float>(x[1]), static_cast<float>(x[2])};
        };
        Twin<float> q(Q), gq(GQ), yq(YQ), moments_(three(moments)), traces_(three(traces));
        Twin<double> grid({1e-5, 1e-2}), table({2.0, -1.0, 0.1, 1.8, -1.1, 0.3});
        Twin<double> window({lambda[first + 2], lambda[first] - lambda[first + 2]});
        for (const int threads : {32, 256}) {
          Twin<double> ledger(kLedgerColumns, kNan);
          Twin<float> aims(2, -7), coefficients(3, -7), Z(m * w, -7);
          Twin<int> counts({1, -7});
          const auto make = [&](bool on) {
            auto* row = reinterpret_cast<Ledger*>(ledger.at(on));
            return Windows{q.at(on),
                           gq.at(on),
                           yq.at(on),
                           moments_.at(on),
                           traces_.at(on),
                           m,
                           w,
                           5,
                           grid.at(on),
                           table.at(on),
                           window.at(on),
                           row,
                           aims.at(on),
                           coefficients.at(on),
                           Z.at(on),
                           counts.at(on)};
          };
          run_both(make, 1, threads);
          failures += ledger.differences(1e-9) + aims.differences(1e-6) + coefficients.differences(0);
          failures += counts.differences(0) + Z.differences(1e-5);
        }
      }
    }
  }
  return failures;
}

}  // namespace

int main() {
  const std::pair<const char*, int> results[] = {
      {"masks.h", count_failures() + mask_failures()},
      {"radix.h, 32 bits", selection_failures<uint32_t>()},
      {"radix.h, 64 bits", selection_failures<uint64_t>()},
      {"jacobi.h, w up to 32", eigen_failures<32>()},
      {"jacobi.h, w up to 64", eigen_failures<64>()},
      {"basis.h", basis_failures()},
      {"spectrum.h", small_failures()},
      {"window.h", window_failures()},
  };
  int failures = 0;
  for (const auto& [name, wrong] : results) {
    std::printf("%s: %d failures\n", name, wrong);
    failures += wrong;
  }
  return failures != 0;
}
