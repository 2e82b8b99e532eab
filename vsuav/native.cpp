// Convolutions of pixels for CPUs in this project's own machine code; vsuav/native.py calls it and says what each
// function computes. Compiled once for every kind of CPU: LANES floats are computed together.
//
// A value's bits depend on the operands alone: work is cut into pieces by the shapes, never by the number of threads.

#include <algorithm>

#include <omp.h>

#include "native_winograd.h"

extern "C" int64_t affine_sizes();
extern "C" int64_t norm_sizes();
extern "C" int64_t attention_sizes();

namespace {

constexpr int64_t RUN = 8;   // tiles side by side: what they read fits into the nearest cache
constexpr int64_t ALONG = 32;  // input channels whose weights are read together
constexpr int64_t DEEP = 3;  // frames of a convolution over three whose results are computed together

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
    const int64_t row = spread<F>(in), far = apart<F>(depth, panels * PANEL);  // from sum to sum, as the next two
    const int64_t step = apart<F>(block, row), place = apart<float>(block, PANEL);
    F* const factors = reinterpret_cast<F*>(weights);  // "sums panels depth PANEL"

    explicit Layer(const Convolution& c) : Convolution(c) {}

    // Numbers the weights' sums need, and each thread for itself.
    int64_t weights_room() const { return floats<F>(SUMS * far); }
    int64_t room() const { return floats<F>(SUMS * seen * step) + SUMS * deep * place; }

    // `factors`, of one panel and tap
    void weigh(int64_t panel, int64_t tap) const {
        constexpr int64_t EACH = sizeof(float) / sizeof(F);  // rows multiplied at once
        T some[9][ALONG][PANEL] = {};                        // of the weights: so each line of the cache is read once
        const int64_t present = std::min<int64_t>(out - panel * PANEL, PANEL);
        for (int64_t first = 0; first < in; first += ALONG) {
            const int64_t count = std::min(ALONG, in - first);
            for (int64_t o = 0; o < present; o++)
                for (int k = 0; k < 9; k++) {
                    const T* w = kernel + (panel * PANEL + o) * by_out + first * by_in + tap * by_tap;
                    w += k / 3 * by_row + k % 3 * by_column;
                    for (int64_t i = 0; i < count; i++) some[k][i][o] = w[i * by_in];
                }
            for (int64_t i = 0; i < count; i += EACH)
                for (int v = 0; v < VECTORS; v++) {
                    V u[EACH * SUMS];
                    for (int64_t row = 0; row < EACH; row++) sums_of(&some[0][i + row][v * LANES], u + row * SUMS);
                    F* const to = factors + (panel * depth + tap * in + first + i) * PANEL + v * LANES * EACH;
                    for (int k = 0; k < SUMS; k++) store_rows(to + k * far, u + k, SUMS);
                }
        }
    }

    // The sums of some output channels' weights for an input channel.
    static void sums_of(const T* some, V* u) {
        V g[9], half[3 * SPAN], line[SPAN];
        for (int k = 0; k < 9; k++) g[k] = load(some + k * ALONG * PANEL);
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
        F* const summed = reinterpret_cast<F*>(own);                  // "seen sums tiles in"
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
            (this->*sum)(lines, left, run, scale ? scale + norm : nullptr, scale ? shift + norm : nullptr,
                         to + t * row);
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

// What `call` gives for the way that a convolution is computed.
template <typename Call>
auto by(const Convolution& c, const Call& call) {
    if (c.tile == 2) return call(Layer<2, Brief, Factor<Brief>>(c));
    if (c.tile == 4) return c.brief ? call(Layer<4, Brief, float>(c)) : call(Layer<4, float, float>(c));
    return c.brief ? call(Layer<6, Brief, float>(c)) : call(Layer<6, float, float>(c));
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

// By which the caller knows that it has the same structures.
int64_t sizes() {
    return sizeof(Convolution) | affine_sizes() << 10 | norm_sizes() << 20 | attention_sizes() << 40;
}

}  // extern "C"
