// How a step's attention is cut into items: see attention.h.

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
