"""Finding the parts of models that no name is known of, and refusing rather than guessing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooked_mm.errors import UnsupportedModelError
from hooked_mm.hooked import HookedMM
from hooked_mm.projectors import leftover
from hooked_mm.resolve import resolve
from hooked_mm.skeleton import block_lists
from tests import made_up as made_up_module
from tests.made_up import asked, made_up

# Hook point -> (module, whether its input), by hand from `tests.made_up`.
TEXT = {
    "hook_resid_pre": ("", True),
    "ln1.hook_out": ("calm", False),
    "attn.hook_q": ("glance.ask", False),
    "attn.hook_k": ("glance.offer", False),
    "attn.hook_v": ("glance.give", False),
    "attn.hook_z": ("glance.gather", True),
    "hook_attn_out": ("glance", False),
    "hook_resid_mid": ("steady", True),
    "ln2.hook_out": ("steady", False),
    "mlp.hook_pre": ("ponder.open", False),
    "mlp.hook_pre_linear": ("ponder.widen", False),
    "mlp.hook_post": ("ponder.narrow", True),
    "hook_mlp_out": ("ponder", False),
    "hook_resid_post": ("", False),
}
PLACES = {
    **{
        f"blocks.{n}.{k}": (f"head.mouth.floors.{n}.{p}".rstrip("."), i) for n in range(4) for k, (p, i) in TEXT.items()
    },
    **{
        f"vision.blocks.{n}.{k}": (f"head.eyes.floors.{n}.{p}".rstrip("."), i)
        for n in range(3)
        for k, (p, i) in TEXT.items()
    },
    "hook_embed": ("head.mouth.floors.0", True),
    "vision.hook_embed": ("head.eyes.floors.0", True),
    "projector.hook_in": ("bridge", True),
    "projector.hook_out": ("bridge", False),
    "ln_final.hook_out": ("head.mouth.last_word", False),
    "hook_logits": ("speak", False),
}


def by_hooks(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every value of PLACES by PyTorch's own hooks."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, (path, entering) in PLACES.items():
        module = model.get_submodule(path)

        def note(
            _: Any, args: tuple, kwargs: dict, out: Any = None, name: str = name, entering: bool = entering
        ) -> None:
            found[name] = ((*args, *kwargs.values())[0] if entering else out).clone()

        add = module.register_forward_pre_hook if entering else module.register_forward_hook
        handles.append(add(note, with_kwargs=True))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found


def test_a_made_up_architecture_resolves_without_a_row() -> None:
    """No name in it is known; every point of its list conforms and holds what a raw hook reads there."""
    model = HookedMM(made_up(), check="full")
    logits, cache = model.run_with_cache(asked(), lambda name: True)
    assert model.conformance is not None
    assert model.conformance.ok, str(model.conformance)
    expected = by_hooks(model.hf_model, asked())
    assert set(expected) <= set(model.hook_names)
    for name, value in expected.items():
        torch.testing.assert_close(cache[name].reshape(value.shape), value, rtol=0, atol=0, msg=name)
    assert torch.equal(logits, expected["hook_logits"])
    # Attention that does not run by transformers' interface has no pattern to tap, and none is promised.
    assert not any(name.endswith("hook_pattern") for name in model.hook_names)
    assert (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head, model.cfg.d_mlp) == (4, 4, 12, 144)
    assert model.cfg.vision is not None
    assert (model.cfg.vision.n_layers, model.cfg.vision.d_model) == (3, 32)


def test_steering_a_made_up_architecture() -> None:
    """A write at a point acts as the same write by a raw hook."""
    hf_model = made_up()
    model = HookedMM(hf_model)
    inputs = asked()
    for name in ("blocks.1.hook_resid_mid", "blocks.2.attn.hook_z", "vision.blocks.0.hook_mlp_out"):
        path, entering = PLACES[name]
        module = hf_model.get_submodule(path)
        if name.endswith("resid_mid"):
            # The stream in the middle is kept beside the norm: only a change in place reaches both.
            handle = module.register_forward_pre_hook(lambda _, args: _halved(args[0]))
        elif entering:
            handle = module.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))
        else:
            handle = module.register_forward_hook(lambda _, args, out: out * 0.5)
        with torch.no_grad():
            expected = hf_model(**inputs).logits
        handle.remove()
        got = model.run_with_hooks(inputs, [(name, lambda value, hook: value * 0.5)])
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def _halved(value: Tensor) -> None:
    value.mul_(0.5)


def test_lists_of_blocks_and_what_is_left_over() -> None:
    """Found by plan: the two lists of alike modules, not the projector's layers; and the one part beside them."""
    model = made_up()
    assert {path: len(blocks) for path, blocks in block_lists(model).items()} == {
        "head.eyes.floors": 3,
        "head.mouth.floors": 4,
    }
    claimed = [model.head.eyes, model.head.mouth, model.speak]
    assert leftover(model, claimed) == [model.bridge]


def test_two_lists_that_fit_are_not_guessed_between() -> None:
    """A second list of as many blocks of the same width: which is the decoder's can't be told, so nobody tells."""
    model = made_up()
    model.head.double = nn.ModuleList([type(floor)(48, 4, causal=True) for floor in model.head.mouth.floors])
    with pytest.raises(
        UnsupportedModelError, match=r"no blocks found in the decoder.*not exactly one list of 4 blocks"
    ):
        resolve(model)


def test_two_parts_that_could_be_the_projector_are_not_guessed_between() -> None:
    """Another part with weights beside the bridge: no projector is listed, and what needs one is not claimed."""
    model = made_up()
    model.attic = nn.Linear(32, 48)
    hooked = HookedMM(model)
    hooked.run_with_cache(asked(), "hook_embed")
    assert hooked.structure.projector is None
    assert not any(name.startswith("projector") for name in hooked.hook_names)
    assert hooked.conformance is not None
    told = [check for check in hooked.conformance.checks if check.what == "image features stand at image positions"]
    assert [check.verdict for check in told] == ["not applicable"]


def test_without_logits_a_model_is_refused() -> None:
    """A model whose output is no vocabulary (a robot's actions) has nothing to read words from."""
    model = made_up()
    model.speak = nn.Linear(48, 12)
    model.get_output_embeddings = lambda: None
    with pytest.raises(UnsupportedModelError, match=r"names no output embedding, and 0 linear maps have 90 outputs"):
        resolve(model)


def test_an_architecture_that_was_typed_in_resolves_too() -> None:
    """Classes of a session have no source, so rules that look at it say nothing; what flows is enough."""
    session: Any = ModuleType("__typed_in__")
    sys.modules["__typed_in__"] = session
    try:
        exec(compile(Path(made_up_module.__file__).read_text(), "<typed in>", "exec"), session.__dict__)
        model = HookedMM(session.made_up())
        model.run_with_cache(session.asked(), "hook_embed")
    finally:
        del sys.modules["__typed_in__"]
    assert model.conformance is not None
    assert model.conformance.ok
    assert model.hook_names == HookedMM(made_up()).hook_names
