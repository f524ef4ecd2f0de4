// Rows of a tensor on their way from global memory through a ring in shared memory, and rows on their way out.
//
// A scan reads each row once and computes next to nothing on it, so what counts is that enough bytes are under way: a
// thread asks for its rows kStages - 1 stages before it needs them. Slots belong to one thread, so that no barrier is
// needed, and the slots of neighbours are neighbours, so that no banks collide.
#pragma once

#include "device.cuh"

namespace linrnn {

constexpr int kStages = 4;

// V adjacent elements, moved as one.
template <class E, int V>
struct alignas(sizeof(E) * V < 16 ? sizeof(E) * V : 16) Vec { E data[V]; };

// One thread's column of a (B, T, D) tensor. An absent tensor (a null address) reads as zeros.
template <class E, int V>
struct Incoming {
  using Row = Vec<E, V>;

  const char* column;
  int64_t stride;  // in bytes, from a row to the next
  char* slots;
  const char* next;

  Incoming(const LinrnnView& view, int64_t b, int64_t d) : stride(view.stride_t * int64_t(sizeof(E))), slots(nullptr) {
    const E* at = static_cast<const E*>(view.data);
    column = reinterpret_cast<const char*>(at ? at + b * view.stride_b + d : at);
    next = column;
  }

  // Takes its share of the thread block's ring, `depth` slots a thread, and moves `ring` behind it. (A block is a
  // multiple of 32 threads, so that whatever comes next is aligned.)
  void attach(char*& ring, int depth) {
    slots = ring + threadIdx.x * sizeof(Row);
    ring += int64_t(depth) * blockDim.x * sizeof(Row);
  }

  void seek(int64_t row) { next = column + row * stride; }

  // Row `next` into a slot.
  void fetch(int slot) {
    if (column) {
      char* to = slots + slot * int(blockDim.x * sizeof(Row));
      if constexpr (sizeof(Row) >= 4) async_copy<sizeof(Row)>(to, next);
      else *reinterpret_cast<Row*>(to) = *reinterpret_cast<const Row*>(next);  // 2 bytes: too small for the copy engine
      next += stride;
    }
  }

  Row read(int slot) const {
    return column ? *reinterpret_cast<const Row*>(slots + slot * int(blockDim.x * sizeof(Row))) : Row{};
  }
};

template <class E, int V>
struct Outgoing {
  using Row = Vec<E, V>;

  char* column;
  int64_t stride;
  char* next;

  Outgoing(const LinrnnView& view, int64_t b, int64_t d) : stride(view.stride_t * int64_t(sizeof(E))) {
    E* at = static_cast<E*>(view.data);
    column = reinterpret_cast<char*>(at ? at + b * view.stride_b + d : at);
    next = column;
  }

  void seek(int64_t row) { next = column + row * stride; }

  void put(const Row& row) {
    if (column) {
      *reinterpret_cast<Row*>(next) = row;
      next += stride;
    }
  }
};

// Runs work(position, count, slot) over the rows [begin, end) of this thread, a stage of `rows` rows at a time, `step`
// rows from one stage to the next, `stages` times: also where nothing is left (count = 0), for the sake of barriers in
// `work`. Row i of a stage lies in slot `slot + i`.
template <class Pass, class Work>
inline void pipeline(Pass& pass, int64_t begin, int64_t end, int rows, int64_t step, int64_t stages, Work&& work) {
  const auto count = [&](int64_t position) { return position < end ? int(least(rows, end - position)) : 0; };
  int64_t ahead = begin;
  int free = 0;
  const auto fetch = [&] {
    const int n = count(ahead);
    if (n) {
      pass.seek(ahead);
#pragma unroll 4
      for (int i = 0; i < n; ++i) pass.fetch(ahead + i, free * rows + i);
    }
    async_commit();  // an empty group too: the wait below counts groups
    ahead += step;
    free = free + 1 == kStages ? 0 : free + 1;
  };
  for (int stage = 0; stage < kStages - 1; ++stage) fetch();
  int slot = 0;
  for (int64_t stage = 0; stage < stages; ++stage, begin += step) {
    async_wait<kStages - 2>();
    fetch();  // into the slots that the last turn of the loop has read
    work(begin, count(begin), slot * rows);
    slot = slot + 1 == kStages ? 0 : slot + 1;
  }
}

}  // namespace linrnn
