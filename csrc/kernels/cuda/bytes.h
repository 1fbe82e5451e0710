// Arrays one behind the other in one buffer, each on 16 bytes.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace apr {

inline int64_t reserve(int64_t& bytes, int64_t size) {
  const int64_t at = (bytes + 15) / 16 * 16;
  bytes = at + size;
  return at;
}

class Writer {
 public:
  explicit Writer(std::vector<char>& bytes) : bytes_(bytes) {}

  // Returns where the array begins; it keeps room for `capacity` elements.
  template <typename T>
  int64_t put(const T* from, int64_t count, int64_t capacity = 0) {
    auto end = static_cast<int64_t>(bytes_.size());
    const int64_t room = capacity > count ? capacity : count;
    const int64_t at = reserve(end, room * static_cast<int64_t>(sizeof(T)));
    bytes_.resize(static_cast<size_t>(end));
    if (count > 0) std::memcpy(bytes_.data() + at, from, sizeof(T) * static_cast<size_t>(count));
    return at;
  }

 private:
  std::vector<char>& bytes_;
};

}  // namespace apr
