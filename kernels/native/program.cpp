// Runs programs: every thread of one team goes through the list of operations; all meet after each.
#include <memory>
#include <new>
#include <omp.h>
#include <sched.h>
#include "operations.h"
#include "worker.h"
#include "instruction_sets.h"

static const KernelTable &best_table()
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return __builtin_cpu_supports("avx512bf16") ? avx512_bf16_table : avx512_table;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return avx2_table;
#endif
    return baseline_table;
}

static const KernelTable *tables[] = {&baseline_table,
#if defined(__x86_64__)
                                      &avx2_table, &avx512_table, &avx512_bf16_table
#endif
};

static const KernelTable *chosen = &best_table();

// Where a team meets after every operation. Whoever waits spins for as long as an even share of work may differ, then
// lets others have the core: one of them may be the very thread that is waited for. (OpenMP's own barrier spins for
// milliseconds, which on a busy machine makes a step ten times slower, or sleeps at once, which costs an idle one more
// than the operation.)
class Barrier {
  public:
    explicit Barrier(int threads) : threads_(threads) {}

    void wait()
    {
        const int generation = generation_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            generation_.fetch_add(1, std::memory_order_release);
            return;
        }
        for (int turn = 0; generation_.load(std::memory_order_acquire) == generation; turn++) {
            if (turn > SPINS)
                sched_yield();
#if defined(__x86_64__)
            else
                __builtin_ia32_pause();
#endif
        }
    }

  private:
    static constexpr int SPINS = 1000;
    const int threads_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> generation_{0};
};

extern "C" {

// The instruction set in use.
const char *troupe_instruction_set() { return chosen->name; }

// Use another one, for tests: 0, or 1 if this processor lacks it or there is none of that name.
int troupe_use_instruction_set(const char *name)
{
    const KernelTable *best = &best_table();
    for (const KernelTable *table : tables) {
        if (__builtin_strcmp(table->name, name) == 0) {
            chosen = table;
            return 0;
        }
        if (table == best)
            break; // what follows needs more than this processor has
    }
    return 1;
}

// Returns 0, or 1 if there was no memory for a thread's scratch space: what was computed then is worthless.
int troupe_run(const Operation *const *operations, int count, const Step *step)
{
    std::unique_ptr<Counter[]> counters(new (std::nothrow) Counter[count]);
    if (!counters)
        return 1;
    std::atomic<bool> failed{false};
    alignas(Barrier) char memory[sizeof(Barrier)];
    Barrier *barrier = nullptr;
#pragma omp parallel num_threads(step->threads)
    {
        Worker worker(omp_get_thread_num(), omp_get_num_threads(), failed);
#pragma omp single
        barrier = new (memory) Barrier(worker.threads); // OpenMP may give fewer threads than asked for
        for (int i = 0; i < count; i++) {
            worker.begin(counters[i]);
            chosen->functions[operations[i]->kind](*operations[i], *step, worker);
            if (i + 1 < count)
                barrier->wait();
        }
    }
    return failed.load() ? 1 : 0;
}
}
