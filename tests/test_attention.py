"""Compare the bfloat16 attention with float64 and with torch's, also inside transformers models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from support import smallmodels as small
from vitscore.models.attention import mask_or_none, use_torchs_on
from vitscore.models.checkpoint import find
from vitscore.models.cpu_bf16 import attention
from vitscore.models.loading import load_weights

MODULE = torch.nn.Identity()


def heads(seed: int, *, tokens: int = 37, gain: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return (2 images, 3 heads, tokens, 16) in the memory layout of a model's projection."""
    random = torch.Generator().manual_seed(seed)
    return (gain * torch.randn(2, tokens, 3, 16, generator=random)).to(dtype).transpose(1, 2)


def attend(*inputs: torch.Tensor, **options: object) -> torch.Tensor:
    return attention.attend(MODULE, *inputs, None, **options)[0]


def rounded_float64(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Return attention in float64, rounded to bfloat16 at the same steps: scores, probabilities, output."""
    scores = (query.double() @ key.double().transpose(-1, -2)).bfloat16()
    probs = (scores.double() * scale).softmax(-1).bfloat16()
    return (probs.double() @ value.double()).bfloat16()


@pytest.mark.parametrize("tokens", [1, 5, 50, 197, 600])
@pytest.mark.parametrize("gain", [1.0, 4.0])
@pytest.mark.parametrize("scale", [None, 1.5])
def test_matches_float64_rounded_at_the_same_steps(tokens: int, gain: float, scale: float | None) -> None:
    query, key, value = heads(0, tokens=tokens, gain=gain), heads(1, tokens=tokens, gain=gain), heads(2, tokens=tokens)
    expected = rounded_float64(query, key, value, scale or 0.25)
    output = attend(query, key, value, scaling=scale).transpose(1, 2)
    assert output.dtype == torch.bfloat16
    # A score that is summed in another order may round to the next number, one part in 128 away; few scores do.
    error = (output - expected).abs().float()
    assert error.mean() < 1e-3
    assert (error > 0.02).float().mean() < 2e-3


def test_a_models_logits_are_as_near_to_fp32_as_with_torchs_attention(tmp_path: Path) -> None:
    small.save_vit(tmp_path, ("cat", "dog", "cow", "hen"), hidden_size=96, num_attention_heads=3, num_hidden_layers=4)
    checkpoint = find(str(tmp_path))
    pixels = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact, theirs, ours = load_weights(checkpoint), *(load_weights(checkpoint).bfloat16() for _ in range(2))
    attention.use_on(ours)
    with torch.inference_mode():
        logits = exact(pixel_values=pixels).logits
        errors = [
            (model(pixel_values=pixels.bfloat16()).logits - logits).pow(2).mean().sqrt() for model in (theirs, ours)
        ]
    assert 0 < errors[1] < 1.25 * errors[0]


def test_several_steps_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = heads(0), heads(1), heads(2)
    whole = attend(*inputs)
    monkeypatch.setattr(attention, "_MOST_SCORES_BYTES", 2 * 37 * 37 * 4)  # six slices in steps of four and two
    assert torch.equal(attend(*inputs), whole)


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    query, key, value = heads(0), heads(1), heads(2)
    alone = attend(query[1:], key[1:], value[1:])
    assert torch.equal(attend(query, key, value)[1:], alone)


def test_a_nan_affects_only_its_image() -> None:
    query, key, value = heads(0), heads(1), heads(2)
    clean = attend(query, key, value)
    broken = query.clone()
    broken[0, 1, 3, 2] = torch.nan
    damaged = attend(broken, key, value)
    assert damaged[0, 3, 1].isnan().all()
    assert torch.equal(damaged[1], clean[1])


@pytest.mark.parametrize("case", ["mask", "causal", "fp32", "fewer queries"])
def test_other_attention_is_passed_to_torch(case: str) -> None:
    query, key, value = heads(0), heads(1), heads(2)
    mask = None
    if case == "mask":
        mask = torch.zeros(2, 1, 37, 37, dtype=torch.bool)
        mask[..., :9] = True
    if case == "fp32":
        query, key, value = query.float(), key.float(), value.float()
    if case == "fewer queries":
        query = query[:, :, :7]
    is_causal = case == "causal"
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)
    output, _ = attention.attend(MODULE, query, key, value, mask, is_causal=is_causal)
    assert torch.equal(output.transpose(1, 2), expected)


def test_compiled_attention_is_equal_within_rounding() -> None:
    inputs = heads(0), heads(1), heads(2)
    compiled = torch.compile(lambda *tensors: attention.attend(MODULE, *tensors, None)[0], backend="aot_eager")
    assert torch.allclose(compiled(*inputs).float(), attend(*inputs).float(), atol=0.03)


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_transformers_models_use_it(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "vit":
        small.save_vit(tmp_path / kind, ("cat", "dog"))
    else:
        small.save_clip(tmp_path / kind)
    calls = []

    def counted(*inputs: object, **options: object) -> object:
        calls.append(1)
        return original(*inputs, **options)

    original = attention.attend
    monkeypatch.setattr(attention, "attend", counted)
    exact, model = load_weights(find(str(tmp_path / kind))), load_weights(find(str(tmp_path / kind))).bfloat16()
    size = model.config.image_size if kind == "vit" else model.config.vision_config.image_size
    pixels = torch.rand(64, 3, size, size, generator=torch.Generator().manual_seed(0)).bfloat16()

    def answer(whole: Any, pixels: torch.Tensor) -> torch.Tensor:
        vision = whole if kind == "vit" else whole.vision_model
        with torch.inference_mode():
            return vision(pixel_values=pixels)[0].float()

    expected = answer(exact, pixels.float())
    theirs = answer(model, pixels)
    assert not calls
    attention.use_on(model)
    ours = answer(model, pixels)
    assert calls
    errors = [(output - expected).pow(2).mean().sqrt() for output in (theirs, ours)]
    assert 0 < errors[1] < 1.25 * errors[0]


@pytest.mark.parametrize("use", [attention.use_on, use_torchs_on])
def test_no_mask_is_made_while_a_graph_is_captured(use: Callable[[Any], None], tmp_path: Path) -> None:
    model = load_weights(find(str(small.save_vit(tmp_path / "vit", ("cat", "dog")))))
    use(model)
    masks = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        nodes = [node for node in graph.graph.nodes if node.target is functional.scaled_dot_product_attention]
        masks.extend(node.kwargs.get("attn_mask") for node in nodes)
        return graph

    with torch.inference_mode():
        torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(pixel_values=torch.rand(2, 3, 32, 32))
    assert masks == [None] * model.config.num_hidden_layers


def test_a_mask_that_hides_a_token_is_made() -> None:
    seen = torch.tensor([[True, True, False]])
    sizes = {"batch_size": 1, "q_length": 3, "kv_length": 3, "allow_is_bidirectional_skip": True}
    assert mask_or_none(**sizes) is None
    mask = mask_or_none(**sizes, attention_mask=seen, mask_function=lambda *places: places[3] >= 0)
    assert mask is not None and mask[0, 0, 0].tolist() == [True, True, False]
