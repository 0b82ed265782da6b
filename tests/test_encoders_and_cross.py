"""Miniatures of encoder-decoders, cross-attention, Q-Formers and prefixes: they run and see their pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hooked_mm.survey import check_miniature
from hooked_mm.testing import encoders_and_cross
from hooked_mm.testing.encoders_and_cross import decoder_ids
from hooked_mm.testing.miniatures import RECIPES
from hooked_mm.testing.recipe import IDS, VOCABULARY, Inputs
from tests.miniature_checks import check_recipe


@pytest.mark.parametrize("family", encoders_and_cross.RECIPES)
def test_it_runs_and_sees_its_picture(family: str) -> None:
    """See `check_recipe`."""
    check_recipe(family)


def _decoder(kind: str, **sizes: int) -> dict[str, Any]:
    return {
        "model_type": kind,
        **IDS,
        "vocab_size": VOCABULARY,
        "is_decoder": True,
        "add_cross_attention": True,
        **sizes,
    }


_BERT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
_MBART = {f"{part}_{size}": 2 for part in ("encoder", "decoder") for size in ("layers", "attention_heads")}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
OTHERS = {
    "BERT": ("vision-encoder-decoder", {"decoder": _decoder("bert", **_BERT, max_position_embeddings=64)}),
    "MBart": (
        "vision-encoder-decoder",
        {"decoder": _decoder("mbart", **_MBART, d_model=64, max_position_embeddings=64)},
    ),
    "T5": ("instructblip", {"text_config": {"model_type": "t5", **IDS, "vocab_size": VOCABULARY, **_T5}}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_language_models_in_the_same_frame(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of them but what is found: every point of theirs is proved, too."""
    family, settings = OTHERS[name]
    usual = RECIPES[family]

    def more(config: Any, inputs: Inputs) -> Inputs:
        return {**usual.extra(config, inputs), **(decoder_ids(config, inputs) if name == "T5" else {})}

    monkeypatch.setitem(RECIPES, family, replace(usual, config={**usual.config, **settings}, extra=more))
    report = check_miniature(family)[1]
    assert report.ok, report.failed_points()
