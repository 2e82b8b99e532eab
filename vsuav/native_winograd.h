// Winograd's way to convolve, for tiles of pixels and of frames.

#pragma once

#include "native.h"

namespace {

// Numbers between the starts of two of a tile's sums, or of two of the weights': an odd multiple of 64 bytes, so that
// they do not compete for the same lines of the cache.
template <typename F>
inline int64_t apart(int64_t block, int64_t channels) {
    return block * channels + 64 / sizeof(F);
}

// Winograd's F(TILE, TAPS): TILE + TAPS - 1 numbers become as many sums, and so do TAPS weights; their products become
// TILE results.
template <int TILE, int TAPS = 3>
struct Winograd;

template <>
struct Winograd<2> {  // at 0, 1, -1 and infinity
    static void sums(const V* d, int step, V* s) {
        const V d1 = d[step], d2 = d[2 * step];
        s[0] = d[0] - d2;
        s[1] = d1 + d2;
        s[2] = d2 - d1;
        s[3] = d[3 * step] - d1;
    }

    static void results(const V* m, int step, V* r) {
        r[0] = m[0] + m[step] + m[2 * step];
        r[1] = m[step] - m[2 * step] + m[3 * step];
    }

    static void weights(const V* g, int step, V* u) {
        const V outer = g[0] + g[2 * step];
        u[0] = g[0];
        u[1] = (outer + g[step]) * 0.5f;
        u[2] = (outer - g[step]) * 0.5f;
        u[3] = g[2 * step];
    }
};

template <>
struct Winograd<4> {  // as vsuav/winograd.py has it
    static void sums(const V* d, int step, V* s) {
        const V d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
        V near = d4 - d2, far = d3 - d1;
        s[0] = near + 4 * (d0 - d2);
        s[5] = (d5 - d3) - 4 * far;
        s[3] = near + 2 * far;
        s[4] = near - 2 * far;
        near = d4 - 4 * d2;
        far = d3 - 4 * d1;
        s[1] = near + far;
        s[2] = near - far;
    }

    static void results(const V* m, int step, V* r) {
        const V even = m[step] + m[2 * step], odd = m[step] - m[2 * step];
        const V twice = m[3 * step] + m[4 * step], half = m[3 * step] - m[4 * step];
        r[0] = even + twice + m[0];
        r[1] = odd + 2 * half;
        r[2] = even + 4 * twice;
        r[3] = odd + 8 * half + m[5 * step];
    }

    static void weights(const V* g, int step, V* u) {
        const V outer = g[0] + g[2 * step], rising = g[0] + 4 * g[2 * step];
        u[0] = g[0] * 0.25f;
        u[1] = (outer + g[step]) * (-1.0f / 6);
        u[2] = (outer - g[step]) * (-1.0f / 6);
        u[3] = (rising + 2 * g[step]) * (1.0f / 24);
        u[4] = (rising - 2 * g[step]) * (1.0f / 24);
        u[5] = g[2 * step];
    }
};

template <>
struct Winograd<6> {  // at 0, 1, -1, 2, -2, 1/2, -1/2 and infinity
    static void sums(const V* d, int step, V* s) {
        const V d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step], d6 = d[6 * step];
        s[0] = d[0] - d6 + 5.25f * (d4 - d2);
        s[7] = d[7 * step] - d1 + 5.25f * (d3 - d5);
        V even = d2 + d6 - 4.25f * d4, odd = d1 + d5 - 4.25f * d3;
        s[1] = even + odd;
        s[2] = even - odd;
        even = d6 + 0.25f * d2 - 1.25f * d4;
        odd = 0.5f * d1 - 2.5f * d3 + 2 * d5;
        s[3] = even + odd;
        s[4] = even - odd;
        even = d6 + 4 * d2 - 5 * d4;
        odd = 2 * d1 - 2.5f * d3 + 0.5f * d5;
        s[5] = even + odd;
        s[6] = even - odd;
    }

    static void results(const V* m, int step, V* r) {
        const V even = m[step] + m[2 * step], odd = m[step] - m[2 * step];
        const V twice = m[3 * step] + m[4 * step], twice_odd = m[3 * step] - m[4 * step];
        const V half = m[5 * step] + m[6 * step], half_odd = m[5 * step] - m[6 * step];
        r[0] = m[0] + even + twice + 32 * half;
        r[1] = odd + 2 * twice_odd + 16 * half_odd;
        r[2] = even + 4 * twice + 8 * half;
        r[3] = odd + 8 * twice_odd + 4 * half_odd;
        r[4] = even + 16 * twice + 2 * half;
        r[5] = odd + 32 * twice_odd + half_odd + m[7 * step];
    }

    static void weights(const V* g, int step, V* u) {
        const V outer = g[0] + g[2 * step], rising = g[0] + 4 * g[2 * step], falling = 4 * g[0] + g[2 * step];
        u[0] = g[0];
        u[1] = (outer + g[step]) * (-2.0f / 9);
        u[2] = (outer - g[step]) * (-2.0f / 9);
        u[3] = (rising + 2 * g[step]) * (1.0f / 90);
        u[4] = (rising - 2 * g[step]) * (1.0f / 90);
        u[5] = (falling + 2 * g[step]) * (1.0f / 180);
        u[6] = (falling - 2 * g[step]) * (1.0f / 180);
        u[7] = g[2 * step];
    }
};

template <>
struct Winograd<4, 5> {  // at the same numbers
    static void sums(const V* d, int step, V* s) { Winograd<6>::sums(d, step, s); }

    static void results(const V* m, int step, V* r) {
        const V twice = m[3 * step] + m[4 * step], twice_odd = m[3 * step] - m[4 * step];
        const V half = m[5 * step] + m[6 * step], half_odd = m[5 * step] - m[6 * step];
        const V even = m[step] + m[2 * step], odd = m[step] - m[2 * step];
        r[0] = m[0] + even + twice + 32 * half;
        r[1] = odd + 2 * twice_odd + 16 * half_odd;
        r[2] = even + 4 * twice + 8 * half;
        r[3] = odd + 8 * twice_odd + 4 * half_odd + m[7 * step];
    }

    static void weights(const V* g, int step, V* u) {
        const V g0 = g[0], g1 = g[step], g2 = g[2 * step], g3 = g[3 * step], g4 = g[4 * step];
        V even = g0 + g2 + g4, odd = g1 + g3;
        u[0] = g0;
        u[1] = (even + odd) * (-2.0f / 9);
        u[2] = (even - odd) * (-2.0f / 9);
        even = g0 + 4 * g2 + 16 * g4;
        odd = 2 * g1 + 8 * g3;
        u[3] = (even + odd) * (1.0f / 90);
        u[4] = (even - odd) * (1.0f / 90);
        even = 16 * g0 + 4 * g2 + g4;
        odd = 8 * g1 + 2 * g3;
        u[5] = (even + odd) * (1.0f / 720);
        u[6] = (even - odd) * (1.0f / 720);
        u[7] = g4;
    }
};

}  // namespace
