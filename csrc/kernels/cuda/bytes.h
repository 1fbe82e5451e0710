// Arrays one behind the other in one buffer, each on 16 bytes.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace apr {

// Where an array of `count` elements lies in a buffer.
template <typename T>
struct Slice {
  int64_t offset = 0, count = 0;
};

// Room for an array behind `bytes`, which grow.
template <typename T>
Slice<T> reserve(int64_t& bytes, int64_t count) {
  const int64_t at = (bytes + 15) / 16 * 16;
  bytes = at + count * static_cast<int64_t>(sizeof(T));
  return {at, count};
}

class Writer {
 public:
  explicit Writer(std::vector<char>& bytes) : bytes_(bytes) {}

  // Writes an array; it keeps room for `capacity` elements.
  template <typename T>
  Slice<T> put(const T* from, int64_t count, int64_t capacity = 0) {
    auto end = static_cast<int64_t>(bytes_.size());
    const Slice<T> slice = reserve<T>(end, capacity > count ? capacity : count);
    bytes_.resize(static_cast<size_t>(end));
    const size_t size = sizeof(T) * static_cast<size_t>(count);
    if (size > 0) std::memcpy(bytes_.data() + slice.offset, from, size);
    return slice;
  }
  template <typename T>
  Slice<T> put(const std::vector<T>& from, int64_t capacity = 0) {
    return put(from.data(), static_cast<int64_t>(from.size()), capacity);
  }

 private:
  std::vector<char>& bytes_;
};

}  // namespace apr
