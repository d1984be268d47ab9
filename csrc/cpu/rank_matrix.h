// Weights of any layout as matrices: where their elements lie, what is in them, and their nonzeros alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "../common.h"
#include "rank_kernels.h"

namespace rpg_fast::rank {

/// A pointer to at least n elements, kept between uses; they start on a cache line if T does.
template <class T>
T* reserve(std::vector<T>& buffer, int64_t n) {
  if (static_cast<int64_t>(buffer.size()) < n) buffer.resize(n);
  return buffer.data();
}

template <class T>
struct alignas(64) Line {
  T lane[64 / sizeof(T)];
};

/// Zeroed lines for n elements.
template <class T>
T* reserve_lines(std::vector<Line<T>>& buffer, int64_t n) {
  return reserve(buffer, (n * static_cast<int64_t>(sizeof(T)) + 63) / 64)->lane;
}

/// The dimensions of the columns of a weight [out, ...], slowest in memory first: grouping.memory_order without `out`.
inline std::vector<int64_t> column_dims(const Tensor& weight) {
  const int64_t dims = weight.dim();
  std::vector<int64_t> strides(weight.strides().begin(), weight.strides().end());
  std::vector<int64_t> order(dims);
  std::iota(order.begin(), order.end(), 0);
  if (dims > 2 && !weight.is_contiguous()) {
    for (int64_t d = dims - 1; d >= 0; --d) {
      if (weight.size(d) == 1) strides[d] = d + 1 < dims ? strides[d + 1] * weight.size(d + 1) : 1;
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  }
  order.erase(std::find(order.begin(), order.end(), 0));
  return order;
}

/// A tensor [out, ...] as the matrix A [rows, columns], its columns in a given order of dimensions.
struct View {
  char* data;
  ScalarType dtype;
  int64_t rows, columns, row_stride;
  std::vector<int64_t> offsets;  // of the columns, in elements; empty if they lie side by side

  View(const Tensor& tensor, const std::vector<int64_t>& dims, const void* elements)
      : data(static_cast<char*>(const_cast<void*>(elements))),
        dtype(tensor.scalar_type()),
        rows(tensor.size(0)),
        columns(1),
        row_stride(tensor.stride(0)) {
    for (int64_t d : dims) columns *= tensor.size(d);
    offsets.assign(rows > 0 ? columns : 0, 0);
    bool side_by_side = true;
    for (int64_t c = 0; c < static_cast<int64_t>(offsets.size()); ++c) {
      int64_t rest = c;
      for (auto d = dims.rbegin(); d != dims.rend(); ++d) {
        offsets[c] += rest % tensor.size(*d) * tensor.stride(*d);
        rest /= tensor.size(*d);
      }
      side_by_side = side_by_side && offsets[c] == c;
    }
    if (side_by_side) offsets.clear();
  }

  /// X [short_side, long_side] is A, or its transpose where A is tall.
  bool tall() const { return rows > columns; }
  int64_t short_side() const { return std::min(rows, columns); }
  int64_t long_side() const { return std::max(rows, columns); }
  bool empty() const { return rows * columns == 0; }
};

/// body(at), at(c) a pointer to A[row, c], compiled apart for columns that lie side by side.
template <class S, class Body>
void with_row(const View& view, int64_t row, Body&& body) {
  S* base = reinterpret_cast<S*>(view.data) + row * view.row_stride;
  if (view.offsets.empty()) {
    body([base](int64_t c) { return base + c; });
  } else {
    const int64_t* offsets = view.offsets.data();
    body([base, offsets](int64_t c) { return base + offsets[c]; });
  }
}

/// A[row, first .. last - 1] as T: where it lies if it can be read there, else copied into `buffer`.
template <class T>
const T* read_row(const View& view, int64_t row, int64_t first, int64_t last, std::vector<T>& buffer) {
  constexpr auto same = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  if (view.dtype == same && view.offsets.empty()) {
    return reinterpret_cast<const T*>(view.data) + row * view.row_stride + first;
  }
  T* out = reserve(buffer, last - first);
  dispatch_floating(view.dtype, "weights", [&](auto tag) {
    with_row<const typename decltype(tag)::type>(view, row, [&](auto at) {
      for (int64_t c = first; c < last; ++c) out[c - first] = static_cast<T>(*at(c));
    });
  });
  return out;
}

/// body(TypeTag<T>{}) with the type in which a view's elements are read without loss.
template <class Body>
auto dispatch_read(const View& view, Body&& body) {
  return view.dtype == ScalarType::Double ? body(TypeTag<double>{}) : body(TypeTag<float>{});
}

/// What one pass over a matrix X tells.
struct Scan {
  int64_t nonzeros = 0;
  double peak = 0;            // max |x|; not finite if an element is not
  std::vector<int32_t> live;  // the rows of X that are not all zero

  /// A power of two; X over it has entries below 32 and loses nothing.
  double scale() const {
    int exponent = 0;
    std::frexp(peak, &exponent);
    return std::ldexp(1.0, std::clamp(exponent, -1020, 1020));
  }
};

template <class T>
Scan scan(const View& view) {
  std::vector<T> buffer;
  std::vector<Bits<T>> seen(view.columns);
  std::vector<int32_t> live_rows;
  Bits<T> peak = 0;
  Scan result;
  for (int64_t r = 0; r < view.rows; ++r) {
    int64_t nonzeros = 0;
    scan_row(read_row(view, r, 0, view.columns, buffer), view.columns, seen.data(), peak, nonzeros);
    if (nonzeros > 0) live_rows.push_back(static_cast<int32_t>(r));
    result.nonzeros += nonzeros;
  }
  T value;
  std::memcpy(&value, &peak, sizeof(T));
  result.peak = static_cast<double>(value);
  if (view.tall()) {
    for (int64_t c = 0; c < view.columns; ++c) {
      if (seen[c] != 0) result.live.push_back(static_cast<int32_t>(c));
    }
  } else {
    result.live = std::move(live_rows);
  }
  return result;
}

/// The nonzeros of a matrix, row after row.
template <class V>
struct Compressed {
  int64_t rows = 0, columns = 0;
  std::vector<int64_t> start;  // [rows + 1]
  std::vector<int32_t> index;
  std::vector<V> value;

  int64_t nonzeros() const { return start[rows]; }

  /// The part [first_row, last_row) x [first, last) of A times `factor`; room for `capacity` nonzeros and one more row.
  void read(const View& view, int64_t first_row, int64_t last_row, int64_t first, int64_t last, double factor,
            int64_t capacity) {
    rows = last_row - first_row;
    columns = last - first;
    reserve(start, rows + 1);
    reserve(index, capacity + columns);
    reserve(value, capacity + columns);
    dispatch_read(view, [&](auto tag) {
      std::vector<typename decltype(tag)::type> buffer;
      int64_t count = 0;
      for (int64_t r = 0; r < rows; ++r) {
        start[r] = count;
        const auto* row = read_row(view, first_row + r, first, last, buffer);
        for (int64_t c = 0; c < columns; ++c) {  // no branch: the index of a zero is overwritten by the next
          index[count] = static_cast<int32_t>(c);
          Bits<typename decltype(tag)::type> bits;
          std::memcpy(&bits, row + c, sizeof(bits));
          count += bits << 1 != 0;
        }
        for (int64_t p = start[r]; p < count; ++p) value[p] = static_cast<V>(row[index[p]] * factor);
      }
      start[rows] = count;
    });
  }

  void transpose(const Compressed& from) {
    rows = from.columns;
    columns = from.rows;
    const int64_t nonzeros = from.nonzeros();
    reserve(start, rows + 1);
    reserve(index, nonzeros);
    reserve(value, nonzeros);
    std::fill_n(start.begin(), rows + 1, 0);
    for (int64_t p = 0; p < nonzeros; ++p) ++start[from.index[p]];
    std::exclusive_scan(start.begin(), start.begin() + rows + 1, start.begin(), int64_t{0});
    for (int64_t r = 0; r < from.rows; ++r) {
      for (int64_t p = from.start[r]; p < from.start[r + 1]; ++p) {
        const int64_t at = start[from.index[p]]++;
        index[at] = static_cast<int32_t>(r);
        value[at] = from.value[p];
      }
    }
    std::copy_backward(start.begin(), start.begin() + rows, start.begin() + rows + 1);
    start[0] = 0;
  }

  Columns<V> as_columns() const { return {start.data(), index.data(), value.data()}; }
};

}  // namespace rpg_fast::rank
