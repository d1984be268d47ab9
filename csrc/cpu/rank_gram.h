// The Gram matrix of a weight, over its nonzeros or by dense products, for one matrix on one thread.
#pragma once

#include "rank_matrix.h"
#include "rank_products.h"

namespace rpg_fast::rank {

/// Below this fraction of nonzeros, products over the nonzeros beat dense ones.
constexpr double kSparseBelow = 0.4;

/// What a thread keeps between matrices.
struct GramScratch {
  Compressed<double> rows, columns;
  std::vector<double> gram, dense, block;
  std::vector<Line<double>> panel, products;
  std::vector<int32_t> label, touched, last_touch;
  std::vector<int64_t> stop;
};

/// The nonzeros of X / scale in its columns first .. last - 1, by rows and by columns, the latter's rows counted among
/// the live.
inline void compress(const View& view, const Scan& scan, int64_t first, int64_t last, GramScratch& s) {
  const double factor = 1 / scan.scale();
  const int64_t capacity = std::min(scan.nonzeros, view.short_side() * (last - first));
  if (view.tall()) {
    s.columns.read(view, first, last, 0, view.columns, factor, capacity);
    s.rows.transpose(s.columns);
  } else {
    s.rows.read(view, 0, view.rows, first, last, factor, capacity);
    s.columns.transpose(s.rows);
  }
  if (static_cast<int64_t>(scan.live.size()) < view.short_side()) {
    reserve(s.label, view.short_side());
    for (size_t i = 0; i < scan.live.size(); ++i) s.label[scan.live[i]] = static_cast<int32_t>(i);
    for (int64_t p = 0; p < s.columns.nonzeros(); ++p) s.columns.index[p] = s.label[s.columns.index[p]];
  }
}

/// Adds the products of the compressed columns to the lower triangle of G [live, live], kGramRows rows at a time.
inline void add_sparse_products(const std::vector<int32_t>& live, GramScratch& s, double* G) {
  const int64_t m = static_cast<int64_t>(live.size()), n = s.columns.rows;
  double* panel = reserve_lines(s.panel, n * kGramRows);  // stays zero between uses
  double* products = reserve_lines(s.products, m * kGramRows);
  int32_t* touched = reserve(s.touched, n + 1);
  s.last_touch.assign(n, -1);
  s.stop.assign(s.columns.start.begin(), s.columns.start.begin() + n);
  for (int64_t first = 0; first < m; first += kGramRows) {
    const int64_t last = std::min(first + kGramRows, m);
    int64_t count = 0;
    for (int64_t i = first; i < last; ++i) {
      for (int64_t p = s.rows.start[live[i]]; p < s.rows.start[live[i] + 1]; ++p) {
        const int32_t j = s.rows.index[p];
        touched[count] = j;
        count += s.last_touch[j] != first;
        s.last_touch[j] = static_cast<int32_t>(first);
        panel[j * kGramRows + i - first] = s.rows.value[p];
        ++s.stop[j];
      }
    }
    std::fill_n(products, last * kGramRows, 0.0);
    gram_rows(s.columns.as_columns(), s.stop.data(), touched, count, panel, products);
    for (int64_t i = first; i < last; ++i) {
      for (int64_t j = 0; j <= i; ++j) G[i * m + j] += products[j * kGramRows + i - first];
    }
  }
}

/// The lower triangle of G from the nonzeros of X, over as many of its columns at a time as stay in the cache.
inline void sparse_gram(const View& view, const Scan& scan, GramScratch& s, double* G) {
  constexpr int64_t kNonzeros = 1 << 15;
  const int64_t n = view.long_side();
  const int64_t chunks = std::max<int64_t>(1, scan.nonzeros / kNonzeros);
  const int64_t width = (n + chunks - 1) / chunks;
  for (int64_t first = 0; first < n; first += width) {
    compress(view, scan, first, std::min(n, first + width), s);
    add_sparse_products(scan.live, s, G);
  }
}

/// The columns first .. last - 1 of X / scale, live rows only, as [live, columns] or, if X is a transpose, [columns,
/// live].
inline void read_live(const View& view, const Scan& scan, int64_t first, int64_t last, double* out) {
  const double factor = 1 / scan.scale();
  const int64_t m = static_cast<int64_t>(scan.live.size());
  dispatch_read(view, [&](auto tag) {
    std::vector<typename decltype(tag)::type> buffer;
    if (view.tall()) {
      for (int64_t j = first; j < last; ++j) {
        const auto* row = read_row(view, j, 0, view.columns, buffer);
        for (int64_t i = 0; i < m; ++i) *out++ = row[scan.live[i]] * factor;
      }
    } else {
      for (int64_t i = 0; i < m; ++i) {
        const auto* row = read_row(view, scan.live[i], first, last, buffer);
        for (int64_t j = 0; j < last - first; ++j) *out++ = row[j] * factor;
      }
    }
  });
}

/// The same from dense products, over as many columns of X at a time as keep the copy small.
inline void dense_gram(const View& view, const Scan& scan, GramScratch& s, double* G) {
  constexpr int64_t kRows = 128, kElements = 1 << 19;
  const int64_t m = static_cast<int64_t>(scan.live.size()), n = view.long_side();
  const int64_t width = std::min(n, std::max<int64_t>(256, kElements / m));
  double* X = reserve(s.dense, m * width);
  double* block = reserve(s.block, kRows * m);
  for (int64_t first = 0; first < n; first += width) {
    const int64_t columns = std::min(width, n - first);
    read_live(view, scan, first, first + columns, X);
    const int64_t down = view.tall() ? 1 : columns, across = view.tall() ? m : 1;
    for (int64_t i = 0; i < m; i += kRows) {
      const int64_t rows = std::min(kRows, m - i);
      const int64_t width_of_block = i + rows;
      multiply(borrow(X + i * down, rows, columns, down, across), borrow(X, columns, width_of_block, across, down),
               borrow(block, rows, width_of_block, width_of_block, 1));
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < width_of_block; ++c) G[(i + r) * m + c] += block[r * width_of_block + c];
      }
    }
  }
}

/// G times `factor`, its lower triangle reflected to the upper one, in tiles that stay in the cache.
inline void mirror(double* G, int64_t m, double factor) {
  constexpr int64_t kTile = 32;
  for (int64_t first = 0; first < m; first += kTile) {
    for (int64_t second = 0; second <= first; second += kTile) {
      for (int64_t i = first; i < std::min(m, first + kTile); ++i) {
        for (int64_t j = second; j < std::min(i + 1, second + kTile); ++j) G[j * m + i] = G[i * m + j] *= factor;
      }
    }
  }
}

/// G = X X^T / ||X||_F^2 [live, live] into s.gram; returns ||X||_F.
inline double normalised_gram(const View& view, const Scan& scan, GramScratch& s) {
  const int64_t m = static_cast<int64_t>(scan.live.size());
  double* G = reserve(s.gram, m * m);
  std::fill_n(G, m * m, 0.0);
  if (scan.nonzeros < kSparseBelow * m * view.long_side()) {
    sparse_gram(view, scan, s, G);
  } else {
    dense_gram(view, scan, s, G);
  }
  double square = 0;
  for (int64_t i = 0; i < m; ++i) square += G[i * m + i];
  mirror(G, m, 1 / square);
  return scan.scale() * std::sqrt(square);
}

}  // namespace rpg_fast::rank
