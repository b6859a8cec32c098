// Kernels that a GPU has and a CPU does not: attention without a matrix of all pairs, RMS norm as one operator.
#pragma once
#include <ATen/native/transformers/attention.h>

#include "operators.h"

// Attention without a matrix of all pairs, as on a GPU: the CPU's flash kernel under the name of the memory-efficient one.
int64_t choose_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double dropout, bool,
                         std::optional<double>, bool) {
  return dropout > 0 ? 0 : 2;  // math, efficient_attention
}

void touch(std::initializer_list<Tensor> read, const std::string& name, int d) {
  Lock g(mu);
  launched(name, d, false);
  op_now = name;
  operators[name]++;
  tick(stream_now[d]);
  for (auto& t : read)
    if (t.defined() && t.is_cuda()) access(base_of(t), false, stream_now[d], name);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias,
                                                     bool, double dropout, bool causal, std::optional<double> scale) {
  const int d = q.get_device();
  touch({q, k, v, bias.value_or(Tensor())}, "attention", d);
  std::optional<Tensor> mask;
  if (bias) mask = on_cpu(*bias);
  auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(on_cpu(q), on_cpu(k), on_cpu(v), dropout, causal, mask, scale);
  Tensor none = at::empty({}, q.options().dtype(at::kLong));
  return {on_gpu(out, d), on_gpu(lse, d), none, none};
}

// What a GPU's kernels take while they run: a number for each row, and the query's gradient in float32, in tiles of 128 rows, unless
// it is float32 itself (dq_accum of flash attention 2, workspace of the memory-efficient kernels).
std::vector<Tensor> workspace_of(const Tensor& q) {
  const auto tiles = [](int64_t count, int64_t size) { return (count + size - 1) / size * size; };
  const auto options = q.options().dtype(at::kFloat);
  std::vector<Tensor> found = {at::empty({q.size(0), q.size(1), q.size(2)}, options)};
  if (q.scalar_type() != at::kFloat) found.push_back(at::empty({q.size(0), q.size(1), tiles(q.size(2), 128), tiles(q.size(3), 32)}, options));
  op_now = "attention backward";
  return found;
}
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                                              const Tensor& bias, const Tensor& out, const Tensor& lse, const Tensor&,
                                                              const Tensor&, double dropout, std::array<bool, 4>, bool causal,
                                                              std::optional<double> scale) {
  const int d = q.get_device();
  touch({grad, q, k, v, bias, out, lse}, "attention backward", d);
  std::optional<Tensor> mask;
  if (bias.defined()) mask = on_cpu(bias);
  const auto workspace = workspace_of(q);
  auto [a, b, c] = at::_scaled_dot_product_flash_attention_for_cpu_backward(on_cpu(grad), on_cpu(q), on_cpu(k), on_cpu(v), on_cpu(out),
                                                                            on_cpu(lse), dropout, causal, mask, scale);
  return {on_gpu(a, d), on_gpu(b, d), on_gpu(c, d), Tensor()};
}

// RMS norm, which is one kernel on a GPU and many operators on a CPU.
std::vector<int64_t> dims_of(const Tensor& x, at::IntArrayRef shape, bool last) {
  std::vector<int64_t> found;
  const int64_t split = x.dim() - (int64_t)shape.size();
  for (int64_t i = last ? split : 0; i < (last ? x.dim() : split); i++) found.push_back(i);
  return found;
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& input, at::IntArrayRef shape, const std::optional<Tensor>& weight,
                                    std::optional<double> eps) {
  const int d = input.get_device();
  touch({input, weight.value_or(Tensor())}, "rms norm", d);
  Tensor x = on_cpu(input).to(at::kFloat), rstd = (x.square().mean(dims_of(x, shape, true), true) + eps.value_or(1.2e-7)).rsqrt(),
         y = x * rstd;
  if (weight && weight->defined()) y = y * on_cpu(*weight).to(at::kFloat);
  return {on_gpu(y.to(input.scalar_type()), d), on_gpu(rstd, d)};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& input, at::IntArrayRef shape, const Tensor& rstd,
                                             const std::optional<Tensor>& weight, std::array<bool, 2> mask) {
  const int d = input.get_device();
  touch({grad, input, rstd, weight.value_or(Tensor())}, "rms norm backward", d);
  const bool weighted = weight && weight->defined();
  Tensor go = on_cpu(grad).to(at::kFloat), r = on_cpu(rstd), n = on_cpu(input).to(at::kFloat) * r,
         g = weighted ? go * on_cpu(*weight).to(at::kFloat) : go, dx, dw;
  if (mask[0]) dx = on_gpu((r * (g - n * (g * n).mean(dims_of(n, shape, true), true))).to(input.scalar_type()), d);
  if (mask[1] && weighted) {
    auto rows = dims_of(n, shape, false);
    dw = on_gpu((rows.empty() ? go * n : (go * n).sum(rows)).to(weight->scalar_type()), d);
  }
  return {dx, dw};
}
