"""The tables of names: every row is needed, none hides another."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from hooked_mm import models
from hooked_mm.architectures import EXCEPTIONS, FAMILIES, PART_NAMES, SCALES, Oddity
from hooked_mm.errors import UnsupportedModelError
from hooked_mm.hook_rows import BLOCK_ROWS
from hooked_mm.resolve import resolve
from hooked_mm.structure import Structure, submodule
from hooked_mm.testing.miniatures import RECIPES, miniature
from tests.pages import DOCS, broken_links, run_page


@pytest.fixture(scope="module")
def structures() -> dict[str, Structure]:
    """Of every proved family."""
    return {family: resolve(miniature(family)) for family in FAMILIES}


def test_every_proved_family_has_a_miniature_and_every_exception_a_family() -> None:
    """What is called proved can be checked by anyone; exceptions are of known families."""
    assert set(RECIPES) >= set(FAMILIES)
    assert set(EXCEPTIONS) <= set(RECIPES)
    assert len(EXCEPTIONS) <= 25


def test_every_exception_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its row each of these families is resolved to something else, or not at all; what is refused, is."""
    for family, row in EXCEPTIONS.items():
        if row.refused:
            with pytest.raises(UnsupportedModelError, match=re.escape(row.refused)):
                resolve(miniature(family))
            continue
        with_row = resolve(miniature(family))
        rest = {name: other for name, other in EXCEPTIONS.items() if name != family}
        with monkeypatch.context() as patch:
            patch.setattr("hooked_mm.skeleton.EXCEPTIONS", rest)
            try:
                assert resolve(miniature(family)) != with_row, family
            except UnsupportedModelError:
                continue


def test_every_role_of_a_hook_point_can_be_found() -> None:
    """A row of the hook table that names a role unknown to the name table could never fire."""
    made_here = {"mid", "mid_norm"}
    for rows in BLOCK_ROWS.values():
        assert {row.part for row in rows} <= set(PART_NAMES) | made_here
    assert set(SCALES) <= set(PART_NAMES)


def test_names_that_are_found_are_modules_of_the_block(structures: dict[str, Structure]) -> None:
    """Every path of every block of every family leads to a module; queries and keys are never the same one."""
    for family, structure in structures.items():
        model = miniature(family)
        for stack in structure.stacks.values():
            for block in stack.blocks:
                found = {role: submodule(model, f"{block.path}.{path}") for role, path in block.parts.items() if path}
                assert all(module is not None for module in found.values()), (family, block.path)
                for several in (("q", "k", "v", "o"), ("ln1", "ln2", "lnx"), ("mlp_gate", "mlp_up", "mlp_down")):
                    there = [id(found[role]) for role in several if role in found]
                    assert len(there) == len(set(there)), (family, block.path, several)


@pytest.mark.slow
def test_the_guide_for_odd_models_runs_as_it_stands(capsys: pytest.CaptureFixture) -> None:
    """The page's commands and Python; what it quotes is what is printed; its tables name all that a row can say."""
    before = dict(EXCEPTIONS)
    try:
        made = run_page("odd_models.md", models=models.main)
    finally:
        EXCEPTIONS.clear()
        EXCEPTIONS.update(before)
    assert made["row"] == before["florence2"]
    assert made["model"].conformance.ok
    printed = capsys.readouterr().out
    page = (DOCS / "odd_models.md").read_text()
    quoted = " ".join(line[2:] for line in page.splitlines() if line.startswith("> "))
    assert quoted in printed
    assert all(f"`{field.name}`" in page for field in fields(Oddity))
    assert broken_links("odd_models.md") == []
