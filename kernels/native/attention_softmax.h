// The softmax of attention, one tile of keys after another, for many rows at once: the largest score so far, the sum of
// weights and the sum of weighted values of a row are corrected whenever a larger score appears.

constexpr float LOWEST = -3.0e38f; // finite, so that the difference of two is never NaN

// As select: the compiler's own choice is best where there are mask registers, and goes lane by lane elsewhere.
INLINE lanes choose(signed_bits mask, lanes a, lanes b)
{
#if NATIVE_AVX512
    return mask ? a : b;
#else
    return select(mask, a, b);
#endif
}

// 2^x for x <= 0, relative error below 1e-7, from x = -126 on downwards 2^-126: x = n + r with |r| <= 1/2; 2^r by Cephes'
// polynomial, 2^n by adding n to the exponent. NaN stays NaN.
INLINE lanes exp2_lanes(lanes x)
{
    x = choose(x < -126.0f, broadcast(-126.0f), x);
    const lanes shifted = x + 12582912.0f; // 1.5 * 2^23: rounds to a whole number, which is left in the lowest bits
    const lanes r = x - (shifted - 12582912.0f);
    lanes p = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
    p = p * r + 9.618437357674640e-3f;
    p = p * r + 5.550332471162809e-2f;
    p = p * r + 2.402264791363012e-1f;
    p = p * r + 6.931472028550421e-1f;
    p = p * r + 1.0f;
    return (lanes)((signed_bits)p + ((signed_bits)shifted << 23));
}

// Both ends have their own formula: near 0 the difference of two numbers near 1 would lose the digits.
INLINE lanes tanh_lanes(lanes x)
{
    const lanes size = choose(x < 0.0f, -x, x), square = x * x;
    const lanes e = exp2_lanes(size * -2.88539008f); // e^-2|x|
    const lanes large = (1.0f - e) / (1.0f + e);
    lanes small = square * (62.0f / 2835) - 17.0f / 315;
    small = small * square + 2.0f / 15;
    small = small * square - 1.0f / 3;
    small = x + x * square * small;
    return choose(size < 0.25f, small, choose(x < 0.0f, -large, large));
}

INLINE float largest_lane(lanes values)
{
    half_lanes half[2];
    memcpy(half, &values, sizeof half);
    half[0] = half[0] > half[1] ? half[0] : half[1];
    quarter_lanes quarter[2];
    memcpy(quarter, half, sizeof quarter);
    quarter[0] = quarter[0] > quarter[1] ? quarter[0] : quarter[1];
    const float a = quarter[0][0] > quarter[0][1] ? quarter[0][0] : quarter[0][1];
    const float b = quarter[0][2] > quarter[0][3] ? quarter[0][2] : quarter[0][3];
    return a > b ? a : b;
}

// All ones where begin <= lane < end.
INLINE signed_bits lanes_between(int begin, int end)
{
    const signed_bits index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (index >= begin) & (index < end);
}

// The state of a tile of rows between two tiles of keys.
struct Rows {
    float *scores;   // [rows, TILE_TOKENS]; the weights take their place
    float *largest;  // [rows] of the scores so far, which are in units of log2
    float *previous; // [rows] `largest` before this tile
    float *keep;     // [rows] what the sums so far are multiplied by
    lanes *totals;   // [rows] sums of weights, spread over the lanes
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

// previous = largest; largest = the larger of it and of the scores at [begin, end).
INLINE void raise_largest(const Rows &rows, int row, int begin, int end, const Scaling &scaling)
{
    float *scores = rows.scores + row * TILE_TOKENS;
    lanes largest = broadcast(rows.largest[row]);
    for (int i = begin / LANES * LANES; i < end; i += LANES) {
        lanes x = load_lanes(scores + i);
        if (scaling.capped) {
            x = tanh_lanes(x * scaling.slope);
            store_lanes(scores + i, x);
        }
        x *= scaling.factor;
        if (begin > i || end < i + LANES)
            x = select(lanes_between(begin - i, end - i), x, broadcast(LOWEST));
        largest = choose(x > largest, x, largest);
    }
    rows.previous[row] = rows.largest[row];
    rows.largest[row] = largest_lane(largest);
}

// As store_lanes, but what is too small for a normal number may become 0.
template <typename element> INLINE void store_rounded(element *target, lanes values)
{
#if NATIVE_BFLOAT16
    if constexpr (sizeof(element) == 2) {
        const __m256bh narrow = _mm512_cvtneps_pbh((__m512)values);
        memcpy(target, &narrow, sizeof narrow);
        return;
    }
#endif
    store_lanes(target, values);
}

// The scores become weights: of what a row sees, [begin, end), relative to its largest score, and 0 elsewhere.
template <typename packed>
INLINE void weigh(const Rows &rows, int row, int begin, int end, int tokens, const Scaling &scaling)
{
    float *scores = rows.scores + row * TILE_TOKENS;
    packed *weights = (packed *)scores;
    const float largest = rows.largest[row];
    lanes total = rows.totals[row] * rows.keep[row];
    for (int i = 0; i < tokens; i += LANES) {
        lanes x = {};
        if (i < end && i + LANES > begin) {
            x = exp2_lanes(load_lanes(scores + i) * scaling.factor - largest);
            if (begin > i || end < i + LANES)
                x = select(lanes_between(begin - i, end - i), x, lanes{});
            total += x;
        }
        store_rounded(weights + i, x);
    }
    rows.totals[row] = total;
}
