// Drawing a token, the same on every machine: weights are integers, so that sums do not depend on
// the order in which they are taken, and random numbers are a function of a key and a count.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels/params.h"
#include "kernels/ranges.h"

namespace apr {

inline constexpr int64_t kMostVocab = int64_t{1} << 22;  // sums of weights stay below 2^63

// e^d for d <= 0, relative error about 2e-7, exactly 1 at 0 and 0 below kLowest. Only rounded
// operations with one result: fused where it says so, and nowhere else. Cephes' polynomial.
inline constexpr float kLowest = -28.f;  // weights below are no whole number
inline constexpr float kRound = 12582912.f;
inline constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
inline constexpr float kExp0 = 1.9875691500e-4f, kExp1 = 1.3981999507e-3f;
inline constexpr float kExp2 = 8.3334519073e-3f, kExp3 = 4.1665795894e-2f;
inline constexpr float kExp4 = 1.6666665459e-1f, kExp5 = 5.0000001201e-1f;

APR_HOST_DEVICE inline float share_of(float d) {
  if (!(d >= kLowest)) return 0.f;
  const float n = fmaf(d, kLog2e, kRound) - kRound;
  const float r = fmaf(n, -kLn2Low, fmaf(n, -kLn2High, d));
  float p = fmaf(fmaf(fmaf(kExp0, r, kExp1), r, kExp2), r, kExp3);
  p = fmaf(fmaf(p, r, kExp4), r, kExp5);
  p = fmaf(p, r * r, r) + 1.f;
  int32_t bits;
  memcpy(&bits, &p, 4);
  bits += static_cast<int32_t>(n) * (1 << 23);
  memcpy(&p, &bits, 4);
  return p;
}

// A share of the most likely token's as a whole number of 2^-40: its upper and its lower 20 bits.
inline constexpr float kHalfWeight = 1048576.f;
inline constexpr double kWholeWeight = 1099511627776.;
APR_HOST_DEVICE inline int64_t weight_of(float share) {
  const float scaled = share * kHalfWeight;
  const auto high = static_cast<int32_t>(scaled);
  const auto low = static_cast<int32_t>((scaled - static_cast<float>(high)) * kHalfWeight);
  return static_cast<int64_t>(high) * 1048576 + low;
}

// 64 random bits: Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011) of a key and a count.
APR_HOST_DEVICE inline uint64_t random_bits(uint64_t key, uint64_t count) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t x[4] = {static_cast<uint32_t>(count), static_cast<uint32_t>(count >> 32), 0, 0};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * x[0], b = uint64_t{0xCD9E8D57u} * x[2];
    const uint32_t y0 = static_cast<uint32_t>(b >> 32) ^ x[1] ^ k0;
    const uint32_t y2 = static_cast<uint32_t>(a >> 32) ^ x[3] ^ k1;
    x[0] = y0;
    x[1] = static_cast<uint32_t>(b);
    x[2] = y2;
    x[3] = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return static_cast<uint64_t>(x[1]) << 32 | x[0];
}

// floor(fraction * sum) for 64 random bits as the fraction: below `sum`.
APR_HOST_DEVICE inline int64_t part_of_sum(uint64_t fraction, int64_t sum) {
#ifdef __CUDA_ARCH__
  return static_cast<int64_t>(__umul64hi(fraction, static_cast<uint64_t>(sum)));
#else
  return static_cast<int64_t>(static_cast<unsigned __int128>(fraction) * sum >> 64);
#endif
}

// What top-p leaves of weights that sum to `all`: tokens are taken from the likeliest on until they
// reach this. transformers drops from the other end what sums to 1 - p at most.
APR_HOST_DEVICE inline int64_t mass_kept(double tail, int64_t all) {
  const auto dropped = static_cast<int64_t>(tail * static_cast<double>(all));
  return all - (dropped < all ? dropped : all - 1);
}

}  // namespace apr
