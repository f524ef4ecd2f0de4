// What the threads of one block share: its shared memory between red zones, and the asynchronous copies of each thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "races.h"
#include "shim.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace shim {

struct Failure {
  std::string what;
};

struct Launch {
  const char* name;
  Entry entry;
  const void* args;
  Place place;
  unsigned shared_bytes, seed;
};

// NaN in every floating-point format before a block starts. 16-byte aligned and no better, as CUDA promises.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes), memory_(new (std::align_val_t(64)) unsigned char[total()]) {
    std::memset(memory_, kZoneByte, total());
    std::memset(data(), 0xff, bytes);
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(memory_, total());
    __asan_unpoison_memory_region(data(), bytes);
#endif
  }
  ~SharedMemory() {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(memory_, total());
#endif
    ::operator delete[](memory_, std::align_val_t(64));
  }
  SharedMemory(const SharedMemory&) = delete;

  unsigned char* data() const { return memory_ + kZone; }
  size_t bytes() const { return bytes_; }
  bool holds(const void* p, size_t bytes) const {
    const auto* at = static_cast<const unsigned char*>(p);
    return at >= data() && at + bytes <= data() + bytes_;
  }
  // Distance from the start of the first byte written outside, where there is one.
  std::optional<long> overwritten() const {
#ifndef __SANITIZE_ADDRESS__  // which has the zones closed
    for (size_t i = 0; i < total(); i++)
      if (memory_[i] != kZoneByte && (i < kZone || i >= kZone + bytes_)) return long(i) - long(kZone);
#endif
    return std::nullopt;
  }

  static constexpr size_t kZone = 4096 + 16;

 private:
  static constexpr unsigned char kZoneByte = 0xa5;
  size_t total() const { return bytes_ + 2 * kZone; }

  size_t bytes_;
  unsigned char* memory_;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool done;
};

// The cp.async queue of one thread. When a copy is performed is the launch's choice: always at the wait, so that a
// missing wait reads NaN; always at its issue, so that a slot refilled too early shows; or either, copy by copy.
class Copies {
 public:
  explicit Copies(unsigned seed) : timing_(seed % 3), coin_(seed + 1) { groups_.emplace_back(); }
  void issue(Copy copy) {
    if (timing_ == 1 || (timing_ == 2 && coin_() % 2)) perform(copy);
    groups_.back().push_back(copy);
  }
  void commit() { groups_.emplace_back(); }
  void wait(size_t newest_left, const void* pc) {
    const size_t committed = groups_.size() - 1;
    if (committed <= newest_left) return;
    const size_t done = committed - newest_left;
    for (size_t i = 0; i < done; i++)
      for (Copy& copy : groups_[i]) {
        perform(copy);
        races::async_done(copy.to, copy.bytes, pc);
      }
    groups_.erase(groups_.begin(), groups_.begin() + done);
  }

 private:
  static void perform(Copy& copy) {
    if (!copy.done) std::memcpy(copy.to, copy.from, copy.bytes);
    copy.done = true;
  }
  unsigned timing_;
  std::minstd_rand coin_;
  std::vector<std::vector<Copy>> groups_;  // the last one is open
};

constexpr unsigned kWarp = 32;

// The value that a thread shows to its warp. Two take turns: a thread that is one shuffle ahead leaves the other alone.
struct Shown {
  unsigned char values[2][16];
  unsigned turn;
};

struct Block {
  Block(const Launch& launch, unsigned index)
      : launch(launch), index(index), threads(launch.place.block_size.x), shared(launch.shared_bytes),
        random(launch.seed * 7919u + index * 104729u + 1) {
    for (unsigned t = 0; t < threads; t++) copies.emplace_back(launch.seed);
    shown.resize(threads);
  }
  std::string name() const {
    return std::string("kernel ") + launch.name + ", block " + std::to_string(index) + " of " +
           std::to_string(launch.place.grid_size.x);
  }
  void enter(unsigned thread) const {
    place = launch.place;
    place.block.x = index;
    place.thread.x = thread;
  }
  void check_red_zones() const {
    if (const auto where = shared.overwritten())
      throw Failure{name() + ": write outside of shared memory, at byte " + std::to_string(*where) + " of " +
                    std::to_string(shared.bytes())};
  }

  const Launch& launch;
  const unsigned index, threads;
  SharedMemory shared;
  std::vector<Copies> copies;
  std::vector<Shown> shown;
  std::mt19937 random;
};

extern __thread Block* current;  // the block that this OS thread runs

[[noreturn]] inline void fail(const std::string& what) {
  throw Failure{current->name() + ", thread " + std::to_string(place.thread.x) + ": " + what};
}

struct Site {
  const char* file;
  int line;
  int mask = 0;  // of a shuffle; a barrier has none
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
  bool operator!=(const Site& other) const {
    return line != other.line || mask != other.mask || std::strcmp(file, other.file);
  }
};

// Every thread must come to the same barrier. Called when none can go on.
inline void check_barrier(const Block& block, const std::vector<unsigned>& waiting, const std::vector<Site>& sites,
                          const std::vector<unsigned>& exited) {
  if (waiting.empty()) return;
  const Site& first = sites[waiting[0]];
  if (!exited.empty())
    throw Failure{block.name() + ": thread " + std::to_string(waiting[0]) + " waits at the barrier " + first.text() +
                  ", but thread " + std::to_string(exited[0]) + " has exited"};
  for (unsigned t : waiting)
    if (sites[t] != first)
      throw Failure{block.name() + ": thread " + std::to_string(waiting[0]) + " waits at the barrier " + first.text() +
                    ", but thread " + std::to_string(t) + " at " + sites[t].text()};
}

// The lanes of one warp that wait in a shuffle: the same one for all. Called when every lane has come.
inline void check_shuffle(const Block& block, const std::vector<unsigned>& lanes, const std::vector<Site>& sites) {
  for (unsigned t : lanes)
    if (sites[t] != sites[lanes[0]])
      throw Failure{block.name() + ": thread " + std::to_string(lanes[0]) + " is in the shuffle " +
                    sites[lanes[0]].text() + " by " + std::to_string(sites[lanes[0]].mask) + ", but thread " +
                    std::to_string(t) + " in that " + sites[t].text() + " by " + std::to_string(sites[t].mask)};
}

// And called when no thread of the block can go on.
[[noreturn]] inline void fail_in_shuffle(const Block& block, unsigned thread, const Site& site) {
  throw Failure{block.name() + ": thread " + std::to_string(thread) + " waits in the shuffle " + site.text() +
                " for lanes of its warp that do not come"};
}

}  // namespace shim
