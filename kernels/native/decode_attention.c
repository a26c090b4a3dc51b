/* Attention of rows with one query each over a paged KV cache, on x86 CPUs. kernels/paged_attention.py defines the
 * meaning; kernels/native_attention.py calls this. Plain C with the compiler's vector types, compiled once for each
 * instruction set below; the best one is chosen at run time.
 *
 * A work item is one row and one KV head with its group of query heads. It walks the row's block table twice, reading
 * keys and then values in place; each is loaded once for up to four heads of the group. A block's part of a head is one
 * contiguous tile, and while one tile is worked on the next is fetched: the processor cannot foresee the jump between
 * them. Scores, softmax and sums are float32.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <math.h>

struct decode_attention {
    const void *query;            /* [rows, heads, head_dim], rows query_stride elements apart */
    const void *k_cache;          /* [kv_heads, num_blocks, block_size, head_dim] */
    const void *v_cache;
    void *out;                    /* [rows, heads, head_dim], contiguous */
    const int32_t *block_tables;  /* [rows, table_width] */
    const int32_t *context_lens;  /* [rows] */
    int64_t query_stride, num_blocks, table_width;
    int32_t rows, heads, kv_heads, head_dim, block_size;
    int32_t window;               /* 0: none */
    int32_t bfloat16;             /* 1: bfloat16, 0: float32 */
    float scale;
    float softcap;                /* 0: none */
};

typedef void (*item_function)(const struct decode_attention *, int row, int kv_head, float *scratch);

#define INLINE static inline __attribute__((always_inline))

INLINE float widen(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

INLINE uint16_t round_to_bfloat16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16); /* to nearest, ties to even */
}

INLINE float load(const void *values, int64_t index, int bfloat16)
{
    return bfloat16 ? widen(((const uint16_t *)values)[index]) : ((const float *)values)[index];
}

typedef float lanes __attribute__((vector_size(64)));
typedef float half_lanes __attribute__((vector_size(32)));
typedef float quarter_lanes __attribute__((vector_size(16)));
typedef uint32_t wide_bits __attribute__((vector_size(64)));
typedef int32_t signed_bits __attribute__((vector_size(64)));
typedef uint16_t narrow_bits __attribute__((vector_size(32)));

#define LANES 16
#define HEADS 4  /* query heads that share a load */
#define CHUNKS 4 /* vectors of a head's dimensions whose sums are in registers at once */

INLINE lanes load_lanes(const void *values, int64_t index, int bfloat16)
{
    lanes result;
    if (bfloat16) {
        narrow_bits narrow;
        memcpy(&narrow, (const uint16_t *)values + index, sizeof narrow);
        wide_bits wide = __builtin_convertvector(narrow, wide_bits) << 16;
        memcpy(&result, &wide, sizeof result);
    } else
        memcpy(&result, (const float *)values + index, sizeof result);
    return result;
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

/* e^x for x <= 0, relative error below 3e-7: x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts; e^r by its Taylor
 * series to the seventh power, e^(n ln 2) by writing n into the exponent. */
INLINE lanes exp_nonpositive(lanes x)
{
    const signed_bits tiny = x < -87.0f;
    x = (lanes)(((signed_bits)x & ~tiny) | ((signed_bits)((lanes){0} - 87.0f) & tiny));
    const signed_bits n = __builtin_convertvector(x * 1.44269504f - 0.5f, signed_bits); /* truncates: to nearest */
    const lanes whole = __builtin_convertvector(n, lanes);
    const lanes r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    lanes p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (lanes)((n + 127) << 23);
}

/* scores[h * stride + t] = query head h . key t, for `heads` heads and the `tokens` tokens of a tile. */
INLINE void score_tile(const float *query, const void *keys, int tokens, int dim, int heads, float *scores,
                       int64_t stride, int bfloat16)
{
    for (int t = 0; t < tokens; t++) {
        const int64_t key = (int64_t)t * dim;
        lanes sums[HEADS] = {{0}};
        float rest[HEADS] = {0};
        int d = 0;
        for (; d + LANES <= dim; d += LANES) {
            const lanes k = load_lanes(keys, key + d, bfloat16);
            for (int h = 0; h < heads; h++)
                sums[h] += load_lanes(query + (int64_t)h * dim, d, 0) * k;
        }
        for (; d < dim; d++)
            for (int h = 0; h < heads; h++)
                rest[h] += query[(int64_t)h * dim + d] * load(keys, key + d, bfloat16);
        for (int h = 0; h < heads; h++)
            scores[h * stride + t] = sum_of_lanes(sums[h]) + rest[h];
    }
}

/* sums[h] += scores[h * stride + t] * value t, over the dimensions [d, d + LANES * chunks). */
INLINE void add_chunks(float *sums, const void *values, int tokens, int dim, int d, int heads, int chunks,
                       const float *scores, int64_t stride, int bfloat16)
{
    lanes held[HEADS][CHUNKS];
    for (int h = 0; h < heads; h++)
        for (int c = 0; c < chunks; c++)
            held[h][c] = load_lanes(sums + (int64_t)h * dim, d + c * LANES, 0);
    for (int t = 0; t < tokens; t++)
        for (int c = 0; c < chunks; c++) {
            const lanes v = load_lanes(values, (int64_t)t * dim + d + c * LANES, bfloat16);
            for (int h = 0; h < heads; h++)
                held[h][c] += scores[h * stride + t] * v;
        }
    for (int h = 0; h < heads; h++)
        for (int c = 0; c < chunks; c++)
            memcpy(sums + (int64_t)h * dim + d + c * LANES, &held[h][c], sizeof(lanes));
}

/* The same over all dimensions. */
INLINE void add_tile(float *sums, const void *values, int tokens, int dim, int heads, const float *scores,
                     int64_t stride, int bfloat16)
{
    int d = 0;
    for (; d + CHUNKS * LANES <= dim; d += CHUNKS * LANES)
        add_chunks(sums, values, tokens, dim, d, heads, CHUNKS, scores, stride, bfloat16);
    for (; d + LANES <= dim; d += LANES)
        add_chunks(sums, values, tokens, dim, d, heads, 1, scores, stride, bfloat16);
    for (; d < dim; d++)
        for (int h = 0; h < heads; h++)
            for (int t = 0; t < tokens; t++)
                sums[(int64_t)h * dim + d] += scores[h * stride + t] * load(values, (int64_t)t * dim + d, bfloat16);
}

/* Block `block` of a row, from the head's first element on, and the fetching of the next block up to `last`. */
INLINE const char *tile_of(const void *cache, const struct decode_attention *a, int row, int kv_head, int block, int last,
                           int bfloat16)
{
    const int64_t bytes = (int64_t)a->block_size * a->head_dim * (bfloat16 ? 2 : 4);
    const char *head = (const char *)cache + kv_head * a->num_blocks * bytes;
    const int32_t *table = a->block_tables + row * a->table_width;
    if (block < last) {
        const char *next = head + table[block + 1] * bytes;
        for (int64_t line = 0; line < bytes; line += 64)
            __builtin_prefetch(next + line);
    }
    return head + table[block] * bytes;
}

/* scores: room for `length` rounded up to whole vectors; what is behind the end may be overwritten. */
INLINE void softmax(float *scores, int length, float softcap)
{
    if (softcap != 0.0f)
        for (int i = 0; i < length; i++)
            scores[i] = softcap * tanhf(scores[i] / softcap);
    float largest = scores[0];
    for (int i = 1; i < length; i++)
        largest = scores[i] > largest ? scores[i] : largest;
    lanes totals = {0};
    for (int i = 0; i < length; i += LANES) {
        if (i + LANES > length)
            for (int behind = length; behind < i + LANES; behind++)
                scores[behind] = -INFINITY;
        const lanes weights = exp_nonpositive(load_lanes(scores, i, 0) - largest);
        memcpy(scores + i, &weights, sizeof weights);
        totals += weights;
    }
    const float share = 1.0f / sum_of_lanes(totals);
    for (int i = 0; i < length; i++)
        scores[i] *= share;
}

/* `heads` query heads from `head` on, which share a KV head. scratch: heads * (2 * head_dim + length rounded up) floats. */
INLINE void attend_heads(const struct decode_attention *a, int row, int kv_head, int head, int heads, float *scratch,
                         int bfloat16)
{
    const int dim = a->head_dim, size = a->block_size, context = a->context_lens[row];
    const int first = a->window && context > a->window ? context - a->window : 0;
    const int length = context - first, last = (context - 1) / size;
    const int64_t stride = (length + LANES - 1) / LANES * LANES;
    float *query = scratch, *sums = query + heads * dim, *scores = sums + heads * dim;
    for (int i = 0; i < heads * dim; i++) {
        query[i] = load(a->query, row * a->query_stride + (int64_t)head * dim + i, bfloat16) * a->scale;
        sums[i] = 0.0f;
    }
    for (int block = first / size; block <= last; block++) {
        const int begin = block * size > first ? block * size : first;
        const int end = block == last ? context : (block + 1) * size;
        const char *keys = tile_of(a->k_cache, a, row, kv_head, block, last, bfloat16);
        keys += (int64_t)(begin - block * size) * dim * (bfloat16 ? 2 : 4);
        score_tile(query, keys, end - begin, dim, heads, scores + begin - first, stride, bfloat16);
    }
    for (int h = 0; h < heads; h++)
        softmax(scores + h * stride, length, a->softcap);
    for (int block = first / size; block <= last; block++) {
        const int begin = block * size > first ? block * size : first;
        const int end = block == last ? context : (block + 1) * size;
        const char *values = tile_of(a->v_cache, a, row, kv_head, block, last, bfloat16);
        values += (int64_t)(begin - block * size) * dim * (bfloat16 ? 2 : 4);
        add_tile(sums, values, end - begin, dim, heads, scores + begin - first, stride, bfloat16);
    }
    const int64_t out = ((int64_t)row * a->heads + head) * dim;
    for (int i = 0; i < heads * dim; i++)
        if (bfloat16)
            ((uint16_t *)a->out)[out + i] = round_to_bfloat16(sums[i]);
        else
            ((float *)a->out)[out + i] = sums[i];
}

INLINE void attend(const struct decode_attention *a, int row, int kv_head, float *scratch, int bfloat16)
{
    const int group = a->heads / a->kv_heads;
    for (int head = kv_head * group; head < (kv_head + 1) * group;) {
        const int left = (kv_head + 1) * group - head;
        /* A constant number of heads lets the compiler keep their sums in registers. */
        if (left >= 4)
            attend_heads(a, row, kv_head, head, 4, scratch, bfloat16), head += 4;
        else if (left >= 2)
            attend_heads(a, row, kv_head, head, 2, scratch, bfloat16), head += 2;
        else
            attend_heads(a, row, kv_head, head, 1, scratch, bfloat16), head += 1;
    }
}

#define ITEM_FUNCTION(name, target)                                                                               \
    target static void name(const struct decode_attention *a, int row, int kv_head, float *scratch)               \
    {                                                                                                             \
        if (a->bfloat16)                                                                                          \
            attend(a, row, kv_head, scratch, 1);                                                                  \
        else                                                                                                      \
            attend(a, row, kv_head, scratch, 0);                                                                  \
    }

ITEM_FUNCTION(item_baseline, )
#if defined(__x86_64__)
ITEM_FUNCTION(item_avx2, __attribute__((target("avx2,fma"))))
ITEM_FUNCTION(item_avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))))
#endif

static item_function best_item_function(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return item_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return item_avx2;
#endif
    return item_baseline;
}

/* Returns 0, or 1 if there was no memory for the scores. */
int troupe_decode_attention(const struct decode_attention *a)
{
    const item_function item = best_item_function();
    int longest = 0, failed = 0;
    for (int row = 0; row < a->rows; row++)
        longest = a->context_lens[row] > longest ? a->context_lens[row] : longest;
#pragma omp parallel
    {
        float *scratch = malloc(sizeof(float) * HEADS * (2 * (size_t)a->head_dim + longest + LANES));
        if (scratch == NULL) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 2)
        for (int i = 0; i < a->rows * a->kv_heads; i++)
            if (scratch != NULL)
                item(a, i / a->kv_heads, i % a->kv_heads, scratch);
        free(scratch);
    }
    return failed;
}
