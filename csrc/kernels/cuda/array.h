// Arrays in device memory. Emulated, they know their size and check each access.
#pragma once

#include <cstdint>
#ifdef APR_EMULATED
#include <stdexcept>
#include <string>
#define APR_GPU cuda_emulated
#else
#define APR_GPU cuda
#endif
#ifdef __CUDACC__
#define APR_DEVICE __device__ __forceinline__
#define APR_INLINE __host__ __device__ __forceinline__
#else
#define APR_DEVICE inline
#define APR_INLINE inline
#endif
#ifdef APR_EMULATED
#define APR_HERE [[gnu::always_inline]] inline  // so that each use is a place of its own
#else
#define APR_HERE APR_INLINE
#endif

namespace apr::APR_GPU {

#ifdef APR_EMULATED
// What a kernel did that hardware forbids or leaves undefined.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// Counts an access of the thread that runs, if one does (emulated/counts.h).
void note_global(const void* address, int64_t bytes);
#endif

template <typename T>
struct Array {
  T* data = nullptr;
#ifdef APR_EMULATED
  int64_t size = 0;
#endif

  Array() = default;
  APR_INLINE Array(T* from, int64_t count) : data(from) {
#ifdef APR_EMULATED
    size = count;
#else
    static_cast<void>(count);
#endif
  }

  // The address of element i, from which `count` elements are read or written.
  APR_HERE T* at(int64_t i, int64_t count = 1) const {
#ifdef APR_EMULATED
    note_global(checked(i, count), count * static_cast<int64_t>(sizeof(T)));
#else
    static_cast<void>(count);
#endif
    return data + i;
  }
#ifdef APR_EMULATED
  T* checked(int64_t i, int64_t count) const {
    if (i < 0 || i + count > size) {
      throw Fault("out of bounds: elements [" + std::to_string(i) + ", " +
                  std::to_string(i + count) + ") of an array of " + std::to_string(size));
    }
    return data + i;
  }
#endif
  APR_HERE T& operator[](int64_t i) const { return *at(i); }
  // The same memory as elements of another size.
  template <typename U>
  APR_INLINE Array<U> as() const {
#ifdef APR_EMULATED
    return {reinterpret_cast<U*>(data), size * int64_t{sizeof(T)} / int64_t{sizeof(U)}};
#else
    return {reinterpret_cast<U*>(data), 0};
#endif
  }
  APR_INLINE explicit operator bool() const { return data != nullptr; }
};

}  // namespace apr::APR_GPU
