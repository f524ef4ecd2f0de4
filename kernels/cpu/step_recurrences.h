// What carries a state from token to token.
#pragma once

#include "lanes.h"
#include "parallel.h"
#include "step.h"

namespace linrnn {
namespace step {

// ---- The short convolution: refs x, y, the last W - 1 inputs before and after; constants W filters of length D, as
// rows, and bias; size W; option: the activation. ----

template <int64_t ACT>
void conv(const Op& op, const Frame& f) {
  int64_t d0, d1;
  f.part(op.outputs, d0, d1);
  const int64_t D = op.outputs, past = op.size - 1;
  const float *filters = op.constants[0], *bias = op.constants[1];
  for (int64_t b = 0; b < f.B; ++b) {
    const float *x = f.at(op.refs[0], b), *before = f.at(op.refs[2], b);
    float *y = f.at(op.refs[1], b), *after = f.at(op.refs[3], b);
    LINRNN_INDEPENDENT
    for (int64_t d = d0; d < d1; ++d) y[d] = filters[past * D + d] * x[d] + (bias ? bias[d] : 0.0f);
    for (int64_t w = 0; w < past; ++w) {
      const float* next = w + 1 < past ? before + (w + 1) * D : x;
      LINRNN_INDEPENDENT
      for (int64_t d = d0; d < d1; ++d) {
        y[d] += filters[w * D + d] * before[w * D + d];
        after[w * D + d] = next[d];
      }
    }
    LINRNN_INDEPENDENT
    for (int64_t d = d0; d < d1; ++d) y[d] = activated<ACT>(y[d]);
  }
}

// ---- Mamba's S6: h = exp(dt A) h + dt x B, y = (C h + D x) silu(z), dt = softplus(refs[1]): refs x, dt, B, C, z, y,
// h before and after, scratch for dt; constants log2(e) A (D, N) and D; size N. ----

// `count` states of a channel, at most eight; `products` are their contributions to y.
inline void advance(int count, const float* A, const float* B, const float* C, const float* before, float* after,
                    float dt, float u, float* products) {
  LINRNN_INDEPENDENT
  for (int n = 0; n < count; ++n) {
    const float h = E::growth(dt * A[n]) * before[n] + u * B[n];
    after[n] = h;
    products[n] = h * C[n];
  }
}

inline void selective(const Op& op, const Frame& f) {
  int64_t d0, d1;
  f.part(op.outputs, d0, d1);
  const int64_t N = op.size;
  const float *A = op.constants[0], *skip = op.constants[1];
  for (int64_t b = 0; b < f.B; ++b) {
    const float *x = f.at(op.refs[0], b), *logit = f.at(op.refs[1], b), *B = f.at(op.refs[2], b);
    const float *C = f.at(op.refs[3], b), *z = f.at(op.refs[4], b), *before = f.at(op.refs[6], b);
    float *y = f.at(op.refs[5], b), *after = f.at(op.refs[7], b), *dt = f.at(op.refs[8], b);
    LINRNN_INDEPENDENT
    for (int64_t d = d0; d < d1; ++d) dt[d] = softplus(logit[d]);
    for (int64_t d = d0; d < d1; ++d) {
      const float u = dt[d] * x[d];
      Lanes read = {};
      int64_t n = 0;
      for (; n + 8 <= N; n += 8) {
        const int64_t i = d * N + n;
        float products[8];
        advance(8, A + i, B + n, C + n, before + i, after + i, dt[d], u, products);
        read = plus(read, lanes(products));
      }
      if (n < N) {
        const int64_t i = d * N + n;
        float products[8] = {};
        advance(int(N - n), A + i, B + n, C + n, before + i, after + i, dt[d], u, products);
        read = plus(read, lanes(products));
      }
      y[d] = sum(read);
    }
    LINRNN_INDEPENDENT
    for (int64_t d = d0; d < d1; ++d) y[d] = (y[d] + skip[d] * x[d]) * activated<SILU>(z[d]);
  }
}

// ---- h = a h + gain u: refs u, h before and after; constants a, gain; option: 1 where a and u and h are complex. ----

inline void diagonal(const Op& op, const Frame& f) {
  int64_t d0, d1;
  f.part(op.outputs, d0, d1);
  const float *a = op.constants[0], *gain = op.constants[1];
  for (int64_t b = 0; b < f.B; ++b) {
    const float *u = f.at(op.refs[0], b), *before = f.at(op.refs[1], b);
    float* after = f.at(op.refs[2], b);
    if (op.option) {
      LINRNN_INDEPENDENT
      for (int64_t d = d0; d < d1; ++d) {
        const float re = a[2 * d], im = a[2 * d + 1], h = before[2 * d], i = before[2 * d + 1];
        after[2 * d] = (re * h - im * i) + gain[d] * u[2 * d];
        after[2 * d + 1] = (re * i + im * h) + gain[d] * u[2 * d + 1];
      }
    } else {
      LINRNN_INDEPENDENT
      for (int64_t d = d0; d < d1; ++d) after[d] = a[d] * before[d] + gain[d] * u[d];
    }
  }
}

// ---- The real-gated LRU: h = a h + sqrt(1 - a^2) i x, a = exp(rate * sigmoid(r)), i = sigmoid(i'), and h = i x where
// its document has not begun: refs x, r, i', h before and after, begun before and after; constant: rate, below 0. ----

inline void rglru(const Op& op, const Frame& f) {
  int64_t d0, d1;
  f.part(op.outputs, d0, d1);
  const float* rate = op.constants[0];
  for (int64_t b = 0; b < f.B; ++b) {
    const float *x = f.at(op.refs[0], b), *r = f.at(op.refs[1], b), *i = f.at(op.refs[2], b);
    const float *before = f.at(op.refs[3], b), begun = *f.at(op.refs[5], b);
    float* after = f.at(op.refs[4], b);
    LINRNN_INDEPENDENT
    for (int64_t d = d0; d < d1; ++d) {
      const float log_a = rate[d] * sigmoid(r[d]), input = sigmoid(i[d]) * x[d];
      const float kept = exponential(log_a) * before[d] + std::sqrt(-expm1_of_negative(2 * log_a)) * input;
      after[d] = begun != 0 ? kept : input;
    }
    if (f.index == 0) *f.at(op.refs[6], b) = 1;
  }
}

// ---- y = past + mix (x - past), the past being the token before: refs x, y, past, and past after if it is to be
// written; constant: mix. ----

inline void shift(const Op& op, const Frame& f) {
  int64_t d0, d1;
  f.part(op.outputs, d0, d1);
  const float* mix = op.constants[0];
  for (int64_t b = 0; b < f.B; ++b) {
    const float *x = f.at(op.refs[0], b), *before = f.at(op.refs[2], b);
    float *y = f.at(op.refs[1], b), *after = f.at(op.refs[3], b);
    LINRNN_INDEPENDENT
    for (int64_t d = d0; d < d1; ++d) y[d] = before[d] + mix[d] * (x[d] - before[d]);
    if (after) std::copy(x + d0, x + d1, after + d0);
  }
}

// ---- Mamba-2's heads: h = exp(dt A) h + dt B x^T, y = C h + D x, with dt = softplus(refs[1] + bias), clamped: refs x
// (H P), dt (H), B, C (G N), y, h (H, N, P) before and after; constants A, D, bias (H) and the two limits of dt; outputs
// H P; size N; option: P and the heads of a group, packed by 2^32. ----

inline void heads(const Op& op, const Frame& f) {
  int64_t begin, end;
  f.part(op.outputs, begin, end);
  const int64_t N = op.size, P = op.option & 0xffffffff, per_group = op.option >> 32;
  const float *A = op.constants[0], *skip = op.constants[1], *bias = op.constants[2], *limits = op.constants[3];
  for (int64_t b = 0; b < f.B; ++b) {
    const float *x = f.at(op.refs[0], b), *logit = f.at(op.refs[1], b), *Bs = f.at(op.refs[2], b);
    const float *Cs = f.at(op.refs[3], b), *before = f.at(op.refs[5], b);
    float *y = f.at(op.refs[4], b), *after = f.at(op.refs[6], b);
    for (int64_t d = begin, next; d < end; d = next) {
      const int64_t h = d / P, first = h * P, group = h / per_group * N;
      next = std::min(end, first + P);
      float dt = softplus(logit[h] + bias[h]);
      dt = dt < limits[0] ? limits[0] : dt > limits[1] ? limits[1] : dt;
      const float decay = exponential(dt * A[h]);
      LINRNN_INDEPENDENT
      for (int64_t i = d; i < next; ++i) y[i] = skip[h] * x[i];
      for (int64_t n = 0; n < N; ++n) {
        const float write = dt * Bs[group + n], read = Cs[group + n];
        const int64_t row = (h * N + n) * P - first;
        LINRNN_INDEPENDENT
        for (int64_t i = d; i < next; ++i) {
          const float s = decay * before[row + i] + write * x[i];
          after[row + i] = s;
          y[i] += read * s;
        }
      }
    }
  }
}

// ---- RWKV-4's attention, as wkv_reference in ops/wkv.py: refs k, v, y, then p, a, b before and after; constants the
// log decay w and the bonus u. ----

inline void wkv(const Op& op, const Frame& f) {
  int64_t d0, d1;
  f.part(op.outputs, d0, d1);
  const float *w = op.constants[0], *u = op.constants[1];
  for (int64_t row = 0; row < f.B; ++row) {
    const float *k = f.at(op.refs[0], row), *v = f.at(op.refs[1], row), *p = f.at(op.refs[3], row);
    const float *a = f.at(op.refs[4], row), *b = f.at(op.refs[5], row);
    float *y = f.at(op.refs[2], row), *p_after = f.at(op.refs[6], row);
    float *a_after = f.at(op.refs[7], row), *b_after = f.at(op.refs[8], row);
    LINRNN_INDEPENDENT
    for (int64_t d = d0; d < d1; ++d) {
      const float boosted = u[d] + k[d], top = p[d] > boosted ? p[d] : boosted;
      const float past = exponential(p[d] - top), now = exponential(boosted - top);
      y[d] = (past * a[d] + now * v[d]) / (past * b[d] + now);
      const float decayed = p[d] + w[d], larger = decayed > k[d] ? decayed : k[d];
      const float kept = exponential(decayed - larger), added = exponential(k[d] - larger);
      p_after[d] = larger;
      a_after[d] = kept * a[d] + added * v[d];
      b_after[d] = kept * b[d] + added;
    }
  }
}

}  // namespace step
}  // namespace linrnn
