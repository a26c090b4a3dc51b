// The rows of x in 8 bits, as the products of quantised_linear.h take them.
//
//     a row    [in_features int8][groups float: scale][groups int32: sum of the group's integers]
//
// A group's scale is its largest magnitude divided by 127, or that of the whole row (ROW_SCALE). Groups are whole
// registers of inputs or not; inputs beyond those of x are zero.

constexpr float SMALLEST_PEAK = 1e-30f; // what is smaller counts as zero, since its inverse might overflow

// Bytes from one row to the next: an odd number of cache lines, so that rows do not fall into the same sets of a cache.
INLINE int64_t quantised_stride(int in_features, int groups)
{
    return (((int64_t)in_features + groups * 8 + 63) / 64 | 1) * 64;
}

INLINE float *row_scales(char *row, int in_features) { return (float *)(row + in_features); }
INLINE const float *row_scales(const char *row, int in_features) { return (const float *)(row + in_features); }

// To nearest, of two the even one, for magnitudes below 2^22: adding 1.5 * 2^23 leaves no bits for fractions.
INLINE signed_bits round_lanes(lanes x)
{
    return (signed_bits)(x + 12582912.0f) - 0x4b400000;
}

// The largest magnitude of `count` floats. NaN if one of them is not finite.
INLINE float peak_of(const float *x, int count)
{
    lanes peak = {}, poison = {};
    for (int i = 0; i < count; i += LANES) {
        const lanes value = count - i >= LANES ? load_lanes(x + i) : load_some(x + i, count - i);
        const lanes magnitude = (lanes)((signed_bits)value & 0x7fffffff);
        peak = select(magnitude > peak, magnitude, peak);
        poison += value * 0.0f;
    }
    float largest = 0;
    for (int lane = 0; lane < LANES; lane++)
        largest = peak[lane] > largest ? peak[lane] : largest;
    return largest + sum_of_lanes(poison);
}

// One row of x, `count` floats followed by zeros up to in_features.
INLINE void quantise_row(const QuantisedLinear &op, const float *x, char *row)
{
    const int groups = op.in_features / op.group_size;
    float *scales = row_scales(row, op.in_features);
    int32_t *sums = (int32_t *)(scales + groups);
    const float whole = op.row_scale ? peak_of(x, op.in_features) : 0;
    for (int group = 0; group < groups; group++) {
        const float *from = x + group * op.group_size;
        int8_t *to = (int8_t *)row + group * op.group_size;
        const float peak = op.row_scale ? whole : peak_of(from, op.group_size);
        const bool zero = peak < SMALLEST_PEAK;
        const float inverse = zero ? 0.0f : 127.0f / peak;
        signed_bits sum = {};
        for (int i = 0; i < op.group_size; i += LANES) {
            const int left = op.group_size - i;
            const lanes value = left >= LANES ? load_lanes(from + i) : load_some(from + i, left);
            const signed_bits rounded = round_lanes(value * inverse);
            const narrow_integers narrow = __builtin_convertvector(rounded, narrow_integers);
            memcpy(to + i, &narrow, left < LANES ? left : LANES);
            sum += rounded;
        }
        scales[group] = zero ? 1.0f : peak / 127.0f;
        int32_t total = 0;
        for (int lane = 0; lane < LANES; lane++)
            total += sum[lane];
        sums[group] = total;
    }
}

// Row `index` of x as floats, in the order of the weight's columns.
template <typename element> INLINE void widen_row(const QuantisedLinear &op, int64_t index, float *wide)
{
    const element *x = (const element *)op.x + index * op.x_stride;
    if (op.order) {
        for (int i = 0; i < op.in_features; i++)
            wide[i] = op.order[i] < 0 ? 0.0f : load(x + op.order[i]);
        return;
    }
    int i = 0;
    for (; i + LANES <= op.x_features; i += LANES)
        store_lanes(wide + i, load_lanes(x + i));
    for (; i < op.in_features; i++)
        wide[i] = i < op.x_features ? load(x + i) : 0.0f;
}
