// The backward passes of the selective scan, from the last token to the first, with s = exp(dt_{t+1} A) g_{t+1}:
//
//   g_t = s + C_t grad_y_t,   grad_C_t = sum_d grad_y_t h_t,   grad_B_t = sum_d dt_t x_t g_t
//   grad_u_t = sum_n g_t B_t,   q_t = exp(dt_t A) g_t h_{t-1},   grad_A = sum_t q_t dt_t
//   grad_x_t = dt_t grad_u_t,   grad_dt_t = x_t grad_u_t + sum_n q_t A
//
// A stage is what lies between two checkpoints. Its states are computed forward once, every kGroup-th kept in shared
// memory; then, from the last group of kGroup tokens to the first, those of the group are computed again, with its
// decays, into registers.
#pragma once

#include "selective_forward.cuh"

namespace linrnn {

struct Backward {
  using Quad = Vec<S, 4>;

  const Args& args;
  const Place place;
  const int warp_lane, warp, warps;
  // This thread's tiles in shared memory: the states that enter the stages in the ring, the gradient of A, and the
  // states before every kGroup-th token of a stage but its last group.
  enum { ENTERING, GRAD_A = kSlots, SAVED };
  Quad* tiles;
  S* sums;  // (warps, kGroup, 2, kPadded): gradients of B and C over the channels of each warp
  Tile<S> rates, s, grad_A;  // of the stage
  int64_t kept;              // the checkpoint after the one that is fetched next

  explicit Backward(const Args& args)
      : args(args), place(args), warp_lane(int(threadIdx.x) % kWarp), warp(int(threadIdx.x) / kWarp),
        warps(int(blockDim.x) / kWarp) {
    place.load_rates(rates);
    if (args.chunks > 1) place.load(args.carry, place.chunk * args.B + place.b, s);
    else place.load(args.entry, place.b, s);
    kept = place.b * args.kept + (place.end - 1) / args.spacing + 1;
  }

  // Takes its part of shared memory.
  void attach(char*& shared) {
    tiles = reinterpret_cast<Quad*>(shared) + threadIdx.x;
    const int count = SAVED + (int(args.stage) - 1) / kGroup;
    shared += count * V * kStates * int(sizeof(S)) * blockDim.x;
    sums = reinterpret_cast<S*>(shared);
    shared += warps * kGroup * 2 * kPadded * sizeof(S);
    clear(grad_A);
    for (int tile = 0; tile < SAVED; ++tile) put(tile, grad_A);
  }
  Quad& quad(int tile, int v, int j) { return tiles[((tile * V + v) * (kStates / 4) + j / 4) * int(blockDim.x)]; }
  void put(int tile, const Tile<S>& from) {
#pragma unroll
    for (int v = 0; v < V; ++v)
#pragma unroll
      for (int j = 0; j < kStates; j += 4)
        quad(tile, v, j) = {from[v][j], from[v][j + 1], from[v][j + 2], from[v][j + 3]};
  }
  void take(int tile, Tile<S>& to) {
#pragma unroll
    for (int v = 0; v < V; ++v)
#pragma unroll
      for (int j = 0; j < kStates; j += 4) {
        const Quad four = quad(tile, v, j);
#pragma unroll
        for (int k = 0; k < 4; ++k) to[v][j + k] = four.data[k];
      }
  }

  // Asks for the states that enter the stage before the last one asked for.
  void fetch_states(int slot) {
    --kept;
    const bool whole = args.N % 4 == 0;
#pragma unroll
    for (int v = 0; v < V; ++v)
#pragma unroll
      for (int j = 0; j < kStates; j += 4) {
        const int state = place.lane * kStates + j, left = place.exists(v) ? int(args.N) - state : 0;
        const S* from = static_cast<const S*>(args.checkpoints) +
                        (kept * args.D + place.channel + place.slot * V + v) * args.N + state;
        Quad* to = &quad(ENTERING + slot, v, j);
        if (left >= 4 && whole) {
#pragma unroll
          for (int at = 0; at < int(sizeof(Quad)); at += 16) async_copy<16>(to, at, from + at / int(sizeof(S)));
        } else {
          for (int k = 0; k < 4 && k < left; ++k) async_copy<sizeof(S)>(to, k * int(sizeof(S)), from + k);
        }
      }
  }

  // The gradients of token k of the group, which found the states `before` and left `after`; its gradients of x and dt
  // in `out`, and those of B and C in the sums of this warp.
  void token(const Stage& stage, int i, int k, uint8_t flag, const Tile<S>& decay, const Tile<S>& before,
             const Tile<S>& after, S* out) {
    S grad_BC[2 * kStates] = {}, grad_u[V] = {}, grad_dt[V] = {}, x[V] = {};
    Vec<S, V> dt{};
    if (!(flag & HOLD)) {
      dt = place.read(stage.dt, i);
      const Vec<X, V> stored = place.read(stage.x, i);
      const Vec<S, V> y = place.read(stage.y, i);
      const Vec<S, kStates> B = place.coefficients(stage.B, i), C = place.coefficients(stage.C, i);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        x[v] = widen(stored.data[v]);
        const S u = dt.data[v] * x[v];
#pragma unroll
        for (int j = 0; j < kStates; ++j) {
          const S g = s[v][j] + y.data[v] * C.data[j];
          const S later = flag & RESET ? S{} : decay[v][j] * g;
          const S q = flag & RESET ? S{} : later * before[v][j];
          grad_BC[j] += u * g;
          grad_BC[kStates + j] += y.data[v] * after[v][j];
          grad_u[v] += g * B.data[j];
          grad_dt[v] += q * rates[v][j];
          grad_A[v][j] += q * dt.data[v];
          s[v][j] = later;
        }
      }
    } else if (flag & RESET) {
      clear(s);
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      out[v] = dt.data[v] * grad_u[v];
      out[V + v] = x[v] * grad_u[v] + S(0.6931471805599453) * grad_dt[v];
    }
    constexpr int SETS = kWarp / kLanes;  // of V channels, in a warp
    const int first = first_of_lane<2 * kStates, kLanes, kWarp>(warp_lane);
    sum_over_lanes<2 * kStates, kLanes, kWarp>(grad_BC, warp_lane);
    S* to = sums + (warp * kGroup + k) * 2 * kPadded + place.lane * kStates;
    if (warp_lane / kLanes < 2 * kStates)
#pragma unroll
      for (int m = 0; m < at_least_one(2 * kStates / SETS); ++m)
        to[(first + m) / kStates * kPadded + (first + m) % kStates] = grad_BC[m];
  }

  // Back over the kGroup tokens from t, at i in the stage, on, of which n exist, and which were entered in state h.
  template <bool FLAGGED>
  void group(const Stage& stage, int64_t t, int i, int n, const Tile<S>& h) {
    Tile<S> decay[kGroup], states[kGroup + 1];
    copy(h, states[0]);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      copy(states[k], states[k + 1]);
      const uint8_t flag = FLAGGED ? flag_of(stage, i, k, n) : uint8_t(0);
      if (flag & RESET) clear(states[k + 1]);
      if (!(flag & HOLD)) advance(place, stage, i + k, rates, states[k + 1], decay[k]);
    }
    S out[kGroup * 2 * V];
    __syncthreads();  // the sums of the group before have been read
#pragma unroll
    for (int k = kGroup - 1; k >= 0; --k) {
      const uint8_t flag = FLAGGED ? flag_of(stage, i, k, n) : uint8_t(0);
      token(stage, i + k, k, flag, decay[k], states[k], states[k + 1], out + k * 2 * V);
    }
    sum_over_lanes<kGroup * 2 * V, 1, kLanes>(out, place.lane);
    write(t, n, out);
    __syncthreads();
    add_up_warps(t, n);
  }

  // This lane's sums of a group: gradients of x and dt of its channels, token by token.
  void write(int64_t t, int n, const S* out) const {
    constexpr int LEFT = at_least_one(kGroup * 2 * V / kLanes);
    const int first = first_of_lane<kGroup * 2 * V, 1, kLanes>(place.lane);
    if constexpr (LEFT >= V) {
#pragma unroll
      for (int m = 0; m < LEFT / V; ++m) {
        const int k = (first / V + m) / 2, of_dt = (first / V + m) % 2;
        if (k >= n) continue;
        if (of_dt) place.put(place.out<S>(args.grad_dt, t + k), out + m * V);
        else place.put(place.out<X>(args.grad_x, t + k), out + m * V);
      }
    } else {
      const int k = first / (2 * V), v = first % V;
      if (place.lane >= kGroup * 2 * V || k >= n || !place.exists(v)) return;
      if (first / V % 2) place.out<S>(args.grad_dt, t + k)[v] = out[0];
      else place.out<X>(args.grad_x, t + k)[v] = narrow<X>(out[0]);
    }
  }

  uint8_t flag_of(const Stage& stage, int i, int k, int n) const {
    return k < n ? place.flag(stage, i + k) : uint8_t(HOLD);
  }

  void add_up_warps(int64_t t, int n) {
    constexpr int ROW = kGroup * 2 * kPadded;
    const int64_t token = args.G * args.N, plane = args.B * args.T * token;
    const int64_t first = (place.b * args.T + t) * token + place.group * args.N;
    S* const to = static_cast<S*>(args.sums) + place.part * 2 * plane + first;
    for (int at = int(threadIdx.x); at < n * 2 * kPadded; at += int(blockDim.x)) {
      const int k = at / (2 * kPadded), of_C = at / kPadded % 2, state = at % kPadded;
      if (state >= args.N) continue;
      S sum{};
      for (int w = 0; w < warps; ++w) sum += sums[w * ROW + at];
      to[of_C * plane + k * token + state] = sum;
    }
  }

  // Back over the n tokens of a stage, from t on, which lies in slot `slot` of the ring.
  void stage(const Stage& stage, int slot, int64_t t, int n) {
    Tile<S> h;
    take(ENTERING + slot, h);
    const int last = (n - 1) / kGroup;
    for (int at = 0; at < last; ++at) {
      put(SAVED + at, h);
      advance_group(place, stage, at * kGroup, kGroup, rates, h, [](int) {});
    }
    clear(grad_A);
    for (int at = last; at >= 0; --at) {
      const int i = at * kGroup, taken = int(least(kGroup, n - i));
      if (place.flagged(stage, i, taken)) group<true>(stage, t + i, i, taken, h);
      else group<false>(stage, t + i, i, taken, h);
      if (at) take(SAVED + at - 1, h);
    }
    Tile<S> total;  // in two steps, for the rounding error
    take(GRAD_A, total);
#pragma unroll
    for (int v = 0; v < V; ++v)
#pragma unroll
      for (int j = 0; j < kStates; ++j) total[v][j] += grad_A[v][j];
    put(GRAD_A, total);
  }
};

inline void scan_backward(const Args& args) {
  Backward pass(args);
  const Place& place = pass.place;
  char* shared = static_cast<char*>(dynamic_shared());
  pass.attach(shared);
  walk<Reads<true, true, true, true>>(
      place, shared, true, [&](int slot) { pass.fetch_states(slot); },
      [&](const Stage& stage, int slot, int64_t t, int n) { pass.stage(stage, slot, t, n); });
  pass.take(Backward::GRAD_A, pass.grad_A);
  place.store(args.grad_A, place.chunk * args.B + place.b, pass.grad_A);
  if (args.chunks == 1) place.store(args.exit, place.b, pass.s);
}

inline void reduce_backward(const Args& args) {
  const Place place(args);
  Tile<S> rates, s;
  place.load_rates(rates);
  clear(s);
  Reduction reduction(place);
  const auto token = [&](const Stage& stage, int i) {
    const Vec<S, V> dt = place.read(stage.dt, i), y = place.read(stage.y, i);
    const Vec<S, kStates> C = place.coefficients(stage.C, i);
    reduction.count(dt);
#pragma unroll
    for (int v = 0; v < V; ++v)
#pragma unroll
      for (int j = 0; j < kStates; ++j)
        s[v][j] = power_of_two(dt.data[v] * rates[v][j]) * (s[v][j] + y.data[v] * C.data[j]);
  };
  const auto work = [&](const Stage& stage, int, int64_t, int n) {
    int i = n;
    if (!args.flags)
      for (; i >= kGroup; i -= kGroup)
#pragma unroll
        for (int k = 1; k <= kGroup; ++k) token(stage, i - k);
    while (--i >= 0) {
      const uint8_t flag = place.flag(stage, i);
      if (!(flag & HOLD)) token(stage, i);
      if (flag & RESET) clear(s), reduction.cut = true;
    }
    reduction.end_of_stage();
  };
  char* shared = static_cast<char*>(dynamic_shared());
  walk<Reads<false, true, false, true>>(place, shared, true, [](int) {}, work);
  reduction.finish(rates, s);
}

}  // namespace linrnn
