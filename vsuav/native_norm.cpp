// Group normalisation with SiLU in this project's own machine code, of floats and of bfloat16; see native.cpp.

#include <algorithm>
#include <cmath>
#include <vector>

#include <omp.h>

#include "native.h"

namespace {

struct Norm {
    const void* x;  // of floats, or where `brief` says so of bfloat16
    const float *weight, *bias;
    float *scale, *shift;
    int64_t clips, pixels, channels, groups, brief, threads;
    double eps;
};

template <typename T>
void moments_of(const Norm& c) {
    const T* const x = static_cast<const T*>(c.x);
    constexpr int64_t PART = 4096, TOGETHER = 128;  // pixels: of a piece of work, and summed in float32
    const int64_t parts = (c.pixels + PART - 1) / PART, each = c.channels / c.groups;
    std::vector<double> sums(c.clips * parts * c.channels * 2);

#pragma omp parallel for num_threads(c.threads) schedule(static)
    for (int64_t job = 0; job < c.clips * parts; job++) {
        const T* clip = x + job / parts * c.pixels * c.channels;
        const int64_t first = job % parts * PART, last = std::min(first + PART, c.pixels);
        double* to = sums.data() + job * c.channels * 2;
        for (int64_t from = first; from < last; from += TOGETHER)
            for (int64_t ch = 0; ch < c.channels; ch += PANEL) {
                // less the first pixel, which is of the order of the mean: so the squares stay small
                V pivot[VECTORS], sum[VECTORS] = {}, squares[VECTORS] = {};
                for (int v = 0; v < VECTORS; v++) pivot[v] = load(clip + ch + v * LANES);
                for (int64_t p = from; p < std::min(from + TOGETHER, last); p++)
                    for (int v = 0; v < VECTORS; v++) {
                        const V d = load(clip + p * c.channels + ch + v * LANES) - pivot[v];
                        sum[v] += d;
                        squares[v] += d * d;
                    }
                for (int i = 0; i < PANEL; i++) {
                    to[2 * (ch + i)] += sum[i / LANES][i % LANES];
                    to[2 * (ch + i) + 1] += squares[i / LANES][i % LANES];
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
                const double pivot = number(x[clip * c.pixels * c.channels + ch]), off = sum / c.pixels;
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
    const void* x;  // as in Norm
    const float *scale, *shift;
    void* y;
    int64_t clips, pixels, channels, activate, brief, threads;
};

template <typename T>
void line_of(const Line& c) {
    const T* const x = static_cast<const T*>(c.x);
    T* const y = static_cast<T*>(c.y);
    constexpr int64_t PART = 1024;
    const int64_t parts = (c.pixels + PART - 1) / PART;
#pragma omp parallel for num_threads(c.threads) schedule(static)
    for (int64_t job = 0; job < c.clips * parts; job++) {
        const int64_t clip = job / parts, first = clip * c.pixels + job % parts * PART;
        const int64_t last = std::min(first + PART, (clip + 1) * c.pixels), at = clip * c.channels;
        lined(x + first * c.channels, c.scale + at, c.shift + at, last - first, c.channels, c.activate,
              y + first * c.channels);
    }
}

}  // namespace

extern "C" {

void moments(const Norm* c) { c->brief ? moments_of<Brief>(*c) : moments_of<float>(*c); }

void line(const Line* c) { c->brief ? line_of<Brief>(*c) : line_of<float>(*c); }

// By which the caller knows that it has the same structures.
int64_t norm_sizes() { return sizeof(Norm) | sizeof(Line) << 10; }

}  // extern "C"
