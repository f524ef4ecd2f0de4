// The forward passes of the selective scan: see selective_scan.cu.
#pragma once

#include "selective_scan.cuh"

namespace linrnn {

constexpr S kCut = -1;  // for the decay of a chunk in which a reset cuts off what was before; a decay is not negative

// exp(dt A) of token i, to `decay`, and the states after it.
inline void advance(const Place& place, const Stage& stage, int i, const Tile<S>& rates, Tile<S>& h, Tile<S>& decay) {
  const Vec<S, V> dt = place.read(stage.dt, i);
  const Vec<X, V> x = place.read(stage.x, i);
  const Vec<S, kStates> B = place.coefficients(stage.B, i);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const S u = dt.data[v] * widen(x.data[v]);
#pragma unroll
    for (int j = 0; j < kStates; ++j) {
      decay[v][j] = power_of_two(dt.data[v] * rates[v][j]);
      h[v][j] = decay[v][j] * h[v][j] + u * B.data[j];
    }
  }
}

inline void clear(Tile<S>& tile) {
#pragma unroll
  for (int v = 0; v < V; ++v)
#pragma unroll
    for (int j = 0; j < kStates; ++j) tile[v][j] = S{};
}

inline void copy(const Tile<S>& from, Tile<S>& to) {
#pragma unroll
  for (int v = 0; v < V; ++v)
#pragma unroll
    for (int j = 0; j < kStates; ++j) to[v][j] = from[v][j];
}

// The states after the kGroup tokens from i on, of which n exist; each(k) sees them after each token but padding.
template <bool FLAGGED, class Each>
inline void advance_group(const Place& place, const Stage& stage, int i, int n, const Tile<S>& rates, Tile<S>& h,
                          Each&& each) {
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    if constexpr (FLAGGED) {
      if (k >= n) continue;
      const uint8_t flag = place.flag(stage, i + k);
      if (flag & RESET) clear(h);
      if (flag & HOLD) continue;
    }
    Tile<S> decay;
    advance(place, stage, i + k, rates, h, decay);
    each(k);
  }
}

template <class Each>
inline void advance_group(const Place& place, const Stage& stage, int i, int n, const Tile<S>& rates, Tile<S>& h,
                          Each&& each) {
  if (place.flagged(stage, i, n)) advance_group<true>(place, stage, i, n, rates, h, each);
  else advance_group<false>(place, stage, i, n, rates, h, each);
}

inline void scan_forward(const Args& args) {
  const Place place(args);
  Tile<S> rates, h;
  place.load_rates(rates);
  if (args.chunks > 1) place.load(args.carry, place.chunk * args.B + place.b, h);
  else place.load(args.entry, place.b, h);
  int64_t kept = (place.begin + args.spacing - 1) / args.spacing;
  int64_t due = args.checkpoints ? kept * args.spacing - place.begin : args.T;  // tokens until the next checkpoint

  const int first = first_of_lane<kGroup * V, 1, kLanes>(place.lane);  // of the sums of a group that this thread writes
  S* y_row = place.out<S>(args.y, place.begin + first / V);

  const auto work = [&](const Stage& stage, int, int64_t, int n) {
    for (int i = 0; i < n;) {
      if (due == 0) {
        place.store(args.checkpoints, place.b * args.kept + kept++, h);
        due = args.spacing;
      }
      const int taken = int(least(least(kGroup, n - i), due));
      S y[kGroup * V];
#pragma unroll
      for (int k = 0; k < kGroup * V; ++k) y[k] = S{};
      advance_group(place, stage, i, taken, rates, h, [&](int k) {
        const Vec<S, kStates> C = place.coefficients(stage.C, i + k);
#pragma unroll
        for (int v = 0; v < V; ++v)
#pragma unroll
          for (int j = 0; j < kStates; ++j) y[k * V + v] += h[v][j] * C.data[j];
      });
      sum_over_lanes<kGroup * V, 1, kLanes>(y, place.lane);
      constexpr int LEFT = at_least_one(kGroup * V / kLanes);
      if constexpr (LEFT >= V) {
#pragma unroll
        for (int k = 0; k < LEFT / V; ++k)
          if (first / V + k < taken) place.put(y_row + k * args.y.stride_t, y + k * V);
      } else if (place.lane < kGroup * V && first / V < taken && place.exists(first % V)) {
        y_row[first % V] = y[0];
      }
      y_row += taken * args.y.stride_t;
      i += taken, due -= taken;
    }
  };
  char* shared = static_cast<char*>(dynamic_shared());
  walk<Reads<true, false, true, true>>(place, shared, false, [](int) {}, work);
  if (args.chunks == 1) place.store(args.exit, place.b, h);
}

// What a chunk does to a state that enters it: exp(A sum dt), or kCut, and what it adds.
struct Reduction {
  const Place& place;
  S partial[V], total[V];  // of dt; in two steps, for the rounding error
  bool cut = false;

  explicit Reduction(const Place& place) : place(place) {
    for (int v = 0; v < V; ++v) partial[v] = total[v] = S{};
  }
  void count(const Vec<S, V>& dt) {
#pragma unroll
    for (int v = 0; v < V; ++v) partial[v] += dt.data[v];
  }
  void end_of_stage() {
    for (int v = 0; v < V; ++v) total[v] += partial[v], partial[v] = S{};
  }
  void finish(const Tile<S>& rates, Tile<S>& added) const {
    Tile<S> decay;
    for (int v = 0; v < V; ++v)
      for (int j = 0; j < kStates; ++j) decay[v][j] = cut ? kCut : power_of_two(rates[v][j] * total[v]);
    const int64_t row = place.chunk * place.args.B + place.b;
    place.store(place.args.decay, row, decay), place.store(place.args.carry, row, added);
  }
};

inline void reduce_forward(const Args& args) {
  const Place place(args);
  Tile<S> rates, h;
  place.load_rates(rates);
  clear(h);
  Reduction reduction(place);
  const auto work = [&](const Stage& stage, int, int64_t, int n) {
    for (int i = 0; i < n; i += kGroup) {
      if (args.flags)
        for (int k = 0; k < kGroup && i + k < n; ++k) reduction.cut |= stage.flags[i + k] & RESET;
      advance_group(place, stage, i, int(least(kGroup, n - i)), rates, h,
                    [&](int k) { reduction.count(place.read(stage.dt, i + k)); });
    }
    reduction.end_of_stage();
  };
  char* shared = static_cast<char*>(dynamic_shared());
  walk<Reads<true, false, true, false>>(place, shared, false, [](int) {}, work);
  reduction.finish(rates, h);
}

}  // namespace linrnn
