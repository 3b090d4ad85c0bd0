// angular_margin: the distance between the angular maps of two activations, and the gradient's kappa.
#pragma once

#include "common.h"

namespace kd {

// A dense (B, C, H, W) activation: channels outermost (each channel's pixels together), or last.
struct Activation {
  const void* data;
  DType type;
  int64_t channels;
  bool channels_last;
};

struct AngularLayer {
  Activation student, teacher;
  int64_t batch, height, width;
  double factor;
  int64_t kappa_offset;  // of the layer's [B, H, W] in kappa
  void* out;             // backward: dense gradient in the student's layout and dtype
};

struct AngularMargin : Call {
  const AngularLayer* layers;
  int64_t count, batch;
};

struct AngularMarginForward : AngularMargin {
  double margin, sharpness, local_weight;
  bool per_layer, per_sample;
  void* loss;   // T [], [count], [batch] or [count, batch]
  void* kappa;  // T, or null if no gradient is wanted
};

struct AngularMarginBackward : AngularMargin {
  const void* kappa;
  const void* grad;  // T, element layer * layer_stride + sample * sample_stride
  int64_t layer_stride, sample_stride;
};

constexpr double kUnitEps = 1e-12;

// <x, D> of x = v_s / |v_s| and D = x - v_t / |v_t|, given e = |D|^2: e / 2 for unit vectors. Under the clamp of the norms (a
// region of one bright pixel) a vector is shorter than 1, and the student's norm is a constant.
KD_BOTH inline double along_unit(double e, double norm_s, double norm_t) {
  if (norm_s < kUnitEps) return 0;
  const double of_1 = norm_t < kUnitEps ? norm_t / kUnitEps : 1;
  return (e + 1 - of_1 * of_1) / 2;
}

template <Isa>
void compute(const AngularMarginForward&, const Pool&);
template <Isa>
void compute(const AngularMarginBackward&, const Pool&);

}  // namespace kd
