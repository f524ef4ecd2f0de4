// The launch of a kernel on the CPU, and the entry points of shim.h.
#include <atomic>
#include <mutex>
#include <numeric>
#include <thread>

#ifdef SHIM_THREADS
#include "threads.h"
#else
#include "fibers.h"
#endif

namespace shim {

__thread Place place;
__thread Block* current;

void* dynamic_shared() { return current->shared.data(); }

void barrier(const char* file, int line) { arrive({file, line}); }

void shuffle_xor(const void* mine, void* theirs, int bytes, int mask, const char* file, int line) {
  if (mask < 1 || mask >= int(kWarp)) fail("shuffle by " + std::to_string(mask) + "; 1 to 31 are allowed");
  Shown& own = current->shown[place.thread.x];
  const unsigned turn = own.turn++ % 2;
  std::memcpy(own.values[turn], mine, bytes);
  arrive({file, line, mask});
  std::memcpy(theirs, current->shown[place.thread.x ^ unsigned(mask)].values[turn], bytes);
}

void async_copy(void* shared, const void* global, int bytes) {
  if (bytes != 4 && bytes != 8 && bytes != 16)
    fail("asynchronous copy of " + std::to_string(bytes) + " bytes; 4, 8 and 16 are allowed");
  if (reinterpret_cast<uintptr_t>(shared) % bytes || reinterpret_cast<uintptr_t>(global) % bytes)
    fail("asynchronous copy of " + std::to_string(bytes) + " bytes between addresses that are not multiples of it");
  if (!current->shared.holds(shared, bytes)) fail("asynchronous copy to outside of shared memory");
  if (current->shared.holds(global, bytes)) fail("asynchronous copy from shared memory");
  races::async_issue(shared, global, bytes, __builtin_return_address(0));
  current->copies[place.thread.x].issue({shared, global, bytes, false});
}
void async_commit() { current->copies[place.thread.x].commit(); }
void async_wait(int newest_left) { current->copies[place.thread.x].wait(newest_left, __builtin_return_address(0)); }

namespace {

void run_block(const Launch& launch, unsigned index, Worker& worker) {
  Block block(launch, index);
  current = &block;
  races::begin_block(index, block.shared.data(), block.shared.bytes(), SharedMemory::kZone);
  run(block, worker);
  if (!races::found().empty()) throw Failure{races::found()};
  block.check_red_zones();
}

void run_grid(const Launch& launch, unsigned os_threads) {
  std::vector<unsigned> order(launch.place.grid_size.x);
  std::iota(order.begin(), order.end(), 0u);
  std::mt19937 random(launch.seed);
  std::shuffle(order.begin(), order.end(), random);
  std::atomic<size_t> next{0};
  std::mutex mutex;
  Failure failure;
  const auto work = [&] {
    try {
      Worker worker;
      for (size_t i; (i = next++) < order.size();) run_block(launch, order[i], worker);
    } catch (const Failure& thrown) {
      next = order.size();
      std::lock_guard<std::mutex> lock(mutex);
      if (failure.what.empty()) failure = thrown;
    }
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < std::min<size_t>(os_threads, order.size()); i++) others.emplace_back(work);
  work();
  for (std::thread& thread : others) thread.join();
  if (!failure.what.empty()) throw failure;
}

}  // namespace

// Returns what went wrong, or null. The text lives until the next launch from this OS thread.
const char* launch(const char* name, Entry entry, const void* args, size_t bytes, size_t expected_bytes, unsigned grid,
                   unsigned block, unsigned most_threads, unsigned shared_bytes, unsigned seed, unsigned os_threads) {
  static thread_local std::string error;
  const auto refuse = [&](const char* takes, size_t wanted, const char* of, size_t given) {
    error = std::string("kernel ") + name + takes + std::to_string(wanted) + of + std::to_string(given);
    return error.c_str();
  };
  if (bytes != expected_bytes) return refuse(" takes a struct of ", expected_bytes, " bytes but was given ", bytes);
  if (block > most_threads) return refuse(" takes blocks of up to ", most_threads, " threads but was given ", block);
  std::vector<std::max_align_t> aligned(bytes / sizeof(std::max_align_t) + 1);
  std::memcpy(aligned.data(), args, bytes);
  const char* result = nullptr;
  races::begin_launch(name);
  try {
    run_grid({name, entry, aligned.data(), {{0}, {0}, {block}, {grid}}, shared_bytes, seed}, os_threads);
  } catch (const Failure& failure) {
    error = failure.what;
    result = error.c_str();
  }
  races::end_launch();
  return result;
}

}  // namespace shim
