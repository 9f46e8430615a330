"""Keys and values of a fused projection alone: which outputs those are, and that nothing touches the others."""

from __future__ import annotations

import json
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import ia3

HEADS, WIDTH = 4, 8
_SIZES = {"hidden_size": 32, "num_attention_heads": HEADS, "num_hidden_layers": 2, "vocab_size": 64}
_INNER = {**_SIZES, "intermediate_size": 48}
_SHORT = {"n_embd": 32, "n_head": HEADS, "n_layer": 2, "vocab_size": 64}
FALCON = {**_SIZES, "ffn_hidden_size": 48, "alibi": False, "bias": True}
_MPT = {"d_model": 32, "n_heads": HEADS, "n_layers": 2, "vocab_size": 64}
_BLOOM = {"hidden_size": 32, "n_head": HEADS, "n_layer": 2, "vocab_size": 64}
# The class, the configuration, its sizes, the projection, and how many of its outputs are queries.
CASES: dict[str, tuple[str, str, dict[str, Any], str, int]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _SHORT, "c_attn", 32),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", {**_SHORT, "multi_query": True}, "c_attn", 32),
    "gpt_bigcode heads": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", {**_SHORT, "multi_query": False}, "c_attn", 32),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**_INNER, "num_key_value_heads": 2, "pad_token_id": 0}, "qkv_proj", 32),
    "mpt": ("MptForCausalLM", "MptConfig", _MPT, "Wqkv", 32),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", {**_INNER, "pad_token_id": 0}, "Wqkv", 32),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _INNER, "query_key_value", 32),
    "bloom": ("BloomForCausalLM", "BloomConfig", _BLOOM, "query_key_value", 32),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**FALCON, "multi_query": True}, "query_key_value", 32),
    "falcon heads": ("FalconForCausalLM", "FalconConfig", {**FALCON, "multi_query": False}, "query_key_value", 32),
    "falcon groups": (
        "FalconForCausalLM",
        "FalconConfig",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        "query_key_value",
        32,
    ),
}  # fmt: skip


def build(name: str) -> Any:
    architecture, config, sizes, _, _ = CASES[name]
    torch.manual_seed(0)
    settings = getattr(transformers, config)(**sizes, attn_implementation="eager")
    model = getattr(transformers, architecture)(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def adapted(name: str, base: Any = None, **config: Any) -> Any:
    settings: dict[str, Any] = {"target_modules": [CASES[name][3]], "feedforward_modules": [], "scale_queries": False}
    return ia3.get_peft_model(build(name) if base is None else base, ia3.IA3Config(**{**settings, **config}))


def tokens() -> Tensor:
    return torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))


def layers(model: Any) -> list[Any]:
    return [layer for _, layer in model.base_model.scaled_layers()]


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def masks(model: Any) -> list[Tensor]:
    return [layer._buffers["queries_default"].flatten() for layer in layers(model)]


def test_the_queries_are_where_the_model_reads_them(name: str) -> None:
    """Without them every position attends alike; without the others attention gives nothing."""
    model = adapted(name, base=build(name))
    for keep in (False, True):
        plain = build(name)
        for path, layer in model.base_model.scaled_layers():
            mask = layer._buffers["queries_default"].flatten()
            assert int(mask.sum()) == CASES[name][4]
            base = plain.get_submodule(path)
            weight = base.weight.data.T if isinstance(base, Conv1D) else base.weight.data
            weight[~mask if keep else mask] = 0
            if base.bias is not None:
                base.bias.data[~mask if keep else mask] = 0
        outputs: list[Tensor] = []
        for path, module in plain.named_modules():
            if path.rpartition(".")[2] in ("c_proj", "o_proj", "out_proj", "dense", "Wo") and "att" in path:
                module.register_forward_pre_hook(lambda _, args, outputs=outputs: outputs.append(args[0]))
        result = plain(tokens(), output_attentions=True)
        if keep:
            assert len(outputs) == 2
            assert not any(y.any() for y in outputs)
        else:
            is_causal = name != "modernbert"
            length = tokens().shape[1]
            uniform = torch.ones(length, length).tril() if is_causal else torch.ones(length, length)
            uniform = uniform / uniform.sum(-1, keepdim=True)
            if name not in ("bloom", "mpt"):  # whose positions add to the scores
                for weights in result.attentions:
                    torch.testing.assert_close(weights, uniform.expand_as(weights), rtol=0, atol=1e-5)


def test_only_keys_and_values_are_scaled_and_trained(name: str) -> None:
    model = adapted(name, init_ia3_weights=False).train()
    plain = ia3.get_peft_model(build(name), ia3.IA3Config(target_modules=[CASES[name][3]], feedforward_modules=[]))
    for layer, other in zip(layers(model), layers(plain), strict=True):
        mask = layer._buffers["queries_default"]
        other.ia3_l["default"].data.copy_(layer.ia3_l["default"].data.masked_fill(mask, 1.0))
    optimizer = torch.optim.AdamW(
        [value for value in model.parameters() if value.requires_grad], lr=0.1, weight_decay=0.5
    )
    model.eval()
    assert torch.equal(model(tokens()).logits, plain.eval()(tokens()).logits)
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens()).logits.square().mean().backward()
        for layer in layers(model):
            gradient, mask = layer.ia3_l["default"].grad, layer._buffers["queries_default"]
            assert not gradient[mask].any()
            assert gradient[~mask].any()
        optimizer.step()
    before = model(tokens()).logits
    weights = {key: value.clone() for key, value in model.get_base_model().state_dict().items()}
    model.merge_adapter()
    for layer, mask in zip(layers(model), masks(model), strict=True):
        key = next(
            key for key in weights if model.get_base_model().get_submodule(key.rpartition(".")[0]) is layer.base_layer
        )
        now, then = layer.base_layer.weight, weights[key.rpartition(".")[0] + ".weight"]
        now, then = (now.T, then.T) if isinstance(layer.base_layer, Conv1D) else (now, then)
        assert torch.equal(now[mask], then[mask])
        assert not torch.equal(now[~mask], then[~mask])
    torch.testing.assert_close(model(tokens()).logits, before, rtol=1e-4, atol=1e-4)


def test_peft_reads_the_same_from_the_file(name: str, tmp_path: Any) -> None:
    model = adapted(name, init_ia3_weights=False)
    expected = model(tokens()).logits
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["scale_queries"] is False
    with pytest.warns(UserWarning, match="scale_queries"):
        theirs = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    torch.testing.assert_close(theirs(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    loaded = ia3.PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert torch.equal(loaded(tokens()).logits, expected)
    assert all(torch.equal(a, b) for a, b in zip(masks(loaded), masks(model), strict=True))
    for layer, mask in zip(layers(loaded), masks(loaded), strict=True):
        assert (layer.ia3_l["default"].flatten()[mask] == 1).all()


def test_adapters_of_both_kinds_and_mixed_batches() -> None:
    model = adapted("gpt2", init_ia3_weights=False).eval()
    fields = {"target_modules": ["c_attn"], "feedforward_modules": [], "fan_in_fan_out": True}
    model.add_adapter("peft", ia3.IA3Config(**fields, init_ia3_weights=False))
    alone = {}
    for adapter in ("default", "peft"):
        model.set_adapter(adapter)
        alone[adapter] = model(tokens()).logits
    mixed = model(input_ids=tokens(), adapter_names=["peft", "default"]).logits
    torch.testing.assert_close(mixed[0], alone["peft"][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], alone["default"][1], rtol=1e-4, atol=1e-4)
    model.delete_adapter("default")
    model.add_adapter("default", ia3.IA3Config(**fields, init_ia3_weights=False))
    assert all("queries_default" not in layer._buffers for layer in layers(model))
    compiled = torch.compile(model, backend="aot_eager")
    model.add_adapter("third", ia3.IA3Config(**fields, init_ia3_weights=False, scale_queries=False))
    for adapter in ("third", "peft"):
        model.set_adapter(adapter)
        torch.testing.assert_close(compiled(tokens()).logits, model(tokens()).logits, rtol=1e-4, atol=1e-4)


def test_the_default_is_pefts_and_leaves_no_trace_in_the_file(tmp_path: Any) -> None:
    model = adapted("gpt2", scale_queries=True)
    assert not any(layer._buffers for layer in layers(model))
    model.save_pretrained(tmp_path)
    assert (
        not {"scale_queries", "target_parameters"} & json.loads((tmp_path / "adapter_config.json").read_text()).keys()
    )


@pytest.mark.parametrize(
    ("value", "said"), [(False, "no target is a fused projection"), ("no", "expected True or False")]
)
def test_bad_values_are_refused(value: Any, said: str) -> None:
    model = nn.Module()
    model.q_proj = nn.Linear(4, 4)
    with pytest.raises(ia3.IA3Error, match=said):
        ia3.get_peft_model(model, ia3.IA3Config(target_modules=["q_proj"], feedforward_modules=[], scale_queries=value))
