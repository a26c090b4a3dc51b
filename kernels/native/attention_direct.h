// Products of few rows with keys and values as they lie in the cache. Packing a tile costs more than it saves if no more
// than a group of query heads uses it, as in decode. bfloat16 and the instructions for it; dimensions in thirty-twos.

constexpr int DIRECT_DIM = 2 * LANES; // bfloat16 of a register
constexpr int SOFTMAX_LINES = 10;     // to fetch in each of the two passes of the softmax over a row

template <typename element> constexpr bool MAY_BE_DIRECT = NATIVE_BFLOAT16 && sizeof(element) == 2;

#if NATIVE_BFLOAT16
// Lane i is the sum of all lanes of values[i]; the order of the additions is always the same. Of float32 or int32.
template <typename vector> INLINE vector sums_of_all(vector (&values)[LANES])
{
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) {
        const __m512 a = (__m512)values[i], b = (__m512)values[i + 1];
        values[i] = (vector)_mm512_unpacklo_ps(a, b) + (vector)_mm512_unpackhi_ps(a, b);
    }
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4) { // now lane j of each quarter belongs to value i + j
        const __m512d a = (__m512d)values[i], b = (__m512d)values[i + 2];
        values[i] = (vector)_mm512_unpacklo_pd(a, b) + (vector)_mm512_unpackhi_pd(a, b);
    }
    const auto halve = [](vector a, vector b) __attribute__((always_inline)) {
        const __m512 x = (__m512)a, y = (__m512)b;
        return (vector)_mm512_shuffle_f32x4(x, y, 0x88) + (vector)_mm512_shuffle_f32x4(x, y, 0xdd);
    };
    return halve(halve(values[0], values[4]), halve(values[8], values[12]));
}

INLINE __m512bh load_bfloat16(const uint16_t *values)
{
    __m512bh result;
    memcpy(&result, values, sizeof result);
    return result;
}

// A score's share of the lines to fetch, so that all of them are spread over the work; a step of values has as much work
// as VALUE_STEP of them.
constexpr int VALUE_STEP = 4;

template <typename stored>
INLINE int lines_per_score(const Fetch<stored> &ahead, int blocks, int rows, int dim)
{
    const int steps = blocks * LANES / 2 * ((dim + 4 * LANES - 1) / (4 * LANES));
    const int work = blocks * LANES * rows + steps * VALUE_STEP;
    return (ahead.all() + work - 1) / work;
}

// Sixteen keys as bfloat16: where they are, or widened to `space.keys`.
template <typename stored>
INLINE void find_keys(const uint16_t *(&keys)[LANES], const Space<uint16_t> &space, const stored *const *from, int dim)
{
    for (int i = 0; i < LANES; i++)
        if constexpr (EIGHT_BITS<stored>) {
            keys[i] = space.keys + (int64_t)i * dim;
            for (int d = 0; d < dim; d += DIRECT_DIM)
                _mm512_store_si512(space.keys + (int64_t)i * dim + d, widen_some(from[i] + d, DIRECT_DIM));
        } else
            keys[i] = from[i];
}

// The scores of all rows with the tile's tokens.
template <typename stored>
INLINE void score_directly(const Space<uint16_t> &space, const TokenTile<stored> &tokens, int blocks, int first, int count,
                           int dim, Fetch<stored> &ahead, int lines)
{
    for (int block = 0; block < blocks; block++) {
        const uint16_t *keys[LANES];
        find_keys(keys, space, tokens.keys + block * LANES, dim);
        for (int row = first; row < first + count; row++) {
            const uint16_t *query = space.query + (int64_t)row * space.query_stride;
            lanes sums[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) {
                const uint16_t *key = keys[i];
                __m512 sum = _mm512_setzero_ps();
                for (int d = 0; d < dim; d += DIRECT_DIM)
                    sum = _mm512_dpbf16_ps(sum, load_bfloat16(key + d), load_bfloat16(query + d));
                sums[i] = (lanes)sum;
                ahead.lines(lines);
            }
            store_lanes(space.rows.scores + row * TILE_TOKENS + block * LANES, sums_of_all(sums));
        }
    }
}

// The sums of ROWS rows, corrected, plus their weights × the values, for the dimensions of WIDTH blocks from `from` on.
template <int ROWS, int WIDTH, typename stored>
INLINE void add_directly(const Space<uint16_t> &space, const TokenTile<stored> &tokens, int steps, int first, int from,
                         Fetch<stored> &ahead, int lines)
{
    lanes sums[ROWS][WIDTH];
    for (int row = 0; row < ROWS; row++)
        for (int block = 0; block < WIDTH; block++)
            sums[row][block] = load_lanes(space.sums + (int64_t)(first + row) * space.width + from + block * LANES) *
                               space.rows.keep[first + row];
    const uint16_t *weights = (const uint16_t *)(space.rows.scores + first * TILE_TOKENS);
    for (int step = 0; step < steps; step++) {
        signed_bits pairs[WIDTH];
        pack_values<WIDTH, uint16_t>(pairs, tokens.values + 2 * step, from, WIDTH * LANES + from);
        for (int row = 0; row < ROWS; row++) {
            const uint32_t weight = input_pair(weights + row * 2 * TILE_TOKENS + 2 * step);
            for (int block = 0; block < WIDTH; block++)
                sums[row][block] = dot_pairs(sums[row][block], pairs[block], weight);
        }
        ahead.lines(lines * VALUE_STEP);
    }
    for (int row = 0; row < ROWS; row++)
        for (int block = 0; block < WIDTH; block++)
            store_lanes(space.sums + (int64_t)(first + row) * space.width + from + block * LANES, sums[row][block]);
}

template <int ROWS, typename stored>
static void add_directly(const Space<uint16_t> &space, const TokenTile<stored> &tokens, int steps, int first, int dim,
                         Fetch<stored> &ahead, int lines)
{
    int from = 0;
    for (; from + 4 * LANES <= dim; from += 4 * LANES)
        add_directly<ROWS, 4>(space, tokens, steps, first, from, ahead, lines);
    if (from < dim)
        add_directly<ROWS, 2>(space, tokens, steps, first, from, ahead, lines);
}
#endif
