// A packed bfloat16 weight without the bits that carry nothing: exact, and three quarters of the size.
//
// The weights of a layer are of similar size, so of the eight bits of an exponent hardly three are news. Of the 128 numbers
// of a step of the stream (linear.h) the largest exponent is kept once, its base, and four bits say how far below it each
// number lies: 0 to 14, or 15 for an exponent of 0, which zero has. A step with a number further below stays as it is.
//
//     a weight    [int64: where each group begins, and the end][group] …
//     a group     [uint16 per step: base << 7, or AS_IT_IS][step] …        both parts are whole cache lines
//     a step      three lines of 32 words, or four of the packed numbers:
//                     distances             four bits for each of the four blocks
//                     blocks 0 and 1        sign and fraction: bits 15 and 6 … 0 of block 0's number as they are; block 1's,
//                     blocks 2 and 3        bytes swapped, are the rest
//
// A register of distances, as an index into a table of 16 words, gives the exponents of a block; one further instruction
// puts sign and fraction to them. With few rows that is faster than memory delivers the stream; with many the first tile of
// rows does it for all (linear.h).

constexpr uint16_t AS_IT_IS = 0xffff;
constexpr uint16_t FRACTION_AND_SIGN = 0x807f;
constexpr int ZERO_EXPONENT = 15;
constexpr int COMPRESSED_BYTES = 192, WHOLE_BYTES = 256; // of a step

inline int64_t bases_bytes(int64_t steps) { return (steps * 2 + 63) / 64 * 64; }

// Number `lane` (column × 2 + input) of block `block` of a compressed step.
inline uint16_t compressed_number(const char *step, uint16_t base, int block, int lane)
{
    uint16_t distances, bits;
    memcpy(&distances, step + lane * 2, 2);
    memcpy(&bits, step + 64 + block / 2 * 64 + lane * 2, 2);
    const int distance = distances >> (4 * block) & 15;
    bits = block % 2 ? (uint16_t)(bits << 8 | bits >> 8) : bits;
    const int exponent = distance == ZERO_EXPONENT ? 0 : base - (distance << 7);
    return (uint16_t)((bits & FRACTION_AND_SIGN) | exponent);
}
