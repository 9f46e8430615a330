"""Each wrapped layer against the reference, whole and in the slices of tensor-parallel ranks; the index of slots."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.model_executor.layers import linear
from vllm.model_executor.models.llama import LlamaMLP

from ia3.errors import IA3Error
from ia3_kernels import reference
from ia3_vllm.index import SlotIndex
from ia3_vllm.layers import Scaled, layer_classes, move_into_activation

SLOTS, TOKENS, WIDTH, HEAD, HEADS, KV_HEADS = 3, 7, 32, 4, 8, 2
# By kind: how vLLM makes the layer, the names of the layers in it, and the outputs of each.
KINDS: dict[str, Any] = {
    "column": (lambda: linear.ColumnParallelLinear(WIDTH, 24), ["one"], [24]),
    "merged column": (lambda: linear.MergedColumnParallelLinear(WIDTH, [16, 16]), ["gate", "up"], [16, 16]),
    "merged column under one name": (lambda: linear.MergedColumnParallelLinear(WIDTH, [16, 16]), ["both"], [32]),
    "qkv": (lambda: linear.QKVParallelLinear(WIDTH, HEAD, HEADS, KV_HEADS), ["q", "k", "v"], [32, 8, 8]),
    "qkv under one name": (lambda: linear.QKVParallelLinear(WIDTH, HEAD, HEADS, KV_HEADS), ["qkv"], [48]),
    "row": (lambda: linear.RowParallelLinear(WIDTH, 24), ["one"], [24]),
    "replicated": (lambda: linear.ReplicatedLinear(WIDTH, 24), ["one"], [24]),
}


@pytest.fixture(autouse=True)
def _vllm() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let layers that are made from now on be one rank's."""

    def set_rank(rank: int, size: int) -> None:
        for module in (linear, "vllm.model_executor.parameter"):
            for name, value in (("rank", rank), ("world_size", size)):
                target = f"{module if isinstance(module, str) else module.__name__}.get_tensor_model_parallel_{name}"
                monkeypatch.setattr(target, lambda value=value: value)

    # The test is what sums over the ranks.
    monkeypatch.setattr("vllm.lora.layers.row_parallel_linear.tensor_model_parallel_all_reduce", lambda y: y)
    set_rank(0, 1)
    return set_rank


def _loaded(make: Any, weights: list[Tensor], biases: list[Tensor]) -> Any:
    """One of vLLM's layers with this rank's part of the weights, as vLLM itself shards them."""
    layer = make()
    ids: list[Any] = [None] if len(weights) == 1 else ["q", "k", "v"] if len(weights) == 3 else [0, 1]
    for parameter, values in ((layer.weight, weights), (layer.bias, biases)):
        for value, part in zip(values, ids, strict=True):
            parameter.weight_loader(parameter, value, *(() if part is None else (part,)))
    layer.cpu_linear = F.linear
    return layer.requires_grad_(False)


def _wrapped(layer: Any, names: list[str], index: SlotIndex, outputs: list[bool], inputs: list[bool]) -> Any:
    config = LoRAConfig(max_lora_rank=1, max_loras=SLOTS)
    fits = [
        kind
        for kind in layer_classes(False)
        if kind.can_replace_layer(source_layer=layer, lora_config=config, packed_modules_list=names, model_config=None)
    ]
    assert len(fits) == 1
    made = fits[0](layer)
    made.create_lora_weights(SLOTS, config)
    made.set_mapping(index)
    made.create_tables("layer", outputs, inputs, torch.float32)
    return made


def _index(rows: list[int]) -> SlotIndex:
    index = SlotIndex(16, torch.device("cpu"))
    index.buffer[: len(rows)] = torch.tensor(rows, dtype=torch.int32)
    return index


def _vectors(outputs: list[int], seed: int) -> tuple[list[Tensor], Tensor]:
    random = torch.Generator().manual_seed(seed)
    right = [torch.rand(n, 1, generator=random) + 0.5 for n in outputs]
    return right, torch.rand(1, WIDTH, generator=random) + 0.5


def _expected(x: Tensor, weights: list[Tensor], biases: list[Tensor], rows: list[int], inputs: bool) -> list[Tensor]:
    outputs = [len(weight) for weight in weights]
    index = torch.tensor(rows, dtype=torch.int32)
    whole = [_vectors(outputs, slot) for slot in range(SLOTS)]
    left = torch.cat([vector for _, vector in whole]) if inputs else None
    return [
        reference.scaled_linear(x, weight, bias, left, torch.stack([own[part][:, 0] for own, _ in whole]), index)
        for part, (weight, bias) in enumerate(zip(weights, biases, strict=True))
    ]


@pytest.mark.parametrize("rows", [[0, 1, 2, -1, 1, 0, -1], [-1] * TOKENS, [2] * TOKENS], ids=["mix", "base", "one"])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_together_are_the_reference(kind: str, size: int, rows: list[int], as_rank: Any) -> None:
    make, names, outputs = KINDS[kind]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(n, WIDTH, generator=generator) for n in outputs]
    biases = [torch.randn(n, generator=generator) for n in outputs]
    x = torch.randn(TOKENS, WIDTH, generator=generator)
    with_inputs = len(names) == 1
    expected = _expected(x, weights, biases, rows, with_inputs)
    whole = kind == "qkv under one name" or kind == "merged column under one name"
    if whole:  # the slices of what lies in one matrix
        sizes = [32, 8, 8] if "qkv" in kind else [16, 16]
        weights, biases = list(weights[0].split(sizes)), list(biases[0].split(sizes))
        expected = list(expected[0].split(sizes, -1))

    pieces: list[list[Tensor]] = []
    for rank in range(size):
        as_rank(rank, size)
        layer = _wrapped(
            _loaded(make, weights, biases), names, _index(rows), [True] * len(names), [with_inputs] * len(names)
        )
        for slot in range(SLOTS):
            right, left = _vectors(outputs, slot)
            layer.set_scales(slot, *layer.shard(right, [left if with_inputs else None] * len(names)))
        local = WIDTH // size if kind == "row" else WIDTH
        own = x[:, rank * local : (rank + 1) * local] if kind == "row" else x
        y = layer(own)[0]
        widths = layer.widths
        if whole:
            own_kv = max(8 // size, HEAD)
            widths = (y.shape[1] - 2 * own_kv, own_kv, own_kv) if "qkv" in kind else (16 // size, 16 // size)
        pieces.append(list(y.split(widths, -1)))

    for part, wanted in enumerate(expected):
        if kind == "row":
            found = torch.stack([piece[part] for piece in pieces]).sum(0)
        elif kind == "replicated":
            found = pieces[-1][part]
        else:
            copies = max(1, size // KV_HEADS) if "qkv" in kind and part else 1
            found = torch.cat([piece[part] for piece in pieces[::copies]], -1)
            for rank, piece in enumerate(pieces):  # every copy of a head is the head
                torch.testing.assert_close(piece[part], pieces[rank // copies * copies][part], rtol=0, atol=0)
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-5)


def test_slots_are_rows_of_their_own_and_are_reset_to_ones(as_rank: Any) -> None:
    make, names, outputs = KINDS["qkv"]
    weights = [torch.randn(n, WIDTH) for n in outputs]
    plain = _loaded(make, weights, [torch.zeros(n) for n in outputs])
    layer = _wrapped(plain, names, _index([0, 1, -1]), [False, True, True], [False] * 3)
    address = layer.output_table.data_ptr()
    k, v = torch.full((8, 1), 2.0), torch.full((8, 1), 3.0)
    layer.set_scales(1, *layer.shard([None, k, None], [None] * 3))
    x = torch.ones(3, WIDTH)
    y, base = layer(x)[0], torch.cat(weights).sum(-1)
    torch.testing.assert_close(y[0], base)
    torch.testing.assert_close(y[2], base)
    torch.testing.assert_close(y[1], base * torch.cat([torch.ones(32), k[:, 0], torch.ones(8)]))
    layer.reset_lora(1)
    layer.set_scales(1, *layer.shard([None, None, v], [None] * 3))
    torch.testing.assert_close(layer(x)[0][1], base * torch.cat([torch.ones(40), v[:, 0]]))
    assert layer.output_table.data_ptr() == address


def test_fused_layers_with_inputs_of_their_own_take_a_matmul_each(as_rank: Any) -> None:
    make, names, _ = KINDS["merged column"]
    weights, biases = [torch.randn(16, WIDTH) for _ in range(2)], [torch.randn(16) for _ in range(2)]
    base = _loaded(make, weights, biases)
    layer = _wrapped(base, names, _index([0, -1, 1]), [False, True], [True, True])
    gate, up, right = torch.rand(1, WIDTH), torch.rand(1, WIDTH), torch.rand(16, 1)
    layer.set_scales(1, *layer.shard([None, right], [gate, up]))
    x = torch.randn(3, WIDTH)
    y = layer(x)[0]
    plain = F.linear(x, torch.cat(weights), torch.cat(biases))
    torch.testing.assert_close(y[:2], plain[:2])
    torch.testing.assert_close(y[2, :16], F.linear(x[2] * gate[0], weights[0], biases[0]), rtol=1e-5, atol=1e-5)
    own = F.linear(x[2] * up[0], weights[1], biases[1]) * right[:, 0]
    torch.testing.assert_close(y[2, 16:], own, rtol=1e-5, atol=1e-5)

    packed = make()
    packed.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    with pytest.raises(IA3Error, match="cannot be split"):
        _wrapped(packed, names, _index([0]), [False, False], [True, True])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_layer_is_one_graph_for_every_mix(dtype: torch.dtype, as_rank: Any) -> None:
    index = _index([0, 1, -1, 2])
    qkv = _wrapped(
        _loaded(KINDS["qkv"][0], [torch.randn(n, WIDTH) for n in (32, 8, 8)], [torch.randn(n) for n in (32, 8, 8)]),
        ["q", "k", "v"],
        index,
        [False, True, True],
        [False] * 3,
    )
    plain = _loaded(KINDS["row"][0], [torch.randn(24, WIDTH)], [torch.randn(24)])
    row = _wrapped(plain, ["one"], index, [False], [True])
    for slot in range(SLOTS):
        (k, v), left = _vectors([8, 8], slot)
        qkv.set_scales(slot, *qkv.shard([None, k, v], [None] * 3))
        row.set_scales(slot, *row.shard([None], [left]))
    for layer in (qkv, row):
        layer.base_layer.to(dtype)

    def block(x: Tensor) -> tuple[Tensor, Tensor]:
        return qkv(x)[0], row(F.silu(x))[0]

    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=False)
    for rows in ([0, 1, -1, 2, 1], [-1, -1, -1], [2, 2, 0, 1, 1], [0, 0]):
        index.buffer.fill_(-1)
        index.buffer[: len(rows)] = torch.tensor(rows, dtype=torch.int32)
        x = torch.randn(len(rows), WIDTH).to(dtype)
        torch._dynamo.mark_dynamic(x, 0)  # as vLLM does
        for found, wanted in zip(compiled(x), block(x), strict=True):
            close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1.6e-2, "atol": 0.1}
            torch.testing.assert_close(found, wanted, **close)
    assert counter.frame_count == 1


def _mlp(kind: type[nn.Module] = LlamaMLP) -> tuple[Any, Any]:
    torch.manual_seed(0)
    block = kind(WIDTH, 48, "silu", reduce_results=False)
    for layer in (block.gate_up_proj, block.down_proj):
        nn.init.normal_(layer.weight, std=0.3)
        layer.cpu_linear = F.linear
    down = _wrapped(block.down_proj.requires_grad_(False), ["down_proj"], _index([1, -1, 0]), [False], [True])
    block.down_proj = down
    return block, down


def test_the_activation_scales_for_the_layer_behind_it(as_rank: Any) -> None:
    block, down = _mlp()
    down.set_scales(1, None, [torch.rand(48) + 0.5])
    x = torch.randn(3, WIDTH)
    rows = down.index.buffer.clone()
    before = block(x)
    assert move_into_activation(block, down, torch.float32)
    assert down.index.buffer.eq(-1).all()
    assert torch.equal(down.input_tables[0][0], torch.ones(48))
    down.index.buffer.copy_(rows)
    torch.testing.assert_close(block(x), before, rtol=1e-5, atol=1e-5)
    assert before[1].ne(before[0]).any()


def test_an_activation_whose_result_goes_elsewhere_is_left_alone(as_rank: Any) -> None:
    class Doubling(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.act_fn(self.gate_up_proj(x)[0])
            return self.down_proj(hidden + hidden.roll(1, -1))[0]

    block, down = _mlp(Doubling)
    activation = block.act_fn
    assert not move_into_activation(block, down, torch.float32)
    assert block.act_fn is activation
    assert not down.input_is_scaled


def test_the_index_is_written_in_place_and_knows_its_adapters() -> None:
    index = SlotIndex(16, torch.device("cpu"))
    address = index.buffer.data_ptr()
    index.update_metadata(SimpleNamespace(index_mapping=(7, 7, 0, 5, 900, 0)), [5, None, 900, 7], 5, 100)
    assert index.buffer[:6].tolist() == [3, 3, -1, 0, 2, -1]
    index.update_metadata(SimpleNamespace(index_mapping=(7, 5)), [7, 5, None, None], 5, 100)  # evicted, and come again
    assert index.buffer[:2].tolist() == [0, 1]
    assert index.buffer.data_ptr() == address
    assert index.buffer.dtype == torch.int32
    assert index.rows(torch.empty(1, 4, 9)).shape == (1, 4)
    with pytest.raises(RuntimeError, match="in no slot"):
        index.update_metadata(SimpleNamespace(index_mapping=(7, 6)), [7, 5, None, None], 5, 100)


def test_beside_lora_both_are_told_of_a_batch() -> None:
    told: list[Any] = []
    wrapper: Any = SimpleNamespace(update_metadata=lambda *arguments: told.append(arguments))
    index = SlotIndex(4, torch.device("cpu"))
    index.join(wrapper)
    mapping = SimpleNamespace(index_mapping=(3,))
    wrapper.update_metadata(mapping, [None, 3], 3, 100)
    assert told == [(mapping, [None, 3], 3, 100)]
    assert index.buffer[0] == 1
    assert wrapper.slot_index is index


def test_every_class_is_vllms_own_with_something_in_front() -> None:
    for kind in layer_classes(True):
        assert kind.__mro__[1] is Scaled
        assert kind.__mro__[2].__module__.startswith("vllm.lora.layers")
