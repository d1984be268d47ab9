// Dense products and eigenproblems by the libraries behind torch, on memory that the caller owns.
#pragma once

#include <array>
#include <string>
#include <utility>

#include "../common.h"

namespace rpg_fast::rank {

template <class T>
constexpr ScalarType scalar_type_of = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

/// One thread for MKL, where torch has it, as long as this lives: LAPACK chooses its blocks, and so its rounding, by
/// the number of threads that it could have, even where it may only use one.
class OneBlasThread {
 public:
  OneBlasThread() : before_(set() == nullptr ? 0 : set()(1)) {}
  ~OneBlasThread() {
    if (set() != nullptr) set()(before_);
  }
  OneBlasThread(const OneBlasThread&) = delete;
  OneBlasThread& operator=(const OneBlasThread&) = delete;

 private:
  using Setter = int (*)(int);
  static Setter set() {
    static const Setter setter = [] {
      void* library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
      return reinterpret_cast<Setter>(library == nullptr ? nullptr : dlsym(library, "MKL_Set_Num_Threads_Local"));
    }();
    return setter;
  }
  int before_;
};

/// A tensor [rows, columns] over memory that outlives it.
template <class T>
Tensor borrow(const T* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  const std::array<int64_t, 2> sizes{rows, columns}, strides{row_stride, column_stride};
  return torch::stable::from_blob(const_cast<T*>(data), {sizes.data(), 2}, {strides.data(), 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), scalar_type_of<T>);
}

template <class T>
Tensor borrow(const T* data, int64_t rows, int64_t columns) {
  return borrow(data, rows, columns, columns, 1);
}

template <class T>
Tensor borrow_transposed(const T* data, int64_t rows, int64_t columns) {
  return borrow(data, columns, rows, 1, columns);
}

/// out = a @ b. The out= form is the one that autocast leaves alone.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

/// Eigenvalues [m], ascending, and eigenvectors [m, m], one a row.
template <class T>
struct Eigen {
  Tensor values_, vectors_;
  const T* values() const { return static_cast<const T*>(values_.const_data_ptr()); }
  T* vectors() const { return static_cast<T*>(vectors_.mutable_data_ptr()); }
};

/// Of the symmetric G [m, m] given by its lower triangle. Raises what torch.linalg.eigh raises.
template <class T>
Eigen<T> eigh(const T* G, int64_t m) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 2> stack{from(borrow(G, m, m)), from(std::string("L"))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linalg_eigh", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor values = to<Tensor>(stack[0]), vectors = to<Tensor>(stack[1]);
  return {torch::stable::contiguous(values), torch::stable::contiguous(torch::stable::transpose(vectors, 0, 1))};
}

}  // namespace rpg_fast::rank
