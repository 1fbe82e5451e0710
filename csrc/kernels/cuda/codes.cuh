// Numbers as codes of 8 bits with a scale for each row (params.h), as csrc/kernels/cpu/codes.h has
// them, bit by bit.
#pragma once

#include "kernels/cuda/primitives.cuh"
#include "kernels/params.h"

namespace apr::APR_GPU {

template <Codes kCodes>
APR_DEVICE float number_of(uint32_t code) {
  if constexpr (kCodes == Codes::kInt8) {
    return static_cast<float>(static_cast<int8_t>(code));
  } else {
    const uint32_t magnitude = code & 0x7fu;
    const float tiny = static_cast<float>(magnitude) * 0x1p-9f;
    uint32_t bits = magnitude < 8u ? bits_of_float(tiny) : (magnitude << 20) + 0x3c000000u;
    bits = magnitude == 0x7fu ? 0x7fc00000u : bits;
    return float_of_bits(bits | (code & 0x80u) << 24);
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
    const uint32_t pair = (i < 2 ? codes.x : codes.y) >> (i % 2 * 16);
    words[i] = pack<T>(number_of<kCodes>(pair & 0xffu) * scale,
                       number_of<kCodes>(pair >> 8 & 0xffu) * scale);
  }
  return {words[0], words[1], words[2], words[3]};
}

}  // namespace apr::APR_GPU
