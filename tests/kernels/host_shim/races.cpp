// The race detector of races.h, and the entry points of the compiler's instrumentation.
#include "races.h"

#include <dlfcn.h>

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "shim.h"

namespace shim::races {
namespace {

// Intervals are numbered through all blocks and launches, so that what an earlier block left behind is merely old.
struct Trace {
  uint32_t write_interval, read_interval, pending_interval;
  uint32_t write_pc, read_pc;
  uint16_t write_thread, read_thread, pending_thread;
  bool many_threads;  // read by several threads in read_interval
  bool many_blocks;   // read by several blocks
};

constexpr size_t kPage = 4096;
using Page = std::vector<Trace>;

struct State {
  std::string launch, found;
  uint32_t interval = 0, first_of_launch = 0, first_of_block = 0;
  std::vector<unsigned> block_of;  // of the intervals of this launch
  uintptr_t stack = 0, stack_end = 0, shared = 0, shared_end = 0, zone = 0;
  std::vector<Trace> shared_traces;
  std::unordered_map<uintptr_t, Page> pages;
  uintptr_t last_number = 0;
  Page* last_page = nullptr;
};
State state;
const char anchor = 0;

uint32_t offset_of(const void* pc) {
  static const uintptr_t base = [] {
    Dl_info info;
    dladdr(&anchor, &info);
    return reinterpret_cast<uintptr_t>(info.dli_fbase);
  }();
  return uint32_t(reinterpret_cast<uintptr_t>(pc) - base);
}

std::string hex(uint32_t pc) {
  char text[24];
  snprintf(text, sizeof text, "<pc 0x%x>", pc - 1);  // host.py makes a source line of it
  return text;
}

std::string where(uintptr_t address) {
  if (address >= state.shared - state.zone && address < state.shared_end + state.zone)
    return "shared memory at byte " + std::to_string(long(address - state.shared));
  return "global memory";
}

void report(uintptr_t address, const char* verb, uint32_t pc, const std::string& other) {
  if (!state.found.empty()) return;
  state.found = "kernel " + state.launch + ", block " + std::to_string(place.block.x) + ": thread " +
                std::to_string(place.thread.x) + " " + verb + " " + where(address) + " " + hex(pc) + ", " + other;
}

Trace& trace(uintptr_t address) {
  if (address >= state.shared && address < state.shared_end) return state.shared_traces[address - state.shared];
  const uintptr_t number = address / kPage;
  if (number != state.last_number || !state.last_page) {
    Page& page = state.pages[number];
    if (page.empty()) page.resize(kPage);
    state.last_number = number;
    state.last_page = &page;
  }
  return (*state.last_page)[address % kPage];
}

std::string other(uint32_t interval, unsigned thread, const char* verb, uint32_t pc) {
  return "which thread " + std::to_string(thread) + " of block " +
         std::to_string(state.block_of[interval - state.first_of_launch]) + " " + verb + " " + hex(pc) +
         " with no barrier between";
}

bool conflicts(uint32_t interval, unsigned thread) {
  if (interval < state.first_of_launch) return false;
  return interval < state.first_of_block || (interval == state.interval && thread != place.thread.x);
}

void check_pending(const Trace& t, uintptr_t address, const char* verb, uint32_t pc) {
  if (t.pending_interval >= state.first_of_block)
    report(address, verb, pc,
           "to which an asynchronous copy of thread " + std::to_string(t.pending_thread) + " may still be writing");
}

void check_write(const Trace& t, uintptr_t address, const char* verb, uint32_t pc) {
  if (conflicts(t.write_interval, t.write_thread))
    report(address, verb, pc, other(t.write_interval, t.write_thread, "wrote", t.write_pc));
  const bool many = (t.many_threads && t.read_interval == state.interval) || t.many_blocks;
  if (t.read_interval >= state.first_of_launch && (many || conflicts(t.read_interval, t.read_thread)))
    report(address, verb, pc, other(t.read_interval, t.read_thread, "read", t.read_pc));
}

void read_byte(uintptr_t address, uint32_t pc) {
  Trace& t = trace(address);
  check_pending(t, address, "reads", pc);
  if (conflicts(t.write_interval, t.write_thread))
    report(address, "reads", pc, other(t.write_interval, t.write_thread, "wrote", t.write_pc));
  const bool old = t.read_interval < state.first_of_launch;
  t.many_blocks = !old && (t.many_blocks || t.read_interval < state.first_of_block);
  const bool same = t.read_interval == state.interval;
  t.many_threads = same && (t.many_threads || t.read_thread != place.thread.x);
  t.read_interval = state.interval;
  t.read_thread = uint16_t(place.thread.x);
  t.read_pc = pc;
}

void write_byte(uintptr_t address, uint32_t pc) {
  Trace& t = trace(address);
  check_pending(t, address, "writes", pc);
  check_write(t, address, "writes", pc);
  t.write_interval = state.interval;
  t.write_thread = uint16_t(place.thread.x);
  t.write_pc = pc;
}

template <void (*each)(uintptr_t, uint32_t)>
void access(const void* p, size_t bytes, const void* pc, const char* verb) {
  const auto address = reinterpret_cast<uintptr_t>(p), own = reinterpret_cast<uintptr_t>(&place);
  if (address - state.stack < state.stack_end - state.stack || address - own < sizeof place) return;
  const uint32_t offset = offset_of(pc);
  const uintptr_t end = address + bytes, low = state.shared - state.zone, high = state.shared_end + state.zone;
  if (end > low && address < high && (address < state.shared || end > state.shared_end))
    return report(address, verb, offset, "outside of its " + std::to_string(high - low - 2 * state.zone) + " bytes");
  for (uintptr_t at = address; at < end; at++) each(at, offset);
}

}  // namespace

void begin_launch(const char* name) {
  state.launch = name;
  state.found.clear();
  state.block_of.clear();
  state.first_of_launch = state.interval + 1;
}

// Every library has a detector of its own, so none may hold on to its memory.
void end_launch() {
  state.pages.clear();
  state.last_page = nullptr;
}

void begin_block(unsigned block, const unsigned char* shared, size_t bytes, size_t zone) {
  state.shared = reinterpret_cast<uintptr_t>(shared);
  state.shared_end = state.shared + bytes;
  state.zone = zone;
  state.shared_traces.assign(bytes, Trace{});
  state.first_of_block = state.interval + 1;
  next_interval(block);
}

void next_interval(unsigned block) {
  state.interval++;
  state.block_of.push_back(block);
}

void enter_stack(const void* low, size_t bytes) {
  state.stack = reinterpret_cast<uintptr_t>(low);
  state.stack_end = state.stack + bytes;
}

void async_issue(void* to, const void* from, size_t bytes, const void* pc) {
  access<read_byte>(from, bytes, pc, "copies from");
  const auto address = reinterpret_cast<uintptr_t>(to);
  for (uintptr_t at = address; at < address + bytes; at++) {
    Trace& t = trace(at);
    check_pending(t, at, "starts a copy to", offset_of(pc));
    check_write(t, at, "starts a copy to", offset_of(pc));
    t.pending_interval = state.interval;
    t.pending_thread = uint16_t(place.thread.x);
  }
}

void async_done(void* to, size_t bytes, const void* pc) {
  const auto address = reinterpret_cast<uintptr_t>(to);
  for (uintptr_t at = address; at < address + bytes; at++) {
    Trace& t = trace(at);
    t.pending_interval = 0;
    t.write_interval = state.interval;
    t.write_thread = uint16_t(place.thread.x);
    t.write_pc = offset_of(pc);
  }
}

const std::string& found() { return state.found; }

}  // namespace shim::races

using shim::races::access;
using shim::races::read_byte;
using shim::races::write_byte;

#define ENTRY_POINTS(n)                                                                                             \
  void __tsan_read##n(const void* p) { access<read_byte>(p, n, __builtin_return_address(0), "reads"); }             \
  void __tsan_write##n(void* p) { access<write_byte>(p, n, __builtin_return_address(0), "writes"); }                \
  void __tsan_unaligned_read##n(const void* p) { access<read_byte>(p, n, __builtin_return_address(0), "reads"); }   \
  void __tsan_unaligned_write##n(void* p) { access<write_byte>(p, n, __builtin_return_address(0), "writes"); }

extern "C" {
ENTRY_POINTS(1)
ENTRY_POINTS(2)
ENTRY_POINTS(4)
ENTRY_POINTS(8)
ENTRY_POINTS(16)
void __tsan_read_range(const void* p, size_t n) { access<read_byte>(p, n, __builtin_return_address(0), "reads"); }
void __tsan_write_range(void* p, size_t n) { access<write_byte>(p, n, __builtin_return_address(0), "writes"); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
