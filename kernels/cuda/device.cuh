// What differs between a GPU and the CPU that runs these sources in the tests: the rest of the folder is plain C++.
#pragma once

#include "../numbers.h"

namespace linrnn {

constexpr int kMaxThreads = 256;  // of a block; leaves a thread 255 registers

#ifdef LINRNN_HOST_SHIM

inline void* dynamic_shared() { return shim::dynamic_shared(); }
template <int BYTES>
inline void async_copy(void* shared, int offset, const void* global) {
  shim::async_copy(static_cast<char*>(shared) + offset, global, BYTES);
}
inline void async_commit() { shim::async_commit(); }
template <int GROUPS>
inline void async_wait() { shim::async_wait(GROUPS); }
inline float power_of_two(float x) { return __builtin_exp2f(x); }
inline double power_of_two(double x) { return __builtin_exp2(x); }
template <class R>
inline R shuffle_xor(R v, int mask, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  R other;
  shim::shuffle_xor(&v, &other, sizeof v, mask, file, line);
  return other;
}

#else

inline void* dynamic_shared() {
  extern __shared__ int4 shared[];  // of 16 bytes: what the widest copy needs
  return shared;
}

// Copies BYTES (4, 8 or 16, both addresses aligned to it) from global memory to `offset` bytes behind an address in
// shared memory, while the thread goes on. (Apart from the offset, so that this is one addition of 32 bits or none.)
template <int BYTES>
inline void async_copy(void* shared, int offset, const void* global) {
#if __CUDA_ARCH__ >= 800
  const unsigned to = unsigned(__cvta_generic_to_shared(shared)) + offset;
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(BYTES) : "memory");
#else
  char* to = static_cast<char*>(shared) + offset;
  memcpy(__builtin_assume_aligned(to, BYTES), __builtin_assume_aligned(global, BYTES), BYTES);
#endif
}

// Closes the group of the copies issued since the last one.
inline void async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all groups but the newest GROUPS have arrived; what a thread copied it may then read itself.
template <int GROUPS>
inline void async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#endif
}

// 2^x: one instruction of the special function unit, right to two units in the last place; what is subnormal is 0.
inline float power_of_two(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
inline double power_of_two(double x) { return exp2(x); }

// The v of lane ^ mask; all lanes of the warp take part.
template <class R>
inline R shuffle_xor(R v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }

#endif

inline int64_t least(int64_t u, int64_t v) { return u < v ? u : v; }

}  // namespace linrnn

// A kernel: one struct of arguments, by value. Launchers and the tests find kernels by this macro. One block to a
// multiprocessor is all that is promised: left to itself the compiler spills registers to fit more.
#define LINRNN_KERNEL(name) LINRNN_KERNEL_WITHIN(name, linrnn::kMaxThreads, 1)
// And where so many blocks of so many threads are to fit a multiprocessor.
#define LINRNN_KERNEL_WITHIN(name, threads, blocks) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ linrnn::Args args)
