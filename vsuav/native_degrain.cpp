// A neighbour of a frame, brought to its place along a flow, and what it is to change there, in this project's own
// machine code; see native.cpp and degrain.py.

#include <algorithm>
#include <cmath>
#include <vector>

#include "native.h"

namespace {

constexpr int COLOURS = 3, REACH = 2;  // REACH: pixels on each side of the one whose likeness is judged

typedef float Pixel __attribute__((vector_size(16)));  // three colours and nothing

// The weights of the four pixels around a place `t` behind the second of them: cubic convolution with a = -0.75.
struct Cubic {
    float w[4];

    explicit Cubic(float t) {
        constexpr float a = -0.75f;
        const auto near = [](float d) { return ((a + 2) * d - (a + 3)) * d * d + 1; };
        const auto far = [](float d) { return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a; };
        w[0] = far(t + 1), w[1] = near(t), w[2] = near(1 - t), w[3] = far(2 - t);
    }
};

// The mean of every value and those up to REACH rows and columns away, inside; first along the rows, into `across`.
void averaged(float* x, int64_t height, int64_t width, float* across) {
    for (int64_t y = 0; y < height; y++)
        for (int64_t i = 0; i < width; i++) {
            const int64_t first = std::max<int64_t>(0, i - REACH), last = std::min(width - 1, i + REACH);
            float sum = 0;
            for (int64_t j = first; j <= last; j++) sum += x[y * width + j];
            across[y * width + i] = sum / static_cast<float>(last - first + 1);
        }
    for (int64_t y = 0; y < height; y++) {
        const int64_t first = std::max<int64_t>(0, y - REACH), last = std::min(height - 1, y + REACH);
        for (int64_t i = 0; i < width; i++) {
            float sum = 0;
            for (int64_t j = first; j <= last; j++) sum += across[j * width + i];
            x[y * width + i] = sum / static_cast<float>(last - first + 1);
        }
    }
}

}  // namespace

extern "C" {

// Of planes "3 h w": `change` gets what `neighbour` differs by, times its share, and `shares` "h w" the share. `place` is
// from `origins`; the share is exp(steep * the mean squared difference around), and 0 where place < 0.
void beside(const float* frame, const float* neighbour, const float* flow, const int32_t* place, int64_t height,
            int64_t width, float steep, float* change, float* shares) {
    const int64_t pixels = height * width;
    std::vector<Pixel> other(pixels), difference(pixels);
    std::vector<float> error(pixels), across(pixels);
    for (int64_t at = 0; at < pixels; at++)
        other[at] = Pixel{neighbour[at], neighbour[at + pixels], neighbour[at + 2 * pixels], 0};
    for (int64_t y = 0, at = 0; y < height; y++)
        for (int64_t x = 0; x < width; x++, at++) {
            Pixel found = {};
            if (place[at] >= 0) {
                const float to_x = static_cast<float>(x) + flow[at], to_y = static_cast<float>(y) + flow[at + pixels];
                const float left = std::floor(to_x), top = std::floor(to_y);
                const Cubic columns(to_x - left), rows(to_y - top);
                const int64_t column = static_cast<int64_t>(left) - 1, row = static_cast<int64_t>(top) - 1;
                for (int i = 0; i < 4; i++) {
                    const Pixel* line = other.data() + std::clamp<int64_t>(row + i, 0, height - 1) * width;
                    Pixel sum = {};
                    for (int j = 0; j < 4; j++)
                        sum += columns.w[j] * line[std::clamp<int64_t>(column + j, 0, width - 1)];
                    found += rows.w[i] * sum;
                }
                found -= Pixel{frame[at], frame[at + pixels], frame[at + 2 * pixels], 0};
            }
            const Pixel squares = found * found;
            difference[at] = found;
            error[at] = (squares[0] + squares[1] + squares[2]) / COLOURS;
        }
    averaged(error.data(), height, width, across.data());
    for (int64_t at = 0; at < pixels; at++) {
        const float share = place[at] < 0 ? 0 : std::exp(steep * error[at]);
        shares[at] = share;
        for (int c = 0; c < COLOURS; c++) change[at + c * pixels] = share * difference[at][c];
    }
}

}  // extern "C"
