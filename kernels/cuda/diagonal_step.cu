// One decoding step of h = a h + x for a batch whose states are rows of a pool: state in, state out, in one launch.
//
// LINRNN_A, LINRNN_X: storage of a, and of x and h; LINRNN_INDEX: the integer type of the batch's list of rows.
#include "device.cuh"

namespace linrnn {

struct Args {
  int64_t B, D, slots;
  const void* a;
  int64_t a_stride;  // from one sequence to the next, in elements; 0 where they share a
  const void* x;
  int64_t x_stride;
  const void* index;  // (B,) rows of the pools; null: sequence b has row b
  const void* state;
  int64_t state_stride;
  void* out;  // may be `state`: each element is read and written by one thread
  int64_t out_stride;
  int64_t out_indexed;  // whether `out` is a pool as well, or has a row for each sequence
  void* h;
};

using A = LINRNN_A;
using X = LINRNN_X;
using S = arithmetic<X>;

inline void step(const Args& args) {
  const int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (item >= args.B * args.D) return;
  const int64_t b = item / args.D, d = item % args.D;
  const int64_t slot = args.index ? int64_t(static_cast<const LINRNN_INDEX*>(args.index)[b]) : b;
  X* h = static_cast<X*>(args.h) + item;
  S* out = static_cast<S*>(args.out) + d;
  if (slot < 0 || slot >= args.slots) {
    // -1 is an empty place in the batch; a row that does not exist must not look like an answer
    const S nothing = slot == -1 ? S{} : invalid<S>();
    *h = narrow<X>(nothing);
    if (!args.out_indexed) out[b * args.out_stride] = nothing;
    return;
  }
  const S before = static_cast<const S*>(args.state)[slot * args.state_stride + d];
  const S after = add(mul(widen(static_cast<const A*>(args.a)[b * args.a_stride + d]), before),
                      widen(static_cast<const X*>(args.x)[b * args.x_stride + d]));
  out[(args.out_indexed ? slot : b) * args.out_stride] = after;
  *h = narrow<X>(after);
}

}  // namespace linrnn

LINRNN_KERNEL(diagonal_step) { linrnn::step(args); }
