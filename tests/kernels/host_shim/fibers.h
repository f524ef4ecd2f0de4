// A block as fibers on one OS thread: each thread runs to the next barrier, or shuffle, in an order shuffled at each.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <exception>

#include "block.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace shim {

// The stacks of a block, kept from block to block of a launch. The page at the low end of each is a guard: an overflow
// is a crash and no silent damage.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  ~Stacks() {
    if (base_) munmap(base_, count_ * kBytes);
  }
  void reserve(size_t count) {
    if (base_) return;  // all blocks of a launch are alike
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* base = mmap(nullptr, count * kBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (base == MAP_FAILED) throw Failure{"no memory for the stacks of " + std::to_string(count) + " fibers"};
    base_ = static_cast<char*>(base);
    count_ = count;
    for (size_t i = 0; i < count; i++)
      if (mprotect(base_ + i * kBytes, kGuard, PROT_NONE)) throw Failure{"no guard for the stack of a fiber"};
  }
  void* low(size_t i) const { return base_ + i * kBytes + kGuard; }

  static constexpr size_t kGuard = 4096, kUsable = (256 << 10) - kGuard;

 private:
  static constexpr size_t kBytes = kGuard + kUsable;
  char* base_ = nullptr;
  size_t count_ = 0;
};

class Fibers {
 public:
  Fibers(Block& block, Stacks& stacks) : block_(block), stacks_(stacks), fibers_(block.threads), sites_(block.threads) {
    stacks.reserve(block.threads);
  }

  void run() {
    active() = this;
    std::vector<unsigned> ready(block_.threads), exited;
    for (unsigned t = 0; t < block_.threads; t++) ready[t] = t;
    std::vector<unsigned> waiting, whole;  // at the barrier; and the warps that are whole in a shuffle
    std::vector<std::vector<unsigned>> shuffling((block_.threads + kWarp - 1) / kWarp);  // by warp
    while (!ready.empty()) {
      std::shuffle(ready.begin(), ready.end(), block_.random);
      std::reverse(ready.begin(), ready.end());  // taken from the back
      while (!ready.empty() || !whole.empty()) {
        // A warp runs on while other threads have not even begun, or they all take turns.
        if (!whole.empty() && (ready.empty() || block_.random() % 8)) {
          const unsigned warp = whole.back();
          whole.pop_back();
          check_shuffle(block_, shuffling[warp], sites_);
          std::shuffle(shuffling[warp].begin(), shuffling[warp].end(), block_.random);
          ready.insert(ready.end(), shuffling[warp].begin(), shuffling[warp].end());
          shuffling[warp].clear();
          continue;
        }
        const unsigned t = ready.back();
        ready.pop_back();
        switch_to(t);
        if (!failure_.what.empty()) throw failure_;
        if (fibers_[t].exited) {
          exited.push_back(t);
        } else if (!sites_[t].mask) {
          waiting.push_back(t);
        } else {
          shuffling[t / kWarp].push_back(t);
          if (shuffling[t / kWarp].size() == kWarp)
            whole.insert(block_.random() % 8 ? whole.end() : whole.begin(), t / kWarp);
        }
      }
      for (const std::vector<unsigned>& lanes : shuffling)
        if (!lanes.empty()) fail_in_shuffle(block_, lanes[0], sites_[lanes[0]]);
      check_barrier(block_, waiting, sites_, exited);
      races::next_interval(block_.index);
      ready.swap(waiting);
    }
  }

  // Called in a fiber.
  void wait(Site site) {
    sites_[running_] = site;
    switch_back(false);
  }
  static Fibers*& active() {
    static thread_local Fibers* fibers;
    return fibers;
  }

 private:
  struct Fiber {
    ucontext_t context;
    bool started, exited;
    void* fake_stack;
  };
  void switch_to(unsigned t) {
    Fiber& fiber = fibers_[t];
    running_ = t;
    block_.enter(t);
    races::enter_stack(stacks_.low(t), Stacks::kUsable);
    if (!fiber.started) {
      fiber.started = true;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks_.low(t);
      fiber.context.uc_stack.ss_size = Stacks::kUsable;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Fibers::main, 0);
#ifdef __SANITIZE_ADDRESS__
      __asan_unpoison_memory_region(stacks_.low(t), Stacks::kUsable);  // a failed launch leaves frames behind
#endif
    }
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack;
    __sanitizer_start_switch_fiber(&fake_stack, stacks_.low(t), Stacks::kUsable);
#endif
    swapcontext(&scheduler_, &fiber.context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  void switch_back(bool exited) {
    Fiber& fiber = fibers_[running_];
    fiber.exited = exited;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(exited ? nullptr : &fiber.fake_stack, scheduler_low_, scheduler_bytes_);
#endif
    swapcontext(&fiber.context, &scheduler_);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_low_, &scheduler_bytes_);
#endif
  }

  static void main() {
    Fibers& self = *active();
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &self.scheduler_low_, &self.scheduler_bytes_);
#endif
    try {
      self.block_.launch.entry(self.block_.launch.args);
    } catch (const Failure& failure) {
      self.failure_ = failure;
    }
    self.switch_back(true);
    std::terminate();  // an exited fiber is never resumed
  }

  Block& block_;
  Stacks& stacks_;
  std::vector<Fiber> fibers_;
  std::vector<Site> sites_;
  ucontext_t scheduler_;
  const void* scheduler_low_ = nullptr;
  size_t scheduler_bytes_ = 0;
  unsigned running_ = 0;
  Failure failure_;
};

using Worker = Stacks;  // what an OS thread keeps from block to block
void run(Block& block, Worker& stacks) { Fibers(block, stacks).run(); }
void arrive(Site site) { Fibers::active()->wait(site); }

}  // namespace shim
