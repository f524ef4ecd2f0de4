// h_t = a_t h_{t-1} + x_t over (B, T, D), channels last, forward and backward.
//
// The scan is bound by memory, so each pass reads every input once, whole rows at a time with the state in L1, and
// writes every output once, past the cache when the output is larger than it.
#include "drive.h"
#include "rows.h"

// Time runs in processing order: for a reverse scan the launcher passes addresses of the last token and negative
// strides. A null pointer is an absent argument. States are contiguous (B, D), in the arithmetic type of x.
struct LinrnnDiagonalScan {
  int64_t B, T, D;
  LinrnnView a, x, h;
  const void* initial_state;
  void* final_state;
  const uint8_t* flags;  // (B, T), see below
  int64_t flags_stride_b, flags_stride_t;
  // Backward only: x and final_state are not read, h is the forward's output.
  LinrnnView grad_h, grad_x, grad_a;
  const void* grad_final_state;
  void* grad_initial_state;
  void* grad_constant_a;  // instead of grad_a: its sum over time, (B, D) in the arithmetic type of a
  int64_t a_type, x_type, threads;
};

namespace linrnn {

Runtime runtime;
using Args = LinrnnDiagonalScan;

// Outputs of this size go past the cache, where they would only push out the inputs; measured, see docs/scan.md.
constexpr int64_t kStreamForward = 16 << 20, kStreamBackward = 4 << 20;

template <class E>
bool streams(const LinrnnView& v, const Args& args, int64_t least) {
  const auto multiple = [](int64_t n) { return n * int64_t(sizeof(E)) % 16 == 0; };
  return v.data && args.B * args.T * args.D * int64_t(sizeof(E)) >= least && multiple(v.stride_b) &&
         multiple(v.stride_t) && reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
}

// One sequence, channels [j0, j0 + width).
template <class A_, class X_>
struct Pass {
  using A = A_;
  using X = X_;
  using S = arithmetic<X>;
  using M = arithmetic<A>;
  using Wide = decltype(in_double(M{}));  // of products over many tokens, whose rounding would not average out
  const Args& args;
  int64_t b, j0, width;

  int64_t length() const { return args.T; }
  bool resets() const { return args.flags; }
  int64_t bytes_per_channel() const { return sizeof(X) + (args.a.stride_t ? sizeof(A) : 0); }
  uint8_t flag(int64_t t) const {
    return args.flags ? args.flags[b * args.flags_stride_b + t * args.flags_stride_t] : uint8_t(0);
  }
  void load(const void* from, S* s) const {
    if (from) std::copy_n(static_cast<const S*>(from) + b * args.D + j0, width, s);
    else std::fill(s, s + width, S{});
  }
  template <class N>
  void save(void* to, const N* s) const {
    if (to) std::copy_n(s, width, static_cast<N*>(to) + b * args.D + j0);
  }
};

template <class A, class X>
struct Forward : Pass<A, X> {
  using typename Pass<A, X>::S;
  using typename Pass<A, X>::M;
  using typename Pass<A, X>::Wide;
  using Pass<A, X>::args, Pass<A, X>::b, Pass<A, X>::j0, Pass<A, X>::width;

  const bool streaming = streams<X>(args.h, args, kStreamForward), down = args.h.stride_t < 0;

  bool sums() const { return false; }
  void start(S* s) const { this->load(args.initial_state, s); }
  void finish(const S* s, const M*) const { this->save(args.final_state, s); }

  void scan(int64_t begin, int64_t end, S* __restrict s, M*) const {
    for (int64_t t = begin; t < end; ++t) {
      const A* __restrict a = row<A>(args.a, b, t) + j0;
      const X* __restrict x = row<X>(args.x, b, t) + j0;
      X* __restrict h = row<X>(args.h, b, t) + j0;
      const uint8_t flag = this->flag(t);
      if (flag & RESET) std::fill(s, s + width, S{});
      for_blocks<X>(width, down, [&](auto block, int64_t j) {
        constexpr int W = block;
        if (!(flag & HOLD)) {
          LINRNN_INDEPENDENT
          for (int i = j; i < j + W; ++i) s[i] = add(mul(widen(a[i]), s[i]), widen(x[i]));
        }
        const Outgoing<W, X> out(h + j, streaming);
        LINRNN_INDEPENDENT
        for (int i = 0; i < W; ++i) out.data[i] = narrow<X>(s[j + i]);
      });
    }
  }

  void reduce(int64_t begin, int64_t end, Wide* __restrict p, S* __restrict q) const {
    std::fill(p, p + width, one<Wide>());
    std::fill(q, q + width, S{});
    for (int64_t t = begin; t < end; ++t) {
      const A* __restrict a = row<A>(args.a, b, t) + j0;
      const X* __restrict x = row<X>(args.x, b, t) + j0;
      const uint8_t flag = this->flag(t);
      if (flag & RESET) std::fill(p, p + width, Wide{}), std::fill(q, q + width, S{});
      if (flag & HOLD) continue;
      for_blocks<X>(width, down, [&](auto block, int64_t j) {
        LINRNN_INDEPENDENT
        for (int i = j; i < j + block; ++i) q[i] = add(mul(widen(a[i]), q[i]), widen(x[i]));
        if (args.flags) {
          for (int i = j; i < j + block; ++i) p[i] = product(in_double(widen(a[i])), p[i]);
        } else {
          LINRNN_INDEPENDENT
          for (int i = j; i < j + block; ++i) p[i] = mul(in_double(widen(a[i])), p[i]);
        }
      });
    }
  }
};

// The adjoint runs from the last token to the first, with state s = conj(a_{t+1}) g_{t+1}:
//   g_t = grad_h_t + s,   grad_x_t = g_t,   grad_a_t = g_t conj(h_{t-1})
template <class A, class X>
struct Backward : Pass<A, X> {
  using typename Pass<A, X>::S;
  using typename Pass<A, X>::M;
  using typename Pass<A, X>::Wide;
  using Pass<A, X>::args, Pass<A, X>::b, Pass<A, X>::j0, Pass<A, X>::width;

  const bool streaming_x = streams<X>(args.grad_x, args, kStreamBackward);
  const bool streaming_a = streams<A>(args.grad_a, args, kStreamBackward);
  const bool down = args.h.stride_t > 0;

  bool sums() const { return args.grad_constant_a; }
  void start(S* s) const { this->load(args.grad_final_state, s); }
  void finish(const S* s, const M* sum) const {
    this->save(args.grad_initial_state, s);
    this->save(args.grad_constant_a, sum);
  }

  // Positions count from the last token.
  void scan(int64_t begin, int64_t end, S* __restrict s, M* __restrict sum) const {
    if (!sums()) sum = nullptr;
    for (int64_t t = args.T - 1 - begin; t > args.T - 1 - end; --t) {
      if (t > 0) token(t, row<X>(args.h, b, t - 1) + j0, s, sum);
      else if (args.initial_state) token(t, static_cast<const S*>(args.initial_state) + b * args.D + j0, s, sum);
      else token(t, static_cast<const S*>(nullptr), s, sum);
    }
  }

  template <int W, class H, class Take, class Out>
  static void fused(S* __restrict s, const A* __restrict a, const X* __restrict grad_h, const H* __restrict h_before,
                    X* __restrict dx, Take take, Out* __restrict out) {
    LINRNN_INDEPENDENT
    for (int i = 0; i < W; ++i) {
      const S g = add(s[i], widen(grad_h[i]));
      take(out[i], grad_of_coefficient<M>(g, widen(h_before[i])));
      dx[i] = narrow<X>(g);
      s[i] = mul(conj(widen(a[i])), g);
    }
  }

  // One token, in one loop; what is absent is read from a row of zeros and written to one that is thrown away.
  template <class H>
  void token(int64_t t, const H* h_before, S* __restrict s, M* __restrict sum) const {
    static constexpr X no_grad[64] = {};
    static constexpr H no_state[64] = {};
    const A* a = row<A>(args.a, b, t) + j0;
    const X* grad_h = row<X>(args.grad_h, b, t);
    X* grad_x = row<X>(args.grad_x, b, t) + j0;
    A* grad_a = row<A>(args.grad_a, b, t);
    const uint8_t flag = this->flag(t);
    for_blocks<X>(width, down, [&](auto block, int64_t j) {
      constexpr int W = block;
      A unused[W];
      const Outgoing<W, X> dx(grad_x + j, streaming_x);
      const Outgoing<W, A> da(grad_a ? grad_a + j0 + j : unused, grad_a && streaming_a);
      const X* gj = grad_h ? grad_h + j0 + j : no_grad;
      const H* hj = h_before ? h_before + j : no_state;
      if (flag) {
        for (int i = 0; i < W; ++i) {
          const S g = add(s[j + i], widen(gj[i]));
          s[j + i] = flag & RESET ? S{} : g;
          dx.data[i] = narrow<X>(flag & HOLD ? S{} : g);
          da.data[i] = A{};
        }
      } else if (sum) {
        fused<W>(s + j, a + j, gj, hj, dx.data, [](M& to, M v) { to = add(to, v); }, sum + j);
      } else {
        fused<W>(s + j, a + j, gj, hj, dx.data, [](A& to, M v) { to = narrow<A>(v); }, da.data);
      }
    });
  }

  void reduce(int64_t begin, int64_t end, Wide* __restrict p, S* __restrict q) const {
    std::fill(p, p + width, one<Wide>());
    std::fill(q, q + width, S{});
    for (int64_t t = args.T - 1 - begin; t > args.T - 1 - end; --t) {
      const A* __restrict a = row<A>(args.a, b, t) + j0;
      const X* __restrict grad_h = row<X>(args.grad_h, b, t);
      const uint8_t flag = this->flag(t);
      if (flag & RESET) {
        std::fill(p, p + width, Wide{}), std::fill(q, q + width, S{});
        continue;
      }
      for_blocks<X>(width, down, [&](auto block, int64_t j) {
        if (grad_h) {
          LINRNN_INDEPENDENT
          for (int i = j; i < j + block; ++i) q[i] = add(q[i], widen(grad_h[j0 + i]));
        }
        if (flag & HOLD) return;
        LINRNN_INDEPENDENT
        for (int i = j; i < j + block; ++i) q[i] = mul(conj(widen(a[i])), q[i]);
        if (args.flags) {
          for (int i = j; i < j + block; ++i) p[i] = product(conj(in_double(widen(a[i]))), p[i]);
        } else {
          LINRNN_INDEPENDENT
          for (int i = j; i < j + block; ++i) p[i] = mul(conj(in_double(widen(a[i]))), p[i]);
        }
      });
    }
  }
};

template <template <class, class> class Pass, class A, class X>
int run(const Args& args) {
  drive<Pass<A, X>>(args.B, args.D, int(args.threads), [&](int64_t b, int64_t j0, int64_t width) {
    return Pass<A, X>{{args, b, j0, width}};
  });
  return 0;
}

// The storage types, in the order of the launcher's table; arithmetic on mixed pairs is in the wider of the two.
enum Type : int64_t { F32, F64, C64, C128, BF16, F16 };
constexpr int64_t pair(int64_t a, int64_t x) { return a * 8 + x; }

template <template <class, class> class Pass>
int dispatch(const Args& args) {
  switch (pair(args.a_type, args.x_type)) {
    case pair(F32, F32): return run<Pass, float, float>(args);
    case pair(F64, F64): return run<Pass, double, double>(args);
    case pair(C64, C64): return run<Pass, cplx<float>, cplx<float>>(args);
    case pair(C128, C128): return run<Pass, cplx<double>, cplx<double>>(args);
    case pair(F32, C64): return run<Pass, float, cplx<float>>(args);
    case pair(F64, C128): return run<Pass, double, cplx<double>>(args);
    case pair(F32, BF16): return run<Pass, float, bf16>(args);
    case pair(BF16, BF16): return run<Pass, bf16, bf16>(args);
    case pair(F32, F16): return run<Pass, float, f16>(args);
    case pair(F16, F16): return run<Pass, f16, f16>(args);
    default: return 1;
  }
}

}  // namespace linrnn

// Each returns 0, or 1 for a pair of types that has no kernel.
LINRNN_API int linrnn_diagonal_scan(const LinrnnDiagonalScan* args) { return linrnn::dispatch<linrnn::Forward>(*args); }
LINRNN_API int linrnn_diagonal_scan_backward(const LinrnnDiagonalScan* args) {
  return linrnn::dispatch<linrnn::Backward>(*args);
}
LINRNN_API void linrnn_use_runtime(void* parallel, void* num_threads, void* thread_num) {
  linrnn::runtime = {reinterpret_cast<decltype(linrnn::Runtime::parallel)>(parallel),
                     reinterpret_cast<decltype(linrnn::Runtime::num_threads)>(num_threads),
                     reinterpret_cast<decltype(linrnn::Runtime::thread_num)>(thread_num)};
}
LINRNN_API int linrnn_abi_version() { return 6; }
