// A block as fibers on one OS thread: each thread runs to the next barrier, in an order shuffled at every barrier.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <exception>

#include "block.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace shim {

// Kept from block to block. The page at the low end is a guard: an overflow is a crash and no silent damage.
class Stack {
 public:
  Stack() : base_(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
    if (base_ == MAP_FAILED || mprotect(base_, kGuard, PROT_NONE)) throw Failure{"no memory for the stack of a fiber"};
  }
  Stack(Stack&& other) : base_(other.base_) { other.base_ = MAP_FAILED; }
  ~Stack() {
    if (base_ != MAP_FAILED) munmap(base_, kBytes);
  }
  void* low() const { return static_cast<char*>(base_) + kGuard; }
  size_t bytes() const { return kBytes - kGuard; }

 private:
  static constexpr size_t kBytes = 256 << 10, kGuard = 4096;
  void* base_;
};

class Fibers {
 public:
  explicit Fibers(Block& block) : block_(block), fibers_(block.threads), sites_(block.threads) {
    while (stacks().size() < block.threads) stacks().emplace_back();
  }

  void run() {
    active() = this;
    std::vector<unsigned> ready(block_.threads), exited;
    for (unsigned t = 0; t < block_.threads; t++) ready[t] = t;
    while (!ready.empty()) {
      std::shuffle(ready.begin(), ready.end(), block_.random);
      std::vector<unsigned> waiting;
      for (unsigned t : ready) {
        switch_to(t);
        if (!failure_.what.empty()) throw failure_;
        (fibers_[t].exited ? exited : waiting).push_back(t);
      }
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
  static std::vector<Stack>& stacks() {
    static thread_local std::vector<Stack> all;
    return all;
  }
  const Stack& stack(unsigned t) const { return stacks()[t]; }

  void switch_to(unsigned t) {
    Fiber& fiber = fibers_[t];
    running_ = t;
    block_.enter(t);
    races::enter_stack(stack(t).low(), stack(t).bytes());
    if (!fiber.started) {
      fiber.started = true;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stack(t).low();
      fiber.context.uc_stack.ss_size = stack(t).bytes();
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Fibers::main, 0);
#ifdef __SANITIZE_ADDRESS__
      __asan_unpoison_memory_region(stack(t).low(), stack(t).bytes());  // a failed launch leaves frames behind
#endif
    }
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack;
    __sanitizer_start_switch_fiber(&fake_stack, stack(t).low(), stack(t).bytes());
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
  std::vector<Fiber> fibers_;
  std::vector<Site> sites_;
  ucontext_t scheduler_;
  const void* scheduler_low_ = nullptr;
  size_t scheduler_bytes_ = 0;
  unsigned running_ = 0;
  Failure failure_;
};

void run(Block& block) { Fibers(block).run(); }
void arrive(Block&, const char* file, int line) { Fibers::active()->wait({file, line}); }

}  // namespace shim
