// A feed-forward block of frozen weights as one node:
//   y = (act((x s_g) Wg^T) (x s_u) Wu^T s) Wd^T      gated; scales of the inputs of gate and up: both or none
//   y = (act(x Wu^T + b) s) Wd^T + c                 plain
// Kept for backward: gate and up (plain: up), and x where its scales are trained. Backward, T tokens, H hidden, I
// inner:
//   dh = dy Wd                          2 T I H flops
//   dg, du, ds                          one pass, 5 T I b bytes
//   dx = dg Wg + du Wu                  4 T I H flops; the second product is added by the matmul, not by a kernel
// With scales of the inputs dx and their gradients come from one pass over x and both products, 4 T H b bytes.
#include <torch/csrc/autograd/custom_function.h>

#include "autograd.h"
#include "operators.h"
#include "python.h"

namespace ia3 {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// x W, for x [*, out] and a weight [out, in] of a layer
at::Tensor product(const at::Tensor& x, const at::Tensor& weight) {
  return call::scaled_linear(x, weight.t(), {}, {}, {}, {});
}

// sum += x W, for a sum that nobody else holds
at::Tensor add_product(at::Tensor sum, const at::Tensor& x, const at::Tensor& weight) {
  // Where this package's matmul is the faster one: CPUs, in 16 bits
  if (sum.is_cpu() && sum.scalar_type() != at::kFloat) return sum.add_(product(x, weight));
  flat(sum).addmm_(flat(x), weight);
  return sum;
}

// y, gate and up
Tensor3 run_gated(const at::Tensor& x, const at::Tensor& gate_weight, const at::Tensor& up_weight,
                  const at::Tensor& down_weight, const OptionalTensor& scale, std::string_view activation,
                  const OptionalTensor& gate_scale, const OptionalTensor& up_scale) {
  at::Tensor to_gate = x, to_up = x;
  if (gate_scale) std::tie(to_gate, to_up) = call::scale_pair(x, *gate_scale, *up_scale);
  const at::Tensor gate = call::scaled_linear(to_gate, gate_weight, {}, {}, {}, {});
  const at::Tensor up = call::scaled_linear(to_up, up_weight, {}, {}, {}, {});
  const at::Tensor hidden = call::gated_activation(gate, up, scale, activation, {});
  return {call::scaled_linear(hidden, down_weight, {}, {}, {}, {}), gate, up};
}

// y and up
Tensor2 run_plain(const at::Tensor& x, const at::Tensor& up_weight, const at::Tensor& down_weight,
                  const OptionalTensor& scale, std::string_view activation, const OptionalTensor& up_bias,
                  const OptionalTensor& down_bias) {
  const at::Tensor up = call::scaled_linear(x, up_weight, up_bias, {}, {}, {});
  return {call::scaled_linear(call::scaled_activation(up, scale, activation, {}), down_weight, down_bias, {}, {}, {}),
          up};
}

struct GatedMlp : torch::autograd::Function<GatedMlp> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& gate_weight,
                            const at::Tensor& up_weight, const at::Tensor& down_weight, const OptionalTensor& scale,
                            std::string_view activation, const OptionalTensor& gate_scale,
                            const OptionalTensor& up_scale) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [y, gate, up] =
        run_gated(x, gate_weight, up_weight, down_weight, scale, activation, gate_scale, up_scale);
    ctx->save_for_backward({gate_scale ? x : at::Tensor(), gate_weight, up_weight, down_weight,
                            scale.value_or(at::Tensor()), gate_scale.value_or(at::Tensor()),
                            up_scale.value_or(at::Tensor()), gate, up});
    ctx->saved_data["activation"] = std::string(activation);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &gate_weight = saved[1], &up_weight = saved[2], &down_weight = saved[3];
    const OptionalTensor scale = optional(saved[4]), gate_scale = optional(saved[5]), up_scale = optional(saved[6]);
    size_t edge = 4;  // behind x and the weights; only the tensors that were given have one
    const bool needs_x = ctx->needs_input_grad(0);
    const bool needs_scale = scale && ctx->needs_input_grad(edge++);
    const bool needs_gate_scale = gate_scale && ctx->needs_input_grad(edge++);
    const bool needs_up_scale = up_scale && ctx->needs_input_grad(edge++);
    const bool needs_inputs = needs_x || needs_gate_scale || needs_up_scale;
    variable_list result(8);
    {
      const BelowAutograd below;
      auto [grad_gate, grad_up, grad_scale] = call::gated_activation_backward(
          product(grads[0], down_weight), saved[7], saved[8], scale, ctx->saved_data.begin()->second.toStringRef(), {},
          {needs_inputs, needs_inputs, needs_scale});
      if (needs_scale) result[4] = grad_scale;
      if (needs_inputs && !gate_scale) {
        result[0] = add_product(product(grad_gate, gate_weight), grad_up, up_weight);
      } else if (needs_inputs) {
        std::tie(result[0], result[6], result[7]) =
            call::scale_pair_backward(product(grad_gate, gate_weight), product(grad_up, up_weight), x, *gate_scale,
                                      *up_scale, {needs_x, needs_gate_scale, needs_up_scale});
        if (!needs_x) result[0].reset();
        if (!needs_gate_scale) result[6].reset();
        if (!needs_up_scale) result[7].reset();
      }
    }
    return first_order("gated_mlp", std::move(result));
  }
};

struct Mlp : torch::autograd::Function<Mlp> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& up_weight,
                            const at::Tensor& down_weight, const OptionalTensor& scale, std::string_view activation,
                            const OptionalTensor& up_bias, const OptionalTensor& down_bias) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [y, up] = run_plain(x, up_weight, down_weight, scale, activation, up_bias, down_bias);
    ctx->save_for_backward({up_weight, down_weight, scale.value_or(at::Tensor()), up});
    ctx->saved_data["activation"] = std::string(activation);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor scale = optional(saved[2]);
    const bool needs_x = ctx->needs_input_grad(0), needs_scale = scale && ctx->needs_input_grad(3);
    variable_list result(7);
    {
      const BelowAutograd below;
      auto [grad_up, grad_scale] =
          call::scaled_activation_backward(product(grads[0], saved[1]), saved[3], scale,
                                           ctx->saved_data.begin()->second.toStringRef(), {}, {needs_x, needs_scale});
      if (needs_x) result[0] = product(grad_up, saved[0]);
      if (needs_scale) result[3] = grad_scale;
    }
    return first_order("mlp", std::move(result));
  }
};

// The same of operators with nodes of their own: for weights that are trained, and for one scaled input of the two
at::Tensor compose_gated(const at::Tensor& x, const at::Tensor& gate_weight, const at::Tensor& up_weight,
                         const at::Tensor& down_weight, const OptionalTensor& scale, std::string_view activation,
                         const OptionalTensor& gate_scale, const OptionalTensor& up_scale) {
  const at::Tensor gate = call::scaled_linear(x, gate_weight, {}, gate_scale, {}, {});
  const at::Tensor up = call::scaled_linear(x, up_weight, {}, up_scale, {}, {});
  return call::scaled_linear(call::gated_activation(gate, up, scale, activation, {}), down_weight, {}, {}, {}, {});
}

at::Tensor gated_mlp(const at::Tensor& x, const at::Tensor& gate_weight, const at::Tensor& up_weight,
                     const at::Tensor& down_weight, const OptionalTensor& scale, std::string_view activation,
                     const OptionalTensor& gate_scale, const OptionalTensor& up_scale) {
  if (gate_scale.has_value() != up_scale.has_value()) {
    return compose_gated(x, gate_weight, up_weight, down_weight, scale, activation, gate_scale, up_scale);
  }
  return std::get<0>(run_gated(x, gate_weight, up_weight, down_weight, scale, activation, gate_scale, up_scale));
}

at::Tensor mlp(const at::Tensor& x, const at::Tensor& up_weight, const at::Tensor& down_weight,
               const OptionalTensor& scale, std::string_view activation, const OptionalTensor& up_bias,
               const OptionalTensor& down_bias) {
  return std::get<0>(run_plain(x, up_weight, down_weight, scale, activation, up_bias, down_bias));
}

at::Tensor record_gated(const at::Tensor& x, const at::Tensor& gate_weight, const at::Tensor& up_weight,
                        const at::Tensor& down_weight, const OptionalTensor& scale, std::string_view activation,
                        const OptionalTensor& gate_scale, const OptionalTensor& up_scale) {
  if (any_recorded(gate_weight, up_weight, down_weight) || gate_scale.has_value() != up_scale.has_value()) {
    return compose_gated(x, gate_weight, up_weight, down_weight, scale, activation, gate_scale, up_scale);
  }
  if (any_recorded(x, scale, gate_scale, up_scale)) {
    return GatedMlp::apply(x, gate_weight, up_weight, down_weight, scale, activation, gate_scale, up_scale);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call::gated_mlp(x, gate_weight, up_weight, down_weight, scale, activation, gate_scale, up_scale);
}

at::Tensor record_plain(const at::Tensor& x, const at::Tensor& up_weight, const at::Tensor& down_weight,
                        const OptionalTensor& scale, std::string_view activation, const OptionalTensor& up_bias,
                        const OptionalTensor& down_bias) {
  if (any_recorded(up_weight, down_weight, up_bias, down_bias)) {
    return mlp(x, up_weight, down_weight, scale, activation, up_bias, down_bias);
  }
  if (any_recorded(x, scale)) {
    return Mlp::apply(x, up_weight, down_weight, scale, activation, up_bias, down_bias);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call::mlp(x, up_weight, down_weight, scale, activation, up_bias, down_bias);
}

template <c10::DeviceType kDevice>
at::Tensor autocast_gated(const at::Tensor& x, const at::Tensor& gate_weight, const at::Tensor& up_weight,
                          const at::Tensor& down_weight, const OptionalTensor& scale, std::string_view activation,
                          const OptionalTensor& gate_scale, const OptionalTensor& up_scale) {
  const c10::impl::ExcludeDispatchKeyGuard below(c10::autocast_dispatch_keyset);
  const Autocast cast(kDevice);
  return call::gated_mlp(cast(x), cast(gate_weight), cast(up_weight), cast(down_weight), scale, activation, gate_scale,
                         up_scale);
}

template <c10::DeviceType kDevice>
at::Tensor autocast_plain(const at::Tensor& x, const at::Tensor& up_weight, const at::Tensor& down_weight,
                          const OptionalTensor& scale, std::string_view activation, const OptionalTensor& up_bias,
                          const OptionalTensor& down_bias) {
  const c10::impl::ExcludeDispatchKeyGuard below(c10::autocast_dispatch_keyset);
  const Autocast cast(kDevice);
  return call::mlp(cast(x), cast(up_weight), cast(down_weight), scale, activation, cast(up_bias), cast(down_bias));
}

}  // namespace

void register_blocks(Registry& registry) {
  torch::Library& kernels = registry[c10::DispatchKey::CompositeExplicitAutograd];
  kernels.impl("gated_mlp", gated_mlp);
  kernels.impl("mlp", mlp);

  torch::Library& autograd = registry[c10::DispatchKey::Autograd];
  autograd.impl("gated_mlp", record_gated);
  autograd.impl("mlp", record_plain);

  torch::Library& autocast_cpu = registry[c10::DispatchKey::AutocastCPU];
  autocast_cpu.impl("gated_mlp", autocast_gated<c10::kCPU>);
  autocast_cpu.impl("mlp", autocast_plain<c10::kCPU>);

  torch::Library& autocast_cuda = registry[c10::DispatchKey::AutocastCUDA];
  autocast_cuda.impl("gated_mlp", autocast_gated<c10::kCUDA>);
  autocast_cuda.impl("mlp", autocast_plain<c10::kCUDA>);
}

}  // namespace ia3
