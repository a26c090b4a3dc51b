// Products with a tile of keys or values. Both are packed as linear.h packs weights, so that every product is a sum over
// steps of a vector of the tile × a broadcast of the other side, and no sum runs across a vector's lanes:
//
//     keys      [panels of 4 × 16 tokens][head_dim / 2][blocks of 16 tokens][2 dimensions]
//     values    [panels of 4 × 16 dimensions][tokens / 2][blocks of 16 dimensions][2 tokens]
//
// With bfloat16 and the instructions for it: pairs of bfloat16, multiplied two at a time. Otherwise float32, one at a
// time: bfloat16 is widened once, here, and not in every product. So are 8 bits, without their scales: a key's is applied to
// its scores, a value's to its weights.

constexpr int TILE_TOKENS = 128;
constexpr int DIRECT_ROWS = 4; // as many may be multiplied without packing: attention_direct.h
// PRODUCT_ROWS rows × PANEL blocks of sums are in registers. They are spelt in vectors of a register's own size: GCC keeps
// arrays of longer ones in memory.
#if NATIVE_AVX512
constexpr int PANEL = 4;
constexpr int PRODUCT_ROWS = 6;
typedef lanes register_lanes;
#elif NATIVE_AVX2
constexpr int PANEL = 2;
constexpr int PRODUCT_ROWS = 3;
typedef half_lanes register_lanes;
#else
constexpr int PANEL = 1;
constexpr int PRODUCT_ROWS = 3;
typedef quarter_lanes register_lanes;
#endif

// What the cache's elements become in a packed tile.
template <typename element> struct Packed {
    typedef float type;
};
#if NATIVE_BFLOAT16
template <> struct Packed<uint16_t> {
    typedef uint16_t type;
};
#endif

INLINE int blocks_of(int count) { return (count + LANES - 1) / LANES; }

template <typename packed> INLINE int steps_of(int count)
{
    return (count + PER_STEP<packed> - 1) / PER_STEP<packed>;
}

// The first sixteen steps of `count` values in a row, zeros behind the end; nothing behind it is read.
template <typename packed, typename element> INLINE signed_bits load_steps(const element *values, int count)
{
    constexpr int full = LANES * PER_STEP<packed>;
    if constexpr (sizeof(packed) == 2 && EIGHT_BITS<element>) {
#if NATIVE_BFLOAT16
        return (signed_bits)widen_some(values, count);
#endif
    } else if constexpr (sizeof(packed) == 2) {
        signed_bits bits = {};
        if (count >= full)
            memcpy(&bits, values, sizeof bits);
        else
#if NATIVE_AVX512
            bits = (signed_bits)_mm512_maskz_loadu_epi16((1u << count) - 1, values);
#else
            memcpy(&bits, values, count * sizeof(element));
#endif
        return bits;
    } else
        return (signed_bits)(count >= full ? load_lanes(values) : load_some(values, count));
}

#if NATIVE_AVX512
// rows[i][j] becomes rows[j][i].
INLINE void transpose(signed_bits (&rows)[LANES])
{
    __m512i pairs[LANES], fours[LANES];
    for (int i = 0; i < LANES; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4) { // quarter q of fours[i + j]: column 4 q + j of rows i to i + 3
        fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    for (int j = 0; j < 4; j++) {
        const __m512i even_upper = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x88);
        const __m512i odd_upper = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xdd);
        const __m512i even_lower = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x88);
        const __m512i odd_lower = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xdd);
        rows[j] = (signed_bits)_mm512_shuffle_i32x4(even_upper, even_lower, 0x88);
        rows[4 + j] = (signed_bits)_mm512_shuffle_i32x4(odd_upper, odd_lower, 0x88);
        rows[8 + j] = (signed_bits)_mm512_shuffle_i32x4(even_upper, even_lower, 0xdd);
        rows[12 + j] = (signed_bits)_mm512_shuffle_i32x4(odd_upper, odd_lower, 0xdd);
    }
}
#elif defined(__x86_64__)
INLINE __m128 load_quarter(const float *values) { return _mm_loadu_ps(values); }

INLINE __m128 load_quarter(const uint16_t *values)
{
    return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i *)values)));
}

template <typename stored> INLINE __m128 load_quarter(const stored *values)
{
    return _mm_setr_ps(load(values), load(values + 1), load(values + 2), load(values + 3));
}
#endif

// Where block `block` of step 0 lies in a packed tile of `steps` steps and `blocks` blocks, and how far apart its steps.
INLINE signed_bits *packed_block(signed_bits *tile, int block, int blocks, int steps, int &width)
{
    const int panel = block / PANEL, left = blocks - panel * PANEL;
    width = left < PANEL ? left : PANEL;
    return tile + (int64_t)panel * PANEL * steps + block % PANEL;
}

// Sixteen keys, tokens 16 * block and following, as block `block` of a packed tile of `blocks` blocks.
template <typename packed, typename element>
INLINE void pack_keys(signed_bits *tile, const element *const *keys, int block, int blocks, int dim)
{
    const int steps = steps_of<packed>(dim);
    int width, step = 0;
    signed_bits *target = packed_block(tile, block, blocks, steps, width);
    keys += block * LANES;
#if NATIVE_AVX512
    constexpr int per_step = PER_STEP<packed>;
    signed_bits rows[LANES];
    for (; (step + LANES) * per_step <= dim; step += LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            rows[i] = load_steps<packed>(keys[i] + step * per_step, LANES * per_step);
        transpose(rows);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++, target += width)
            *target = rows[i];
    }
    if (step < steps) {
        for (int i = 0; i < LANES; i++)
            rows[i] = load_steps<packed>(keys[i] + step * per_step, dim - step * per_step);
        transpose(rows);
        for (int i = 0; i < steps - step; i++, target += width)
            *target = rows[i];
    }
#else
    float *place = (float *)target; // of token 0
    const int64_t distance = (int64_t)width * LANES;
#if defined(__x86_64__)
    for (; step + 4 <= steps; step += 4, place += 4 * distance)
        for (int i = 0; i < LANES; i += 4) {
            __m128 a = load_quarter(keys[i] + step), b = load_quarter(keys[i + 1] + step);
            __m128 c = load_quarter(keys[i + 2] + step), d = load_quarter(keys[i + 3] + step);
            _MM_TRANSPOSE4_PS(a, b, c, d);
            _mm_storeu_ps(place + i, a);
            _mm_storeu_ps(place + distance + i, b);
            _mm_storeu_ps(place + 2 * distance + i, c);
            _mm_storeu_ps(place + 3 * distance + i, d);
        }
#endif
    for (; step < steps; step++, place += distance)
        for (int i = 0; i < LANES; i++)
            place[i] = load(keys[i] + step);
#endif
}

// The values of one step: WIDTH blocks of dimensions, of which `dim` are left.
template <int WIDTH, typename packed, typename element>
INLINE void pack_values(signed_bits *target, const element *const *values, int from, int dim)
{
    if constexpr (sizeof(packed) == 2) {
#if NATIVE_AVX512
        alignas(64) static const uint16_t lower[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
        const __m512i first = _mm512_load_si512(lower), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
#pragma GCC unroll 2
        for (int block = 0; block < WIDTH; block += 2, from += 2 * LANES) {
            const __m512i a = (__m512i)load_steps<packed>(values[0] + from, dim - from);
            const __m512i b = (__m512i)load_steps<packed>(values[1] + from, dim - from);
            target[block] = (signed_bits)_mm512_permutex2var_epi16(a, first, b);
            if (block + 1 < WIDTH)
                target[block + 1] = (signed_bits)_mm512_permutex2var_epi16(a, second, b);
        }
#endif
    } else
        for (int block = 0; block < WIDTH; block++, from += LANES) {
#if defined(__x86_64__) && !NATIVE_AVX512
            if (dim - from >= LANES) {
                for (int i = 0; i < LANES; i += 4)
                    _mm_storeu_ps((float *)(target + block) + i, load_quarter(values[0] + from + i));
                continue;
            }
#endif
            target[block] = load_steps<packed>(values[0] + from, dim - from);
        }
}

// The values of steps [begin, end) of a packed tile of `steps` steps.
template <typename packed, typename element>
INLINE void pack_values(signed_bits *tile, const element *const *values, int begin, int end, int steps, int dim)
{
    const int blocks = blocks_of(dim);
    for (int block = 0, width; block < blocks; block += PANEL) {
        signed_bits *target = packed_block(tile, block, blocks, steps, width);
        for (int step = begin; step < end; step++) {
            const element *const *rows = values + step * PER_STEP<packed>;
            switch (width) {
            case 1: pack_values<1, packed>(target + step, rows, block * LANES, dim); break;
#if NATIVE_AVX2
            case 2: pack_values<2, packed>(target + step * 2, rows, block * LANES, dim); break;
#endif
#if NATIVE_AVX512
            case 3: pack_values<3, packed>(target + step * 3, rows, block * LANES, dim); break;
            case 4: pack_values<4, packed>(target + step * 4, rows, block * LANES, dim); break;
#endif
            }
        }
    }
}

// out = keep * out + left × panel for ROWS rows and WIDTH blocks; without `keep`, out = left × panel.
template <int ROWS, int WIDTH, typename packed>
static void multiply_panel(const packed *left, int64_t left_stride, const signed_bits *panel, int steps, float *out,
                           int64_t out_stride, const float *keep)
{
    constexpr int size = sizeof(register_lanes) / sizeof(float), registers = WIDTH * LANES / size;
    register_lanes sums[ROWS][registers];
    for (int row = 0; row < ROWS; row++)
        for (int i = 0; i < registers; i++) {
            sums[row][i] = register_lanes{};
            if (keep) {
                memcpy(&sums[row][i], out + row * out_stride + i * size, sizeof sums[row][i]);
                sums[row][i] *= keep[row];
            }
        }
    for (int step = 0; step < steps; step++, panel += WIDTH) {
        const packed *x = left + step * PER_STEP<packed>;
        for (int row = 0; row < ROWS; row++, x += left_stride)
            for (int i = 0; i < registers; i++)
                if constexpr (sizeof(packed) == 2)
                    sums[row][i] = dot_pairs(sums[row][i], panel[i], input_pair(x));
                else
                    sums[row][i] += ((const register_lanes *)panel)[i] * *x;
    }
    for (int row = 0; row < ROWS; row++)
        for (int i = 0; i < registers; i++)
            memcpy(out + row * out_stride + i * size, &sums[row][i], sizeof sums[row][i]);
}

template <int WIDTH, typename packed>
INLINE void multiply_rows(int rows, const packed *left, int64_t left_stride, const signed_bits *panel, int steps,
                          float *out, int64_t out_stride, const float *keep)
{
    switch (rows) {
    case 1: return multiply_panel<1, WIDTH>(left, left_stride, panel, steps, out, out_stride, keep);
    case 2: return multiply_panel<2, WIDTH>(left, left_stride, panel, steps, out, out_stride, keep);
    case 3: return multiply_panel<3, WIDTH>(left, left_stride, panel, steps, out, out_stride, keep);
#if NATIVE_AVX512
    case 4: return multiply_panel<4, WIDTH>(left, left_stride, panel, steps, out, out_stride, keep);
    case 5: return multiply_panel<5, WIDTH>(left, left_stride, panel, steps, out, out_stride, keep);
    case 6: return multiply_panel<6, WIDTH>(left, left_stride, panel, steps, out, out_stride, keep);
#endif
    }
}

// The same for `rows` and `width` known only now.
template <typename packed>
INLINE void multiply_panel(int rows, int width, const packed *left, int64_t left_stride, const signed_bits *panel,
                           int steps, float *out, int64_t out_stride, const float *keep)
{
    switch (width) {
    case 1: return multiply_rows<1>(rows, left, left_stride, panel, steps, out, out_stride, keep);
#if NATIVE_AVX2
    case 2: return multiply_rows<2>(rows, left, left_stride, panel, steps, out, out_stride, keep);
#endif
#if NATIVE_AVX512
    case 3: return multiply_rows<3>(rows, left, left_stride, panel, steps, out, out_stride, keep);
    case 4: return multiply_rows<4>(rows, left, left_stride, panel, steps, out, out_stride, keep);
#endif
    }
}

// Calls work(first, count) for even parts of [0, rows), each small enough for multiply_panel.
template <typename function> INLINE void for_parts(int rows, function work)
{
    const int parts = (rows + PRODUCT_ROWS - 1) / PRODUCT_ROWS;
    for (int part = 0; part < parts; part++) {
        const int first = rows * part / parts;
        work(first, rows * (part + 1) / parts - first);
    }
}
