// Rows of a tensor on their way from global memory through a ring in shared memory, and rows on their way out.
//
// A scan reads each row once and computes next to nothing on it, so what counts is that enough bytes are under way: a
// thread asks for its rows kStages - 1 stages before it needs them. Slots belong to one thread: it needs no barrier.
#pragma once

#include "device.cuh"

namespace linrnn {

constexpr int kStages = 4;

// V adjacent elements, moved as one.
template <class E, int V>
struct alignas(sizeof(E) * V < 16 ? sizeof(E) * V : 16) Vec { E data[V]; };

// One thread's column of a (B, T, D) tensor, on the way in.
template <class E, int V>
struct Incoming {
  using Row = Vec<E, V>;

  const char* column;
  int64_t stride;  // in bytes, from a row to the next
  Row* slots;

  Incoming(const LinrnnView& view, int64_t b, int64_t d) : stride(view.stride_t * int64_t(sizeof(E))), slots(nullptr) {
    column = reinterpret_cast<const char*>(static_cast<const E*>(view.data) + b * view.stride_b + d);
  }

  // Takes its share of the thread block's ring and moves `ring` behind it. A thread has `depth` slots in a row and one
  // to spare: depth is even, so neighbours are an odd number of rows apart and fall into different banks.
  void attach(char*& ring, int depth) {
    slots = reinterpret_cast<Row*>(ring) + threadIdx.x * (depth + 1);
    ring += blockDim.x * (depth + 1) * sizeof(Row);
  }

  // Asks for n rows from row k on, into the slots from `slot` on.
  void fetch(int64_t k, int n, int slot) {
    const char* next = column + k * stride;
    Row* to = slots + slot;
#pragma unroll 8
    for (int i = 0; i < n; ++i, next += stride) {
      if constexpr (sizeof(Row) >= 4) async_copy<sizeof(Row)>(to, i * int(sizeof(Row)), next);
      else to[i] = *reinterpret_cast<const Row*>(next);  // 2 bytes: too small for the copy engine
    }
  }

  const Row& read(int slot) const { return slots[slot]; }
};

// And on the way out; a null address is an output that nobody wants.
template <class E, int V>
struct Outgoing {
  using Row = Vec<E, V>;

  char* column;
  int64_t stride;
  char* next;

  Outgoing(const LinrnnView& view, int64_t b, int64_t d) : stride(view.stride_t * int64_t(sizeof(E))) {
    column = view.data ? reinterpret_cast<char*>(static_cast<E*>(view.data) + b * view.stride_b + d) : nullptr;
    next = column;
  }

  void seek(int64_t row) { next = column + row * stride; }

  void put(const Row& row) {
    if (column) *reinterpret_cast<Row*>(next) = row;
    next += stride;
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
    pass.fetch(ahead, count(ahead), free * rows);
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
