#include "kernels_begin.h"
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma")
#define NATIVE_AVX2 1
#define NATIVE_AVX512 1
#define NATIVE_BFLOAT16 1
#define NATIVE_NAMESPACE avx512_bf16
#define NATIVE_TABLE avx512_bf16_table
#include "kernels.h"
#endif
