// What Python and the kernels share: the operations of a decoder and the description of a step.
// kernels/native_library.py mirrors these structs field by field.
//
// A program is a list of operations. Python records it once, with buffers for the largest step, and runs it for every
// step with one call: each operation then works on the step's first `rows` rows. All matrices are row-major; a stride is
// the distance of rows in elements. `bfloat16` is 1 for bfloat16 elements and 0 for float32.
#pragma once
#include <cstdint>

enum Kind : int32_t {
    RMS_NORM,
    LINEAR,
    ROTATE_STORE,
    ATTENTION,
    GATED_ACTIVATION,
    ADD,
    EMBED,
    ROTATION,
    ARGMAX,
    QUANTISED_LINEAR,
    NUM_KINDS,
};

enum Epilogue : int32_t {
    STORE,  // out = y
    ADD_TO, // out += alpha * y
    GATED,  // out = activation(gate) * up, where the packed columns alternate: 32 of the gate, 32 of up
};

enum Activation : int32_t { SILU, GELU, GELU_TANH };

// What a cache holds. With 8 bits, a scale for every KV head of a token: stored_kv.h.
enum Stored : int32_t { AS_COMPUTED, STORED_INT8, STORED_FLOAT8 };

// One step's batch; kernels/attention_metadata.py says what the arrays hold.
struct Step {
    const int64_t *slot_mapping;  // [rows]
    const int32_t *query_start;   // [sequences + 1]
    const int32_t *context_lens;  // [sequences]
    const int32_t *block_tables;  // [sequences, table_width]
    int32_t rows;                 // query tokens
    int32_t sequences;
    int32_t decode_rows;          // the first sequences, which have one query token each
    int32_t table_width;
    int32_t threads;
    const int64_t *tokens;        // [rows], for Embed
    const int64_t *positions;     // [rows], for Rotation
};

struct Operation {
    int32_t kind;
};

// out = x / sqrt(mean(x²) + eps) * weight; in place if out == x. With `gather` row i of x is gather[i].
struct RmsNorm : Operation {
    int32_t bfloat16;
    int32_t width;
    float eps;
    const void *x;
    void *out;
    const float *weight; // [width]
    const int64_t *gather; // [rows] or null
    int64_t x_stride, out_stride;
};

// y = x weightᵀ + bias.
struct Linear : Operation {
    int32_t bfloat16;     // of x and weight
    int32_t compressed;   // the weight is: compressed_weight.h
    int32_t in_features;
    int32_t out_features; // of `out`: with GATED half the columns of the weight
    int32_t epilogue;
    int32_t activation;   // with GATED
    int32_t out_float32;  // out is float32 although x is not
    float alpha;
    const void *x;
    const void *weight;   // packed, see linear.h
    const float *bias;    // [columns of the weight, in whole groups], packed in their order, or null
    void *out;
    int64_t x_stride, out_stride;
};

// The same with a weight of few bits: quantised_linear.h. in_features are those of the weight: whole groups.
struct QuantisedLinear : Linear {
    int32_t bits;            // 4 or 8
    int32_t group_size;      // inputs that share a scale, whole steps
    int32_t scale_kind;      // of the weight's scales
    int32_t zeros;           // whether the groups have zeros of their own
    int32_t row_scale;       // a row of x has one scale for all groups
    int32_t x_features;      // of x, if there is no order; further inputs are zero
    const int32_t *order;    // [in_features]: the inputs in the order of the weight's columns, negative for none; or null
    void *quantised;         // [rows] as quantised_rows.h draws them, aligned to cache lines
};

// Queries and keys are normalised per head (if there are norms) and rotated; queries in place, keys and values go to the
// cache. NaN and infinity are stored in the cache as finite numbers.
struct RotateStore : Operation {
    int32_t bfloat16;
    int32_t heads, kv_heads, head_dim, rotary_dim, block_size;
    float eps;
    void *qkv;                // [rows, heads + 2 * kv_heads, head_dim]
    const float *cos, *sin;   // [rows, rotary_dim / 2]
    const float *query_norm;  // [head_dim] or null
    const float *key_norm;
    void *k_cache, *v_cache;  // [kv_heads, num_blocks, block_size, head_dim]
    int64_t stride, num_blocks;
    float *k_scales, *v_scales; // [kv_heads, num_blocks, block_size], of a cache of 8 bits
    int32_t stored;
};

// out = softmax(softcap(scale * Q Kᵀ) + mask) V, per sequence over its blocks, causally.
struct Attention : Operation {
    int32_t bfloat16;
    int32_t heads, kv_heads, head_dim, block_size;
    int32_t window; // 0: none
    float scale;
    float softcap;  // 0: none
    const void *query; // [rows, heads, head_dim]
    const void *k_cache, *v_cache;
    void *out;         // [rows, heads, head_dim]
    int64_t query_stride, out_stride, num_blocks;
    const float *k_scales, *v_scales; // as for RotateStore
    int32_t stored;
};

// out = activation(gate) * up, x = [gate | up].
struct GatedActivation : Operation {
    int32_t bfloat16;
    int32_t width; // of out
    int32_t activation;
    const void *x;
    void *out;
    int64_t x_stride, out_stride;
};

// out += alpha * x.
struct Add : Operation {
    int32_t bfloat16;
    int32_t width;
    float alpha;
    const void *x;
    void *out;
    int64_t x_stride, out_stride;
};

// out = weight[token] * scale.
struct Embed : Operation {
    int32_t bfloat16;
    int32_t width;
    int32_t packed;       // the weight is packed as for Linear; else its rows lie in order
    int32_t compressed;   // as for Linear
    float scale;
    const void *weight;
    void *out;
    int64_t out_stride;
};

// cos and sin of position * inverse frequency, times factor.
struct Rotation : Operation {
    int32_t width; // rotary_dim / 2
    float factor;
    const float *inverse_frequencies; // [width]
    float *cos, *sin;                 // [rows, width]
};

// out = the index of the largest; of equals the first; the first NaN before all.
struct ArgMax : Operation {
    int32_t width;
    const float *x;
    int64_t *out; // [rows]
    int64_t x_stride;
};
