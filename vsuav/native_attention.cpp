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

struct Attention {
    const float *q, *k, *v;
    float *rooms, *y;
    int64_t clips, queries, keys, heads, size;  // size: channels of a head
    int64_t threads;
};

// A piece of work is some queries of a head. Their scores with some keys at a time become powers of two that are at
// most 1, by the largest score so far; where a larger one comes, what was summed up before shrinks.
struct Attend : Attention {
    const int64_t channels = heads * size, panels = (keys + PANEL - 1) / PANEL, padded = panels * PANEL;
    const int64_t stages = (panels + KEYS - 1) / KEYS, widest = (panels + stages - 1) / stages * PANEL;
    const int64_t groups = (queries + ROWS - 1) / ROWS, blocks = (queries + QUERIES - 1) / QUERIES;
    const int64_t jobs = clips * heads * blocks;
    float* const turned = rooms;                                   // k: "clips heads panels size PANEL"
    float* const values = turned + clips * heads * padded * size;  // v: "clips heads size/PANEL padded PANEL"
    float* const owns = values + clips * heads * padded * size;

    explicit Attend(const Attention& a) : Attention(a) {}

    int64_t own() const { return QUERIES * (2 * size + widest); }
    int64_t room() const { return 2 * clips * heads * padded * size + threads * own(); }

    // Keys and values of a head as `product` wants them, zero behind the last.
    void arrange(int64_t head) const {
        const int64_t from = head / heads * keys * channels + head % heads * size;
        float *const to_k = turned + head * padded * size, *const to_v = values + head * padded * size;
        for (int64_t key = 0; key < padded; key += PANEL)
            for (int64_t i = 0; i < size; i++)
                for (int64_t o = key; o < key + PANEL; o++)
                    to_k[key * size + i * PANEL + o - key] = o < keys ? k[from + o * channels + i] : 0;
        for (int64_t ch = 0; ch < size; ch += PANEL)
            for (int64_t key = 0; key < padded; key++)
                for (int v = 0; v < PANEL; v += LANES)
                    store(to_v + ch * padded + key * PANEL + v,
                          key < keys ? load(this->v + from + key * channels + ch + v) : V{});
    }

    void work(int64_t job, float* own) const {
        const int64_t head = job / blocks, part = job % blocks;
        const int64_t first = part * groups / blocks * ROWS;
        const int64_t count = std::min((part + 1) * groups / blocks * ROWS, queries) - first;
        const int64_t at = (head / heads * queries + first) * channels + head % heads * size;
        float* const scaled = own;                    // "QUERIES size", of which those beyond `count` hold anything
        float* const sums = own + QUERIES * size;     // "QUERIES size"
        float* const scores = sums + QUERIES * size;  // "QUERIES keys"
        float most[QUERIES], total[QUERIES], shrink[QUERIES];

        const float scale = LOG2_E / std::sqrt(static_cast<float>(size));
        for (int64_t r = 0; r < count; r++)
            for (int64_t i = 0; i < size; i++) scaled[r * size + i] = q[at + r * channels + i] * scale;
        std::fill_n(sums, QUERIES * size, 0.0f);
        std::fill_n(most, QUERIES, -INFINITY);
        std::fill_n(total, QUERIES, 0.0f);

        for (int64_t stage = 0; stage < stages; stage++) {
            const int64_t from = stage * panels / stages, wide = ((stage + 1) * panels / stages - from) * PANEL;
            score(head, from, wide, count, scaled, scores, most, shrink);
            for (int64_t r = 0; r < count; r++)
                total[r] = total[r] * shrink[r] + powers(scores + r * wide, wide, most[r]);
            for (int64_t ch = 0; ch < size; ch += PANEL) {
                const float* b = values + head * padded * size + ch * padded + from * PANEL * PANEL;
                for (int64_t p = 0; p < count; p += ROWS)
                    product(scores + p * wide, 0, b, 1, wide, [&](int r, int v, V sum) {
                        float* const to = sums + (p + r) * size + ch + v * LANES;
                        store(to, load(to) * shrink[p + r] + sum);
                    });
            }
        }
        for (int64_t r = 0; r < count; r++) {
            const float share = 1 / total[r];
            for (int64_t i = 0; i < size; i++) y[at + r * channels + i] = sums[r * size + i] * share;
        }
    }

    // Scores of all queries with the keys of the panels from `from` on, the largest score of every query so far, and by
    // what the sums before it shrink.
    void score(int64_t head, int64_t from, int64_t wide, int64_t count, const float* scaled, float* scores, float* most,
               float* shrink) const {
        V best[QUERIES];
        std::fill_n(best, QUERIES, V{} - INFINITY);
        for (int64_t key = 0; key < wide; key += PANEL) {
            const int64_t there = keys - (from * PANEL + key);  // keys from this panel on
            const float* b = turned + head * padded * size + (from * PANEL + key) * size;
            for (int64_t p = 0; p < count; p += ROWS)
                product(scaled + p * size, 0, b, 1, size, [&](int r, int v, V sum) {
                    if (there < PANEL)
                        for (int lane = 0; lane < LANES; lane++)
                            if (v * LANES + lane >= there) sum[lane] = -INFINITY;
                    best[p + r] = larger(best[p + r], sum);
                    store(scores + (p + r) * wide + key + v * LANES, sum);
                });
        }
        for (int64_t r = 0; r < count; r++) {
            float high = most[r];
            for (int lane = 0; lane < LANES; lane++) high = std::max(high, best[r][lane]);
            shrink[r] = two_to(larger(V{} - 125.0f, V{} + (most[r] - high)))[0];
            most[r] = high;
        }
    }

    // 2^(score - most) in place of some scores, and their sum; what is no number stays so.
    static float powers(float* scores, int64_t wide, float most) {
        V sum = {};
        for (int64_t i = 0; i < wide; i += LANES) {
            const V power = two_to(larger(V{} - 125.0f, load(scores + i) - most));
            store(scores + i, power);
            sum += power;
        }
        float total = 0;
        for (int lane = 0; lane < LANES; lane++) total += sum[lane];
        return total;
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

}  // namespace

extern "C" {

// Numbers `attend` needs, for all its threads together.
int64_t attend_room(const Attention* a) { return Attend(*a).room(); }

void attend(const Attention* a) { Attend(*a).compute(); }

// By which the caller knows that it has the same structures.
int64_t attention_sizes() { return sizeof(Attention); }

}  // extern "C"
