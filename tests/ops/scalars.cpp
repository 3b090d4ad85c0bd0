// The functions of csrc/numbers.h on arrays, for test_scalars.py.
#define KD_ISA here
#include "numbers.h"

using namespace kd;
using namespace kd::here;

#define EACH(NAME, FROM, TO, VALUE)                                  \
  extern "C" void NAME(const FROM* from, TO* to, int64_t n) {        \
    for (int64_t i = 0; i < n; ++i) {                                \
      const FROM x = from[i];                                        \
      to[i] = VALUE;                                                 \
    }                                                                \
  }

EACH(exp_of, float, float, fast_exp(x))
EACH(both_exp, float, float, unit_exp(x).exp)
EACH(both_expm1, float, float, unit_exp(x).minus_1)
EACH(expm1_of, float, float, unit_expm1(x))
EACH(log1p_of, float, float, unit_log1p(x))
EACH(log_1m_of, float, float, log_1m(x, 1.0f - x))
EACH(widen_bf16, uint16_t, float, from_bf16(x))
EACH(widen_f16, uint16_t, float, from_f16(x))
EACH(narrow_bf16, float, uint16_t, to_bf16(x))
EACH(narrow_f16, float, uint16_t, to_f16(x))
