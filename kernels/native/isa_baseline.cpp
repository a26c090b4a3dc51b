#include "kernels_begin.h"
#define NATIVE_AVX2 0
#define NATIVE_AVX512 0
#define NATIVE_VNNI 0
#define NATIVE_BFLOAT16 0
#define NATIVE_NAMESPACE baseline
#define NATIVE_TABLE baseline_table
#include "kernels.h"
