// Softmax attention for CPUs in this project's own machine code; vsuav/native.py calls it and says what each function
// computes.
//
// A value's bits depend on the operands alone: work is cut into pieces by the shapes, never by the number of threads.

#include <algorithm>
#include <cmath>

#include <omp.h>

#include "native.h"

namespace {

constexpr int64_t QUERIES = 48, KEYS = 15;  // queries of a piece of work; panels of keys whose scores lie in the cache
constexpr float LOG2_E = 1.44269504088896341f;

inline float highest(V x) {
    float high = x[0];
    for (int lane = 1; lane < LANES; lane++) high = std::max(high, x[lane]);
    return high;
}

// 2^(score - most) of some scores, which may lie in the same place, and their sum; what is no number stays so.
template <typename F>
inline float powers(const float* scores, int64_t wide, float most, F* to) {
    V sum = {};
    for (int64_t i = 0; i < wide; i += LANES) {
        const V power = two_to(larger(V{} - 125.0f, load(scores + i) - most));
        store(to + i, power);
        sum += power;
    }
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += sum[lane];
    return total;
}

struct Attention {
    const void *q, *k, *v;  // of floats, or where `brief` says so of bfloat16; as is y
    float* rooms;
    void* y;
    int64_t clips, queries, keys, heads, size;  // size: channels of a head
    int64_t brief, threads;
};

// A piece of work is some queries of a head. Their scores with some keys at a time become powers of two that are at
// most 1, by the largest score so far; where a larger one comes, what was summed up before shrinks.
template <typename T>
struct Attend : Attention {
    typedef Factor<T> F;

    const int64_t channels = heads * size, panels = (keys + PANEL - 1) / PANEL, padded = panels * PANEL;
    const int64_t stages = (panels + KEYS - 1) / KEYS, widest = (panels + stages - 1) / stages * PANEL;
    const int64_t groups = (queries + ROWS - 1) / ROWS, blocks = (queries + QUERIES - 1) / QUERIES;
    const int64_t jobs = clips * heads * blocks;
    const int64_t all = clips * heads * padded * size;
    F* const turned = reinterpret_cast<F*>(rooms);  // k: "clips heads panels size PANEL"
    F* const values = turned + all;                 // v: "clips heads size/PANEL padded PANEL"
    float* const owns = rooms + floats<F>(2 * all);

    explicit Attend(const Attention& a) : Attention(a) {}

    int64_t own() const { return QUERIES * (size + widest) + floats<F>(QUERIES * (size + widest)); }
    int64_t room() const { return floats<F>(2 * all) + threads * own(); }

    // Keys and values of a head as `product` wants them, zero behind the last.
    void arrange(int64_t head) const {
        const int64_t from = head / heads * keys * channels + head % heads * size;
        const T *const from_k = static_cast<const T*>(k) + from, *const from_v = static_cast<const T*>(v) + from;
        F *const to_k = turned + head * padded * size, *const to_v = values + head * padded * size;
        for (int64_t key = 0; key < padded; key += PANEL)
            for (int64_t i = 0; i < size; i++)
                for (int64_t o = 0; o < PANEL; o++)
                    set(to_k[key * size + place_of<F>(i, o)],
                        key + o < keys ? from_k[(key + o) * channels + i] : T{});
        for (int64_t ch = 0; ch < size; ch += PANEL)
            for (int64_t key = 0; key < padded; key++)
                for (int64_t o = 0; o < PANEL; o++)
                    set(to_v[ch * padded + place_of<F>(key, o)],
                        key < keys ? from_v[key * channels + ch + o] : T{});
    }

    void work(int64_t job, float* own) const {
        const int64_t head = job / blocks, part = job % blocks;
        const int64_t first = part * groups / blocks * ROWS;
        const int64_t count = std::min((part + 1) * groups / blocks * ROWS, queries) - first;
        const int64_t at = (head / heads * queries + first) * channels + head % heads * size;
        float* const sums = own;                                    // "QUERIES size"
        float* const scores = sums + QUERIES * size;                // "QUERIES keys"
        F* const asked = reinterpret_cast<F*>(scores + QUERIES * widest);  // "QUERIES size", beyond `count` anything
        F* const shares = asked + QUERIES * size;                   // "QUERIES keys"
        float most[QUERIES], total[QUERIES], shrink[QUERIES];

        const T* const source = static_cast<const T*>(q);
        for (int64_t r = 0; r < count; r++)
            for (int64_t i = 0; i < size; i += LANES) store(asked + r * size + i, load(source + at + r * channels + i));
        std::fill_n(sums, QUERIES * size, 0.0f);
        std::fill_n(most, QUERIES, -FLT_MAX);
        std::fill_n(total, QUERIES, 0.0f);

        for (int64_t stage = 0; stage < stages; stage++) {
            const int64_t from = stage * panels / stages, wide = ((stage + 1) * panels / stages - from) * PANEL;
            score(head, from, wide, count, asked, scores, most, shrink);
            for (int64_t r = 0; r < count; r++)
                total[r] = total[r] * shrink[r] + powers(scores + r * wide, wide, most[r], shares + r * wide);
            for (int64_t ch = 0; ch < size; ch += PANEL) {
                const F* b = values + head * padded * size + ch * padded + from * PANEL * PANEL;
                for (int64_t p = 0; p < count; p += ROWS)
                    product(shares + p * wide, wide, 0, b, 1, wide, [&](int r, int v, V sum) {
                        float* const to = sums + (p + r) * size + ch + v * LANES;
                        store(to, load(to) * shrink[p + r] + sum);
                    });
            }
        }
        for (int64_t r = 0; r < count; r++) {
            const float share = 1 / total[r];
            for (int64_t i = 0; i < size; i += LANES)
                store(static_cast<T*>(y) + at + r * channels + i, load(sums + r * size + i) * share);
        }
    }

    // Scores of all queries with the keys of the panels from `from` on, the largest score of every query so far, and by
    // what the sums before it shrink.
    void score(int64_t head, int64_t from, int64_t wide, int64_t count, const F* asked, float* scores, float* most,
               float* shrink) const {
        const float scale = LOG2_E / std::sqrt(static_cast<float>(size));
        V best[QUERIES];
        std::fill_n(best, QUERIES, V{} - INFINITY);
        for (int64_t key = 0; key < wide; key += PANEL) {
            const int64_t there = keys - (from * PANEL + key);  // keys from this panel on
            const F* b = turned + head * padded * size + (from * PANEL + key) * size;
            for (int64_t p = 0; p < count; p += ROWS)
                product(asked + p * size, size, 0, b, 1, size, [&](int r, int v, V sum) {
                    sum *= scale;
                    if (there < PANEL)
                        for (int lane = 0; lane < LANES; lane++)
                            if (v * LANES + lane >= there) sum[lane] = -INFINITY;
                    best[p + r] = larger(best[p + r], sum);
                    store(scores + (p + r) * wide + key + v * LANES, sum);
                });
        }
        for (int64_t r = 0; r < count; r++) {
            const float high = std::max(most[r], highest(best[r]));
            shrink[r] = two_to(larger(V{} - 125.0f, V{} + (most[r] - high)))[0];
            most[r] = high;
        }
    }

    void compute() const {
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t head = 0; head < clips * heads; head++) arrange(head);
            float* const room = owns + omp_get_thread_num() * own();
#pragma omp for schedule(static)
            for (int64_t job = 0; job < jobs; job++) work(job, room);
        }
    }
};

struct Timeline {
    const void *q, *k, *v;    // as in Attention
    const float* turns;  // "frames 2 size": factors of a channel, and of the other of its pair
    const float* bias;   // "heads frames PANEL", in powers of two, minus infinity behind the last frame
    float* rooms;
    void* y;
    int64_t clips, frames, pixels, heads, size;  // size: channels of a head
    int64_t brief, threads;
};

// A piece of work is all frames, up to PANEL, and all heads of some pixels.
template <typename T>
struct OverTime : Timeline {
    const T* const asking = static_cast<const T*>(q);
    const T* const asked = static_cast<const T*>(k);
    const T* const told = static_cast<const T*>(v);
    T* const result = static_cast<T*>(y);
    static constexpr int64_t PIXELS = 16, MOST = (PANEL + ROWS - 1) / ROWS * ROWS;  // MOST: rows for PANEL frames
    const int64_t channels = heads * size, blocks = (pixels + PIXELS - 1) / PIXELS;

    explicit OverTime(const Timeline& t) : Timeline(t) {}

    int64_t own() const { return size * (2 * MOST + 2 * PANEL); }

    void work(int64_t job, float* own) const {
        const int64_t clip = job / blocks, first = job % blocks * PIXELS, last = std::min(first + PIXELS, pixels);
        for (int64_t pixel = first; pixel < last; pixel++)
            for (int64_t head = 0; head < heads; head++)
                attend((clip * frames * pixels + pixel) * channels + head * size, head, own);
    }

    // One pixel's frames; `at`: where a head's channels of the first of them lie.
    void attend(int64_t at, int64_t head, float* own) const {
        float* const queries = own;                  // "MOST size", of which those beyond `frames` hold anything
        float* const keys = queries + MOST * size;   // as queries
        float* const flat = keys + MOST * size;      // keys "size PANEL", zero beyond `frames`
        float* const values = flat + PANEL * size;   // "size/PANEL PANEL PANEL", likewise
        const int64_t far = pixels * channels;       // from frame to frame
        const float scale = LOG2_E / std::sqrt(static_cast<float>(size));
        float scores[MOST * PANEL];

        for (int64_t n = 0; n < frames; n++)
            for (int64_t ch = 0; ch < size; ch += LANES) {
                store(queries + n * size + ch, turned(load(asking + at + n * far + ch), n, ch) * scale);
                store(keys + n * size + ch, turned(load(asked + at + n * far + ch), n, ch));
                store(values + ch / PANEL * PANEL * PANEL + n * PANEL + ch % PANEL, load(told + at + n * far + ch));
            }
        for (int64_t ch = 0; ch < size; ch++)
            for (int64_t n = 0; n < frames; n++) flat[ch * PANEL + n] = keys[n * size + ch];
        for (int64_t p = 0; p < frames; p += ROWS)
            product(queries + p * size, size, 0, flat, 1, size,
                    [&](int r, int v, V sum) { store(scores + (p + r) * PANEL + v * LANES, sum); });
        for (int64_t n = 0; n < frames; n++) soften(scores + n * PANEL, bias + (head * frames + n) * PANEL);
        for (int64_t ch = 0; ch < size; ch += PANEL)
            for (int64_t p = 0; p < frames; p += ROWS)
                product(scores + p * PANEL, PANEL, 0, values + ch * PANEL, 1, PANEL, [&](int r, int v, V sum) {
                    if (p + r < frames) store(result + at + (p + r) * far + ch + v * LANES, sum);
                });
    }

    // Some of a head's channels of a frame, their pairs turned by the frame's angles.
    V turned(V x, int64_t frame, int64_t ch) const {
        V other;
        for (int lane = 0; lane < LANES; lane++) other[lane] = x[lane ^ 1];
        const float* by = turns + frame * 2 * size + ch;
        return x * load(by) + other * load(by + size);
    }

    // The softmax of PANEL scores, in their place.
    static void soften(float* scores, const float* bias) {
        V best = V{} - INFINITY;
        for (int v = 0; v < PANEL; v += LANES) {
            const V score = load(scores + v) + load(bias + v);
            best = larger(best, score);
            store(scores + v, score);
        }
        const float share = 1 / powers(scores, PANEL, highest(best), scores);
        for (int v = 0; v < PANEL; v += LANES) store(scores + v, load(scores + v) * share);
    }

    void compute() const {
#pragma omp parallel num_threads(threads)
        {
            float* const room = rooms + omp_get_thread_num() * own();
            std::fill_n(room, own(), 0.0f);
#pragma omp for schedule(static)
            for (int64_t job = 0; job < clips * blocks; job++) work(job, room);
        }
    }
};

// What `call` gives for attention of numbers of this type.
template <template <typename> typename Way, typename Given, typename Call>
auto by(const Given& given, const Call& call) {
    return given.brief ? call(Way<Brief>(given)) : call(Way<float>(given));
}

}  // namespace

extern "C" {

// Numbers `attend` needs, for all its threads together.
int64_t attend_room(const Attention* a) {
    return by<Attend>(*a, [](const auto& way) { return way.room(); });
}

void attend(const Attention* a) {
    by<Attend>(*a, [](const auto& way) { way.compute(); });
}

// Numbers `attend_over_time` needs for each of its threads.
int64_t over_time_room(const Timeline* t) { return OverTime<float>(*t).own(); }

void attend_over_time(const Timeline* t) {
    by<OverTime>(*t, [](const auto& way) { way.compute(); });
}

// By which the caller knows that it has the same structures.
int64_t attention_sizes() { return sizeof(Attention) | sizeof(Timeline) << 10; }

}  // extern "C"
