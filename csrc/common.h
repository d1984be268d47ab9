#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace rpg_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using BFloat16 = c10::BFloat16;
using Half = c10::Half;

template <class T>
struct TypeTag {
  using type = T;
};

/// The name that Python prints, without "torch.".
inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(dtype);
  }
}

/// What a check got, for its message: "float32 [64, 3, 7, 7] on cpu".
inline std::string describe(const Tensor& tensor) {
  std::ostringstream text;
  text << dtype_name(tensor.scalar_type()) << " [";
  const auto sizes = tensor.sizes();
  for (size_t i = 0; i < sizes.size(); ++i) text << (i == 0 ? "" : ", ") << sizes[i];
  text << "] on ";
  if (tensor.is_cpu()) {
    text << "cpu";
  } else if (tensor.is_cuda()) {
    text << "cuda:" << tensor.get_device_index();
  } else {
    text << "another device";
  }
  return text.str();
}

/// Refuses a tensor that is to be written and whose elements share memory, such as an expanded one.
inline void check_writable(const char* op, const char* name, const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    STD_TORCH_CHECK(sizes[d] < 2 || strides[d] != 0, op, ": ", name, " must not share memory between elements, got ",
                    describe(tensor), " with stride 0 in dimension ", d, ": clone it first");
  }
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

inline bool on_same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto left = a.sizes(), right = b.sizes();
  if (left.size() != right.size()) return false;
  for (size_t i = 0; i < left.size(); ++i) {
    if (left[i] != right[i]) return false;
  }
  return true;
}

/// body(TypeTag<T>{}) with the C++ type of a floating dtype; `what` names the tensor in the message.
template <class Body>
auto dispatch_floating(ScalarType dtype, const char* what, Body&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(TypeTag<float>{});
    case ScalarType::Double:
      return body(TypeTag<double>{});
    case ScalarType::Half:
      return body(TypeTag<Half>{});
    case ScalarType::BFloat16:
      return body(TypeTag<BFloat16>{});
    default:
      STD_TORCH_CHECK(false, what, " must be float32, float64, float16 or bfloat16, got ", dtype_name(dtype));
  }
}

/// The value of a one-element floating tensor on the CPU.
inline double scalar_value(const Tensor& scalar, const char* what) {
  STD_TORCH_CHECK(scalar.is_cpu() && scalar.numel() == 1, what, " must hold one element on the CPU, got ",
                  describe(scalar));
  return dispatch_floating(scalar.scalar_type(), what, [&](auto tag) {
    return static_cast<double>(*static_cast<const typename decltype(tag)::type*>(scalar.const_data_ptr()));
  });
}

/// One buffer of packed bits: uint8 [nbytes], contiguous. Returns nbytes.
inline int64_t check_bits(const char* op, const char* what, const Tensor& bits) {
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Byte && bits.dim() == 1 && bits.is_contiguous(), op, ": ", what,
                  " must be a contiguous uint8 [nbytes], got ", describe(bits));
  return bits.numel();
}

/// Segment i, of `numel` bits from byte `offset` on, lies within the buffer.
inline void check_segment(const char* op, size_t i, int64_t offset, int64_t numel, int64_t nbytes) {
  STD_TORCH_CHECK(numel >= 0, op, ": numels[", i, "] must not be negative, got ", numel);
  STD_TORCH_CHECK(offset >= 0 && offset <= nbytes && (numel + 7) / 8 <= nbytes - offset, op, ": segment ", i, " of ",
                  numel, " bits at byte ", offset, " does not fit into ", nbytes, " bytes");
}

/// The same for ops that take an offset of -1 as "no mask".
inline void check_mask_segment(const char* op, size_t i, int64_t offset, int64_t numel, int64_t nbytes) {
  STD_TORCH_CHECK(offset >= -1, op, ": offsets[", i, "] must be a byte or -1 for no mask, got ", offset);
  if (offset >= 0) check_segment(op, i, offset, numel, nbytes);
}

inline void check_length(const char* op, const char* what, size_t got, size_t wanted) {
  STD_TORCH_CHECK(got == wanted, op, ": ", what, " must have ", wanted, " entries, got ", got);
}

/// The arguments of an op that reads segments: every one has its offset and lies within `bits`.
inline void check_segments(const char* op, const Tensor& bits, const std::vector<int64_t>& offsets,
                           const std::vector<int64_t>& numels) {
  const int64_t nbytes = check_bits(op, "bits", bits);
  check_length(op, "offsets", offsets.size(), numels.size());
  for (size_t i = 0; i < offsets.size(); ++i) check_segment(op, i, offsets[i], numels[i], nbytes);
}

/// Every tensor and offset of a selection lies where the others do and fits.
inline void check_selection(const char* op, const std::vector<Tensor>& scores, const Tensor& counts,
                            const std::vector<int64_t>& offsets, int64_t nbytes, const std::optional<Tensor>& eligible,
                            bool per_tensor) {
  check_length(op, "offsets", offsets.size(), scores.size());
  STD_TORCH_CHECK(nbytes >= 0, op, ": nbytes must not be negative, got ", nbytes);
  const int64_t problems = per_tensor ? static_cast<int64_t>(scores.size()) : 1;
  STD_TORCH_CHECK(counts.scalar_type() == ScalarType::Long && counts.is_contiguous() && counts.dim() == 1 &&
                      counts.numel() == problems && (scores.empty() || on_same_device(counts, scores[0])),
                  op, ": counts must be int64 [", problems, "] where the scores are, got ", describe(counts));
  STD_TORCH_CHECK(!eligible || (check_bits(op, "eligible", *eligible) >= nbytes && on_same_device(*eligible, counts)),
                  op, ": eligible must be uint8 of at least ", nbytes, " bytes where counts is, got ",
                  describe(*eligible));
  for (size_t i = 0; i < scores.size(); ++i) {
    STD_TORCH_CHECK(on_same_device(scores[i], counts) && is_floating(scores[i].scalar_type()), op, ": scores[", i,
                    "] must be floating where counts is, got ", describe(scores[i]));
    const bool one_kind = per_tensor || (scores[i].scalar_type() == ScalarType::Double) ==
                                            (scores[0].scalar_type() == ScalarType::Double);
    STD_TORCH_CHECK(one_kind, op, ": float64 scores cannot be ranked with others: scores[0] is ", describe(scores[0]),
                    ", scores[", i, "] is ", describe(scores[i]));
    check_segment(op, i, offsets[i], scores[i].numel(), nbytes);
  }
}

/// torch's current CUDA stream as a cudaStream_t. The symbol is looked up so that one library loads beside any torch.
inline void* current_cuda_stream(int32_t device_index) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Getter>(symbol);
  }();
  STD_TORCH_CHECK(getter != nullptr, "libtorch_cuda.so with aoti_torch_get_current_cuda_stream is not loaded");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device_index, &stream) == AOTI_TORCH_SUCCESS, "no current CUDA stream on device ",
                  device_index);
  return stream;
}

}  // namespace rpg_fast
