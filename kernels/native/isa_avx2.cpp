#include "kernels_begin.h"
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define NATIVE_AVX2 1
#define NATIVE_AVX512 0
#define NATIVE_VNNI 0
#define NATIVE_BFLOAT16 0
#define NATIVE_NAMESPACE avx2
#define NATIVE_TABLE avx2_table
#include "kernels.h"
#endif
