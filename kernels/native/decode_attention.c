/* Attention of rows with one query each over a paged KV cache, on x86 CPUs. kernels/paged_attention.py defines the
 * meaning; kernels/native_attention.py calls this. Plain C: the compiler vectorises the loops over head_dim, once for
 * each instruction set below, and the best one is chosen at run time.
 *
 * A work item is one row and one KV head with its group of query heads. It walks the row's block table twice, reading
 * keys and then values in place; each is loaded once for the whole group. Scores, softmax and sums are float32.
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

/* e^x for x <= 0 without a branch, so that a loop of it vectorises; relative error below 3e-7.
 * x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts; e^r by its Taylor series to the seventh power. */
INLINE float exp_nonpositive(float x)
{
    x = x < -87.0f ? -87.0f : x;
    float n = (float)(int32_t)(x * 1.44269504f - 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

INLINE const void *tile_of(const void *cache, const struct decode_attention *a, int row, int kv_head, int block,
                           int bfloat16)
{
    int64_t id = a->block_tables[row * a->table_width + block];
    int64_t element = ((int64_t)kv_head * a->num_blocks + id) * a->block_size * a->head_dim;
    return (const char *)cache + element * (bfloat16 ? 2 : 4);
}

INLINE void attend(const struct decode_attention *a, int row, int kv_head, float *scratch, int bfloat16)
{
    const int group = a->heads / a->kv_heads, dim = a->head_dim, size = a->block_size;
    const int context = a->context_lens[row];
    const int first = a->window && context > a->window ? context - a->window : 0;
    const int length = context - first;
    const int64_t head_offset = (int64_t)kv_head * group * dim;
    float *query = scratch, *sum = query + group * dim, *scores = sum + group * dim;

    for (int i = 0; i < group * dim; i++) {
        query[i] = load(a->query, row * a->query_stride + head_offset + i, bfloat16) * a->scale;
        sum[i] = 0.0f;
    }

    for (int token = first; token < context;) {
        const int block = token / size, end = (block + 1) * size < context ? (block + 1) * size : context;
        const void *tile = tile_of(a->k_cache, a, row, kv_head, block, bfloat16);
        for (; token < end; token++) {
            const int64_t key = (int64_t)(token % size) * dim;
            for (int g = 0; g < group; g++) {
                const float *q = query + g * dim;
                float score = 0.0f;
#pragma omp simd reduction(+ : score)
                for (int d = 0; d < dim; d++)
                    score += q[d] * load(tile, key + d, bfloat16);
                scores[(int64_t)g * length + token - first] = score;
            }
        }
    }

    for (int g = 0; g < group; g++) {
        float *row_scores = scores + (int64_t)g * length;
        if (a->softcap != 0.0f)
            for (int i = 0; i < length; i++)
                row_scores[i] = a->softcap * tanhf(row_scores[i] / a->softcap);
        float largest = row_scores[0], total = 0.0f;
        for (int i = 1; i < length; i++)
            largest = row_scores[i] > largest ? row_scores[i] : largest;
#pragma omp simd reduction(+ : total)
        for (int i = 0; i < length; i++) {
            row_scores[i] = exp_nonpositive(row_scores[i] - largest);
            total += row_scores[i];
        }
        for (int i = 0; i < length; i++)
            row_scores[i] /= total;
    }

    for (int token = first; token < context;) {
        const int block = token / size, end = (block + 1) * size < context ? (block + 1) * size : context;
        const void *tile = tile_of(a->v_cache, a, row, kv_head, block, bfloat16);
        for (; token < end; token++) {
            const int64_t value = (int64_t)(token % size) * dim;
            for (int g = 0; g < group; g++) {
                const float weight = scores[(int64_t)g * length + token - first];
                float *out = sum + g * dim;
#pragma omp simd
                for (int d = 0; d < dim; d++)
                    out[d] += weight * load(tile, value + d, bfloat16);
            }
        }
    }

    const int64_t begin = (int64_t)row * a->heads * dim + head_offset;
    for (int i = 0; i < group * dim; i++) {
        if (bfloat16)
            ((uint16_t *)a->out)[begin + i] = round_to_bfloat16(sum[i]);
        else
            ((float *)a->out)[begin + i] = sum[i];
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
    const int group = a->heads / a->kv_heads;
    int longest = 0, failed = 0;
    for (int row = 0; row < a->rows; row++)
        longest = a->context_lens[row] > longest ? a->context_lens[row] : longest;
#pragma omp parallel
    {
        float *scratch = malloc(sizeof(float) * group * (2 * (size_t)a->head_dim + longest));
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
