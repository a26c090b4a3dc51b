// Headers of the system, included before an instruction set is chosen: what they define inline must run everywhere.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include "instruction_sets.h"
