// The softmax of attention, one tile of keys after another, for many rows at once: the largest score so far, the sum of
// weights and the sum of weighted values of a row are corrected whenever a larger score appears.

constexpr float LOWEST = -3.0e38f; // finite, so that the difference of two is never NaN

// All here is spelt in vectors of a register's own size: GCC compares longer ones number by number.
typedef int32_t register_bits __attribute__((vector_size(sizeof(register_lanes))));
constexpr int WIDE = sizeof(register_lanes) / sizeof(float);

INLINE register_lanes load_register(const float *values)
{
    register_lanes result;
    memcpy(&result, values, sizeof result);
    return result;
}

INLINE void store_register(float *target, register_lanes values) { memcpy(target, &values, sizeof values); }

// 2^x for x <= 0, relative error below 1e-7, from x = -126 on downwards 2^-126: x = n + r with |r| <= 1/2; 2^r by Cephes'
// polynomial, 2^n by adding n to the exponent. NaN stays NaN.
INLINE register_lanes exp2_register(register_lanes x)
{
    x = x < -126.0f ? register_lanes{} - 126.0f : x;
    const register_lanes shifted = x + 12582912.0f; // 1.5 * 2^23: rounds to a whole number, which is left in the lowest bits
    const register_lanes r = x - (shifted - 12582912.0f);
    register_lanes p = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
    p = p * r + 9.618437357674640e-3f;
    p = p * r + 5.550332471162809e-2f;
    p = p * r + 2.402264791363012e-1f;
    p = p * r + 6.931472028550421e-1f;
    p = p * r + 1.0f;
    return (register_lanes)((register_bits)p + ((register_bits)shifted << 23));
}

// Both ends have their own formula: near 0 the difference of two numbers near 1 would lose the digits.
INLINE register_lanes tanh_register(register_lanes x)
{
    const register_lanes size = x < 0.0f ? -x : x, square = x * x;
    const register_lanes e = exp2_register(size * -2.88539008f); // e^-2|x|
    const register_lanes large = (1.0f - e) / (1.0f + e);
    register_lanes small = square * (62.0f / 2835) - 17.0f / 315;
    small = small * square + 2.0f / 15;
    small = small * square - 1.0f / 3;
    small = x + x * square * small;
    return size < 0.25f ? small : x < 0.0f ? -large : large;
}

INLINE float largest_of(register_lanes values)
{
    quarter_lanes quarters[WIDE / 4];
    memcpy(quarters, &values, sizeof quarters);
    for (int i = 1; i < WIDE / 4; i++)
        quarters[0] = quarters[0] > quarters[i] ? quarters[0] : quarters[i];
    const float a = quarters[0][0] > quarters[0][1] ? quarters[0][0] : quarters[0][1];
    const float b = quarters[0][2] > quarters[0][3] ? quarters[0][2] : quarters[0][3];
    return a > b ? a : b;
}

INLINE float sum_of(register_lanes values)
{
    quarter_lanes quarters[WIDE / 4];
    memcpy(quarters, &values, sizeof quarters);
    for (int i = 1; i < WIDE / 4; i++)
        quarters[0] += quarters[i];
    return (quarters[0][0] + quarters[0][2]) + (quarters[0][1] + quarters[0][3]);
}

// All ones where begin <= index < end.
INLINE register_bits between(int begin, int end)
{
    register_bits index;
    for (int i = 0; i < WIDE; i++)
        index[i] = i;
    return (index >= begin) & (index < end);
}

// The state of a tile of rows between two tiles of keys.
struct Rows {
    float *scores;   // [rows, TILE_TOKENS]; the weights take their place
    float *largest;  // [rows] of the scores so far, which are in units of log2
    float *previous; // [rows] `largest` before this tile
    float *keep;     // [rows] what the sums so far are multiplied by
    register_lanes *totals; // [rows] sums of weights, spread over a register
};

// How a score s becomes an exponent of 2: factor * s, or with a softcap factor * tanh(slope * s).
struct Scaling {
    float factor, slope;
    bool capped;

    Scaling(float scale, float softcap)
    {
        constexpr float log2e = 1.44269504f;
        capped = softcap != 0.0f;
        factor = (capped ? softcap : scale) * log2e;
        slope = capped ? scale / softcap : 0.0f;
    }
};

// previous = largest; largest = the larger of it and of the scores at [begin, end), which are first multiplied by the scales
// of their keys, if there are any.
INLINE void raise_largest(const Rows &rows, int row, int begin, int end, const Scaling &scaling, const float *key_scales)
{
    float *scores = rows.scores + row * TILE_TOKENS;
    register_lanes largest = register_lanes{} + rows.largest[row];
    for (int i = begin / WIDE * WIDE; i < end; i += WIDE) {
        register_lanes x = load_register(scores + i);
        if (key_scales)
            x *= load_register(key_scales + i);
        if (scaling.capped)
            x = tanh_register(x * scaling.slope);
        if (key_scales || scaling.capped)
            store_register(scores + i, x);
        x *= scaling.factor;
        if (begin > i || end < i + WIDE)
            x = between(begin - i, end - i) ? x : register_lanes{} + LOWEST;
        largest = x > largest ? x : largest;
    }
    rows.previous[row] = rows.largest[row];
    rows.largest[row] = largest_of(largest);
}

// The scores become weights: of what a row sees, [begin, end), relative to its largest score, and 0 elsewhere. Those that
// are kept have the scales of their values in them, if there are any.
template <typename packed>
INLINE void weigh(const Rows &rows, int row, int begin, int end, int tokens, const Scaling &scaling,
                  const float *value_scales)
{
    float *scores = rows.scores + row * TILE_TOKENS;
    packed *weights = (packed *)scores;
    const float largest = rows.largest[row];
    register_lanes total = rows.totals[row] * rows.keep[row];
    for (int i = 0; i < tokens; i += WIDE) {
        register_lanes x = {};
        if (i < end && i + WIDE > begin) {
            x = exp2_register(load_register(scores + i) * scaling.factor - largest);
            if (begin > i || end < i + WIDE)
                x = between(begin - i, end - i) ? x : register_lanes{};
            total += x;
            if (value_scales)
                x *= load_register(value_scales + i);
        }
        if constexpr (sizeof(packed) == 2)
            store_lanes(weights + i, x);
        else
            store_register(weights + i, x);
    }
    rows.totals[row] = total;
}
