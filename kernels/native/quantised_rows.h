// The rows of x in 8 bits, as the products of quantised_linear.h take them.
//
//     a row    [in_features int8][groups float: scale][groups int32: offset]
//
// An offset is the negative sum of the group's integers, times the weights' zero where they all have the same. A group's
// scale is its largest magnitude divided by 127, or that of the whole row (ROW_SCALE). Groups are whole
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

// Lane by lane in halves, down to one.
INLINE float largest_of_lanes(lanes values)
{
    half_lanes half[2];
    memcpy(half, &values, sizeof half);
    const half_lanes eight = half[0] > half[1] ? half[0] : half[1];
    quarter_lanes quarter[2];
    memcpy(quarter, &eight, sizeof quarter);
    const quarter_lanes four = quarter[0] > quarter[1] ? quarter[0] : quarter[1];
    const float a = four[0] > four[2] ? four[0] : four[2], b = four[1] > four[3] ? four[1] : four[3];
    return a > b ? a : b;
}

INLINE int32_t sum_of_lanes(signed_bits values)
{
    half_integers half[2];
    memcpy(half, &values, sizeof half);
    half[0] += half[1];
    quarter_integers quarter[2];
    memcpy(quarter, half, sizeof quarter);
    quarter[0] += quarter[1];
    return (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
}

// The largest magnitude of `count` inputs. NaN if one of them is not finite.
template <typename element> INLINE float peak_of(const element *x, int count)
{
    lanes peak = {}, poison = {};
    int i = 0;
    const auto take = [&](lanes value) __attribute__((always_inline)) {
        const lanes magnitude = (lanes)((signed_bits)value & 0x7fffffff);
        peak = magnitude > peak ? magnitude : peak;
        poison += value * 0.0f;
    };
    for (; i + LANES <= count; i += LANES)
        take(load_lanes(x + i));
    if (i < count)
        take(load_some(x + i, count - i));
    return largest_of_lanes(peak) + sum_of_lanes(poison);
}

// One row of in_features inputs.
template <typename element> INLINE void quantise_row(const QuantisedLinear &op, const element *x, char *row)
{
    const int groups = op.in_features / op.group_size;
    float *scales = row_scales(row, op.in_features);
    int32_t *offsets = (int32_t *)(scales + groups);
    const int zero_factor = op.zeros ? 1 : 1 << (op.bits - 1);
    const float whole = op.row_scale ? peak_of(x, op.in_features) : 0;
    for (int group = 0; group < groups; group++) {
        const element *from = x + group * op.group_size;
        int8_t *to = (int8_t *)row + group * op.group_size;
        const float peak = op.row_scale ? whole : peak_of(from, op.group_size);
        const bool zero = peak < SMALLEST_PEAK;
        const float inverse = zero ? 0.0f : 127.0f / peak;
        signed_bits sum = {};
        const auto round = [&](lanes value) __attribute__((always_inline)) {
            const signed_bits rounded = round_lanes(value * inverse);
            sum += rounded;
            return __builtin_convertvector(rounded, narrow_integers);
        };
        int i = 0;
        for (; i + LANES <= op.group_size; i += LANES) {
            const narrow_integers narrow = round(load_lanes(from + i));
            memcpy(to + i, &narrow, sizeof narrow);
        }
        if (i < op.group_size) {
            const narrow_integers narrow = round(load_some(from + i, op.group_size - i));
            memcpy(to + i, &narrow, op.group_size - i);
        }
        scales[group] = zero ? 1.0f : peak / 127.0f;
        offsets[group] = -sum_of_lanes(sum) * zero_factor;
    }
}

// Row `index` of x in 8 bits; `wide` [in_features] is where its inputs are put into the order of the weight's columns, or
// zeros behind them.
template <typename element> INLINE void quantise(const QuantisedLinear &op, int64_t index, float *wide, char *row)
{
    const element *x = (const element *)op.x + index * op.x_stride;
    if (!op.order && op.x_features == op.in_features) {
        quantise_row(op, x, row);
        return;
    }
    for (int i = 0; i < op.in_features; i++) {
        const int input = op.order ? op.order[i] : i < op.x_features ? i : -1;
        wide[i] = input < 0 ? 0.0f : load(x + input);
    }
    quantise_row(op, (const float *)wide, row);
}
