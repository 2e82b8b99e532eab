// Convolutions and linear layers for CPUs in this project's own machine code; vsuav/native.py calls it and says what
// each function computes. Compiled once for every kind of CPU: LANES floats are computed together.
//
// A value's bits depend on the operands alone: work is cut into pieces by the shapes, never by the number of threads.

#include <algorithm>

#include <omp.h>

#include "native.h"

extern "C" int64_t norm_sizes();
extern "C" int64_t attention_sizes();

namespace {

constexpr int64_t RUN = 8;   // tiles side by side: what they read fits into the nearest cache
constexpr int64_t DEEP = 3;  // frames of a convolution over three whose results are computed together

// Numbers between the starts of two of a tile's sums, or of two of the weights': an odd multiple of 64 bytes, so that
// they do not compete for the same lines of the cache.
template <typename F>
inline int64_t apart(int64_t block, int64_t channels) {
    return block * channels + 64 / sizeof(F);
}

// Some numbers of as many rows as are multiplied at once, of the matrix that `product` wants.
inline void store_rows(float* to, const V* row, int) { store(to, *row); }
inline void store_rows(Brief* to, const V* row, int far) {
    const U both = rounded(row[0]) >> 16 | rounded(row[far]);
    std::memcpy(to, &both, sizeof both);
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

struct Convolution {
    const void* x;  // of floats, or where `brief` says so of bfloat16; as are weight, add and y
    const float *scale, *shift;
    const void* weight;
    const float* bias;
    const void* add;
    float *weights, *rooms;
    void* y;
    int64_t clips, frames, height, width, in, out, taps, enlarge, tile, block;
    int64_t by_out, by_in, by_tap, by_row, by_column;  // strides of `weight`
    int64_t activate;                                  // the result
    int64_t brief, threads;
};

// A piece of work is a block of tiles. With one tap, the tiles of all frames follow one another. With three, they are
// those of one frame, and a piece of work is the same block in up to DEEP frames of a clip, which mostly see the same
// frames.
template <int TILE, typename T, typename F>
struct Layer : Convolution {
    static constexpr int SPAN = TILE + 2, SUMS = SPAN * SPAN;

    const T* const source = static_cast<const T*>(x);
    const T* const kernel = static_cast<const T*>(weight);
    const T* const added = static_cast<const T*>(add);
    T* const result = static_cast<T*>(y);
    const int64_t rows = height * enlarge, columns = width * enlarge;  // of the result
    const int64_t high = (rows + TILE - 1) / TILE, wide = (columns + TILE - 1) / TILE;
    const int64_t reach = taps / 2, length = reach ? frames : 1, deep = std::min(DEEP, length);
    const int64_t seen = std::min(deep + 2 * reach, length), stacks = (length + deep - 1) / deep;
    const int64_t tiles = high * wide * (reach ? 1 : clips * frames), blocks = (tiles + block - 1) / block;
    const int64_t jobs = (reach ? clips : 1) * stacks * blocks;
    const int64_t depth = taps * in, panels = (out + PANEL - 1) / PANEL;  // the last panel may hold less than others
    const int64_t far = apart<F>(depth, panels * PANEL);                       // from sum to sum, as the next two
    const int64_t row = spread<F>(in), step = apart<F>(block, row), place = apart<float>(block, PANEL);
    F* const factors = reinterpret_cast<F*>(weights);  // "sums panels depth PANEL"

    explicit Layer(const Convolution& c) : Convolution(c) {}

    // Numbers the weights' sums need, and each thread for itself.
    int64_t weights_room() const { return floats<F>(SUMS * far); }
    int64_t room() const { return floats<F>(SUMS * seen * step) + SUMS * deep * place; }

    // `factors`, of one panel and tap
    void weigh(int64_t panel, int64_t tap) const {
        constexpr int EACH = sizeof(float) / sizeof(F);  // rows multiplied at once
        for (int64_t i = 0; i < in; i += EACH)
            for (int v = 0; v < VECTORS; v++) {
                V u[EACH * SUMS];
                for (int row = 0; row < EACH; row++) weigh(panel * PANEL + v * LANES, tap, i + row, u + row * SUMS);
                F* const to = factors + (panel * depth + tap * in + i) * PANEL + v * LANES * EACH;
                for (int k = 0; k < SUMS; k++) store_rows(to + k * far, u + k, SUMS);
            }
    }

    // The sums of some output channels' weights for an input channel.
    void weigh(int64_t first, int64_t tap, int64_t i, V* u) const {
        V g[9] = {}, half[3 * SPAN], line[SPAN];
        const int64_t present = std::min<int64_t>(out - first, LANES);
        const T* w = kernel + first * by_out + i * by_in + tap * by_tap;
        for (int k = 0; k < 9; k++)
            for (int64_t lane = 0; lane < present; lane++)
                g[k][lane] = number(w[lane * by_out + k / 3 * by_row + k % 3 * by_column]);
        for (int k = 0; k < 3; k++) Winograd<TILE>::weights(g + 3 * k, 1, half + SPAN * k);
        for (int k = 0; k < SPAN; k++) {
            Winograd<TILE>::weights(half + k, SPAN, line);
            for (int j = 0; j < SPAN; j++) u[j * SPAN + k] = line[j];
        }
    }

    void work(int64_t job, float* own) const {
        const int64_t stack = job / blocks, clip = stack / stacks, first = job % blocks * block;
        const int64_t count = std::min(block, tiles - first);
        const int64_t made = stack % stacks * deep, till = std::min(made + deep, length);
        const int64_t from = std::max<int64_t>(made - reach, 0), to = std::min(till + reach, length);
        F* const summed = reinterpret_cast<F*>(own);                    // "seen sums tiles in"
        float* const products = own + floats<F>(SUMS * seen * step);  // "deep sums tiles PANEL"

        for (int64_t n = from; n < to; n++)
            sum_up(clip * length + n, first, count, summed + (n - from) * SUMS * step);
        for (int64_t panel = 0; panel < panels; panel++) {
            for (int k = 0; k < SUMS; k++)
                for (int64_t n = made; n < till; n++) {
                    const int64_t lowest = std::max<int64_t>(n - reach, 0), highest = std::min(n + reach, length - 1);
                    const F* a = summed + ((lowest - from) * SUMS + k) * step;
                    const F* b = factors + k * far + (panel * depth + (lowest - n + reach) * in) * PANEL;
                    float* m = products + ((n - made) * SUMS + k) * place;
                    // rows beyond the last tile hold anything; a block is a multiple of ROWS, so they have a place
                    for (int64_t t = 0; t < count; t += ROWS)
                        product(a + t * row, row, SUMS * step, b, highest - lowest + 1, in,
                                [&](int r, int v, V sum) { store(m + (t + r) * PANEL + v * LANES, sum); });
                }
            const auto finish = out - panel * PANEL >= PANEL ? &Layer::finish<true> : &Layer::finish<false>;
            for (int64_t n = made; n < till; n++)
                (this->*finish)(clip * length + n, first, count, panel, products + (n - made) * SUMS * place);
        }
    }

    // The sums of tiles first … first + count - 1, counted from the first tile of `frame`.
    void sum_up(int64_t frame, int64_t first, int64_t count, F* to) const {
        for (int64_t t = 0, run; t < count; t += run) {  // runs of tiles side by side share columns
            const int64_t tile = first + t, across = tile % wide, there = frame + tile / (high * wide);
            const int64_t top = tile / wide % high * TILE - 1, left = across * TILE - 1;
            run = std::min({RUN, count - t, wide - across});
            const T* lines[SPAN];
            for (int i = 0; i < SPAN; i++) {
                const int64_t line = there * height + (top + i) / enlarge;
                lines[i] = 0 <= top + i && top + i < rows ? source + line * width * in : nullptr;
            }
            const bool edge = left < 0 || left + (run * TILE + 2) > columns || !lines[0] || !lines[SPAN - 1];
            const int64_t norm = there / frames * in;
            const auto sum = scale ? (edge ? &Layer::sum<true, true> : &Layer::sum<false, true>)
                                   : (edge ? &Layer::sum<true, false> : &Layer::sum<false, false>);
            (this->*sum)(lines, left, run, scale ? scale + norm : nullptr, scale ? shift + norm : nullptr, to + t * row);
        }
    }

    // The sums of a run of tiles side by side, from the lines of pixels (or null) and the column where the first
    // begins. EDGE: columns may lie outside. NORMED: scale, shift and SiLU come before.
    template <bool EDGE, bool NORMED>
    void sum(const T* const* lines, int64_t left, int64_t run, const float* scale, const float* shift, F* to) const {
        for (int64_t ch = 0; ch < in; ch += PANEL) {
            V down[VECTORS][SUMS];  // column by column
            for (int64_t r = 0; r < run; r++) {
                if (r)
                    for (int v = 0; v < VECTORS; v++)
                        for (int k = 0; k < (SPAN - TILE) * SPAN; k++) down[v][k] = down[v][k + TILE * SPAN];
                for (int j = r ? SPAN - TILE : 0; j < SPAN; j++) {
                    const int64_t column = left + r * TILE + j;
                    const bool inside = !EDGE || (0 <= column && column < columns);
                    const int64_t at = (enlarge == 1 ? column : column / enlarge) * in + ch;
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
                        Winograd<TILE>::sums(d, 1, down[v] + j * SPAN);
                    }
                }
                for (int i = 0; i < SPAN; i++)
                    for (int v = 0; v < VECTORS; v++) {
                        V s[SPAN];
                        Winograd<TILE>::sums(down[v] + i, SPAN, s);
                        for (int j = 0; j < SPAN; j++)
                            store(to + (i * SPAN + j) * step + r * row + ch + v * LANES, s[j]);
                    }
            }
        }
    }

    // The pixels of tiles first … first + count - 1, counted from the first tile of `frame`, from a panel's products.
    // WHOLE: there are as many outputs.
    template <bool WHOLE>
    void finish(int64_t frame, int64_t first, int64_t count, int64_t panel, const float* products) const {
        for (int64_t t = 0; t < count; t++) {
            const int64_t tile = first + t, there = frame + tile / (high * wide);
            const int64_t top = tile / wide % high * TILE, left = tile % wide * TILE;
            for (int v = 0; v < PANEL; v += LANES) {
                const int64_t channel = panel * PANEL + v, present = WHOLE ? LANES : out - channel;
                if (present <= 0) break;
                V m[SUMS], down[SPAN * TILE], r[TILE];
                for (int k = 0; k < SUMS; k++) m[k] = load(products + k * place + t * PANEL + v);
                for (int j = 0; j < SPAN; j++) Winograd<TILE>::results(m + j, SPAN, down + j * TILE);
                const V offset = load_part(bias + channel, present);
                for (int i = 0; i < TILE && top + i < rows; i++) {
                    Winograd<TILE>::results(down + i, TILE, r);
                    const int64_t at = ((there * rows + top + i) * columns + left) * out + channel;
                    const int64_t inside = std::min<int64_t>(TILE, columns - left);
                    for (int j = 0; j < TILE; j++) r[j] += offset;
                    for (int j = 0; added && j < inside; j++) r[j] += load_part(added + at + j * out, present);
                    for (int j = 0; activate && j < TILE; j += 2) silu(r[j], r[j + 1]);
                    for (int j = 0; j < inside; j++) store_part(result + at + j * out, r[j], present);
                }
            }
        }
    }

    void compute() const {
#pragma omp parallel num_threads(threads)
        {
            float* const own = rooms + omp_get_thread_num() * room();
#pragma omp for schedule(static)
            for (int64_t job = 0; job < panels * taps; job++) weigh(job / taps, job % taps);
#pragma omp for schedule(static)
            for (int64_t job = 0; job < jobs; job++) work(job, own);
        }
    }
};

struct Affine {
    const void* x;  // as in Convolution
    const float *scale, *shift;
    const void* weight;
    const float* bias;
    const void* add;
    float* rooms;
    void* y;
    int64_t clips, frames, pixels, in, out, taps, gated, block;
    int64_t by_out, by_in, by_tap;  // strides of `weight`
    int64_t brief, threads;

    // Does a piece of work have its pixels copied, and how many floats does that need?
    template <typename F>
    bool copies() const {
        return scale || (brief && sizeof(F) == sizeof(float)) || spread<F>(in) != in;
    }
    template <typename F>
    int64_t copied() const {
        return copies<F>() ? floats<F>(frames * block * spread<F>(in)) : 0;
    }
};

// Some pixels of all frames of a clip as factors; where there is a scale, what they are after it, SiLU and all. What does
// not lie in memory as `product` wants it does so in `room`.
template <typename T, typename F>
struct Piece {
    int64_t clip, first, count, row, far;  // numbers from pixel to pixel and from frame to frame of x
    const F* x;

    Piece(const Affine& c, int64_t job, int64_t blocks, F* room) {
        const int64_t part = job % blocks;
        clip = job / blocks;
        first = part * c.pixels / blocks;
        count = (part + 1) * c.pixels / blocks - first;
        const T* const source = static_cast<const T*>(c.x) + (clip * c.frames * c.pixels + first) * c.in;
        if constexpr (std::is_same_v<T, F>)
            if (!c.copies<F>()) {
                x = source;
                row = c.in;
                far = c.pixels * row;
                return;
            }
        x = room;
        row = spread<F>(c.in);
        far = count * row;
        for (int64_t n = 0; n < c.frames; n++)
            for (int64_t p = 0; p < count; p++) {
                const T* const from = source + (n * c.pixels + p) * c.in;
                F* const to = room + n * far + p * row;
                if (c.scale)
                    lined(from, c.scale + clip * c.in, c.shift + clip * c.in, 1, c.in, true, to);
                else
                    for (int64_t i = 0; i < c.in; i += LANES) store_part(to + i, load_part(from + i, c.in - i), c.in - i);
            }
    }
};

// Any linear layer, and convolution over time.
template <typename T, typename F>
struct Direct : Affine {
    const T* const kernel = static_cast<const T*>(weight);
    const T* const added = static_cast<const T*>(add);
    T* const result = static_cast<T*>(y);
    const int64_t reach = taps / 2, depth = taps * in, panels = out / PANEL, blocks = (pixels + block - 1) / block;
    F* const weights = reinterpret_cast<F*>(rooms);  // "panels depth PANEL", those of the gate last
    float* const owns = rooms + floats<F>((gated ? 2 : 1) * depth * out);

    explicit Direct(const Affine& c) : Affine(c) {}

    int64_t own() const { return copied<F>(); }
    int64_t room() const { return floats<F>((gated ? 2 : 1) * depth * out) + threads * own(); }

    void arrange(int64_t panel) const {
        for (int64_t d = 0; d < depth; d++)
            for (int64_t o = 0; o < PANEL; o++)
                set(weights[panel * depth * PANEL + place_of<F>(d, o)],
                    kernel[(panel * PANEL + o) * by_out + d % in * by_in + d / in * by_tap]);
    }

    void work(int64_t job, float* own) const {
        const Piece<T, F> piece(*this, job, blocks, reinterpret_cast<F*>(own));
        for (int64_t panel = 0; panel < panels; panel++)
            for (int64_t n = 0; n < frames; n++) {
                const int64_t lowest = std::max<int64_t>(n - reach, 0);
                const int64_t seen = std::min(n + reach, frames - 1) - lowest + 1;
                const F* const right = weights + (panel * depth + (lowest - n + reach) * in) * PANEL;
                const float* const offset = bias ? bias + panel * PANEL : nullptr;
                for (int64_t p = 0; p < piece.count; p += ROWS) {
                    const int64_t from = std::min(p, piece.count - ROWS);  // some of the last rows are computed twice
                    const F* const left = piece.x + lowest * piece.far + from * piece.row;
                    const int64_t to = ((piece.clip * frames + n) * pixels + piece.first + from) * out + panel * PANEL;
                    V gate[ROWS][VECTORS];
                    if (gated)
                        product(left, piece.row, piece.far, right + panels * depth * PANEL, seen, in, [&](int r, int v, V sum) {
                            gate[r][v] = gelu(sum + load(offset + out + v * LANES));
                        });
                    product(left, piece.row, piece.far, right, seen, in, [&](int r, int v, V sum) {
                        const int64_t at = to + r * out + v * LANES;
                        if (offset) sum += load(offset + v * LANES);
                        if (gated) sum *= gate[r][v];
                        store(result + at, added ? sum + load(added + at) : sum);
                    });
                }
            }
    }

    void compute() const {
#pragma omp parallel num_threads(threads)
        {
            float* const room = owns + omp_get_thread_num() * own();
#pragma omp for schedule(static)
            for (int64_t panel = 0; panel < panels * (gated ? 2 : 1); panel++) arrange(panel);
#pragma omp for schedule(static)
            for (int64_t job = 0; job < clips * blocks; job++) work(job, room);
        }
    }
};

// A convolution over time by Winograd's way: TILE frames together.
template <int TAPS, typename T>
struct Tiled : Affine {
    static constexpr int TILE = 4, SPAN = TILE + TAPS - 1;
    typedef Winograd<TILE, TAPS> Way;

    const T* const kernel = static_cast<const T*>(weight);
    const T* const added = static_cast<const T*>(add);
    T* const result = static_cast<T*>(y);
    const int64_t panels = out / PANEL, blocks = (pixels + block - 1) / block, tiles = (frames + TILE - 1) / TILE;
    const int64_t rows = (block + ROWS - 1) / ROWS * ROWS;
    // from sum to sum
    const int64_t far = apart<float>(in, out), row = spread<float>(in), step = apart<float>(rows, row), place = apart<float>(rows, PANEL);
    float* const weights = rooms;  // "sums panels in PANEL"
    float* const owns = weights + SPAN * far;

    explicit Tiled(const Affine& c) : Affine(c) {}

    int64_t own() const { return copied<float>() + SPAN * (step + place); }
    int64_t room() const { return SPAN * far + threads * own(); }

    // Does it spare a quarter of the products, or more? (Those with frames that are not there are not made directly.)
    bool pays() const {
        const int64_t direct = frames * TAPS - TAPS / 2 * (TAPS / 2 + 1);
        return taps == TAPS && !gated && in % PANEL == 0 && 4 * SPAN * tiles <= 3 * direct;
    }

    void weigh(int64_t panel) const {
        for (int64_t i = 0; i < in; i++)
            for (int v = 0; v < VECTORS; v++) {
                V g[TAPS], u[SPAN];
                const T* w = kernel + (panel * PANEL + v * LANES) * by_out + i * by_in;
                for (int tap = 0; tap < TAPS; tap++)
                    for (int lane = 0; lane < LANES; lane++) g[tap][lane] = number(w[lane * by_out + tap * by_tap]);
                Way::weights(g, 1, u);
                for (int k = 0; k < SPAN; k++) store(weights + k * far + (panel * in + i) * PANEL + v * LANES, u[k]);
            }
    }

    void work(int64_t job, float* own) const {
        float* const summed = own;                  // "sums pixels in"
        float* const products = own + SPAN * step;  // "sums pixels PANEL"
        const Piece<T, float> piece(*this, job, blocks, products + SPAN * place);
        for (int64_t tile = 0; tile < tiles; tile++) {
            sum_up(piece, tile * TILE - TAPS / 2, summed);
            for (int64_t panel = 0; panel < panels; panel++) {
                for (int k = 0; k < SPAN; k++)
                    for (int64_t p = 0; p < piece.count; p += ROWS)  // rows beyond the last pixel hold anything
                        product(summed + k * step + p * row, row, 0, weights + k * far + panel * in * PANEL, 1, in,
                                [&](int r, int v, V sum) {
                                    store(products + k * place + (p + r) * PANEL + v * LANES, sum);
                                });
                finish(piece, tile * TILE, panel, products);
            }
        }
    }

    // The sums of the SPAN frames from `first` on; there is nothing before and behind the clip.
    void sum_up(const Piece<T, float>& piece, int64_t first, float* to) const {
        const float* lines[SPAN];
        for (int k = 0; k < SPAN; k++)
            lines[k] = 0 <= first + k && first + k < frames ? piece.x + (first + k) * piece.far : nullptr;
        for (int64_t p = 0; p < piece.count; p++)
            for (int64_t i = 0; i < in; i += LANES) {
                V d[SPAN], s[SPAN];
                for (int k = 0; k < SPAN; k++) d[k] = lines[k] ? load(lines[k] + p * piece.row + i) : V{};
                Way::sums(d, 1, s);
                for (int k = 0; k < SPAN; k++) store(to + k * step + p * row + i, s[k]);
            }
    }

    // The pixels of the TILE frames from `first` on, from a panel's products.
    void finish(const Piece<T, float>& piece, int64_t first, int64_t panel, const float* products) const {
        const int64_t inside = std::min<int64_t>(TILE, frames - first);
        for (int64_t p = 0; p < piece.count; p++)
            for (int v = 0; v < PANEL; v += LANES) {
                V m[SPAN], r[TILE];
                for (int k = 0; k < SPAN; k++) m[k] = load(products + k * place + p * PANEL + v);
                Way::results(m, 1, r);
                const V offset = bias ? load(bias + panel * PANEL + v) : V{};
                int64_t at = ((piece.clip * frames + first) * pixels + piece.first + p) * out + panel * PANEL + v;
                for (int64_t j = 0; j < inside; j++, at += pixels * out)
                    store(result + at, added ? r[j] + offset + load(added + at) : r[j] + offset);
            }
    }

    void compute() const {
#pragma omp parallel num_threads(threads)
        {
            float* const room = owns + omp_get_thread_num() * own();
#pragma omp for schedule(static)
            for (int64_t panel = 0; panel < panels; panel++) weigh(panel);
#pragma omp for schedule(static)
            for (int64_t job = 0; job < clips * blocks; job++) work(job, room);
        }
    }
};

// What `call` gives for the way that a convolution or a linear layer is computed.
template <typename Call>
auto by(const Convolution& c, const Call& call) {
    if (c.tile == 2) return call(Layer<2, Brief, Factor<Brief>>(c));
    if (c.tile == 4) return c.brief ? call(Layer<4, Brief, float>(c)) : call(Layer<4, float, float>(c));
    return c.brief ? call(Layer<6, Brief, float>(c)) : call(Layer<6, float, float>(c));
}

template <typename T, typename Call>
auto by(const Affine& a, const Call& call) {
    const Tiled<3, T> three(a);
    const Tiled<5, T> five(a);
    return three.pays() ? call(three) : five.pays() ? call(five) : call(Direct<T, float>(a));
}

template <typename Call>
auto by(const Affine& a, const Call& call) {
    if (PAIRS && a.brief && a.in % 2 == 0) return call(Direct<Brief, Factor<Brief>>(a));
    return a.brief ? by<Brief>(a, call) : by<float>(a, call);
}

}  // namespace

extern "C" {

// Numbers `convolve` needs for the weights' sums, and each of its threads for itself.
int64_t weights_room(const Convolution* c) {
    return by(*c, [](const auto& way) { return way.weights_room(); });
}
int64_t room(const Convolution* c) {
    return by(*c, [](const auto& way) { return way.room(); });
}

void convolve(const Convolution* c) {
    by(*c, [](const auto& way) { way.compute(); });
}

// Numbers `affine` needs, for all its threads together.
int64_t affine_room(const Affine* a) {
    return by(*a, [](const auto& way) { return way.room(); });
}

void affine(const Affine* a) {
    by(*a, [](const auto& way) { way.compute(); });
}

// By which the caller knows that it has the same structures.
int64_t sizes() {
    return sizeof(Convolution) | sizeof(Affine) << 10 | norm_sizes() << 20 | attention_sizes() << 40;
}

}  // extern "C"
