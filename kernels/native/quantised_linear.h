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
// A piece is read from memory once. Its groups make chunks; for each the rows pass in tiles, whose integer sums stay in
// registers over a group. With few tiles a chunk is short, so that it is still in the first-level cache when the last tile
// reads it, and every tile fetches a part of what comes next.

constexpr int MIDDLE_TILES = 12;  // up to so many take chunks of one group; with more, arithmetic is the limit
constexpr int STEP_BYTES = 256;
constexpr int CHUNK_BYTES = 8192;
constexpr int FETCHED_AHEAD = 4096; // bytes beyond a chunk
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

// A group's place and size.
struct QuantisedShape {
    int groups, steps, inputs_per_step;
    int64_t group_bytes, piece_bytes;

    explicit QuantisedShape(const QuantisedLinear &op)
        : groups(op.in_features / op.group_size), inputs_per_step(op.bits == 4 ? 8 : 4)
    {
        steps = op.group_size / inputs_per_step;
        group_bytes = (int64_t)steps * STEP_BYTES + GROUP * scale_bytes(op.scale_kind) + (op.zeros ? GROUP : 0);
        piece_bytes = groups * group_bytes;
    }
};

// ROWS rows × one group of a piece: its part of the rows' sums. Every step fetches LINES lines from `ahead` on.
template <int ROWS, int BITS, int LINES>
INLINE void multiply_group(const QuantisedLinear &op, const QuantisedShape &shape, const char *rows, int64_t stride, int group,
                           const char *weight, const char *ahead, lanes *sums)
{
    const char *end = weight + (int64_t)shape.steps * STEP_BYTES, *zeros = end + GROUP * scale_bytes(op.scale_kind);
    const float *scales[ROWS];
    signed_bits products[ROWS][BLOCKS];
    for (int row = 0; row < ROWS; row++) {
        scales[row] = row_scales(rows + row * stride, op.in_features) + group;
        const int32_t sum = ((const int32_t *)scales[row])[shape.groups];
        if (op.zeros)
            for (int block = 0; block < BLOCKS; block++) {
                narrow_unsigned zero;
                memcpy(&zero, zeros + block * LANES, sizeof zero);
                products[row][block] = __builtin_convertvector(zero, signed_bits) * -sum;
            }
        else
            for (int block = 0; block < BLOCKS; block++)
                products[row][block] = signed_bits{} - sum * (1 << (BITS - 1));
    }
    const char *x = rows + group * op.group_size;
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
                weights[block] = (signed_bits)((wide_bits)load_bits(weight + block * sizeof(lanes)) >> 4) & 0x0f0f0f0f;
        }
        for (int row = 0; row < ROWS; row++)
            dot_quads(products[row], weights, x + row * stride + (BITS == 4 ? 4 : 0));
        weight += STEP_BYTES;
        x += BITS == 4 ? 8 : 4;
    };
    // Short loops, as the end of a long one is not foreseen by the processor.
    for (int four = shape.steps / 4; four > 0; four--) {
        run_step();
        run_step();
        run_step();
        run_step();
    }
    while (weight != end)
        run_step();
    lanes scale[BLOCKS];
    for (int block = 0; block < BLOCKS; block++)
        scale[block] = load_scales(end + block * LANES * scale_bytes(op.scale_kind), op.scale_kind);
    for (int row = 0; row < ROWS; row++) {
        const lanes of_row = lanes{} + *scales[row];
        for (int block = 0; block < BLOCKS; block++, sums++) {
            const lanes product = __builtin_convertvector(products[row][block], lanes);
            *sums = multiply_add(product, scale[block] * of_row, group ? *sums : lanes{});
        }
    }
}

// A part of a piece's groups.
struct QuantisedChunk {
    const char *weight;
    int first, end; // groups
};

// ROWS rows, which are in 8 bits, over one chunk.
template <int ROWS, int BITS, int LINES>
static void run_quantised_tile(const QuantisedLinear &op, const QuantisedShape &shape, const char *rows, int64_t stride,
                               const QuantisedChunk &chunk, const char *ahead, lanes *sums)
{
    const char *weight = chunk.weight;
    for (int group = chunk.first; group < chunk.end; group++) {
        multiply_group<ROWS, BITS, LINES>(op, shape, rows, stride, group, weight, ahead, sums);
        weight += shape.group_bytes;
        ahead += (int64_t)shape.steps * LINES * 64;
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

template <int BITS, typename... Arguments>
INLINE void run_quantised_tile(int lines, int rows, const Arguments &...arguments)
{
    switch (lines) {
    case 0: return run_quantised_tile<BITS, 0>(rows, arguments...);
    case 2: return run_quantised_tile<BITS, 2>(rows, arguments...);
    default: return run_quantised_tile<BITS, 4>(rows, arguments...);
    }
}

// All rows from `begin` on × one piece. `next` is the piece that this thread reads afterwards, or null.
template <typename element, int BITS>
INLINE void run_piece(const QuantisedLinear &op, const QuantisedShape &shape, const char *quantised, int64_t stride, int piece,
                      int64_t begin, int rows, const char *next, lanes *sums)
{
    const int tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    const int fitting = (int)(CHUNK_BYTES / shape.group_bytes);
    const int groups = tiles == 1 || tiles > MIDDLE_TILES ? shape.groups : fitting > 1 ? fitting : 1;
    const char *weight = (const char *)op.weight + piece * shape.piece_bytes, *end = weight + shape.piece_bytes;
    for (int first = 0; first < shape.groups; first += groups, weight += groups * shape.group_bytes) {
        const int last = first + groups < shape.groups ? first + groups : shape.groups;
        const QuantisedChunk chunk = {weight, first, last};
        // The first two tiles share the fetching, each half of a step's four lines.
        const int fetching = tiles >= 2 ? 2 : 1, lines = 4 / fetching;
        const char *ahead = weight + FETCHED_AHEAD + (tiles == 1 ? 0 : (last - first) * shape.group_bytes);
        if (ahead >= end)
            ahead = next ? next + (ahead - end) : end;
        for (int tile = 0; tile < tiles; tile++) {
            const int from = (int)((int64_t)rows * tile / tiles), count = (int)((int64_t)rows * (tile + 1) / tiles) - from;
            run_quantised_tile<BITS>(tile < fetching && tiles <= MIDDLE_TILES ? lines : 0, count, op, shape,
                                     quantised + from * stride, stride, chunk, ahead, sums + (int64_t)from * BLOCKS);
            if (last == shape.groups)
                for (int row = from; row < from + count; row++)
                    finish_row<element>(op, begin + row, piece, sums + (int64_t)row * BLOCKS);
            ahead += (int64_t)(last - first) * shape.steps * lines * 64;
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
    const size_t partial_bytes = (size_t)rows * BLOCKS * sizeof(lanes), own_bytes = alone ? step.rows * stride : 0;
    char *memory = worker.scratch<char>(partial_bytes + own_bytes + op.in_features * sizeof(float));
    char *quantised = alone ? memory + partial_bytes : (char *)op.quantised;
    float *wide = (float *)(memory + partial_bytes + own_bytes);

    int claimed = alone ? 0 : worker.claim();
    const int jobs = alone ? 0 : step.rows;
    if (alone && memory)
        for (int row = 0; row < step.rows; row++) {
            widen_row<element>(op, row, wide);
            quantise_row(op, wide, quantised + row * stride);
        }
    for (; claimed < jobs; claimed = worker.claim())
        if (memory) {
            widen_row<element>(op, claimed, wide);
            quantise_row(op, wide, quantised + claimed * stride);
        }
    if (alone)
        claimed = worker.claim();
    else
        worker.meet();
    if (!memory)
        return;
    const int items = pieces * row_blocks;
    for (int item = claimed - jobs, following; item < items; item = following) {
        following = worker.claim() - jobs;
        const int piece = item % pieces, begin = item / pieces * rows, left = step.rows - begin;
        const int count = left < rows ? left : rows;
        const char *next = following < items ? (const char *)op.weight + following % pieces * shape.piece_bytes : nullptr;
        if (op.bits == 4)
            run_piece<element, 4>(op, shape, quantised + begin * stride, stride, piece, begin, count, next, (lanes *)memory);
        else
            run_piece<element, 8>(op, shape, quantised + begin * stride, stride, piece, begin, count, next, (lanes *)memory);
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
