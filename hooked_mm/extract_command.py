"""Representations of a data set into a store: any model, data set, hooks and selectors, any number of GPUs.

    hooked-mm extract --model.id llava-hf/llava-1.5-7b-hf --model.dtype bfloat16 \\
        --data Coco --data.annotations captions_val2017.json --data.images val2017 \\
        --hooks 'blocks.*.hook_resid_post' --selector LastPrompt --answer generated \\
        --output runs/coco --trainer.accelerator gpu --trainer.devices 8 --trainer.strategy ddp

Everything can stand in a YAML file (`-c extract.yaml`; `--print_config` writes one). A run that was cut off goes on
with `--resume`, on however many processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import TensorBoardLogger

import hooked_mm.datasets
import hooked_mm.scenes.dataset  # noqa: F401  (data modules are offered by name)
from hooked_mm.data import SampleDataModule
from hooked_mm.errors import HookedMMError
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract, quiet
from hooked_mm.loading import OnError
from hooked_mm.reader import ModelSource
from hooked_mm.store_writer import LOG

PLAIN = ("enable_model_summary", "enable_progress_bar", "enable_checkpointing", "use_distributed_sampler")
"""What of Lightning a run has no use for; it has a bar of its own and deals out samples itself."""


def build_parser() -> ArgumentParser:
    """The options of the command."""
    parser = ArgumentParser(prog="hooked-mm extract", description=(__doc__ or "").split("\n")[0], default_env=False)
    parser.add_argument("-c", "--config", action="config", help="a YAML file with any of these options")
    parser.add_class_arguments(ModelSource, "model")
    parser.add_subclass_arguments(SampleDataModule, "data", required=True)
    parser.add_class_arguments(Extractor, None, skip={"model", "adapter_off"})
    parser.add_argument("--output", type=Path, required=True, help="the store's folder, the same for all processes")
    parser.add_argument("--resume", action="store_true", help="go on with a store that a cut-off run left there")
    parser.add_argument(
        "--on_error", "--on-error", type=OnError, default="skip", help="list a bad sample and go on, or stop"
    )
    parser.add_argument("--megabytes_per_shard", type=float, default=256.0)
    parser.add_argument("--seconds_per_shard", type=float, default=300.0, help="a cut-off run loses no more than this")
    parser.add_class_arguments(lightning.Trainer, "trainer", skip={"logger", "callbacks"})
    parser.set_defaults({"trainer.devices": 1, **{f"trainer.{name}": False for name in PLAIN}})
    return parser


def instantiated(parser: ArgumentParser, argv: Sequence[str] | None) -> Any:
    """The options as the objects they describe; what one of these refuses is raised as it was said."""
    try:
        return parser.instantiate(parser.parse_args(None if argv is None else list(argv)))
    except ValueError as error:
        # What a data set or a selector refuses comes wrapped in pages about types.
        if isinstance(error.__cause__, HookedMMError):
            raise error.__cause__ from error
        raise


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm extract`."""
    quiet()
    made = instantiated(build_parser(), argv)
    names = ("hooks", "selector", "answer", "max_new_tokens", "answer_prefix", "stored", "stored_by")
    more = ("max_positions", "share_pictures")
    extractor = Extractor(made.model, **{n: made[n] for n in (*names, *more)})
    made.trainer.loggers = [TensorBoardLogger(made.output, name=LOG, version="")]
    extract(
        extractor,
        made.data,
        made.output,
        resume=made.resume,
        on_error=made.on_error,
        trainer=made.trainer,
        megabytes_per_shard=made.megabytes_per_shard,
        seconds_per_shard=made.seconds_per_shard,
    )
