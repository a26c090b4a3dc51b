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
// How to fetch depends on the number of tiles (measured in docs/decisions.md). One tile reads the stream as fast as memory
// gives it: the processor foresees it, and a request a little ahead is all that helps. With a few tiles memory must work
// while the later ones compute: all of them ask for the next chunk, which is small, for the processor has but two dozen
// requests in flight. With many tiles arithmetic is the limit, and long chunks save the sums' way to memory and back.
//
// Widths that are not whole: the last group may have fewer blocks, columns past the last are zeros in the weight and not
// written, and an odd last input meets a zero.

constexpr int BLOCKS = 4;
constexpr int GROUP = BLOCKS * LANES;
constexpr int ROW_BLOCK = 384;           // rows of an item, so that few groups make enough items for all threads
constexpr int LONG_CHUNK = 192 * 1024, SHORT_CHUNK = 16 * 1024; // bytes of the stream
constexpr int FEW_TILES = 3;                                    // up to so many take short chunks
constexpr int AHEAD = 2048;                                     // bytes that one tile asks ahead
#if NATIVE_AVX512
constexpr int TILE_ROWS = 6;
#else
constexpr int TILE_ROWS = 2;
#endif
constexpr int NARROW_TILE_ROWS = 2; // of a group with fewer blocks

// Inputs of one row, two bfloat16 or one float32 at a time.
INLINE uint32_t input_pair(const uint16_t *x)
{
    uint32_t pair;
    memcpy(&pair, x, 4);
    return pair;
}

template <typename element> constexpr int PER_STEP = sizeof(element) == 2 ? 2 : 1; // inputs of a step of the stream

// One step of the stream: every row's sums += its inputs × the weights of all blocks.
template <int ROWS, int WIDTH, typename element>
INLINE void multiply_step(lanes (&sums)[ROWS][WIDTH], const element *x, int64_t stride, const char *weight, bool odd)
{
    signed_bits weights[WIDTH];
    for (int block = 0; block < WIDTH; block++)
        memcpy(&weights[block], weight + block * sizeof(lanes), sizeof(lanes));
    for (int row = 0; row < ROWS; row++) {
        const element *input = x + row * stride;
        if constexpr (sizeof(element) == 2) {
            const uint32_t pair = odd ? *input : input_pair(input);
            for (int block = 0; block < WIDTH; block++)
                sums[row][block] = dot_pairs(sums[row][block], weights[block], pair);
        } else
            for (int block = 0; block < WIDTH; block++)
                sums[row][block] += (lanes)weights[block] * *input;
    }
}

// sums += the inputs [0, inputs) × weights. Meanwhile `ahead` is fetched, LINES lines of 64 bytes a step.
template <int ROWS, int WIDTH, int LINES, typename element>
INLINE void multiply_tile(lanes (&sums)[ROWS][WIDTH], const element *x, int64_t stride, const char *weight, int inputs,
                          const char *ahead)
{
    constexpr int step = PER_STEP<element>;
    int i = 0;
    for (; i + step <= inputs; i += step) {
        for (int line = 0; line < LINES; line++)
            __builtin_prefetch(ahead + line * 64, 0, 2);
        multiply_step<ROWS, WIDTH>(sums, x + i, stride, weight, false);
        weight += sizeof(lanes) * WIDTH;
        ahead += LINES * 64;
    }
    if (i < inputs)
        multiply_step<ROWS, WIDTH>(sums, x + i, stride, weight, true);
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

template <typename element>
INLINE void finish_row(const Linear &op, int64_t row, int group, lanes *sums, int width)
{
    if (op.bias)
        for (int block = 0; block < width; block++)
            sums[block] += load_lanes(op.bias + group * GROUP + block * LANES);
    if (op.epilogue == GATED) {
        const int column = group * (GROUP / 2), half = width / 2;
        for (int block = 0; block < half; block++) {
            const int at = column + block * LANES;
            const lanes y = activate(sums[block], op.activation) * sums[half + block];
            finish((element *)op.out + row * op.out_stride + at, y, op.out_features - at, false, 1.0f);
        }
        return;
    }
    for (int block = 0; block < width; block++) {
        const int at = group * GROUP + block * LANES, count = op.out_features - at;
        if (op.out_float32)
            finish((float *)op.out + row * op.out_stride + at, sums[block], count, op.epilogue == ADD_TO, op.alpha);
        else
            finish((element *)op.out + row * op.out_stride + at, sums[block], count, op.epilogue == ADD_TO, op.alpha);
    }
}

struct Chunk {
    const char *weight;
    int first, inputs; // of x
    bool begins, ends; // the sums
};

// ROWS rows from `row` on over one chunk. `partial` holds the sums of all the item's rows between chunks.
template <int ROWS, int WIDTH, int LINES, typename element>
static void run_tile(const Linear &op, int64_t row, int group, const Chunk &chunk, const char *ahead, lanes *partial)
{
    lanes sums[ROWS][WIDTH];
    for (int r = 0; r < ROWS; r++)
        for (int block = 0; block < WIDTH; block++)
            sums[r][block] = chunk.begins ? lanes{} : partial[r * WIDTH + block];
    const element *x = (const element *)op.x + row * op.x_stride + chunk.first;
    multiply_tile<ROWS, WIDTH, LINES>(sums, x, op.x_stride, chunk.weight, chunk.inputs, ahead);
    if (chunk.ends)
        for (int r = 0; r < ROWS; r++)
            finish_row<element>(op, row + r, group, sums[r], WIDTH);
    else
        for (int r = 0; r < ROWS; r++)
            for (int block = 0; block < WIDTH; block++)
                partial[r * WIDTH + block] = sums[r][block];
}

template <int ROWS, int WIDTH, typename element>
INLINE void run_tile(const Linear &op, int64_t row, int group, const Chunk &chunk, const char *ahead, int lines,
                     lanes *partial)
{
    if constexpr (WIDTH == BLOCKS) {
        if (lines == 1)
            return run_tile<ROWS, WIDTH, 1, element>(op, row, group, chunk, ahead, partial);
        if (lines == 2)
            return run_tile<ROWS, WIDTH, 2, element>(op, row, group, chunk, ahead, partial);
        if (lines == 4)
            return run_tile<ROWS, WIDTH, 4, element>(op, row, group, chunk, ahead, partial);
    }
    run_tile<ROWS, WIDTH, 0, element>(op, row, group, chunk, ahead, partial);
}

template <int WIDTH, typename element>
INLINE void run_tile(int rows, const Linear &op, int64_t row, int group, const Chunk &chunk, const char *ahead, int lines,
                     lanes *partial)
{
    if (rows == 1)
        return run_tile<1, WIDTH, element>(op, row, group, chunk, ahead, lines, partial);
    if (rows == 2)
        return run_tile<2, WIDTH, element>(op, row, group, chunk, ahead, lines, partial);
#if NATIVE_AVX512
    if constexpr (WIDTH == BLOCKS) {
        if (rows == 3)
            return run_tile<3, WIDTH, element>(op, row, group, chunk, ahead, lines, partial);
        if (rows == 4)
            return run_tile<4, WIDTH, element>(op, row, group, chunk, ahead, lines, partial);
        if (rows == 5)
            return run_tile<5, WIDTH, element>(op, row, group, chunk, ahead, lines, partial);
        run_tile<6, WIDTH, element>(op, row, group, chunk, ahead, lines, partial);
    }
#endif
}

// The stream of a group, and how its inputs are cut into chunks for `rows` rows.
template <typename element> struct Stream {
    const char *weight;
    int width, tiles, chunks, inputs; // blocks of the group; tiles; chunks; inputs of a chunk, the last has what is left

    Stream(const Linear &op, int columns, int group, int rows)
    {
        constexpr int step = PER_STEP<element>;
        const int64_t steps = (op.in_features + step - 1) / step, bytes = steps * sizeof(lanes) * BLOCKS;
        const int left = (columns + LANES - 1) / LANES - group * BLOCKS;
        width = left < BLOCKS ? left : BLOCKS;
        weight = (const char *)op.weight + group * bytes;
        const int tile_rows = width == BLOCKS ? TILE_ROWS : NARROW_TILE_ROWS;
        tiles = (rows + tile_rows - 1) / tile_rows;
        const int64_t most = tiles == 1 ? bytes : tiles <= FEW_TILES ? SHORT_CHUNK : LONG_CHUNK;
        chunks = (int)((bytes + most - 1) / most);
        inputs = (int)((steps + chunks - 1) / chunks) * step;
    }

    Chunk chunk(const Linear &op, int index) const
    {
        const int first = index * inputs, left = op.in_features - first;
        return {weight + (int64_t)first / PER_STEP<element> * sizeof(lanes) * width, first,
                left < inputs ? left : inputs, index == 0, index == chunks - 1};
    }
};

// `next` is the stream that this thread reads after this one, or null.
template <typename element>
INLINE void run_item(const Linear &op, const Stream<element> &stream, int group, int64_t begin, int rows, const char *next,
                     lanes *partial)
{
    const int tiles = stream.tiles;
    // The first tiles share the fetching of the next chunk: 4 lines a step in all.
    const int fetching = tiles >= 4 ? 4 : tiles >= 2 ? 2 : 1, lines = 4 / fetching;
    for (int index = 0; index < stream.chunks; index++) {
        const Chunk chunk = stream.chunk(op, index);
        const char *ahead = index + 1 < stream.chunks ? stream.chunk(op, index + 1).weight : next;
        if (tiles == 1)
            ahead = chunk.weight + AHEAD;
        for (int tile = 0; tile < tiles; tile++) {
            const int first = (int)((int64_t)rows * tile / tiles), count = (int)((int64_t)rows * (tile + 1) / tiles) - first;
            const int fetched = tile < fetching && ahead ? lines : 0;
            const char *from = ahead + (int64_t)tile * (chunk.inputs / PER_STEP<element>) * lines * 64;
            lanes *sums = partial + (int64_t)first * BLOCKS;
            switch (stream.width) {
            case 1: run_tile<1, element>(count, op, begin + first, group, chunk, from, 0, sums); break;
            case 2: run_tile<2, element>(count, op, begin + first, group, chunk, from, 0, sums); break;
            case 3: run_tile<3, element>(count, op, begin + first, group, chunk, from, 0, sums); break;
            default: run_tile<4, element>(count, op, begin + first, group, chunk, from, fetched, sums);
            }
        }
    }
}

template <typename element> INLINE void run_linear(const Linear &op, const Step &step, Worker &worker)
{
    const int columns = op.epilogue == GATED ? 2 * ((op.out_features + LANES - 1) / LANES * LANES) : op.out_features;
    const int groups = (columns + GROUP - 1) / GROUP;
    const int row_blocks = (step.rows + ROW_BLOCK - 1) / ROW_BLOCK;
    const int rows = row_blocks ? (step.rows + row_blocks - 1) / row_blocks : 0;
    lanes *partial = worker.scratch<lanes>((size_t)rows * BLOCKS);
    if (!partial)
        return;
    const int items = groups * row_blocks;
    for (int item = worker.claim(), following; item < items; item = following) {
        following = worker.claim();
        const int group = item % groups, begin = item / groups * rows;
        const int left = step.rows - begin;
        const int count = left < rows ? left : rows;
        const char *next = following < items ? Stream<element>(op, columns, following % groups, rows).weight : nullptr;
        run_item<element>(op, Stream<element>(op, columns, group, count), group, begin, count, next, partial);
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
