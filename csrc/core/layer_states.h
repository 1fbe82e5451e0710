// Names for what recurrent layers hold after a token: the core says which are there and who may
// start from them; the tensors lie with whoever runs the model.
#pragma once

#include <cstdint>
#include <map>
#include <unordered_map>
#include <vector>

#include "core/types.h"

namespace apr {

using StateId = int64_t;  // never used twice

// Of one segment: the state after so many of its tokens. 0 is where a forked tail begins.
using SegmentStates = std::map<int64_t, StateId>;

class LayerStates {
 public:
  StateId create() {
    references_[next_] = 1;
    return next_++;
  }
  void retain(StateId id) { ++references_.at(id); }
  void release(StateId id) {
    if (--references_.at(id) > 0) return;
    references_.erase(id);
    freed_.push_back(id);
  }
  void release_all(const SegmentStates& states) {
    for (const auto& [count, id] : states) release(id);
  }

  int64_t size() const { return static_cast<int64_t>(references_.size()); }
  // That nothing leads to any more. They are asked for and forgotten in two calls: the tensors go
  // between them, and an interrupt there must lose none.
  const std::vector<StateId>& freed() const { return freed_; }
  void forget_freed() { freed_.clear(); }

 private:
  std::unordered_map<StateId, int64_t> references_;
  std::vector<StateId> freed_;
  StateId next_ = 0;
};

}  // namespace apr
