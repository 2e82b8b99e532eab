// What all of this project's machine code for CPUs is made of: vectors of LANES floats and the functions of them, and
// the product of matrices.

#pragma once

#include <cfloat>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <immintrin.h>

namespace {

#ifndef LANES
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#endif
// Can the CPU multiply bfloat16 numbers, two at a time, and sum them up as floats?
#ifndef PAIRS
#ifdef __AVX512BF16__
#define PAIRS true
#else
#define PAIRS false
#endif
#endif
// PANEL output channels are multiplied together, for ROWS tiles at a time: with AVX2, as many sums as there are
// registers for.
constexpr int PANEL = 16, VECTORS = PANEL / LANES, ROWS = LANES == 16 ? 12 : 6;

typedef float V __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t I __attribute__((vector_size(LANES * 4)));

inline V load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }

// bfloat16 is the upper half of a float; what is stored is rounded to the nearest, of two to the even one.
typedef uint16_t Brief;
typedef uint32_t U __attribute__((vector_size(LANES * 4)));

inline V load(const Brief* p) {
    U bits;
#if LANES == 16 && defined(__AVX512F__)
    bits = reinterpret_cast<U>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif LANES == 8
    bits = reinterpret_cast<U>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    for (int lane = 0; lane < LANES; lane++) bits[lane] = p[lane];
#endif
    return reinterpret_cast<V>(bits << 16);
}

// The bits of the floats that are nearest among those whose lower half is zero.
inline U rounded(V v) {
    const U bits = reinterpret_cast<U>(v);
    const V nearest = reinterpret_cast<V>(bits + 0x7fff + (bits >> 16 & 1));
    return reinterpret_cast<U>(v == v ? nearest : V{} + __builtin_nanf("")) & 0xffff0000;
}

inline void store(Brief* p, V v) {
    const U kept = rounded(v) >> 16;
#if LANES == 16 && defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(kept)));
#elif LANES == 8
    const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(kept), __m256i{});
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8)));
#else
    for (int lane = 0; lane < LANES; lane++) p[lane] = static_cast<Brief>(kept[lane]);
#endif
}

inline float number(float x) { return x; }
inline float number(Brief x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

// Of memory that holds only `count` numbers more: those, zero behind them; and so many of a vector.
template <typename T>
inline V load_part(const T* p, int64_t count) {
    if (count >= LANES) return load(p);
    V v = {};
    for (int64_t lane = 0; lane < count; lane++) v[lane] = number(p[lane]);
    return v;
}

template <typename T>
inline void store_part(T* p, V v, int64_t count) {
    if (count >= LANES) return store(p, v);
    T all[LANES];
    store(all, v);
    for (int64_t lane = 0; lane < count; lane++) p[lane] = all[lane];
}

// The larger and the smaller; b where one of them is not a number.
inline V larger(V a, V b) {
#if LANES == 16 && defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif LANES == 8
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

inline V smaller(V a, V b) {
#if LANES == 16 && defined(__AVX512F__)
    return _mm512_min_ps(a, b);
#elif LANES == 8
    return _mm256_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}

// 2^t within 1.1e-7 of itself, 1 where t is 0; t lies within 126 of 0 or is no number.
inline V two_to(V t) {
    const V shifter = V{} + 12582912.0f;  // adding it rounds to an integer, which its low bits then hold
    const V n = t + shifter, r = t - (n - shifter);
    const I power = reinterpret_cast<I>(n) << 23;
    V y = V{} + 1.3264735e-3f;
    y = y * r + 9.6715180e-3f;
    y = y * r + 5.5507340e-2f;
    y = y * r + 2.4022242e-1f;
    y = y * r + 6.9314700e-1f;
    y = y * r + 1.0f;
    return y * reinterpret_cast<V>(power + 0x3f800000);  // what is no number stays so
}

// e^-x as 2^t, of which the relative error is |t| units in the last place, at least one. t counts as 62 where it is
// more, so that the product of two is finite, and as -125 where it is less or no number, so that its neighbour does not
// suffer.
inline V fallen(V x) { return two_to(smaller(larger(x * -1.44269504088896341f, V{} - 125.0f), V{} + 62.0f)); }

// SiLU of two: a division is as dear as ten products.
inline void silu(V& a, V& b) {
    const V below_a = 1.0f + fallen(a), below_b = 1.0f + fallen(b), both = 1.0f / (below_a * below_b);
    a *= both * below_b;
    b *= both * below_a;
}

// Exact GELU: x (1 + erf(x / sqrt 2)) / 2, with 7.1.26 of Abramowitz and Stegun, whose error is at most 1.5e-7.
inline V gelu(V x) {
    const V z = larger(x, -x) * 0.70710678f, t = 1.0f / (z * 0.3275911f + 1.0f);
    V y = t * 1.061405429f - 1.453152027f;
    y = y * t + 1.421413741f;
    y = y * t - 0.284496736f;
    y = y * t + 0.254829592f;
    const V tail = 0.5f * (y * t) * fallen(z * z);  // of the Gaussian beyond |x|
    return larger(x, V{}) - smaller(larger(x, -x), V{} + FLT_MAX) * tail;
}

// y = scale x + shift by channel, of some pixels, followed by SiLU where `activate` says so.
template <typename T, typename S>
inline void lined(const T* x, const float* scale, const float* shift, int64_t pixels, int64_t channels, bool activate,
                  S* y) {
    for (int64_t p = 0; p < pixels; p++, x += channels, y += channels)
        for (int64_t ch = 0; ch < channels; ch += PANEL) {
            V v[2] = {};
            for (int k = 0; k < VECTORS; k++) {
                const int64_t at = ch + k * LANES;
                v[k] = load(x + at) * load(scale + at) + load(shift + at);
            }
            if (activate) silu(v[0], v[1]);
            for (int k = 0; k < VECTORS; k++) store(y + ch + k * LANES, v[k]);
        }
}

// What numbers of type T are multiplied as.
template <typename T>
using Factor = std::conditional_t<PAIRS, T, float>;

// Where `product` wants the number of row i and column o of a matrix b "k PANEL": bfloat16 numbers lie in pairs.
template <typename F>
inline int64_t place_of(int64_t i, int64_t o) {
    return sizeof(F) == sizeof(float) ? i * PANEL + o : (i - i % 2) * PANEL + 2 * o + i % 2;
}

// Some numbers of as many rows as are multiplied at once, of the matrix that `product` wants.
inline void store_rows(float* to, const V* row, int) { store(to, *row); }
inline void store_rows(Brief* to, const V* row, int far) {
    const U both = rounded(row[0]) >> 16 | rounded(row[far]);
    std::memcpy(to, &both, sizeof both);
}

// As many floats as hold `count` numbers.
template <typename F>
inline int64_t floats(int64_t count) {
    return (count * sizeof(F) + 3) / 4;
}

inline void set(float& x, float v) { x = v; }
inline void set(float& x, Brief v) { x = number(v); }
inline void set(Brief& x, Brief v) { x = v; }

inline V multiplied(V sum, const float* left, const float* right) { return sum + *left * load(right); }

inline V multiplied(V sum, const Brief* left, const Brief* right) {
#ifdef __AVX512BF16__
    int32_t pair;
    std::memcpy(&pair, left, sizeof pair);
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(right));
#else
    for (int lane = 0; lane < LANES; lane++)
        sum[lane] += number(left[0]) * number(right[2 * lane]) + number(left[1]) * number(right[2 * lane + 1]);
    return sum;
#endif
}

// Numbers from row to row of `count` numbers each, so that ROWS rows do not compete for the same lines of the cache.
template <typename F>
inline int64_t spread(int64_t count) {
    return count * sizeof(F) % 1024 ? count : count + 64 / sizeof(F);
}

// The sum over taps of a "ROWS k" times b "k PANEL", laid out by `place_of`; a is `row` numbers on from row to row, and
// `far` from tap to tap. `done(row, vector, sum)` is called for every result. Of bfloat16 numbers k is even.
template <typename F, typename Done>
inline void product(const F* a, int64_t row, int64_t far, const F* b, int64_t taps, int64_t k, const Done& done) {
    constexpr int64_t EACH = sizeof(float) / sizeof(F);  // numbers multiplied at once
    V sum[ROWS][VECTORS] = {};
    for (int64_t tap = 0; tap < taps; tap++, a += far, b += k * PANEL)
        for (int64_t i = 0; i < k; i += EACH)
#pragma GCC unroll 24
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECTORS; v++)
                    sum[r][v] = multiplied(sum[r][v], a + r * row + i, b + i * PANEL + v * LANES * EACH);
#pragma GCC unroll 24
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) done(r, v, sum[r][v]);
}

}  // namespace
