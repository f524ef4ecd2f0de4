// What the operations of a step have in common: how they are written down, who does which part, and functions.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "exponential.h"

// Numbers of a row: slots[slot] + B * offset + column + b * stride. A slot below zero is an absent argument.
struct LinrnnStepRef {
  int64_t slot, offset, column, stride;
};

// 47 words of 8 bytes. What `refs`, `constants`, `size` and `option` hold is said at each operation below.
struct LinrnnStepOp {
  int64_t kind, barrier, outputs, unit, size, option;
  double eps;
  LinrnnStepRef refs[9];
  const float* constants[4];
};

namespace linrnn {
namespace step {

using Op = LinrnnStepOp;
using E = Exponential<float>;

// `barrier` is whether an operation waits for all threads. Those that do not, run on channels that the same thread has
// written: channels are dealt out by `outputs` and `unit` alone.
enum Kind : int64_t { LINEAR, NORM, CONV, SELECTIVE, DIAGONAL, GATE, RGLRU, SHIFT, HEADS, WKV };
enum Activation : int64_t { IDENTITY, SILU, GELU_TANH, SIGMOID, SQUARED_RELU };

constexpr float kLog2e = 1.4426950408889634f;
constexpr int64_t kGranule = 8;  // units of channels: a vector, so that no cut of the work moves a lane

constexpr int kMostShares = 64;

// How many pieces of a thread's part have been taken, by itself or by one that was done with its own.
struct alignas(64) Share {
  std::atomic<int64_t> taken{0};
};

// What a thread knows: the memory, the number of rows, which of how many threads it is, and what all have taken.
struct Frame {
  float* const* slots;
  int64_t B;
  int index, count;
  Share* shares;

  float* at(const LinrnnStepRef& r, int64_t b) const {
    return r.slot < 0 ? nullptr : slots[r.slot] + B * r.offset + r.column + b * r.stride;
  }
  // A thread's part of n units.
  void part(int64_t n, int64_t& begin, int64_t& end, int thread) const {
    const int64_t granules = (n + kGranule - 1) / kGranule;
    begin = std::min(n, granules * thread / count * kGranule);
    end = std::min(n, granules * (thread + 1) / count * kGranule);
  }
  void part(int64_t n, int64_t& begin, int64_t& end) const { part(n, begin, end, index); }
};

inline float exponential(float x) { return E::growth(x * kLog2e); }
inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

template <int64_t ACT>
inline float activated(float x) {
  if constexpr (ACT == SILU) return x * sigmoid(x);
  if constexpr (ACT == GELU_TANH) return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
  if constexpr (ACT == SIGMOID) return sigmoid(x);
  if constexpr (ACT == SQUARED_RELU) return x < 0 ? 0.0f : x * x;
  return x;
}

// f with the activation as a type.
template <class F>
inline void with_activation(int64_t act, F&& f) {
  switch (act) {
    case SILU: return f(std::integral_constant<int64_t, SILU>{});
    case GELU_TANH: return f(std::integral_constant<int64_t, GELU_TANH>{});
    case SIGMOID: return f(std::integral_constant<int64_t, SIGMOID>{});
    case SQUARED_RELU: return f(std::integral_constant<int64_t, SQUARED_RELU>{});
    default: return f(std::integral_constant<int64_t, IDENTITY>{});
  }
}

// log(1 + exp(x)) = max(x, 0) + log1p(e) with e = exp(-|x|), and log1p(e) = 2 artanh(e / (2 + e)), an odd series.
inline float softplus(float x) {
  const float e = exponential(-std::fabs(x)), s = e / (2.0f + e), q = s * s;
  float p = 1.0f / 17;
  p = p * q + 1.0f / 15;
  p = p * q + 1.0f / 13;
  p = p * q + 1.0f / 11;
  p = p * q + 1.0f / 9;
  p = p * q + 1.0f / 7;
  p = p * q + 1.0f / 5;
  p = p * q + 1.0f / 3;
  p = p * q + 1.0f;
  return (x < 0 ? 0.0f : x) + 2.0f * s * p;
}

// exp(x) - 1 for x <= 0, by its series where the difference would cancel.
inline float expm1_of_negative(float x) {
  float p = 1.0f / 5040;
  p = p * x + 1.0f / 720;
  p = p * x + 1.0f / 120;
  p = p * x + 1.0f / 24;
  p = p * x + 1.0f / 6;
  p = p * x + 0.5f;
  p = p * x + 1.0f;
  return x > -0.35f ? p * x : exponential(x) - 1.0f;
}

}  // namespace step
}  // namespace linrnn
