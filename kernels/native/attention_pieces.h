// What becomes of an item's sums: rows of the output, or a part of them.

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
        store_lanes(out + d, load_lanes(sums + d) * share);
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
