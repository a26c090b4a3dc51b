// Attention over the paged cache: decode, prefill and chunks of a prompt are one algorithm with more or fewer queries.
//
// An item is one KV head of one sequence and a tile of queries, each with the group of query heads that share the KV head:
//
//     rows of an item      query 0: head 0, head 1 …   query 1: head 0, head 1 …      up to QUERY_ROWS
//     its keys             all that a query of the tile sees, TILE_TOKENS at a time
//
// A tile of keys and values is read from its blocks once for all rows, while the next one is fetched: the processor cannot
// foresee the jumps between blocks. A sequence with few queries and a long context is cut into pieces, which are items of
// their own; whoever finishes the last piece puts them together. Cuts depend on nothing but the sequence's own lengths, and
// sums run in the order of tokens, so a sequence's result depends neither on the batch nor on the number of threads.
#include "attention_tile.h"
#include "attention_softmax.h"
#include "attention_items.h"
#include "attention_space.h"
#include "attention_direct.h"
#include "attention_int8.h"
#include "attention_pieces.h"

template <typename element, typename stored>
INLINE void begin_item(const Attention &op, const Step &step, const Item &item, Space<element> &space)
{
    typedef typename Packed<element>::type packed;
    const int group = op.heads / op.kv_heads, dim = op.head_dim, rows = item.queries * group;
    const int64_t token = step.query_start[item.sequence] + item.query;
    for (int i = 0; i < item.queries; i++) {
        const element *heads = (const element *)op.query + (token + i) * op.query_stride;
        heads += (int64_t)item.kv_head * group * dim;
        for (int h = 0; h < group; h++) {
            packed *target = space.query + (int64_t)(i * group + h) * space.query_stride;
            if constexpr (sizeof(packed) == sizeof(element))
                memcpy(target, heads + (int64_t)h * dim, dim * sizeof(element));
            else
                for (int d = 0; d < dim; d++)
                    target[d] = load(heads + (int64_t)h * dim + d);
            for (int d = dim; d < space.query_stride; d++)
                target[d] = 0;
        }
    }
    if constexpr (MAY_BE_DIRECT<element> && IS_INT8<stored>)
        for (int row = 0; row < rows && fits_whole(rows, dim); row++)
            round_query(space, row, dim);
    for (int row = 0; row < rows; row++) {
        space.rows.largest[row] = LOWEST;
        space.rows.totals[row] = register_lanes{};
    }
    memset(space.sums, 0, sizeof(float) * rows * space.width);
}

// Which tokens of a tile the queries of an item see.
struct Sight {
    int start;        // the position of the item's query 0, counted from the tile's first token
    int count, blocks; // tokens of the tile, and in blocks of 16
    int window;       // 0: none
    int group;

    int begin(int query) const
    {
        const int first = window ? start + query + 1 - window : 0;
        return first > 0 ? first : 0;
    }
    int end(int query) const { return start + query < count ? start + query + 1 : count; }

    // The blocks that any of these rows sees, as tokens.
    int begin_of_rows(int first) const { return begin(first / group) / LANES * LANES; }
    int end_of_rows(int last) const { return blocks_of(end(last / group)) * LANES; }
};

// The scores of rows [first, first + count) with the packed keys.
template <typename element>
INLINE void multiply_keys(const Space<element> &space, const Sight &sight, int first, int count, int steps)
{
    for_parts(count, [&](int part, int rows) __attribute__((always_inline)) {
        const int row = first + part, begin = sight.begin_of_rows(row), end = sight.end_of_rows(row + rows - 1);
        for (int block = begin / LANES / PANEL * PANEL; block * LANES < end; block += PANEL) {
            int width;
            const signed_bits *panel = packed_block(space.tile, block, sight.blocks, steps, width);
            multiply_panel(rows, width, space.query + (int64_t)row * space.query_stride, space.query_stride, panel, steps,
                           space.rows.scores + row * TILE_TOKENS + block * LANES, TILE_TOKENS, nullptr);
        }
    });
}

// Their sums, corrected, plus their weights × the packed values.
template <typename element>
INLINE void multiply_values(const Space<element> &space, const Sight &sight, int first, int count, int steps)
{
    typedef typename Packed<element>::type packed;
    constexpr int per_step = PER_STEP<packed>;
    constexpr int stride = TILE_TOKENS * (int)(sizeof(float) / sizeof(packed));
    for (int block = 0, width; block * LANES < space.width; block += PANEL) {
        const signed_bits *panel = packed_block(space.tile, block, space.width / LANES, steps, width);
        for_parts(count, [&](int part, int rows) __attribute__((always_inline)) {
            const int row = first + part, begin = sight.begin_of_rows(row), end = sight.end_of_rows(row + rows - 1);
            multiply_panel(rows, width, (const packed *)(space.rows.scores + row * TILE_TOKENS) + begin, stride,
                           panel + begin / per_step * width, (end - begin) / per_step,
                           space.sums + (int64_t)row * space.width + block * LANES, space.width, space.rows.keep + row);
        });
    }
}

// One tile of keys and values for all rows that see any of them; `ahead` is fetched meanwhile.
template <typename element, typename stored>
INLINE void attend(const Attention &op, const Item &item, const Scaling &scaling, TokenTile<stored> &tokens,
                   Space<element> &space, Fetch<stored> ahead)
{
    typedef typename Packed<element>::type packed;
    const int group = op.heads / op.kv_heads, dim = op.head_dim, blocks = blocks_of(tokens.count);
    const Sight sight = {item.cut.position(item.query) - tokens.begin, tokens.count, blocks, op.window, group};
    // The first query that sees the tile's first token, or the item's first; the last one that sees its last token.
    int from = -sight.start, to = op.window ? tokens.count - 1 + op.window - sight.start : item.queries;
    from = from > 0 ? from : 0;
    to = to < item.queries ? to : item.queries;
    const int first = from * group, count = (to - from) * group;
    const int key_steps = steps_of<packed>(dim), value_steps = steps_of<packed>(blocks * LANES);
    const auto for_visible = [&](auto work) __attribute__((always_inline)) {
        for (int query = from, row = first; query < to; query++)
            for (int head = 0; head < group; head++, row++)
                work(row, sight.begin(query), sight.end(query));
    };

    const float *key_scales = nullptr, *value_scales = nullptr;
    if constexpr (EIGHT_BITS<stored>) {
        tokens.load_scales();
        key_scales = tokens.key_scales;
        value_scales = tokens.value_scales;
    }
    bool direct = false;
    int lines = 0; // to fetch with every score
    if constexpr (MAY_BE_DIRECT<element>) {
        if constexpr (IS_INT8<stored>) // the item's rows, for which `begin_item` has rounded the queries
            direct = fits_whole(item.queries * group, dim);
        else
            direct = count <= DIRECT_ROWS && dim % DIRECT_DIM == 0;
        if (direct) {
            lines = lines_per_score(ahead, blocks, count, dim);
            score_directly(space, tokens, blocks, first, count, dim, ahead, lines);
        }
    }
    if (!direct) {
        for (int block = 0; block < blocks; block++) {
            pack_keys<packed>(space.tile, tokens.keys, block, blocks, dim);
            ahead.tokens(12);
        }
        multiply_keys(space, sight, first, count, key_steps);
        ahead.tokens(12);
    }
    for_visible([&](int row, int begin, int end) __attribute__((always_inline)) {
        raise_largest(space.rows, row, begin, end, scaling, key_scales);
        if constexpr (!IS_INT8<stored>)
            ahead.lines(direct ? SOFTMAX_LINES : 0);
    });
    for (int row = first; row < first + count; row += WIDE) {
        const register_lanes previous = load_register(space.rows.previous + row);
        store_register(space.rows.keep + row, exp2_register(previous - load_register(space.rows.largest + row)));
    }
    for_visible([&](int row, int begin, int end) __attribute__((always_inline)) {
        if constexpr (MAY_BE_DIRECT<element> && IS_INT8<stored>) {
            if (direct) {
                weigh_in_whole(space, row, begin, end, blocks * LANES, scaling, value_scales);
                return;
            }
        }
        weigh<packed>(space.rows, row, begin, end, blocks * LANES, scaling, value_scales);
        ahead.lines(direct ? SOFTMAX_LINES : 0);
    });
    if constexpr (MAY_BE_DIRECT<element>) {
        if (direct)
            return add_directly(count, space, tokens, value_steps, first, dim, ahead, lines);
    }
    ahead.tokens(12);
    for (int step = 0; step < value_steps; step += 8) {
        pack_values<packed>(space.tile, tokens.values, step, step + 8, value_steps, dim);
        ahead.tokens(16);
    }
    multiply_values(space, sight, first, count, value_steps);
    ahead.rest();
}

template <typename element, typename stored> INLINE void run_attention(const Attention &op, const Step &step, Worker &worker)
{
    Space<element> space;
    char *memory = worker.scratch<char>(space.lay_out(op, nullptr));
    if (!memory)
        return;
    space.lay_out(op, memory);
    memset(space.zeros, 0, op.head_dim * sizeof(element));
    Place place(step);
    if (!place.move_to(op, step, worker.claim()))
        return;
    Pieces<element> pieces(op, step, space.width);
    const Scaling scaling(op.scale, op.softcap);
    TokenTile<stored> tiles[2], *now = tiles, *next = tiles + 1;
    const stored *zeros = (const stored *)space.zeros;
    Item item(op, step, place);
    now->find(op, step, item, item.begin, zeros);
    for (bool more = true; more;) {
        more = place.move_to(op, step, worker.claim());
        const Item following = more ? Item(op, step, place) : item;
        begin_item<element, stored>(op, step, item, space);
        for (int begin = item.begin; begin < item.end; begin += item.tile_tokens) {
            if (begin + item.tile_tokens < item.end)
                next->find(op, step, item, begin + item.tile_tokens, zeros);
            else if (more)
                next->find(op, step, following, following.begin, zeros);
            else
                next->count = 0;
            attend(op, item, scaling, *now, space, Fetch<stored>(*next, op.head_dim));
            TokenTile<stored> *done = now;
            now = next;
            next = done;
        }
        if (item.cut.pieces > 1)
            pieces.add(item, space, worker);
        else
            for (int row = 0; row < item.queries * (op.heads / op.kv_heads); row++)
                finish_output(op, output<element>(op, step, item, row), space.sums + (int64_t)row * space.width,
                              sum_of(space.rows.totals[row]));
        item = following;
    }
}

template <typename element> static void attention_of(const Attention &op, const Step &step, Worker &worker)
{
    switch (op.stored) {
    case AS_COMPUTED: return run_attention<element, element>(op, step, worker);
    case STORED_INT8: return run_attention<element, Int8>(op, step, worker);
    case STORED_FLOAT8: return run_attention<element, Float8>(op, step, worker);
    }
}

static void attention(const Operation &operation, const Step &step, Worker &worker)
{
    const Attention &op = static_cast<const Attention &>(operation);
    if (op.bfloat16)
        attention_of<uint16_t>(op, step, worker);
    else
        attention_of<float>(op, step, worker);
}
