// Compresses packed weights: compressed_weight.h draws both forms.
#include <cstdint>
#include <cstring>

namespace {
#include "compressed_weight.h"

constexpr int BLOCKS = 4, NUMBERS = 32; // of a step, and of a block in it

int exponent(uint16_t number) { return number >> 7 & 255; }

// The base of a step's numbers, or AS_IT_IS.
uint16_t base_of(const uint16_t *numbers)
{
    int largest = 0, smallest = 255; // of the exponents that are not 0
    for (int i = 0; i < BLOCKS * NUMBERS; i++) {
        const int e = exponent(numbers[i]), or_none = e ? e : 255;
        largest = e > largest ? e : largest;
        smallest = or_none < smallest ? or_none : smallest;
    }
    return largest - smallest < ZERO_EXPONENT ? (uint16_t)(largest << 7) : AS_IT_IS;
}

void compress_step(const uint16_t *numbers, int base, char *target)
{
    uint16_t lines[3][NUMBERS] = {};
    for (int block = 0; block < BLOCKS; block++)
        for (int lane = 0; lane < NUMBERS; lane++) {
            const uint16_t number = numbers[block * NUMBERS + lane], bits = number & FRACTION_AND_SIGN;
            const int e = exponent(number), distance = e ? (base >> 7) - e : ZERO_EXPONENT;
            lines[0][lane] |= (uint16_t)(distance << (4 * block));
            lines[1 + block / 2][lane] |= block % 2 ? (uint16_t)(bits << 8 | bits >> 8) : bits;
        }
    memcpy(target, lines, sizeof lines);
}
} // namespace

extern "C" {

// The bytes of every group.
void troupe_compressed_sizes(const uint16_t *packed, int64_t groups, int64_t steps, int64_t *sizes, int threads)
{
#pragma omp parallel for num_threads(threads)
    for (int64_t group = 0; group < groups; group++) {
        int64_t bytes = bases_bytes(steps);
        for (int64_t step = 0; step < steps; step++)
            bytes += base_of(packed + (group * steps + step) * BLOCKS * NUMBERS) == AS_IT_IS ? WHOLE_BYTES : COMPRESSED_BYTES;
        sizes[group] = bytes;
    }
}

// Every group goes to its place in `target`, which is zero.
void troupe_compress(const uint16_t *packed, int64_t groups, int64_t steps, const int64_t *places, char *target, int threads)
{
#pragma omp parallel for num_threads(threads)
    for (int64_t group = 0; group < groups; group++) {
        uint16_t *bases = (uint16_t *)(target + places[group]);
        char *at = (char *)bases + bases_bytes(steps);
        for (int64_t step = 0; step < steps; step++) {
            const uint16_t *numbers = packed + (group * steps + step) * BLOCKS * NUMBERS;
            bases[step] = base_of(numbers);
            if (bases[step] == AS_IT_IS) {
                memcpy(at, numbers, WHOLE_BYTES);
                at += WHOLE_BYTES;
            } else {
                compress_step(numbers, bases[step], at);
                at += COMPRESSED_BYTES;
            }
        }
    }
}
}
