// multi_level on tensors of the CPU.
#pragma once

#include "bindings_nkd.h"
#include "multi_level.h"

namespace kd {

inline std::tuple<Tensor, Tensor, Tensor, Tensor> multi_level_rows(Tensor student, Tensor teacher, double temperature) {
  MultiLevelRows x{};
  const LogitPairTensors tensors(student, teacher, x);
  const ScalarType type = compute_type(x.fp64);
  Tensor q_s = empty({x.rows, x.classes}, type, student), difference = empty({x.rows, x.classes}, type, student),
         middle = empty({x.rows, x.classes}, type, student), divergence = empty({}, type, student);
  for (const Tensor* each : {&q_s, &difference, &middle}) ask_for_huge_pages(*each);
  x.temperature = temperature;
  x.q_s = q_s.mutable_data_ptr();
  x.difference = difference.mutable_data_ptr();
  x.middle = middle.mutable_data_ptr();
  x.divergence = divergence.mutable_data_ptr();
  run_on_cpu(x);
  return {q_s, difference, middle, divergence};
}

// Adds to `total`, and returns it.
inline Tensor multi_level_gradient(Tensor total, Tensor q_s, Tensor difference, std::optional<Tensor> by_batch,
                                   std::optional<Tensor> by_class, double kd, double batch, double of_class) {
  MultiLevelGradient x{};
  x.fp64 = is_double(q_s);
  x.rows = q_s.size(0);
  x.classes = q_s.size(1);
  const auto data = [&](const Tensor& m) {
    STD_TORCH_CHECK(m.is_contiguous() && is_double(m) == x.fp64 && m.numel() == x.rows * x.classes,
                    "kdkernels: multi_level_gradient needs contiguous matrices of one size and type");
    return m.const_data_ptr();
  };
  x.q_s = data(q_s);
  x.difference = data(difference);
  x.by_batch = by_batch ? data(*by_batch) : nullptr;
  x.by_class = by_class ? data(*by_class) : nullptr;
  x.kd = kd;
  x.batch = batch;
  x.of_class = of_class;
  data(total);
  x.out = total.mutable_data_ptr();
  run_on_cpu(x);
  return total;
}

}  // namespace kd
