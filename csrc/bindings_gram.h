// gram on tensors.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "dispatch.h"

namespace kd {

// (B, ...) as B dense rows; the order inside a row is free, so channels_last needs no copy.
inline Rows rows_of(const Tensor& x, std::vector<Tensor>& keep) {
  STD_TORCH_CHECK(x.dim() >= 1, "kdkernels: features must be (B, ...)");
  keep.push_back(dense(x));
  int64_t width = 1;
  for (int64_t d = 1; d < x.dim(); ++d) width *= x.size(d);
  return {keep.back().const_data_ptr(), dtype_of(x), x.size(0), width, width};
}

// Features of one batch, as rows.
struct Features {
  std::vector<Tensor> keep;
  std::vector<Rows> rows;
  int64_t batch;

  explicit Features(const std::vector<Tensor>& tensors) {
    STD_TORCH_CHECK(!tensors.empty(), "kdkernels: gram needs features");
    for (const Tensor& x : tensors) {
      check_device(x, tensors[0]);
      rows.push_back(rows_of(x, keep));
      STD_TORCH_CHECK(rows.back().count == rows[0].count, "kdkernels: batch sizes differ");
    }
    batch = rows[0].count;
  }
};

inline Tensor gram_grams(std::vector<Tensor> features) {
  const Features inputs(features);
  Grams x{};
  x.fp64 = any_double(features);
  x.features = inputs.rows.data();
  x.count = static_cast<int64_t>(features.size());
  x.batch = inputs.batch;
  Tensor grams = empty({x.count, x.batch, x.batch}, compute_type(x.fp64), features[0]);
  x.grams = grams.mutable_data_ptr();
  run(features[0], x);
  return grams;
}

// The second half of both SP functions: x has its layers, batch and precision.
template <typename Sp>
std::tuple<Tensor, Tensor> sp_loss(const Tensor& like, Sp& x, const std::string& row_norm,
                                   const std::vector<double>& scales, double eps, bool zero_row_grad, bool per_layer,
                                   bool need_grad) {
  STD_TORCH_CHECK(static_cast<int64_t>(scales.size()) == x.layers, "kdkernels: SP needs one scale for each layer");
  static_cast<SpOptions&>(x) = {row_norm == "l1", scales.data(), eps, zero_row_grad, per_layer};
  const ScalarType type = compute_type(x.fp64);
  Tensor loss = per_layer ? empty({x.layers}, type, like) : empty({}, type, like);
  Tensor gradient_matrix = need_grad ? empty({x.layers, x.batch, x.batch}, type, like) : empty({0}, type, like);
  x.loss = loss.mutable_data_ptr();
  x.gradient_matrix = need_grad ? gradient_matrix.mutable_data_ptr() : nullptr;
  run(like, x);
  return {loss, gradient_matrix};
}

inline std::tuple<Tensor, Tensor> gram_sp_forward(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                                  std::string row_norm, std::vector<double> scales, double eps,
                                                  bool zero_row_grad, bool per_layer, bool need_grad) {
  STD_TORCH_CHECK(student.size() == teacher.size(), "kdkernels: SP needs as many student as teacher layers");
  SpForward x{};
  x.fp64 = any_double(student) || any_double(teacher);
  x.layers = static_cast<int64_t>(student.size());
  student.insert(student.end(), teacher.begin(), teacher.end());
  const Features inputs(student);
  x.batch = inputs.batch;
  x.features = inputs.rows.data();
  return sp_loss(student[0], x, row_norm, scales, eps, zero_row_grad, per_layer, need_grad);
}

inline std::tuple<Tensor, Tensor> gram_sp_from_grams(Tensor grams, std::string row_norm, std::vector<double> scales,
                                                     double eps, bool zero_row_grad, bool per_layer, bool need_grad) {
  STD_TORCH_CHECK(grams.dim() == 4 && grams.size(0) == 2 && grams.size(2) == grams.size(3),
                  "kdkernels: Gram matrices must be (2, L, B, B)");
  SpFromGrams x{};
  x.fp64 = is_double(grams);
  x.layers = grams.size(1);
  x.batch = grams.size(2);
  const Tensor dense = contiguous_as(grams, x.fp64);
  x.grams = dense.const_data_ptr();
  return sp_loss(grams, x, row_norm, scales, eps, zero_row_grad, per_layer, need_grad);
}

inline std::vector<Tensor> gram_sp_backward(Tensor grad, std::vector<Tensor> student, Tensor gradient_matrix) {
  const Features inputs(student);
  std::vector<Tensor> out;
  std::vector<void*> data;
  for (const Tensor& s : student) {
    out.push_back(grad_like(s));
    data.push_back(out.back().mutable_data_ptr());
  }
  SpBackward x{};
  x.fp64 = is_double(gradient_matrix);
  x.student = inputs.rows.data();
  x.out = data.data();
  x.layers = static_cast<int64_t>(student.size());
  x.batch = inputs.batch;
  const Tensor g = contiguous_as(grad, x.fp64), w = as_contiguous(gradient_matrix);
  check_device(g, student[0]);
  check_device(w, student[0]);
  STD_TORCH_CHECK(w.numel() == x.layers * x.batch * x.batch, "kdkernels: the gradient matrix is not these layers'");
  STD_TORCH_CHECK(g.dim() == 0 || g.numel() == x.layers, "kdkernels: grad must be () or (L,)");
  x.gradient_matrix = w.const_data_ptr();
  x.grad = g.const_data_ptr();
  x.grad_stride = g.dim() ? 1 : 0;
  run(student[0], x);
  return out;
}

// The rows of (N, D) and (M, D) into x; `keep` owns copies.
template <typename C>
void set_rows(const Tensor& a, const Tensor& b, C& x, std::vector<Tensor>& keep) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1), "kdkernels: products need (N, D) and (M, D)");
  check_device(b, a);
  x.fp64 = is_double(a) || is_double(b);
  x.a = rows_of(a, keep);
  x.b = rows_of(b, keep);
}

// The (N, M), (N,) and (M,) that gram_products and gram_cosine_forward write
struct RowOutputs {
  Tensor matrix, of_a, of_b;
  template <typename C>
  RowOutputs(const Tensor& like, const C& x)
      : matrix(empty({x.a.count, x.b.count}, compute_type(x.fp64), like)),
        of_a(empty({x.a.count}, compute_type(x.fp64), like)),
        of_b(empty({x.b.count}, compute_type(x.fp64), like)) {}
};

inline std::tuple<Tensor, Tensor, Tensor> gram_products(Tensor a, Tensor b) {
  std::vector<Tensor> keep;
  Products x{};
  set_rows(a, b, x, keep);
  const RowOutputs out(a, x);
  x.products = out.matrix.mutable_data_ptr();
  x.squares_a = out.of_a.mutable_data_ptr();
  x.squares_b = out.of_b.mutable_data_ptr();
  run(a, x);
  return {out.matrix, out.of_a, out.of_b};
}

inline std::tuple<Tensor, Tensor, Tensor> gram_cosine_forward(Tensor a, Tensor b) {
  std::vector<Tensor> keep;
  CosineForward x{};
  set_rows(a, b, x, keep);
  const RowOutputs out(a, x);
  x.similarity = out.matrix.mutable_data_ptr();
  x.inverse_a = out.of_a.mutable_data_ptr();
  x.inverse_b = out.of_b.mutable_data_ptr();
  run(a, x);
  return {out.matrix, out.of_a, out.of_b};
}

inline std::tuple<Tensor, Tensor> gram_cosine_backward(Tensor grad, Tensor a, Tensor b, Tensor similarity,
                                                       Tensor inverse_a, Tensor inverse_b) {
  std::vector<Tensor> keep;
  CosineBackward x{};
  set_rows(a, b, x, keep);
  const Tensor g = contiguous_as(grad, x.fp64), s = contiguous_as(similarity, x.fp64),
               i_a = contiguous_as(inverse_a, x.fp64), i_b = contiguous_as(inverse_b, x.fp64);
  STD_TORCH_CHECK(g.numel() == x.a.count * x.b.count && s.numel() == g.numel() && i_a.numel() == x.a.count &&
                      i_b.numel() == x.b.count,
                  "kdkernels: the saved cosines are not these rows'");
  Tensor grad_a = empty(sizes_of(a), a.scalar_type(), a), grad_b = empty(sizes_of(b), b.scalar_type(), b);
  x.grad = g.const_data_ptr();
  x.similarity = s.const_data_ptr();
  x.inverse_a = i_a.const_data_ptr();
  x.inverse_b = i_b.const_data_ptr();
  x.grad_a = grad_a.mutable_data_ptr();
  x.grad_b = grad_b.mutable_data_ptr();
  run(a, x);
  return {grad_a, grad_b};
}

}  // namespace kd
