"""What users do with a model beside calling it: spread, offload, quantize, export, hand it to other libraries."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import ia3
from ia3 import IA3Error
from ia3_kernels import formulas

from . import quantizing
from .conftest import BY_NAME, perturb
from .helpers import word_tokenizer

accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def inputs_of(name: str) -> dict[str, Tensor]:
    family = BY_NAME[name]
    inputs = {key: value for key, value in family.inputs().items() if key != "labels"}
    return inputs | ({"decoder_input_ids": inputs["input_ids"]} if family.task == "SEQ_2_SEQ_LM" else {})


@torch.no_grad()
def logits_of(model: Any, name: str = "llama") -> Tensor:
    return model(**inputs_of(name)).logits  # type: ignore[no-any-return]


# --- whoever asks PEFT -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_pefts_functions_find_every_tensor(name: str, adapted: Any) -> None:
    model, twin = adapted(BY_NAME[name]), adapted(BY_NAME[name])
    perturb(twin, seed=9)
    state = peft.get_peft_model_state_dict(model)
    trained = {key.replace(".default", "") for key, value in model.named_parameters() if value.requires_grad}
    assert {key.replace(".default", "") for key in state} == {key.replace("modules_to_save.", "") for key in trained}
    scaled = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    named = {f"model.{row.module}" for row in ia3.report(model).rows}
    assert {status.name for status in peft.get_layer_status(model)} >= named
    assert len(scaled) >= len(named)
    assert peft.get_model_status(model).adapter_model_type == "IA3Model"

    assert not torch.equal(logits_of(twin, name), logits_of(model, name))
    peft.set_peft_model_state_dict(twin, state)
    assert torch.equal(logits_of(twin, name), logits_of(model, name))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_an_injected_models_state_goes_round_by_pefts_functions(name: str) -> None:
    """BERT has a ``base_model`` of its own, by which a ``PeftModel`` must not be told."""
    family = BY_NAME[name]
    models = []
    for seed in (5, 6):
        model = ia3.inject_adapter_in_model(ia3.IA3Config(**family.targets), family.build())
        perturb(model, seed)
        models.append(model)
    first, second = models
    state = peft.get_peft_model_state_dict(first)
    assert len(state) == sum(".ia3_l." in key for key in first.state_dict())
    assert not torch.equal(logits_of(second, name), logits_of(first, name))
    ia3.set_peft_model_state_dict(second, state, ignore_mismatched_sizes=True, low_cpu_mem_usage=True)
    assert torch.equal(logits_of(second, name), logits_of(first, name))

    shapes = ia3.inject_adapter_in_model(ia3.IA3Config(), family.build(), state_dict=state, low_cpu_mem_usage=True)
    assert all(value.is_meta for key, value in shapes.named_parameters() if "ia3_l" in key)
    ia3.set_peft_model_state_dict(shapes, state, low_cpu_mem_usage=True)
    assert torch.equal(logits_of(shapes, name), logits_of(first, name))


def test_a_compiled_models_state_is_unwrapped_when_asked(adapted: Any) -> None:
    model = adapted(BY_NAME["llama"])
    compiled: Any = torch.compile(model, backend="eager")
    state = ia3.get_peft_model_state_dict(compiled, unwrap_compiled=True)
    assert state.keys() == ia3.get_peft_model_state_dict(model).keys()


# --- models spread and offloaded -------------------------------------------------------------------------------------


def _spread(base: nn.Module) -> nn.Module:
    """Dispatch every layer by itself, as a ``device_map`` of several devices does."""
    leaves = [path for path, module in base.named_modules() if not module._modules and path]
    spread: nn.Module = accelerate.dispatch_model(base, dict.fromkeys(leaves, "cpu"), force_hooks=True)
    assert any(hasattr(module, "_hf_hook") for module in base.modules())
    return spread


@pytest.mark.parametrize("comes_first", ["map", "adapter"])
def test_a_model_spread_over_devices_merges_to_the_bit(comes_first: str) -> None:
    family = BY_NAME["llama"]
    base = family.build()
    config = ia3.IA3Config(task_type="CAUSAL_LM")
    if comes_first == "map":
        model = ia3.get_peft_model(_spread(base), config)
        perturb(model)
    else:
        model = ia3.get_peft_model(base, config)
        perturb(model)
        _spread(model.get_base_model())
    oracle = ia3.decelerate(copy.deepcopy(model)).double()
    expected, unmerged = logits_of(oracle), logits_of(model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    model.merge_adapter()
    torch.testing.assert_close(logits_of(model).double(), expected, rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    assert torch.equal(logits_of(model), unmerged)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(logits_of(model.merge_and_unload()).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["bnb 8-bit", "bnb nf4"])
def test_a_quantized_model_spread_over_devices_merges(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=64)).save_pretrained(tmp_path)
    base = quantizing.loaded(tmp_path, kind, torch.float32)
    for module in base.modules():
        if not module._modules:
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True))
    model = ia3.get_peft_model(base, ia3.IA3Config(task_type="CAUSAL_LM")).eval()
    perturb(model)
    unmerged = logits_of(model)
    model.merge_adapter()
    # Scales are multiplied in fp32 where activations were: no more than a rounding to the activations' dtype differs.
    torch.testing.assert_close(logits_of(model), unmerged, rtol=2e-2, atol=2e-2 * float(unmerged.abs().max()))
    model.unmerge_adapter()
    assert torch.equal(logits_of(model), unmerged)


def test_somebodys_own_hook_still_forbids_a_merge(adapted: Any) -> None:
    model = adapted(BY_NAME["llama"])
    layer = model.get_base_model().model.layers[0].self_attn.k_proj.base_layer
    accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
    with pytest.raises(IA3Error, match="hooks"):
        model.merge_adapter()


@pytest.mark.parametrize("where", ["disk", "cpu-offload"])
def test_an_adapter_on_an_offloaded_base_computes_what_it_does_in_memory(where: str, tmp_path: Path) -> None:
    family = BY_NAME["llama"]
    whole = ia3.get_peft_model(family.build(), ia3.IA3Config(task_type="CAUSAL_LM"))
    perturb(whole)
    whole.save_pretrained(tmp_path / "adapter")
    family.build().save_pretrained(tmp_path / "base")
    if where == "disk":
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        base = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base",
            device_map=places | {"model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "cpu"},
            offload_folder=tmp_path / "offloaded",
        )
    else:
        base = accelerate.cpu_offload(family.build(), torch.device("cpu"))
    assert any(parameter.is_meta for parameter in base.parameters())

    model = ia3.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(model), logits_of(whole), rtol=1e-5, atol=1e-6)
    stored = peft.get_peft_model_state_dict(model)
    for key, value in peft.get_peft_model_state_dict(whole).items():
        assert torch.equal(stored[key].to("cpu"), value)
    with pytest.raises(IA3Error, match="hooks"):
        model.merge_adapter()
    torch.testing.assert_close(logits_of(model), logits_of(whole), rtol=1e-5, atol=1e-6)


def test_a_new_adapter_on_an_offloaded_base_is_trained_and_saved(tmp_path: Path) -> None:
    family = BY_NAME["llama"]
    model = ia3.get_peft_model(
        accelerate.cpu_offload(family.build(), torch.device("cpu")), ia3.IA3Config(task_type="CAUSAL_LM")
    )
    vectors = {key: value for key, value in model.named_parameters() if "ia3_l" in key}
    assert vectors
    assert not any(value.is_meta for value in vectors.values())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(model), logits_of(family.build()), rtol=1e-5, atol=1e-6)


# --- quantized by torch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "t5_gated", "llama", "bert"])
def test_a_model_that_torch_quantizes_afterwards_computes_what_its_own_blocks_do(name: str, adapted: Any) -> None:
    model = adapted(BY_NAME[name])
    plain = ia3.decelerate(copy.deepcopy(model))
    quantize: Any = torch.ao.quantization.quantize_dynamic
    model = quantize(model, {nn.Linear}, dtype=torch.qint8)
    plain = quantize(plain, {nn.Linear}, dtype=torch.qint8)
    torch.testing.assert_close(logits_of(model, name), logits_of(plain, name), rtol=1e-4, atol=1e-4)
    assert "computes its own product" in str(ia3.report(model))
    with pytest.raises(IA3Error, match="cannot merge"):
        model.merge_adapter()


# --- called by keyword -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path", "method", "argument"),
    [
        ("llama", "model.layers.0.mlp", "forward", "x"),
        ("t5", "encoder.block.0.layer.1.DenseReluDense", "forward", "hidden_states"),
        ("phi", "model.layers.0.mlp", "forward", "hidden_states"),
        ("bert", "bert.encoder.layer.0", "feed_forward_chunk", "attention_output"),
        ("llama", "model.layers.0.self_attn.q_proj", "forward", "input"),
    ],
)
def test_what_is_patched_takes_its_input_by_name(
    name: str, path: str, method: str, argument: str, adapted: Any
) -> None:
    patched: Any = adapted(BY_NAME[name]).get_base_model().get_submodule(path)
    assert method in patched.__dict__
    x = torch.randn(2, 3, 32)
    call = patched if method == "forward" else getattr(patched, method)
    assert torch.equal(call(**{argument: x}), call(x))
    compiled = torch.compile(lambda x: call(**{argument: x}), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), call(x))
    with pytest.raises(TypeError):
        call(x, **{argument: x})


# --- exported --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "strict"), [("llama", False), ("llama", True), ("t5", False), ("gpt2", False), ("bert", False)]
)
def test_an_exported_adapter_is_the_formula(
    name: str, strict: bool, dtype: torch.dtype, adapted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole ``PeftModel``; no operator of this package, in any dtype, so that it runs where that is not."""
    # As on a processor whose matmul of this dtype a compiler leaves to the native library.
    monkeypatch.setattr(formulas, "_OPAQUE_MATMULS", frozenset({dtype}))
    model = adapted(BY_NAME[name], dtype)
    inputs = inputs_of(name) | ({} if name == "bert" else {"use_cache": False})
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs, strict=strict)
        logits = exported.module()(**inputs).logits
    targets = [
        str(node.target)
        for module in exported.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function"
    ]
    assert any(target.startswith("aten.") for target in targets)
    assert not [target for target in targets if "ia3" in target]
    oracle = ia3.decelerate(copy.deepcopy(model)).double()
    right = logits_of(oracle, name)
    error, allowed = (logits - right).norm(), (logits_of(model, name) - right).norm()
    assert error <= 2 * allowed + torch.finfo(dtype).eps * right.norm()


def test_an_unmerged_model_goes_to_onnx(adapted: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    class Logits(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor) -> Tensor:
            logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
            return logits

    model = adapted(BY_NAME["llama"])
    ids = inputs_of("llama")["input_ids"]
    torch.onnx.export(Logits(model), (ids,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    written = onnx.load(tmp_path / "model.onnx")
    assert all(node.domain in ("", "ai.onnx") for node in written.graph.node)
    (logits,) = ReferenceEvaluator(written).run(None, {written.graph.input[0].name: ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits.copy()), logits_of(model), rtol=1e-4, atol=1e-5)


# --- handed to other libraries ---------------------------------------------------------------------------------------


def test_a_configuration_is_pefts() -> None:
    config = ia3.IA3Config(task_type="CAUSAL_LM")
    assert isinstance(config, peft.PeftConfig)
    assert config.peft_type == peft.PeftType.IA3
    model = peft.get_peft_model(BY_NAME["llama"].build(), config)
    assert isinstance(model, peft.PeftModelForCausalLM)


def test_transformers_takes_a_configuration_in_add_adapter() -> None:
    family = BY_NAME["llama"]
    model: Any = family.build()
    model.add_adapter(ia3.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]))
    perturb(model)
    right = logits_of(copy.deepcopy(model).double())
    ia3.accelerate(model)
    torch.testing.assert_close(logits_of(model).double(), right, rtol=1e-5, atol=1e-6)
    assert "fused into LlamaMLP" in str(ia3.report(model))
    assert model.active_adapters() == ["default"]


def test_sentence_transformers_takes_a_configuration(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    config = transformers.BertConfig(**{**BY_NAME["bert"].sizes, "max_position_embeddings": 32})
    transformers.BertModel(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    model.add_adapter(ia3.IA3Config(task_type="FEATURE_EXTRACTION"))
    before = model.encode(["a b"])
    perturb(model)
    assert not (model.encode(["a b"]) == before).all()


def test_a_pipeline_works_and_logs_no_error(adapted: Any) -> None:
    model = adapted(BY_NAME["llama"])
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=word_tokenizer(), device="cpu")
        text = pipe("a b c", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    finally:
        logger.removeHandler(handler)
    assert text.startswith("a b c")
    assert not [message for message in messages if "not supported" in message]


# --- what a layer shows ----------------------------------------------------------------------------------------------


def test_code_that_reads_a_layers_attributes_reads_those_of_the_layer_inside() -> None:
    class Strided(nn.Module):
        """Ask a convolution for its stride, and a linear layer for its size, as model code does."""

        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.proj = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            assert self.convolution.padding == (1, 1)
            assert self.convolution.kernel_size == (3, 3)
            y = self.convolution(x)
            assert y.shape[-1] == -(-x.shape[-1] // self.convolution.stride[0])
            return self.proj(y.mean((-1, -2)).expand(1, self.proj.in_features))  # type: ignore[no-any-return]

    base = Strided().eval()
    x = torch.randn(1, 3, 8, 8)
    expected = base(x)
    model = ia3.get_peft_model(base, ia3.IA3Config(target_modules=["convolution", "proj"], feedforward_modules=[]))
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(AttributeError, match="there_is_none"):
        base.convolution.there_is_none  # noqa: B018


@pytest.mark.parametrize("mode", [True, False])
def test_wrappers_are_in_the_mode_of_the_model(mode: bool) -> None:
    base = BY_NAME["llama"].build().train(mode)
    model = ia3.get_peft_model(base, ia3.IA3Config(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    assert {module.training for module in model.modules()} == {mode}
