// Eight floats as one value, which the compiler keeps in a register where the machine has one that wide.
#pragma once

#include <cstdint>
#include <cstring>

namespace linrnn {

#if defined(__GNUC__)
typedef float Lanes __attribute__((vector_size(32)));
inline Lanes times_plus(const Lanes& a, const Lanes& b, const Lanes& c) { return a * b + c; }
inline Lanes plus(const Lanes& a, const Lanes& b) { return a + b; }
inline void prefetch(const float* address) { __builtin_prefetch(address); }
#else
struct Lanes {
  float v[8];
  float operator[](int i) const { return v[i]; }
};
inline Lanes times_plus(const Lanes& a, const Lanes& b, const Lanes& c) {
  Lanes r;
  for (int i = 0; i < 8; ++i) r.v[i] = a.v[i] * b.v[i] + c.v[i];
  return r;
}
inline void prefetch(const float*) {}
inline Lanes plus(const Lanes& a, const Lanes& b) {
  Lanes r;
  for (int i = 0; i < 8; ++i) r.v[i] = a.v[i] + b.v[i];
  return r;
}
#endif

inline Lanes lanes(const float* from) {
  Lanes r;
  memcpy(&r, from, sizeof r);
  return r;
}

inline float sum(const Lanes& v) {
  float half[4];
  for (int i = 0; i < 4; ++i) half[i] = v[i] + v[i + 4];
  return (half[0] + half[2]) + (half[1] + half[3]);
}

}  // namespace linrnn
