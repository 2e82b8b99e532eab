// Where pixels come from along a flow, and what they bring, in this project's own machine code; see native.cpp. The sums
// are those of flow.py and propagation.py, each rounded as there, for a bound decides which pixels are trusted.

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include <algorithm>

#include "native.h"

namespace {

constexpr int32_t UNTRUSTED = -1, OUTSIDE = -2;

inline V of(I v) { return __builtin_convertvector(v, V); }

inline I counted() {
    I lanes;
    for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane;
    return lanes;
}

inline I within(I v, int32_t bound) { return (v >= 0) & (v < bound); }

inline bool all(I mask) {
    int32_t both = -1;
    for (int lane = 0; lane < LANES; lane++) both &= mask[lane];
    return both;
}

// Numbers at some places, zero where `there` is not set.
inline V picked(const float* x, I place, I there) {
    V v = {};
    for (int lane = 0; lane < LANES; lane++) v[lane] = x[place[lane]];
    return reinterpret_cast<V>(reinterpret_cast<I>(v) & there);
}

// Where a displacement leads on one axis, the centres before it and nearest to it, and how far behind the former it is.
struct Landing {
    I before, nearest;
    V behind;

    Landing(V place, V step, int32_t bound) {
        const V to = place + step, finite = to - to == 0 ? to : V{} - 4.0f;
        const V near = smaller(larger(finite, V{} - 4.0f), V{} + (bound + 4.0f));  // as far outside as anything beyond
        const I whole = __builtin_convertvector(near, I);
        before = whole + (of(whole) > near);
        behind = near - of(before);
        nearest = before + ((before & 1) == 0 ? -(behind > 0.5f) : -(behind >= 0.5f));  // of two, the even one
    }
};

}  // namespace

extern "C" {

// Of every pixel: the place in the neighbour that is nearest to where `flow` "2 h w" leads; UNTRUSTED where `back` does
// not lead home from there, OUTSIDE where it does and there is no such place.
void origins(const float* flow, const float* back, int64_t height, int64_t width, int32_t* to) {
    const int64_t pixels = height * width;
    const int32_t rows = static_cast<int32_t>(height), columns = static_cast<int32_t>(width);
    const V lanes = of(counted());
    for (int64_t y = 0, at = 0; y < height; y++)
        for (int64_t x = 0; x < width; x += LANES) {
            const int64_t count = std::min<int64_t>(width - x, LANES);
            const V across = load_part(flow + at, count), down = load_part(flow + pixels + at, count);
            const Landing column(lanes + static_cast<float>(x), across, columns);
            const Landing row(V{} + static_cast<float>(y), down, rows);
            V home[2] = {};
            for (int dy = 0; dy < 2; dy++)
                for (int dx = 0; dx < 2; dx++) {
                    const I there = within(row.before + dy, rows) & within(column.before + dx, columns);
                    const I place = there & ((row.before + dy) * columns + column.before + dx);
                    const V weight = (dy ? row.behind : 1 - row.behind) * (dx ? column.behind : 1 - column.behind);
                    for (int c = 0; c < 2; c++) home[c] += picked(back + c * pixels, place, there) * weight;
                }
            const V off[2] = {across + home[0], down + home[1]}, error = off[0] * off[0] + off[1] * off[1];
            const V length = (across * across + down * down) + (home[0] * home[0] + home[1] * home[1]);
            const I trusted = error < 0.001f * length + 0.05f;
            const I inside = within(row.nearest, rows) & within(column.nearest, columns);
            const I nearest = inside ? row.nearest * columns + column.nearest : I{} + OUTSIDE;
            const I found = trusted ? nearest : I{} + UNTRUSTED;
            for (int64_t lane = 0; lane < count; lane++) to[at++] = found[lane];
        }
}

// Half of `current` and half of what `source` has at its origin, of clips "c h w"; `current` where there is no trust,
// half of it where nothing is brought.
void blend(const float* current, const float* source, const int32_t* origin, int64_t channels, int64_t pixels, float* to) {
    const I lanes = counted();
    for (int64_t at = 0; at < pixels; at += LANES) {
        const int64_t count = std::min<int64_t>(pixels - at, LANES);
        const I from = reinterpret_cast<I>(load_part(reinterpret_cast<const float*>(origin + at), count));
        const bool row = count == LANES && from[0] >= 0 && all(from == from[0] + lanes);  // neighbours of neighbours
        const I brought = from >= 0, place = brought & from;
        for (int64_t c = 0; c < channels; c++) {
            const V own = load_part(current + c * pixels + at, count);
            const float* other = source + c * pixels;
            const V moved = row ? load(other + from[0]) : picked(other, place, brought);
            const V sum = 0.5f * own + 0.5f * moved;
            store_part(to + c * pixels + at, from == UNTRUSTED ? own : sum, count);
        }
    }
}

}  // extern "C"
