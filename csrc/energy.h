// energy: channel sums of squares of activations, the distance of two networks' maps, and what all losses of maps have
// in common: their layers, and the gradient from one number per pixel.
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

struct MapLayer {
  Activation student, teacher;
  int64_t batch, height, width;
  double factor;
  int64_t offset;  // of the layer's [B, H, W] among the pixels of all layers
  void* out;       // backward: dense gradient in the student's layout and dtype
};

struct MapLayers : Call {
  const MapLayer* layers;
  int64_t count, batch;
};

// The students' energies.
struct Energies : MapLayers {
  void* r;  // T [pixels of all layers]
};

// What the forward pass of a loss of maps writes.
struct MapLoss : MapLayers {
  bool per_layer, per_sample;
  void* loss;   // T [], [count], [batch] or [count, batch]
  void* kappa;  // T [pixels of all layers], dloss/dA[c, n] = kappa[n] A[c, n], or null if no gradient is wanted
};

struct AttentionForward : MapLoss {
  bool absolute;  // |D| instead of D^2
};

struct MapBackward : MapLayers {
  const void* kappa;
  const void* grad;  // T, element layer * layer_stride + sample * sample_stride
  int64_t layer_stride, sample_stride;
};

template <Isa>
void compute(const Energies&, const Pool&);
template <Isa>
void compute(const AttentionForward&, const Pool&);
template <Isa>
void compute(const MapBackward&, const Pool&);

}  // namespace kd
