#include "rank_kernels.h"

#include <algorithm>
#include <cstring>

// A copy of each loop for every level of the instruction set; the loader chooses.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define RPG_FAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RPG_FAST_CLONES
#endif
#define RPG_FAST_INLINE __attribute__((always_inline)) static inline

namespace rpg_fast::rank {
namespace {

template <class T>
struct Vector;  // one cache line
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(64), may_alias));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(64), may_alias));
};

template <class T>
RPG_FAST_INLINE void scan_row_body(const T* row, int64_t n, Bits<T>* seen, Bits<T>& peak, int64_t& nonzeros) {
  Bits<T> highest = peak, count = 0;
  for (int64_t c = 0; c < n; ++c) {
    Bits<T> bits;
    std::memcpy(&bits, row + c, sizeof(T));
    bits &= ~Bits<T>{0} >> 1;
    highest = std::max(highest, bits);
    count += bits != 0;
    seen[c] |= bits;
  }
  peak = highest;
  nonzeros = static_cast<int64_t>(count);
}

template <class T>
RPG_FAST_INLINE void apply_tile_body(const Columns<T>& X, int64_t columns, const T* panel, T* out) {
  using V = typename Vector<T>::type;
  const V* N = reinterpret_cast<const V*>(panel);
  V* result = reinterpret_cast<V*>(out);
  const int64_t* start = X.start;  // locals: the compiler cannot know that no store changes X
  const int32_t* row = X.row;
  const T* value = X.value;
  for (int64_t j = 0; j < columns; ++j) {
    int64_t p = start[j];
    const int64_t end = start[j + 1];
    V even0 = {}, even1 = {}, odd0 = {}, odd1 = {};
    for (; p + 1 < end; p += 2) {
      const V* first = N + 2 * row[p];
      const V* second = N + 2 * row[p + 1];
      even0 += value[p] * first[0];
      even1 += value[p] * first[1];
      odd0 += value[p + 1] * second[0];
      odd1 += value[p + 1] * second[1];
    }
    if (p < end) {
      even0 += value[p] * N[2 * row[p]];
      even1 += value[p] * N[2 * row[p] + 1];
    }
    result[2 * j] = even0 + odd0;
    result[2 * j + 1] = even1 + odd1;
  }
}

}  // namespace

RPG_FAST_CLONES void scan_row(const float* row, int64_t n, uint32_t* seen, uint32_t& peak, int64_t& nonzeros) {
  scan_row_body(row, n, seen, peak, nonzeros);
}

RPG_FAST_CLONES void scan_row(const double* row, int64_t n, uint64_t* seen, uint64_t& peak, int64_t& nonzeros) {
  scan_row_body(row, n, seen, peak, nonzeros);
}

RPG_FAST_CLONES void gram_rows(const Columns<double>& X, const int64_t* stop, const int32_t* touched, int64_t count,
                               double* panel, double* products) {
  using V = Vector<double>::type;
  V* x = reinterpret_cast<V*>(panel);
  V* result = reinterpret_cast<V*>(products);
  const int64_t* start = X.start;  // locals: the compiler cannot know that no store changes X
  const int32_t* row = X.row;
  const double* value = X.value;
  for (int64_t t = 0; t < count; ++t) {
    const int32_t j = touched[t];
    const V eight = x[j];
    x[j] = V{};
    for (int64_t p = start[j], end = stop[j]; p < end; ++p) result[row[p]] += value[p] * eight;
  }
}

RPG_FAST_CLONES void apply_tile(const Columns<float>& X, int64_t columns, const float* panel, float* out) {
  apply_tile_body(X, columns, panel, out);
}

RPG_FAST_CLONES void apply_tile(const Columns<double>& X, int64_t columns, const double* panel, double* out) {
  apply_tile_body(X, columns, panel, out);
}

}  // namespace rpg_fast::rank
