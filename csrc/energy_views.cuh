// How the blocks of a launch share the activations of all layers, and a thread's way through its part.
//
// A sample is a matrix of vectors (16 bytes where it is aligned), one row behind the other:
//   contiguous     a column is the same pixels in each row, as often as it repeats: 7 x 7 maps in half precision have
//   49
//                  columns of 8 numbers, and a row is 8 channels. A thread keeps its column and goes through rows, so
//                  that its pixels and their sums stay in registers
//   channels_last  a row is a pixel. Some lanes of a warp share it
// A block has some columns of some rows, about as many vectors as make kBlocks blocks of all layers together.
#pragma once

#include "arithmetic.h"
#include "cuda.h"
#include "vectors.cuh"

namespace kd {
namespace cuda {

constexpr int kLayers = 16;  // of a launch; their table is passed by value
constexpr int kThreads = 256;
constexpr int kBlocks = 4 * 132;             // four for each multiprocessor of an H100
constexpr int kLeastVectors = 4 * kThreads;  // of a block
constexpr int64_t kMostPixels = 1 << 27;     // of a map: 8 numbers for each have 32-bit indices
constexpr int kTile = 64;                    // columns of a block, if there are many

struct View {
  const void* data;
  DType type;
  bool last, wide;
  int rows, columns;
  int tile, chunk;    // columns and rows of a block
  int tiles, chunks;  // and how many of them make a sample
  int repeats;        // numbers of a row that belong to one pixel
  __host__ __device__ int blocks() const { return tiles * chunks; }
  // Sums that the blocks leave for each pixel; a block that has whole rows adds up the repeats itself.
  __host__ __device__ int parts() const { return last ? 1 : chunks * unfolded(); }
  __host__ __device__ int unfolded() const { return tiles == 1 ? 1 : repeats; }
};

struct Layer {
  View views[2];  // student, teacher; without blocks if there is none
  void* out;
  int height, width, channels[2];
  double factor;
  int64_t offset;   // of the layer's pixels among all layers'
  int64_t sums[2];  // where the sums of each network begin: [batch, parts, pixels]
  __host__ __device__ int pixels() const { return height * width; }
};

struct Table {
  Layer layers[kLayers];
  int64_t first_block[kLayers + 1];
  int index, count;  // the first of the layers among all, and how many
  unsigned batch;
};

// ---- on the host ----

inline int bytes_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }
inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// `out`: a gradient of the same layout, or null
inline View view_of(const Activation& a, const void* out, int64_t pixels, int64_t vectors_of_block) {
  View v{a.data, a.type, a.channels_last, false, 0, 0, 0, 0, 1, 0, 1};
  const int64_t per_16 = 16 / bytes_of(a.type), run = a.channels_last ? a.channels : a.channels * pixels;
  if (pixels == 0) return v;
  v.wide = aligned(a.data) && aligned(out) && run % per_16 == 0;
  const int64_t size = v.wide ? per_16 : 1;
  int64_t common = size;  // greatest common divisor of a power of two and the pixels
  while (pixels % common) common /= 2;
  v.columns = static_cast<int>(v.last ? a.channels / size : pixels / common);
  v.rows = static_cast<int>(v.last ? pixels : a.channels * common / size);
  v.repeats = v.last ? 1 : static_cast<int>(size / common);
  const bool split = !v.last && v.columns > (v.repeats > 1 ? kThreads : kTile * 3 / 2);
  v.tile = split ? kTile : v.columns;
  v.tiles = split ? static_cast<int>(ceil_div(v.columns, kTile)) : 1;
  const int64_t chunks = max<int64_t>(1, min<int64_t>(v.rows, int64_t(v.rows) * v.tile / vectors_of_block));
  v.chunk = static_cast<int>(max<int64_t>(1, ceil_div(v.rows, chunks)));
  v.chunks = static_cast<int>(max<int64_t>(1, ceil_div(v.rows, v.chunk)));
  return v;
}

enum class Networks { student, both };

// The layers as launches see them, and how many sums their energies are.
class Plan {
 public:
  Plan(const MapLayers& x, Networks networks) : x_(x), both_(networks == Networks::both) {
    int64_t vectors = 0;
    for (int64_t i = 0; i < x.count; ++i) {
      const MapLayer& l = x.layers[i];
      if (l.height * l.width > kMostPixels) throw std::runtime_error("kdkernels: a map has over 2^27 pixels");
      vectors += l.batch * l.height * l.width * l.student.channels * bytes_of(l.student.type) / 16;
      if (both_) vectors += l.batch * l.height * l.width * l.teacher.channels * bytes_of(l.teacher.type) / 16;
    }
    vectors_of_block_ = max<int64_t>(kLeastVectors, vectors / kBlocks);
    for (int64_t i = 0; i < x.count; ++i) {
      const Layer l = layer(i);
      for (int k = 0; k < 1 + both_; ++k) sums_ += x.batch * l.views[k].parts() * l.pixels();
      pixels_ += x.batch * l.pixels();
      largest_ = max<int64_t>(largest_, l.pixels());
    }
  }
  int64_t sums() const { return sums_; }
  int64_t pixels() const { return pixels_; }
  int64_t largest() const { return largest_; }  // map

  // start(table, blocks) for up to kLayers layers at a time, blocks(layer) being a layer's share of the grid
  template <typename Blocks, typename Start>
  void launch(const Blocks& blocks, const Start& start) const {
    int64_t sums = 0;
    for (int64_t begin = 0; begin < x_.count; begin += kLayers) {
      Table table{};
      table.batch = static_cast<unsigned>(x_.batch);
      table.index = static_cast<int>(begin);
      table.count = static_cast<int>(min<int64_t>(kLayers, x_.count - begin));
      for (int i = 0; i < table.count; ++i) {
        Layer& l = table.layers[i] = layer(begin + i);
        for (int k = 0; k < 1 + both_; ++k) {
          l.sums[k] = sums;
          sums += x_.batch * l.views[k].parts() * l.pixels();
        }
        table.first_block[i + 1] = table.first_block[i] + blocks(l);
      }
      if (table.first_block[table.count]) start(table, table.first_block[table.count]);
    }
  }
  // start(table, blocks) with the blocks that go through the activations
  template <typename Start>
  void launch_views(const Start& start) const {
    launch([&](const Layer& l) { return l.pixels() ? x_.batch * (l.views[0].blocks() + l.views[1].blocks()) : 0; },
           start);
  }
  // start(table, blocks) with a block per sample
  template <typename Start>
  void launch_samples(const Start& start) const {
    launch([&](const Layer&) { return x_.batch; }, start);
  }

 private:
  Layer layer(int64_t i) const {
    const MapLayer& l = x_.layers[i];
    const int64_t pixels = l.height * l.width;
    Layer made{};
    made.views[0] = view_of(l.student, l.out, pixels, vectors_of_block_);
    if (both_) made.views[1] = view_of(l.teacher, nullptr, pixels, vectors_of_block_);
    made.out = l.out;
    made.height = static_cast<int>(l.height);
    made.width = static_cast<int>(l.width);
    made.channels[0] = static_cast<int>(l.student.channels);
    made.channels[1] = static_cast<int>(l.teacher.channels);
    made.factor = l.factor;
    made.offset = l.offset;
    return made;
  }
  MapLayers x_;
  bool both_;
  int64_t vectors_of_block_ = kLeastVectors, sums_ = 0, pixels_ = 0, largest_ = 0;
};

// ---- on the device ----

__device__ inline int layer_of(const Table& table, int64_t block) {
  int i = 0;
  while (i + 1 < table.count && block >= table.first_block[i + 1]) ++i;
  return i;
}

// What a block works on: the student's parts come first.
struct Part {
  const Layer& layer;
  int network, sample, tile, chunk;
  __device__ Part(const Table& table, int index) : layer(table.layers[index]) {
    unsigned block = static_cast<unsigned>(blockIdx.x - table.first_block[index]);
    const unsigned students = table.batch * layer.views[0].blocks();
    network = block >= students;
    if (network) block -= students;
    const unsigned of_sample = view().blocks(), rest = block % of_sample, tiles = view().tiles;
    sample = static_cast<int>(block / of_sample);
    tile = static_cast<int>(rest % tiles);
    chunk = static_cast<int>(rest / tiles);
  }
  __device__ const View& view() const { return layer.views[network]; }
};

// A thread's vectors of a contiguous activation: one column, every so many rows.
struct Column {
  int width, slices, slice;  // columns of the block, threads to a column, and which one of them this is
  int first, count;          // the block's first column; this thread's vectors
  int64_t begin, step;       // its first one among those of all samples, and what is between them
  __device__ explicit Column(const Part& p) {
    const View& v = p.view();
    first = p.tile * v.tile;
    width = min(v.tile, v.columns - first);
    slices = kThreads / width;
    slice = threadIdx.x / width;
    const int row = p.chunk * v.chunk + slice, end = min(v.rows, (p.chunk + 1) * v.chunk);
    count = slice < slices && row < end ? (end - row + slices - 1) / slices : 0;
    begin = (int64_t(p.sample) * v.rows + row) * v.columns + first + own();
    step = int64_t(slices) * v.columns;
  }
  __device__ int own() const { return threadIdx.x - slice * width; }  // column of the block's
};

// The lanes that share a pixel of a channels_last activation, and how they go through the block's pixels: each(f) calls
// f(pixel, begin, count) in all of them at once, with count 0 where there is none left.
struct Lanes {
  int count, lane;  // lanes to a pixel
  const View& view;
  int sample, first, end;
  __device__ explicit Lanes(const Part& p)
      : view(p.view()), sample(p.sample), first(p.chunk * view.chunk), end(min(view.rows, first + view.chunk)) {
    count = 2;
    while (count < 32 && 8 * count <= view.columns) count *= 2;  // four vectors to a lane, or two lanes to a sector
    lane = threadIdx.x % count;
  }
  template <typename F>
  __device__ void each(const F& f) const {
    const int groups = kThreads / count, group = threadIdx.x / count;
    for (int pixel = first + group; pixel - group < end; pixel += groups) {
      const int64_t begin = (int64_t(sample) * view.rows + pixel) * view.columns + lane;
      f(pixel, begin, pixel < end && lane < view.columns ? (view.columns - lane + count - 1) / count : 0);
    }
  }
};

}  // namespace cuda
}  // namespace kd
