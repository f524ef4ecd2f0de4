// Matrix times vector: what a step spends its time in, reading the weights.
#pragma once

#include "lanes.h"
#include "step.h"

namespace linrnn {
namespace step {

// ---- y = W x (+ bias) (+ gain * g) (+ a): refs x, y, a, g; constants W (N, D), bias, gain; size D ----

// Sums of ROWS rows of x with a row of W. Each has sixteen lanes of its own, whatever ROWS is.
template <int ROWS>
inline void dot(const float* const (&x)[ROWS], const float* w, int64_t D, float (&y)[ROWS]) {
  Lanes low[ROWS] = {}, high[ROWS] = {};
  const auto advance = [&](const float* const (&x)[ROWS], const float* w, int64_t k) {
    const Lanes w0 = lanes(w + k), w1 = lanes(w + k + 8);
    for (int i = 0; i < ROWS; ++i) {
      low[i] = times_plus(w0, lanes(x[i] + k), low[i]);
      high[i] = times_plus(w1, lanes(x[i] + k + 8), high[i]);
    }
  };
  int64_t k = 0;
  for (; k + 16 <= D; k += 16) advance(x, w, k);
  if (k < D) {  // the rest, filled up with zeros
    float x_rest[ROWS][16] = {}, w_rest[16] = {};
    const float* x_at[ROWS];
    for (int i = 0; i < ROWS; ++i) std::copy(x[i] + k, x[i] + D, x_rest[i]), x_at[i] = x_rest[i];
    std::copy(w + k, w + D, w_rest);
    advance(x_at, w_rest, 0);
  }
  for (int i = 0; i < ROWS; ++i) y[i] = sum(plus(low[i], high[i]));
}

// Outputs [n0, n1) of rows b to b + ROWS - 1. Rows of W one after the other: the hardware prefetches one stream at the
// full bandwidth, and two at half of it.
template <int ROWS>
void linear_rows(const Op& op, const Frame& f, int64_t b, int64_t n0, int64_t n1) {
  const float *x[ROWS], *g[ROWS], *a[ROWS], *bias = op.constants[1], *gain = op.constants[2];
  float *to[ROWS], y[ROWS];
  for (int i = 0; i < ROWS; ++i) {
    x[i] = f.at(op.refs[0], b + i), to[i] = f.at(op.refs[1], b + i);
    a[i] = f.at(op.refs[2], b + i), g[i] = f.at(op.refs[3], b + i);
  }
  for (int64_t n = n0; n < n1; ++n) {
    dot<ROWS>(x, op.constants[0] + n * op.size, op.size, y);
    for (int i = 0; i < ROWS; ++i) {
      if (bias) y[i] += bias[n];
      if (gain) y[i] += gain[n] * g[i][n];
      if (a[0]) y[i] += a[i][n];
      to[i][n] = y[i];
    }
  }
}

// Outputs [begin, end) of all rows.
inline void linear_part(const Op& op, const Frame& f, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 4;  // rows of W that stay in L1 while the rows of x go by
  for (int64_t n = begin; n < end; n += kBlock) {
    const int64_t n1 = std::min(n + kBlock, end);
    int64_t b = 0;
    for (; b + 4 <= f.B; b += 4) linear_rows<4>(op, f, b, n, n1);
    if (f.B - b == 3) linear_rows<3>(op, f, b, n, n1);
    if (f.B - b == 2) linear_rows<2>(op, f, b, n, n1);
    if (f.B - b == 1) linear_rows<1>(op, f, b, n, n1);
  }
}

// `shared`: a thread that is done helps the others, whose cores may be slower or busy with something else. The pieces
// are long enough for the hardware to prefetch within one.
inline void linear(const Op& op, const Frame& f, bool shared) {
  int64_t begin, end;
  const int64_t units = op.outputs / op.unit;
  if (!shared || f.count == 1) {
    f.part(units, begin, end);
    return linear_part(op, f, begin * op.unit, end * op.unit);
  }
  constexpr int64_t kFloats = 4096;
  const int64_t granule = kGranule * op.unit * std::max<int64_t>(op.size, 1);
  const int64_t piece = (granule + kFloats - 1) / granule * kGranule;
  for (int i = 0; i < f.count; ++i) {
    const int owner = (f.index + i) % f.count;
    f.part(units, begin, end, owner);
    for (;;) {
      const int64_t from = begin + piece * f.shares[owner].taken.fetch_add(1, std::memory_order_relaxed);
      if (from >= end) break;
      linear_part(op, f, from * op.unit, std::min(from + piece, end) * op.unit);
    }
  }
}

// Fetches the first weights that this thread will read, while it waits for the others.
inline void expect(const Op& op, const Frame& f) {
  if (op.kind != LINEAR) return;
  int64_t begin, end;
  f.part(op.outputs / op.unit, begin, end);
  const float* w = op.constants[0] + begin * op.unit * op.size;
  const int64_t n = std::min<int64_t>((end - begin) * op.unit * op.size, 2048);
  for (int64_t k = 0; k < n; k += 16) prefetch(w + k);
}

}  // namespace step
}  // namespace linrnn
