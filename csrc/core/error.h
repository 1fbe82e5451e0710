// The one exception of the core; its kind decides which Python class a user sees.
#pragma once

#include <stdexcept>
#include <string>

namespace apr {

enum class ErrorKind {
  kInvalidInput,
  kOutOfPages,
  kThreadReleased,
  kForeignThread,
  kUnsupportedRope,
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

[[noreturn]] inline void invalid(const std::string& message) {
  throw Error(ErrorKind::kInvalidInput, message);
}

}  // namespace apr
