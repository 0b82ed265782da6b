"""The reference, and the port, against the training repository of Molmo itself, where a checkout of it is at hand.

Name its folder in `HOOKED_MM_MOLMO_REPOSITORY` (github.com/allenai/molmo, its dependencies `einops` and `omegaconf`
installed); without, everything here skips itself. Stand-ins are made for what is not needed for the arithmetic: clients
of remote stores (boto3, cached_path), the package file of `olmo.data`, which imports all training data sets, and
torchvision, of which only the resizing is used: torch's own `interpolate`, which torchvision calls as well.
"""

from __future__ import annotations

import enum
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example as for_example
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional

from hooked_mm.molmo.configuration_molmo import MolmoConfig
from hooked_mm.molmo.image_processing_molmo import MolmoImageProcessor
from hooked_mm.molmo.modeling_molmo import MolmoForCausalLM
from tests.molmo_examples import PICTURES, SIZES, batch_of, examples, own_part, photograph
from tests.molmo_published import (
    END_ID,
    IMAGE_TOKENS,
    image_ids,
    narrowed,
    published_config,
    published_preprocessor,
    published_state,
)
from tests.molmo_reference import MOLMO_7B_D, Example, Sizes, cropped, example, greedy, logits

REPOSITORY = os.environ.get("HOOKED_MM_MOLMO_REPOSITORY", "")
pytestmark = pytest.mark.skipif(not REPOSITORY, reason="HOOKED_MM_MOLMO_REPOSITORY names no checkout of allenai/molmo")


class InterpolationMode(enum.Enum):
    """What torchvision calls them."""

    BILINEAR = "bilinear"
    NEAREST_EXACT = "nearest-exact"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"
    HAMMING = "hamming"


class Resize:
    """torchvision's resizing of float tensors."""

    def __init__(self, size: list[int], mode: InterpolationMode, antialias: bool) -> None:
        self.size, self.mode, self.antialias = size, mode.value, antialias

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return functional.interpolate(
            image[None], self.size, mode=self.mode, align_corners=False, antialias=self.antialias
        )[0]


def as_float(image: torch.Tensor) -> torch.Tensor:
    """torchvision's conversion of uint8 to float32."""
    return image.to(torch.float32) / 255


def stand_ins() -> dict[str, ModuleType]:
    """Modules that the repository imports and this comparison does not need."""
    errors = dict.fromkeys(("ClientError", "HTTPClientError", "ConnectionError"), Exception)
    client = type("SchemeClient", (), {"recoverable_errors": ()})
    content: dict[str, dict[str, Any]] = {
        "boto3": {},
        "botocore": {},
        "botocore.exceptions": errors,
        "botocore.config": {"Config": object},
        "cached_path": {"cached_path": None},
        "cached_path.schemes": {"SchemeClient": client, "add_scheme_client": lambda *_: None},
        "torchvision": {},
        "torchvision.transforms": {"Resize": Resize, "InterpolationMode": InterpolationMode},
        "torchvision.transforms.functional": {"convert_image_dtype": as_float},
        "olmo.data": {"__path__": [str(Path(REPOSITORY) / "olmo" / "data")]},
    }
    modules = {name: ModuleType(name) for name in content}
    for name, module in modules.items():
        vars(module).update(content[name])
        parent, _, child = name.rpartition(".")
        if parent in modules:
            setattr(modules[parent], child, module)
    return modules


@pytest.fixture(scope="module")
def olmo() -> Iterator[Any]:
    """The package of the training repository, gone again afterwards."""
    for name in ("einops", "omegaconf"):
        pytest.importorskip(name)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_ins().items():
            patch.setitem(sys.modules, name, module)
        patch.syspath_prepend(REPOSITORY)
        import olmo

        yield olmo
        for name in [name for name in sys.modules if name.partition(".")[0] == "olmo"]:
            patch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return published_state(SIZES)


@pytest.fixture(scope="module")
def original(olmo: Any, state: dict[str, torch.Tensor]) -> Any:
    """Its model, with the settings that its own conversion gives Molmo-7B-D-0924 (olmo/hf_molmo.py), narrowed."""
    from olmo.config import ActivationType, ImagePooling2DType, LayerNormType, VisionBackboneConfig

    tower = VisionBackboneConfig(
        image_default_input_size=(SIZES.side, SIZES.side),
        image_patch_size=SIZES.patch,
        image_pos_patch_size=SIZES.patch,
        image_emb_dim=SIZES.tower_hidden,
        image_num_heads=SIZES.tower_heads,
        image_num_key_value_heads=SIZES.tower_heads,
        image_num_layers=SIZES.tower_blocks,
        image_head_dim=SIZES.tower_hidden // SIZES.tower_heads,
        image_mlp_dim=SIZES.tower_mlp,
        image_mlp_activations="quick_gelu",
        image_num_pos=1 + SIZES.across**2,
        image_norm_eps=1e-5,
    )
    config = olmo.ModelConfig(
        d_model=SIZES.hidden,
        n_heads=SIZES.heads,
        n_kv_heads=SIZES.kv_heads,
        n_layers=SIZES.layers,
        mlp_hidden_size=SIZES.fused_mlp,
        qkv_bias=True,
        activation_type=ActivationType.swiglu,
        block_type="sequential",
        attention_dropout=0,
        residual_dropout=0,
        embedding_dropout=0,
        layer_norm_type=LayerNormType.rms,
        layer_norm_eps=1e-6,
        max_position_embeddings=SIZES.max_positions,
        include_bias=False,
        bias_for_layer_norm=False,
        vocab_size=SIZES.embedding,
        embedding_size=SIZES.embedding,
        additional_vocab_size=SIZES.extra,
        weight_tying=False,
        image_padding_embed="pad_and_partial_pad",
        fix_image_padding=False,
        rope=True,
        rope_theta=1e6,
        vit_layers=(-2, -9),
        image_pooling_2d=ImagePooling2DType.attention_meanq,
        init_device="cpu",
        vision_backbone=tower,
    )
    model = olmo.Molmo(config, init_params=False).eval()
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()}, strict=True)
    return model


def collated(rows: list[Example]) -> dict[str, torch.Tensor | None]:
    """Padded with -1 on the right, everything (olmo/data/collator.py)."""

    def padded(values: list[Any], dtype: torch.dtype) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(value, dtype=dtype) for value in values], True, -1)

    batch: dict[str, torch.Tensor | None] = {"input_ids": padded([row.tokens for row in rows], torch.long)}
    if any(len(row.crops) for row in rows):
        batch["images"] = padded([row.crops for row in rows], torch.float32)
        batch["image_masks"] = padded([row.masks for row in rows], torch.float32)
        batch["image_input_idx"] = padded([row.places for row in rows], torch.long)
    return batch


@pytest.mark.parametrize("name", PICTURES)
def test_the_reference_gives_the_logits_of_the_original(
    name: str, original: Any, state: dict[str, torch.Tensor]
) -> None:
    """float32 against float64."""
    with torch.no_grad():
        theirs = original(**collated([examples()[name]])).logits[0]
    torch.testing.assert_close(theirs.double(), logits(state, examples()[name], SIZES), atol=2e-5, rtol=0)


def test_a_padded_batch_of_the_original_gives_every_row_what_it_has_alone(
    original: Any, state: dict[str, torch.Tensor]
) -> None:
    """Padding, of tokens and of crops, changes nothing."""
    with torch.no_grad():
        theirs = original(**collated(list(examples().values()))).logits
    for row, one in zip(theirs, examples().values(), strict=True):
        torch.testing.assert_close(row[: len(one.tokens)].double(), logits(state, one, SIZES), atol=2e-5, rtol=0)


def test_greedy_continuation(original: Any, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The original's cache, on a padded batch, against the reference, which has none; EOS set to what never comes."""
    monkeypatch.setattr(
        type(original.config), "get_tokenizer", lambda _: SimpleNamespace(eos_token_id=SIZES.embedding - 1)
    )
    theirs = original.generate(**collated(list(examples().values())), max_steps=5).token_ids[:, 0]
    assert theirs.tolist() == [greedy(state, one, SIZES, 5) for one in examples().values()]


def their_preprocessor(sizes: Sizes) -> Any:
    """As `build_mm_preprocessor` makes it for this model."""
    from olmo.data.model_preprocessor import MultiModalPreprocessor

    ids = {name: sizes.embedding + index for index, name in enumerate(IMAGE_TOKENS)}
    tokenizer = SimpleNamespace(
        encode=lambda text: [ids[name] for name in text.split(" ")], bos_token_id=END_ID, eos_token_id=END_ID
    )
    return MultiModalPreprocessor(
        tokenizer,
        crop_mode="overlap-and-resize-c2",
        max_crops=sizes.max_crops,
        overlap_margins=sizes.margins,
        base_image_input_size=(sizes.side, sizes.side),
        image_token_length_w=sizes.cells,
        image_token_length_h=sizes.cells,
        image_patch_size=sizes.patch,
        image_padding_mask=1,
    )


def same_cropping(picture: np.ndarray, sizes: Sizes) -> None:
    """Crops, masks, tokens and places agree; pixels to a seventieth of a grey level: theirs are float32."""
    mine = cropped(picture, sizes, image_ids(sizes))
    crops, tokens, places, masks = their_preprocessor(sizes).preprocess(picture, False)
    np.testing.assert_allclose(crops, mine.crops, atol=2e-4, rtol=0)
    np.testing.assert_allclose(masks, mine.masks, atol=1e-6, rtol=0)
    assert (tokens.tolist(), places.tolist()) == (mine.tokens.tolist(), mine.places.tolist())


@pytest.mark.usefixtures("olmo")
@given(height=st.integers(3, 260), width=st.integers(3, 260), seed=st.integers(0, 9))
@for_example(height=32, width=64, seed=0)  # nothing is left beside the margins
@for_example(height=32, width=32, seed=0)
@for_example(height=31, width=200, seed=0)
@for_example(height=20, width=37, seed=0)  # in float64 the overview comes out wider
def test_cropping_of_pictures_of_all_sizes(height: int, width: int, seed: int) -> None:
    """Narrow crops, so that many tilings come up."""
    if min(height, width) * 8 < max(height, width):
        height = width
    same_cropping(photograph(height, width, seed), SIZES)


@pytest.mark.usefixtures("olmo")
@pytest.mark.parametrize(("height", "width"), [(480, 640), (641, 427), (1201, 333), (100, 90)])
def test_cropping_at_the_published_sizes(height: int, width: int) -> None:
    """Crops of 336 pixels."""
    same_cropping(photograph(height, width), MOLMO_7B_D)


@pytest.mark.usefixtures("olmo")
def test_a_prompt_with_a_picture() -> None:
    """BOS, the picture, the prompt; places count from BOS."""
    picture = photograph(57, 75)
    mine = example([picture], [4, 5, 6], END_ID, SIZES, image_ids(SIZES))
    preprocessor = their_preprocessor(SIZES)
    preprocessor.tokenizer.encode = lambda _: [4, 5, 6]
    theirs = preprocessor([picture], ["text"])
    assert theirs["input_tokens"].tolist() == mine.tokens
    assert theirs["image_input_idx"].tolist() == mine.places.tolist()


@pytest.fixture(scope="module")
def port(state: dict[str, torch.Tensor]) -> Any:
    """The port, with the same weights under the published names."""
    model = MolmoForCausalLM(MolmoConfig(**published_config(SIZES), **narrowed(SIZES))).eval()
    model.load_state_dict(state, strict=True)
    return model


def test_the_port_gives_the_logits_of_the_original(original: Any, port: Any) -> None:
    """A padded batch in float32: text, one picture, two."""
    rows = list(examples().values())
    with torch.no_grad():
        theirs, ours = original(**collated(rows)).logits, port(**batch_of(rows, "right", torch.float32)).logits
    for their, our, one in zip(theirs, ours, rows, strict=True):
        torch.testing.assert_close(own_part(our, one, "right"), own_part(their, one, "right"), atol=2e-5, rtol=0)


def test_the_port_continues_as_the_original(original: Any, port: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy; padded on the right there, on the left here."""
    end = SIZES.embedding - 1
    monkeypatch.setattr(type(original.config), "get_tokenizer", lambda _: SimpleNamespace(eos_token_id=end))
    rows = list(examples().values())
    theirs = original.generate(**collated(rows), max_steps=8).token_ids[:, 0]
    ours = port.generate(**batch_of(rows, "left", torch.float32), max_new_tokens=8, do_sample=False, eos_token_id=end)
    assert ours[:, -8:].tolist() == theirs.tolist()


@pytest.mark.usefixtures("olmo")
@pytest.mark.parametrize(("height", "width"), [(480, 640), (641, 427), (1201, 333), (100, 90), (2000, 1500)])
def test_the_port_crops_as_the_original(height: int, width: int) -> None:
    """At the published sizes: both resize with the same function, so pixels agree to rounding."""
    picture = photograph(height, width)
    crops, tokens, places, masks = their_preprocessor(MOLMO_7B_D).preprocess(picture, False)
    got = MolmoImageProcessor(**published_preprocessor(MOLMO_7B_D)).cut(Image.fromarray(picture))
    np.testing.assert_allclose(got.pixels, crops, atol=1e-6, rtol=0)
    np.testing.assert_array_equal(got.masks, masks)
    image = np.flatnonzero(tokens == image_ids(MOLMO_7B_D).patch)
    np.testing.assert_array_equal(np.where(got.order < 0, -100, image[got.order.clamp_min(0)]), places)
