// The exact rank loss on the CPU: rank_project, rank_apply, rank_apply_. Every matrix, and every block of columns of a
// gradient, is computed by one thread in a fixed order, however many threads share the work.
#include <atomic>
#include <exception>
#include <mutex>
#include <set>
#include <string>
#include <tuple>

#include "rank_matrix.h"
#include "rank_spectrum.h"

namespace rpg_fast::rank {
namespace {

/// body(task, scratch) for every task, in order, by whichever thread is free; rethrows the first exception. Inside,
/// BLAS and LAPACK run on the calling thread alone.
template <class Scratch, class Body>
void for_each_task(int64_t tasks, int64_t workers, const Body& body) {
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex guard;
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    try {
      const OneBlasThread one;
      Scratch scratch;
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(task, scratch);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      if (!error) error = std::current_exception();
      next = tasks;
    }
  });
  if (error) std::rethrow_exception(error);
}

ScalarType accumulation_dtype(const std::vector<Tensor>& tensors) {
  const bool wide = std::any_of(tensors.begin(), tensors.end(),
                                [](const Tensor& t) { return t.scalar_type() == ScalarType::Double; });
  return wide ? ScalarType::Double : ScalarType::Float;
}

void check_weights(const char* op, const std::vector<Tensor>& weights) {
  STD_TORCH_CHECK(!weights.empty(), op, ": weights must hold at least one tensor, got an empty list");
  for (size_t b = 0; b < weights.size(); ++b) {
    STD_TORCH_CHECK(weights[b].is_cpu() && weights[b].dim() >= 2 && is_floating(weights[b].scalar_type()), op,
                    ": weights[", b,
                    "] must be a floating-point tensor [out, ...] of two or more dimensions on the CPU, got ",
                    describe(weights[b]));
  }
}

std::vector<View> views_of(const std::vector<Tensor>& weights) {
  std::vector<View> views;
  for (const Tensor& w : weights) views.emplace_back(w, column_dims(w), w.const_data_ptr());
  return views;
}

/// Where the m x m projectors start; the last entry is their total length.
std::vector<int64_t> projector_offsets(const std::vector<View>& views) {
  std::vector<int64_t> offsets{0};
  for (const View& view : views) offsets.push_back(offsets.back() + view.short_side() * view.short_side());
  return offsets;
}

/// Small matrices gain nothing from the refined float32 split, and float64 projectors need the exact one.
template <class T>
Split<T> split_gram(const double* G, int64_t live, int64_t m, double target) {
  if constexpr (std::is_same_v<T, float>) {
    if (live >= 100) {
      if (auto refined = split_refined(G, live, m, target)) return std::move(*refined);
    }
  }
  return split<T>(G, live, m, target);
}

/// What `rank_project` finds of one matrix.
struct Projection {
  double tail_energy = 0, norm = 0, zeros = 0;  // `zeros`: the fraction of exact zeros
  int64_t k = 0;
};

template <class T>
Projection project(const View& view, double target, GramScratch& scratch, T* N) {
  Projection result;
  if (view.empty()) return result;
  const int64_t m = view.short_side(), numel = view.rows * view.columns;
  const Scan scanned = dispatch_read(view, [&](auto tag) { return scan<typename decltype(tag)::type>(view); });
  result.zeros = static_cast<double>(numel - scanned.nonzeros) / static_cast<double>(numel);
  if (!std::isfinite(scanned.peak)) {
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    std::fill_n(N, m * m, std::numeric_limits<T>::quiet_NaN());
    return {nan, nan, result.zeros, -1};
  }
  Split<T> found{{0, 0}, false, 0, {}};
  if (scanned.nonzeros > 0) {
    result.norm = normalised_gram(view, scanned, scratch);
    found = split_gram<T>(scratch.gram.data(), static_cast<int64_t>(scanned.live.size()), m, target);
  }
  write_projector(found, scanned.live, m, N);
  result.k = found.rank.k;
  result.tail_energy = found.rank.tail_energy;
  return result;
}

/// The matrices, dearest first.
std::vector<int64_t> by_cost(const std::vector<View>& views) {
  const auto cost = [&](int64_t b) {
    const double m = views[b].short_side(), n = views[b].long_side();
    return m * m * (8 * m + n);
  };
  std::vector<int64_t> order(views.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost(a) > cost(b); });
  return order;
}

using Projected = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

/// loss, tail_energies, ranks, inv_norms, shares beside the finished projector.
Projected summarise(const std::vector<Projection>& found, double min_sparsity, const Tensor& like,
                    const Tensor& projector) {
  using torch::stable::new_empty;
  const int64_t batch = static_cast<int64_t>(found.size());
  const Tensor loss = new_empty(like, {}, projector.scalar_type());
  const Tensor tails = new_empty(like, {&batch, 1}, ScalarType::Double);
  const Tensor ranks = new_empty(like, {&batch, 1}, ScalarType::Long);
  const Tensor inv_norms = new_empty(like, {&batch, 1}, ScalarType::Double);
  const Tensor shares = new_empty(like, {&batch, 1}, ScalarType::Double);
  auto* tail = static_cast<double*>(tails.mutable_data_ptr());
  auto* k = static_cast<int64_t*>(ranks.mutable_data_ptr());
  auto* inv_norm = static_cast<double*>(inv_norms.mutable_data_ptr());
  auto* share = static_cast<double*>(shares.mutable_data_ptr());
  const auto active = [&](const Projection& p) {
    return p.norm != 0 && (min_sparsity <= 0 || p.zeros >= min_sparsity);
  };
  const double each = 1.0 / std::max<int64_t>(1, std::count_if(found.begin(), found.end(), active));
  double sum = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const Projection& p = found[b];
    tail[b] = p.tail_energy;
    k[b] = p.k;
    inv_norm[b] = p.norm != 0 ? 1 / p.norm : 0;
    share[b] = active(p) ? each : 0;
    if (active(p)) sum += each * p.tail_energy;
  }
  dispatch_floating(loss.scalar_type(), "loss", [&](auto tag) {
    using T = typename decltype(tag)::type;
    *static_cast<T*>(loss.mutable_data_ptr()) = static_cast<T>(-sum);
  });
  return {loss, tails, ranks, inv_norms, shares, projector};
}

Projected rank_project(std::vector<Tensor> weights, Tensor tail_energy, double min_sparsity) {
  check_weights("rank_project", weights);
  const double target = scalar_value(tail_energy, "tail_energy");
  const std::vector<View> views = views_of(weights);
  const std::vector<int64_t> offsets = projector_offsets(views), order = by_cost(views);
  const Tensor projector = torch::stable::new_empty(weights[0], {&offsets.back(), 1}, accumulation_dtype(weights));
  std::vector<Projection> found(weights.size());
  for_each_task<GramScratch>(weights.size(), torch::stable::get_num_threads(), [&](int64_t task, GramScratch& scratch) {
    const int64_t b = order[task];
    dispatch_floating(projector.scalar_type(), "projector", [&](auto tag) {
      using T = typename decltype(tag)::type;
      if constexpr (sizeof(T) >= sizeof(float)) {
        found[b] = project(views[b], target, scratch, static_cast<T*>(projector.mutable_data_ptr()) + offsets[b]);
      }
    });
  });
  return summarise(found, min_sparsity, weights[0], projector);
}

/// Columns first .. last - 1 of X of matrix b: one task of rank_apply.
struct Block {
  int64_t b, first, last;
};

struct Gradient {
  const View& weight;
  const View& out;
  double inv_norm;
  double factor;  // weight * share * inv_norm
  bool accumulate;
};

template <class T>
struct ApplyScratch {
  Compressed<T> straight, transposed;
  std::vector<T> dense, products, line;
  std::vector<Line<T>> panel, tile;
};

/// A[row, first + c] of the output becomes, or grows by, factor * values[c * stride].
template <class T>
void emit(const Gradient& g, int64_t row, int64_t first, int64_t count, const T* values, int64_t stride) {
  const T factor = static_cast<T>(g.factor);
  dispatch_floating(g.out.dtype, "gradients", [&](auto tag) {
    using S = typename decltype(tag)::type;
    using Sum = std::conditional_t<std::is_same_v<S, double>, double, T>;
    with_row<S>(g.out, row, [&](auto at) {
      if (g.accumulate) {
        for (int64_t c = 0; c < count; ++c) {
          S* element = at(first + c);
          *element = static_cast<S>(static_cast<Sum>(*element) + static_cast<Sum>(factor * values[c * stride]));
        }
      } else {
        for (int64_t c = 0; c < count; ++c) *at(first + c) = static_cast<S>(factor * values[c * stride]);
      }
    });
  });
}

/// N X over the nonzeros of a block X [m, width], kTileRows rows at a time.
template <class T>
void apply_sparse(const Gradient& g, const Block& block, const T* N, const Compressed<T>& columns, ApplyScratch<T>& s) {
  constexpr int64_t R = kTileRows<T>;
  const int64_t m = g.weight.short_side(), width = block.last - block.first;
  T* panel = reserve_lines(s.panel, m * R);
  T* tile = reserve_lines(s.tile, width * R);
  for (int64_t i = 0; i < m; i += R) {
    const int64_t rows = std::min(R, m - i);
    for (int64_t p = 0; p < m; ++p) std::copy_n(N + p * m + i, rows, panel + p * R);  // N is symmetric
    apply_tile(columns.as_columns(), width, panel, tile);
    if (g.weight.tall()) {
      for (int64_t j = 0; j < width; ++j) emit(g, block.first + j, i, rows, tile + j * R, 1);
    } else {
      for (int64_t l = 0; l < rows; ++l) emit(g, i + l, block.first, width, tile + l, R);
    }
  }
}

template <class T>
void apply_dense(const Gradient& g, const Block& block, const T* N, ApplyScratch<T>& s) {
  const View& A = g.weight;
  const int64_t m = A.short_side(), width = block.last - block.first;
  T* X = reserve(s.dense, m * width);
  T* out = reserve(s.products, m * width);
  const bool tall = A.tall();
  const int64_t first_row = tall ? block.first : 0, last_row = tall ? block.last : A.rows;
  const int64_t first = tall ? 0 : block.first, columns = tall ? A.columns : width;
  dispatch_read(A, [&](auto tag) {
    std::vector<typename decltype(tag)::type> buffer;
    T* to = X;
    for (int64_t r = first_row; r < last_row; ++r) {
      const auto* row = read_row(A, r, first, first + columns, buffer);
      for (int64_t c = 0; c < columns; ++c) *to++ = static_cast<T>(row[c] * g.inv_norm);
    }
  });
  if (tall) {
    multiply(borrow(X, width, m, m, 1), borrow(N, m, m, 1, m), borrow(out, width, m, m, 1));
  } else {
    multiply(borrow(N, m, m, m, 1), borrow(X, m, width, width, 1), borrow(out, m, width, width, 1));
  }
  for (int64_t r = first_row; r < last_row; ++r) emit(g, r, first, columns, out + (r - first_row) * columns, 1);
}

template <class T>
void apply_block(const Gradient& g, const Block& block, const T* N, ApplyScratch<T>& s) {
  const View& A = g.weight;
  const int64_t size = A.short_side() * (block.last - block.first);
  if (A.tall()) {
    s.straight.read(A, block.first, block.last, 0, A.columns, g.inv_norm, size);
  } else {
    s.straight.read(A, 0, A.rows, block.first, block.last, g.inv_norm, size);
  }
  if (s.straight.nonzeros() >= kSparseBelow * size) {
    apply_dense(g, block, N, s);
  } else if (A.tall()) {
    apply_sparse(g, block, N, s.straight, s);
  } else {
    s.transposed.transpose(s.straight);
    apply_sparse(g, block, N, s.transposed, s);
  }
}

/// The constants of a gradient: rank_project's results and the factor of the loss.
struct Constants {
  Tensor projector, inv_norms, shares;
  double weight;
};

void check_constants(const char* op, const Constants& c, size_t batch, int64_t elements) {
  const auto check = [&](const char* name, const Tensor& t, int64_t numel, bool any_float) {
    const bool dtype = t.scalar_type() == ScalarType::Double || (any_float && t.scalar_type() == ScalarType::Float);
    STD_TORCH_CHECK(t.is_cpu() && t.dim() == 1 && t.numel() == numel && t.is_contiguous() && dtype, op, ": ", name,
                    " must be a contiguous ", any_float ? "float32 or float64" : "float64", " [", numel,
                    "] on cpu, got ", describe(t));
  };
  check("projector", c.projector, elements, true);
  check("inv_norms", c.inv_norms, batch, false);
  check("shares", c.shares, batch, false);
}

/// Blocks of about 2^17 elements, the dearest matrices first; those with a share of 0 are left out.
std::vector<Block> blocks_of(const std::vector<View>& views, const double* shares) {
  std::vector<Block> blocks;
  for (int64_t b : by_cost(views)) {
    if (views[b].empty() || !(shares[b] > 0)) continue;
    const int64_t n = views[b].long_side();
    const int64_t width = std::max<int64_t>(64, (1 << 17) / views[b].short_side() / 16 * 16);
    for (int64_t first = 0; first < n; first += width) blocks.push_back({b, first, std::min(n, first + width)});
  }
  return blocks;
}

void apply(const char* op, const std::vector<Tensor>& outputs, const std::vector<Tensor>& weights,
           const Constants& constants, bool accumulate) {
  check_weights(op, weights);
  const std::vector<View> views = views_of(weights);
  const std::vector<int64_t> offsets = projector_offsets(views);
  check_constants(op, constants, weights.size(), offsets.back());
  std::vector<View> out;
  std::set<const void*> places;
  for (size_t b = 0; b < outputs.size(); ++b) {
    check_writable(op, "grads", outputs[b]);
    out.emplace_back(outputs[b], column_dims(weights[b]), outputs[b].mutable_data_ptr());
    places.insert(out.back().data);
  }
  const auto* inv_norms = static_cast<const double*>(constants.inv_norms.const_data_ptr());
  const auto* shares = static_cast<const double*>(constants.shares.const_data_ptr());
  const std::vector<Block> blocks = blocks_of(views, shares);
  const bool shared = places.size() < outputs.size();  // two weights that are one: their gradients add up in turn
  const int64_t workers = shared ? 1 : torch::stable::get_num_threads();
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    const T* N = static_cast<const T*>(constants.projector.const_data_ptr());
    for_each_task<ApplyScratch<T>>(blocks.size(), workers, [&](int64_t task, ApplyScratch<T>& scratch) {
      const int64_t b = blocks[task].b;
      const double factor = constants.weight * shares[b] * inv_norms[b];
      apply_block<T>({views[b], out[b], inv_norms[b], factor, accumulate}, blocks[task], N + offsets[b], scratch);
    });
  };
  if (constants.projector.scalar_type() == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
}

std::vector<Tensor> rank_apply(std::vector<Tensor> weights, Tensor projector, Tensor inv_norms, Tensor shares,
                               Tensor weight, bool /*fast: nothing here is*/) {
  std::vector<Tensor> gradients;
  for (const Tensor& w : weights) gradients.push_back(torch::stable::empty_like(w));
  apply("rank_apply", gradients, weights, {projector, inv_norms, shares, scalar_value(weight, "weight")}, false);
  const auto* share = static_cast<const double*>(shares.const_data_ptr());
  for (size_t b = 0; b < weights.size(); ++b) {
    if (!(share[b] > 0)) torch::stable::zero_(gradients[b]);
  }
  return gradients;
}

void rank_apply_(std::vector<Tensor> grads, std::vector<Tensor> weights, Tensor projector, Tensor inv_norms,
                 Tensor shares, Tensor weight, bool /*fast*/) {
  check_length("rank_apply_", "grads", grads.size(), weights.size());
  for (size_t b = 0; b < grads.size(); ++b) {
    STD_TORCH_CHECK(grads[b].is_cpu() && is_floating(grads[b].scalar_type()) && same_shape(grads[b], weights[b]),
                    "rank_apply_: grads[", b, "] must be a floating-point tensor of its weight's shape, got ",
                    describe(grads[b]), " for ", describe(weights[b]));
  }
  apply("rank_apply_", grads, weights, {projector, inv_norms, shares, scalar_value(weight, "weight")}, true);
}

}  // namespace
}  // namespace rpg_fast::rank

STABLE_TORCH_LIBRARY_IMPL(rpg_fast, CPU, m) {
  m.impl("rank_project", TORCH_BOX(&rpg_fast::rank::rank_project));
  m.impl("rank_apply", TORCH_BOX(&rpg_fast::rank::rank_apply));
  m.impl("rank_apply_", TORCH_BOX(&rpg_fast::rank::rank_apply_));
}
