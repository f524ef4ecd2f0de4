// How a block takes a tile of channels of one sequence through a chunk of time: which thread has which states, the rows
// of all threads on their way through a ring in shared memory, and sums across the threads of a warp.
//
// A channel's N states lie in the registers of kLanes neighbouring threads, kStates each, padded with zeros; a thread
// has those of V neighbouring channels. The more channels, the fewer reads of B and C from shared memory a state.
#pragma once

#include "stream.cuh"

namespace linrnn {

using X = LINRNN_X;        // storage of x; everything else is in the type of the arithmetic
using S = arithmetic<X>;
constexpr int V = LINRNN_V, kLanes = LINRNN_LANES, kStates = LINRNN_STATES;
constexpr int kPadded = kLanes * kStates;
constexpr int kGroup = sizeof(S) * V * kStates > 32 ? 2 : 4;  // tokens that are in registers together
constexpr int kWarp = 32;
constexpr int kSlots = 2;  // of the ring
// The most threads of a block, and how many such blocks the registers of a multiprocessor are to hold, without spills.
constexpr bool kSlim = kLanes > 2 && kStates == 4 && sizeof(X) == 4;  // NVRTC 13.5 spills where x is in half precision
constexpr int kThreads = 128, kBlocks = sizeof(S) == 8 ? 2 : !LINRNN_BACKWARD ? 4 : kSlim ? 3 : 2;

// Flags of a token: RESET zeroes the state before it; HOLD is a padded token, which the state passes unchanged.
enum : uint8_t { RESET = 1, HOLD = 2 };

// States, sums and the like are contiguous; a null address is an absent argument, or an output that nobody wants.
struct Args {
  int64_t B, T, D, N, G;
  LinrnnView x, dt, y;                // backward: y is the gradient of y
  const void *A, *Bs, *Cs;            // (D, N); (B, T, G, N)
  const void* entry;                  // (B, D, N): the state, or the gradient of the final state, that comes in
  void* exit;                         // and what goes out
  void* checkpoints;                  // (B, kept, D, N): the states before tokens 0, spacing, 2 spacing, ...
  int64_t kept, spacing;
  const uint8_t* flags;               // (B, T)
  LinrnnView grad_x, grad_dt;
  void *grad_A, *sums;                // (chunks, B, D, N); (parts, 2, B, T, G, N): B's and C's, of a tile each
  int64_t stage;                      // tokens of a slot of the ring; in the backward `spacing`
  int64_t chunk, chunks;              // tokens of a chunk; their number
  void *decay, *carry;                // (chunks, B, D, N), where there are several chunks
  int64_t x_copy, dt_copy, y_copy, B_copy;  // bytes to copy rows in, and 256 times the threads along a row, in bits
  int64_t aligned;                          // whether V channels of y, or of gradients, may be written as one
};

template <class M>
using Tile = M[V][kStates];

// ---- sums across lanes ----

// Adds up M values over the lanes whose numbers differ in the bits from MASK up to END. Halves change hands, so that in
// the end a lane has the sums of max(1, M / lanes) values in front: from `first_of_lane` on. Where there are
// more lanes than values, all that differ in the higher bits have the same.
template <int M, int MASK, int END>
inline int first_of_lane(int lane) {
  if constexpr (MASK >= END || M == 1) return 0;
  else return (lane & MASK ? M / 2 : 0) + first_of_lane<M / 2, 2 * MASK, END>(lane);
}
template <int M, int MASK, int END>
inline void sum_over_lanes(S* values, int lane) {
  if constexpr (MASK >= END) {
  } else if constexpr (M == 1) {
    values[0] += shuffle_xor(values[0], MASK);
    sum_over_lanes<1, 2 * MASK, END>(values, lane);
  } else {
    const bool upper = lane & MASK;
#pragma unroll
    for (int i = 0; i < M / 2; ++i) {
      const S other = shuffle_xor(upper ? values[i] : values[i + M / 2], MASK);
      values[i] = (upper ? values[i + M / 2] : values[i]) + other;
    }
    sum_over_lanes<M / 2, 2 * MASK, END>(values, lane);
  }
}

constexpr int at_least_one(int n) { return n < 1 ? 1 : n; }

// ---- rows on their way ----

// What a pass reads of a token.
template <bool READS_X, bool READS_Y, bool READS_B, bool READS_C>
struct Reads {
  static constexpr bool x = READS_X, y = READS_Y, B = READS_B, C = READS_C;
};

// A slot of the ring: rows of `channels` numbers, or of kPadded.
struct Stage {
  X* x;
  S *dt, *y, *B, *C;
  uint8_t* flags;
};

template <int UNIT>
inline void copy_unit(void* to, int at, const char* from) {
  if constexpr (UNIT >= 4) async_copy<UNIT>(to, at, from);
  else *reinterpret_cast<uint16_t*>(static_cast<char*>(to) + at) = *reinterpret_cast<const uint16_t*>(from);
}

// The threads of the block copy n rows of row_bytes, `stride` bytes apart, to rows that are `pitch` apart: 2^shift of
// them abreast along a row.
template <int UNIT>
inline void copy_rows(char* to, int pitch, const char* from, int64_t stride, int n, int row_bytes, int shift) {
  const int columns = 1 << shift, step = int(blockDim.x) >> shift, first = (int(threadIdx.x) & (columns - 1)) * UNIT;
  int row = int(threadIdx.x) >> shift;
  to += row * pitch, from += row * stride;
#pragma unroll 1
  for (; row < n; row += step, to += step * pitch, from += step * stride)
#pragma unroll 1
    for (int at = first; at < row_bytes; at += columns * UNIT) copy_unit<UNIT>(to, at, from + at);
}
inline void copy_rows(void* to, int pitch, const void* from, int64_t stride, int n, int row_bytes, int64_t copy) {
  const char* source = static_cast<const char*>(from);
  char* target = static_cast<char*>(to);
  const int unit = int(copy) & 255, shift = int(copy) >> 8;
  if (unit == 16) copy_rows<16>(target, pitch, source, stride, n, row_bytes, shift);
  else if (unit == 8) copy_rows<8>(target, pitch, source, stride, n, row_bytes, shift);
  else if (unit == 4) copy_rows<4>(target, pitch, source, stride, n, row_bytes, shift);
  else if (sizeof(X) < 4) copy_rows<2>(target, pitch, source, stride, n, row_bytes, shift);
}

// ---- what a thread has ----

struct Place {
  const Args& args;
  const int lane, slot, channels;   // of its channel's lanes; of the block's sets of V channels; channels of the block
  int64_t part, group, b, chunk;    // what the block has
  int64_t channel, begin, end;      // its first channel; its tokens
  int width;                        // channels that exist

  explicit Place(const Args& args)
      : args(args), lane(int(threadIdx.x) % kLanes), slot(int(threadIdx.x) / kLanes),
        channels(int(blockDim.x) / kLanes * V) {
    const int of_group = int(args.D) / int(args.G);
    const unsigned parts = unsigned(of_group + channels - 1) / channels, B = unsigned(args.B), G = unsigned(args.G);
    unsigned block = blockIdx.x;
    part = block % parts, block /= parts;
    group = block % G, block /= G;
    b = block % B, chunk = block / B;
    channel = group * of_group + part * channels;
    width = int(least(channels, of_group - part * channels));
    begin = chunk * args.chunk, end = least(args.T, begin + args.chunk);
  }

  bool exists(int v) const { return slot * V + v < width; }

  // f(value, index in (D, N)) for the numbers of a tile that exist.
  template <class M, class F>
  void each(Tile<M>& tile, F&& f) const {
    for (int v = 0; v < V; ++v)
      for (int j = 0; j < kStates; ++j)
        if (exists(v) && lane * kStates + j < args.N)
          f(tile[v][j], (channel + slot * V + v) * args.N + lane * kStates + j);
  }
  // A tile of row `row` of (.., D, N); zero where nothing exists, or where there is no such tensor.
  void load(const void* from, int64_t row, Tile<S>& tile) const {
    for (int v = 0; v < V; ++v)
      for (int j = 0; j < kStates; ++j) tile[v][j] = S{};
    const S* at = static_cast<const S*>(from) + row * args.D * args.N;
    if (from) each<S>(tile, [&](S& value, int64_t i) { value = at[i]; });
  }
  void store(void* to, int64_t row, Tile<S>& tile) const {
    S* at = static_cast<S*>(to) + row * args.D * args.N;
    if (to) each<S>(tile, [&](S& value, int64_t i) { at[i] = value; });
  }
  // A in units in which exp(dt A) = 2^(dt A).
  void load_rates(Tile<S>& rates) const {
    load(args.A, 0, rates);
    for (int v = 0; v < V; ++v)
      for (int j = 0; j < kStates; ++j) rates[v][j] = S(double(rates[v][j]) * 1.4426950408889634);
  }

  template <class E>
  const E* row(const LinrnnView& view, int64_t t) const {
    return static_cast<const E*>(view.data) + b * view.stride_b + t * view.stride_t + channel;
  }
  // Where this thread writes of token t, and what it writes of one: `at` is what `out` gave, moved on.
  template <class E>
  E* out(const LinrnnView& view, int64_t t) const { return const_cast<E*>(row<E>(view, t)) + slot * V; }
  template <class E>
  void put(E* at, const S* values) const {
    Vec<E, V> together;
    for (int v = 0; v < V; ++v) together.data[v] = narrow<E>(values[v]);
    if (args.aligned && exists(V - 1)) *reinterpret_cast<Vec<E, V>*>(at) = together;
    else
      for (int v = 0; v < V; ++v)
        if (exists(v)) at[v] = together.data[v];
  }

  uint8_t flag(const Stage& stage, int i) const { return args.flags ? stage.flags[i] : uint8_t(0); }
  // Whether there is anything to heed in the kGroup tokens from i on, of which n exist.
  bool flagged(const Stage& stage, int i, int n) const {
    int flags = n < kGroup;
    if (args.flags)
      for (int k = 0; k < kGroup && k < n; ++k) flags |= stage.flags[i + k];
    return flags;
  }

  // The V numbers of this thread in token i.
  template <class E>
  Vec<E, V> read(const E* rows, int i) const {
    return *reinterpret_cast<const Vec<E, V>*>(rows + i * channels + slot * V);
  }
  // Its kStates of B or C in token i.
  Vec<S, kStates> coefficients(const S* rows, int i) const {
    return *reinterpret_cast<const Vec<S, kStates>*>(rows + i * kPadded + lane * kStates);
  }
};

// A slot of the ring of a pass that reads R, and where it ends.
template <class R>
inline Stage slot_at(char* start, int tokens, int channels, char** end = nullptr) {
  const auto take = [&](bool wanted, int bytes) {
    char* here = start;
    if (wanted) start += (bytes + 15) & ~15;
    return here;
  };
  const int row = tokens * channels, coefficients = tokens * kPadded * int(sizeof(S));
  Stage slot;
  slot.dt = reinterpret_cast<S*>(take(true, row * int(sizeof(S))));
  slot.x = reinterpret_cast<X*>(take(R::x, row * int(sizeof(X))));
  slot.y = reinterpret_cast<S*>(take(R::y, row * int(sizeof(S))));
  slot.B = reinterpret_cast<S*>(take(R::B, coefficients));
  slot.C = reinterpret_cast<S*>(take(R::C, coefficients));
  slot.flags = reinterpret_cast<uint8_t*>(take(true, tokens));
  if (end) *end = start;
  return slot;
}

// Copies n tokens from t on.
template <class R>
inline void fetch_tokens(const Place& place, const Stage& slot, int64_t t, int n) {
  const Args& args = place.args;
  const int bytes = place.width * int(sizeof(S)), pitch = place.channels * int(sizeof(S));
  copy_rows(slot.dt, pitch, place.row<S>(args.dt, t), args.dt.stride_t * int64_t(sizeof(S)), n, bytes, args.dt_copy);
  if (R::x)
    copy_rows(slot.x, place.channels * int(sizeof(X)), place.row<X>(args.x, t), args.x.stride_t * int64_t(sizeof(X)), n,
              place.width * int(sizeof(X)), args.x_copy);
  if (R::y)
    copy_rows(slot.y, pitch, place.row<S>(args.y, t), args.y.stride_t * int64_t(sizeof(S)), n, bytes, args.y_copy);
  const int row_bytes = int(args.N) * int(sizeof(S)), padded = kPadded * int(sizeof(S));
  const int64_t stride = args.G * row_bytes, at = ((place.b * args.T + t) * args.G + place.group) * args.N;
  if (R::B) copy_rows(slot.B, padded, static_cast<const S*>(args.Bs) + at, stride, n, row_bytes, args.B_copy);
  if (R::C) copy_rows(slot.C, padded, static_cast<const S*>(args.Cs) + at, stride, n, row_bytes, args.B_copy);
  if (args.flags)
    for (int k = int(threadIdx.x); k < n; k += int(blockDim.x)) slot.flags[k] = args.flags[place.b * args.T + t + k];
}

// Runs work(stage, slot, t, n) over the tokens of a block, n of them from t on, args.stage at a time, through a ring of
// kSlots; in reverse from the last stage to the first. also(slot) asks for more with the tokens of a stage. One barrier
// a stage: who passes it knows that the copies of all threads have arrived, and that all have done with the slot that
// is filled next. Moves `shared` behind the ring.
template <class R, class Also, class Work>
inline void walk(const Place& place, char*& shared, bool reverse, Also&& also, Work&& work) {
  const int tokens = int(place.args.stage);
  char *const start = shared, *next;
  slot_at<R>(start, tokens, place.channels, &next);
  const int bytes = int(next - start);
  shared += kSlots * bytes;
  if (place.width < place.channels || place.args.N < kPadded) {  // what is never copied counts as zero
    for (char* at = start + 16 * threadIdx.x; at < shared; at += 16 * blockDim.x)
      *reinterpret_cast<Vec<int, 4>*>(at) = {};
    __syncthreads();
  }
  const int64_t stages = (place.end - place.begin + tokens - 1) / tokens;
  const auto first = [&](int64_t i) { return place.begin + (reverse ? stages - 1 - i : i) * tokens; };
  const auto count = [&](int64_t t) { return int(least(tokens, place.end - t)); };
  const auto slot = [&](int s) { return slot_at<R>(start + s * bytes, tokens, place.channels); };
  int64_t ahead = 0;
  int free = 0;
  const auto fetch = [&] {
    if (ahead < stages) fetch_tokens<R>(place, slot(free), first(ahead), count(first(ahead))), also(free);
    async_commit();  // an empty group too: the wait below counts groups
    ++ahead;
    free = free + 1 == kSlots ? 0 : free + 1;
  };
  for (int i = 0; i < kSlots - 1; ++i) fetch();
  int full = 0;
  for (int64_t i = 0; i < stages; ++i) {
    async_wait<kSlots - 2>();
    __syncthreads();
    fetch();
    work(slot(full), full, first(i), count(first(i)));
    full = full + 1 == kSlots ? 0 : full + 1;
  }
}

}  // namespace linrnn
