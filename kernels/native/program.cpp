// Runs programs: every thread of one team goes through the list of operations; all meet after each.
#include <memory>
#include <new>
#include <omp.h>
#include "operations.h"
#include "worker.h"
#include "instruction_sets.h"

static const KernelTable &best_table()
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
    {
        if (!__builtin_cpu_supports("avx512vnni"))
            return avx512_table;
        return __builtin_cpu_supports("avx512bf16") ? avx512_bf16_table : avx512_vnni_table;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return avx2_table;
#endif
    return baseline_table;
}

static const KernelTable *tables[] = {&baseline_table,
#if defined(__x86_64__)
                                      &avx2_table, &avx512_table, &avx512_vnni_table,
                                      &avx512_bf16_table
#endif
};

static const KernelTable *chosen = &best_table();

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
#pragma omp single
        barrier = new (memory) Barrier(omp_get_num_threads()); // OpenMP may give fewer threads than asked for
        Worker worker(omp_get_thread_num(), omp_get_num_threads(), *barrier, failed);
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
