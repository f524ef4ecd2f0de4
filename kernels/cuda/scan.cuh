// Three ways to walk a first-order recurrence s_k = A_k s_{k-1} + b_k, k = 0 .. T-1, whatever A and b are.
//
//   sequential   a block takes `width` columns through all of T. Where there are several threads to a column, each takes
//                a segment of every tile: it composes the maps of its rows, the threads exchange the maps, and each
//                scans its rows from the state that enters them. Every input is read once from global memory.
//   reduce, carry, emit   for few columns: T is cut into chunks, and each chunk of each column has a thread. The first
//                kernel composes the maps of each chunk, the second carries the state across the chunks, the third
//                scans each chunk from its state. The inputs are read twice, the second time out of the L2 cache where
//                the launcher keeps the panels small.
//
// All of them add in a fixed order, so results are the same bit for bit from run to run, and no block waits for another.
//
// A Pass is what one thread does to one column of kWidth adjacent channels. The operator lives there and nowhere else:
//   S, WideS           the numbers of a state, and the same in double, for states on their way across segments and chunks:
//                      they meet products, and to convert them at every turn would lengthen the chain
//   Wide               those of a product over many rows: double, since its rounding error would not average out where
//                      the coefficient is constant; it is the same in every chunk
//   attach, fetch, read           its inputs through the ring of stream.cuh; a Row is what it needs of one position
//   advance(row, s)    s <- A s + b
//   decay(row, p)      p <- A p
//   emit(row, s)       advance, and writes what the pass is there for
//   finish(part)       writes what it has summed up over its rows
//   chained(p, p')     the product of two stretches of rows
//   through(p, q, s)   q + p s, the state after rows with the map (p, q) that were entered in state s
#pragma once

#include "stream.cuh"

namespace linrnn {

// Flags of a token: RESET zeroes the state before it; HOLD is a padded token, which the state passes unchanged.
enum : uint8_t { RESET = 1, HOLD = 2 };

// Where a column of V channels lies, its flags, and its place among states and sums, (parts, B, D).
template <int V, bool FLAGS>
struct Column {
  int64_t b, d, batch, D, flags_stride;
  const uint8_t* flags;

  template <class Args>
  Column(const Args& args, int64_t column)
      : b(column / (args.D / V)), d(column % (args.D / V) * V), batch(args.columns * V / args.D), D(args.D),
        flags_stride(args.flags_stride_t), flags(args.flags + b * args.flags_stride_b) {}

  uint8_t flag(int64_t k) const {
    if constexpr (FLAGS) return flags[k * flags_stride];
    else return 0;
  }
  template <class N>
  void store(void* to, const N* values, int64_t part = 0) const {
    N* at = static_cast<N*>(to) + (part * batch + b) * D + d;
    for (int v = 0; v < V; ++v) at[v] = values[v];
  }
  template <class S>
  void load(const void* from, S* s, int64_t part = 0) const {
    const S* at = static_cast<const S*>(from) + (part * batch + b) * D + d;
    for (int v = 0; v < V; ++v) s[v] = from ? at[v] : S{};
  }
};

// Rows in registers at a time: enough loads under way from shared memory, and no spills.
template <class Pass>
constexpr int kUnroll = sizeof(typename Pass::Row) <= 24 ? 8 : sizeof(typename Pass::Row) <= 48 ? 4 : 2;

// f(row) for n rows from position k on, which lie from `slot` on.
template <class Pass, class F>
inline void each_row(const Pass& pass, int64_t k, int n, int slot, F&& f) {
  constexpr int U = kUnroll<Pass>;
  int i = 0;
  for (; i + U <= n; i += U) {
    typename Pass::Row rows[U];
#pragma unroll
    for (int u = 0; u < U; ++u) rows[u] = pass.read(k + i + u, slot + i + u);
#pragma unroll
    for (int u = 0; u < U; ++u) f(rows[u]);
  }
#pragma unroll 1
  for (; i < n; ++i) f(pass.read(k + i, slot + i));
}

// The map of rows, into p and q.
template <class Pass>
inline void compose(const Pass& pass, int64_t k, int n, int slot, typename Pass::Wide* p, typename Pass::S* q) {
  each_row(pass, k, n, slot, [&](const typename Pass::Row& row) {
    pass.advance(row, q);
    pass.decay(row, p);
  });
}

template <class Pass>
inline void identity(typename Pass::Wide* p, typename Pass::S* q) {
  for (int v = 0; v < Pass::kWidth; ++v) p[v] = one<typename Pass::Wide>(), q[v] = typename Pass::S{};
}

// Where the threads of a block tell each other the maps of their segments; thread = segment * width + column.
template <class Pass>
struct Exchange {
  using S = typename Pass::S;
  using Wide = typename Pass::Wide;
  using WideS = typename Pass::WideS;
  static constexpr int V = Pass::kWidth;

  Wide* p;
  S* q;
  int turn = 0;

  explicit Exchange(char* shared) : p(reinterpret_cast<Wide*>(shared)), q(reinterpret_cast<S*>(p + 2 * V * blockDim.x)) {}

  // Given the map of this thread's segment and the state that enters segment 0, in `carry`: the state that enters this
  // thread's segment, in `entry`, and the one that leaves the last segment, in `carry`. Two buffers take turns, so that
  // one barrier is enough: whoever writes a buffer again has passed the barrier that its readers reach after reading.
  void operator()(const Wide* mine_p, const S* mine_q, int width, WideS* carry, S* entry) {
    const int buffer = turn * int(blockDim.x), column = int(threadIdx.x) % width;
    turn ^= 1;
    for (int v = 0; v < V; ++v) {
      p[(buffer + threadIdx.x) * V + v] = mine_p[v];
      q[(buffer + threadIdx.x) * V + v] = mine_q[v];
    }
    __syncthreads();
#pragma unroll 4
    for (int other = column; other < int(blockDim.x); other += width) {
      for (int v = 0; v < V; ++v) {
        if (other == int(threadIdx.x)) round_to(carry[v], entry[v]);
        carry[v] = Pass::through(p[(buffer + other) * V + v], q[(buffer + other) * V + v], carry[v]);
      }
    }
  }
};

template <class Pass, class Args>
inline void scan_sequential(const Args& args) {
  using S = typename Pass::S;
  const int rows = int(args.rows), width = int(args.width), segments = int(blockDim.x) / width;
  const int segment = int(threadIdx.x) / width;
  const int64_t column = int64_t(blockIdx.x) * width + threadIdx.x % width;
  const bool active = column < args.columns;  // the others come along to the barriers
  Pass pass(args, active ? column : args.columns - 1);
  char* ring = static_cast<char*>(dynamic_shared());
  pass.attach(ring, kStages * rows);
  Exchange<Pass> exchange(ring);

  S s[Pass::kWidth];
  typename Pass::WideS carry[Pass::kWidth];
  pass.load(args.entry, s);
  for (int v = 0; v < Pass::kWidth; ++v) carry[v] = in_double(s[v]);
  const int64_t tile = int64_t(segments) * rows;
  const auto emit = [&](const typename Pass::Row& row) { pass.emit(row, s); };
  const auto work = [&](int64_t k, int n, int slot) {
    pass.seek_outputs(k);
    if (segments > 1) {
      typename Pass::Wide p[Pass::kWidth];
      S q[Pass::kWidth];
      identity<Pass>(p, q);
      compose(pass, k, n, slot, p, q);
      exchange(p, q, width, carry, s);
    }
    each_row(pass, k, n, slot, emit);
  };
  pipeline(pass, segment * rows, active ? args.T : 0, rows, tile, (args.T + tile - 1) / tile, work);
  if (active) {
    pass.finish(segment);
    if (segments > 1)
      for (int v = 0; v < Pass::kWidth; ++v) round_to(carry[v], s[v]);
    if (segment == 0) pass.store(args.exit, s);
  }
}

// What the two chunked kernels have in common: chunk `chunk` of column `column` is this thread's.
template <class Pass, class Args, class Work>
inline void in_chunk(const Args& args, int64_t chunk, int64_t column, Work&& work) {
  const int rows = int(args.rows);
  Pass pass(args, column);
  char* ring = static_cast<char*>(dynamic_shared());
  pass.attach(ring, kStages * rows);
  const int64_t begin = chunk * args.chunk, end = least(args.T, begin + args.chunk);
  work(pass, [&](auto&& rows_work) {
    pipeline(pass, begin, end, rows, rows, (end - begin + rows - 1) / rows, rows_work);
  });
}

template <class Pass, class Args>
inline void scan_reduce(const Args& args) {
  const int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (item >= args.columns * args.chunks) return;
  in_chunk<Pass>(args, item / args.columns, item % args.columns, [&](Pass& pass, auto&& walk) {
    typename Pass::Wide p[Pass::kWidth];
    typename Pass::S q[Pass::kWidth];
    identity<Pass>(p, q);
    walk([&](int64_t k, int n, int slot) { compose(pass, k, n, slot, p, q); });
    pass.store(args.decay, p, item / args.columns);
    pass.store(args.carry, q, item / args.columns);
  });
}

template <class Pass, class Args>
inline void scan_emit(const Args& args) {
  const int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (item >= args.columns * args.chunks) return;
  // The last chunk first: the kernel before this one has read it last, so it is the one most likely in the L2 cache.
  const int64_t chunk = args.chunks - 1 - item / args.columns;
  in_chunk<Pass>(args, chunk, item % args.columns, [&](Pass& pass, auto&& walk) {
    typename Pass::S s[Pass::kWidth];
    pass.load(args.carry, s, chunk);
    pass.seek_outputs(chunk * args.chunk);
    walk([&](int64_t k, int n, int slot) {
      each_row(pass, k, n, slot, [&](const typename Pass::Row& row) { pass.emit(row, s); });
    });
    pass.finish(chunk);
  });
}

// Replaces the q of every chunk by the state that enters the chunk. Columns are single channels here.
template <class Pass, class Args>
inline void scan_carry(const Args& args) {
  using S = typename Pass::S;
  using Wide = typename Pass::Wide;
  using WideS = typename Pass::WideS;
  const int width = int(args.width), segments = int(blockDim.x) / width;
  const int64_t columns = args.columns * args.V, column = int64_t(blockIdx.x) * width + threadIdx.x % width;
  const bool active = column < columns;
  const int64_t share = (args.chunks + segments - 1) / segments;
  const int64_t begin = threadIdx.x / width * share, end = active ? least(args.chunks, begin + share) : 0;
  const Wide* decay = static_cast<const Wide*>(args.decay) + column;
  S* carry = static_cast<S*>(args.carry) + column;

  Wide p = one<Wide>();
  WideS q = WideS{};
#pragma unroll 8
  for (int64_t i = begin; i < end; ++i) {
    q = Pass::through(decay[i * columns], carry[i * columns], q);
    p = Pass::chained(decay[i * columns], p);
  }
  WideS last = in_double(active && args.entry ? static_cast<const S*>(args.entry)[column] : S{});
  S rounded, entry;
  round_to(q, rounded);
  Exchange<Pass>(static_cast<char*>(dynamic_shared()))(&p, &rounded, width, &last, &entry);
  WideS s = in_double(entry);
#pragma unroll 8
  for (int64_t i = begin; i < end; ++i) {
    const S chunk = carry[i * columns];
    round_to(s, carry[i * columns]);
    s = Pass::through(decay[i * columns], chunk, s);
  }
  if (active && threadIdx.x < unsigned(width)) round_to(last, static_cast<S*>(args.exit)[column]);
}

}  // namespace linrnn
