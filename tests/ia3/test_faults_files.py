"""What is saved and loaded where models differ from those an adapter was made on, and what is refused at once."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ia3
from ia3 import IA3Error
from ia3.merging.checkpoint import plan_merge, write_merged

from .conftest import BY_NAME, perturb

LLAMA = BY_NAME["llama"]
IDS = LLAMA.inputs()["input_ids"]
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@torch.no_grad()
def logits_of(model: Any, **inputs: Any) -> Tensor:
    return model(**(inputs or {"input_ids": IDS})).logits  # type: ignore[no-any-return]


def adapter_on(base: nn.Module, seed: int = 5, **config: Any) -> Any:
    model = ia3.get_peft_model(base, ia3.IA3Config(task_type="CAUSAL_LM", **config))
    perturb(model, seed)
    return model.eval()


# --- embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("comes_first", ["resize", "adapter"])
def test_resized_embeddings_are_saved_with_the_adapter_and_it_is_said(
    is_tied: bool, comes_first: str, tmp_path: Path
) -> None:
    LLAMA.build(tie_word_embeddings=is_tied).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if comes_first == "resize":
        base.resize_token_embeddings(70, mean_resizing=False)
        model = adapter_on(base)
    else:
        model = adapter_on(base)
        model.resize_token_embeddings(70, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[64:].normal_()
        model.get_output_embeddings().weight[64:].normal_()
    ids = {"input_ids": torch.cat([IDS, torch.full((2, 1), 66)], 1)}

    with pytest.warns(UserWarning, match="save_embedding_layers.*True.*resized"):
        model.save_pretrained(tmp_path / "adapter")
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fresh.resize_token_embeddings(70, mean_resizing=False)
    theirs = copy.deepcopy(fresh)
    loaded = ia3.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(logits_of(loaded, **ids), logits_of(model, **ids))
    right = logits_of(peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval(), **ids)
    torch.testing.assert_close(logits_of(loaded, **ids), right, rtol=1e-4, atol=1e-5)


def test_embeddings_that_were_not_resized_stay_out_of_the_file(tmp_path: Path) -> None:
    LLAMA.build().save_pretrained(tmp_path / "base")
    model = adapter_on(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "adapter")
    assert all(name.endswith(".ia3_l") for name in load_file(tmp_path / "adapter" / WEIGHTS))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["k_proj", "lm_head"], "feedforward_modules": []},
        {"target_modules": ["k_proj", "lm_head"], "feedforward_modules": ["lm_head"]},
        {"target_modules": ["k_proj"], "feedforward_modules": [], "modules_to_save": ["lm_head"]},
        {"target_modules": ["k_proj"], "feedforward_modules": [], "modules_to_save": ["embed_tokens"]},
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_merge_that_unties_embeddings_says_so_in_the_models_configuration(
    config: dict[str, Any], tmp_path: Path
) -> None:
    model = adapter_on(LLAMA.build(tie_word_embeddings=True), **config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    expected = logits_of(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-5)
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(loaded), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_stays_tied_is_still_said_to_be(tmp_path: Path) -> None:
    config = {"target_modules": ["k_proj"], "feedforward_modules": []}
    merged = adapter_on(LLAMA.build(tie_word_embeddings=True), **config).merge_and_unload()
    assert merged.config.tie_word_embeddings is True
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    heads = {"target_modules": ["lm_head"], "feedforward_modules": []}
    unloaded = adapter_on(LLAMA.build(tie_word_embeddings=True), **heads).unload()
    assert unloaded.config.tie_word_embeddings is True


# --- names ----------------------------------------------------------------------------------------------------------


def _vision() -> Any:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = {"image_size": 8, "patch_size": 4, "model_type": "clip_vision_model"}
    config = transformers.LlavaConfig(
        text_config=small | {"vocab_size": 64, "model_type": "llama"},
        vision_config=small | vision,
        image_token_index=63,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


TARGETS = {"target_modules": r".*language_model.*\.(k_proj|down_proj)", "feedforward_modules": r".*down_proj"}


@pytest.fixture
def old_names(tmp_path: Path) -> tuple[Path, Tensor]:
    """An adapter with the module names that transformers 4 gave to such a model, and the logits of the model."""
    model = adapter_on(_vision(), **TARGETS)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    now = "base_model.model.model.language_model."
    tensors = load_file(folder / WEIGHTS)
    assert all(name.startswith(now) for name in tensors)
    older = {name.replace(now, "base_model.model.language_model.model."): value for name, value in tensors.items()}
    save_file(older, folder / WEIGHTS, {"format": "pt"})
    return folder, logits_of(model)


def test_names_of_older_transformers_are_those_of_the_models_own_mapping(old_names: tuple[Path, Tensor]) -> None:
    folder, expected = old_names
    assert torch.equal(logits_of(ia3.PeftModel.from_pretrained(_vision(), folder).eval()), expected)
    other = adapter_on(_vision(), seed=8, **TARGETS)
    other.load_adapter(folder, "old")
    other.set_adapter("old")
    assert torch.equal(logits_of(other), expected)


def test_a_saved_vision_language_model_is_merged_on_disk(old_names: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, expected = old_names
    _vision().save_pretrained(tmp_path / "base")
    out = tmp_path / "merged"
    write_merged(plan_merge(tmp_path / "base", folder, out), out)
    merged = transformers.LlavaForConditionalGeneration.from_pretrained(out).eval()
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["whole", "layer"])
def test_a_compiled_base_saves_plain_names_and_loads_them(part: str, tmp_path: Path) -> None:
    def compiled() -> Any:
        base = LLAMA.build()
        if part == "whole":
            return torch.compile(base, backend="eager")
        base.model.layers[0] = torch.compile(base.model.layers[0], backend="eager")
        return base

    plain = adapter_on(LLAMA.build())
    plain.save_pretrained(tmp_path / "plain")
    names = load_file(tmp_path / "plain" / WEIGHTS).keys()
    targets = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}

    model = adapter_on(compiled(), **targets)
    model.save_pretrained(tmp_path / "compiled")
    assert load_file(tmp_path / "compiled" / WEIGHTS).keys() == names
    for folder in ("plain", "compiled"):
        expected = logits_of(ia3.PeftModel.from_pretrained(LLAMA.build(), tmp_path / folder).eval())
        loaded = ia3.PeftModel.from_pretrained(compiled(), tmp_path / folder).eval()
        torch.testing.assert_close(logits_of(loaded), expected, rtol=1e-5, atol=1e-6)
    theirs = peft.PeftModel.from_pretrained(LLAMA.build(), str(tmp_path / "compiled")).eval()
    torch.testing.assert_close(logits_of(theirs), logits_of(model), rtol=1e-4, atol=1e-5)


def test_a_file_that_older_releases_saved_from_a_compiled_base_is_loaded(tmp_path: Path) -> None:
    model = adapter_on(LLAMA.build())
    model.save_pretrained(tmp_path)
    prefix = "base_model.model."
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({name.replace(prefix, f"{prefix}_orig_mod.", 1): value for name, value in tensors.items()},
              tmp_path / WEIGHTS, {"format": "pt"})  # fmt: skip
    assert torch.equal(logits_of(ia3.PeftModel.from_pretrained(LLAMA.build(), tmp_path).eval()), logits_of(model))


@pytest.mark.parametrize("field", ["fan_in_fan_out", "init_ia3_weights", "inference_mode", "modules_to_save"])
def test_a_null_in_the_file_is_the_fields_default(field: str, tmp_path: Path) -> None:
    model = adapter_on(LLAMA.build())
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(content | {field: None}))
    loaded = ia3.PeftModel.from_pretrained(LLAMA.build(), tmp_path).eval()
    assert torch.equal(logits_of(loaded), logits_of(model))
    theirs = peft.PeftModel.from_pretrained(LLAMA.build(), str(tmp_path)).eval()
    torch.testing.assert_close(logits_of(loaded), logits_of(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", ["default", "french"])
def test_names_that_still_hold_the_adapters_are_loaded(adapter: str, tmp_path: Path) -> None:
    model = adapter_on(LLAMA.build())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({f"{name}.{adapter}": value for name, value in tensors.items()}, tmp_path / WEIGHTS, {"format": "pt"})
    loaded = ia3.PeftModel.from_pretrained(LLAMA.build(), tmp_path, adapter_name=adapter).eval()
    assert torch.equal(logits_of(loaded), logits_of(model))


# --- refused at once -------------------------------------------------------------------------------------------------


class _Holder(nn.Module):
    """Hold modules in containers that are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.heads = nn.ModuleDict({"one": nn.Linear(4, 2)})
        self.layers = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.heads["one"](self.layers[0](self.proj(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("name", "kind"), [("heads", "ModuleDict"), ("layers", "ModuleList")])
def test_a_container_cannot_be_trained_whole(name: str, kind: str, snapshot: Any) -> None:
    model = _Holder()
    before = snapshot(model)
    config = {"target_modules": ["proj"], "feedforward_modules": []}
    with pytest.raises(IA3Error, match=rf"modules_to_save means '{name}', a {kind}.*name the modules in it"):
        ia3.get_peft_model(model, ia3.IA3Config(**config, modules_to_save=[name]))
    assert snapshot(model) == before
    trained = ia3.get_peft_model(model, ia3.IA3Config(**config, modules_to_save=["heads.one"]))
    x = torch.randn(2, 4)
    trained(x).sum().backward()
    assert [key for key, value in trained.named_parameters() if value.grad is not None and "modules_to_save" in key]


def _router_models() -> dict[str, tuple[Any, str]]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"vocab_size": 64, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    return {
        "llama4": (lambda: transformers.Llama4ForCausalLM(
            transformers.Llama4TextConfig(**sizes, head_dim=8, intermediate_size_mlp=48, interleave_moe_layer_step=1)
        ), "router"),
        "phimoe": (lambda: transformers.PhimoeForCausalLM(transformers.PhimoeConfig(**sizes)), "router"),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["llama4", "phimoe"])
def test_a_router_is_no_linear_layer(name: str) -> None:
    build, router = _router_models()[name]
    model = build()
    routers = {path for path, module in model.named_modules() if path.endswith(router)}
    assert routers
    with pytest.raises(IA3Error, match=rf"target_modules matches '.*{router}'.*something else"):
        ia3.get_peft_model(model, ia3.IA3Config(target_modules=[router], feedforward_modules=[]))
    base = logits_of(model.eval())
    wrapped = ia3.get_peft_model(model, ia3.IA3Config(target_modules="all-linear", feedforward_modules=[]))
    scaled = {row.module for row in ia3.report(wrapped).rows}
    assert scaled
    assert not scaled & routers
    torch.testing.assert_close(logits_of(wrapped), base, rtol=1e-4, atol=1e-5)


class _Flattened(nn.Linear):
    """Return another shape than a linear layer does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum(-1)


class _Dictionary(nn.Linear):
    """Return more than a tensor."""

    def forward(self, x: Tensor) -> Any:
        return {"y": super().forward(x)}


class _WithRoom(nn.Linear):
    """Keep a weight of which one half is used."""

    def forward(self, x: Tensor) -> Tensor:
        half = self.out_features // 2
        return nn.functional.linear(x, self.weight[:half])


@pytest.mark.parametrize("kind", [_Flattened, _Dictionary, _WithRoom])
def test_a_subclass_that_computes_something_else_is_refused_in_one_sentence(kind: Any) -> None:
    model = nn.ModuleDict({"odd": kind(6, 4), "even": nn.Linear(6, 4)})
    with pytest.raises(IA3Error, match=rf"'odd', a {kind.__name__}, .* exclude_modules"):
        ia3.get_peft_model(model, ia3.IA3Config(target_modules=["odd"], feedforward_modules=[]))
    wrapped = ia3.get_peft_model(model, ia3.IA3Config(target_modules="all-linear", feedforward_modules=[]))
    assert [row.module for row in ia3.report(wrapped).rows] == ["even"]


def test_a_model_that_has_pefts_adapter_is_told_what_to_do() -> None:
    theirs = peft.get_peft_model(LLAMA.build(), peft.IA3Config(task_type="CAUSAL_LM"))
    for model in (theirs, theirs.get_base_model()):
        with pytest.raises(IA3Error, match=r"already carries adapters; .*ia3\.accelerate"):
            ia3.get_peft_model(model, ia3.IA3Config(task_type="CAUSAL_LM"))
