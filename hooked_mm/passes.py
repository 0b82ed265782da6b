"""The passes of one conformance check: which blocks and points are looked at, what is read, and every check of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hooked_mm.batch import Batch
from hooked_mm.checks import Check, compare
from hooked_mm.equations import BlockEquations
from hooked_mm.errors import BadInputError
from hooked_mm.execution import out_of_order, passing_times
from hooked_mm.images import ImageChecks
from hooked_mm.norms import norm_scale
from hooked_mm.probe import tested_layers
from hooked_mm.projectors import layered
from hooked_mm.structure import PREFIXES, Stack
from hooked_mm.views import Pass, Streams
from hooked_mm.vocabulary import never_said, one_stream
from hooked_mm.writes import WriteChecks

if TYPE_CHECKING:
    from hooked_mm.hooked import HookedMM


class Passes:
    """The passes of one conformance check."""

    def __init__(self, model: HookedMM, batch: Batch, *, full: bool, copies: int) -> None:
        self.model, self.batch, self.full = model, batch, full
        self.runner, self.structure = model._runner, model.structure
        self.points = model.hook_points
        # Blocks that only attend to pictures have no points where there are none.
        self.layers = {
            name: tuple(
                layer
                for layer in tested_layers(stack, full=full)
                if f"{PREFIXES[name]}blocks.{layer}.hook_resid_pre" in self.points
            )
            for name, stack in self.structure.stacks.items()
        }
        self.copies = copies
        self.dead: set[str] = set()

    def names(self) -> list[str]:
        """Every point of the tested blocks, and those outside blocks, that is reached."""
        return [
            name
            for name, point in self.points.items()
            if name not in self.dead and (point.layer is None or point.layer in self.layers.get(point.stream, ()))
        ]

    def reached(self) -> Iterator[Check]:
        """Every listed point fires, in the order of the list, and can be shown in the promised shape."""
        yield from self._ordered()
        try:
            self.read(self.names())
            return
        except Exception:
            names = self.names()
        for name in names:
            try:
                self.read([name])
            except Exception as error:
                self.dead.add(name)
                why = (
                    str(error)
                    if isinstance(error, BadInputError) or type(error) is RuntimeError
                    else "no value passes there in a forward pass"
                )
                yield Check("the point is reached", name, "fails", None, why.splitlines()[0])

    def _ordered(self) -> Iterator[Check]:
        """What lies at another module is met at another time than its place in the list says."""
        try:
            times = passing_times(self.runner, self.points, self.batch)
        except Exception:
            # Attention that can't be tapped; reading one point after the other tells which.
            return
        order = [name for name in self.points if name in times]
        for index in sorted(out_of_order([times[name] for name in order])):
            self.dead.add(order[index])
            why = "its value passes before or after those that it is listed between"
            yield Check("values pass in the order of the list", order[index], "fails", None, why)
        for name, point in self.points.items():
            lost = [needed for needed in point.needs if needed in self.dead]
            if lost and name not in self.dead:
                self.dead.add(name)
                yield Check("what the point needs is reached", name, "fails", None, f"it needs {lost[0]}")

    def keep(self, stream: str) -> Tensor | None:
        """Positions of a stream that are not padding."""
        if stream == "vision" or (stream == "text" and self.structure.encoder):
            return None
        return self.batch.mask()

    def read(self, names: Iterable[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and values of one pass."""
        logits, values = self.runner.forward(self.batch, list(names), save=True)
        assert logits is not None
        # Points of one equation may lie on several devices.
        place = self.batch.input_ids.device
        return logits.to(place), {name: value.to(place) for name, value in values.items()}

    def run(self) -> Iterator[Check]:
        """Every check."""
        with torch.no_grad():
            bare, entering = self.bare()
            yield from self.reached()
            cheap = [name for name in self.names() if not self.points[name].costly]
            plain, _ = self.read(cheap)
            what = "reading changes no logit, bit for bit"
            if torch.equal(plain, bare):
                yield Check(what, "hook_logits", "holds")
            else:
                guilty = [name for name in cheap if not torch.equal(self.read([name])[0], bare)]
                yield from (Check(what, name, "fails") for name in guilty or ["hook_logits"])
            between = [
                f"{PREFIXES[s]}blocks.{layer + 1}.hook_resid_pre" for s in self.layers for layer in self.layers[s]
            ]
            names = [*self.names(), *(name for name in between if name in self.points and name not in self.dead)]
            logits, values = self.read(names)
            what, keep = "reading patterns changes the logits by rounding only", self.keep("text")
            found = compare(what, "hook_logits", logits, bare, keep)
            if found.verdict == "holds":
                yield found
            else:
                costly = [name for name in self.names() if self.points[name].costly]
                alone = [compare(what, name, self.read([name])[0], bare, keep) for name in costly]
                yield from [check for check in alone if check.verdict == "fails"] or [found]
            yield from self.entering(values, entering)
            sections = [
                self.block(stream, stack, layer, values)
                for stream, stack in self.structure.stacks.items()
                for layer in self.layers[stream]
            ]
            sections += [self.start(stream, values) for stream in self.layers]
            sections += [self.ends(values), self.logits(values), ImageChecks(self).all(values), self.crossed(values)]
            sections.append(WriteChecks(self, values).all())
            for section in sections:
                try:
                    yield from section
                except KeyError as missing:
                    # What follows from a value that is never reached can't be checked; that it is not, was said above.
                    if missing.args[0] not in self.dead:
                        raise

    def bare(self) -> tuple[Tensor, list[Tensor]]:
        """The model's own logits, and what goes into the projector, by a raw hook."""
        entering: list[Tensor] = []
        path = self.structure.projector

        def note(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            entering.extend(value for value in (*args, *options.values()) if isinstance(value, Tensor))

        handle = self.runner.module(path).register_forward_pre_hook(note, with_kwargs=True) if path else None
        try:
            return self.model.hf_model(**self.batch.inputs).logits, entering
        finally:
            if handle is not None:
                handle.remove()

    def entering(self, values: Mapping[str, Tensor], entering: list[Tensor]) -> Iterator[Check]:
        """The projector is a whole between tower and text, and hook_in is what goes into it."""
        path, name = self.structure.projector, "projector.hook_in"
        if path is None:
            return
        holder = path.rpartition(".")[0]
        if isinstance(self.runner.module(holder), nn.ModuleList):
            # One of several alike.
            holder = holder.rpartition(".")[0]
        blocks = [block.path for stack in self.structure.stacks.values() for block in stack.blocks]
        whole = any(block.startswith(f"{holder}." if holder else "") for block in blocks)
        why = "" if whole else f"{path} is a part of {holder}, which holds no blocks"
        yield Check("the projector is no part of another", name, "holds" if whole else "fails", None, why)
        if name in values and entering:
            access: Any = self.points[name].access
            raw = access.view.show(entering[0], Pass(self.runner.get, self.batch.length))
            yield compare("hook_in is what goes into the projector", name, values[name], raw)

    def block(self, stream: str, stack: Stack, layer: int, values: Mapping[str, Tensor]) -> Iterator[Check]:
        """The equations of one block, and how it joins the next."""
        keep = self.keep(stream)
        block, prefix = stack.blocks[layer], f"{PREFIXES[stream]}blocks.{layer}."
        yield from BlockEquations(values, self.model.hf_model, block, prefix, keep).all()
        following = values.get(f"{PREFIXES[stream]}blocks.{layer + 1}.hook_resid_pre")
        if following is None:
            return
        post = values[f"{prefix}hook_resid_post"]
        if following.shape != post.shape:
            kind = "hierarchical tower: a convolution changes size and width between stages"
            yield Check("resid_post == next resid_pre", f"{prefix}hook_resid_post", "not applicable", None, kind)
            return
        inserted = values.get(f"{prefix}hook_insert_out")
        total = post if inserted is None else post + inserted
        what = "resid_post (+ what is inserted) == next resid_pre"
        yield compare(what, f"{PREFIXES[stream]}blocks.{layer + 1}.hook_resid_pre", following, total, keep)
        if inserted is None:
            return
        verdict: Any = "holds" if bool(inserted.any()) else "fails"
        yield Check("something is inserted", f"{prefix}hook_insert_out", verdict)
        if stream == "text":
            zero = inserted[self.batch.mask("text")]
            yield compare("nothing is inserted at text positions", f"{prefix}hook_insert_out", zero, 0 * zero)

    def start(self, stream: str, values: Mapping[str, Tensor]) -> Iterator[Check]:
        """What enters the first block is called so."""
        name, first = f"{PREFIXES[stream]}hook_embed", f"{PREFIXES[stream]}blocks.0.hook_resid_pre"
        got, entering = values[name], values[first]
        if (count := self.structure.stacks[stream].streams) > 1:
            got = Streams(count).back(got, entering)
        yield compare("hook_embed == first resid_pre", name, got, entering)

    def logits(self, values: Mapping[str, Tensor]) -> Iterator[Check]:
        """unembed(norm(last stream)) == logits, scale and soft-cap included."""
        last = f"blocks.{len(self.structure.text.blocks) - 1}.hook_resid_post"
        keep = self.keep("text")
        stream = values[last]
        inserted = values.get(last.replace("resid_post", "insert_out"))
        stream = stream if inserted is None else stream + inserted
        lens = self.model.to_logits(stream)
        logits, said = values["hook_logits"], ~never_said(values["hook_logits"])
        found = compare(
            "unembed(norm(last resid_post)) == logits", "hook_logits", logits[..., said], lens[..., said], keep
        )
        silent = int((~said).sum())
        yield replace(found, detail=f"but for {silent} words that the model never says") if silent else found
        stream = one_stream(self.model.hf_model, self.structure.readout, stream)
        if self.structure.final_norm is None:
            kind = "blocks normalise after the sum, so there is no final norm"
            yield Check("the final norm's output", "ln_final.hook_out", "not applicable", None, kind)
            return
        yield from self.final_norm("text", self.structure.final_norm, stream, values)

    def final_norm(self, of: str, path: str, stream: Tensor, values: Mapping[str, Tensor]) -> Iterator[Check]:
        """Divisor, quotient and output of the norm behind a stack's last block."""
        name, keep = f"{PREFIXES[of]}ln_final.hook_", self.keep(of)
        norm, out = self.model.hf_model.get_submodule(path), values[f"{name}out"]
        yield compare("the final norm's output", f"{name}out", out, norm(stream), keep)
        if (quotient := values.get(f"{name}normalized")) is not None:
            access: Any = self.points[f"{name}normalized"].access
            yield compare("quotient * gain", f"{name}normalized", out, access.formula.output(norm, quotient), keep)
            divisor = norm_scale(stream, access.formula)
            yield compare("the stream's divisor", f"{name}scale", values[f"{name}scale"], divisor, keep)

    def ends(self, values: Mapping[str, Tensor]) -> Iterator[Check]:
        """The norms behind encoders and towers that are read by cross-attention."""
        for of, stack in self.structure.stacks.items():
            if stack.final_norm:
                last = values[f"{PREFIXES[of]}blocks.{len(stack.blocks) - 1}.hook_resid_post"]
                yield from self.final_norm(of, stack.final_norm, last, values)

    def crossed(self, values: Mapping[str, Tensor]) -> Iterator[Check]:
        """Keys of cross-attention are projected from the image's features, or from the encoder's last stream."""
        encoder, tower = self.structure.encoder, self.structure.vision
        source = "projector.hook_out"
        if encoder:
            source = f"encoder.blocks.{len(encoder.blocks) - 1}.hook_resid_post"
        for name, stack in (("encoder", encoder), ("vision", tower)):
            if stack and stack.final_norm:
                source = f"{name}.ln_final.hook_out"
        for layer in self.layers["text"]:
            block, name = self.structure.text.blocks[layer], f"blocks.{layer}.xattn.hook_k"
            if name in values and source in values:
                project = self.model.hf_model.get_submodule(f"{block.path}.{block.parts['xk']}")
                expected = project(values[source]).reshape(values[name].shape)
                yield compare("keys of cross-attention are of the image or encoder", source, values[name], expected)

    @property
    def embedded(self) -> str:
        """The point that holds image features."""
        return "encoder.hook_embed" if self.structure.encoder else "hook_embed"

    def _reads_encoder_end(self) -> bool:
        """Whether the decoder takes the encoder's last stream, rather than keys and values of its blocks."""
        decoder = self.model.hf_model.get_submodule(self.structure.text.owner)
        return "encoder_hidden_states" in inspect.signature(type(decoder).forward).parameters

    def follower(self, name: str) -> str | None:
        """The point at which a write must be seen."""
        point = self.points[name]
        names = self.names()
        if point.layer is not None:
            own = f"{PREFIXES[point.stream]}blocks.{point.layer}.hook_resid_post"
            if name not in (own, own.replace("resid_post", "insert_out")):
                return own
        stream = point.stream
        if stream == "vision":
            if name == "vision.hook_embed":
                return "vision.blocks.0.hook_resid_post"
            if name.startswith("vision.ln_final."):
                return "hook_logits"
            following = f"vision.blocks.{(point.layer or 0) + 1}.hook_resid_pre"
            if following in self.points:
                return following if following in names else "projector.hook_in"
            end = reads_tower_end(self.model.hf_model.config, len(self.structure.stacks["vision"].blocks))
            return "projector.hook_in" if end else None
        if stream == "encoder" and not self._reads_encoder_end():
            last = f"encoder.blocks.{len(self.structure.stacks['encoder'].blocks) - 1}.hook_resid_post"
            if name.startswith("encoder.ln_final.") or name == last:
                return None
        if name == "projector.hook_in":
            return "projector.hook_out"
        if name == "projector.hook_out" and not self.structure.cross_attention:
            return self.embedded
        return "blocks.0.hook_resid_post" if name == "hook_embed" else "hook_logits"


def reads_tower_end(config: Any, blocks: int) -> bool:
    """Whether the projector reads the last of so many blocks of the tower, or only earlier ones."""
    layer = getattr(config, "vision_feature_layer", None)
    chosen = layer if isinstance(layer, list | tuple) else [-1 if layer is None else layer]
    if pairs := layered(config):
        chosen = [tower for tower, text in pairs if text == 0]
    return any(index in (-1, blocks) for index in chosen)
