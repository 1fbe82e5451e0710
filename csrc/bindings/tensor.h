// How Python hands tensors over: a pointer, strides in elements and a dtype code. No torch header.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>

#include "kernels/params.h"

namespace apr::bindings {

namespace py = pybind11;

// (pointer, row stride, head stride)
using RowsTuple = std::array<int64_t, 3>;

inline void* pointer(int64_t address) { return reinterpret_cast<void*>(address); }

inline Rows rows(const RowsTuple& t) { return {pointer(t[0]), t[1], t[2]}; }

// (k pointer, v pointer, pages, kv heads, page size, head_dim of k, head_dim of v, dtype code)
using PoolTuple = std::array<int64_t, 8>;

inline Pool pool(const PoolTuple& t) {
  return {pointer(t[0]), pointer(t[1]), t[2], t[3], t[4], t[5], t[6], static_cast<DType>(t[7])};
}

}  // namespace apr::bindings
