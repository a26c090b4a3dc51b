// Sixteen float32 at once, in the compiler's vector types: one AVX-512 register, two of AVX2, four of SSE. Included once
// per instruction set, inside that set's namespace.

#define INLINE static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(64)));
typedef float half_lanes __attribute__((vector_size(32)));
typedef float quarter_lanes __attribute__((vector_size(16)));
typedef uint32_t wide_bits __attribute__((vector_size(64)));
typedef int32_t signed_bits __attribute__((vector_size(64)));
typedef uint16_t narrow_bits __attribute__((vector_size(32)));
typedef int8_t narrow_integers __attribute__((vector_size(16)));
typedef int32_t half_integers __attribute__((vector_size(32)));
typedef int32_t quarter_integers __attribute__((vector_size(16)));
typedef uint8_t narrow_unsigned __attribute__((vector_size(16)));

constexpr int LANES = 16;

INLINE float widen(uint16_t bits)
{
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

// The upper half of every byte.
INLINE signed_bits upper_half(signed_bits bytes) { return (signed_bits)((wide_bits)bytes >> 4) & 0x0f0f0f0f; }

INLINE lanes broadcast(float value) { return lanes{} + value; }

// Lane by lane: where `mask` is all ones `a`, where it is zero `b`.
INLINE lanes select(signed_bits mask, lanes a, lanes b)
{
    return (lanes)(((signed_bits)a & mask) | ((signed_bits)b & ~mask));
}

INLINE wide_bits widen_lanes(narrow_bits narrow)
{
#if NATIVE_AVX512
    return (wide_bits)_mm512_cvtepu16_epi32((__m256i)narrow);
#else
    return __builtin_convertvector(narrow, wide_bits);
#endif
}

// `element` is uint16_t for bfloat16 and float for float32.
template <typename element> INLINE float load(const element *values)
{
    if constexpr (sizeof(element) == 2)
        return widen(*values);
    else
        return *values;
}

template <typename element> INLINE lanes load_lanes(const element *values)
{
    lanes result;
    if constexpr (sizeof(element) == 2) {
        narrow_bits narrow;
        memcpy(&narrow, values, sizeof narrow);
        const wide_bits wide = widen_lanes(narrow) << 16;
        memcpy(&result, &wide, sizeof result);
    } else
        memcpy(&result, values, sizeof result);
    return result;
}

// bfloat16 is rounded to nearest, ties to even; what is too small for a normal number may become 0.
template <typename element> INLINE void store_lanes(element *target, lanes values)
{
    if constexpr (sizeof(element) == 2) {
#if NATIVE_BFLOAT16
        const __m256bh rounded_at_once = _mm512_cvtneps_pbh((__m512)values);
        memcpy(target, &rounded_at_once, sizeof rounded_at_once);
        return;
#endif
        const wide_bits bits = (wide_bits)values;
        wide_bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        const wide_bits nan = (wide_bits)(values != values);
        rounded = (rounded & ~nan) | (0x7fc0 & nan);
        const narrow_bits narrow = __builtin_convertvector(rounded, narrow_bits);
        memcpy(target, &narrow, sizeof narrow);
    } else
        memcpy(target, &values, sizeof values);
}

// The first `count` < LANES lanes, the others 0; reads and writes no others.
template <typename element> INLINE lanes load_some(const element *values, int count)
{
    element padded[LANES] = {};
    memcpy(padded, values, count * sizeof(element));
    return load_lanes(padded);
}

template <typename element> INLINE void store_some(element *target, lanes values, int count)
{
    element padded[LANES];
    store_lanes(padded, values);
    memcpy(target, padded, count * sizeof(element));
}

// a * b + c, rounded once wherever the processor can: the compiler might choose one way here and another there.
INLINE lanes multiply_add(lanes a, lanes b, lanes c)
{
#if NATIVE_AVX512
    return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif NATIVE_AVX2
    __m256 halves[3][2];
    memcpy(halves[0], &a, sizeof a);
    memcpy(halves[1], &b, sizeof b);
    memcpy(halves[2], &c, sizeof c);
    for (int half = 0; half < 2; half++)
        halves[2][half] = _mm256_fmadd_ps(halves[0][half], halves[1][half], halves[2][half]);
    memcpy(&c, halves[2], sizeof c);
    return c;
#else
    return a * b + c;
#endif
}

INLINE float sum_of_lanes(lanes values)
{
    half_lanes half[2];
    memcpy(half, &values, sizeof half);
    half[0] += half[1];
    quarter_lanes quarter[2];
    memcpy(quarter, half, sizeof quarter);
    quarter[0] += quarter[1];
    return (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
}

// e^x, relative error below 3e-7; x is clamped to [-87, 88]: x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts; e^r
// by its Taylor series to the seventh power, e^(n ln 2) by writing n into the exponent. NaN stays NaN.
INLINE lanes exp_lanes(lanes x)
{
    const signed_bits nan = x != x;
    lanes bounded = select(x < -87.0f, broadcast(-87.0f), x);
    bounded = select(bounded > 88.0f, broadcast(88.0f), bounded);
    bounded = select(nan, broadcast(0.0f), bounded);
    const lanes turns = bounded * 1.44269504f;
    const lanes half = select(turns < 0.0f, broadcast(-0.5f), broadcast(0.5f));
    const signed_bits n = __builtin_convertvector(turns + half, signed_bits); // truncates: to nearest
    const lanes whole = __builtin_convertvector(n, lanes);
    const lanes r = bounded - whole * 0.693359375f + whole * 2.12194440e-4f;
    lanes p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return select(nan, x, p * (lanes)((n + 127) << 23));
}

// acc + Σ of two products per lane: lane i of `weight` holds two bfloat16, which meet the two of `x`.
INLINE lanes dot_pairs(lanes acc, signed_bits weight, uint32_t x)
{
#if NATIVE_BFLOAT16
    return (lanes)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32((int)x), (__m512bh)weight);
#else
    const lanes even = (lanes)(weight << 16), odd = (lanes)(weight & (int32_t)0xffff0000);
    acc += even * widen((uint16_t)x);
    return acc + odd * widen((uint16_t)(x >> 16));
#endif
}

#if NATIVE_AVX2 && !NATIVE_VNNI
// Lane by lane the sum of two products of 16-bit integers.
INLINE signed_bits multiply_pairs(signed_bits a, signed_bits b)
{
#if NATIVE_AVX512
    return (signed_bits)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
    __m256i halves[2][2], result[2];
    memcpy(halves[0], &a, sizeof a);
    memcpy(halves[1], &b, sizeof b);
    for (int half = 0; half < 2; half++)
        result[half] = _mm256_madd_epi16(halves[0][half], halves[1][half]);
    memcpy(&a, result, sizeof a);
    return a;
#endif
}
#endif

// acc[i] + Σ of four products per lane: unsigned bytes of `weights[i]` with the signed bytes at `x`.
template <int COUNT> INLINE void dot_quads(signed_bits (&acc)[COUNT], const signed_bits (&weights)[COUNT], const char *x)
{
    int32_t quad;
    memcpy(&quad, x, sizeof quad);
#if NATIVE_VNNI
    const __m512i inputs = _mm512_set1_epi32(quad);
    for (int i = 0; i < COUNT; i++)
        acc[i] = (signed_bits)_mm512_dpbusd_epi32((__m512i)acc[i], (__m512i)weights[i], inputs);
#elif NATIVE_AVX2
    const int32_t even = (uint16_t)(int8_t)quad | (int32_t)((uint32_t)(int8_t)(quad >> 16) << 16);
    const int32_t odd = (uint16_t)(int8_t)(quad >> 8) | (int32_t)((uint32_t)(quad >> 24) << 16);
    for (int i = 0; i < COUNT; i++) {
        acc[i] += multiply_pairs(weights[i] & 0x00ff00ff, signed_bits{} + even);
        acc[i] += multiply_pairs((signed_bits)((wide_bits)weights[i] >> 8) & 0x00ff00ff, signed_bits{} + odd);
    }
#else
    for (int byte = 0; byte < 4; byte++)
        for (int i = 0; i < COUNT; i++)
            acc[i] += ((weights[i] >> 8 * byte) & 255) * (int32_t)(int8_t)(quad >> 8 * byte);
#endif
}
