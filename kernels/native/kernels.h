// All kernels in the namespace and for the instruction set of the file that includes this.
namespace NATIVE_NAMESPACE {
#include "lanes.h"
#include "stored_kv.h"
#include "compressed_weight.h"
#include "linear.h"
#include "quantised_rows.h"
#include "quantised_linear.h"
#include "elementwise.h"
#include "attention.h"
} // namespace NATIVE_NAMESPACE

#define NATIVE_STRING(name) #name
#define NATIVE_NAME(name) NATIVE_STRING(name)

// In the order of `Kind`.
const KernelTable NATIVE_TABLE = {NATIVE_NAME(NATIVE_NAMESPACE),
                                  {
                                      NATIVE_NAMESPACE::rms_norm,
                                      NATIVE_NAMESPACE::linear,
                                      NATIVE_NAMESPACE::rotate_store,
                                      NATIVE_NAMESPACE::attention,
                                      NATIVE_NAMESPACE::gated_activation,
                                      NATIVE_NAMESPACE::add,
                                      NATIVE_NAMESPACE::embed,
                                      NATIVE_NAMESPACE::rotation,
                                      NATIVE_NAMESPACE::argmax,
                                      NATIVE_NAMESPACE::quantised_linear,
                                  }};
