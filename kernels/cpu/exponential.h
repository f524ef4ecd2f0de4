// Exponentials that the compiler can vectorise: no calls, no branches. NaN stays NaN.
#pragma once

#include <cmath>

#include "../numbers.h"

namespace linrnn {

// exp(t A) of many t for one A, in units in which it is cheap: A in units of 1/log2(e), phases in turns.
template <class R>
struct Exponential;

template <>
struct Exponential<float> {
  static constexpr double kRate = 1.4426950408889634, kPhase = 0.15915494309189535;

  // 2^x: x = n + r with n whole and |r| <= 1/2; 2^r by its best polynomial of degree 6 (relative error 2e-9).
  static float growth(float x) {
    constexpr float kRound = 0x1.8p23f;  // added, it pushes the fraction out of the mantissa, and n is what is left
    x = x < -127.0f ? -127.0f : x;  // 2^-127 comes out as zero
    x = x > 128.0f ? 128.0f : x;    // and 2^128 as infinity
    const float shifted = x + kRound, r = x - (shifted - kRound);
    float p = 0x1.41d332p-13f;
    p = p * r + 0x1.5f456ap-10f;
    p = p * r + 0x1.3b2dbcp-7f;
    p = p * r + 0x1.c6aed4p-5f;
    p = p * r + 0x1.ebfbdap-3f;
    p = p * r + 0x1.62e430p-1f;
    p = p * r + 1.0f;
    return p * float_of_bits((bits_of_float(shifted) + 127u) << 23);
  }

  // exp(2 pi i x): x less the nearest whole turn; cosine and sine by their best polynomials (errors 1e-10, 1e-11).
  static void turn(float x, float& re, float& im) {
    constexpr float kRound = 0x1.8p23f;
    const float f = x - ((x + kRound) - kRound), s = f * f;
    float c = -1.453237065f;
    c = c * s + 7.800240581f;
    c = c * s - 26.4047057f;
    c = c * s + 60.24213774f;
    c = c * s - 85.45665887f;
    c = c * s + 64.93938910f;
    c = c * s - 19.73920874f;
    re = c * s + 1.0f;
    float d = -0.6151015082f;
    d = d * s + 3.775996498f;
    d = d * s - 15.08456937f;
    d = d * s + 42.05737286f;
    d = d * s - 76.70576124f;
    d = d * s + 81.60524538f;
    d = d * s - 41.34170217f;
    im = (d * s + 6.283185307f) * f;
  }
};

template <>
struct Exponential<double> {
  static constexpr double kRate = 1, kPhase = 1;
  static double growth(double x) { return std::exp(x); }
  static void turn(double x, double& re, double& im) { re = std::cos(x), im = std::sin(x); }
};

}  // namespace linrnn
