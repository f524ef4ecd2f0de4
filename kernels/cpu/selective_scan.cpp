// Mamba's selective scan over (B, T, D) with N states a channel, forward and backward, in one pass over memory:
//
//   h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t,   y_t = C_t h_t (2 Re of it where A is complex)
//
// It is bound by arithmetic, N exponentials for each number of x, so the work is cut into strips of channels whose
// states stay in L1, and every loop runs over the channels of a strip. Nothing of size (B, T, D, N) exists: the forward
// keeps the states before every K-th token, and the backward computes those between again.
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "exponential.h"
#include "parallel.h"
#include "rows.h"
#include "strips.h"

// States and A are (.., D, N), B and C are (B, T, G, N), contiguous; a null pointer is an absent argument.
struct LinrnnSelectiveScan {
  int64_t B, T, D, N, G, K;
  LinrnnView x, dt, y;  // in the backward y is the gradient of y
  const void *A, *Bs, *Cs, *initial_state;
  void *final_state, *checkpoints;  // (B, ceil(T / K), D, N): the states before tokens 0, K, 2K, ...
  const uint8_t* flags;             // (B, T)
  // Backward only.
  const void* grad_final_state;
  LinrnnView grad_x, grad_dt;
  void *grad_A, *grad_initial_state;  // (B, D, N)
  void *grad_B, *grad_C;              // (parts, B, T, G, N), zero: a part sums over its own channels of every group
  int64_t parts, type, threads;
};

namespace linrnn {
namespace selective {

using Args = LinrnnSelectiveScan;
// One strip of one sequence. P is 1 for real and 2 for complex A; B, C and states have P numbers in a row of memory.
template <class R, int P>
class Strip {
  using E = Exponential<R>;
  const Args& args;
  int64_t N, b = 0, channel = 0, group = 0;
  int width = 0;
  Planes<R> A, A_units, h;                // (N) rows each
  Planes<R> hs, as, s, grad_A, chunk_A;   // backward: (K + 1) N and K N rows, and (N) rows each
  R dt[W], x[W], u[W], y[W], grad_u[W], grad_dt[W];

  template <class V>
  void read(const LinrnnView& v, int64_t t, V* to) const {
    const R* from = row<R>(v, b, t) + channel;
    for (int i = 0; i < width; ++i) to[i] = from[i];
  }
  void write(const LinrnnView& v, int64_t t, const R* from) const { std::copy_n(from, width, row<R>(v, b, t) + channel); }
  const R* coefficients(const void* of, int64_t t) const {
    return static_cast<const R*>(of) + ((b * args.T + t) * args.G + group) * N * P;
  }
  void load(const void* from, int64_t index, Planes<R>& to, int64_t first = 0) const {
    const R* rows = static_cast<const R*>(from) + (index * args.D + channel) * N * P;
    for (int64_t n = 0; n < N; ++n)
      for (int p = 0; p < P; ++p)
        for (int i = 0; i < width; ++i) to(first + n, p)[i] = from ? rows[(i * N + n) * P + p] : R{};
  }
  void store(void* to, int64_t index, Planes<R>& from) {
    if (!to) return;
    R* rows = static_cast<R*>(to) + (index * args.D + channel) * N * P;
    for (int64_t n = 0; n < N; ++n)
      for (int p = 0; p < P; ++p)
        for (int i = 0; i < width; ++i) rows[(i * N + n) * P + p] = from(n, p)[i];
  }
  uint8_t flag(int64_t t) const { return args.flags ? args.flags[b * args.T + t] : uint8_t(0); }
  int64_t n_checkpoints() const { return (args.T + args.K - 1) / args.K; }

  void inputs(int64_t t) {
    read(args.dt, t, dt);
    read(args.x, t, x);
    for (int i = 0; i < W; ++i) u[i] = dt[i] * x[i];
  }

  // h = exp(dt A) h_before + u B_t for state n, and what it adds to y if there is a y; exp(dt A) to a if wanted.
  template <bool KEEP, bool READ>
  void advance(int64_t n, const R* Bt, const R* Ct, Planes<R>& before, int64_t i0, Planes<R>& after, int64_t i1,
               int64_t ia) {
    const R *rate = A_units(n), *from = before(i0 + n), b_re = Bt[n * P];
    R *to = after(i1 + n), *a = KEEP ? as(ia + n) : nullptr;
    if constexpr (P == 1) {
      const R c = READ ? Ct[n] : R{};
      LINRNN_INDEPENDENT
      for (int i = 0; i < W; ++i) {
        const R decay = E::growth(dt[i] * rate[i]);
        if (KEEP) a[i] = decay;
        to[i] = decay * from[i] + u[i] * b_re;
        if (READ) y[i] += to[i] * c;
      }
    } else {
      const R *phase = A_units(n, 1), *from_im = before(i0 + n, 1), b_im = Bt[n * P + 1];
      R *to_im = after(i1 + n, 1), *a_im = KEEP ? as(ia + n, 1) : nullptr;
      const R c_re = READ ? 2 * Ct[n * P] : R{}, c_im = READ ? 2 * Ct[n * P + 1] : R{};
      LINRNN_INDEPENDENT
      for (int i = 0; i < W; ++i) {
        const R r = E::growth(dt[i] * rate[i]);
        R re, im;
        E::turn(dt[i] * phase[i], re, im);
        re *= r, im *= r;
        if (KEEP) a[i] = re, a_im[i] = im;
        const R s_re = from[i], s_im = from_im[i];
        to[i] = re * s_re - im * s_im + u[i] * b_re;
        to_im[i] = re * s_im + im * s_re + u[i] * b_im;
        if (READ) y[i] += to[i] * c_re - to_im[i] * c_im;
      }
    }
  }

  // Gradients of one token for state n. s carries conj(a_{t+1}) g_{t+1}; unless PAST the state was reset before it.
  template <bool PAST>
  void retreat(int64_t n, const R* Bt, const R* Ct, R* grad_Bt, R* grad_Ct, int64_t now) {
    R products_B[W], products_C[W];
    const R *h_now = hs((now + 1) * N + n), *h_past = hs(now * N + n), *a = as(now * N + n), *rate = A(n);
    R *s_re = s(n), *dA = chunk_A(n);
    if constexpr (P == 1) {
      const R b_re = Bt[n], c = Ct[n];
      LINRNN_INDEPENDENT
      for (int i = 0; i < W; ++i) {
        const R g = s_re[i] + y[i] * c, later = PAST ? a[i] * g : R{}, q = PAST ? later * h_past[i] : R{};
        products_C[i] = y[i] * h_now[i];
        products_B[i] = u[i] * g;
        grad_u[i] += g * b_re;
        grad_dt[i] += q * rate[i];
        dA[i] += q * dt[i];
        s_re[i] = later;
      }
      grad_Bt[n] += sum(products_B);
      grad_Ct[n] += sum(products_C);
    } else {
      R imag_B[W], imag_C[W];
      const R *h_im = hs((now + 1) * N + n, 1), *past_im = hs(now * N + n, 1), *a_im = as(now * N + n, 1), *phase = A(n, 1);
      R *s_im = s(n, 1), *dA_im = chunk_A(n, 1);
      const R b_re = Bt[n * P], b_im = Bt[n * P + 1], c_re = 2 * Ct[n * P], c_im = 2 * Ct[n * P + 1];
      LINRNN_INDEPENDENT
      for (int i = 0; i < W; ++i) {
        const R g_re = s_re[i] + y[i] * c_re, g_im = s_im[i] - y[i] * c_im;
        const R later_re = PAST ? a[i] * g_re + a_im[i] * g_im : R{}, later_im = PAST ? a[i] * g_im - a_im[i] * g_re : R{};
        const R q_re = PAST ? later_re * h_past[i] + later_im * past_im[i] : R{};
        const R q_im = PAST ? later_im * h_past[i] - later_re * past_im[i] : R{};
        products_C[i] = 2 * y[i] * h_now[i], imag_C[i] = -2 * y[i] * h_im[i];
        products_B[i] = u[i] * g_re, imag_B[i] = u[i] * g_im;
        grad_u[i] += g_re * b_re + g_im * b_im;
        grad_dt[i] += q_re * rate[i] + q_im * phase[i];
        dA[i] += q_re * dt[i], dA_im[i] += q_im * dt[i];
        s_re[i] = later_re, s_im[i] = later_im;
      }
      grad_Bt[n * P] += sum(products_B), grad_Bt[n * P + 1] += sum(imag_B);
      grad_Ct[n * P] += sum(products_C), grad_Ct[n * P + 1] += sum(imag_C);
    }
  }

 public:
  Strip(const Args& args, bool backward)
      : args(args), N(args.N), A(N, P), A_units(N, P), h(N, P), hs(backward ? (args.K + 1) * N : 0, P),
        as(backward ? args.K * N : 0, P), s(N, P), grad_A(N, P), chunk_A(N, P) {
    std::fill_n(dt, W, R{}), std::fill_n(x, W, R{}), std::fill_n(y, W, R{});
  }

  static int64_t per_group(const Args& args) { return (args.D / args.G + W - 1) / W; }

  void place(int64_t sequence, int64_t strip) {
    const int64_t group_width = args.D / args.G, within = strip % per_group(args) * W;
    b = sequence, group = strip / per_group(args), channel = group * group_width + within;
    const int before = width;
    width = int(std::min<int64_t>(W, group_width - within));
    if (width < before) {  // what a wider strip left behind must not reach the sums
      std::fill_n(dt, W, R{}), std::fill_n(x, W, R{}), std::fill_n(y, W, R{});
      A.zero(), A_units.zero(), h.zero(), s.zero(), hs.zero();
    }
    load(args.A, 0, A);
    for (int64_t n = 0; n < N; ++n)
      for (int i = 0; i < W; ++i) {
        A_units(n)[i] = R(double(A(n)[i]) * E::kRate);
        if (P == 2) A_units(n, 1)[i] = R(double(A(n, 1)[i]) * E::kPhase);
      }
  }

  void forward() {
    load(args.initial_state, b, h);
    for (int64_t t = 0; t < args.T; ++t) {
      if (t % args.K == 0) store(args.checkpoints, b * n_checkpoints() + t / args.K, h);
      const uint8_t f = flag(t);
      if (f & RESET) h.zero();
      std::fill_n(y, W, R{});
      if (!(f & HOLD)) {
        inputs(t);
        const R *Bt = coefficients(args.Bs, t), *Ct = coefficients(args.Cs, t);
        for (int64_t n = 0; n < N; ++n) advance<false, true>(n, Bt, Ct, h, 0, h, 0, 0);
      }
      write(args.y, t, y);
    }
    store(args.final_state, b, h);
  }

  void backward(int64_t part) {
    const auto part_of = [&](void* sums, int64_t t) {
      return static_cast<R*>(sums) + (((part * args.B + b) * args.T + t) * args.G + group) * N * P;
    };
    load(args.grad_final_state, b, s);
    grad_A.zero();
    for (int64_t chunk = n_checkpoints() - 1; chunk >= 0; --chunk) {
      const int64_t t0 = chunk * args.K, t1 = std::min(args.T, t0 + args.K);
      load(args.checkpoints, b * n_checkpoints() + chunk, hs);
      for (int64_t t = t0; t < t1; ++t) {
        const int64_t now = (t - t0) * N;
        const uint8_t f = flag(t);
        Planes<R>& before = f & RESET ? h : hs;  // h is zero in the backward
        const int64_t i0 = f & RESET ? 0 : now;
        if (f & HOLD) {
          for (int64_t n = 0; n < N; ++n)
            for (int p = 0; p < P; ++p) std::copy_n(before(i0 + n, p), W, hs(now + N + n, p));
          continue;
        }
        inputs(t);
        const R* Bt = coefficients(args.Bs, t);
        for (int64_t n = 0; n < N; ++n) advance<true, false>(n, Bt, nullptr, before, i0, hs, now + N, now);
      }
      chunk_A.zero();
      for (int64_t t = t1 - 1; t >= t0; --t) {
        const uint8_t f = flag(t);
        std::fill_n(grad_u, W, R{}), std::fill_n(grad_dt, W, R{});
        if (f & HOLD) {
          if (f & RESET) s.zero();
          write(args.grad_x, t, grad_u), write(args.grad_dt, t, grad_dt);
          continue;
        }
        inputs(t);
        read(args.y, t, y);
        const R *Bt = coefficients(args.Bs, t), *Ct = coefficients(args.Cs, t);
        R *grad_Bt = part_of(args.grad_B, t), *grad_Ct = part_of(args.grad_C, t);
        for (int64_t n = 0; n < N; ++n) {
          if (f & RESET) retreat<false>(n, Bt, Ct, grad_Bt, grad_Ct, t - t0);
          else retreat<true>(n, Bt, Ct, grad_Bt, grad_Ct, t - t0);
        }
        for (int i = 0; i < W; ++i) grad_dt[i] += x[i] * grad_u[i], grad_u[i] *= dt[i];
        write(args.grad_x, t, grad_u), write(args.grad_dt, t, grad_dt);
      }
      for (int64_t n = 0; n < N; ++n)  // a sum of sums, for its rounding error
        for (int p = 0; p < P; ++p)
          for (int i = 0; i < W; ++i) grad_A(n, p)[i] += chunk_A(n, p)[i];
    }
    store(args.grad_A, b, grad_A);
    store(args.grad_initial_state, b, s);
  }
};

template <class R, int P>
void forward(const Args& args) {
  const int64_t strips = args.G * Strip<R, P>::per_group(args);
  std::atomic<int64_t> next{0};
  run_parallel(int(args.threads), [&](int, int) {
    KernelScope scope;
    Strip<R, P> strip(args, false);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < args.B * strips;) {
      strip.place(i / strips, i % strips);
      strip.forward();
    }
  });
}

// Strips of one part follow each other on one thread, in one order whatever the number of threads: sums are the same.
template <class R, int P>
void backward(const Args& args) {
  const int64_t strips = Strip<R, P>::per_group(args);
  std::atomic<int64_t> next{0};
  run_parallel(int(args.threads), [&](int, int) {
    KernelScope scope;
    Strip<R, P> strip(args, true);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < args.B * args.G * args.parts;) {
      const int64_t b = i / args.parts / args.G, group = i / args.parts % args.G, part = i % args.parts;
      for (int64_t k = part * strips / args.parts; k < (part + 1) * strips / args.parts; ++k) {
        strip.place(b, group * strips + k);
        strip.backward(part);
      }
    }
  });
}

enum Type : int64_t { F32, F64, C64, C128 };  // of A and the states; x and dt are the real numbers beside it

}  // namespace selective
}  // namespace linrnn

#define LINRNN_EACH_TYPE(direction)                                              \
  using namespace linrnn::selective;                                            \
  switch (args->type) {                                                          \
    case F32: linrnn::selective::direction<float, 1>(*args); return 0;           \
    case F64: linrnn::selective::direction<double, 1>(*args); return 0;          \
    case C64: linrnn::selective::direction<float, 2>(*args); return 0;           \
    case C128: linrnn::selective::direction<double, 2>(*args); return 0;         \
    default: return 1;                                                           \
  }

// Each returns 0, or 1 for a type that has no kernel.
LINRNN_API int linrnn_selective_scan(const LinrnnSelectiveScan* args) { LINRNN_EACH_TYPE(forward) }
LINRNN_API int linrnn_selective_scan_backward(const LinrnnSelectiveScan* args) { LINRNN_EACH_TYPE(backward) }
