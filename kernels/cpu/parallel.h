// Threads: the OpenMP pool that torch already runs, reached through function pointers.
//
// Nothing here is linked against an OpenMP runtime. The loader hands over the entry points of the runtime that is in
// the process (libgomp's ABI, which LLVM's runtime also exports), so that there is one pool, whatever torch was
// built with, and any compiler can build this file. Without them everything runs on the calling thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

#if defined(__SSE2__)
#include <emmintrin.h>
#include <xmmintrin.h>
#endif

// Before a loop whose iterations touch different elements; the compiler cannot see that through the lambdas.
#if defined(__clang__)
#define LINRNN_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define LINRNN_INDEPENDENT _Pragma("GCC ivdep")
#else
#define LINRNN_INDEPENDENT
#endif

namespace linrnn {

struct Runtime {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*num_threads)() = nullptr;
  int (*thread_num)() = nullptr;
};
extern Runtime runtime;

// body(index, count) on every thread of a region; count may come out smaller than was asked for.
template <class Body>
void run_parallel(int threads, Body&& body) {
  if (threads <= 1 || !runtime.parallel) return body(0, 1);
  using Plain = std::remove_reference_t<Body>;
  auto trampoline = [](void* data) {
    (*static_cast<Plain*>(data))(runtime.thread_num(), runtime.num_threads());
  };
  runtime.parallel(trampoline, const_cast<std::remove_const_t<Plain>*>(&body), unsigned(threads), 0);
}

// What a thread sets while it runs a kernel. Running products of decays end in denormals, which cost tens of cycles
// each, so they are flushed to zero. Streaming stores are made visible to the other threads on the way out.
class KernelScope {
#if defined(__SSE2__)
  unsigned saved_ = _mm_getcsr();

 public:
  KernelScope() { _mm_setcsr(saved_ | 0x8040); }
  ~KernelScope() {
    _mm_sfence();
    _mm_setcsr(saved_);
  }
#elif defined(__aarch64__)
  uint64_t saved_;

 public:
  KernelScope() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (1ull << 24)));
  }
  ~KernelScope() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }
#else
 public:
  KernelScope() {}
#endif
};

// A barrier for threads that all run: it spins, since the work between two of them is some ten microseconds.
class SpinBarrier {
  static constexpr int kShort = 256;
  std::atomic<int> waiting_{0}, phase_{0}, patience_;

 public:
  // `patience`: turns of spinning before the thread offers its core to others, who may keep it for milliseconds. Once
  // that was too few, there are more threads than cores to run them, and waits are short from then on.
  explicit SpinBarrier(int patience = kShort) : patience_(patience) {}
  void wait(int count) {
    wait(count, [] {});
  }
  // last() runs when all have arrived, before any of them goes on.
  template <class Last>
  void wait(int count, Last&& last) {
    const int phase = phase_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
      waiting_.store(0, std::memory_order_relaxed);
      last();
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    const int patience = patience_.load(std::memory_order_relaxed);
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins == patience) patience_.store(kShort, std::memory_order_relaxed);
      if (spins > patience) std::this_thread::yield();
#if defined(__SSE2__)
      else _mm_pause();
#endif
    }
  }
};

}  // namespace linrnn
