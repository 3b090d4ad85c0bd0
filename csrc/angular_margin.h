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

template <Isa>
void compute(const AngularMarginForward&, const Pool&);
template <Isa>
void compute(const AngularMarginBackward&, const Pool&);

}  // namespace kd
