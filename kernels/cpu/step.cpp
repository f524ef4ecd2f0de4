// One step of decoding: a short list of operations on B rows (a layer's, a block's or a whole model's), run by all
// threads together from one call. At batch 1 a step lasts as long as reading the weights does, some tens of
// microseconds a matrix, so what is around them has to cost next to nothing: no call, no allocation and no team of
// threads for each operation, a spinning barrier between those that exchange channels.
//
// Every number of row b is computed in an order that does not depend on B, nor on what the other rows hold.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "exponential.h"
#include "lanes.h"
#include "parallel.h"
#include "rows.h"

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

struct Frame {
  float* const* slots;
  int64_t B;
  int index, count;

  float* at(const LinrnnStepRef& r, int64_t b) const {
    return r.slot < 0 ? nullptr : slots[r.slot] + B * r.offset + r.column + b * r.stride;
  }
  // This thread's part of n units.
  void part(int64_t n, int64_t& begin, int64_t& end) const {
    const int64_t granules = (n + kGranule - 1) / kGranule;
    begin = std::min(n, granules * index / count * kGranule);
    end = std::min(n, granules * (index + 1) / count * kGranule);
  }
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

void linear(const Op& op, const Frame& f) {
  constexpr int64_t kBlock = 4;  // rows of W that stay in L1 while the rows of x go by
  int64_t begin, end;
  f.part(op.outputs / op.unit, begin, end);
  begin *= op.unit, end *= op.unit;
  for (int64_t n = begin; n < end; n += kBlock) {
    const int64_t n1 = std::min(n + kBlock, end);
    int64_t b = 0;
    for (; b + 4 <= f.B; b += 4) linear_rows<4>(op, f, b, n, n1);
    if (f.B - b == 3) linear_rows<3>(op, f, b, n, n1);
    if (f.B - b == 2) linear_rows<2>(op, f, b, n, n1);
    if (f.B - b == 1) linear_rows<1>(op, f, b, n, n1);
  }
}

// Fetches the first weights that this thread will read, while it waits for the others.
void expect(const Op& op, const Frame& f) {
  if (op.kind != LINEAR) return;
  int64_t begin, end;
  f.part(op.outputs / op.unit, begin, end);
  const float* w = op.constants[0] + begin * op.unit * op.size;
  const int64_t n = std::min<int64_t>((end - begin) * op.unit * op.size, 2048);
  for (int64_t k = 0; k < n; k += 16) prefetch(w + k);
}

// ---- y = x / rms(x) * weight, or (x - mean) / deviation * weight + bias: refs x, y; constants weight, bias (or none);
// outputs 1; size D; option: 0 for the root mean square, 1 for the layer norm; eps. A thread takes whole rows. ----

void norm(const Op& op, const Frame& f) {
  const int64_t D = op.size;
  const float *weight = op.constants[0], *bias = op.constants[1];
  for (int64_t b = f.index; b < f.B; b += f.count) {
    const float* x = f.at(op.refs[0], b);
    float* y = f.at(op.refs[1], b);
    const auto mean_of = [&](auto number) {
      float partial[16] = {};
      int64_t k = 0;
      for (; k + 16 <= D; k += 16)
        for (int i = 0; i < 16; ++i) partial[i] += number(x[k + i]);
      for (int i = 0; k < D; ++k, ++i) partial[i] += number(x[k]);
      double total = 0;
      for (int i = 0; i < 16; ++i) total += partial[i];
      return float(total / double(D));
    };
    const float mean = op.option ? mean_of([](float v) { return v; }) : 0.0f;
    const float power = mean_of([mean](float v) { return (v - mean) * (v - mean); });
    const float scale = 1.0f / std::sqrt(power + float(op.eps));
    LINRNN_INDEPENDENT
    for (int64_t k = 0; k < D; ++k) y[k] = (x[k] - mean) * scale;
    if (weight)
      for (int64_t k = 0; k < D; ++k) y[k] *= weight[k];
    if (bias)
      for (int64_t k = 0; k < D; ++k) y[k] += bias[k];
  }
}

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

void selective(const Op& op, const Frame& f) {
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

void diagonal(const Op& op, const Frame& f) {
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

// ---- y = act(x) * value (+ a): refs x, y, value, a, the last two if any; option: the activation. ----

template <int64_t ACT>
void gate(const Op& op, const Frame& f) {
  int64_t d0, d1;
  f.part(op.outputs, d0, d1);
  for (int64_t b = 0; b < f.B; ++b) {
    const float *x = f.at(op.refs[0], b), *value = f.at(op.refs[2], b), *a = f.at(op.refs[3], b);
    float* y = f.at(op.refs[1], b);
    LINRNN_INDEPENDENT
    for (int64_t d = d0; d < d1; ++d) {
      const float v = activated<ACT>(x[d]), w = value ? v * value[d] : v;
      y[d] = a ? w + a[d] : w;
    }
  }
}

// ---- The real-gated LRU: h = a h + sqrt(1 - a^2) i x, a = exp(rate * sigmoid(r)), i = sigmoid(i'), and h = i x where
// its document has not begun: refs x, r, i', h before and after, begun before and after; constant: rate, below 0. ----

void rglru(const Op& op, const Frame& f) {
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

void shift(const Op& op, const Frame& f) {
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

void heads(const Op& op, const Frame& f) {
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

void wkv(const Op& op, const Frame& f) {
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

void run(const Op& op, const Frame& f) {
  switch (op.kind) {
    case LINEAR: return linear(op, f);
    case NORM: return norm(op, f);
    case CONV: return with_activation(op.option, [&](auto act) { conv<decltype(act)::value>(op, f); });
    case SELECTIVE: return selective(op, f);
    case DIAGONAL: return diagonal(op, f);
    case GATE: return with_activation(op.option, [&](auto act) { gate<decltype(act)::value>(op, f); });
    case RGLRU: return rglru(op, f);
    case SHIFT: return shift(op, f);
    case HEADS: return heads(op, f);
    case WKV: return wkv(op, f);
  }
}

}  // namespace step
}  // namespace linrnn

// Runs the operations on B rows. `slots` are the memory that their refs name.
LINRNN_API void linrnn_step(const LinrnnStepOp* ops, int64_t n_ops, float* const* slots, int64_t B, int64_t threads) {
  using namespace linrnn;
  SpinBarrier barrier(4096);  // some tens of microseconds: as long as the thread that is waited for may read
  run_parallel(int(threads), [&](int index, int count) {
    KernelScope scope;
    const step::Frame frame{slots, B, index, count};
    for (int64_t k = 0; k < n_ops; ++k) {
      if (ops[k].barrier && k && count > 1) {
        step::expect(ops[k], frame);
        barrier.wait(count);
      }
      step::run(ops[k], frame);
    }
  });
}
