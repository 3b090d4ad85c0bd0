// angular_margin on tensors.
#pragma once

#include <tuple>
#include <vector>

#include "dispatch.h"

namespace kd {

// The layers of a call; `keep` owns the copies that were needed.
struct AngularLayers {
  std::vector<Tensor> keep;
  std::vector<AngularLayer> layers;
  int64_t pixels = 0;

  void add(const Tensor& s, const Tensor& t, double factor, void* out) {
    STD_TORCH_CHECK(
        s.dim() == 4 && t.dim() == 4 && s.size(0) == t.size(0) && s.size(2) == t.size(2) && s.size(3) == t.size(3),
        "kdkernels: activations must be (B, C, H, W) with the same B, H and W");
    check_device(t, s);
    AngularLayer layer{};
    layer.student = activation(s);
    layer.teacher = activation(t);
    layer.batch = s.size(0);
    layer.height = s.size(2);
    layer.width = s.size(3);
    layer.factor = factor;
    layer.kappa_offset = pixels;
    layer.out = out;
    pixels += layer.batch * layer.height * layer.width;
    layers.push_back(layer);
    STD_TORCH_CHECK(layers[0].batch == layer.batch, "kdkernels: all layers must have the same B");
  }

  void fill(AngularMargin& x) const {
    STD_TORCH_CHECK(!layers.empty(), "kdkernels: angular_margin needs layers");
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

inline std::tuple<Tensor, Tensor> angular_margin_forward(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                                         std::vector<double> factors, double margin, double sharpness,
                                                         double local_weight, bool per_layer, bool per_sample,
                                                         bool need_grad) {
  STD_TORCH_CHECK(student.size() == teacher.size() && student.size() == factors.size(),
                  "kdkernels: angular_margin needs as many student layers as teacher layers and factors");
  AngularLayers inputs;
  for (size_t i = 0; i < student.size(); ++i) inputs.add(student[i], teacher[i], factors[i], nullptr);
  AngularMarginForward x{};
  inputs.fill(x);
  x.fp64 = any_double(student) || any_double(teacher);
  x.margin = margin;
  x.sharpness = sharpness;
  x.local_weight = local_weight;
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

inline std::vector<Tensor> angular_margin_backward(Tensor grad, std::vector<Tensor> student, Tensor kappa) {
  AngularLayers inputs;
  std::vector<Tensor> out;
  for (const Tensor& s : student) {
    out.push_back(grad_like(s));
    inputs.add(s, s, 0, out.back().mutable_data_ptr());
  }
  AngularMarginBackward x{};
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
