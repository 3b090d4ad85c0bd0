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

constexpr double kUnitEps = 1e-12;

// <x, D> of x = v_s / |v_s| and D = x - v_t / |v_t|, given e = |D|^2: e / 2 for unit vectors. Under the clamp of the norms (a
// region of one bright pixel) a vector is shorter than 1, and the student's norm is a constant.
KD_BOTH inline double along_unit(double e, double norm_s, double norm_t) {
  if (norm_s < kUnitEps) return 0;
  const double of_1 = norm_t < kUnitEps ? norm_t / kUnitEps : 1;
  return (e + 1 - of_1 * of_1) / 2;
}

KD_FOR_EACH_ISA(void angular_margin_forward(const AngularMargin&, bool fp64, const Pool&);
                void angular_margin_backward(const AngularMargin&, bool fp64, const Pool&);)

}  // namespace kd
