// A race detector that knows CUDA's rules, behind the calls that `g++ -fsanitize=thread` puts before every access.
//
// Of every byte it remembers who wrote and who read it last, and in which interval between two barriers. Two accesses
// by different threads of a block in one interval, or by different blocks of a launch, of which one is a write, are a
// race, whatever the order they happened to run in. So is touching what an asynchronous copy may still be writing.
// Without SHIM_RACES this is nothing.
#pragma once

#include <cstddef>
#include <string>

namespace shim::races {

#ifdef SHIM_RACES
void begin_launch(const char* name);
void end_launch();
void begin_block(unsigned block, const unsigned char* shared, size_t bytes, size_t zone);
void next_interval(unsigned block);
void enter_stack(const void* low, size_t bytes);
void async_issue(void* to, const void* from, size_t bytes, const void* pc);
void async_done(void* to, size_t bytes, const void* pc);
const std::string& found();  // the first race of the launch, or empty
#else
inline void begin_launch(const char*) {}
inline void end_launch() {}
inline void begin_block(unsigned, const unsigned char*, size_t, size_t) {}
inline void next_interval(unsigned) {}
inline void enter_stack(const void*, size_t) {}
inline void async_issue(void*, const void*, size_t, const void*) {}
inline void async_done(void*, size_t, const void*) {}
inline const std::string& found() {
  static const std::string none;
  return none;
}
#endif

}  // namespace shim::races
