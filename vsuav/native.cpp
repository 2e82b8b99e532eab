// Convolutions and normalisation for CPUs in this project's own machine code; vsuav/native.py calls it and says what
// each function computes. Compiled once for every kind of CPU: LANES floats are computed together.
//
// A value's bits depend on the operands alone: work is cut into pieces by the shapes, never by the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <immintrin.h>
#include <omp.h>

namespace {

#ifndef LANES
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#endif
// PANEL output channels are multiplied together, for ROWS tiles at a time: as many sums as there are registers for.
constexpr int PANEL = 16, VECTORS = PANEL / LANES, ROWS = LANES == 16 ? 24 : 6;
constexpr int TILE = 4, SPAN = 6, SUMS = SPAN * SPAN;
constexpr int64_t RUN = 8;  // tiles side by side: what they read fits into the nearest cache

typedef float V __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t I __attribute__((vector_size(LANES * 4)));

inline V load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }

// Numbers from the sums of one pixel of a tile to those of the next: not a multiple of what a cache is divided into.
inline int64_t apart(int64_t block, int64_t channels) { return block * channels + 16; }

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

// 1 + e^-x, of which the error is below two units in the last place; x counts as -43 where it is less, so that the
// product of two is finite, and as 87 where it is no number, so that its neighbour does not suffer.
inline V grown(V x) {
    x = smaller(larger(-x, V{} - 87.0f), V{} + 43.0f);
    const V shifter = V{} + 12582912.0f;  // adding it rounds to an integer, which its low bits then hold
    const V n = x * 1.44269504088896341f + shifter;
    const I power = reinterpret_cast<I>(n) << 23;
    const V whole = n - shifter;
    const V r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
    V y = V{} + 1.9875691500e-4f;  // a polynomial of Cephes
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    return 1.0f + reinterpret_cast<V>(reinterpret_cast<I>(y) + power);
}

// SiLU of two: a division is as dear as ten products.
inline void silu(V& a, V& b) {
    const V grown_a = grown(a), grown_b = grown(b), both = 1.0f / (grown_a * grown_b);
    a *= both * grown_b;
    b *= both * grown_a;
}

// The sums of Winograd's F(4, 3), as vsuav/winograd.py has them.
inline void sums(const V* d, int step, V* s) {
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

inline void results(const V* m, int step, V* r) {
    const V even = m[step] + m[2 * step], odd = m[step] - m[2 * step];
    const V twice = m[3 * step] + m[4 * step], half = m[3 * step] - m[4 * step];
    r[0] = even + twice + m[0];
    r[1] = odd + 2 * half;
    r[2] = even + 4 * twice;
    r[3] = odd + 8 * half + m[5 * step];
}

inline void weight_sums(const V* g, int step, V* u) {
    const V outer = g[0] + g[2 * step], rising = g[0] + 4 * g[2 * step];
    u[0] = g[0] * 0.25f;
    u[1] = (outer + g[step]) * (-1.0f / 6);
    u[2] = (outer - g[step]) * (-1.0f / 6);
    u[3] = (rising + 2 * g[step]) * (1.0f / 24);
    u[4] = (rising - 2 * g[step]) * (1.0f / 24);
    u[5] = g[2 * step];
}

// c "ROWS PANEL" = a "ROWS k" times b "k PANEL"
inline void product(const float* a, const float* b, int64_t k, float* c) {
    V sum[ROWS][VECTORS] = {};
    for (int64_t i = 0; i < k; i++) {
        V right[VECTORS];
        for (int v = 0; v < VECTORS; v++) right[v] = load(b + i * PANEL + v * LANES);
#pragma GCC unroll 24
        for (int r = 0; r < ROWS; r++) {
            const float left = a[r * k + i];
            for (int v = 0; v < VECTORS; v++) sum[r][v] += left * right[v];
        }
    }
#pragma GCC unroll 24
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) store(c + r * PANEL + v * LANES, sum[r][v]);
}

struct Convolution {
    const float *x, *scale, *shift, *weight, *bias, *add;
    float *weights, *rooms, *y;
    int64_t clips, frames, height, width, in, out, taps, enlarge, block;
    int64_t by_out, by_in, by_tap, by_row, by_column;  // strides of `weight`
    int64_t threads;
};

// The sums of a run of tiles side by side, from the lines of pixels (or null) and the column where the first begins.
// EDGE: columns may lie outside. NORMED: scale, shift and SiLU come before.
template <bool EDGE, bool NORMED>
inline void sum_up(const Convolution& c, const float* const* lines, int64_t left, int64_t run, const float* scale,
                   const float* shift, float* to, int64_t depth, int64_t step) {
    const int64_t columns = c.width * c.enlarge;
    for (int64_t ch = 0; ch < c.in; ch += PANEL) {
        V down[VECTORS][SUMS];  // column by column
        for (int64_t r = 0; r < run; r++) {
            if (r)
                for (int v = 0; v < VECTORS; v++)
                    for (int k = 0; k < (SPAN - TILE) * SPAN; k++) down[v][k] = down[v][k + TILE * SPAN];
            for (int j = r ? SPAN - TILE : 0; j < SPAN; j++) {
                const int64_t column = left + r * TILE + j;
                const bool inside = !EDGE || (0 <= column && column < columns);
                const int64_t at = (c.enlarge == 1 ? column : column / c.enlarge) * c.in + ch;
                for (int v = 0; v < VECTORS; v++) {
                    V d[SPAN];
                    for (int i = 0; i < SPAN; i++) {
                        d[i] = EDGE && !(inside && lines[i]) ? V{} : load(lines[i] + at + v * LANES);
                        if (NORMED) d[i] = d[i] * load(scale + ch + v * LANES) + load(shift + ch + v * LANES);
                    }
                    if (NORMED)
                        for (int i = 0; i < SPAN; i += 2) silu(d[i], d[i + 1]);
                    for (int i = 0; EDGE && NORMED && i < SPAN; i++)
                        if (!(inside && lines[i])) d[i] = V{};
                    sums(d, 1, down[v] + j * SPAN);
                }
            }
            for (int i = 0; i < SPAN; i++)
                for (int v = 0; v < VECTORS; v++) {
                    V s[SPAN];
                    sums(down[v] + i, SPAN, s);
                    for (int j = 0; j < SPAN; j++)
                        store(to + (i * SPAN + j) * step + r * depth + ch + v * LANES, s[j]);
                }
        }
    }
}

}  // namespace

extern "C" {

// Numbers `convolve` needs for the weights' sums, and each of its threads for itself.
int64_t weights_room(int64_t depth, int64_t out) { return SUMS * apart(depth, out); }
int64_t room(int64_t depth, int64_t block) { return SUMS * (apart(block, depth) + apart(block, PANEL)); }

void convolve(const Convolution* given) {
    const Convolution c = *given;
    const int64_t rows = c.height * c.enlarge, columns = c.width * c.enlarge;  // of the result
    const int64_t high = (rows + TILE - 1) / TILE, wide = (columns + TILE - 1) / TILE;
    const int64_t tiles = c.clips * c.frames * high * wide, blocks = (tiles + c.block - 1) / c.block;
    const int64_t depth = c.taps * c.in, panels = c.out / PANEL, far = apart(depth, c.out);

#pragma omp parallel num_threads(c.threads)
    {
        float* const summed = c.rooms + omp_get_thread_num() * room(depth, c.block);  // "36 tiles depth"
        float* const products = summed + SUMS * apart(c.block, depth);                // "36 tiles PANEL"

        // `weights` "36 panels depth PANEL"
#pragma omp for schedule(static)
        for (int64_t job = 0; job < panels * c.taps; job++) {
            const int64_t panel = job / c.taps, tap = job % c.taps;
            for (int64_t i = 0; i < c.in; i++)
                for (int v = 0; v < VECTORS; v++) {
                    V g[9], half[18], u[SPAN];
                    const float* w = c.weight + (panel * PANEL + v * LANES) * c.by_out + i * c.by_in + tap * c.by_tap;
                    for (int k = 0; k < 9; k++)
                        for (int lane = 0; lane < LANES; lane++)
                            g[k][lane] = w[lane * c.by_out + k / 3 * c.by_row + k % 3 * c.by_column];
                    for (int k = 0; k < 3; k++) weight_sums(g + 3 * k, 1, half + SPAN * k);
                    for (int k = 0; k < SPAN; k++) {
                        weight_sums(half + k, SPAN, u);
                        for (int j = 0; j < SPAN; j++)
                            store(c.weights + (j * SPAN + k) * far + (panel * depth + tap * c.in + i) * PANEL + v * LANES, u[j]);
                    }
                }
        }

#pragma omp for schedule(static)
        for (int64_t job = 0; job < blocks; job++) {
            const int64_t first = job * c.block, count = std::min(c.block, tiles - first);
            for (int64_t t = 0, run; t < count; t += run) {  // runs of tiles side by side share columns
                const int64_t tile = first + t, frame = tile / (high * wide), across = tile % wide;
                const int64_t top = tile / wide % high * TILE - 1, left = across * TILE - 1;
                run = std::min({RUN, count - t, wide - across});
                for (int64_t tap = 0; tap < c.taps; tap++) {
                    const int64_t there = frame % c.frames + tap - c.taps / 2;
                    const bool exists = 0 <= there && there < c.frames;
                    const float* from = c.x + (frame + tap - c.taps / 2) * c.height * c.width * c.in;
                    const float* lines[SPAN];
                    for (int i = 0; i < SPAN; i++) {
                        const bool inside = exists && 0 <= top + i && top + i < rows;
                        lines[i] = inside ? from + (top + i) / c.enlarge * c.width * c.in : nullptr;
                    }
                    const int64_t clip = frame / c.frames * c.in;
                    float* const to = summed + t * depth + tap * c.in;
                    const bool edge = left < 0 || left + (run * TILE + 2) > columns || !lines[0] || !lines[SPAN - 1];
                    const auto call = c.scale ? (edge ? sum_up<true, true> : sum_up<false, true>)
                                              : (edge ? sum_up<true, false> : sum_up<false, false>);
                    call(c, lines, left, run, c.scale + clip, c.shift + clip, to, depth, apart(c.block, depth));
                }
            }
            for (int64_t panel = 0; panel < panels; panel++) {
                for (int k = 0; k < SUMS; k++) {
                    const float* a = summed + k * apart(c.block, depth);
                    const float* b = c.weights + k * far + panel * depth * PANEL;
                    float* m = products + k * apart(c.block, PANEL);
                    // rows beyond the last tile hold anything; a block is a multiple of ROWS, so they have a place
                    for (int64_t t = 0; t < count; t += ROWS) product(a + t * depth, b, depth, m + t * PANEL);
                }
                for (int64_t t = 0; t < count; t++) {
                    const int64_t tile = first + t, frame = tile / (high * wide);
                    const int64_t top = tile / wide % high * TILE, left = tile % wide * TILE;
                    for (int v = 0; v < PANEL; v += LANES) {
                        V m[SUMS], down[SPAN * TILE], r[TILE];
                        for (int k = 0; k < SUMS; k++) m[k] = load(products + k * apart(c.block, PANEL) + t * PANEL + v);
                        for (int j = 0; j < SPAN; j++) results(m + j, SPAN, down + j * TILE);
                        const V bias = load(c.bias + panel * PANEL + v);
                        for (int i = 0; i < TILE && top + i < rows; i++) {
                            results(down + i, TILE, r);
                            int64_t at = ((frame * rows + top + i) * columns + left) * c.out + panel * PANEL + v;
                            for (int j = 0; j < TILE && left + j < columns; j++, at += c.out)
                                store(c.y + at, c.add ? r[j] + bias + load(c.add + at) : r[j] + bias);
                        }
                    }
                }
            }
        }
    }
}

struct Norm {
    const float *x, *weight, *bias;
    float *scale, *shift;
    int64_t clips, pixels, channels, groups, threads;
    double eps;
};

void moments(const Norm* given) {
    const Norm c = *given;
    constexpr int64_t PART = 4096, TOGETHER = 128;  // pixels: of a piece of work, and summed in float32
    const int64_t parts = (c.pixels + PART - 1) / PART, each = c.channels / c.groups;
    std::vector<double> sums(c.clips * parts * c.channels * 2);

#pragma omp parallel for num_threads(c.threads) schedule(static)
    for (int64_t job = 0; job < c.clips * parts; job++) {
        const float* clip = c.x + job / parts * c.pixels * c.channels;
        const int64_t first = job % parts * PART, last = std::min(first + PART, c.pixels);
        double* to = sums.data() + job * c.channels * 2;
        for (int64_t from = first; from < last; from += TOGETHER)
            for (int64_t ch = 0; ch < c.channels; ch += LANES) {
                const V pivot = load(clip + ch);  // of the order of the mean: the squares stay small
                V sum = {}, squares = {};
                for (int64_t p = from; p < std::min(from + TOGETHER, last); p++) {
                    const V d = load(clip + p * c.channels + ch) - pivot;
                    sum += d;
                    squares += d * d;
                }
                for (int lane = 0; lane < LANES; lane++) {
                    to[2 * (ch + lane)] += sum[lane];
                    to[2 * (ch + lane) + 1] += squares[lane];
                }
            }
    }

    for (int64_t clip = 0; clip < c.clips; clip++)
        for (int64_t group = 0; group < c.groups; group++) {
            double mean = 0, power = 0;  // of the group, and the mean square
            for (int64_t ch = group * each; ch < (group + 1) * each; ch++) {
                double sum = 0, squares = 0;
                for (int64_t part = 0; part < parts; part++) {
                    sum += sums[((clip * parts + part) * c.channels + ch) * 2];
                    squares += sums[((clip * parts + part) * c.channels + ch) * 2 + 1];
                }
                const double pivot = c.x[clip * c.pixels * c.channels + ch], off = sum / c.pixels;
                mean += (pivot + off) / each;
                power += (squares / c.pixels + pivot * (pivot + 2 * off)) / each;
            }
            const double steep = 1 / std::sqrt(std::max(power - mean * mean, 0.0) + c.eps);
            for (int64_t ch = group * each; ch < (group + 1) * each; ch++) {
                c.scale[clip * c.channels + ch] = static_cast<float>(c.weight[ch] * steep);
                c.shift[clip * c.channels + ch] = static_cast<float>(c.bias[ch] - mean * c.weight[ch] * steep);
            }
        }
}

struct Line {
    const float *x, *scale, *shift;
    float* y;
    int64_t clips, pixels, channels, activate, threads;
};

void line(const Line* given) {
    const Line c = *given;
    constexpr int64_t PART = 1024;
    const int64_t parts = (c.pixels + PART - 1) / PART;
#pragma omp parallel for num_threads(c.threads) schedule(static)
    for (int64_t job = 0; job < c.clips * parts; job++) {
        const int64_t clip = job / parts, first = clip * c.pixels + job % parts * PART;
        const int64_t last = std::min(first + PART, (clip + 1) * c.pixels);
        for (int64_t p = first; p < last; p++)
            for (int64_t ch = 0; ch < c.channels; ch += PANEL) {
                V v[2] = {};
                for (int k = 0; k < VECTORS; k++) {
                    const int64_t at = clip * c.channels + ch + k * LANES;
                    v[k] = load(c.x + p * c.channels + ch + k * LANES) * load(c.scale + at) + load(c.shift + at);
                }
                if (c.activate) silu(v[0], v[1]);
                for (int k = 0; k < VECTORS; k++) store(c.y + p * c.channels + ch + k * LANES, v[k]);
            }
    }
}

}  // extern "C"
