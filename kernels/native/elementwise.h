// Operations on single rows or heads. Each reads its input once, computes in float32 and rounds once.

constexpr int ROWS_PER_ITEM = 4;

// Calls work(row) for the rows that this thread claims: few at a time while there are few, for the sake of balance.
template <typename function> INLINE void for_rows(const Step &step, Worker &worker, function work)
{
    const int size = step.rows > ROWS_PER_ITEM * 2 * worker.threads ? ROWS_PER_ITEM : 1;
    for (int64_t begin; (begin = (int64_t)worker.claim() * size) < step.rows;)
        for (int64_t row = begin; row < begin + size && row < step.rows; row++)
            work(row);
}

// Calls work(index, count) over [0, width) with count = 16 while there are so many, then with what is left.
template <typename function> INLINE void for_lanes(int width, function work)
{
    int i = 0;
    for (; i + LANES <= width; i += LANES)
        work(i, LANES);
    if (i < width)
        work(i, width - i);
}

template <typename element> INLINE lanes load_up_to(const element *values, int count)
{
    return count == LANES ? load_lanes(values) : load_some(values, count);
}

template <typename element> INLINE void store_up_to(element *target, lanes values, int count)
{
    if (count == LANES)
        store_lanes(target, values);
    else
        store_some(target, values, count);
}

// 1 / sqrt(mean(x²) + eps)
template <typename element> INLINE float inverse_rms(const element *x, int width, float eps)
{
    lanes squares[4] = {};
    int i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES)
        for (int part = 0; part < 4; part++) {
            const lanes values = load_lanes(x + i + part * LANES);
            squares[part] += values * values;
        }
    for_lanes(width - i, [&](int j, int count) __attribute__((always_inline)) {
        const lanes values = load_up_to(x + i + j, count);
        squares[0] += values * values;
    });
    return 1.0f / sqrtf(sum_of_lanes((squares[0] + squares[1]) + (squares[2] + squares[3])) / width + eps);
}

template <typename element> INLINE void norm_rows(const RmsNorm &op, const Step &step, Worker &worker)
{
    for_rows(step, worker, [&](int64_t row) __attribute__((always_inline)) {
        const element *x = (const element *)op.x + (op.gather ? op.gather[row] : row) * op.x_stride;
        element *out = (element *)op.out + row * op.out_stride;
        const float scale = inverse_rms(x, op.width, op.eps);
        for_lanes(op.width, [&](int i, int count) __attribute__((always_inline)) {
            store_up_to(out + i, load_up_to(x + i, count) * scale * load_up_to(op.weight + i, count), count);
        });
    });
}

static void rms_norm(const Operation &operation, const Step &step, Worker &worker)
{
    const RmsNorm &op = static_cast<const RmsNorm &>(operation);
    if (op.bfloat16)
        norm_rows<uint16_t>(op, step, worker);
    else
        norm_rows<float>(op, step, worker);
}

// A block passes from one sequence to another, and what lies behind a sequence's end is masked but may be multiplied:
// with finite numbers only, what breaks one request cannot reach the next.
template <typename element> INLINE lanes finite(lanes x)
{
    constexpr float largest = sizeof(element) == 2 ? 3.3895314e38f : 3.4028235e38f;
    x = select(x != x, broadcast(0.0f), x);
    x = select(x > largest, broadcast(largest), x);
    return select(x < -largest, broadcast(-largest), x);
}

// A head as float32 in `head`, normalised if there is a norm, its first `rotary_dim` dimensions rotated.
template <typename element>
INLINE void rotated_head(const RotateStore &op, int64_t row, const element *x, const float *norm, float *head)
{
    const float scale = norm ? inverse_rms(x, op.head_dim, op.eps) : 1.0f;
    for_lanes(op.head_dim, [&](int i, int count) __attribute__((always_inline)) {
        lanes values = load_up_to(x + i, count);
        if (norm) {
            element rounded[LANES]; // as a separate norm would leave them
            store_lanes(rounded, values * scale * load_up_to(norm + i, count));
            values = load_lanes(rounded);
        }
        store_up_to(head + i, values, count);
    });
    const int half = op.rotary_dim / 2;
    const float *cos = op.cos + row * half, *sin = op.sin + row * half;
    for_lanes(half, [&](int i, int count) __attribute__((always_inline)) {
        const lanes a = load_up_to(head + i, count), b = load_up_to(head + half + i, count);
        const lanes c = load_up_to(cos + i, count), s = load_up_to(sin + i, count);
        store_up_to(head + i, a * c - b * s, count);
        store_up_to(head + half + i, b * c + a * s, count);
    });
}

// Keys or values of a head to their slot, in 8 bits and with a scale: kernels/quantised_kv.py.
template <typename element, typename stored>
INLINE void store_scaled(const element *head, int dim, stored *target, float *scale)
{
    lanes largest = {};
    for_lanes(dim, [&](int i, int count) __attribute__((always_inline)) {
        const lanes x = finite<element>(load_up_to(head + i, count)), size = select(x < 0.0f, -x, x);
        largest = select(size > largest, size, largest);
    });
    float peak = 0.0f;
    for (int i = 0; i < LANES; i++)
        peak = largest[i] > peak ? largest[i] : peak;
    const float share = peak / stored::LIMIT;
    *scale = share > 0.0f ? share : 1.0f;
    for_lanes(dim, [&](int i, int count) __attribute__((always_inline)) {
        lanes x = finite<element>(load_up_to(head + i, count)) / *scale;
        x = select(x > stored::LIMIT, broadcast(stored::LIMIT), x);
        store_up_to(target + i, select(x < -stored::LIMIT, broadcast(-stored::LIMIT), x), count);
    });
}

template <typename element, typename stored>
INLINE void rotate_store_rows(const RotateStore &op, const Step &step, Worker &worker)
{
    const int dim = op.head_dim;
    float *head = worker.scratch<float>(2 * dim);
    if (!head)
        return;
    [[maybe_unused]] element *rounded = (element *)(head + dim); // a key, as it would be without a scale
    for_rows(step, worker, [&](int64_t row) __attribute__((always_inline)) {
        element *query = (element *)op.qkv + row * op.stride;
        for (int h = 0; h < op.heads; h++) {
            element *x = query + (int64_t)h * dim;
            rotated_head(op, row, x, op.query_norm, head);
            for_lanes(dim, [&](int i, int count) __attribute__((always_inline)) {
                store_up_to(x + i, load_up_to(head + i, count), count);
            });
        }
        const element *keys = query + (int64_t)op.heads * dim, *values = keys + (int64_t)op.kv_heads * dim;
        for (int h = 0; h < op.kv_heads; h++) {
            const int64_t slot = h * op.num_blocks * op.block_size + step.slot_mapping[row];
            stored *key_slot = (stored *)op.k_cache + slot * dim, *value_slot = (stored *)op.v_cache + slot * dim;
            const element *value = values + (int64_t)h * dim;
            rotated_head(op, row, keys + (int64_t)h * dim, op.key_norm, head);
            if constexpr (EIGHT_BITS<stored>) {
                for_lanes(dim, [&](int i, int count) __attribute__((always_inline)) {
                    store_up_to(rounded + i, load_up_to(head + i, count), count);
                });
                store_scaled(rounded, dim, key_slot, op.k_scales + slot);
                store_scaled(value, dim, value_slot, op.v_scales + slot);
            } else
                for_lanes(dim, [&](int i, int count) __attribute__((always_inline)) {
                    store_up_to(key_slot + i, finite<element>(load_up_to(head + i, count)), count);
                    store_up_to(value_slot + i, finite<element>(load_up_to(value + i, count)), count);
                });
        }
    });
}

template <typename element> static void rotate_store_of(const RotateStore &op, const Step &step, Worker &worker)
{
    switch (op.stored) {
    case AS_COMPUTED: return rotate_store_rows<element, element>(op, step, worker);
    case STORED_INT8: return rotate_store_rows<element, Int8>(op, step, worker);
    case STORED_FLOAT8: return rotate_store_rows<element, Float8>(op, step, worker);
    }
}

static void rotate_store(const Operation &operation, const Step &step, Worker &worker)
{
    const RotateStore &op = static_cast<const RotateStore &>(operation);
    if (op.bfloat16)
        rotate_store_of<uint16_t>(op, step, worker);
    else
        rotate_store_of<float>(op, step, worker);
}

template <typename element> INLINE void gate_rows(const GatedActivation &op, const Step &step, Worker &worker)
{
    for_rows(step, worker, [&](int64_t row) __attribute__((always_inline)) {
        const element *gate = (const element *)op.x + row * op.x_stride, *up = gate + op.width;
        element *out = (element *)op.out + row * op.out_stride;
        for_lanes(op.width, [&](int i, int count) __attribute__((always_inline)) {
            const lanes activated = activate(load_up_to(gate + i, count), op.activation);
            store_up_to(out + i, activated * load_up_to(up + i, count), count);
        });
    });
}

static void gated_activation(const Operation &operation, const Step &step, Worker &worker)
{
    const GatedActivation &op = static_cast<const GatedActivation &>(operation);
    if (op.bfloat16)
        gate_rows<uint16_t>(op, step, worker);
    else
        gate_rows<float>(op, step, worker);
}

template <typename element> INLINE void add_rows(const Add &op, const Step &step, Worker &worker)
{
    for_rows(step, worker, [&](int64_t row) __attribute__((always_inline)) {
        const element *x = (const element *)op.x + row * op.x_stride;
        element *out = (element *)op.out + row * op.out_stride;
        for_lanes(op.width, [&](int i, int count) __attribute__((always_inline)) {
            store_up_to(out + i, load_up_to(out + i, count) + op.alpha * load_up_to(x + i, count), count);
        });
    });
}

static void add(const Operation &operation, const Step &step, Worker &worker)
{
    const Add &op = static_cast<const Add &>(operation);
    if (op.bfloat16)
        add_rows<uint16_t>(op, step, worker);
    else
        add_rows<float>(op, step, worker);
}

// Row `token` of a packed weight: linear.h draws the order.
template <typename element> INLINE void copy_packed_row(const Embed &op, int64_t token, element *out)
{
    constexpr int per_step = PER_STEP<element>;
    const int64_t steps = (op.width + per_step - 1) / per_step, group = token / GROUP;
    const int block = token % GROUP / LANES, lane = token % LANES * per_step;
    const char *weight = (const char *)op.weight + group * steps * WHOLE_BYTES;
    const uint16_t *bases = nullptr;
    if (op.compressed) {
        bases = (const uint16_t *)((const char *)op.weight + ((const int64_t *)op.weight)[group]);
        weight = (const char *)bases + bases_bytes(steps);
    }
    for (int i = 0; i < op.width; i++) {
        const uint16_t base = bases ? bases[i / per_step] : AS_IT_IS;
        if (base == AS_IT_IS)
            memcpy(out + i, weight + block * sizeof(lanes) + (lane + i % per_step) * sizeof(element), sizeof(element));
        else if constexpr (sizeof(element) == 2)
            out[i] = compressed_number(weight, base, block, lane + i % per_step);
        if (i % per_step == per_step - 1)
            weight += base == AS_IT_IS ? WHOLE_BYTES : COMPRESSED_BYTES;
    }
}

template <typename element> INLINE void embed_rows(const Embed &op, const Step &step, Worker &worker)
{
    for_rows(step, worker, [&](int64_t row) __attribute__((always_inline)) {
        const int64_t token = step.tokens[row];
        const element *weight = (const element *)op.weight;
        element *out = (element *)op.out + row * op.out_stride;
        if (op.packed)
            copy_packed_row(op, token, out);
        else
            memcpy(out, weight + token * op.width, op.width * sizeof(element));
        if (op.scale != 1.0f)
            for_lanes(op.width, [&](int i, int count) __attribute__((always_inline)) {
                store_up_to(out + i, load_up_to(out + i, count) * op.scale, count);
            });
    });
}

static void embed(const Operation &operation, const Step &step, Worker &worker)
{
    const Embed &op = static_cast<const Embed &>(operation);
    if (op.bfloat16)
        embed_rows<uint16_t>(op, step, worker);
    else
        embed_rows<float>(op, step, worker);
}

static void rotation(const Operation &operation, const Step &step, Worker &worker)
{
    const Rotation &op = static_cast<const Rotation &>(operation);
    for_rows(step, worker, [&](int64_t row) {
        const float position = (float)step.positions[row];
        for (int i = 0; i < op.width; i++) {
            const float angle = position * op.inverse_frequencies[i];
            op.cos[row * op.width + i] = cosf(angle) * op.factor;
            op.sin[row * op.width + i] = sinf(angle) * op.factor;
        }
    });
}

// Lanes keep the largest value that each has seen and its place; a smaller place wins among equals.
static void argmax(const Operation &operation, const Step &step, Worker &worker)
{
    const ArgMax &op = static_cast<const ArgMax &>(operation);
    for_rows(step, worker, [&](int64_t row) __attribute__((always_inline)) {
        const float *x = op.x + row * op.x_stride;
        lanes largest = broadcast(-INFINITY);
        signed_bits place = {}, here, any_nan = {};
        for (int lane = 0; lane < LANES; lane++)
            here[lane] = lane;
        int i = 0;
        for (; i + LANES <= op.width; i += LANES, here += LANES) {
            const lanes values = load_lanes(x + i);
            const signed_bits better = values > largest;
            largest = select(better, values, largest);
            place = (here & better) | (place & ~better);
            any_nan |= values != values;
        }
        float best = -INFINITY;
        int found = -1;
        bool nan = false;
        for (int lane = 0; lane < LANES && lane < i; lane++) {
            nan |= any_nan[lane] != 0;
            if (largest[lane] > best || (largest[lane] == best && (found < 0 || place[lane] < found)))
                best = largest[lane], found = place[lane];
        }
        for (; i < op.width; i++) {
            nan |= x[i] != x[i];
            if (x[i] > best || found < 0)
                best = x[i], found = i;
        }
        if (nan)
            for (found = 0; x[found] == x[found]; found++)
                ;
        op.out[row] = found;
    });
}
