// Rows of channels: how they are addressed, walked and written.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#if defined(__SSE2__)
#include <emmintrin.h>
#define LINRNN_CAN_STREAM 1
#else
#define LINRNN_CAN_STREAM 0
#endif

#include "../numbers.h"

#if defined(_WIN32)
#define LINRNN_API extern "C" __declspec(dllexport)
#else
#define LINRNN_API extern "C" __attribute__((visibility("default")))
#endif

namespace linrnn {

// Flags of a token: RESET zeroes the state before it; HOLD is a padded token, which the state passes unchanged.
enum : uint8_t { RESET = 1, HOLD = 2 };

template <class E>
E* row(const LinrnnView& v, int64_t b, int64_t t) {
  return v.data ? static_cast<E*>(v.data) + b * v.stride_b + t * v.stride_t : nullptr;
}

// Runs f(width, j) over [0, width) in blocks whose width the compiler knows: 256 bytes of X. `down` takes the last
// block first: where time runs to lower addresses, the hardware prefetcher then sees one falling stream. (Whole rows
// upwards there, or blocks of 512 bytes, set it off in the wrong direction, which costs more than all else here.)
template <class X, class F>
inline void for_blocks(int64_t width, bool down, F&& f) {
  constexpr int W = sizeof(X) < 4 ? 64 : 256 / sizeof(X);
  const int64_t wide = width / W * W, narrow = width / 8 * 8;
  const auto wide_blocks = [&] {
    for (int64_t j = 0; j < wide; j += W) f(std::integral_constant<int, W>{}, down ? wide - W - j : j);
  };
  if (!down) wide_blocks();
  for (int64_t j = wide; j < narrow; j += 8) f(std::integral_constant<int, 8>{}, j);
  for (int64_t j = std::max(wide, narrow); j < width; ++j) f(std::integral_constant<int, 1>{}, j);
  if (down) wide_blocks();
}

// W numbers on their way to memory: written in place, or with `streaming` gathered here and then sent past the cache.
template <int W, class X>
class Outgoing {
  X* to_;
  alignas(16) X gathered_[W];

 public:
  X* const data;
  Outgoing(X* to, bool streaming)
      : to_(to), data(LINRNN_CAN_STREAM && streaming && W * sizeof(X) % 16 == 0 ? gathered_ : to) {}
  Outgoing(const Outgoing&) = delete;
  ~Outgoing() {
#if LINRNN_CAN_STREAM
    if (data != to_)
      for (unsigned k = 0; k < W * sizeof(X) / 16; ++k)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to_) + k, reinterpret_cast<const __m128i*>(gathered_)[k]);
#endif
  }
};

}  // namespace linrnn
