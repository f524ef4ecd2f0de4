// One step of decoding: a short list of operations on B rows (a layer's, a block's or a whole model's), run by all
// threads together from one call. At batch 1 a step lasts as long as reading the weights does, some tens of
// microseconds a matrix, so what is around them has to cost next to nothing: no call, no allocation and no team of
// threads for each operation, a spinning barrier between those that exchange channels.
//
// Every number of row b is computed in an order that does not depend on B, nor on what the other rows hold.
#include "parallel.h"
#include "rows.h"
#include "step.h"
#include "step_linear.h"
#include "step_recurrences.h"

namespace linrnn {
namespace step {

// ---- y = x / rms(x) * weight, or (x - mean) / deviation * weight + bias: refs x, y; constants weight, bias (or none);
// outputs 1; size D; option: 0 for the root mean square, 1 for the layer norm; eps. A thread takes whole rows. ----

void norm(const Op& op, const Frame& f) {
  const int64_t D = op.size;
  const float *weight = op.constants[0], *bias = op.constants[1];
  for (int64_t b = f.index; b < f.B; b += f.count) {
    const float* x = f.at(op.refs[0], b);
    float* y = f.at(op.refs[1], b);
    const auto mean_of = [&](auto number) {
      float partial[16] = {};
      int64_t k = 0;
      for (; k + 16 <= D; k += 16)
        for (int i = 0; i < 16; ++i) partial[i] += number(x[k + i]);
      for (int i = 0; k < D; ++k, ++i) partial[i] += number(x[k]);
      double total = 0;
      for (int i = 0; i < 16; ++i) total += partial[i];
      return float(total / double(D));
    };
    const float mean = op.option ? mean_of([](float v) { return v; }) : 0.0f;
    const float power = mean_of([mean](float v) { return (v - mean) * (v - mean); });
    const float scale = 1.0f / std::sqrt(power + float(op.eps));
    LINRNN_INDEPENDENT
    for (int64_t k = 0; k < D; ++k) y[k] = (x[k] - mean) * scale;
    if (weight)
      for (int64_t k = 0; k < D; ++k) y[k] *= weight[k];
    if (bias)
      for (int64_t k = 0; k < D; ++k) y[k] += bias[k];
  }
}

// ---- y = act(x) * value (+ a): refs x, y, value, a, the last two if any; option: the activation. ----

template <int64_t ACT>
void gate(const Op& op, const Frame& f) {
  int64_t d0, d1;
  f.part(op.outputs, d0, d1);
  for (int64_t b = 0; b < f.B; ++b) {
    const float *x = f.at(op.refs[0], b), *value = f.at(op.refs[2], b), *a = f.at(op.refs[3], b);
    float* y = f.at(op.refs[1], b);
    LINRNN_INDEPENDENT
    for (int64_t d = d0; d < d1; ++d) {
      const float v = activated<ACT>(x[d]), w = value ? v * value[d] : v;
      y[d] = a ? w + a[d] : w;
    }
  }
}

// Whether another thread may do any part of operation k: nobody reads what it writes before all have met again, and it
// reads nothing that its own thread has just written.
bool free_to_share(const Op* ops, int64_t n_ops, int64_t k) {
  const bool met_before = k == 0 || ops[k].barrier || (ops[k].refs[2].slot < 0 && ops[k].refs[3].slot < 0);
  return ops[k].kind == LINEAR && met_before && (k + 1 == n_ops || ops[k + 1].barrier);
}

void run(const Op& op, const Frame& f, bool shared) {
  switch (op.kind) {
    case LINEAR: return linear(op, f, shared);
    case NORM: return norm(op, f);
    case CONV: return with_activation(op.option, [&](auto act) { conv<decltype(act)::value>(op, f); });
    case SELECTIVE: return selective(op, f);
    case DIAGONAL: return diagonal(op, f);
    case GATE: return with_activation(op.option, [&](auto act) { gate<decltype(act)::value>(op, f); });
    case RGLRU: return rglru(op, f);
    case SHIFT: return shift(op, f);
    case HEADS: return heads(op, f);
    case WKV: return wkv(op, f);
  }
}

}  // namespace step
}  // namespace linrnn

// Runs the operations on B rows. `slots` are the memory that their refs name.
LINRNN_API void linrnn_step(const LinrnnStepOp* ops, int64_t n_ops, float* const* slots, int64_t B, int64_t threads) {
  using namespace linrnn;
  step::Share shares[step::kMostShares];
  SpinBarrier barrier(4096);  // some tens of microseconds: as long as the thread that is waited for may read
  run_parallel(int(std::min<int64_t>(threads, step::kMostShares)), [&](int index, int count) {
    KernelScope scope;
    const step::Frame frame{slots, B, index, count, shares};
    for (int64_t k = 0; k < n_ops; ++k) {
      if (ops[k].barrier && k && count > 1) {
        step::expect(ops[k], frame);
        barrier.wait(count, [&] {
          for (int i = 0; i < count; ++i) shares[i].taken.store(0, std::memory_order_relaxed);
        });
      }
      step::run(ops[k], frame, step::free_to_share(ops, n_ops, k));
    }
  });
}
