"""The port of Molmo against the reference that was written apart from it: names, logits, cache, padding, generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from hooked_mm.errors import BadInputError
from hooked_mm.molmo.configuration_molmo import MolmoConfig
from hooked_mm.molmo.modeling_molmo import MolmoForCausalLM
from tests.molmo_examples import PICTURES, SIZES, batch_of, examples, own_part
from tests.molmo_published import END_ID, narrowed, published_shapes, published_state, write_published
from tests.molmo_reference import MOLMO_7B_D, greedy, logits

pytestmark = pytest.mark.oldest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards and an index."""
    found = tmp_path_factory.mktemp("molmo")
    write_published(found, SIZES, shards=3, **narrowed(SIZES))
    return found


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """What is in the shards."""
    return published_state(SIZES)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model in float64, and what was said on loading."""
    found: tuple[Any, dict[str, Any]] = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True
    )
    return found


@pytest.fixture(scope="module")
def model(loaded: tuple[Any, dict[str, Any]]) -> Any:
    return loaded[0].eval()


@pytest.fixture(scope="module")
def expected(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """(length, words) of every example alone, from the reference."""
    return {name: logits(state, one, SIZES) for name, one in examples().items()}


def test_the_published_layout_loads_whole(
    loaded: tuple[Any, dict[str, Any]], folder: Path, state: dict[str, Tensor]
) -> None:
    """Nothing is missing, nothing is left over, every weight is where its name says."""
    model, said = loaded
    assert not any(said.values()), said
    assert type(model) is MolmoForCausalLM
    got = model.state_dict()
    assert got.keys() == state.keys()
    assert all(torch.equal(got[name], value.double()) for name, value in state.items())


def test_the_other_auto_class_finds_it_too(folder: Path, state: dict[str, Tensor]) -> None:
    """The published config.json names `AutoModelForCausalLM`; weights stay float32, as stored."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert isinstance(model, MolmoForCausalLM)
    assert model.dtype == torch.float32


def test_names_and_shapes_of_the_7b() -> None:
    """Every one of the 585 tensors of the published index, with what its configuration leaves out."""
    with torch.device("meta"):
        model = MolmoForCausalLM(MolmoConfig())
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == published_shapes(MOLMO_7B_D)


def test_written_again_it_has_the_same_names(model: Any, state: dict[str, Tensor], tmp_path: Path) -> None:
    """A saved model is in the published layout."""
    model.save_pretrained(tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], value.double()) for name, value in state.items())


@pytest.mark.parametrize("name", PICTURES)
def test_logits_of_a_prompt(name: str, model: Any, expected: dict[str, Tensor]) -> None:
    """No, one and two pictures; float64 on both sides."""
    with torch.no_grad():
        got = model(**batch_of([examples()[name]])).logits[0]
    torch.testing.assert_close(got, expected[name], atol=1e-10, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_every_row_what_it_has_alone(
    side: str, attention: str, model: Any, expected: dict[str, Tensor]
) -> None:
    """Text alone beside one and two pictures of many and of few crops."""
    model.set_attn_implementation(attention)
    used = (model.config._attn_implementation, model.model.vision_backbone.image_vit.config._attn_implementation)
    assert used == (attention, attention)
    with torch.no_grad():
        got = model(**batch_of(list(examples().values()), side)).logits
    for values, (name, one) in zip(got, examples().items(), strict=True):
        torch.testing.assert_close(own_part(values, one, side), expected[name], atol=1e-10, rtol=0)


def test_float32_is_near(folder: Path, expected: dict[str, Tensor]) -> None:
    """As it is used: logits of size 1 to 2e-5."""
    model = MolmoForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, one in examples().items():
        with torch.no_grad():
            got = model(**batch_of([one], dtype=torch.float32)).logits[0]
        torch.testing.assert_close(got.double(), expected[name], atol=2e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_token_by_token_the_cache_gives_the_same(side: str, model: Any, state: dict[str, Tensor]) -> None:
    """A batch is continued with given tokens, one at a time; the reference sees each prompt whole."""
    rows, given = list(examples().values()), torch.tensor([[3, 91, 290], [4, 92, 291], [5, 93, 292], [6, 94, 293]])
    batch = batch_of(rows, side)
    with torch.no_grad():
        found = model(**batch, use_cache=True)
        cache, mask = found.past_key_values, batch["attention_mask"]
        for step in range(given.shape[1]):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            found = model(given[:, step : step + 1], attention_mask=mask, past_key_values=cache, use_cache=True)
    for got, one, more in zip(found.logits, rows, given.tolist(), strict=True):
        longer = type(one)([*one.tokens, *more], one.crops, one.masks, one.places)
        torch.testing.assert_close(got[-1], logits(state, longer, SIZES)[-1], atol=1e-10, rtol=0)


def test_in_one_piece_or_in_two(model: Any, expected: dict[str, Tensor]) -> None:
    """A prompt whose end comes later, several tokens at once, without a mask."""
    one = examples()["one"]
    batch = batch_of([one])
    del batch["attention_mask"]
    ids = batch.pop("input_ids")
    with torch.no_grad():
        first = model(ids[:, :-2], **batch, use_cache=True)
        then = model(ids[:, -2:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(then.logits[0], expected["one"][-2:], atol=1e-10, rtol=0)


def test_generation_goes_where_the_reference_goes(model: Any, state: dict[str, Tensor]) -> None:
    """Greedy, a left-padded batch of text, one and two pictures, against a loop without a cache."""
    batch = batch_of(list(examples().values()), "left")
    got = model.generate(**batch, max_new_tokens=5, do_sample=False, eos_token_id=SIZES.embedding - 1)
    new = got[:, batch["input_ids"].shape[1] :]
    assert new.tolist() == [greedy(state, one, SIZES, 5) for one in examples().values()]


def test_pictures_are_looked_at_once(model: Any) -> None:
    """The tower runs in the first step of a generation only."""
    seen: list[object] = []
    handle = model.model.vision_backbone.register_forward_hook(lambda *_: seen.append(None))
    model.generate(**batch_of([examples()["one"]]), max_new_tokens=4, do_sample=False)
    handle.remove()
    assert len(seen) == 1


def test_text_ends_at_the_end_of_text(model: Any, state: dict[str, Tensor]) -> None:
    """The published generation_config.json says nothing of it, config.json and its defaults do."""
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (END_ID, END_ID)
    assert (MolmoConfig().eos_token_id, MolmoConfig().pad_token_id) == (151643, 151643)
    one = examples()["one"]
    second = greedy(state, one, SIZES, 2)[1]
    got = model.generate(**batch_of([one]), max_new_tokens=9, do_sample=False, eos_token_id=second)
    assert got.shape[1] == len(one.tokens) + 2


def test_crops_that_belong_nowhere_change_nothing(model: Any, expected: dict[str, Tensor]) -> None:
    """Whatever is in them: samples are filled up with such."""
    batch = batch_of([examples()["one"]])
    images, masks, where = (batch[name] for name in ("images", "image_masks", "image_input_idx"))
    batch["images"] = torch.cat([images[:, :1] * 3, images], dim=1)
    batch["image_masks"] = torch.cat([masks[:, :1], masks], dim=1)
    batch["image_input_idx"] = torch.cat([torch.full_like(where[:, :1], -7), where], dim=1)
    with torch.no_grad():
        got = model(**batch).logits[0]
        batch["image_input_idx"] = torch.full_like(batch["image_input_idx"], -1)
        unseen, alone = model(**batch).logits[0], model(batch["input_ids"]).logits[0]
    torch.testing.assert_close(got, expected["one"], atol=1e-10, rtol=0)
    assert torch.equal(unseen, alone)


def test_only_the_logits_asked_for(model: Any, expected: dict[str, Tensor]) -> None:
    """The last ones, and given positions."""
    batch = batch_of([examples()["small"]])
    with torch.no_grad():
        last = model(**batch, logits_to_keep=2).logits[0]
        chosen = model(**batch, logits_to_keep=torch.tensor([0, 4])).logits[0]
    torch.testing.assert_close(last, expected["small"][-2:], atol=1e-10, rtol=0)
    torch.testing.assert_close(chosen, expected["small"][[0, 4]], atol=1e-10, rtol=0)


def test_hidden_states_and_loss(model: Any, expected: dict[str, Tensor]) -> None:
    """One state before each block and the normed last; the loss is the mean surprise at the next token."""
    one = examples()["text"]
    batch = batch_of([one])
    with torch.no_grad():
        found = model(**batch, labels=batch["input_ids"], output_hidden_states=True)
    assert len(found.hidden_states) == SIZES.layers + 1
    torch.testing.assert_close(
        found.hidden_states[-1][0] @ model.get_output_embeddings().weight.T, expected["text"], atol=1e-10, rtol=0
    )
    surprise = -expected["text"].log_softmax(-1)[range(len(one.tokens) - 1), one.tokens[1:]].mean()
    # transformers computes losses in float32.
    assert float(found.loss) == pytest.approx(float(surprise), abs=1e-5)


def test_gradients_reach_every_weight_that_counts(folder: Path) -> None:
    """All but the tower's last block, whose output nobody reads."""
    model = MolmoForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model(**batch_of([examples()["one"]], dtype=torch.float32)).logits.square().mean().backward()
    without = {name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()}
    unused = f"model.vision_backbone.image_vit.transformer.resblocks.{SIZES.tower_blocks - 1}."
    assert without == {name for name in published_shapes(SIZES) if name.startswith(unused)}


def test_bad_input_is_refused(model: Any) -> None:
    """Each with its reason."""
    batch = batch_of([examples()["one"]])
    with pytest.raises(BadInputError, match="image_input_idx"):
        model(batch["input_ids"], images=batch["images"], image_masks=batch["image_masks"])
    with pytest.raises(BadInputError, match="do not fit"):
        model(**{**batch, "image_input_idx": batch["image_input_idx"][:, 1:]})
    with pytest.raises(BadInputError, match="neither"):
        model()
