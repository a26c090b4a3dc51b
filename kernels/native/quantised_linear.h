// y = x weightᵀ with a weight of 4 or 8 bits (kernels/quantised_weight.py), for any number of rows.
//
// x is rounded to 8 bits first (quantised_rows.h), every row and group of inputs with a scale of its own. Within a group
// all is integer arithmetic: four products of unsigned weights and signed inputs at a time. The weights' zero is taken
// off once per group, as zero × the sum of the inputs; then one multiplication with both scales makes floats of it.
//
//     columns of y   [ 0 … 63 ][ 64 … 127 ] …          a piece: four blocks of 16 columns, as in linear.h
//     a piece        [group of inputs] …
//     a group        [step] … [64 scales][64 zeros, one byte each, if there are any]
//     a step         4 bits: [4 blocks][16 columns][4 bytes]: inputs 0 … 3 in the low halves, 4 … 7 in the high ones
//                    8 bits: [4 blocks][16 columns][4 bytes]: inputs 0 … 3
//
// A piece is read from memory once, in chunks that fit into the second-level cache beside the chunk that is fetched
// meanwhile; for each the rows pass in tiles, whose integer sums stay in registers over a group. A single tile reads the
// stream as fast as memory gives it: the processor foresees it, and a thread takes several pieces in a row. Of several
// tiles, the first two ask for the next chunk. With many, the halves of bytes are taken apart once for all
// (docs/decisions.md has what was measured).

constexpr int STEP_BYTES = 256;
constexpr int CHUNK_BYTES = 128 * 1024; // with a byte per weight
constexpr int MANY_TILES = 4;           // from so many on, 4 bits are unpacked before
constexpr int FETCHING_TILES = 2, FETCHED_LINES = 2; // of each step's four
constexpr int ROWS_QUANTISED_TWICE = 2; // up to so many every thread quantises for itself, which is faster than to meet

enum ScaleKind : int32_t { SCALE_FLOAT32, SCALE_BFLOAT16, SCALE_FLOAT16 };

INLINE int scale_bytes(int kind) { return kind == SCALE_FLOAT32 ? 4 : 2; }

// Sixteen scales.
INLINE lanes load_scales(const char *from, int kind)
{
    if (kind == SCALE_FLOAT32)
        return load_lanes((const float *)from);
    if (kind == SCALE_BFLOAT16)
        return load_lanes((const uint16_t *)from);
    // Exponent and fraction of float16 moved to where float32 has them make numbers 2^112 too small.
    narrow_bits narrow;
    memcpy(&narrow, from, sizeof narrow);
    const wide_bits wide = widen_lanes(narrow);
    const lanes magnitude = (lanes)((wide & 0x7fff) << 13) * 0x1p112f;
    return (lanes)((wide_bits)magnitude | (wide & 0x8000) << 16);
}

// Sizes of a group and a piece.
struct QuantisedShape {
    int groups, steps; // of a piece, of a group
    int64_t group_bytes, piece_bytes;

    explicit QuantisedShape(const QuantisedLinear &op) : groups(op.in_features / op.group_size)
    {
        steps = op.group_size / (op.bits == 4 ? 8 : 4);
        group_bytes = (int64_t)steps * STEP_BYTES + GROUP * scale_bytes(op.scale_kind) + (op.zeros ? GROUP : 0);
        piece_bytes = groups * group_bytes;
    }
};

// Some groups of a piece, as tiles read them.
struct QuantisedChunk {
    int first, end;      // groups
    const char *weights; // the first step
    int64_t group_bytes; // from a group's steps to the next one's
    int steps;           // of a group
    const char *scales;  // of the first group, followed by its zeros
    int64_t scale_bytes; // from a group's scales to the next one's
};

// ROWS rows, which are in 8 bits, × one chunk, added to their sums. Every step fetches LINES lines from `ahead` on.
template <int ROWS, int BITS, int LINES>
static void run_quantised_tile(const QuantisedLinear &op, int groups, const char *rows, int64_t stride,
                               const QuantisedChunk &chunk, const char *ahead, lanes *sums)
{
    const char *x = rows + chunk.first * op.group_size, *weight = chunk.weights, *scales = chunk.scales;
    const float *row_scale = row_scales(rows, op.in_features) + chunk.first;
    const int64_t scale_stride = stride / sizeof(float);
    for (int group = chunk.first; group < chunk.end; group++) {
        signed_bits products[ROWS][BLOCKS];
        for (int row = 0; row < ROWS; row++) {
            const signed_bits offset = signed_bits{} + ((const int32_t *)row_scale)[row * scale_stride + groups];
            for (int block = 0; block < BLOCKS; block++)
                products[row][block] = offset;
            if (op.zeros)
                for (int block = 0; block < BLOCKS; block++) {
                    narrow_unsigned zero;
                    memcpy(&zero, scales + GROUP * scale_bytes(op.scale_kind) + block * LANES, sizeof zero);
                    products[row][block] *= __builtin_convertvector(zero, signed_bits);
                }
        }
        const auto run_step = [&]() __attribute__((always_inline)) {
            for (int line = 0; line < LINES; line++)
                __builtin_prefetch(ahead + line * 64, 0, 2);
            ahead += LINES * 64;
            signed_bits weights[BLOCKS];
            for (int block = 0; block < BLOCKS; block++)
                weights[block] = load_bits(weight + block * sizeof(lanes));
            if (BITS == 4) {
                for (int block = 0; block < BLOCKS; block++)
                    weights[block] &= 0x0f0f0f0f;
                for (int row = 0; row < ROWS; row++)
                    dot_quads(products[row], weights, x + row * stride);
                asm volatile("" ::: "memory"); // or both halves would be unpacked first, and sums leave the registers for it
                for (int block = 0; block < BLOCKS; block++)
                    weights[block] = upper_half(load_bits(weight + block * sizeof(lanes)));
            }
            for (int row = 0; row < ROWS; row++)
                dot_quads(products[row], weights, x + row * stride + (BITS == 4 ? 4 : 0));
            weight += STEP_BYTES;
            x += BITS == 4 ? 8 : 4;
        };
        // A short loop, as the end of a long one is not foreseen by the processor.
        for (int four = chunk.steps / 4; four > 0; four--) {
            run_step();
            run_step();
            run_step();
            run_step();
        }
        for (int step = chunk.steps % 4; step > 0; step--)
            run_step();
        weight += chunk.group_bytes - (int64_t)chunk.steps * STEP_BYTES;
        lanes scale[BLOCKS];
        for (int block = 0; block < BLOCKS; block++)
            scale[block] = load_scales(scales + block * LANES * scale_bytes(op.scale_kind), op.scale_kind);
        for (int row = 0; row < ROWS; row++) {
            const lanes of_row = lanes{} + row_scale[row * scale_stride];
            for (int block = 0; block < BLOCKS; block++) {
                lanes *sum = sums + row * BLOCKS + block;
                const lanes product = __builtin_convertvector(products[row][block], lanes);
                *sum = multiply_add(product, scale[block] * of_row, group ? *sum : lanes{});
            }
        }
        scales += chunk.scale_bytes;
        row_scale++;
    }
}

template <int BITS, int LINES, typename... Arguments>
INLINE void run_quantised_tile(int rows, const Arguments &...arguments)
{
    switch (rows) {
    case 1: return run_quantised_tile<1, BITS, LINES>(arguments...);
#if NATIVE_AVX512
    case 3: return run_quantised_tile<3, BITS, LINES>(arguments...);
    case 4: return run_quantised_tile<4, BITS, LINES>(arguments...);
    case 5: return run_quantised_tile<5, BITS, LINES>(arguments...);
    case 6: return run_quantised_tile<6, BITS, LINES>(arguments...);
#endif
    default: return run_quantised_tile<2, BITS, LINES>(arguments...);
    }
}

template <typename... Arguments> INLINE void run_quantised_tile(int bits, bool fetching, const Arguments &...arguments)
{
    if (bits == 4)
        fetching ? run_quantised_tile<4, FETCHED_LINES>(arguments...) : run_quantised_tile<4, 0>(arguments...);
    else
        fetching ? run_quantised_tile<8, FETCHED_LINES>(arguments...) : run_quantised_tile<8, 0>(arguments...);
}

// The steps of a chunk of 4 bits with a byte per weight.
INLINE QuantisedChunk unpack(const QuantisedChunk &chunk, char *unpacked)
{
    QuantisedChunk wide = chunk;
    wide.weights = unpacked;
    wide.steps = 2 * chunk.steps;
    wide.group_bytes = (int64_t)wide.steps * STEP_BYTES;
    const char *weight = chunk.weights;
    for (int group = chunk.first; group < chunk.end; group++, weight += chunk.group_bytes)
        for (int at = 0; at < chunk.steps * STEP_BYTES; at += STEP_BYTES, unpacked += 2 * STEP_BYTES)
            for (int block = 0; block < BLOCKS; block++) {
                const int place = block * sizeof(lanes);
                const signed_bits halves = load_bits(weight + at + place);
                const signed_bits low = halves & 0x0f0f0f0f, high = upper_half(halves);
                memcpy(unpacked + place, &low, sizeof low);
                memcpy(unpacked + STEP_BYTES + place, &high, sizeof high);
            }
    return wide;
}

// Groups of a chunk: as even as possible.
INLINE int groups_of_chunk(const QuantisedLinear &op, const QuantisedShape &shape)
{
    const int most = CHUNK_BYTES / (op.group_size * GROUP), fitting = most ? most : 1;
    const int chunks = (shape.groups + fitting - 1) / fitting;
    return (shape.groups + chunks - 1) / chunks;
}

// All rows from `begin` on × one piece. `next` is the piece that this thread reads afterwards, or null.
template <typename element>
INLINE void run_piece(const QuantisedLinear &op, const QuantisedShape &shape, const char *quantised, int64_t stride, int piece,
                      int64_t begin, int rows, const char *next, char *unpacked, lanes *sums)
{
    const int tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, groups = groups_of_chunk(op, shape);
    const bool unpacks = op.bits == 4 && tiles >= MANY_TILES;
    const char *weight = (const char *)op.weight + piece * shape.piece_bytes;
    for (int first = 0; first < shape.groups; first += groups, weight += groups * shape.group_bytes) {
        const int end = first + groups < shape.groups ? first + groups : shape.groups;
        QuantisedChunk chunk = {first, end, weight, shape.group_bytes, shape.steps, weight + shape.steps * (int64_t)STEP_BYTES,
                                shape.group_bytes};
        if (unpacks)
            chunk = unpack(chunk, unpacked);
        // Every tile that fetches has as many lines as its steps ask for.
        const int64_t fetched = (int64_t)(end - first) * chunk.steps * FETCHED_LINES * 64;
        const char *ahead = end < shape.groups ? weight + groups * shape.group_bytes : next;
        for (int tile = 0; tile < tiles; tile++) {
            const int from = (int)((int64_t)rows * tile / tiles), count = (int)((int64_t)rows * (tile + 1) / tiles) - from;
            const bool fetching = tiles > 1 && tile < (unpacks ? 1 : FETCHING_TILES) && ahead;
            run_quantised_tile(unpacks ? 8 : op.bits, fetching, count, op, shape.groups, quantised + from * stride, stride,
                               chunk, ahead ? ahead + tile * fetched : weight, sums + (int64_t)from * BLOCKS);
            if (end == shape.groups)
                for (int row = from; row < from + count; row++)
                    finish_row<element>(op, begin + row, piece, sums + (int64_t)row * BLOCKS);
        }
    }
}

template <typename element> INLINE void run_quantised(const QuantisedLinear &op, const Step &step, Worker &worker)
{
    constexpr int half = GROUP / 2;
    const QuantisedShape shape(op);
    const int pieces = op.epilogue == GATED ? (op.out_features + half - 1) / half : (op.out_features + GROUP - 1) / GROUP;
    const int row_blocks = (step.rows + ROW_BLOCK - 1) / ROW_BLOCK;
    const int rows = row_blocks ? (step.rows + row_blocks - 1) / row_blocks : 0;
    const int64_t stride = quantised_stride(op.in_features, shape.groups);
    const bool alone = step.rows <= ROWS_QUANTISED_TWICE;
    // The thread's own memory: sums, an unpacked chunk, rows in 8 bits if it is alone, and a row of floats.
    const size_t sum_bytes = (size_t)rows * BLOCKS * sizeof(lanes);
    const size_t chunk_bytes = (size_t)groups_of_chunk(op, shape) * op.group_size * GROUP;
    const size_t own_bytes = alone ? step.rows * stride : 0;
    char *memory = worker.scratch<char>(sum_bytes + chunk_bytes + own_bytes + op.in_features * sizeof(float));
    char *unpacked = memory + sum_bytes, *own = unpacked + chunk_bytes;
    char *quantised = alone ? own : (char *)op.quantised;
    float *wide = (float *)(own + own_bytes);

    int claimed = alone ? 0 : worker.claim();
    const int jobs = alone ? 0 : step.rows;
    if (alone && memory)
        for (int row = 0; row < step.rows; row++)
            quantise<element>(op, row, wide, quantised + row * stride);
    for (; claimed < jobs; claimed = worker.claim())
        if (memory)
            quantise<element>(op, claimed, wide, quantised + claimed * stride);
    if (!alone)
        worker.meet();
    if (!memory)
        return;
    const int items = jobs + pieces * row_blocks;
    const int longest = rows <= TILE_ROWS ? items : 1;
    Worker::Run run = alone ? worker.claim_run(items, longest) : Worker::Run{claimed, claimed + 1};
    const auto next_item = [&] {
        if (run.first == run.end)
            run = worker.claim_run(items, longest);
        return run.first < run.end ? run.first++ : items;
    };
    for (int current = next_item(), following; current < items; current = following) {
        following = next_item();
        const int item = current - jobs;
        const int piece = item % pieces, begin = item / pieces * rows, left = step.rows - begin;
        const int count = left < rows ? left : rows;
        const int64_t next_at = (following - jobs) % pieces * shape.piece_bytes;
        const char *next = following < items ? (const char *)op.weight + next_at : nullptr;
        run_piece<element>(op, shape, quantised + begin * stride, stride, piece, begin, count, next, unpacked, (lanes *)memory);
    }
}

static void quantised_linear(const Operation &operation, const Step &step, Worker &worker)
{
    const QuantisedLinear &op = static_cast<const QuantisedLinear &>(operation);
    if (op.bfloat16)
        run_quantised<uint16_t>(op, step, worker);
    else
        run_quantised<float>(op, step, worker);
}
