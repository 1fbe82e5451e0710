// Scalars between storage types and float, for the code outside of the inner loops.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/params.h"

namespace apr::cpu {

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

struct Float32 {
  using Storage = float;
  static float load(float x) { return x; }
  static float store(float x) { return x; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static float load(uint16_t x) { return float_of(uint32_t(x) << 16); }
  static uint16_t store(float x) {  // to nearest, ties to even
    const uint32_t u = bits_of(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40);
    return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
  }
};

struct Float16 {
  using Storage = uint16_t;
  static float load(uint16_t h) {
    const float scaled = float_of(uint32_t(h & 0x7fffu) << 13) * 0x1p112f;
    const uint32_t special = (h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0;
    return float_of(bits_of(scaled) | special | (uint32_t(h & 0x8000u) << 16));
  }
  static uint16_t store(float x) {  // to nearest, ties to even
    const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded mantissa below
      return uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
    }
    const uint32_t odd = (magnitude >> 13) & 1;
    return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
  }
};

template <typename Function>
void dispatch(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(Float32{});
    case DType::kBFloat16:
      return function(BFloat16{});
    case DType::kFloat16:
      return function(Float16{});
  }
}

}  // namespace apr::cpu
