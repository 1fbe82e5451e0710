// A number that two processes have alike where they are about to do the same.
#pragma once

#include <cstdint>

namespace apr {

class Digest {
 public:
  void mix(int64_t value) {  // the finalizer of splitmix64, chained
    state_ = (state_ ^ static_cast<uint64_t>(value)) * 0xbf58476d1ce4e5b9u;
    state_ = (state_ ^ (state_ >> 27)) * 0x94d049bb133111ebu;
    state_ ^= state_ >> 31;
  }
  uint64_t value() const { return state_; }

 private:
  uint64_t state_ = 0xcbf29ce484222325u;
};

}  // namespace apr
