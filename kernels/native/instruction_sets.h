// The kernels, compiled once for each instruction set.
#pragma once
#include "worker.h"
#include "operations.h"

struct KernelTable {
    const char *name;
    KernelFunction functions[NUM_KINDS];
};

extern const KernelTable baseline_table;
#if defined(__x86_64__)
extern const KernelTable avx2_table, avx512_table, avx512_vnni_table, avx512_bf16_table;
#endif
