// energy on tensors, and what the bindings of all losses of maps share.
#pragma once

#include <tuple>
#include <vector>

#include "dispatch.h"

namespace kd {

// The layers of a call; `keep` owns the copies that were needed.
struct MapTensors {
  std::vector<Tensor> keep;
  std::vector<MapLayer> layers;
  int64_t pixels = 0;

  void add(const Tensor& s, const Tensor& t, double factor, void* out) {
    STD_TORCH_CHECK(
        s.dim() == 4 && t.dim() == 4 && s.size(0) == t.size(0) && s.size(2) == t.size(2) && s.size(3) == t.size(3),
        "kdkernels: activations must be (B, C, H, W) with the same B, H and W");
    check_device(t, s);
    MapLayer layer{};
    layer.student = activation(s);
    layer.teacher = activation(t);
    layer.batch = s.size(0);
    layer.height = s.size(2);
    layer.width = s.size(3);
    layer.factor = factor;
    layer.offset = pixels;
    layer.out = out;
    pixels += layer.batch * layer.height * layer.width;
    layers.push_back(layer);
    STD_TORCH_CHECK(layers[0].batch == layer.batch, "kdkernels: all layers must have the same B");
  }

  void fill(MapLayers& x) const {
    STD_TORCH_CHECK(!layers.empty(), "kdkernels: there must be layers");
    x.layers = layers.data();
    x.count = static_cast<int64_t>(layers.size());
    x.batch = layers[0].batch;
  }

 private:
  Activation activation(const Tensor& x) {
    keep.push_back(dense(x));
    const Tensor& d = keep.back();
    return {d.const_data_ptr(), dtype_of(d), d.size(1), is_channels_last(d)};
  }
};

// Runs the forward pass of a loss of maps; x has its own options.
template <typename Loss>
std::tuple<Tensor, Tensor> map_loss(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher,
                                    const std::vector<double>& factors, bool per_layer, bool per_sample, bool need_grad,
                                    Loss x) {
  STD_TORCH_CHECK(student.size() == teacher.size() && student.size() == factors.size(),
                  "kdkernels: a loss of maps needs as many student layers as teacher layers and factors");
  MapTensors inputs;
  for (size_t i = 0; i < student.size(); ++i) inputs.add(student[i], teacher[i], factors[i], nullptr);
  inputs.fill(x);
  x.fp64 = any_double(student) || any_double(teacher);
  x.per_layer = per_layer;
  x.per_sample = per_sample;
  std::vector<int64_t> sizes;
  if (per_layer) sizes.push_back(x.count);
  if (per_sample) sizes.push_back(x.batch);
  Tensor loss = empty(sizes, compute_type(x.fp64), student[0]);
  Tensor kappa = empty({need_grad ? inputs.pixels : 0}, compute_type(x.fp64), student[0]);
  x.loss = loss.mutable_data_ptr();
  x.kappa = need_grad ? kappa.mutable_data_ptr() : nullptr;
  run(student[0], x);
  return {loss, kappa};
}

inline Tensor energy_energies(Tensor activation) {
  MapTensors inputs;
  inputs.add(activation, activation, 0, nullptr);
  Energies x{};
  inputs.fill(x);
  x.fp64 = is_double(activation);
  Tensor r = empty({x.batch, activation.size(2), activation.size(3)}, compute_type(x.fp64), activation);
  x.r = r.mutable_data_ptr();
  run(activation, x);
  return r;
}

inline std::tuple<Tensor, Tensor> energy_forward(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                                 std::vector<double> factors, bool absolute, bool per_layer,
                                                 bool per_sample, bool need_grad) {
  AttentionForward x{};
  x.absolute = absolute;
  return map_loss(student, teacher, factors, per_layer, per_sample, need_grad, x);
}

inline std::vector<Tensor> energy_backward(Tensor grad, std::vector<Tensor> student, Tensor kappa) {
  MapTensors inputs;
  std::vector<Tensor> out;
  for (const Tensor& s : student) {
    out.push_back(grad_like(s));
    inputs.add(s, s, 0, out.back().mutable_data_ptr());
  }
  MapBackward x{};
  inputs.fill(x);
  x.fp64 = is_double(kappa);
  STD_TORCH_CHECK(kappa.numel() == inputs.pixels, "kdkernels: kappa is not these layers'");
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == x.count && grad.size(1) == x.batch,
                  "kdkernels: grad must be (L, B)");
  const ScalarType type = compute_type(x.fp64);
  const Tensor g = grad.scalar_type() == type ? grad : torch::stable::to(grad, type);
  const Tensor k = as_contiguous(kappa);
  x.kappa = k.const_data_ptr();
  x.grad = g.const_data_ptr();
  x.layer_stride = g.stride(0);
  x.sample_stride = g.stride(1);
  run(student[0], x);
  return out;
}

}  // namespace kd
