#include <cmath>
#include <cstring>
#include <optional>

#include "bits.h"
#include "elements.h"

// Every operation rounds, as in plain torch: the same weights on every instruction set.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "../optim.h"

namespace rpg_fast {
namespace {

template <bool kDecay, bool kMomentum, bool kNesterov, class A>
RPG_FAST_HOST_DEVICE void sgd_loop(const SgdStep<A> step, int64_t n, const uint8_t* __restrict__ keep,
                                   const A* __restrict__ g, A* __restrict__ m, A* __restrict__ p) {
  for (int64_t i = 0; i < n; ++i) {
    A buffer = kMomentum ? m[i] : A(0);
    sgd_element<kDecay, kMomentum, kNesterov>(step, keep[i], g[i], buffer, p[i]);
    if constexpr (kMomentum) m[i] = buffer;
  }
}

template <class A>
RPG_FAST_HOST_DEVICE void sgd_block(const SgdStep<A>& step, bool nesterov, int64_t n, const uint8_t* keep, const A* g,
                                    A* m, A* p) {
  const bool decay = step.weight_decay != 0;
  if (m == nullptr) {
    decay ? sgd_loop<true, false, false>(step, n, keep, g, m, p)
          : sgd_loop<false, false, false>(step, n, keep, g, m, p);
  } else if (nesterov) {
    decay ? sgd_loop<true, true, true>(step, n, keep, g, m, p) : sgd_loop<false, true, true>(step, n, keep, g, m, p);
  } else {
    decay ? sgd_loop<true, true, false>(step, n, keep, g, m, p) : sgd_loop<false, true, false>(step, n, keep, g, m, p);
  }
}

template <bool kAmsgrad, class A>
RPG_FAST_HOST_DEVICE void adamw_loop(const AdamwStep<A> step, int64_t n, const uint8_t* __restrict__ keep,
                                     const A* __restrict__ g, A* __restrict__ m, A* __restrict__ v,
                                     A* __restrict__ v_max, A* __restrict__ p) {
  for (int64_t i = 0; i < n; ++i) {
    A largest = kAmsgrad ? v_max[i] : A(0);
    adamw_element<kAmsgrad>(step, keep[i], g[i], m[i], v[i], largest, p[i]);
    if constexpr (kAmsgrad) v_max[i] = largest;
  }
}

template <class A>
RPG_FAST_HOST_DEVICE void adamw_block(const AdamwStep<A>& step, int64_t n, const uint8_t* keep, const A* g, A* m, A* v,
                                      A* v_max, A* p) {
  v_max == nullptr ? adamw_loop<false>(step, n, keep, g, m, v, v_max, p)
                   : adamw_loop<true>(step, n, keep, g, m, v, v_max, p);
}

template <class A>
RPG_FAST_HOST_DEVICE void unscale_block(A scale, int64_t n, const A* g, A* unscaled) {
  for (int64_t i = 0; i < n; ++i) unscaled[i] = g[i] / scale;
}

// The templates above become one function per instruction set here.
RPG_FAST_CLONES void sgd(const SgdStep<float>& step, bool nesterov, int64_t n, const uint8_t* keep, const float* g,
                         float* m, float* p) {
  sgd_block(step, nesterov, n, keep, g, m, p);
}
RPG_FAST_CLONES void sgd(const SgdStep<double>& step, bool nesterov, int64_t n, const uint8_t* keep, const double* g,
                         double* m, double* p) {
  sgd_block(step, nesterov, n, keep, g, m, p);
}
RPG_FAST_CLONES void adamw(const AdamwStep<float>& step, int64_t n, const uint8_t* keep, const float* g, float* m,
                           float* v, float* v_max, float* p) {
  adamw_block(step, n, keep, g, m, v, v_max, p);
}
RPG_FAST_CLONES void adamw(const AdamwStep<double>& step, int64_t n, const uint8_t* keep, const double* g, double* m,
                           double* v, double* v_max, double* p) {
  adamw_block(step, n, keep, g, m, v, v_max, p);
}
RPG_FAST_CLONES void unscale(float scale, int64_t n, const float* g, float* unscaled) {
  unscale_block(scale, n, g, unscaled);
}
RPG_FAST_CLONES void unscale(double scale, int64_t n, const double* g, double* unscaled) {
  unscale_block(scale, n, g, unscaled);
}

/// The tensors that one parameter's step reads and writes, and its mask.
struct Parameter {
  Elements param, grad, state[3];
  const uint8_t* bits;  // null: everything is kept
};

ScalarType accumulation_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

class ParameterList {
 public:
  ParameterList(const char* op, const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                const std::optional<Tensor>& bits, const std::vector<int64_t>& offsets);
  void add_state(const char* name, const std::vector<Tensor>& states);
  /// body(index, parameter, chunk) over all elements, in parallel.
  template <class Body>
  void for_each_chunk(const Body& body) const;
  const std::vector<Parameter>& items() const { return items_; }

 private:
  const char* op_;
  const std::vector<Tensor>& params_;
  std::vector<Parameter> items_;
  int states_ = 0;
};

void check_like(const char* op, const char* name, size_t i, const Tensor& tensor, const Tensor& param) {
  STD_TORCH_CHECK(tensor.is_cpu() && is_floating(tensor.scalar_type()) && same_shape(tensor, param), op, ": ", name,
                  "[", i, "] must be floating, of params[", i, "]'s shape, on the CPU: ", describe(param), "; got ",
                  describe(tensor));
}

ParameterList::ParameterList(const char* op, const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                             const std::optional<Tensor>& bits, const std::vector<int64_t>& offsets)
    : op_(op), params_(params), items_(params.size()) {
  check_length(op, "grads", grads.size(), params.size());
  check_length(op, "offsets", offsets.size(), params.size());
  const int64_t nbytes = bits ? check_bits(op, "bits", *bits) : 0;
  const auto* segments = bits ? static_cast<const uint8_t*>(bits->const_data_ptr()) : nullptr;
  for (size_t i = 0; i < params.size(); ++i) {
    check_like(op, "params", i, params[i], params[i]);
    check_writable(op, "params", params[i]);
    check_like(op, "grads", i, grads[i], params[i]);
    if (bits) check_mask_segment(op, i, offsets[i], params[i].numel(), nbytes);
    items_[i].param = Elements(params[i]);
    items_[i].grad = Elements(grads[i]);
    items_[i].bits = bits && offsets[i] >= 0 ? segments + offsets[i] : nullptr;
  }
}

void ParameterList::add_state(const char* name, const std::vector<Tensor>& states) {
  check_length(op_, name, states.size(), params_.size());
  for (size_t i = 0; i < states.size(); ++i) {
    check_like(op_, name, i, states[i], params_[i]);
    check_writable(op_, name, states[i]);
    const ScalarType got = states[i].scalar_type(), own = params_[i].scalar_type();
    STD_TORCH_CHECK(got == own || got == accumulation_dtype(own), op_, ": ", name, "[", i, "] must be ",
                    dtype_name(own), " or ", dtype_name(accumulation_dtype(own)), ", got ", dtype_name(got));
    items_[i].state[states_] = Elements(states[i]);
  }
  ++states_;
}

template <class Body>
void ParameterList::for_each_chunk(const Body& body) const {
  std::vector<int64_t> numels;
  for (const Parameter& item : items_) numels.push_back(item.param.numel());
  const std::vector<Chunk> chunks = chunks_of(numels);
  parallel_items(chunks.size(), [&](int64_t i) {
    const Parameter& parameter = items_[chunks[i].tensor];
    if (parameter.param.dtype() == ScalarType::Double) {
      body(TypeTag<double>{}, parameter, chunks[i]);
    } else {
      body(TypeTag<float>{}, parameter, chunks[i]);
    }
  });
}

/// What a block of a parameter needs beside the tensors: its mask as bytes and its gradient as A, unscaled.
template <class A>
struct Stage {
  A param[kBlock], grad[kBlock], state[3][kBlock];
  uint8_t keep[kBlock];

  explicit Stage(const Parameter& parameter) {
    if (parameter.bits == nullptr) std::memset(keep, 1, kBlock);
  }

  void load_keep(const Parameter& parameter, int64_t begin, int64_t n) {
    if (parameter.bits != nullptr) expand_bits(parameter.bits + begin / 8, n, keep);
  }

  const A* load_grad(const Parameter& parameter, int64_t begin, int64_t n, std::optional<double> scale) {
    const A* g = load(parameter.grad, begin, n, grad);
    if (!scale) return g;
    unscale(static_cast<A>(*scale), n, g, grad);
    return grad;
  }
};

std::optional<double> optional_value(const std::optional<Tensor>& scalar, const char* what) {
  return scalar ? std::optional(scalar_value(*scalar, what)) : std::nullopt;
}

void masked_sgd_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffers,
                 std::optional<Tensor> bits, std::vector<int64_t> offsets, Tensor lr, double momentum, double dampening,
                 double weight_decay, bool nesterov, bool maximize, bool first_step, std::optional<Tensor> grad_scale,
                 std::optional<Tensor> found_inf) {
  ParameterList list("masked_sgd_", params, grads, bits, offsets);
  if (momentum != 0) list.add_state("momentum_buffers", momentum_buffers);
  const double rate = scalar_value(lr, "masked_sgd_: lr");
  const auto scale = optional_value(grad_scale, "masked_sgd_: grad_scale");
  if (optional_value(found_inf, "masked_sgd_: found_inf").value_or(0) != 0) return;
  list.for_each_chunk([&](auto tag, const Parameter& parameter, Chunk chunk) {
    using A = typename decltype(tag)::type;
    const SgdStep<A> step{maximize ? A(-1) : A(1), A(weight_decay), A(momentum), first_step ? A(1) : A(1 - dampening),
                          A(rate)};
    Stage<A> stage(parameter);
    for (int64_t begin = chunk.begin; begin < chunk.end; begin += kBlock) {
      const int64_t n = std::min(kBlock, chunk.end - begin);
      stage.load_keep(parameter, begin, n);
      const A* g = stage.load_grad(parameter, begin, n, scale);
      A* p = load(parameter.param, begin, n, stage.param);
      A* m = momentum != 0 ? load(parameter.state[0], begin, n, stage.state[0]) : nullptr;
      if (m != nullptr && first_step) std::memset(m, 0, n * sizeof(A));
      sgd(step, nesterov, n, stage.keep, g, m, p);
      if (m != nullptr) store(parameter.state[0], begin, n, m);
      store(parameter.param, begin, n, p);
    }
  });
}

/// Counts every step up and returns the new counts.
std::vector<double> count_up(const std::vector<Tensor>& steps, size_t wanted) {
  check_length("masked_adamw_", "steps", steps.size(), wanted);
  for (size_t i = 0; i < steps.size(); ++i) {
    STD_TORCH_CHECK(steps[i].is_cpu() && steps[i].scalar_type() == ScalarType::Float && steps[i].numel() == 1,
                    "masked_adamw_: steps[", i, "] must be one float32 on the CPU, got ", describe(steps[i]));
  }
  std::vector<double> counts;
  for (const Tensor& step : steps) counts.push_back(*static_cast<float*>(step.mutable_data_ptr()) += 1);
  return counts;
}

void masked_adamw_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                   std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> max_exp_avg_sqs, std::vector<Tensor> steps,
                   std::optional<Tensor> bits, std::vector<int64_t> offsets, Tensor lr, double beta1, double beta2,
                   double eps, double weight_decay, bool amsgrad, bool maximize, std::optional<Tensor> grad_scale,
                   std::optional<Tensor> found_inf) {
  ParameterList list("masked_adamw_", params, grads, bits, offsets);
  list.add_state("exp_avgs", exp_avgs);
  list.add_state("exp_avg_sqs", exp_avg_sqs);
  if (amsgrad) list.add_state("max_exp_avg_sqs", max_exp_avg_sqs);
  const double rate = scalar_value(lr, "masked_adamw_: lr");
  // torch multiplies in lr's own precision
  const double decay = lr.scalar_type() == ScalarType::Double
                           ? rate * weight_decay
                           : static_cast<float>(rate) * static_cast<float>(weight_decay);
  const auto scale = optional_value(grad_scale, "masked_adamw_: grad_scale");
  if (optional_value(found_inf, "masked_adamw_: found_inf").value_or(0) != 0) return;
  const std::vector<double> t = count_up(steps, params.size());
  list.for_each_chunk([&](auto tag, const Parameter& parameter, Chunk chunk) {
    using A = typename decltype(tag)::type;
    const double correction1 = 1 - std::pow(beta1, t[chunk.tensor]);
    const double correction2 = 1 - std::pow(beta2, t[chunk.tensor]);
    const AdamwStep<A> step{
        maximize ? A(-1) : A(1),  A(decay), A(1 - beta1), A(beta2), A(1 - beta2), A(eps), A(rate / correction1),
        A(std::sqrt(correction2))};
    Stage<A> stage(parameter);
    for (int64_t begin = chunk.begin; begin < chunk.end; begin += kBlock) {
      const int64_t n = std::min(kBlock, chunk.end - begin);
      stage.load_keep(parameter, begin, n);
      const A* g = stage.load_grad(parameter, begin, n, scale);
      A* p = load(parameter.param, begin, n, stage.param);
      A* m = load(parameter.state[0], begin, n, stage.state[0]);
      A* v = load(parameter.state[1], begin, n, stage.state[1]);
      A* v_max = amsgrad ? load(parameter.state[2], begin, n, stage.state[2]) : nullptr;
      adamw(step, n, stage.keep, g, m, v, v_max, p);
      store(parameter.state[0], begin, n, m);
      store(parameter.state[1], begin, n, v);
      if (amsgrad) store(parameter.state[2], begin, n, v_max);
      store(parameter.param, begin, n, p);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rpg_fast, CPU, m) {
  m.impl("masked_sgd_", TORCH_BOX(&masked_sgd_));
  m.impl("masked_adamw_", TORCH_BOX(&masked_adamw_));
}

}  // namespace rpg_fast
