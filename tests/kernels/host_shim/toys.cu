// Kernels with a choice of planted bugs (Args::bug; 0 is none), by which the shim itself is tested.
#include <cstdint>

namespace toys {

struct Args {
  const float* in;
  float* out;
  int64_t n, bug;
};

enum Bug : int64_t {
  kNone, kNoBarrierBeforeRead, kNoBarrierAfterRead, kSharedWrite, kSharedRead, kGlobalWrite, kGlobalRead, kDivergent,
  kExited, kOtherBarrier, kBlocksMeet, kNoWait, kShortWait, kNoCommit, kNoBarrierAfterWait, kEarlyRefill, kMisaligned,
  kOddSize, kNotShared, kFromShared, kOverflow, kAbsentLane, kOtherShuffle,
  kShuffleForBarrier,
};

}  // namespace toys

#define TOY(name) extern "C" __global__ void __launch_bounds__(256) name(const __grid_constant__ toys::Args args)

using namespace toys;

// out[n - 1 - t] = in[t] in each row of n = blockDim.x elements, three times over.
TOY(mirror) {
  const int t = threadIdx.x, n = int(args.n);
  const bool bug = t == 1;
  float* shared = static_cast<float*>(shim::dynamic_shared());
  const float* in = args.in + int64_t(blockIdx.x) * n;
  float* out = args.out + (args.bug == kBlocksMeet ? 0 : int64_t(blockIdx.x) * n);
  float v = in[args.bug == kGlobalRead && bug ? int64_t(gridDim.x - blockIdx.x) * n : t];
  for (int turn = 0; turn < 3; ++turn) {
    shared[args.bug == kSharedWrite && bug ? n : t] = v;
    if (args.bug == kDivergent && bug) {
    } else if (args.bug == kOtherBarrier && bug) {
      __syncthreads();
    } else if (args.bug != kNoBarrierBeforeRead) {
      __syncthreads();
    }
    if (args.bug == kExited && bug) return;
    v = shared[args.bug == kSharedRead && bug ? n : n - 1 - t];
    if (args.bug != kNoBarrierAfterRead) __syncthreads();
  }
  out[args.bug == kGlobalWrite && bug ? int64_t(gridDim.x - blockIdx.x) * n : t] = v;
}

// out[t] = sum over rows of the neighbour's column, (t + 1) % blockDim.x, through a ring of 3 rows.
TOY(ring) {
  const int t = threadIdx.x, width = blockDim.x, rows = int(args.n), neighbour = (t + 1) % width;
  float* shared = static_cast<float*>(shim::dynamic_shared());
  const auto fetch = [&](int row) {
    if (row < rows) {
      float* to = shared + row % 3 * width + t;
      const float* from = args.in + row * width + t;
      if (args.bug == kMisaligned) shim::async_copy(to, reinterpret_cast<const char*>(from) + 2, 4);
      else if (args.bug == kOddSize) shim::async_copy(to, from, 2);
      else if (args.bug == kNotShared) shim::async_copy(args.out + t, from, 4);
      else if (args.bug == kFromShared) shim::async_copy(to, shared, 4);
      else if (args.bug == kOverflow) shim::async_copy(to + 3 * width, from, 4);
      else shim::async_copy(to, from, 4);
    }
    if (args.bug != kNoCommit) shim::async_commit();
  };
  fetch(0);
  fetch(1);
  float sum = 0;
  for (int row = 0; row < rows; ++row) {
    if (args.bug == kEarlyRefill) fetch(row + 2);  // over the row that neighbours may still be reading
    if (args.bug == kShortWait || args.bug == kEarlyRefill) shim::async_wait(2);
    else if (args.bug != kNoWait) shim::async_wait(1);
    if (args.bug != kNoBarrierAfterWait) __syncthreads();
    sum += shared[row % 3 * width + neighbour];
    if (args.bug == kEarlyRefill) continue;
    __syncthreads();
    fetch(row + 2);
  }
  args.out[blockIdx.x * width + t] = sum;
}

// out[t] = in[t ^ 1] + in[t ^ 2] in each row of blockDim.x elements.
TOY(exchange) {
  const int t = threadIdx.x;
  const bool bug = t == 1;
  float* shared = static_cast<float*>(shim::dynamic_shared());
  const float v = args.in[int64_t(blockIdx.x) * blockDim.x + t];
  float other = 0;
  shared[t] = v;
  if (args.bug != kAbsentLane || !bug)
    shim::shuffle_xor(&v, &other, 4, args.bug == kOtherShuffle && bug ? 2 : 1, __FILE__, __LINE__);
  if (args.bug != kShuffleForBarrier) __syncthreads();
  args.out[int64_t(blockIdx.x) * blockDim.x + t] = other + shared[t ^ 2];
}
