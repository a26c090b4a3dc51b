// Keys and values of 8 bits, each head of a token with a float32 scale: kernels/quantised_kv.py says what they mean.

struct Int8 {
    int8_t bits;
    static constexpr float LIMIT = 127.0f;
};

// e4m3: a sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities. NaN is never stored.
struct Float8 {
    uint8_t bits;
    static constexpr float LIMIT = 448.0f;
};

typedef int8_t signed_bytes __attribute__((vector_size(16)));
typedef uint8_t bytes __attribute__((vector_size(16)));

template <typename stored> constexpr bool EIGHT_BITS = sizeof(stored) == 1;

INLINE lanes load_lanes(const Int8 *values)
{
    signed_bytes narrow;
    memcpy(&narrow, values, sizeof narrow);
    return __builtin_convertvector(__builtin_convertvector(narrow, signed_bits), lanes);
}

// The bits of the exponent and mantissa are those of a float32 that is 2^120 too small. Its denormal numbers, which a
// processor may take for zeros or take long over, are avoided: 2^-7 (1 + m / 8) * 2 - 2^-6 is the 2^-6 m / 8 that is meant.
INLINE lanes load_lanes(const Float8 *values)
{
    bytes narrow;
    memcpy(&narrow, values, sizeof narrow);
    const wide_bits wide = __builtin_convertvector(narrow, wide_bits);
    const lanes size = (lanes)(((wide & 0x7f) << 20) + (120u << 23));
    const lanes right = select((signed_bits)((wide & 0x78) == 0), size + size - 0x1p-6f, size);
    return (lanes)((wide_bits)right | (wide & 0x80) << 24);
}

INLINE float load(const Int8 *value) { return value->bits; }

INLINE float load(const Float8 *value)
{
    const uint32_t size = ((value->bits & 0x7fu) << 20) + (120u << 23);
    float right;
    memcpy(&right, &size, 4);
    if ((value->bits & 0x78) == 0)
        right = right + right - 0x1p-6f;
    return value->bits & 0x80 ? -right : right;
}

// To nearest, halves upwards; |values| <= LIMIT.
INLINE void store_lanes(Int8 *target, lanes values)
{
    const lanes raised = values + 0.5f;
    const signed_bits whole = __builtin_convertvector(raised, signed_bits); // truncates
    const signed_bits floored = whole + (signed_bits)(__builtin_convertvector(whole, lanes) > raised); // true is -1
    const signed_bytes narrow = __builtin_convertvector(floored, signed_bytes);
    memcpy(target, &narrow, sizeof narrow);
}

// To nearest, ties to even; |values| <= LIMIT. What is below the smallest normal number, 2^-6, is a multiple of 2^-9, as are
// the last bits of a float32 near 2^14: adding that rounds.
INLINE void store_lanes(Float8 *target, lanes values)
{
    const wide_bits bits = (wide_bits)values & 0x7fffffff, sign = ((wide_bits)values & 0x80000000) >> 24;
    const wide_bits normal = ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - (120 << 3);
    const wide_bits small = (wide_bits)((lanes)bits + 0x1p14f) - (wide_bits)broadcast(0x1p14f);
    const wide_bits is_small = (wide_bits)((lanes)bits < 0x1p-6f);
    const bytes narrow = __builtin_convertvector((small & is_small) | (normal & ~is_small) | sign, bytes);
    memcpy(target, &narrow, sizeof narrow);
}

#if NATIVE_BFLOAT16
// 32 numbers as bfloat16, which holds them all exactly.
INLINE __m512i widen_bytes(__m256i narrow, const Int8 *)
{
    const __m512 first = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(narrow)));
    const __m512 second = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(narrow, 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

INLINE __m512i widen_bytes(__m256i narrow, const Float8 *)
{
    alignas(64) static const uint16_t small[32] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60}; // m * 2^-9
    const __m512i wide = _mm512_cvtepi8_epi16(narrow);
    __m512i size = _mm512_and_si512(_mm512_slli_epi16(wide, 4), _mm512_set1_epi16(0x07f0));
    size = _mm512_add_epi16(size, _mm512_set1_epi16(120 << 7));
    const __mmask32 is_small = _mm512_testn_epi16_mask(wide, _mm512_set1_epi16(0x78));
    size = _mm512_mask_permutexvar_epi16(size, is_small, wide, _mm512_load_si512(small));
    return _mm512_ternarylogic_epi64(size, wide, _mm512_set1_epi16((short)0x8000), 0xf8); // size | (wide & sign)
}

// The first `count` of 32 numbers, zeros behind them; nothing behind them is read.
template <typename stored> INLINE __m512i widen_some(const stored *values, int count)
{
    __m256i narrow;
    if (count >= 2 * LANES)
        memcpy(&narrow, values, sizeof narrow);
    else
        narrow = _mm256_maskz_loadu_epi8((1u << count) - 1, values);
    return widen_bytes(narrow, values);
}
#endif
