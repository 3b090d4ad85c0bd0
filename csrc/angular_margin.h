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
  double weight;
  int64_t kappa_offset;  // of the layer's [B, H, W] in kappa
  void* out;             // backward: dense gradient in the student's layout and dtype
};

struct AngularMargin {
  const AngularLayer* layers;
  int64_t count;
  double margin, scale, local_weight;
  bool reduce;
  void* loss;   // T [] or [count]
  void* kappa;  // T, or null if no gradient is wanted
  const void* grad;  // backward: T, element layer * grad_stride
  int64_t grad_stride;
  void* workspace;  // CUDA only
};

KD_FOR_EACH_ISA(void angular_margin_forward(const AngularMargin&, bool fp64, const Pool&);
                void angular_margin_backward(const AngularMargin&, bool fp64, const Pool&);)

}  // namespace kd
