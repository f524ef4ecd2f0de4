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
  Quad* saved;  // this thread's: the states before every kGroup-th token of a stage but its last group
  S* sums;      // (warps, kGroup, 2, kPadded): gradients of B and C over the channels of each warp
  Tile<S> rates, s, grad_A, grad_A_of_stage;

  explicit Backward(const Args& args)
      : args(args), place(args), warp_lane(int(threadIdx.x) % kWarp), warp(int(threadIdx.x) / kWarp),
        warps(int(blockDim.x) / kWarp) {
    place.load_rates(rates);
    if (args.chunks > 1) place.load(args.carry, place.chunk * args.B + place.b, s);
    else place.load(args.entry, place.b, s);
    clear(grad_A);
  }

  // Takes its part of shared memory.
  void attach(char*& shared) {
    saved = reinterpret_cast<Quad*>(shared) + threadIdx.x;
    shared += (args.stage - 1) / kGroup * V * kStates * int64_t(sizeof(S)) * blockDim.x;
    sums = reinterpret_cast<S*>(shared);
    shared += warps * kGroup * 2 * kPadded * sizeof(S);
  }
  Quad& save_of(int group, int v, int j) { return saved[((group * V + v) * (kStates / 4) + j / 4) * int(blockDim.x)]; }

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
          grad_A_of_stage[v][j] += q * dt.data[v];
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
    const int first = sum_over_lanes<2 * kStates, kLanes, kWarp>(grad_BC, warp_lane);
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
    const int first = sum_over_lanes<kGroup * 2 * V, 1, kLanes>(out, place.lane);
#pragma unroll
    for (int m = 0; m < at_least_one(kGroup * 2 * V / kLanes); ++m) {
      const int k = (first + m) / (2 * V), v = (first + m) % V;
      if (place.lane >= kGroup * 2 * V || k >= n || !place.exists(v)) continue;
      if ((first + m) / V % 2) place.out<S>(args.grad_dt, t + k)[v] = out[m];
      else place.out<X>(args.grad_x, t + k)[v] = narrow<X>(out[m]);
    }
    __syncthreads();
    add_up_warps(t, n);
  }

  uint8_t flag_of(const Stage& stage, int i, int k, int n) const { return k < n ? place.flag(stage, i + k) : uint8_t(HOLD); }

  void add_up_warps(int64_t t, int n) {
    constexpr int ROW = kGroup * 2 * kPadded;
    for (int at = int(threadIdx.x); at < n * 2 * kPadded; at += int(blockDim.x)) {
      const int k = at / (2 * kPadded), of_C = at / kPadded % 2, state = at % kPadded;
      if (state >= args.N) continue;
      S sum{};
      for (int w = 0; w < warps; ++w) sum += sums[w * ROW + at];
      const int64_t row = (((place.part * 2 + of_C) * args.B + place.b) * args.T + t + k) * args.G + place.group;
      static_cast<S*>(args.sums)[row * args.N + state] = sum;
    }
  }

  // Back over the n tokens of a stage, from t on, which was entered in state h.
  void stage(const Stage& stage, int64_t t, int n, Tile<S>& h) {
    clear(grad_A_of_stage);
    const int last = (n - 1) / kGroup;
    for (int at = 0; at < last; ++at) {
#pragma unroll
      for (int v = 0; v < V; ++v)
#pragma unroll
        for (int j = 0; j < kStates; j += 4) save_of(at, v, j) = {h[v][j], h[v][j + 1], h[v][j + 2], h[v][j + 3]};
      advance_group(place, stage, at * kGroup, kGroup, rates, h, [](int) {});
    }
    for (int at = last; at >= 0; --at) {
      const int i = at * kGroup, taken = int(least(kGroup, n - i));
      if (place.flagged(stage, i, taken)) group<true>(stage, t + i, i, taken, h);
      else group<false>(stage, t + i, i, taken, h);
      if (at == 0) break;
#pragma unroll
      for (int v = 0; v < V; ++v)
#pragma unroll
        for (int j = 0; j < kStates; j += 4) {
          const Quad quad = save_of(at - 1, v, j);
#pragma unroll
          for (int k = 0; k < 4; ++k) h[v][j + k] = quad.data[k];
        }
    }
#pragma unroll
    for (int v = 0; v < V; ++v)
#pragma unroll
      for (int j = 0; j < kStates; ++j) grad_A[v][j] += grad_A_of_stage[v][j];
  }
};

inline void scan_backward(const Args& args) {
  Backward pass(args);
  const Place& place = pass.place;
  char* shared = static_cast<char*>(dynamic_shared());
  pass.attach(shared);
  const int64_t kept = place.b * args.kept;
  Tile<S> upcoming;  // asked for a stage ahead
  place.load(args.checkpoints, kept + (place.end - 1) / args.spacing, upcoming);
  walk<2, Reads<true, true, true, true>>(place, shared, true, [&](const Stage& stage, int64_t t, int n) {
    Tile<S> h;
    copy(upcoming, h);
    if (t > place.begin) place.load(args.checkpoints, kept + t / args.spacing - 1, upcoming);
    pass.stage(stage, t, n, h);
  });
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
  const auto work = [&](const Stage& stage, int64_t, int n) {
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
  walk<3, Reads<false, true, false, true>>(place, shared, true, work);
  reduction.finish(rates, s);
}

}  // namespace linrnn
