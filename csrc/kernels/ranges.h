// Which slots of a segment one query row sees: shared by the planners of all back-ends.
#pragma once

#include "core/types.h"

#ifdef __CUDACC__
#define APR_HOST_DEVICE __host__ __device__
#else
#define APR_HOST_DEVICE
#endif

namespace apr {

struct SlotRange {
  int32_t lo, hi;  // lo <= hi
};

APR_HOST_DEVICE inline int32_t floor_div(int32_t a, int32_t b) {
  return a / b - (a % b != 0 && (a < 0) != (b < 0) ? 1 : 0);
}

// A window or chunk as the kernels take it: one larger than any distance of positions hides
// nothing.
inline int32_t bounded(int64_t tokens) {
  return static_cast<int32_t>(tokens < (int64_t{1} << 30) ? tokens : int64_t{1} << 30);
}

// Visible slots of row `i` of a run: the pair's range, causal in the own tail, cut by window and
// chunk (0: none), which count view positions.
APR_HOST_DEVICE inline SlotRange visible_slots(const PlanPair& pair, const PlanRun& run, int32_t i,
                                               int32_t window, int32_t chunk) {
  int32_t lo = pair.lo, hi = pair.hi;
  if (pair.first_own >= 0 && pair.first_own + i + 1 < hi) hi = pair.first_own + i + 1;
  const int32_t at = run.view_position + i * run.stride;
  if (window > 0) {  // the first slot with a view position above at - window
    const int32_t first = floor_div(at - window - pair.view_offset, pair.stride) + 1;
    if (first > lo) lo = first;
  }
  if (chunk > 0) {
    const int32_t start = floor_div(at, chunk) * chunk;
    const int32_t first = floor_div(start - 1 - pair.view_offset, pair.stride) + 1;
    const int32_t end = floor_div(start + chunk - 1 - pair.view_offset, pair.stride) + 1;
    if (first > lo) lo = first;
    if (end < hi) hi = end;
  }
  return {lo, hi > lo ? hi : lo};
}

}  // namespace apr
