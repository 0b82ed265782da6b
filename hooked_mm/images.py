"""Proof that image features are where positions are called image, and nowhere else: by another picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hooked_mm.checks import Check, Verdict, compare, tolerance
from hooked_mm.found_positions import other_pictures
from hooked_mm.structure import NO_TOWER
from hooked_mm.writes import Probe


class ImageChecks:
    """The checks that need a pass on another picture.

    Args:
        probe: Model, batch and points.
    """

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    @property
    def embedded(self) -> str:
        """The point that holds image features."""
        return self.probe.embedded

    def all(self, values: Mapping[str, Tensor]) -> Iterator[Check]:
        """Image features are where positions are called image; another picture changes those and nothing else."""
        if self.probe.structure.left_out:
            yield Check("another picture changes the logits", self.embedded, "not applicable", None, NO_TOWER)
            return
        embed = values[self.embedded]
        image = self.probe.batch.mask("image")
        inputs = {**self.probe.batch.inputs, **other_pictures(self.probe.batch.inputs)}
        watched = [name for name in (self.embedded, "projector.hook_out", *self.embed_norm) if name in values]
        logits, other = self.probe.runner.forward(self.probe.batch.with_inputs(inputs), watched, save=True)
        assert logits is not None
        changed = (other[self.embedded] != embed).any(dim=-1)
        moved = bool((logits != values["hook_logits"]).any())
        yield Check("another picture changes the logits", self.embedded, "holds" if moved else "fails")
        if self.probe.structure.cross_attention:
            kind = "cross-attention: image features have no positions in the text"
            verdict: Any = "fails" if bool(changed.any()) else "holds"
            yield Check("another picture changes no text embedding", self.embedded, verdict)
            yield Check("image features stand at image positions", self.embedded, "not applicable", None, kind)
            return
        outside = int((changed & ~image & ~self.merged(changed)).sum())
        where = f"{outside} positions outside change"
        verdict = "holds" if outside == 0 else "fails"
        yield Check(
            "another picture changes image positions only", self.embedded, verdict, None, where if outside else ""
        )
        slots = image & ~self.probe.batch.separator
        still = int((slots & ~changed).sum())
        if self._are_words(embed[slots]) and self._are_words(other[self.embedded][slots]):
            yield from self._words(changed & slots, still)
            return
        verdict = "holds" if still == 0 and bool(slots.any()) else "fails"
        yield Check(
            "another picture changes every image position",
            self.embedded,
            verdict,
            None,
            f"{still} stay" if still else "",
        )
        if each := self.probe.structure.projector_each:
            # It has no point of its own, so the check vouches for the embeddings.
            yield replace(self._features(embed[slots], self._gathered(each)), point=self.embedded)
            return
        if (out := values.get("projector.hook_out")) is None:
            kind = "no projector is known: nothing, or no one part, stands between pictures and text"
            yield Check("image features stand at image positions", self.embedded, "not applicable", None, kind)
            return
        slots = slots & ~self.shrunk()
        direct = self._features(embed[slots], out.flatten(0, -2))
        if direct.verdict == "fails":
            direct = self._added(direct, embed, out, slots)
        yield direct if direct.verdict == "holds" else self._shifted(direct, values, other, slots)

    def _added(self, direct: Check, embed: Tensor, out: Tensor, slots: Tensor) -> Check:
        """Where features are added to the image token's own embedding, they are what is more than that (Molmo)."""
        ids = self.probe.batch.inputs.get("input_ids")
        if ids is None or ids.shape != slots.shape:
            return direct
        table = self.probe.model.hf_model.get_submodule(self.probe.structure.embed)
        with torch.no_grad():
            own = table(ids[slots]).to(embed)
        found = self._features(embed[slots] - own, out.flatten(0, -2))
        return replace(found, detail="added to the token's own embedding") if found.verdict == "holds" else direct

    def _are_words(self, values: Tensor) -> bool:
        """Whether each of these is the embedding of some token, but not of the one that keeps a picture's place."""
        table: Any = self.probe.model.hf_model.get_submodule(self.probe.structure.embed)
        if self.probe.structure.projector is not None or not len(values):
            return False
        rows = table(torch.arange(table.num_embeddings, device=values.device)).to(values.device)
        nearest = torch.cdist(values.float(), rows.float()).argmin(dim=1)
        placeholder = self.probe.structure.image_token_id
        kept = nearest == (-1 if placeholder is None else placeholder)
        return bool((rows[nearest] == values).all()) and not bool(kept.any())

    def _words(self, changed: Tensor, still: int) -> Iterator[Check]:
        """A picture that becomes words of the vocabulary: another becomes others, some of which may be the same."""
        found = self.probe.batch.layout.image_index
        every = all(bool(changed[found == image].any()) for image in found[found >= 0].unique())
        kind = f"a picture becomes words of the vocabulary; {still} positions get the same word of another picture"
        what = "another picture changes positions of every image"
        verdict: Verdict = "holds" if every else "fails"
        yield Check(what, self.embedded, verdict, None, kind)
        what = "each image position holds the embedding of a word"
        yield Check(what, self.embedded, "holds")

    def _gathered(self, path: str) -> Tensor:
        """What a projector gives in all its runs, one behind the other, (positions, d)."""
        found: list[Tensor] = []
        module = self.probe.model.hf_model.get_submodule(path)
        handle = module.register_forward_hook(lambda _, args, out: found.append(out.flatten(0, -2)))
        try:
            self.probe.model.hf_model(**self.probe.batch.inputs)
        finally:
            handle.remove()
        return torch.cat(found)

    def merged(self, changed: Tensor) -> Tensor:
        """Tokens with a box on the page, to which patches under that box are added (UDOP)."""
        boxes = self.probe.batch.inputs.get("bbox")
        found = torch.zeros_like(changed)
        if boxes is not None:
            found[:, : boxes.shape[1]] = boxes.any(dim=-1)
        return found

    def shrunk(self) -> Tensor:
        """Positions of grids that the model made smaller than the projector's: means of several of its outputs."""
        found = torch.zeros_like(self.probe.batch.separator)
        for sample, image in zip(self.probe.batch.image_sample, self.probe.batch.layout.images, strict=True):
            if image.grid is not None and image.tokens is not None and image.grid.shape != image.tokens.shape[:2]:
                found[sample, image.grid[image.grid >= 0]] = True
        return found

    @property
    def embed_norm(self) -> tuple[str, str]:
        """The points of a norm behind the embedding, where there is one."""
        prefix = "encoder." if self.probe.structure.encoder else ""
        return f"{prefix}ln_embed.hook_scale", f"{prefix}ln_embed.hook_normalized"

    def _shifted(
        self, direct: Check, values: Mapping[str, Tensor], other: Mapping[str, Tensor], slots: Tensor
    ) -> Check:
        """Where positions are added to features (and a norm follows), another picture moves both by the same."""

        def merged(found: Mapping[str, Tensor]) -> Tensor:
            scale, quotient = (found.get(name) for name in self.embed_norm)
            return found[self.embedded] if scale is None or quotient is None else quotient * scale

        moved = (merged(other) - merged(values))[slots]
        features = (other["projector.hook_out"] - values["projector.hook_out"]).flatten(0, -2)
        if self.embed_norm[0] in self.probe.points:
            features = features - features.mean(dim=-1, keepdim=True)
        if features.shape != moved.shape:
            if not bool(self.merged(slots).any()):
                return direct
            # The others are added to tokens.
            features = features[torch.cdist(moved.float(), features.float()).argmin(dim=1)]
        slack = 8 * torch.finfo(features.dtype).eps * merged(values)[slots].abs().max().item()
        ratio = ((moved.float() * features.float()).sum() / features.float().square().sum()).to(features.dtype)
        for factor, how in ((torch.ones_like(ratio), ""), (ratio, f"times {ratio.item():.4g}, ")):
            found = compare(direct.what, direct.point, moved, features * factor, dtype=features.dtype, slack=slack)
            if found.verdict == "holds":
                return replace(found, detail=f"{how}up to learned positions, which are added")
        return direct

    def _features(self, slots: Tensor, features: Tensor) -> Check:
        """Each image position holds one of the projector's outputs, in order up to whole crops that are rearranged."""
        what = "image features stand at image positions"
        if slots.shape[-1] != features.shape[-1]:
            why = f"{features.shape[-1]} wide, where the text is {slots.shape[-1]}"
            return Check(what, "projector.hook_out", "fails", None, why)
        size = features.abs().max().item()
        if len(slots) == len(features):
            direct = compare(what, "projector.hook_out", slots, features)
            if direct.verdict == "holds":
                return direct
            ratio = (slots.float() * features.float()).sum() / features.float().square().sum()
            scaled = compare(what, "projector.hook_out", slots, features * ratio.to(features.dtype))
            if scaled.verdict == "holds":
                return Check(what, "projector.hook_out", "holds", scaled.error, f"times {ratio.item():.4g}")
            if self.probe.batch.layout.kind != "newline":
                return direct
        nearest = torch.cdist(slots.float(), features.float()).min(dim=1)
        error = (slots - features[nearest.indices]).abs().max().item() / max(size, 1e-12)
        once = len(nearest.indices.unique()) == len(slots) or self.probe.copies > 1
        good = error <= tolerance(slots.dtype) and once
        detail = (
            "crops are rearranged into one picture" if good else "some image positions hold no output of the projector"
        )
        return Check(what, "projector.hook_out", "holds" if good else "fails", error, detail)
