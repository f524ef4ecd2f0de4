// h_t = a_t h_{t-1} + x_t over (B, T, D), channels last, forward and backward: see scan.cuh for how they are walked.
//
// One program for a direction, a pair of storage types and a kind of call, chosen by definitions:
//   LINRNN_BACKWARD      whether it is the backward pass
//   LINRNN_A, LINRNN_X   storage of a, and of x and h
//   LINRNN_V             adjacent channels to a thread: 2 for half types whose rows allow it, else 1
//   LINRNN_CONSTANT      whether a is constant in time
//   LINRNN_FLAGS         whether there are resets or padded tokens
#include "scan.cuh"

namespace linrnn {

// Position k counts in the order of the pass, for a backward or reverse pass too: the launcher turns addresses and
// strides round. A null address is an absent state, or an output that nobody wants. States are contiguous (B, D), in the arithmetic type of x.
struct Args {
  int64_t columns, T, D, V;     // columns = B * D / V
  LinrnnView a, x, out;         // x: what drives the recurrence, x itself or the gradient of h; out: h, or the gradient of x
  LinrnnView before, grad_a;    // backward, where the gradient of a is wanted: row k of `before` is the state that token k found
  const void* first;            // the state that the last token of the backward pass found, where `before` has no such row
  int64_t at_start;             // and whether that is so
  const void* entry;            // the state the pass starts from (zero if absent)
  void* exit;                   // and where the one it ends in goes
  const uint8_t* flags;         // (B, T)
  int64_t flags_stride_b, flags_stride_t;
  void* sum;                    // constant a: its gradient, summed over each part of T: (parts, B, D), doubles
  int64_t rows, width;          // rows of a stage; threads abreast, a column each
  int64_t chunk, chunks;        // rows of a chunk; their number
  void *decay, *carry;          // (chunks, B, D): doubles; states
};

using A = LINRNN_A;
using X = LINRNN_X;
constexpr int V = LINRNN_V;
constexpr bool kConstant = LINRNN_CONSTANT, kFlags = LINRNN_FLAGS;

struct Common : Column<V, kFlags> {
  using S = arithmetic<X>;
  using M = arithmetic<A>;
  using WideS = decltype(in_double(S{}));
  using Wide = decltype(in_double(M{}));
  static constexpr int kWidth = V;

  Incoming<A, V> a;
  Incoming<X, V> x;
  M constant[V];

  Common(const Args& args, int64_t column)
      : Column(args, column), a(args.a, b, d), x(args.x, b, d) {
    if constexpr (kConstant)
      for (int v = 0; v < V; ++v) constant[v] = widen(reinterpret_cast<const A*>(a.column)[v]);
  }

  void attach(char*& ring, int depth) {
    x.attach(ring, depth);
    if constexpr (!kConstant) a.attach(ring, depth);
  }
  void fetch(int64_t k, int n, int slot) {
    x.fetch(k, n, slot);
    if constexpr (!kConstant) a.fetch(k, n, slot);
  }
  Vec<A, V> coefficients(int slot) const {
    if constexpr (kConstant) return {};
    else return a.read(slot);
  }
  M coefficient(const Vec<A, V>& row, int v) const {
    if constexpr (kConstant) return constant[v];
    else return widen(row.data[v]);
  }

  // The product of a coefficient and that of the rows before it; and of a chunk and the chunks before it.
  static Wide times(Wide a, Wide p) {
    if constexpr (kFlags) return product(a, p);
    else return mul(a, p);
  }
  static Wide chained(Wide later, Wide earlier) { return kFlags && is_zero(later) ? later : times(later, earlier); }

  static WideS through(Wide p, S q, WideS s) {
    if (kFlags && is_zero(p)) return in_double(q);  // a reset cuts off what was before it, also an infinity
    return add(mul(p, s), in_double(q));
  }
};

struct Forward : Common {
  struct Row {
    Vec<A, V> a;
    Vec<X, V> x;
    uint8_t flag;
  };
  Outgoing<X, V> h;

  Forward(const Args& args, int64_t column) : Common(args, column), h(args.out, b, d) {}

  void seek_outputs(int64_t k) { h.seek(k); }
  Row read(int64_t k, int slot) const { return {coefficients(slot), x.read(slot), flag(k)}; }

  void advance(const Row& row, S* s) const {
    for (int v = 0; v < V; ++v) {
      if (row.flag & RESET) s[v] = S{};
      if (!(row.flag & HOLD)) s[v] = add(mul(coefficient(row.a, v), s[v]), widen(row.x.data[v]));
    }
  }
  void decay(const Row& row, Wide* p) const {
    for (int v = 0; v < V; ++v) {
      if (row.flag & RESET) p[v] = Wide{};
      if (!(row.flag & HOLD)) p[v] = times(in_double(coefficient(row.a, v)), p[v]);
    }
  }
  void emit(const Row& row, S* s) {
    advance(row, s);
    Vec<X, V> out;
    for (int v = 0; v < V; ++v) out.data[v] = narrow<X>(s[v]);
    h.put(out);
  }
  void finish(int64_t) const {}
};

// The adjoint runs from the last token to the first, with state s = conj(a_{t+1}) g_{t+1}:
//   g_t = grad_h_t + s,   grad_x_t = g_t,   grad_a_t = g_t conj(h_{t-1})
template <bool EMITS>
struct Backward : Common {
  struct Row {
    Vec<A, V> a;
    Vec<X, V> grad_h;
    Vec<X, EMITS ? V : 1> before;
    uint8_t flag;
  };
  Incoming<X, V> before;
  Outgoing<X, V> grad_x;
  Outgoing<A, V> grad_a;
  void* sums;
  int64_t last;     // the position whose token found no row of `before` but the initial state; -1 if none
  Vec<X, V> first;  // that state, in the format of the rows
  Wide sum[V];
  const bool of_a;  // whether the gradient of a is wanted, for which alone `before` is read

  Backward(const Args& args, int64_t column)
      : Common(args, column), before(args.before, b, d), grad_x(args.out, b, d), grad_a(args.grad_a, b, d),
        sums(args.sum), last(args.at_start ? args.T - 1 : -1),
        of_a(args.before.data) {
    S state[V];
    load(args.first, state);
    for (int v = 0; v < V; ++v) first.data[v] = narrow<X>(state[v]), sum[v] = Wide{};
  }

  void attach(char*& ring, int depth) {
    Common::attach(ring, depth);
    if constexpr (EMITS) before.attach(ring, depth);
  }
  void seek_outputs(int64_t k) { grad_x.seek(k), grad_a.seek(k); }
  void fetch(int64_t k, int n, int slot) {
    Common::fetch(k, n, slot);
    if (EMITS && of_a) {
      const bool at_start = n && k + n - 1 == last;
      before.fetch(k, at_start ? n - 1 : n, slot);
      if (at_start) before.slots[slot + n - 1] = first;
    }
  }
  Row read(int64_t k, int slot) const {
    Row row{coefficients(slot), x.read(slot), {}, flag(k)};
    if constexpr (EMITS)
      if (of_a) row.before = before.read(slot);
    return row;
  }

  S gradient(const Row& row, const S* s, int v) const { return add(s[v], widen(row.grad_h.data[v])); }
  void advance(const Row& row, S* s) const {
    for (int v = 0; v < V; ++v) {
      const S g = gradient(row, s, v);
      s[v] = row.flag & RESET ? S{} : row.flag & HOLD ? g : mul(conj(coefficient(row.a, v)), g);
    }
  }
  void decay(const Row& row, Wide* p) const {
    for (int v = 0; v < V; ++v) {
      if (row.flag & RESET) p[v] = Wide{};
      else if (!(row.flag & HOLD)) p[v] = times(conj(in_double(coefficient(row.a, v))), p[v]);
    }
  }
  void emit(const Row& row, S* s) {
    Vec<X, V> dx;
    Vec<A, V> da;
    for (int v = 0; v < V; ++v) {
      const S g = gradient(row, s, v);
      const M factor = row.flag ? M{} : grad_of_coefficient<M>(g, widen(row.before.data[v]));
      dx.data[v] = narrow<X>(row.flag & HOLD ? S{} : g);
      if constexpr (kConstant) sum[v] = add(sum[v], in_double(factor));
      else da.data[v] = narrow<A>(factor);
    }
    advance(row, s);
    grad_x.put(dx);
    if constexpr (!kConstant) grad_a.put(da);
  }
  void finish(int64_t part) const {
    if (kConstant && sums) store(sums, sum, part);
  }
};

// A pass over single channels, whatever V is, to carry states.
struct Carry : Common {
  static constexpr int kWidth = 1;
};

#if LINRNN_BACKWARD
using Emitting = Backward<true>;
using Reducing = Backward<false>;
#else
using Emitting = Forward;
using Reducing = Forward;
#endif

}  // namespace linrnn

LINRNN_KERNEL(scan_sequential) { linrnn::scan_sequential<linrnn::Emitting>(args); }
LINRNN_KERNEL(scan_reduce) { linrnn::scan_reduce<linrnn::Reducing>(args); }
LINRNN_KERNEL(scan_emit) { linrnn::scan_emit<linrnn::Emitting>(args); }
LINRNN_KERNEL(scan_carry) { linrnn::scan_carry<linrnn::Carry>(args); }
