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

constexpr int QUERY_ROWS = 96;
constexpr int PIECE_TOKENS = 512; // as few as pay for putting pieces together
constexpr int MAX_PIECES = 32;    // bounds the memory for them

// A sequence, cut into items.
struct Cut {
    int queries, context; // tokens
    int tile_queries, tiles;
    int pieces, piece_tokens;

    Cut(const Attention &op, const Step &step, int sequence)
    {
        const int group = op.heads / op.kv_heads;
        queries = step.query_start[sequence + 1] - step.query_start[sequence];
        context = step.context_lens[sequence];
        tile_queries = group < QUERY_ROWS ? QUERY_ROWS / group : 1;
        tiles = (queries + tile_queries - 1) / tile_queries;
        pieces = 1;
        piece_tokens = context;
        if (tiles == 1) {
            const int length = context - first_key(op, 0);
            const int wanted = (length + PIECE_TOKENS - 1) / PIECE_TOKENS;
            pieces = wanted < MAX_PIECES ? wanted : MAX_PIECES;
            piece_tokens = (length + pieces - 1) / pieces;
            piece_tokens = (piece_tokens + TILE_TOKENS - 1) / TILE_TOKENS * TILE_TOKENS;
            pieces = (length + piece_tokens - 1) / piece_tokens;
        }
    }

    // The position of a query, and the first that it sees; it sees no position behind its own.
    int position(int query) const { return context - queries + query; }
    int first_key(const Attention &op, int query) const
    {
        const int first = op.window ? position(query) + 1 - op.window : 0;
        return first > 0 ? first : 0;
    }

    int items(const Attention &op) const { return tiles * op.kv_heads * pieces; }
};

// Where a claimed item lies. Items are claimed in ascending order, so the place only moves on; long sequences come first.
struct Place {
    int sequence, item;    // the item within the sequence
    int begin = 0, end = 0; // items of the sequence
    int64_t parts = 0;     // pieces × KV heads of the split sequences before this one
    int64_t part_rows = 0; // and their rows

    explicit Place(const Step &step) : sequence(step.sequences) {}

    // False behind the last item.
    bool move_to(const Attention &op, const Step &step, int claimed)
    {
        while (claimed >= end) {
            if (sequence < step.sequences)
                count_parts(op, Cut(op, step, sequence));
            if (--sequence < 0)
                return false;
            begin = end;
            end += Cut(op, step, sequence).items(op);
        }
        item = claimed - begin;
        return true;
    }

    void count_parts(const Attention &op, const Cut &cut)
    {
        if (cut.pieces > 1) {
            parts += (int64_t)op.kv_heads * cut.pieces;
            part_rows += (int64_t)op.kv_heads * cut.pieces * cut.queries * (op.heads / op.kv_heads);
        }
    }
};

// An item: queries [query, query + queries) of a sequence and its keys [begin, end).
struct Item {
    Cut cut;
    int sequence, kv_head, query, queries, piece, begin, end, tile_tokens;
    int64_t part, part_row; // of the sequence's KV head, if it is split

    Item(const Attention &op, const Step &step, const Place &place) : cut(op, step, place.sequence)
    {
        sequence = place.sequence;
        piece = place.item % cut.pieces;
        const int tile = cut.tiles - 1 - place.item / cut.pieces % cut.tiles; // the last one sees most
        kv_head = place.item / cut.pieces / cut.tiles;
        query = tile * cut.tile_queries;
        queries = cut.queries - query < cut.tile_queries ? cut.queries - query : cut.tile_queries;
        const int first = cut.first_key(op, query), last = cut.position(query + queries - 1) + 1;
        begin = first + piece * cut.piece_tokens;
        end = piece < cut.pieces - 1 ? begin + cut.piece_tokens : last;
        const int tiles = (end - begin + TILE_TOKENS - 1) / TILE_TOKENS;
        tile_tokens = blocks_of((end - begin + tiles - 1) / tiles) * LANES; // of even size: no short one at the end
        part = place.parts + (int64_t)kv_head * cut.pieces;
        part_row = place.part_rows + (int64_t)kv_head * cut.pieces * cut.queries * (op.heads / op.kv_heads);
    }
};

// Where the tokens [begin, begin + count) of an item are: a tile's keys, then its values.
template <typename element> struct TokenTile {
    const element *keys[TILE_TOKENS], *values[TILE_TOKENS];
    int begin, count = 0;

    void find(const Attention &op, const Step &step, const Item &item, int first, const element *zeros)
    {
        const int64_t head = (int64_t)item.kv_head * op.num_blocks;
        const int32_t *table = step.block_tables + (int64_t)item.sequence * step.table_width;
        begin = first;
        count = item.end - first < item.tile_tokens ? item.end - first : item.tile_tokens;
        const int64_t block_elements = (int64_t)op.block_size * op.head_dim;
        int block = first / op.block_size, offset = first % op.block_size, i = 0;
        while (i < count) {
            int64_t at = (head + table[block++]) * block_elements + (int64_t)offset * op.head_dim;
            const int left = op.block_size - offset, end = left < count - i ? i + left : count;
            for (; i < end; i++, at += op.head_dim) {
                keys[i] = (const element *)op.k_cache + at;
                values[i] = (const element *)op.v_cache + at;
            }
            offset = 0;
        }
        for (; i % LANES; i++)
            keys[i] = values[i] = zeros;
    }
};

// Fetches a tile one token after the other, a few at a time, into the second-level cache: it waits for more lines at once
// than the first-level cache does. (Measured on blocks of 2 KiB: 17 GB/s a core; into the first-level cache 10 GB/s.)
template <typename element> class Fetch {
  public:
    Fetch(const TokenTile<element> &tile, int dim) : tile_(tile), bytes_(dim * (int)sizeof(element)) {}

    __attribute__((always_inline)) inline void tokens(int count)
    {
        const int all = 2 * tile_.count, until = done_ + count < all ? done_ + count : all;
        for (; done_ < until; done_++) {
            const char *token = (const char *)(done_ < tile_.count ? tile_.keys[done_] : tile_.values[done_ - tile_.count]);
            for (int line = 0; line < bytes_; line += 64)
                __builtin_prefetch(token + line, 0, 2);
        }
    }

    void rest() { tokens(2 * TILE_TOKENS); }

  private:
    const TokenTile<element> &tile_;
    const int bytes_;
    int done_ = 0;
};

// A thread's memory for an item.
template <typename element> struct Space {
    typedef typename Packed<element>::type packed;

    int width, query_stride; // of sums and of packed queries: head_dim, rounded up
    signed_bits *tile;
    Rows rows;
    float *sums;    // [rows, width] of weighted values
    packed *query;  // [rows, query_stride]
    element *zeros; // [head_dim]
    TokenTile<element> *tokens;

    // The bytes needed; with `memory` also points everything into it.
    size_t lay_out(const Attention &op, char *memory)
    {
        const int group = op.heads / op.kv_heads, dim = op.head_dim;
        const size_t most = group > QUERY_ROWS ? group : QUERY_ROWS;
        const int key_steps = steps_of<packed>(dim) * (TILE_TOKENS / LANES);
        const int value_steps = steps_of<packed>(TILE_TOKENS) * blocks_of(dim);
        width = blocks_of(dim) * LANES;
        query_stride = steps_of<packed>(dim) * PER_STEP<packed>;
        size_t used = 0;
        const auto take = [&](size_t bytes) {
            char *at = memory + used;
            used += (bytes + 63) / 64 * 64;
            return at;
        };
        tile = (signed_bits *)take((key_steps > value_steps ? key_steps : value_steps) * sizeof(signed_bits));
        rows.scores = (float *)take(most * TILE_TOKENS * sizeof(float));
        rows.largest = (float *)take((most + LANES) * sizeof(float));
        rows.previous = (float *)take((most + LANES) * sizeof(float));
        rows.keep = (float *)take((most + LANES) * sizeof(float));
        rows.totals = (register_lanes *)take(most * sizeof(register_lanes));
        sums = (float *)take(most * width * sizeof(float));
        query = (packed *)take(most * query_stride * sizeof(packed));
        zeros = (element *)take(dim * sizeof(element));
        tokens = (TokenTile<element> *)take(2 * sizeof(TokenTile<element>));
        return used;
    }
};

template <typename element> INLINE void begin_item(const Attention &op, const Step &step, const Item &item, Space<element> &space)
{
    typedef typename Packed<element>::type packed;
    const int group = op.heads / op.kv_heads, dim = op.head_dim, rows = item.queries * group;
    const int64_t token = step.query_start[item.sequence] + item.query;
    for (int i = 0; i < item.queries; i++) {
        const element *heads = (const element *)op.query + (token + i) * op.query_stride + (int64_t)item.kv_head * group * dim;
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
template <typename element>
INLINE void attend(const Attention &op, const Item &item, const Scaling &scaling, const TokenTile<element> &tokens,
                   Space<element> &space, Fetch<element> ahead)
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

    for (int block = 0; block < blocks; block++) {
        pack_keys<packed>(space.tile, tokens.keys, block, blocks, dim);
        ahead.tokens(12);
    }
    multiply_keys(space, sight, first, count, key_steps);
    ahead.tokens(12);
    for_visible([&](int row, int begin, int end) __attribute__((always_inline)) {
        raise_largest(space.rows, row, begin, end, scaling);
    });
    for (int row = first; row < first + count; row += WIDE) {
        const register_lanes raised = load_register(space.rows.previous + row) - load_register(space.rows.largest + row);
        store_register(space.rows.keep + row, exp2_register(raised));
    }
    for_visible([&](int row, int begin, int end) __attribute__((always_inline)) {
        weigh<packed>(space.rows, row, begin, end, blocks * LANES, scaling);
    });
    ahead.tokens(12);
    for (int step = 0; step < value_steps; step += 8) {
        pack_values<packed>(space.tile, tokens.values, step, step + 8, value_steps, dim);
        ahead.tokens(16);
    }
    multiply_values(space, sight, first, count, value_steps);
    ahead.rest();
}

template <typename element>
INLINE element *output(const Attention &op, const Step &step, const Item &item, int row)
{
    const int group = op.heads / op.kv_heads;
    const int64_t token = step.query_start[item.sequence] + item.query + row / group;
    return (element *)op.out + token * op.out_stride + ((int64_t)item.kv_head * group + row % group) * op.head_dim;
}

template <typename element> INLINE void finish_output(const Attention &op, element *out, const float *sums, float total)
{
    const float share = 1.0f / total;
    int d = 0;
    for (; d + LANES <= op.head_dim; d += LANES)
        store_rounded(out + d, load_lanes(sums + d) * share);
    if (d < op.head_dim)
        store_some(out + d, load_lanes(sums + d) * share, op.head_dim - d);
}

// What the threads share while a sequence is split: for every sequence and KV head how many pieces are done, then for every
// piece and row its sums, its largest score and its total.
template <typename element> class Pieces {
  public:
    Pieces(const Attention &op, const Step &step, int width) : op_(op), step_(step), width_(width)
    {
        Place all(step);
        all.move_to(op, step, INT32_MAX);
        counters_ = (size_t)all.parts * sizeof(std::atomic<int>);
        counters_ = (counters_ + 63) / 64 * 64;
        bytes_ = counters_ + (size_t)all.part_rows * stride() * sizeof(float);
    }

    // Keep the sums of `item`'s rows, and put the pieces together if this was the last one.
    void add(const Item &item, const Space<element> &space, Worker &worker)
    {
        char *memory = (char *)worker.shared(bytes_, counters_);
        if (!memory)
            return;
        const int rows = item.queries * (op_.heads / op_.kv_heads);
        float *first = (float *)(memory + counters_) + item.part_row * stride();
        for (int row = 0; row < rows; row++) {
            float *kept = first + ((int64_t)item.piece * rows + row) * stride();
            memcpy(kept, space.sums + (int64_t)row * width_, sizeof(float) * width_);
            kept[width_] = space.rows.largest[row];
            kept[width_ + 1] = sum_of(space.rows.totals[row]);
        }
        std::atomic<int> *done = (std::atomic<int> *)memory + item.part;
        if (done->fetch_add(1, std::memory_order_acq_rel) == item.cut.pieces - 1)
            for (int row = 0; row < rows; row++)
                combine(item, first + (int64_t)row * stride(), (int64_t)rows * stride(), row);
    }

  private:
    int64_t stride() const { return width_ + LANES; }

    void combine(const Item &item, float *kept, int64_t distance, int row)
    {
        float largest = LOWEST, total = 0.0f;
        for (int piece = 0; piece < item.cut.pieces; piece++) {
            const float other = kept[piece * distance + width_];
            largest = other > largest ? other : largest;
        }
        for (int piece = 0; piece < item.cut.pieces; piece++) {
            float *sums = kept + piece * distance;
            const float share = exp2_register(register_lanes{} + (sums[width_] - largest))[0];
            total += share * sums[width_ + 1];
            for (int d = 0; d < width_; d += LANES) {
                const lanes added = load_lanes(sums + d) * share;
                store_lanes(kept + d, piece ? load_lanes(kept + d) + added : added);
            }
        }
        finish_output(op_, output<element>(op_, step_, item, row), kept, total);
    }

    const Attention &op_;
    const Step &step_;
    const int width_;
    size_t counters_, bytes_;
};

template <typename element> INLINE void run_attention(const Attention &op, const Step &step, Worker &worker)
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
    TokenTile<element> *now = space.tokens, *next = now + 1;
    Item item(op, step, place);
    now->find(op, step, item, item.begin, space.zeros);
    for (bool more = true; more;) {
        more = place.move_to(op, step, worker.claim());
        const Item following = more ? Item(op, step, place) : item;
        begin_item(op, step, item, space);
        for (int begin = item.begin; begin < item.end; begin += item.tile_tokens) {
            if (begin + item.tile_tokens < item.end)
                next->find(op, step, item, begin + item.tile_tokens, space.zeros);
            else if (more)
                next->find(op, step, following, following.begin, space.zeros);
            else
                next->count = 0;
            attend(op, item, scaling, *now, space, Fetch<element>(*next, op.head_dim));
            TokenTile<element> *done = now;
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

static void attention(const Operation &operation, const Step &step, Worker &worker)
{
    const Attention &op = static_cast<const Attention &>(operation);
    if (op.bfloat16)
        run_attention<uint16_t>(op, step, worker);
    else
        run_attention<float>(op, step, worker);
}
