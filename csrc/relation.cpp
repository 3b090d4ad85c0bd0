// relation on the CPU. All work on B x B matrices is in double. What is summed over threads is summed by rows first, so
// that a result does not depend on who made which row.
#include "relation.h"

#include "relation_cosines.h"
#include "relation_distances.h"

namespace kd {
template <>
void compute<Isa::KD_ISA>(const Distances& x, const Pool& pool) {
  x.fp64 ? KD_ISA::squared_distances<double>(x.features, x.count, x.batch, pool, x.distances)
         : KD_ISA::squared_distances<float>(x.features, x.count, x.batch, pool, x.distances);
}

template <>
void compute<Isa::KD_ISA>(const Rkd& x, const Pool& pool) {
  KD_ISA::rkd(x, pool);
}

template <>
void compute<Isa::KD_ISA>(const Irg& x, const Pool& pool) {
  KD_ISA::irg(x, pool);
}

template <>
void compute<Isa::KD_ISA>(const Pkt& x, const Pool& pool) {
  x.fp64 ? KD_ISA::pkt<double>(x, pool) : KD_ISA::pkt<float>(x, pool);
}

template <>
void compute<Isa::KD_ISA>(const Cc& x, const Pool& pool) {
  x.fp64 ? KD_ISA::cc<double>(x, pool) : KD_ISA::cc<float>(x, pool);
}

}  // namespace kd
