#pragma once

// Tensors of any floating dtype and strides as arrays in row-major order, a block at a time: a block of a contiguous
// tensor in the arithmetic's dtype is used where it lies, any other is copied to a stage in L1 and back.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>

#include "../common.h"

// Inner loops are compiled for several instruction sets and picked at load time, by glibc.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define RPG_FAST_CLONES_FOR(...) __attribute__((target_clones(__VA_ARGS__)))
#else
#define RPG_FAST_CLONES_FOR(...)
#endif
#define RPG_FAST_CLONES RPG_FAST_CLONES_FOR("avx512f", "avx2", "default")

namespace rpg_fast {

constexpr int64_t kBlock = 1024;       // elements staged at a time; a multiple of 64
constexpr int64_t kChunk = 32 * 1024;  // elements that a thread takes at a time; a multiple of kBlock

/// The arithmetic of a dtype: float32 for 16-bit.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

class Elements {
 public:
  Elements() = default;
  explicit Elements(const Tensor& tensor);

  int64_t numel() const { return numel_; }
  ScalarType dtype() const { return dtype_; }
  bool contiguous() const { return contiguous_; }
  template <class T>
  T* data() const {
    return static_cast<T*>(data_);
  }

  /// body(pointer, stride, position, length) for runs of evenly spaced elements that make up [begin, begin + length).
  template <class T, class Body>
  void for_each_run(int64_t begin, int64_t length, const Body& body) const;

 private:
  void* data_ = nullptr;
  ScalarType dtype_ = ScalarType::Float;
  int64_t numel_ = 0;
  bool contiguous_ = true;
  std::vector<int64_t> sizes_, strides_;  // without dimensions of one; neighbours in one stride merged
};

inline Elements::Elements(const Tensor& tensor)
    : data_(tensor.data_ptr()),
      dtype_(tensor.scalar_type()),
      numel_(tensor.numel()),
      contiguous_(tensor.is_contiguous()) {
  if (contiguous_) return;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 1) continue;
    if (!sizes_.empty() && strides_.back() == sizes[d] * strides[d]) {
      sizes_.back() *= sizes[d];
      strides_.back() = strides[d];
    } else {
      sizes_.push_back(sizes[d]);
      strides_.push_back(strides[d]);
    }
  }
}

template <class T, class Body>
void Elements::for_each_run(int64_t begin, int64_t length, const Body& body) const {
  if (contiguous_) return body(data<T>() + begin, int64_t{1}, int64_t{0}, length);
  const int64_t inner = sizes_.back(), stride = strides_.back();
  for (int64_t position = 0; position < length;) {
    const int64_t within = (begin + position) % inner;
    int64_t outer = (begin + position) / inner;
    T* pointer = data<T>() + within * stride;
    for (size_t d = sizes_.size() - 1; d-- > 0; outer /= sizes_[d]) pointer += outer % sizes_[d] * strides_[d];
    const int64_t run = std::min(inner - within, length - position);
    body(pointer, stride, position, run);
    position += run;
  }
}

void widen(const BFloat16* from, float* to, int64_t n);
void widen(const Half* from, float* to, int64_t n);
void narrow(const float* from, BFloat16* to, int64_t n);
void narrow(const float* from, Half* to, int64_t n);

/// Elements [begin, begin + n) as A, where they lie or in `stage`.
template <class A>
A* load(const Elements& elements, int64_t begin, int64_t n, A* stage) {
  dispatch_floating(elements.dtype(), "elements", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<T, A>) {
      if (elements.contiguous()) {
        stage = elements.data<A>() + begin;
        return;
      }
    }
    if constexpr (sizeof(T) == 2 && std::is_same_v<A, float>) {
      if (elements.contiguous()) return widen(elements.data<T>() + begin, stage, n);
    }
    elements.for_each_run<T>(begin, n, [stage](const T* from, int64_t stride, int64_t position, int64_t run) {
      for (int64_t i = 0; i < run; ++i) stage[position + i] = static_cast<A>(from[i * stride]);
    });
  });
  return stage;
}

/// Puts back what `load` gave and was changed.
template <class A>
void store(const Elements& elements, int64_t begin, int64_t n, const A* values) {
  dispatch_floating(elements.dtype(), "elements", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<T, A>) {
      if (elements.contiguous()) return;
    }
    if constexpr (sizeof(T) == 2 && std::is_same_v<A, float>) {
      if (elements.contiguous()) return narrow(values, elements.data<T>() + begin, n);
    }
    elements.for_each_run<T>(begin, n, [values](T* to, int64_t stride, int64_t position, int64_t run) {
      for (int64_t i = 0; i < run; ++i) to[i * stride] = static_cast<T>(values[position + i]);
    });
  });
}

struct Chunk {
  int64_t tensor, begin, end;
};

/// All elements of tensors of these sizes in chunks of at most kChunk, in order.
inline std::vector<Chunk> chunks_of(const std::vector<int64_t>& numels) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < numels.size(); ++i) {
    for (int64_t begin = 0; begin < numels[i]; begin += kChunk) {
      chunks.push_back({static_cast<int64_t>(i), begin, std::min(begin + kChunk, numels[i])});
    }
  }
  return chunks;
}

/// body(worker, item) for items 0..n-1, each taken by the next idle one of at most `workers` threads.
template <class Body>
void parallel_items(int64_t n, int64_t workers, const Body& body) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(n, workers), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t item = next++; item < n; item = next++) body(worker, item);
    }
  });
}

template <class Body>
void parallel_items(int64_t n, const Body& body) {
  parallel_items(n, torch::stable::get_num_threads(), [&](int64_t, int64_t item) { body(item); });
}

}  // namespace rpg_fast
