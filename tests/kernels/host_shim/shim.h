// CUDA C++ for g++: what a kernel sees of the machine when it runs on the CPU.
//
// Put before an unchanged kernel source with `-include shim.h`. The rest, runtime.cpp, is compiled on its own, so that
// the sanitizers' instrumentation of the kernels does not reach it.
#pragma once

#include <cstddef>

namespace shim {

struct Index {
  unsigned x;
};

struct Place {
  Index thread, block, block_size, grid_size;
};
extern __thread Place place;  // of the CUDA thread that runs on this OS thread now

void* dynamic_shared();
void barrier(const char* file, int line);

// __shfl_xor_sync by all threads of a warp: of thread t, the value of its lane ^ mask. Orders no access to memory.
void shuffle_xor(const void* mine, void* theirs, int bytes, int mask, const char* file, int line);

// cp.async: a copy is performed at any time between its issue and the wait that covers its group.
void async_copy(void* shared, const void* global, int bytes);
void async_commit();
void async_wait(int newest_left);

using Entry = void (*)(const void* args);
const char* launch(const char* name, Entry entry, const void* args, size_t bytes, size_t expected_bytes, unsigned grid,
                   unsigned block, unsigned most_threads, unsigned shared_bytes, unsigned seed, unsigned os_threads);

template <class Args>
constexpr size_t args_bytes(void (*)(Args)) {
  return sizeof(Args);
}
template <class Args>
void call(void (*kernel)(Args), const void* args) {
  kernel(*static_cast<const Args*>(args));
}

}  // namespace shim

#define threadIdx shim::place.thread
#define blockIdx shim::place.block
#define blockDim shim::place.block_size
#define gridDim shim::place.grid_size

// Marks by which host.py finds the kernels in the preprocessed source, and their bounds, which it takes out.
#define __global__ __attribute__((noipa))
#define __launch_bounds__(threads, ...) shim_launch_bounds(threads);;
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __syncthreads() shim::barrier(__FILE__, __LINE__)
