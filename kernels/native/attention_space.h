// A thread's memory for an item: the places of its tokens, which are fetched ahead, packed tiles, scores and sums.

// Where the tokens [begin, begin + count) of an item are: a tile's keys, then its values.
template <typename stored> struct TokenTile {
    const stored *keys[TILE_TOKENS], *values[TILE_TOKENS];
    int begin, count = 0;
    // With 8 bits: where the scales of each run of tokens side by side are, fetched meanwhile, and then the scales.
    const float *key_runs[TILE_TOKENS], *value_runs[TILE_TOKENS];
    alignas(64) float key_scales[TILE_TOKENS], value_scales[TILE_TOKENS];
    int run_ends[TILE_TOKENS], runs;

    void find(const Attention &op, const Step &step, const Item &item, int first, const stored *zeros)
    {
        const int64_t head = (int64_t)item.kv_head * op.num_blocks;
        const int32_t *table = step.block_tables + (int64_t)item.sequence * step.table_width;
        begin = first;
        count = item.end - first < item.tile_tokens ? item.end - first : item.tile_tokens;
        const int64_t block_elements = (int64_t)op.block_size * op.head_dim;
        int block = first / op.block_size, offset = first % op.block_size, i = 0;
        runs = 0;
        while (i < count) {
            const int64_t place = head + table[block++];
            int64_t at = place * block_elements + (int64_t)offset * op.head_dim;
            const int left = op.block_size - offset, end = left < count - i ? i + left : count;
            if constexpr (EIGHT_BITS<stored>)
                find_scales(op, place * op.block_size + offset, end);
            for (; i < end; i++, at += op.head_dim) {
                keys[i] = (const stored *)op.k_cache + at;
                values[i] = (const stored *)op.v_cache + at;
            }
            offset = 0;
        }
        for (; i % LANES; i++) {
            keys[i] = values[i] = zeros;
            key_scales[i] = value_scales[i] = 0.0f;
        }
    }

    // Fill in the scales.
    void load_scales()
    {
        for (int run = 0, i = 0; run < runs; run++) {
            const float *key_run = key_runs[run], *value_run = value_runs[run];
            for (; i < run_ends[run]; i++) {
                key_scales[i] = *key_run++;
                value_scales[i] = *value_run++;
            }
        }
    }

  private:
    void find_scales(const Attention &op, int64_t slot, int end)
    {
        key_runs[runs] = op.k_scales + slot;
        value_runs[runs] = op.v_scales + slot;
        run_ends[runs] = end;
        __builtin_prefetch(key_runs[runs]);
        __builtin_prefetch(value_runs[runs]);
        runs++;
    }
};

// Fetches a tile one line after the other, a few at a time, into the second-level cache: it waits for more lines at once
// than the first-level cache does. (Measured on blocks of 2 KiB: 17 GB/s a core; into the first-level cache 10 GB/s.)
template <typename stored> class Fetch {
  public:
    Fetch(const TokenTile<stored> &tile, int dim)
        : tile_(tile), bytes_(dim * (int)sizeof(stored)), per_token_((bytes_ + 63) / 64)
    {
    }

    __attribute__((always_inline)) inline void lines(int count)
    {
        for (; count > 0 && done_ < 2 * tile_.count; count--) {
            const char *token = (const char *)(done_ < tile_.count ? tile_.keys[done_] : tile_.values[done_ - tile_.count]);
            __builtin_prefetch(token + offset_, 0, 2);
            offset_ += 64;
            if (offset_ >= bytes_) {
                offset_ = 0;
                done_++;
            }
        }
    }

    __attribute__((always_inline)) inline void tokens(int count) { lines(count * per_token_); }

    void rest() { tokens(2 * TILE_TOKENS); }

    // The line that holds the bytes from `offset` on of a token's key, or value, if there is such a token: for work that goes
    // through the tile before it in the same order. What that tile is too short for is fetched by `tokens_from`.
    __attribute__((always_inline)) inline void line_of_key(int token, int offset) const
    {
        if (token < tile_.count)
            __builtin_prefetch((const char *)tile_.keys[token] + offset, 0, 2);
    }

    __attribute__((always_inline)) inline void line_of_value(int token, int offset) const
    {
        if (token < tile_.count)
            __builtin_prefetch((const char *)tile_.values[token] + offset, 0, 2);
    }

    void tokens_from(int token) const
    {
        for (; token < tile_.count; token++)
            for (int offset = 0; offset < bytes_; offset += 64) {
                line_of_key(token, offset);
                line_of_value(token, offset);
            }
    }

    int all() const { return 2 * tile_.count * per_token_; }

  private:
    const TokenTile<stored> &tile_;
    const int bytes_, per_token_;
    int done_ = 0, offset_ = 0;
};

// For direct products with int8, see attention_int8.h.
struct WholeRows {
    int16_t *query;   // [DIRECT_ROWS, head_dim]
    uint8_t *weights; // [DIRECT_ROWS, 2, TILE_TOKENS]
    float *query_units, *weight_units; // [DIRECT_ROWS] what a one means
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
    packed *keys;   // [LANES, head_dim] of a cache of 8 bits
    WholeRows whole;

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
        keys = (packed *)take(LANES * dim * sizeof(packed));
        whole.query = (int16_t *)take(DIRECT_ROWS * dim * sizeof(int16_t));
        whole.weights = (uint8_t *)take(DIRECT_ROWS * 2 * TILE_TOKENS);
        whole.query_units = (float *)take(DIRECT_ROWS * sizeof(float));
        whole.weight_units = (float *)take(DIRECT_ROWS * sizeof(float));
        return used;
    }
};
