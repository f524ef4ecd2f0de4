// The running softmax over (B, T, H, V), forward and backward, in one pass over memory each:
//
//   o_t = sum_{j <= t} e^{l_j} v_j / sum_{j <= t} e^{l_j}        l: one logit a head, v: V numbers a head
//
// The state is (m, z, y): the largest logit so far, and the sums of e^{l - m} and e^{l - m} v. A token costs one
// exponential a head, and memory bounds the rest, so sums are in double, whatever the storage.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "parallel.h"
#include "rows.h"

// Time runs in processing order, as in diagonal_scan.cpp. A null pointer is an absent argument. Logits, m and z are
// (B, T, H) and states (B, H) and (B, H, V), in the arithmetic type of v; rows of v and o are H V dense numbers.
struct LinrnnSoftmaxScan {
  int64_t B, T, H, V;
  LinrnnView logits, v, o;
  LinrnnView m, z;  // after each token
  const uint8_t* flags;
  int64_t flags_stride_b, flags_stride_t;
  const void *initial_m, *initial_z, *initial_y;
  void *final_m, *final_z, *final_y;  // the backward reads the last two
  // Backward only.
  LinrnnView grad_o, grad_logits, grad_v;
  const void *grad_final_m, *grad_final_z, *grad_final_y;
  void *grad_initial_m, *grad_initial_z, *grad_initial_y;
  int64_t type, threads;
};

namespace linrnn {
namespace softmax {

using Args = LinrnnSoftmaxScan;
constexpr int W = 8;  // sums over a head go in so many lanes

// The exponent of a sum that is still empty.
template <class R>
constexpr R nothing() { return std::numeric_limits<R>::lowest() / 8; }

inline double inverse(double z) { return z == 0 ? 0 : 1 / z; }

// The heads [head, head + heads) of one sequence.
template <class X>
class Strip {
  using R = arithmetic<X>;
  const Args& args;
  const int64_t b, head, heads, V;
  std::vector<double> y, z, rescale, grad_m;  // y is the sum over values, or the gradient that values share
  std::vector<double> products_o, products_v;
  std::vector<R> m;
  std::vector<X> zeros;

  uint8_t flag(int64_t t) const {
    return args.flags ? args.flags[b * args.flags_stride_b + t * args.flags_stride_t] : uint8_t(0);
  }
  template <class E>
  E* heads_of(const LinrnnView& view, int64_t t) const { return row<E>(view, b, t) + head; }
  X* values_of(const LinrnnView& view, int64_t t) const { return row<X>(view, b, t) + head * V; }
  template <class N>
  void load(const void* from, int64_t width, R absent, std::vector<N>& to) const {
    const R* at = static_cast<const R*>(from) + (b * args.H + head) * width;
    for (int64_t i = 0; i < heads * width; ++i) to[i] = from ? at[i] : absent;
  }
  template <class N>
  void save(void* to, int64_t width, const N* from) const {
    R* at = static_cast<R*>(to) + (b * args.H + head) * width;
    for (int64_t i = 0; i < heads * width; ++i) at[i] = R(from[i]);
  }

 public:
  Strip(const Args& args, int64_t b, int64_t head, int64_t heads)
      : args(args), b(b), head(head), heads(heads), V(args.V), y(heads * V), z(heads), rescale(heads), grad_m(heads),
        products_o((V + W - 1) / W * W), products_v(products_o.size()), m(heads), zeros(V) {}

  void forward() {
    load(args.initial_m, 1, nothing<R>(), m), load(args.initial_z, 1, 0, z), load(args.initial_y, V, 0, y);
    for (int64_t t = 0; t < args.T; ++t) {
      const uint8_t f = flag(t);
      if (f & RESET) std::fill(m.begin(), m.end(), nothing<R>()), clear(y), clear(z);
      X* o = values_of(args.o, t);
      if (f & HOLD) std::fill_n(o, heads * V, X{});
      else token(heads_of<R>(args.logits, t), values_of(args.v, t), o);
      if (args.m.data) {
        std::copy_n(m.data(), heads, heads_of<R>(args.m, t));
        R* kept = heads_of<R>(args.z, t);
        for (int64_t h = 0; h < heads; ++h) kept[h] = R(z[h]);
      }
    }
    save(args.final_m, 1, m.data()), save(args.final_z, 1, z.data()), save(args.final_y, V, y.data());
  }

  // The gradients of every e^{l_j} v_j and e^{l_j}, from the last token to the first, in units of e^{-m_j}:
  //   G_j = sum_{t >= j} grad_o_t / z_t e^{m_j - m_t},   S_j the same sum of grad_o_t . o_t / z_t
  //   grad_v_j = e^{l_j - m_j} G_j,   grad_l_j = e^{l_j - m_j} (v_j . G_j - S_j)
  // y holds G and z holds S. What the final m, a maximum, leaves to the logit that it is waits in grad_m.
  void backward() {
    load(args.grad_final_m, 1, 0, grad_m), load(args.grad_final_z, 1, 0, z), load(args.grad_final_y, V, 0, y);
    std::vector<double> final_y(heads * V), final_z(heads);
    load(args.final_y, V, 0, final_y), load(args.final_z, 1, 0, final_z);
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = h * V; i < (h + 1) * V; ++i) grad_m[h] -= y[i] * final_y[i];
      grad_m[h] -= z[h] * final_z[h];
      z[h] = -z[h];
      rescale[h] = 1;
    }
    load(args.initial_m, 1, nothing<R>(), m);
    for (int64_t t = args.T - 1; t >= 0; --t) {
      const uint8_t f = flag(t);
      if (f & HOLD) {
        std::fill_n(values_of(args.grad_v, t), heads * V, X{});
        std::fill_n(heads_of<R>(args.grad_logits, t), heads, R{});
      } else {
        const R* before = t > 0 ? heads_of<R>(args.m, t - 1) : m.data();
        for (int64_t h = 0; h < heads; ++h) retreat(t, h, f & RESET ? nothing<R>() : before[h]);
      }
      if (f & RESET) clear(y), clear(z), clear(grad_m), std::fill(rescale.begin(), rescale.end(), 1.0);
    }
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t at = (b * args.H + head + h) * V;
      z[h] *= -rescale[h];
      if (args.initial_z) grad_m[h] += double(static_cast<const R*>(args.initial_z)[at / V]) * z[h];
      for (int64_t i = 0; i < V; ++i) {
        y[h * V + i] *= rescale[h];
        if (args.initial_y) grad_m[h] += double(static_cast<const R*>(args.initial_y)[at + i]) * y[h * V + i];
      }
    }
    save(args.grad_initial_m, 1, grad_m.data()), save(args.grad_initial_z, 1, z.data());
    save(args.grad_initial_y, V, y.data());
  }

 private:
  static void clear(std::vector<double>& of) { std::fill(of.begin(), of.end(), 0.0); }

  void token(const R* l, const X* v, X* o) {
    for (int64_t h = 0; h < heads; ++h, v += V, o += V) {
      const bool larger = l[h] > m[h];
      const double power = std::exp(larger ? double(m[h]) - l[h] : double(l[h]) - m[h]);
      const double decay = larger ? power : 1, weight = larger ? 1 : power;
      m[h] = larger ? l[h] : m[h];
      z[h] = z[h] * decay + weight;
      const double scale = inverse(z[h]);
      double* sum = &y[h * V];
      LINRNN_INDEPENDENT
      for (int64_t i = 0; i < V; ++i) {
        sum[i] = sum[i] * decay + weight * widen(v[i]);
        o[i] = narrow<X>(R(sum[i] * scale));
      }
    }
  }

  // Token t of head h, which found the largest logit `before`.
  void retreat(int64_t t, int64_t h, R before) {
    const R l = heads_of<R>(args.logits, t)[h], m_t = heads_of<R>(args.m, t)[h];
    const double scale = inverse(heads_of<R>(args.z, t)[h]), weight = std::exp(double(l) - m_t), past = rescale[h];
    const X *v = values_of(args.v, t) + h * V, *o = values_of(args.o, t) + h * V;
    const X* grad_o = args.grad_o.data ? values_of(args.grad_o, t) + h * V : zeros.data();
    X* grad_v = values_of(args.grad_v, t) + h * V;
    double *__restrict G = &y[h * V], *__restrict by_o = products_o.data(), *__restrict by_v = products_v.data();
    LINRNN_INDEPENDENT
    for (int64_t i = 0; i < V; ++i) {
      const double g = widen(grad_o[i]);
      G[i] = G[i] * past + g * scale;
      by_o[i] = g * widen(o[i]);
      by_v[i] = G[i] * widen(v[i]);
      grad_v[i] = narrow<X>(R(weight * G[i]));
    }
    z[h] = z[h] * past + sum(products_o) * scale;
    double grad_l = weight * (sum(products_v) - z[h]);
    if (l == m_t && before < m_t) grad_l += grad_m[h], grad_m[h] = 0;
    heads_of<R>(args.grad_logits, t)[h] = R(grad_l);
    rescale[h] = before == m_t ? 1 : std::exp(double(before) - m_t);
  }

  // Of V numbers, filled up with zeros to a multiple of W.
  static double sum(const std::vector<double>& numbers) {
    double lanes[W] = {};
    for (size_t i = 0; i < numbers.size(); i += W)
      for (int k = 0; k < W; ++k) lanes[k] += numbers[i + k];
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  }
};

// Whole rows are read best, so heads are kept together while there are sequences for all threads.
template <class X>
int run(const Args& args, void (Strip<X>::*pass)()) {
  if (args.B == 0 || args.H == 0) return 0;
  std::atomic<int64_t> next{0};
  run_parallel(int(args.threads), [&](int, int count) {
    KernelScope scope;
    const int64_t strips = std::min<int64_t>(args.H, args.B % count == 0 ? 1 : (4 * count + args.B - 1) / args.B);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < args.B * strips;) {
      const int64_t first = i % strips * args.H / strips, last = (i % strips + 1) * args.H / strips;
      (Strip<X>(args, i / strips, first, last - first).*pass)();
    }
  });
  return 0;
}

enum Type : int64_t { F32 = 0, F64 = 1, BF16 = 4, F16 = 5 };  // of v, as in diagonal_scan.cpp

}  // namespace softmax
}  // namespace linrnn

#define LINRNN_EACH_TYPE(direction)                                                            \
  using namespace linrnn;                                                                      \
  switch (args->type) {                                                                        \
    case softmax::F32: return softmax::run<float>(*args, &softmax::Strip<float>::direction);   \
    case softmax::F64: return softmax::run<double>(*args, &softmax::Strip<double>::direction); \
    case softmax::BF16: return softmax::run<bf16>(*args, &softmax::Strip<bf16>::direction);    \
    case softmax::F16: return softmax::run<f16>(*args, &softmax::Strip<f16>::direction);       \
    default: return 1;                                                                         \
  }

// Each returns 0, or 1 for a type that has no kernel.
LINRNN_API int linrnn_softmax_scan(const LinrnnSoftmaxScan* args) { LINRNN_EACH_TYPE(forward) }
LINRNN_API int linrnn_softmax_scan_backward(const LinrnnSoftmaxScan* args) { LINRNN_EACH_TYPE(backward) }
