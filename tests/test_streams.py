"""Models of several streams side by side, and values that share a projection: what is shown, written, refused."""

from __future__ import annotations

import pytest
import torch

from hooked_mm.errors import BadInputError, UnknownHookError
from hooked_mm.hooked import HookedMM
from hooked_mm.testing.miniatures import miniature, miniature_inputs
from tests.families import close

FAMILIES = ("glm5_next", "qwen4_exp")


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> tuple[HookedMM, dict[str, torch.Tensor]]:
    """A model of three streams and a batch."""
    model = HookedMM(miniature(request.param), check=False)
    return model, miniature_inputs(model.hf_model)


def test_streams_begin_alike_and_end_in_the_logits(case: tuple[HookedMM, dict[str, torch.Tensor]]) -> None:
    """Every stream is the embedding at first; the last ones give the logits; a write at the embedding reaches all."""
    model, inputs = case
    assert model.structure.text.streams == 3
    assert model.cfg.d_model == 64
    names = ["hook_embed", "blocks.0.hook_resid_pre", "blocks.3.hook_resid_post"]
    logits, cache = model.run_with_cache(inputs, names)
    embed, first = cache[names[0]], cache[names[1]]
    streams = first if first.ndim == 4 else first.unflatten(-1, (3, 64))
    assert embed.shape == (3, first.shape[1], 64)
    assert all(torch.equal(streams[:, :, index], embed) for index in range(3))
    keep = inputs["attention_mask"].bool()
    assert close(model.to_logits(cache[names[2]]), logits, keep) < 1e-5
    changed = model.hf_model.get_decoder()

    def spread(_: object, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"] * 0.5}

    handle = changed.register_forward_pre_hook(spread, with_kwargs=True)
    try:
        with torch.no_grad():
            expected = model.hf_model(**inputs).logits
    finally:
        handle.remove()
    got = model.run_with_hooks(inputs, [("hook_embed", lambda value, hook: value * 0.5)])
    assert close(got, expected, keep) < 1e-6


def test_what_is_no_sum_is_refused(case: tuple[HookedMM, dict[str, torch.Tensor]]) -> None:
    """No point says what attention adds; the stream is not taken apart; the report says why sums do not apply."""
    model, inputs = case
    _, cache = model.run_with_cache(inputs)
    assert not any(name.endswith(("attn_out", "mlp_out", "mixer_out")) for name in cache if "vision" not in name)
    with pytest.raises(UnknownHookError, match="nearest"):
        model.run_with_cache(inputs, "blocks.1.hook_attn_out")
    with pytest.raises(BadInputError, match="several streams"):
        cache.decompose_resid()


def test_a_value_of_too_few_streams_is_refused() -> None:
    """What the streams are made one of must be streams."""
    model = HookedMM(miniature("glm5_next"), check=False)
    with pytest.raises(BadInputError, match="3 streams"):
        model.to_logits(torch.zeros(2, 5, 64))
    assert model.to_logits(torch.ones(7, 3, 64)).shape == (7, 200)


@pytest.mark.parametrize(
    ("family", "name", "path", "part"),
    [
        # Each head's query, with its gate behind it.
        ("qwen3_5", "blocks.1.attn.hook_q", "layers.1.self_attn.q_proj", lambda v: v.unflatten(-1, (4, 32))[..., :16]),
        ("glm4v", "blocks.0.mlp.hook_pre", "layers.0.mlp.gate_up_proj", lambda v: v[..., :96]),
        ("glm4v", "blocks.0.mlp.hook_pre_linear", "layers.0.mlp.gate_up_proj", lambda v: v[..., 96:]),
    ],
)
def test_parts_of_one_projection(family: str, name: str, path: str, part: object) -> None:
    """Reading shows the part; writing changes it and leaves the rest."""
    model = HookedMM(miniature(family), check=False)
    inputs = miniature_inputs(model.hf_model)
    module = model.hf_model.get_decoder().get_submodule(path)
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _, args, out: seen.append(out))
    try:
        _, cache = model.run_with_cache(inputs, name)
    finally:
        handle.remove()
    assert torch.equal(cache[name], part(seen[0]))

    def halve(_: object, args: tuple, out: torch.Tensor) -> torch.Tensor:
        new = out.clone()
        part(new).mul_(0.5)
        return new

    handle = module.register_forward_hook(halve)
    try:
        with torch.no_grad():
            expected = model.hf_model(**inputs).logits
    finally:
        handle.remove()
    got = model.run_with_hooks(inputs, [(name, lambda value, hook: value * 0.5)])
    assert torch.equal(got, expected)
