// y = x weightᵀ on a weight that was packed once (kernels/packed_weight.py), for any number of rows.
//
//     columns of y   [ 0 … 63 ][ 64 … 127 ] …           a group: four blocks of 16 columns
//     a group        bfloat16: [in / 2][4 blocks][16 columns][2 consecutive inputs]
//                    float32:  [in][4 blocks][16 columns]
//
// A group is one contiguous stream that is read from memory once, in chunks that fit into the second-level cache beside
// the chunk that is fetched meanwhile. For each chunk the rows of x pass in tiles: a tile's sums, up to TILE_ROWS × 4
// blocks, stay in registers over the whole chunk; every weight vector is loaded once per tile, every input is broadcast.
// A sum runs over the inputs in their order whatever the number of rows, threads or chunks, so a row's result does not
// depend on what else is in the batch.
//
// bfloat16 weights may be compressed: the stream then lies as compressed_weight.h draws it, and is unpacked in registers.
//
// How to fetch depends on the number of tiles (measured in docs/decisions.md). One tile reads the stream as fast as memory
// gives it: the processor foresees it, and a request a little ahead is all that helps. With a few tiles memory must work
// while the later ones compute: both ask for the next chunk, which is small, for the processor has but two dozen requests
// in flight. With many tiles arithmetic is the limit, and long chunks save the sums' way to memory and back.
//
// Columns past the last are zeros in the weight and not written, and an odd last input meets a zero.

constexpr int BLOCKS = 4;
constexpr int GROUP = BLOCKS * LANES;
constexpr int ROW_BLOCK = 384;                     // rows of an item, so that few groups make enough items for all threads
constexpr int LONG_CHUNK = 768;                    // steps of the stream: 256 bytes each, 192 if compressed
constexpr int SHORT_CHUNK = 64, SHORT_COMPRESSED_CHUNK = 256;
constexpr int FEW_TILES = 3;                       // up to so many take short chunks
constexpr int AHEAD = 1024;                        // bytes that one tile asks ahead
#if NATIVE_AVX512
constexpr int TILE_ROWS = 6;
#else
constexpr int TILE_ROWS = 2;
#endif

// Inputs of one row, two bfloat16 or one float32 at a time.
INLINE uint32_t input_pair(const uint16_t *x)
{
    uint32_t pair;
    memcpy(&pair, x, 4);
    return pair;
}

template <typename element> constexpr int PER_STEP = sizeof(element) == 2 ? 2 : 1; // inputs of a step of the stream

// Not a memcpy to its place: that would keep all weights in memory.
INLINE signed_bits load_bits(const void *from)
{
    signed_bits bits;
    memcpy(&bits, from, sizeof bits);
    return bits;
}

// A step's weights; `weight` moves on to the next step.
template <bool COMPRESSED> INLINE void load_step(signed_bits (&weights)[BLOCKS], const char *&weight, const uint16_t *base)
{
    if (COMPRESSED && __builtin_expect(*base != AS_IT_IS, 1)) {
#if NATIVE_BFLOAT16
        alignas(64) static const uint16_t distances[32] = {
            0,       1 << 7,  2 << 7,  3 << 7,  4 << 7,  5 << 7,  6 << 7,  7 << 7,  8 << 7,  9 << 7, 10 << 7,
            11 << 7, 12 << 7, 13 << 7, 14 << 7, 0,       0,       1 << 7,  2 << 7,  3 << 7,  4 << 7, 5 << 7,
            6 << 7,  7 << 7,  8 << 7,  9 << 7,  10 << 7, 11 << 7, 12 << 7, 13 << 7, 14 << 7, 0};
        // The index has five bits, the fifth is the next distance's: the table's halves are alike.
        const __m512i table = _mm512_maskz_sub_epi16(0x7fff7fff, _mm512_set1_epi16((short)*base),
                                                     _mm512_load_si512(distances));
        const __m512i swapped = _mm512_set4_epi32(0x0e0f0c0d, 0x0a0b0809, 0x06070405, 0x02030001);
        const __m512i kept = _mm512_set1_epi16((short)FRACTION_AND_SIGN), step = _mm512_load_si512(weight);
        for (int block = 0; block < BLOCKS; block++) {
            __m512i bits = _mm512_load_si512(weight + 64 + block / 2 * 64);
            if (block % 2)
                bits = _mm512_shuffle_epi8(bits, swapped);
            const __m512i exponents = _mm512_permutexvar_epi16(_mm512_srli_epi16(step, 4 * block), table);
            weights[block] = (signed_bits)_mm512_ternarylogic_epi64(exponents, bits, kept, 0xf8); // a | (b & c)
        }
#else
        for (int block = 0; block < BLOCKS; block++) {
            uint16_t numbers[2 * LANES];
            for (int lane = 0; lane < 2 * LANES; lane++)
                numbers[lane] = compressed_number(weight, *base, block, lane);
            weights[block] = load_bits(numbers);
        }
#endif
        weight += COMPRESSED_BYTES;
    } else {
        for (int block = 0; block < BLOCKS; block++)
            weights[block] = load_bits(weight + block * sizeof(lanes));
        weight += WHOLE_BYTES;
    }
}

// One step of the stream: every row's sums += its inputs × the weights of all blocks.
template <int ROWS, typename element>
INLINE void multiply_step(lanes (&sums)[ROWS][BLOCKS], const element *x, int64_t stride,
                          const signed_bits (&weights)[BLOCKS], bool odd)
{
    for (int row = 0; row < ROWS; row++) {
        const element *input = x + row * stride;
        if constexpr (sizeof(element) == 2) {
            const uint32_t pair = odd ? *input : input_pair(input);
            for (int block = 0; block < BLOCKS; block++)
                sums[row][block] = dot_pairs(sums[row][block], weights[block], pair);
        } else
            for (int block = 0; block < BLOCKS; block++)
                sums[row][block] += (lanes)weights[block] * *input;
    }
}

INLINE lanes activate(lanes x, int activation)
{
    switch (activation) {
    case SILU:
        return x / (1.0f + exp_lanes(-x));
    case GELU_TANH: { // 0.5 (1 + tanh u) = 1 / (1 + e^-2u)
        const lanes u = 0.7978845608f * (x + 0.044715f * x * x * x);
        return x / (1.0f + exp_lanes(-2.0f * u));
    }
    default: {
        lanes result;
        for (int lane = 0; lane < LANES; lane++)
            result[lane] = 0.5f * x[lane] * (1.0f + erff(x[lane] * 0.70710678f));
        return result;
    }
    }
}

// What becomes of 16 sums of one row, at columns [column, column + count) of `out`.
template <typename target> INLINE void finish(target *out, lanes y, int count, bool add, float alpha)
{
    if (count >= LANES)
        store_lanes(out, add ? load_lanes(out) + alpha * y : y);
    else if (count > 0)
        store_some(out, add ? load_some(out, count) + alpha * y : y, count);
}

template <typename element> INLINE void finish_row(const Linear &op, int64_t row, int group, lanes *sums)
{
    if (op.bias)
        for (int block = 0; block < BLOCKS; block++)
            sums[block] += load_lanes(op.bias + group * GROUP + block * LANES);
    if (op.epilogue == GATED) {
        for (int block = 0; block < BLOCKS / 2; block++) {
            const int at = group * (GROUP / 2) + block * LANES;
            const lanes y = activate(sums[block], op.activation) * sums[BLOCKS / 2 + block];
            finish((element *)op.out + row * op.out_stride + at, y, op.out_features - at, false, 1.0f);
        }
        return;
    }
    for (int block = 0; block < BLOCKS; block++) {
        const int at = group * GROUP + block * LANES, count = op.out_features - at;
        if (op.out_float32)
            finish((float *)op.out + row * op.out_stride + at, sums[block], count, op.epilogue == ADD_TO, op.alpha);
        else
            finish((element *)op.out + row * op.out_stride + at, sums[block], count, op.epilogue == ADD_TO, op.alpha);
    }
}

// The stream of a group, and how its inputs are cut into chunks for `rows` rows.
template <typename element> struct Stream {
    const uint16_t *bases = nullptr; // if it is compressed
    const char *begin, *weight;      // where to fetch from; the first step
    int tiles, chunks, inputs;       // inputs of a chunk; the last has what is left

    Stream(const Linear &op, int group, int rows)
    {
        const int steps = (op.in_features + PER_STEP<element> - 1) / PER_STEP<element>;
        begin = weight = (const char *)op.weight + (int64_t)group * steps * WHOLE_BYTES;
        if (op.compressed) {
            begin = (const char *)op.weight + ((const int64_t *)op.weight)[group];
            bases = (const uint16_t *)begin;
            weight = begin + bases_bytes(steps);
        }
        tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
        const int few = op.compressed ? SHORT_COMPRESSED_CHUNK : SHORT_CHUNK;
        const int most = tiles == 1 ? steps : tiles <= FEW_TILES ? few : LONG_CHUNK;
        chunks = (steps + most - 1) / most;
        inputs = (steps + chunks - 1) / chunks * PER_STEP<element>;
    }
};

// A part of a group's stream.
struct Chunk {
    const char *weight;
    const uint16_t *bases; // if it is compressed
    int first, inputs;     // of x
    bool begins, ends;     // the sums
};

enum Reading { PLAIN, COMPRESSED, UNPACKING };
// UNPACKING: as COMPRESSED, and write the steps as they were before, for the tiles that follow.

// ROWS rows from `row` on over one chunk. Every step fetches LINES lines of 64 bytes, one step after the other from `ahead`
// on, or AHEAD of where it reads. `partial` holds the rows' sums between chunks. Returns where the chunk ends.
template <int ROWS, int LINES, Reading READING, typename element>
static const char *run_tile(const Linear &op, int64_t row, int group, const Chunk &chunk, const char *ahead, lanes *partial,
                            char *unpacked)
{
    lanes sums[ROWS][BLOCKS];
    for (int r = 0; r < ROWS; r++)
        for (int block = 0; block < BLOCKS; block++)
            sums[r][block] = chunk.begins ? lanes{} : partial[r * BLOCKS + block];
    const element *x = (const element *)op.x + row * op.x_stride + chunk.first;
    const char *weight = chunk.weight;
    const uint16_t *base = chunk.bases;
    const auto run_step = [&](bool odd) __attribute__((always_inline)) {
        const char *fetched = READING == COMPRESSED ? weight + AHEAD : ahead;
        for (int line = 0; line < LINES; line++)
            __builtin_prefetch(fetched + line * 64, 0, 2);
        ahead += LINES * 64;
        signed_bits weights[BLOCKS];
        load_step<READING != PLAIN>(weights, weight, base);
        if (READING == UNPACKING)
            for (int block = 0; block < BLOCKS; block++, unpacked += sizeof(lanes))
                memcpy(unpacked, &weights[block], sizeof(lanes));
        multiply_step(sums, x, op.x_stride, weights, odd);
        x += PER_STEP<element>;
        base++;
    };
    for (int step = chunk.inputs / PER_STEP<element>; step > 0; step--)
        run_step(false);
    if (chunk.inputs % PER_STEP<element>)
        run_step(true);
    if (chunk.ends)
        for (int r = 0; r < ROWS; r++)
            finish_row<element>(op, row + r, group, sums[r]);
    else
        for (int r = 0; r < ROWS; r++)
            for (int block = 0; block < BLOCKS; block++)
                partial[r * BLOCKS + block] = sums[r][block];
    return weight;
}

template <int LINES, Reading READING, typename element>
INLINE const char *run_tile(int rows, const Linear &op, int64_t row, int group, const Chunk &chunk, const char *ahead,
                            lanes *partial, char *unpacked)
{
    switch (rows) {
    case 1: return run_tile<1, LINES, READING, element>(op, row, group, chunk, ahead, partial, unpacked);
#if NATIVE_AVX512
    case 3: return run_tile<3, LINES, READING, element>(op, row, group, chunk, ahead, partial, unpacked);
    case 4: return run_tile<4, LINES, READING, element>(op, row, group, chunk, ahead, partial, unpacked);
    case 5: return run_tile<5, LINES, READING, element>(op, row, group, chunk, ahead, partial, unpacked);
    case 6: return run_tile<6, LINES, READING, element>(op, row, group, chunk, ahead, partial, unpacked);
#endif
    default: return run_tile<2, LINES, READING, element>(op, row, group, chunk, ahead, partial, unpacked);
    }
}

// A single tile fetches all lines of a step; of several tiles none fetches more than two.
template <Reading READING, typename element>
INLINE const char *run_tile(int lines, int rows, const Linear &op, int64_t row, int group, const Chunk &chunk,
                            const char *ahead, lanes *partial, char *unpacked)
{
    constexpr int all = (READING == COMPRESSED ? COMPRESSED_BYTES : WHOLE_BYTES) / 64;
    if constexpr (READING != UNPACKING) // which is done for others only
        if (lines == all)
            return run_tile<all, READING, element>(rows, op, row, group, chunk, ahead, partial, unpacked);
    if constexpr (READING != COMPRESSED) // which a single tile does only
        switch (lines) {
        case 0: return run_tile<0, READING, element>(rows, op, row, group, chunk, ahead, partial, unpacked);
        case 1: return run_tile<1, READING, element>(rows, op, row, group, chunk, ahead, partial, unpacked);
        case 2: return run_tile<2, READING, element>(rows, op, row, group, chunk, ahead, partial, unpacked);
        }
    __builtin_unreachable();
}

// `next` is what this thread reads after this stream, or null.
template <typename element>
INLINE void run_item(const Linear &op, const Stream<element> &stream, int group, int64_t begin, int rows, const char *next,
                     lanes *partial, char *unpacked)
{
    const int tiles = stream.tiles, all = (stream.bases ? COMPRESSED_BYTES : WHOLE_BYTES) / 64;
    const int fetching = tiles < all ? tiles : all; // the first tiles share the fetching of the next chunk
    const char *weight = stream.weight;
    for (int index = 0; index < stream.chunks; index++) {
        const int first = index * stream.inputs, left = op.in_features - first;
        Chunk chunk = {weight, stream.bases, first, left < stream.inputs ? left : stream.inputs, index == 0,
                       index == stream.chunks - 1};
        if (stream.bases)
            chunk.bases += first / PER_STEP<element>;
        const int64_t column = (int64_t)(chunk.inputs / PER_STEP<element>) * 64; // bytes if every step fetches one line
        const char *ahead = tiles == 1 ? weight + AHEAD : chunk.ends ? next : weight + column * all;
        for (int tile = 0; tile < tiles; tile++) {
            const int from = (int)((int64_t)rows * tile / tiles), count = (int)((int64_t)rows * (tile + 1) / tiles) - from;
            const int lines = tile < fetching && ahead ? all / fetching + (tile < all % fetching) : 0;
            lanes *sums = partial + (int64_t)from * BLOCKS;
            if (sizeof(element) == 2 && stream.bases && tile == 0) {
                if (tiles == 1)
                    weight = run_tile<COMPRESSED, uint16_t>(lines, count, op, begin, group, chunk, ahead, sums, nullptr);
                else
                    weight = run_tile<UNPACKING, uint16_t>(lines, count, op, begin, group, chunk, ahead, sums, unpacked);
                chunk.weight = unpacked;
            } else {
                const char *end = run_tile<PLAIN, element>(lines, count, op, begin + from, group, chunk, ahead, sums, nullptr);
                if (!stream.bases)
                    weight = end;
            }
            ahead += lines * column;
        }
    }
}

template <typename element> INLINE void run_linear(const Linear &op, const Step &step, Worker &worker)
{
    constexpr int half = GROUP / 2;
    const int groups = op.epilogue == GATED ? (op.out_features + half - 1) / half : (op.out_features + GROUP - 1) / GROUP;
    const int row_blocks = (step.rows + ROW_BLOCK - 1) / ROW_BLOCK;
    const int rows = row_blocks ? (step.rows + row_blocks - 1) / row_blocks : 0;
    const size_t partial_bytes = (size_t)rows * BLOCKS * sizeof(lanes);
    char *memory = worker.scratch<char>(partial_bytes + (op.compressed ? LONG_CHUNK * WHOLE_BYTES : 0));
    if (!memory)
        return;
    const int items = groups * row_blocks;
    for (int item = worker.claim(), following; item < items; item = following) {
        following = worker.claim();
        const int group = item % groups, begin = item / groups * rows;
        const int left = step.rows - begin;
        const int count = left < rows ? left : rows;
        const char *next = following < items ? Stream<element>(op, following % groups, rows).begin : nullptr;
        run_item(op, Stream<element>(op, group, count), group, begin, count, next, (lanes *)memory, memory + partial_bytes);
    }
}

static void linear(const Operation &operation, const Step &step, Worker &worker)
{
    const Linear &op = static_cast<const Linear &>(operation);
    if (op.bfloat16)
        run_linear<uint16_t>(op, step, worker);
    else
        run_linear<float>(op, step, worker);
}
