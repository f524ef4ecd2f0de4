// Strips of channels: rows of a width that the compiler knows, aligned and filled up with zeros.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace linrnn {
namespace selective {

constexpr int W = 32;  // channels of a strip; the last one of a group is filled up with zeros

// Numbers of a strip, each row of W channels: real ones in one plane, complex ones in two.
template <class R>
class Planes {
  std::vector<R> numbers_;
  int64_t rows_;

 public:
  Planes(int64_t rows, int planes) : numbers_(rows * planes * W + 16), rows_(rows) {}
  R* operator()(int64_t row, int plane = 0) {
    constexpr uintptr_t kLine = 64;
    const auto base = (reinterpret_cast<uintptr_t>(numbers_.data()) + kLine - 1) / kLine * kLine;
    return reinterpret_cast<R*>(base) + (plane * rows_ + row) * W;
  }
  void zero() { std::fill(numbers_.begin(), numbers_.end(), R{}); }
};

template <class R>
R sum(const R* v) {
  R lanes[8] = {};
  for (int i = 0; i < W; i += 8)
    for (int k = 0; k < 8; ++k) lanes[k] += v[i + k];
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

}  // namespace selective
}  // namespace linrnn
