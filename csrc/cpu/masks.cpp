#include "../masks.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <cstring>
#include <optional>

#include "bits.h"
#include "elements.h"

namespace rpg_fast {

Tensor zero_bits(const char* op, int64_t nbytes) {
  STD_TORCH_CHECK(nbytes >= 0, op, ": nbytes must not be negative, got ", nbytes);
  Tensor bits = torch::stable::empty({nbytes}, ScalarType::Byte);
  std::fill_n(static_cast<uint8_t*>(bits.mutable_data_ptr()), nbytes, uint8_t{0});
  return bits;
}

void expand_bits(const uint8_t* bits, int64_t n, uint8_t* keep) {
  for (int64_t i = 0; i < n / 8; ++i) {
    const uint64_t places = bits[i] * 0x0101010101010101u & 0x8040201008040201u;  // byte j holds bit j in its place
    const uint64_t ones = (places + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
    std::memcpy(keep + 8 * i, &ones, 8);
  }
  for (int64_t i = n / 8 * 8; i < n; ++i) keep[i] = bits[i / 8] >> i % 8 & 1;
}

void pack_bits(const uint8_t* keep, int64_t n, uint8_t* bits) {
  int64_t i = 0;
#ifdef __SSE2__
  for (; i + 16 <= n; i += 16) {
    const __m128i ones = _mm_loadu_si128(reinterpret_cast<const __m128i*>(keep + i));
    const auto packed = static_cast<uint16_t>(_mm_movemask_epi8(_mm_slli_epi16(ones, 7)));
    std::memcpy(bits + i / 8, &packed, 2);
  }
#endif
  for (; i + 8 <= n; i += 8) {
    uint64_t ones;
    std::memcpy(&ones, keep + i, 8);
    bits[i / 8] = static_cast<uint8_t>(ones * 0x0102040810204080u >> 56);  // moves byte j's one to bit 56 + j
  }
  if (n % 8 == 0) return;
  uint8_t last = 0;
  for (int64_t i = n / 8 * 8; i < n; ++i) last |= static_cast<uint8_t>(keep[i] << i % 8);
  bits[n / 8] = last;
}

namespace {

RPG_FAST_CLONES_FOR("popcnt", "default") int64_t count_ones_serial(const uint8_t* bits, int64_t numel) {
  int64_t scratch[1];
  return count_ones(SerialBlock{}, bits, numel, scratch);
}

RPG_FAST_CLONES void zero_unless_f32(const uint8_t* keep, int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] = keep[i] ? x[i] : 0.0f;
}

RPG_FAST_CLONES void zero_unless_f64(const uint8_t* keep, int64_t n, double* x) {
  for (int64_t i = 0; i < n; ++i) x[i] = keep[i] ? x[i] : 0.0;
}

RPG_FAST_CLONES void zero_unless_16(const uint8_t* keep, int64_t n, uint16_t* x) {
  for (int64_t i = 0; i < n; ++i) x[i] = keep[i] ? x[i] : 0;
}

void zero_run(const uint8_t* keep, int64_t n, float* x) { zero_unless_f32(keep, n, x); }
void zero_run(const uint8_t* keep, int64_t n, double* x) { zero_unless_f64(keep, n, x); }
void zero_run(const uint8_t* keep, int64_t n, BFloat16* x) { zero_unless_16(keep, n, &x->x); }
void zero_run(const uint8_t* keep, int64_t n, Half* x) { zero_unless_16(keep, n, &x->x); }

RPG_FAST_CLONES void scale_f32(float factor, int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

RPG_FAST_CLONES void scale_f64(double factor, int64_t n, double* x) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

void scale_run(float factor, int64_t n, float* x) { scale_f32(factor, n, x); }
void scale_run(double factor, int64_t n, double* x) { scale_f64(factor, n, x); }

/// x <- factor * x where kept, else 0. `bits` null: everything is kept.
void scale_chunk(const Elements& tensor, const uint8_t* bits, double factor, Chunk chunk) {
  dispatch_floating(tensor.dtype(), "tensors", [&](auto tag) {
    using A = Accumulator<typename decltype(tag)::type>;
    A stage[kBlock];
    uint8_t keep[kBlock];
    for (int64_t begin = chunk.begin; begin < chunk.end; begin += kBlock) {
      const int64_t n = std::min(kBlock, chunk.end - begin);
      A* x = load(tensor, begin, n, stage);
      scale_run(static_cast<A>(factor), n, x);
      if (bits != nullptr) {
        expand_bits(bits + begin / 8, n, keep);
        zero_run(keep, n, x);
      }
      store(tensor, begin, n, x);
    }
  });
}

/// x <- 0 where not kept; nothing else is touched.
void zero_chunk(const Elements& tensor, const uint8_t* bits, Chunk chunk) {
  dispatch_floating(tensor.dtype(), "tensors", [&](auto tag) {
    using T = typename decltype(tag)::type;
    uint8_t keep[kBlock];
    for (int64_t begin = chunk.begin; begin < chunk.end; begin += kBlock) {
      const int64_t n = std::min(kBlock, chunk.end - begin);
      expand_bits(bits + begin / 8, n, keep);
      tensor.for_each_run<T>(begin, n, [&](T* x, int64_t stride, int64_t position, int64_t run) {
        if (stride == 1) return zero_run(keep + position, run, x);
        for (int64_t i = 0; i < run; ++i) {
          if (!keep[position + i]) x[i * stride] = T(0);
        }
      });
    }
  });
}

Tensor pack(std::vector<Tensor> masks, std::vector<int64_t> offsets, int64_t nbytes) {
  check_length("pack", "offsets", offsets.size(), masks.size());
  std::vector<Elements> sources;
  std::vector<int64_t> numels;
  for (size_t i = 0; i < masks.size(); ++i) {
    STD_TORCH_CHECK(masks[i].is_cpu() && masks[i].scalar_type() == ScalarType::Bool, "pack: masks[", i,
                    "] must be bool on the CPU, got ", describe(masks[i]));
    sources.emplace_back(masks[i]);
    numels.push_back(masks[i].numel());
    check_segment("pack", i, offsets[i], numels[i], nbytes);
  }
  Tensor bits = zero_bits("pack", nbytes);
  auto* out = static_cast<uint8_t*>(bits.mutable_data_ptr());
  const std::vector<Chunk> chunks = chunks_of(numels);
  parallel_items(chunks.size(), [&](int64_t item) {
    const Chunk chunk = chunks[item];
    uint8_t keep[kBlock];
    for (int64_t begin = chunk.begin; begin < chunk.end; begin += kBlock) {
      const int64_t n = std::min(kBlock, chunk.end - begin);
      sources[chunk.tensor].for_each_run<uint8_t>(
          begin, n, [&](const uint8_t* from, int64_t stride, int64_t position, int64_t run) {
            if (stride == 1) {
              for (int64_t i = 0; i < run; ++i) keep[position + i] = from[i] != 0;
            } else {
              for (int64_t i = 0; i < run; ++i) keep[position + i] = from[i * stride] != 0;
            }
          });
      pack_bits(keep, n, out + offsets[chunk.tensor] + begin / 8);
    }
  });
  return bits;
}

std::vector<Tensor> unpack(Tensor bits, std::vector<int64_t> offsets, std::vector<int64_t> numels) {
  check_segments("unpack", bits, offsets, numels);
  const auto* in = static_cast<const uint8_t*>(bits.const_data_ptr());
  std::vector<Tensor> masks;
  std::vector<uint8_t*> out;
  for (const int64_t numel : numels) {
    masks.push_back(torch::stable::empty({numel}, ScalarType::Bool));
    out.push_back(static_cast<uint8_t*>(masks.back().mutable_data_ptr()));
  }
  const std::vector<Chunk> chunks = chunks_of(numels);
  parallel_items(chunks.size(), [&](int64_t item) {
    const auto [tensor, begin, end] = chunks[item];
    expand_bits(in + offsets[tensor] + begin / 8, end - begin, out[tensor] + begin);
  });
  return masks;
}

Tensor popcount(Tensor bits, std::vector<int64_t> offsets, std::vector<int64_t> numels) {
  check_segments("popcount", bits, offsets, numels);
  const int64_t batch = static_cast<int64_t>(offsets.size());
  Tensor counts = torch::stable::empty({batch}, ScalarType::Long);  // [B]
  const auto* in = static_cast<const uint8_t*>(bits.const_data_ptr());
  auto* out = static_cast<int64_t*>(counts.mutable_data_ptr());
  parallel_items(batch, [&](int64_t b) { out[b] = count_ones_serial(in + offsets[b], numels[b]); });
  return counts;
}

void mask_(std::vector<Tensor> tensors, Tensor bits, std::vector<int64_t> offsets, std::optional<Tensor> scale) {
  const int64_t nbytes = check_bits("mask_", "bits", bits);
  check_length("mask_", "offsets", offsets.size(), tensors.size());
  std::vector<Elements> targets;
  std::vector<int64_t> numels;
  for (size_t i = 0; i < tensors.size(); ++i) {
    STD_TORCH_CHECK(tensors[i].is_cpu() && is_floating(tensors[i].scalar_type()), "mask_: tensors[", i,
                    "] must be floating on the CPU, got ", describe(tensors[i]));
    targets.emplace_back(tensors[i]);
    numels.push_back(tensors[i].numel());
    check_mask_segment("mask_", i, offsets[i], numels[i], nbytes);
    check_writable("mask_", "tensors", tensors[i]);
    if (offsets[i] < 0 && !scale) numels.back() = 0;  // nothing to do
  }
  const double factor = scale ? scalar_value(*scale, "mask_: scale") : 1.0;
  const auto* in = static_cast<const uint8_t*>(bits.const_data_ptr());
  const std::vector<Chunk> chunks = chunks_of(numels);
  parallel_items(chunks.size(), [&](int64_t item) {
    const Chunk chunk = chunks[item];
    const uint8_t* segment = offsets[chunk.tensor] < 0 ? nullptr : in + offsets[chunk.tensor];
    if (scale) {
      scale_chunk(targets[chunk.tensor], segment, factor, chunk);
    } else {
      zero_chunk(targets[chunk.tensor], segment, chunk);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rpg_fast, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("popcount", TORCH_BOX(&popcount));
  m.impl("mask_", TORCH_BOX(&mask_));
}

}  // namespace rpg_fast
