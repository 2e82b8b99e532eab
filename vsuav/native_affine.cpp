// Linear layers and convolutions over time for CPUs in this project's own machine code; see native.cpp.
//
// A value's bits depend on the operands alone: work is cut into pieces by the shapes, never by the number of threads.

#include <algorithm>

#include <omp.h>

#include "native_winograd.h"

namespace {

struct Affine {
    const void* x;  // of floats, or where `brief` says so of bfloat16; as are weight, add and y
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

// Some pixels of all frames of a clip as factors; where there is a scale, what they are after it, SiLU and all. What
// does not lie in memory as `product` wants it does so in `room`.
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
                    for (int64_t i = 0; i < c.in; i += LANES)
                        store_part(to + i, load_part(from + i, c.in - i), c.in - i);
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
        constexpr int64_t ALONG = 32;  // weights of a row that are read together
        for (int64_t tap = 0; tap < taps; tap++)
            for (int64_t first = 0; first < in; first += ALONG)
                for (int64_t o = 0; o < PANEL; o++)
                    for (int64_t i = first; i < std::min(first + ALONG, in); i++)
                        set(weights[(panel * depth + tap * in) * PANEL + place_of<F>(i, o)],
                            kernel[(panel * PANEL + o) * by_out + i * by_in + tap * by_tap]);
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
                        product(left, piece.row, piece.far, right + panels * depth * PANEL, seen, in,
                                [&](int r, int v, V sum) { gate[r][v] = gelu(sum + load(offset + out + v * LANES)); });
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
template <int TILE, int TAPS, typename T, typename F>
struct Tiled : Affine {
    static constexpr int SPAN = TILE + TAPS - 1;
    typedef Winograd<TILE, TAPS> Way;

    const T* const kernel = static_cast<const T*>(weight);
    const T* const added = static_cast<const T*>(add);
    T* const result = static_cast<T*>(y);
    const int64_t panels = out / PANEL, blocks = (pixels + block - 1) / block, tiles = (frames + TILE - 1) / TILE;
    const int64_t rows = (block + ROWS - 1) / ROWS * ROWS;
    const int64_t row = spread<F>(in), far = apart<F>(in, out);  // from sum to sum, as the next two
    const int64_t step = apart<F>(rows, row), place = apart<float>(rows, PANEL);
    F* const weights = reinterpret_cast<F*>(rooms);  // "sums panels in PANEL"
    float* const owns = rooms + floats<F>(SPAN * far);

    explicit Tiled(const Affine& c) : Affine(c) {}

    int64_t own() const { return copied<F>() + floats<F>(SPAN * step) + SPAN * place; }
    int64_t room() const { return floats<F>(SPAN * far) + threads * own(); }

    // Does it spare a quarter of the products, or more? (Those with frames that are not there are not made directly.)
    bool pays() const {
        const int64_t direct = frames * TAPS - TAPS / 2 * (TAPS / 2 + 1);
        return taps == TAPS && !gated && in % PANEL == 0 && 4 * SPAN * tiles <= 3 * direct;
    }

    void weigh(int64_t panel) const {
        constexpr int64_t EACH = sizeof(float) / sizeof(F);  // rows multiplied at once
        for (int64_t i = 0; i < in; i += EACH)
            for (int v = 0; v < VECTORS; v++) {
                V g[TAPS] = {}, u[EACH * SPAN];
                const T* w = kernel + (panel * PANEL + v * LANES) * by_out + i * by_in;
                for (int64_t row = 0; row < EACH; row++, w += by_in) {
                    for (int tap = 0; tap < TAPS; tap++)
                        for (int lane = 0; lane < LANES; lane++) g[tap][lane] = number(w[lane * by_out + tap * by_tap]);
                    Way::weights(g, 1, u + row * SPAN);
                }
                F* const to = weights + (panel * in + i) * PANEL + v * LANES * EACH;
                for (int k = 0; k < SPAN; k++) store_rows(to + k * far, u + k, SPAN);
            }
    }

    void work(int64_t job, float* own) const {
        float* const products = own;                                      // "sums pixels PANEL"
        F* const summed = reinterpret_cast<F*>(products + SPAN * place);  // "sums pixels in"
        const Piece<T, F> piece(*this, job, blocks, reinterpret_cast<F*>(own + SPAN * place + floats<F>(SPAN * step)));
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
    void sum_up(const Piece<T, F>& piece, int64_t first, F* to) const {
        const F* lines[SPAN];
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
    void finish(const Piece<T, F>& piece, int64_t first, int64_t panel, const float* products) const {
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

// What `call` gives for the way that a layer is computed.
template <typename T, typename Call>
auto by_floats(const Affine& a, const Call& call) {
    const Tiled<4, 3, T, float> three(a);
    const Tiled<4, 5, T, float> five(a);
    return three.pays() ? call(three) : five.pays() ? call(five) : call(Direct<T, float>(a));
}

template <typename Call>
auto by(const Affine& a, const Call& call) {
    if (!a.brief) return by_floats<float>(a, call);
    if (!PAIRS || a.in % 2) return by_floats<Brief>(a, call);
    const Tiled<2, 3, Brief, Factor<Brief>> three(a);
    return three.pays() ? call(three) : call(Direct<Brief, Factor<Brief>>(a));
}

}  // namespace

extern "C" {

// Numbers `affine` needs, for all its threads together.
int64_t affine_room(const Affine* a) {
    return by(*a, [](const auto& way) { return way.room(); });
}

void affine(const Affine* a) {
    by(*a, [](const auto& way) { way.compute(); });
}

// By which the caller knows that it has the same structures.
int64_t affine_sizes() { return sizeof(Affine); }

}  // extern "C"
