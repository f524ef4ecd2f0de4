// The running softmax over (B, T, H, V), channels last, forward and backward: see scan.cuh for how they are walked.
//
//   o_t = sum_{j <= t} e^{l_j} v_j / sum_{j <= t} e^{l_j}        l: one logit a head
//
// A thread has a column of W of the H V channels and reads its head's logit beside it, which costs 1 / V of the bytes.
// One program for a direction, a storage type and a kind of call, chosen by definitions:
//   LINRNN_BACKWARD      whether it is the backward pass
//   LINRNN_X             storage of v and o, and of their gradients
//   LINRNN_W             adjacent channels to a thread: 2 for half types whose rows allow it, else 1
//   LINRNN_FLAGS         whether there are resets or padded tokens
#include "scan.cuh"

namespace linrnn {

using X = LINRNN_X;
using R = arithmetic<X>;
constexpr int W = LINRNN_W;
constexpr bool kFlags = LINRNN_FLAGS;

// Position k counts in the order of the pass. What belongs to a head is (B, T, H), in the arithmetic type of X.
struct Args {
  int64_t columns, T, D, V, head;  // columns = B * D / W, D = H * head, V = W
  LinrnnView x, out;               // v and o; backward: the gradient of o and that of v
  LinrnnView logits, m, z;         // forward; m and z, after each token, may be absent
  LinrnnView past, scale, weight;  // backward: e^{m_{t-1} - m_t}, 1 / z_t and e^{l_t - m_t}
  const void* entry;               // the state the pass starts from (of nothing, if absent), (B, D)
  void* exit;                      // and where the one it ends in goes
  const uint8_t* flags;            // (B, T)
  int64_t flags_stride_b, flags_stride_t;
  int64_t rows, width;             // as in diagonal_scan.cu
  int64_t chunk, chunks;
  void *decay, *carry;             // (chunks, B, D): doubles, states
  LinrnnView other;                // row_dots: of x and `other`, to `exit`
};

// A state, of one channel; z and y are in units of e^m, and m of nothing is far below any logit.
struct Sum {
  R m = sizeof(R) == 4 ? R(-0x1.fffffep124) : R(-0x1.fffffffffffffp1020);
  R z = 0, y = 0;
};
inline Sum in_double(Sum s) { return s; }  // merged as seldom as these are, sums need no more digits on their way
inline void round_to(Sum from, Sum& to) { to = from; }

inline R exponential(R x) { return power_of_two(x * R(1.4426950408889634)); }

// Of one token: the factors of what came before and of what it brings, and the largest logit with it.
struct Factors {
  R m, past, now;
  Factors(R m_past, R m_now) {
    const bool larger = m_now > m_past;
    const R power = exponential(larger ? m_past - m_now : m_now - m_past);
    m = larger ? m_now : m_past, past = larger ? power : R(1), now = larger ? R(1) : power;
  }
};

template <class E>
struct Pass : Column<W, kFlags> {
  using S = E;
  using WideS = decltype(in_double(S{}));
  using Wide = double;
  static constexpr int kWidth = W;

  Pass(const Args& args, int64_t column) : Column<W, kFlags>(args, column) {}

  // Of two stretches of rows; zero if there was a reset, which cuts off what was before it.
  static Wide chained(Wide later, Wide earlier) { return is_zero(later) ? later : product(later, earlier); }
};

struct Forward : Pass<Sum> {
  struct Row {
    Vec<X, W> v;
    R logit;
    uint8_t flag;
  };
  Incoming<X, W> v;
  Incoming<R, 1> logits;
  Outgoing<X, W> o;
  Outgoing<R, 1> m, z;

  Forward(const Args& args, int64_t column)
      : Pass(args, column), v(args.x, b, d), logits(args.logits, b, d / args.head), o(args.out, b, d),
        m(d % args.head ? LinrnnView{} : args.m, b, d / args.head),
        z(d % args.head ? LinrnnView{} : args.z, b, d / args.head) {}

  void attach(char*& ring, int depth) { v.attach(ring, depth), logits.attach(ring, depth); }
  void fetch(int64_t k, int n, int slot) { v.fetch(k, n, slot), logits.fetch(k, n, slot); }
  void seek_outputs(int64_t k) { o.seek(k), m.seek(k), z.seek(k); }
  Row read(int64_t k, int slot) const { return {v.read(slot), logits.read(slot).data[0], flag(k)}; }

  void advance(const Row& row, Sum* s) const {
    if (row.flag & RESET)
      for (int i = 0; i < W; ++i) s[i] = Sum{};
    if (row.flag & HOLD) return;
    const Factors by(s[0].m, row.logit);
    for (int i = 0; i < W; ++i)
      s[i].m = by.m, s[i].z = s[i].z * by.past + by.now, s[i].y = s[i].y * by.past + by.now * widen(row.v.data[i]);
  }
  void decay(const Row& row, Wide* p) const {
    for (int i = 0; i < W; ++i)
      if (row.flag & RESET) p[i] = 0;
  }
  void emit(const Row& row, Sum* s) {
    advance(row, s);
    const R scale = s[0].z == 0 || row.flag & HOLD ? R(0) : 1 / s[0].z;
    Vec<X, W> out;
    for (int i = 0; i < W; ++i) out.data[i] = narrow<X>(row.flag & HOLD ? R(0) : s[i].y * scale);
    o.put(out), m.put({s[0].m}), z.put({s[0].z});
  }
  void finish(int64_t) const {}

  static Sum through(Wide p, Sum q, Sum s) {
    if (is_zero(p)) return q;
    const Factors by(s.m, q.m);
    Sum merged;
    merged.m = by.m, merged.z = s.z * by.past + q.z * by.now, merged.y = s.y * by.past + q.y * by.now;
    return merged;
  }
};

// From the last token to the first, with state s = e^{m_t - m_{t+1}} G_{t+1}:
//   G_t = grad_o_t / z_t + s,   grad_v_t = e^{l_t - m_t} G_t
struct Backward : Pass<R> {
  struct Row {
    Vec<X, W> grad_o;
    R past, scale, weight;
    uint8_t flag;
  };
  Incoming<X, W> grad_o;
  Incoming<R, 1> pasts, scales, weights;
  Outgoing<X, W> grad_v;

  Backward(const Args& args, int64_t column)
      : Pass(args, column), grad_o(args.x, b, d), pasts(args.past, b, d / args.head),
        scales(args.scale, b, d / args.head), weights(args.weight, b, d / args.head), grad_v(args.out, b, d) {}

  void attach(char*& ring, int depth) {
    grad_o.attach(ring, depth), pasts.attach(ring, depth), scales.attach(ring, depth), weights.attach(ring, depth);
  }
  void fetch(int64_t k, int n, int slot) {
    grad_o.fetch(k, n, slot), pasts.fetch(k, n, slot), scales.fetch(k, n, slot), weights.fetch(k, n, slot);
  }
  void seek_outputs(int64_t k) { grad_v.seek(k); }
  Row read(int64_t k, int slot) const {
    return {grad_o.read(slot), pasts.read(slot).data[0], scales.read(slot).data[0], weights.read(slot).data[0], flag(k)};
  }

  R gradient(const Row& row, const R* s, int i) const { return s[i] + row.scale * widen(row.grad_o.data[i]); }
  void advance(const Row& row, R* s) const {
    for (int i = 0; i < W; ++i) s[i] = row.flag & RESET ? R(0) : row.flag & HOLD ? s[i] : row.past * gradient(row, s, i);
  }
  void decay(const Row& row, Wide* p) const {
    for (int i = 0; i < W; ++i) {
      if (row.flag & RESET) p[i] = 0;
      else if (!(row.flag & HOLD)) p[i] = product(in_double(row.past), p[i]);
    }
  }
  void emit(const Row& row, R* s) {
    Vec<X, W> out;
    for (int i = 0; i < W; ++i) out.data[i] = narrow<X>(row.flag & HOLD ? R(0) : row.weight * gradient(row, s, i));
    advance(row, s);
    grad_v.put(out);
  }
  void finish(int64_t) const {}

  static WideS through(Wide p, R q, WideS s) { return is_zero(p) ? in_double(q) : p * s + in_double(q); }
};

// The dot product of x and `other` over each head, by kLanes neighbouring threads.
constexpr int kLanes = 8;

inline void row_dots(const Args& args) {
  const int64_t heads = args.D / args.head, all = args.columns * W / args.D * args.T * heads;
  const int64_t group = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
  const int64_t item = least(group, all - 1);  // the threads of no item come along to the shuffles
  const int64_t h = item % heads, k = item / heads % args.T, b = item / heads / args.T;
  const X* x = static_cast<const X*>(args.x.data) + b * args.x.stride_b + k * args.x.stride_t + h * args.head;
  const X* other =
      static_cast<const X*>(args.other.data) + b * args.other.stride_b + k * args.other.stride_t + h * args.head;
  R sum = 0;
#pragma unroll 4
  for (int64_t i = int64_t(threadIdx.x) % kLanes * W; i < args.head; i += kLanes * W) {
    const Vec<X, W> u = *reinterpret_cast<const Vec<X, W>*>(x + i), v = *reinterpret_cast<const Vec<X, W>*>(other + i);
#pragma unroll
    for (int j = 0; j < W; ++j) sum += widen(u.data[j]) * widen(v.data[j]);
  }
#pragma unroll
  for (int lane = kLanes / 2; lane > 0; lane /= 2) sum += shuffle_xor(sum, lane);
  if (group < all && threadIdx.x % kLanes == 0) static_cast<R*>(args.exit)[item] = sum;
}

// What carries states across chunks, a channel at a time.
template <class P>
struct Carry : P {
  static constexpr int kWidth = 1;
};

#if LINRNN_BACKWARD
using Direction = Backward;
#else
using Direction = Forward;
#endif

}  // namespace linrnn

LINRNN_KERNEL(softmax_sequential) { linrnn::scan_sequential<linrnn::Direction>(args); }
LINRNN_KERNEL(softmax_reduce) { linrnn::scan_reduce<linrnn::Direction>(args); }
LINRNN_KERNEL(softmax_emit) { linrnn::scan_emit<linrnn::Direction>(args); }
LINRNN_KERNEL(softmax_carry) { linrnn::scan_carry<linrnn::Carry<linrnn::Direction>>(args); }
#if LINRNN_BACKWARD
LINRNN_KERNEL(row_dots) { linrnn::row_dots(args); }
#endif
