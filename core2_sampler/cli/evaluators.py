"""``core2 evaluators``: train and ship what an online guidance scale listens to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from core2_sampler.cli.evaluator_data import check_data, identify, pair_source
from core2_sampler.cli.loading import DEVICE_HELP, LENGTH_HELP, MODEL_HELP
from core2_sampler.cli.options import add_command
from core2_sampler.config import ConfigError, check_folder, option, user_input
from core2_sampler.evaluators.kinds import KINDS
from core2_sampler.evaluators.train import EvaluatorConfig
from core2_sampler.model_files import ModelFiles, find_model

if TYPE_CHECKING:
    from core2_sampler.evaluators.network import LatentEvaluator
    from core2_sampler.types import Conditioning

    Encode = Callable[..., tuple[Conditioning, Conditioning]]

app = typer.Typer(
    help="Train and ship the evaluators of an online guidance scale.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """Options of ``core2 evaluators train``."""

    training: EvaluatorConfig
    kinds: tuple[str, ...] = option(
        help=f"Kind of evaluator: {', '.join(KINDS.names())}.", positional=True
    )
    output: Path = option(
        help="Folder of the evaluator; the same command again resumes (from FOLDER.run).",
        short="-o",
    )
    model: str = option("shapes-sd3", help=MODEL_HELP)
    images: Path | None = option(
        None,
        help="Folder of real images, NAME.png beside NAME.txt with its caption; by default images "
        "of Shapes are rendered for its models.",
    )
    data: Path | None = option(
        None, help="fidelity, preference: folder of `core2 collect` that holds last steps."
    )
    scorers: tuple[str, ...] | None = option(
        None,
        help="preference: scorers of `core2 bench` that rank images, by default shapes,shapes-clip;"
        " the first that differs by more than its standard deviation over the images of a prompt "
        "decides.",
    )
    start: Path | None = option(
        None, help="Folder of an evaluator of the same sizes to begin from, of any kind."
    )
    width: int = option(384, help="Width of the network, a multiple of 64.", min=64)
    num_layers: int = option(6, help="Transformer blocks.", min=1)
    held_out_share: float | None = option(
        None,
        help="Share of files, or of what prompts say, that only measures; 0.1 by default.",
        min=0.001,
        max=0.9,
    )
    max_sequence_length: int | None = option(None, help=LENGTH_HELP, min=1, max=512)
    device: str = option("auto", help=DEVICE_HELP)


@dataclass(frozen=True, slots=True)
class ShipOptions:
    """Options of ``core2 evaluators ship``."""

    folders: tuple[str, ...] = option(
        help="Folders of evaluators of embedded models, as `core2 evaluators train` left them.",
        positional=True,
    )


@app.callback()
def _group() -> None:
    """Train and ship the evaluators of an online guidance scale."""


def run_train(options: TrainOptions) -> None:
    """Train a latent evaluator of one kind; a killed run resumes."""
    from core2_sampler.info import pick_device

    if len(options.kinds) != 1:
        raise ConfigError(f"kinds must be one kind of evaluator, got {', '.join(options.kinds)}")
    with user_input():
        KINDS.get(options.kinds[0])
        device = pick_device(options.device)
    check_data(options)
    check_folder(options.output)
    if options.start is not None and options.start.resolve() == options.output.resolve():
        raise ConfigError(f"start must not be the output, got {options.start}: take another output")
    _train(options, find_model(options.model), device)


def _train(options: TrainOptions, model: ModelFiles, device: str) -> None:
    """Load the model, train the evaluator, save it with its card."""
    from core2_sampler.cli.loading import load_model
    from core2_sampler.evaluators.train import save_evaluator, train_evaluator

    tokens = model.check_tokens(options.max_sequence_length)
    length = {} if tokens is None else {"max_sequence_length": tokens}
    pipe = load_model(model, device, "fp32")
    encode = partial(pipe.family.encode, pipe, **length)
    with user_input():
        evaluator = _evaluator(options, pipe, encode)
        progress = train_evaluator(
            evaluator,
            pair_source(options, pipe),
            partial(read_captions, encode),
            options.training,
            folder=options.output.with_name(options.output.name + ".run"),
            identity=identify(options, model),
        )
    data = {name: str(getattr(options, name) or "") for name in ("images", "data", "start")}
    card = save_evaluator(
        evaluator, options.output, progress, options.training, model=model.name, **data
    )
    accuracy = progress.evaluations[-1]["accuracy"]
    print(f"{options.output}: {accuracy:.3f} of held-out pairs told right, card in {card}")


def read_captions(encode: Encode, texts: list[str]) -> Conditioning:
    """Return encoded captions; half of them stand where a negative prompt would be encoded.

    Args:
        encode: a family's, of prompts and negative prompts.
        texts: captions, at least one.
    """
    from core2_sampler.conditioning import join
    from core2_sampler.types import Conditioning

    half = -(-len(texts) // 2)
    both = join(*encode(texts[:half], (texts[half:] + texts[-1:])[:half]))
    return Conditioning(both.prompt_embeds[: len(texts)], both.pooled[: len(texts)])


def _evaluator(options: TrainOptions, pipe: Any, encode: Encode) -> LatentEvaluator:
    import torch

    from core2_sampler.evaluators import load_evaluator
    from core2_sampler.evaluators.network import LatentEvaluator

    family, (prompt, _) = pipe.family, encode([""])
    evaluator = LatentEvaluator.for_model(
        options.kinds[0],
        family.name,
        torch.empty(1, *family.latent_shape(pipe), device=prompt.pooled.device),
        prompt,
        width=options.width,
        num_layers=options.num_layers,
    )
    if options.start is not None:
        evaluator.start_from(load_evaluator(options.start))
    return evaluator


def run_ship(options: ShipOptions) -> None:
    """Put trained evaluators in this installation, where `--evaluators KIND` finds them."""
    from core2_sampler.evaluators.shipped import ship_evaluator

    for folder in options.folders:
        with user_input():
            print(ship_evaluator(Path(folder)))


add_command(app, "train", TrainOptions, run_train)
add_command(app, "ship", ShipOptions, run_ship)
