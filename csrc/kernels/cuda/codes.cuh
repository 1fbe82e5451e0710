// Numbers as codes of 8 bits with scales (params.h), as csrc/kernels/cpu/codes.h has them, bit by
// bit.
#pragma once

#include "kernels/cuda/primitives.cuh"
#include "kernels/params.h"

namespace apr::APR_GPU {

// As code_groups, which is the host's.
APR_DEVICE int groups_of(int dim) { return (dim + kCodeGroup - 1) / kCodeGroup; }

// The number of byte i of a word, exactly.
template <Codes kCodes>
APR_DEVICE float number_of(uint32_t word, int i) {
  if constexpr (kCodes == Codes::kInt8) {
    // 128 more than the code is no negative number, and the last bits of 2^23 and that.
    return float_of_bits(0x4b000000u | (((word ^ 0x80808080u) >> (8 * i)) & 0xffu)) - 8388736.f;
  } else {
    // Exponent and mantissa move into place, the multiplication re-biases.
    const auto top = static_cast<int32_t>(word << (24 - 8 * i));
    return float_of_bits(static_cast<uint32_t>(top >> 4) & 0x87f00000u) * 0x1p120f;
  }
}

// Of a number that was divided by its scale; to nearest, ties to even.
template <Codes kCodes>
APR_DEVICE uint32_t code_of(float x) {
  if constexpr (kCodes == Codes::kInt8) {
    return (bits_of_float(x + 12582912.f) - 0x4b400000u) & 0xffu;
  } else {
    const uint32_t u = bits_of_float(x), magnitude = u & 0x7fffffffu;
    const uint32_t normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - 0x3c0u;
    const uint32_t tiny = bits_of_float(float_of_bits(magnitude) + 16384.f) - 0x46800000u;
    return (magnitude < 0x3c800000u ? tiny : normal) | ((u >> 24) & 0x80u);
  }
}

// Eight codes as numbers of 16 bits.
template <typename T, Codes kCodes>
APR_DEVICE uint4 decode_chunk(const uint2& codes, float scale) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = i < 2 ? codes.x : codes.y;
    words[i] = pack<T>(number_of<kCodes>(word, i % 2 * 2) * scale,
                       number_of<kCodes>(word, i % 2 * 2 + 1) * scale);
  }
  return {words[0], words[1], words[2], words[3]};
}

}  // namespace apr::APR_GPU
