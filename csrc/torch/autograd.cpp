// Gradients and autocast. A recorded call makes one node; its backward calls ia3:: operators, without Python, and
// computes what is asked for. What each node keeps is tabulated in docs/architecture.md. Gradients are first-order.
#include "autograd.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include "operators.h"
#include "python.h"

namespace ia3 {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

OptionalTensor optional(const at::Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

variable_list first_order(const char* op, variable_list gradients) {
  if (!at::GradMode::is_enabled()) return gradients;
  // create_graph=True: what differentiates a gradient again gets to a sentence.
  torch::autograd::variable_list given;
  for (const at::Tensor& gradient : gradients) {
    if (gradient.defined()) given.push_back(gradient.detach().set_requires_grad(true));
  }
  torch::autograd::DelayedError error(
      std::string(op) +
          ": second-order gradients are not implemented; compute first-order gradients, or run the formula in plain "
          "torch where you differentiate twice.",
      int64_t(given.size()));
  given = error.apply(std::move(given));
  size_t next = 0;
  for (at::Tensor& gradient : gradients) {
    if (gradient.defined()) gradient = given[next++];
  }
  return gradients;
}

namespace {

struct ScaledLinear : torch::autograd::Function<ScaledLinear> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const OptionalTensor& bias, const OptionalTensor& input_scale,
                            const OptionalTensor& output_scale, const OptionalTensor& adapter_index) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto needs = [](const OptionalTensor& tensor) { return tensor && tensor->requires_grad(); };
    at::Tensor y, product;
    if (needs(output_scale)) {
      // ds_out = sum of dy z, so the product z = (x s_in) W^T + b is kept
      std::tie(y, product) = call::scaled_linear_product(x, weight, bias, input_scale, *output_scale, adapter_index);
    } else {
      y = call::scaled_linear(x, weight, bias, input_scale, output_scale, adapter_index);
    }
    const bool keeps_x = weight.requires_grad() || needs(input_scale);
    const bool keeps_weight = x.requires_grad() || needs(input_scale);
    ctx->save_for_backward({keeps_x ? x : at::Tensor(), keeps_weight ? weight : at::Tensor(),
                            input_scale.value_or(at::Tensor()), output_scale.value_or(at::Tensor()),
                            adapter_index.value_or(at::Tensor()), product});
    if (bias) ctx->saved_data["bias"] = true;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &product = saved[5];
    const OptionalTensor input_scale = optional(saved[2]), output_scale = optional(saved[3]);
    const OptionalTensor adapter_index = optional(saved[4]);
    // Only the tensors that were given have an edge.
    size_t edge = 2;
    const bool needs_x = ctx->needs_input_grad(0), needs_weight = ctx->needs_input_grad(1);
    const bool needs_bias = !ctx->saved_data.empty() && ctx->needs_input_grad(edge++);
    const bool needs_input_scale = input_scale && ctx->needs_input_grad(edge++);
    const bool needs_output_scale = output_scale && ctx->needs_input_grad(edge++);
    const bool needs_product = needs_x || needs_weight || needs_bias || needs_input_scale;
    variable_list result(6);
    {
      const BelowAutograd below;
      // y = z s_out:  dz = dy s_out, ds_out = sum of dy z
      at::Tensor dz = grads[0];
      if (needs_output_scale) {
        std::tie(dz, result[4]) = call::scaled_activation_backward(
            grads[0], product, output_scale, "identity", index_of(output_scale, adapter_index), {needs_product, true});
      } else if (output_scale && needs_product) {
        dz = call::scaled_activation(grads[0], output_scale, "identity", index_of(output_scale, adapter_index));
      }
      // z = (x s_in) W^T + b:  d(x s_in) = dz W
      const OptionalTensor input_index = index_of(input_scale, adapter_index);
      if (needs_input_scale) {
        const at::Tensor scaled = call::scaled_linear(dz, weight.t(), {}, {}, {}, {});
        std::tie(result[0], result[3]) =
            call::scaled_activation_backward(scaled, x, input_scale, "identity", input_index, {needs_x, true});
        if (!needs_x) result[0].reset();
      } else if (needs_x) {
        // The input scale is the output scale of the transposed product: dx = (dz W) s_in
        result[0] = call::scaled_linear(dz, weight.t(), {}, {}, input_scale, input_index);
      }
      if (needs_weight) {
        const at::Tensor rows = input_scale ? call::scaled_activation(x, input_scale, "identity", input_index) : x;
        result[1] = flat(dz).t().matmul(flat(rows));
      }
      if (needs_bias) result[2] = flat(dz).sum(0);
    }
    return first_order("scaled_linear", std::move(result));
  }
};

struct GatedActivation : torch::autograd::Function<GatedActivation> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate, const at::Tensor& up,
                            const OptionalTensor& scale, std::string_view activation,
                            const OptionalTensor& adapter_index) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor h = call::gated_activation(gate, up, scale, activation, adapter_index);
    ctx->save_for_backward({gate, up, scale.value_or(at::Tensor()), adapter_index.value_or(at::Tensor())});
    ctx->saved_data["activation"] = std::string(activation);
    return h;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor scale = optional(saved[2]);
    const std::array<bool, 3> mask{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                   scale && ctx->needs_input_grad(2)};
    variable_list result(5);
    {
      const BelowAutograd below;
      const std::string& activation = ctx->saved_data.begin()->second.toStringRef();
      std::tie(result[0], result[1], result[2]) =
          call::gated_activation_backward(grads[0], saved[0], saved[1], scale, activation, optional(saved[3]), mask);
    }
    for (size_t i = 0; i < mask.size(); ++i) {
      if (!mask[i]) result[i].reset();
    }
    return first_order("gated_activation", std::move(result));
  }
};

struct ScaledActivation : torch::autograd::Function<ScaledActivation> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const OptionalTensor& scale,
                            std::string_view activation, const OptionalTensor& adapter_index) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor h = call::scaled_activation(x, scale, activation, adapter_index);
    // With no nonlinearity, x matters only to the gradient of the scale.
    const bool keeps_x = activation != "identity" || (scale && scale->requires_grad());
    ctx->save_for_backward(
        {keeps_x ? x : at::Tensor(), scale.value_or(at::Tensor()), adapter_index.value_or(at::Tensor())});
    ctx->saved_data["activation"] = std::string(activation);
    return h;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor scale = optional(saved[1]), adapter_index = optional(saved[2]);
    const bool needs_x = ctx->needs_input_grad(0), needs_scale = scale && ctx->needs_input_grad(1);
    variable_list result(4);
    {
      const BelowAutograd below;
      if (!saved[0].defined()) {
        result[0] = call::scaled_activation(grads[0], scale, "identity", adapter_index);
      } else {
        const std::string& activation = ctx->saved_data.begin()->second.toStringRef();
        std::tie(result[0], result[1]) = call::scaled_activation_backward(grads[0], saved[0], scale, activation,
                                                                          adapter_index, {needs_x, needs_scale});
      }
    }
    if (!needs_x) result[0].reset();
    if (!needs_scale) result[1].reset();
    return first_order("scaled_activation", std::move(result));
  }
};

// An operator as a node where a gradient is asked for
template <typename Node, auto kOperator>
struct Record;

template <typename Node, typename... Parameters, at::Tensor (*kOperator)(Parameters...)>
struct Record<Node, kOperator> {
  static at::Tensor run(Parameters... parameters) {
    if (any_recorded(parameters...)) return Node::apply(parameters...);
    const at::AutoDispatchBelowADInplaceOrView below;
    return kOperator(parameters...);
  }
};

void write_weight(const at::Tensor& weight, const at::Tensor& scale, int64_t dim) {
  TORCH_CHECK(!any_recorded(weight, scale),
              "scale_weight_: weight or scale requires grad, and an in-place scaling is not differentiable; call it "
              "under torch.no_grad().");
  const at::AutoDispatchBelowAutograd below;
  call::scale_weight_(weight, scale, dim);
}

// In inference mode too, where the above is left out, and a weight may be part of a graph all the same
void note_write(const at::Tensor& weight, const at::Tensor& scale, int64_t dim) {
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    call::scale_weight_(weight, scale, dim);
  }
  torch::autograd::impl::bump_version(weight);
}

template <c10::DeviceType kDevice>
at::Tensor autocast_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& input_scale, const OptionalTensor& output_scale,
                           const OptionalTensor& adapter_index) {
  const c10::impl::ExcludeDispatchKeyGuard below(c10::autocast_dispatch_keyset);
  const Autocast cast(kDevice);
  return call::scaled_linear(cast(x), cast(weight), cast(bias), input_scale, output_scale, adapter_index);
}

}  // namespace

void register_autograd(Registry& registry) {
  torch::Library& autograd = registry[c10::DispatchKey::Autograd];
  autograd.impl("scaled_linear", Record<ScaledLinear, call::scaled_linear>::run);
  autograd.impl("gated_activation", Record<GatedActivation, call::gated_activation>::run);
  autograd.impl("scaled_activation", Record<ScaledActivation, call::scaled_activation>::run);
  autograd.impl("scale_weight_", write_weight);
  for (const char* op : {"scaled_linear_product", "scale_pair", "gated_activation_backward",
                         "scaled_activation_backward", "scale_pair_backward"}) {
    autograd.impl(op, torch::autograd::autogradNotImplementedFallback());
  }

  registry[c10::DispatchKey::ADInplaceOrView].impl("scale_weight_", note_write);
  registry[c10::DispatchKey::AutocastCPU].impl("scaled_linear", autocast_linear<c10::kCPU>);
  registry[c10::DispatchKey::AutocastCUDA].impl("scaled_linear", autocast_linear<c10::kCUDA>);
}

}  // namespace ia3
