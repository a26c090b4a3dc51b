// Direct products with int8: whole numbers, as the cache has them. Widening them to bfloat16 would take longer than the
// memory takes to deliver them.
//
//     score    Σ over dimensions, two at a time     query in 16 bits × key             exact in int32
//     sum      Σ over tokens, four at a time        weight in 16 bits × value          exact in int32
//
// A query is rounded to 16 bits relative to its largest dimension, weights relative to the row's largest in the tile. Either
// costs less than a bfloat16's rounding of the same.

constexpr int WHOLE_DIM = 4 * LANES; // int8 of a register
constexpr int MOST_WHOLE_DIM = 512;  // with more, the sum of a score might not fit int32

template <typename stored> constexpr bool IS_INT8 = false;
template <> constexpr bool IS_INT8<Int8> = true;

INLINE bool fits_whole(int rows, int dim) { return rows <= DIRECT_ROWS && dim % WHOLE_DIM == 0 && dim <= MOST_WHOLE_DIM; }

#if NATIVE_BFLOAT16
// A row's query in whole numbers, from the packed one. What is not finite makes all scores NaN.
INLINE void round_query(const Space<uint16_t> &space, int row, int dim)
{
    const uint16_t *query = space.query + (int64_t)row * space.query_stride;
    lanes largest = {}, broken = {};
    for (int d = 0; d < dim; d += LANES) {
        const lanes x = load_lanes(query + d), size = select(x < 0.0f, -x, x);
        largest = select(size > largest, size, largest);
        broken += x * 0.0f;
    }
    const float peak = _mm512_reduce_max_ps((__m512)largest), unit = peak / 32767.0f;
    const lanes units = broadcast(unit > 0.0f ? 1.0f / unit : 0.0f);
    for (int d = 0; d < dim; d += LANES) {
        const __m512i whole = _mm512_cvtps_epi32((__m512)(load_lanes(query + d) * units));
        _mm256_storeu_si256((__m256i *)(space.whole.query + (int64_t)row * dim + d), _mm512_cvtsepi32_epi16(whole));
    }
    space.whole.query_units[row] = unit + sum_of_lanes(broken);
}

// The scores of ROWS rows with sixteen tokens, as many sums at a time as registers hold. The lines that hold the same places
// of the next tile are fetched meanwhile.
template <int ROWS>
INLINE void score_tokens(const Space<uint16_t> &space, const TokenTile<Int8> &tokens, int begin, int first, int dim,
                         const Fetch<Int8> &ahead)
{
    constexpr int KEYS = LANES / ROWS;
    for (int token = begin; token < begin + LANES; token += KEYS) {
        signed_bits sums[LANES]; // of KEYS tokens with row 0, then with row 1 …
#pragma GCC unroll 16
        for (int i = 0; i < KEYS; i++) {
            const Int8 *key = tokens.keys[token + i];
            __m512i sum[ROWS];
            for (int row = 0; row < ROWS; row++)
                sum[row] = _mm512_setzero_si512();
            for (int d = 0; d < dim; d += WHOLE_DIM) {
                const __m512i lower = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(key + d)));
                const __m512i upper = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(key + d) + 1));
                for (int row = 0; row < ROWS; row++) {
                    const int16_t *query = space.whole.query + (int64_t)(first + row) * dim + d;
                    sum[row] = _mm512_dpwssd_epi32(sum[row], lower, _mm512_loadu_si512(query));
                    sum[row] = _mm512_dpwssd_epi32(sum[row], upper, _mm512_loadu_si512(query + 2 * LANES));
                }
                ahead.line_of_key(token + i, d);
            }
            for (int row = 0; row < ROWS; row++)
                sums[row * KEYS + i] = (signed_bits)sum[row];
        }
        const lanes scores = __builtin_convertvector(sums_of_all(sums), lanes);
        for (int row = 0; row < ROWS; row++) {
            const float unit = space.whole.query_units[first + row];
            float *target = space.rows.scores + (first + row) * TILE_TOKENS + token;
            for (int i = 0; i < KEYS; i++)
                target[i] = scores[row * KEYS + i] * unit;
        }
    }
}

// As for other types.
INLINE void score_directly(const Space<uint16_t> &space, const TokenTile<Int8> &tokens, int blocks, int first, int count, int dim,
                           Fetch<Int8> &ahead, int)
{
    for (int begin = 0; begin < blocks * LANES; begin += LANES) {
        int row = first, left = count;
        for (; left >= 4; row += 4, left -= 4)
            score_tokens<4>(space, tokens, begin, row, dim, ahead);
        if (left >= 2) {
            score_tokens<2>(space, tokens, begin, row, dim, ahead);
            row += 2, left -= 2;
        }
        if (left)
            score_tokens<1>(space, tokens, begin, row, dim, ahead);
    }
}

// `weigh`, with weights in whole numbers: their upper bytes, then their lower ones.
INLINE void weigh_in_whole(const Space<uint16_t> &space, int row, int begin, int end, int tokens, const Scaling &scaling,
                           const float *value_scales)
{
    weigh<float>(space.rows, row, begin, end, tokens, scaling, value_scales);
    float *weights = space.rows.scores + row * TILE_TOKENS;
    lanes largest = {};
    for (int i = 0; i < tokens; i += LANES)
        largest = (lanes)_mm512_max_ps((__m512)largest, (__m512)load_lanes(weights + i));
    const float unit = _mm512_reduce_max_ps((__m512)largest) / 65535.0f;
    const lanes units = broadcast(unit > 0.0f ? 1.0f / unit : 0.0f);
    uint8_t *upper = space.whole.weights + row * 2 * TILE_TOKENS, *lower = upper + TILE_TOKENS;
    for (int i = 0; i < tokens; i += LANES) {
        const __m512i whole = _mm512_cvtps_epi32((__m512)(load_lanes(weights + i) * units));
        _mm_storeu_si128((__m128i *)(upper + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8)));
        _mm_storeu_si128((__m128i *)(lower + i), _mm512_cvtepi32_epi8(whole));
    }
    space.whole.weight_units[row] = unit;
}

// The sums of ROWS rows, corrected, plus their weights × the values, for 32 of the 64 dimensions from `from` on. Values of
// four tokens are brought together within quarters of a register: lane 4 q + i of vector j is dimension 16 q + 4 j + i, and
// the upper half are vectors 2 and 3.
template <int ROWS, bool UPPER>
static void add_directly(const Space<uint16_t> &space, const TokenTile<Int8> &tokens, int first, int from,
                         const Fetch<Int8> &ahead)
{
    __m512i upper[ROWS][2], lower[ROWS][2];
    for (int row = 0; row < ROWS; row++)
        for (int j = 0; j < 2; j++)
            upper[row][j] = lower[row][j] = _mm512_setzero_si512();
    const uint8_t *weights = space.whole.weights + first * 2 * TILE_TOKENS;
    for (int token = 0; token < tokens.count; token += 4) {
        __m512i x[4];
        for (int i = 0; i < 4; i++) {
            x[i] = _mm512_loadu_si512(tokens.values[token + i] + from);
            if (!UPPER)
                ahead.line_of_value(token + i, from);
        }
        const __m512i a = UPPER ? _mm512_unpackhi_epi8(x[0], x[1]) : _mm512_unpacklo_epi8(x[0], x[1]);
        const __m512i b = UPPER ? _mm512_unpackhi_epi8(x[2], x[3]) : _mm512_unpacklo_epi8(x[2], x[3]);
        const __m512i fours[2] = {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)};
        for (int row = 0; row < ROWS; row++) {
            int32_t most, least;
            memcpy(&most, weights + row * 2 * TILE_TOKENS + token, 4);
            memcpy(&least, weights + row * 2 * TILE_TOKENS + TILE_TOKENS + token, 4);
            for (int j = 0; j < 2; j++) {
                upper[row][j] = _mm512_dpbusd_epi32(upper[row][j], _mm512_set1_epi32(most), fours[j]);
                lower[row][j] = _mm512_dpbusd_epi32(lower[row][j], _mm512_set1_epi32(least), fours[j]);
            }
        }
    }
    for (int row = 0; row < ROWS; row++)
        for (int j = 0; j < 2; j++) {
            const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(upper[row][j], 8), lower[row][j]);
            const lanes added = (lanes)_mm512_cvtepi32_ps(whole) * space.whole.weight_units[first + row];
            quarter_lanes quarters[4];
            memcpy(quarters, &added, sizeof quarters);
            float *sums = space.sums + (int64_t)(first + row) * space.width + from + (UPPER ? 8 : 0) + 4 * j;
            for (int q = 0; q < 4; q++) {
                quarter_lanes sum;
                memcpy(&sum, sums + 16 * q, sizeof sum);
                sum = sum * space.rows.keep[first + row] + quarters[q];
                memcpy(sums + 16 * q, &sum, sizeof sum);
            }
        }
}

template <int ROWS>
static void add_directly(const Space<uint16_t> &space, const TokenTile<Int8> &tokens, int, int first, int dim,
                         Fetch<Int8> &ahead, int)
{
    for (int from = 0; from < dim; from += WHOLE_DIM) {
        add_directly<ROWS, false>(space, tokens, first, from, ahead);
        add_directly<ROWS, true>(space, tokens, first, from, ahead);
    }
    ahead.tokens_from(tokens.count);
}

template <typename stored>
INLINE void add_directly(int rows, const Space<uint16_t> &space, const TokenTile<stored> &tokens, int steps, int first,
                         int dim, Fetch<stored> &ahead, int lines)
{
    switch (rows) {
    case 1: return add_directly<1>(space, tokens, steps, first, dim, ahead, lines);
    case 2: return add_directly<2>(space, tokens, steps, first, dim, ahead, lines);
    case 3: return add_directly<3>(space, tokens, steps, first, dim, ahead, lines);
    case 4: return add_directly<4>(space, tokens, steps, first, dim, ahead, lines);
    }
}
#endif
