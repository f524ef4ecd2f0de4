// A block as real threads, one per CUDA thread, for ThreadSanitizer: blocks run one after another.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>

#include "block.h"

namespace shim {

class Threads {
 public:
  explicit Threads(Block& block) : block_(block), sites_(block.threads) {}

  void run() {
    active() = this;
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < block_.threads; t++) threads.emplace_back([this, t] { thread(t); });
    for (std::thread& thread : threads) thread.join();
    if (!failure_.what.empty()) throw failure_;
  }

  void wait(Site site) {
    std::unique_lock<std::mutex> lock(mutex_);
    sites_[place.thread.x] = site;
    waiting_.push_back(place.thread.x);
    const unsigned interval = interval_;
    release_if_stuck();
    released_.wait(lock, [&] { return interval_ != interval || !failure_.what.empty(); });
    if (!failure_.what.empty()) throw failure_;
  }
  static Threads*& active() {
    static Threads* threads;
    return threads;
  }

 private:
  void thread(unsigned t) {
    current = &block_;
    block_.enter(t);
    Failure failure;
    try {
      block_.launch.entry(block_.launch.args);
    } catch (const Failure& thrown) {
      failure = thrown;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    if (failure_.what.empty()) failure_ = failure;
    exited_.push_back(t);
    release_if_stuck();
  }

  // With the lock held.
  void release_if_stuck() {
    if (failure_.what.empty() && waiting_.size() + exited_.size() < block_.threads) return;
    try {
      if (failure_.what.empty()) check_barrier(block_, waiting_, sites_, exited_);
    } catch (const Failure& failure) {
      failure_ = failure;
    }
    waiting_.clear();
    interval_++;
    released_.notify_all();
  }

  Block& block_;
  std::vector<Site> sites_;
  std::vector<unsigned> waiting_, exited_;
  std::mutex mutex_;
  std::condition_variable released_;
  unsigned interval_ = 0;
  Failure failure_;
};

struct Worker {};  // what an OS thread keeps from block to block
void run(Block& block, Worker&) { Threads(block).run(); }
void arrive(const char* file, int line) { Threads::active()->wait({file, line}); }

}  // namespace shim
