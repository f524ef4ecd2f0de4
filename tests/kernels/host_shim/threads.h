// A block as real threads, one per CUDA thread, for ThreadSanitizer: blocks run one after another.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>

#include "block.h"

namespace shim {

class Threads {
 public:
  explicit Threads(Block& block)
      : block_(block), sites_(block.threads), shuffling_((block.threads + kWarp - 1) / kWarp),
        shuffles_(shuffling_.size()) {}

  void run() {
    active() = this;
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < block_.threads; t++) threads.emplace_back([this, t] { thread(t); });
    for (std::thread& thread : threads) thread.join();
    if (!failure_.what.empty()) throw failure_;
  }

  void wait(Site site) {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned t = place.thread.x;
    sites_[t] = site;
    std::vector<unsigned>& with = site.mask ? shuffling_[t / kWarp] : waiting_;
    unsigned& interval = site.mask ? shuffles_[t / kWarp] : interval_;
    with.push_back(t);
    const unsigned now = interval;
    if (site.mask && with.size() == kWarp) release_warp(t / kWarp);
    else release_if_stuck();
    released_.wait(lock, [&] { return interval != now || !failure_.what.empty(); });
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

  // Both with the lock held.
  void release_warp(unsigned warp) {
    try {
      check_shuffle(block_, shuffling_[warp], sites_);
    } catch (const Failure& failure) {
      failure_ = failure;
    }
    shuffling_[warp].clear();
    shuffles_[warp]++;
    released_.notify_all();
  }

  void release_if_stuck() {
    size_t idle = waiting_.size() + exited_.size();
    for (const std::vector<unsigned>& lanes : shuffling_) idle += lanes.size();
    if (failure_.what.empty() && idle < block_.threads) return;
    try {
      for (const std::vector<unsigned>& lanes : shuffling_)
        if (failure_.what.empty() && !lanes.empty()) fail_in_shuffle(block_, lanes[0], sites_[lanes[0]]);
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
  std::vector<std::vector<unsigned>> shuffling_;  // by warp
  std::vector<unsigned> shuffles_;
  std::mutex mutex_;
  std::condition_variable released_;
  unsigned interval_ = 0;
  Failure failure_;
};

struct Worker {};  // what an OS thread keeps from block to block
void run(Block& block, Worker&) { Threads(block).run(); }
void arrive(Site site) { Threads::active()->wait(site); }

}  // namespace shim
