// Mamba's selective scan over (B, T, D) with N states a channel, forward and backward:
//
//   h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t,   y_t = C_t h_t
//
// It is bound by arithmetic: N exponentials for each number of x, and the special function unit gives 16 a clock. A
// block has a tile of channels (selective_scan.cuh) and nothing of size (B, T, D, N) exists. The forward keeps the
// states before every `spacing`-th token; the backward computes those between again, keeps every kGroup-th in shared
// memory, and has the states and decays of kGroup tokens in registers when it walks back over them.
//
// Where there are few channels, time is cut into chunks: `selective_reduce` scans each from zero, `selective_carry`
// carries the state across them, and `selective_scan` scans them all from the right states. The map of a chunk is
// exp(A sum dt), one exponential. Everything is added in a fixed order.
//
// One program for a direction, a storage type of x and a shape of a thread's tile:
//   LINRNN_BACKWARD, LINRNN_X, LINRNN_V, LINRNN_LANES, LINRNN_STATES (see selective_scan.cuh)
#include "selective_backward.cuh"

namespace linrnn {

// Replaces what each chunk adds by the state that enters it, in the order of the pass. A thread to a state.
inline void carry(const Args& args) {
  const int64_t states = args.B * args.D * args.N, item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (item >= states) return;
  const int64_t first = LINRNN_BACKWARD ? args.chunks - 1 : 0, step = LINRNN_BACKWARD ? -states : states;
  const S* decay = static_cast<const S*>(args.decay) + first * states + item;
  S* at = static_cast<S*>(args.carry) + first * states + item;
  S s = args.entry ? static_cast<const S*>(args.entry)[item] : S{};
  constexpr int AHEAD = 8;
  for (int64_t i = 0; i < args.chunks; i += AHEAD, decay += AHEAD * step, at += AHEAD * step) {
    S p[AHEAD], q[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k)
      if (i + k < args.chunks) p[k] = decay[k * step], q[k] = at[k * step];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k)
      if (i + k < args.chunks) {
        at[k * step] = s;
        s = p[k] == kCut ? q[k] : p[k] * s + q[k];
      }
  }
  static_cast<S*>(args.exit)[item] = s;
}

}  // namespace linrnn

#define SELECTIVE_KERNEL(name) LINRNN_KERNEL_WITHIN(name, linrnn::kThreads, linrnn::kBlocks)

#if LINRNN_BACKWARD
SELECTIVE_KERNEL(selective_scan) { linrnn::scan_backward(args); }
SELECTIVE_KERNEL(selective_reduce) { linrnn::reduce_backward(args); }
#else
SELECTIVE_KERNEL(selective_scan) { linrnn::scan_forward(args); }
SELECTIVE_KERNEL(selective_reduce) { linrnn::reduce_forward(args); }
#endif
SELECTIVE_KERNEL(selective_carry) { linrnn::carry(args); }
