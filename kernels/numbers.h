// The numbers of the kernels, on the CPU and on the GPU: storage types (what tensors hold) and the types the arithmetic
// runs in.
//
// bf16 and f16 are formats, never accumulators: they are widened to float when read and rounded to nearest even
// when written, by hand where the machine has no instruction for it.
#pragma once

#ifdef __CUDACC_RTC__  // NVRTC comes without headers
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int64_t = long long;
#else
#include <cstdint>
#include <cstring>
#endif

// A (B, T, D) tensor with unit stride in D; the other strides in elements, 0 where it is broadcast.
struct LinrnnView {
  void* data;
  int64_t stride_b, stride_t;
};

namespace linrnn {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class R>
struct cplx { R re, im; };

inline float float_of_bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
inline uint32_t bits_of_float(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

// ---- reading: storage -> arithmetic ----
inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline cplx<float> widen(cplx<float> v) { return v; }
inline cplx<double> widen(cplx<double> v) { return v; }
inline float widen(bf16 v) { return float_of_bits(uint32_t(v.bits) << 16); }
inline float widen(f16 v) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
  return wide;
#else
  // Exponent and mantissa moved into place and the exponent rebiased from 15 to 127; a subnormal is an exact
  // difference of two normals near 2^-14; infinities and NaNs get the largest exponent.
  const uint32_t magnitude = uint32_t(v.bits & 0x7fff) << 13, sign = uint32_t(v.bits & 0x8000) << 16;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  const float scaled = float_of_bits(magnitude + 0x38000000u);
  const float subnormal = float_of_bits(magnitude | 0x38800000u) - float_of_bits(0x38800000u);
  const float finite = magnitude < 0x00800000u ? subnormal : scaled;
  return float_of_bits(bits_of_float(finite) | special | sign);
#endif
}

// ---- writing: arithmetic -> storage ----
template <class X, class S>
inline X narrow(S v) { return v; }
template <>
inline bf16 narrow<bf16, float>(float v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  bf16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(v));
  return rounded;
#else
  const uint32_t u = bits_of_float(v);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t nan = (u >> 16) | 0x40u;  // quiet, and kept a NaN when the payload's low half is cut off
  return {uint16_t((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
#endif
}
template <>
inline f16 narrow<f16, float>(float v) {
#ifdef __CUDA_ARCH__
  f16 rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(v));
  return rounded;
#else
  const uint32_t u = bits_of_float(v), magnitude = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the float addition of 1/2 rounds at the half format's fixed point, to nearest even.
  const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return {uint16_t((magnitude >= 0x477ff000u ? special : finite) | sign)};
#endif
}

// ---- arithmetic: the coefficient may be real where the state is complex ----
inline float mul(float a, float s) { return a * s; }
inline double mul(double a, double s) { return a * s; }
template <class R>
inline cplx<R> mul(cplx<R> a, cplx<R> s) { return {a.re * s.re - a.im * s.im, a.re * s.im + a.im * s.re}; }
template <class R>
inline cplx<R> mul(R a, cplx<R> s) { return {a * s.re, a * s.im}; }

inline float add(float u, float v) { return u + v; }
inline double add(double u, double v) { return u + v; }
template <class R>
inline cplx<R> add(cplx<R> u, cplx<R> v) { return {u.re + v.re, u.im + v.im}; }

template <class M>
struct Real { static constexpr M of(double v) { return M(v); } };
template <class R>
struct Real<cplx<R>> { static constexpr cplx<R> of(double v) { return {R(v), 0}; } };
template <class M>
constexpr M one() { return Real<M>::of(1); }
template <class M>
inline M invalid() { return Real<M>::of(double(float_of_bits(0x7fc00000u))); }

inline float conj(float a) { return a; }
inline double conj(double a) { return a; }
template <class R>
inline cplx<R> conj(cplx<R> a) { return {a.re, -a.im}; }

// Gradient of a from a*h: g conj(h), and its real part where a is real.
template <class M>
inline float grad_of_coefficient(float g, float h) { return g * h; }
template <class M>
inline double grad_of_coefficient(double g, double h) { return g * h; }
template <class M, class R>
inline M grad_of_coefficient(cplx<R> g, cplx<R> h) {
  if constexpr (sizeof(M) == sizeof(R)) return g.re * h.re + g.im * h.im;
  else return mul(g, conj(h));
}

inline double in_double(float v) { return v; }
inline double in_double(double v) { return v; }
template <class R>
inline cplx<double> in_double(cplx<R> v) { return {v.re, v.im}; }
inline void round_to(double v, float& to) { to = float(v); }
inline void round_to(double v, double& to) { to = v; }
template <class R>
inline void round_to(cplx<double> v, cplx<R>& to) { to = {R(v.re), R(v.im)}; }

// Products over many rows, where some rows reset the state. Exactly zero means that a row did: what was before is cut
// off, be it infinite or NaN. A product that only underflows, or has a factor of zero, is kept apart from zero, so that
// NaN passes it as it does row by row.
inline bool is_zero(double p) { return p == 0; }
inline bool is_zero(cplx<double> p) { return p.re == 0 && p.im == 0; }
template <class W>
inline W kept(W p) { return is_zero(p) ? Real<W>::of(0x1p-1022) : p; }
template <class W>
inline W product(W a, W p) { return is_zero(p) ? p : kept(mul(a, p)); }

template <class X>
using arithmetic = decltype(widen(X{}));

}  // namespace linrnn
