"""``core2 collect``: run a model with guidance on many prompts and keep what it computes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import typer

from core2_sampler.cli.launch import launched_on_cpu, start_missing_processes
from core2_sampler.cli.loading import DEVICE_HELP, DTYPE_HELP, LENGTH_HELP, MODEL_HELP, Dtype
from core2_sampler.cli.options import add_command
from core2_sampler.cli.stock import CALL_HELP, PIPELINE_HELP, StockModel, read_call
from core2_sampler.collect import CollectConfig
from core2_sampler.config import ConfigError, check_folder, option, user_input
from core2_sampler.fitting import HeadFiles, find_head
from core2_sampler.model_files import ModelFiles, find_model, model_source
from core2_sampler.trajectory import TrajectoryStore
from core2_sampler.weights import model_weights

Fill = Callable[..., int]
"""What fills a store, model and driver bound: `core2_sampler.collect.collect` or its like."""

Prepare = Callable[[str], Fill]
"""``fill = prepare(device)``: loads what the checks have found."""

PROMPTS_HELP = "A text file with one prompt a line, or `shapes`: training captions of that world."


@dataclass(frozen=True, slots=True)
class CollectOptions:
    """Options of ``core2 collect``."""

    kept: CollectConfig
    output: Path = option(
        help="Folder of the trajectories; the same command again resumes.", short="-o"
    )
    model: str = option("shapes-sd3", help=MODEL_HELP)
    pipeline: str | None = option(None, help=PIPELINE_HELP)
    call: Path | None = option(None, help=CALL_HELP)
    prompts: str = option("shapes", help=PROMPTS_HELP)
    num_prompts: int | None = option(
        None, help="Only so many of the prompts; with `shapes` 1000 unless given.", min=1
    )
    num_seeds: int = option(1, help="Trajectories of each prompt.", min=1)
    seed: int = option(
        0, help="Of each prompt's first trajectory, and of the draw of captions.", min=0
    )
    steps: int = option(28, help="Sampling steps.", min=1)
    max_sequence_length: int | None = option(None, help=LENGTH_HELP, min=1, max=512)
    weak_guidance: float | None = option(
        None,
        help="FLUX: the gap between the embedded guidance 3.5 and this one, in place of that "
        "between the prompt and the negative prompt.",
    )
    head: str | None = option(None, help="Head that drives an on-policy round: folder or hub id.")
    device: str = option("auto", help=DEVICE_HELP)
    dtype: Dtype = option("auto", help=DTYPE_HELP)


def run_collect(options: CollectOptions) -> None:
    """Collect guided trajectories of a model; a killed run resumes, processes share the work.

    With N processes: accelerate launch --num_processes N -m core2_sampler collect ...
    """
    if (options.head is None) != (options.kept.round == 0):
        raise ConfigError(
            "round 0 is driven by CFG and any later one by a head, "
            f"got round {options.kept.round} and head {options.head}"
        )
    prepare = _prepare_own(options) if options.pipeline is None else _prepare_stock(options)
    prompts = read_prompts(options.prompts, options.num_prompts, options.seed)
    check_folder(options.output)
    start_missing_processes()
    _collect(options, prepare, prompts)


def _prepare_own(options: CollectOptions) -> Prepare:
    """Check model and head; return what loads them."""
    read_call(options.pipeline, options.call)
    model = find_model(options.model)
    head = _policy(options, model)

    def prepare(device: str) -> Fill:
        from core2_sampler.cli.loading import load_model, load_weak_head, sampling_setup
        from core2_sampler.collect import collect

        pipe = load_model(model, device, options.dtype)
        tokens = model.check_tokens(options.max_sequence_length)
        policy = None if head is None else load_weak_head(head, pipe)
        if policy is not None:
            with user_input():
                policy.check_gap(options.weak_guidance)
        weak = options.weak_guidance
        about = {**model_facts(model, tokens, weak), "head": options.head}
        check_weights(options.output, about["weights"])
        setup = sampling_setup(pipe, options.steps, tokens, weak)
        return partial(collect, policy=policy, about=about, **setup)

    return prepare


def _prepare_stock(options: CollectOptions) -> Prepare:
    """Check the call of a stock pipeline; return what loads it."""
    if options.max_sequence_length is not None:
        raise ConfigError("max_sequence_length must be in --call with --pipeline, if anywhere")
    if options.weak_guidance is not None:
        raise ConfigError("weak_guidance must be left out with --pipeline, got both")
    call = read_call(options.pipeline, options.call)
    stock = StockModel(options.model, str(options.pipeline), call, options.steps)
    arguments = stock.arguments()

    def prepare(device: str) -> Fill:
        from core2_sampler.attachment.checks import find_head as find_weak_head
        from core2_sampler.attachment.collecting import collect_stock
        from core2_sampler.attachment.networks import find_networks

        pipe = stock.load(device, options.dtype)
        with user_input():
            head = find_weak_head(options.head, find_networks(pipe)[0])
        weights = model_weights(stock.model, model_source(stock.model))
        check_weights(options.output, weights)
        about = {**stock.facts(), "weights": weights, "head": options.head}
        return partial(collect_stock, pipe, arguments, policy=head, about=about)

    return prepare


def model_facts(
    model: ModelFiles, max_sequence_length: int | None, weak_guidance: float | None
) -> dict[str, Any]:
    """Return what is pinned of a model, once it was loaded, and of how its prompts are told.

    Args:
        model: one of ours.
        max_sequence_length: T5 tokens of a prompt, where the family has T5.
        weak_guidance: FLUX: the embedded guidance that stands for uncond.
    """
    facts: dict[str, Any] = {
        "model": model.name,
        "weights": model_weights(model.name, model.source),
        "max_sequence_length": max_sequence_length,
    }
    return facts if weak_guidance is None else {**facts, "weak_guidance": weak_guidance}


def check_weights(store: Path, weights: str) -> None:
    """Check that a store holds trajectories of a model with these weights, or none.

    Raises:
        ConfigError: if a round is of other weights, or does not name them.
    """
    for number, settings in TrajectoryStore(store).rounds().items():
        if (found := settings.get("weights")) != weights:
            raise ConfigError(
                f"the rounds of {store} must be of the weights that the model has now ({weights}), "
                f"got round {number} of {settings.get('model')} with {found or 'unknown ones'}: "
                "collect into another folder"
            )


def _policy(options: CollectOptions, model: ModelFiles) -> HeadFiles | None:
    """Find the head of an on-policy round."""
    if options.head is None:
        return None
    head = find_head(options.head, model)
    if head is not None and head.in_model:
        for scale in options.kept.guidance_scales:
            head.check_scale(scale)
    return head


def read_prompts(source: str, count: int | None, seed: int) -> list[tuple[str, str]]:
    """Return prompts as (id, text), all different.

    Args:
        source: a text file with one prompt a line, or ``shapes``.
        count: how many; None takes the whole file.
        seed: which training captions of Shapes.

    Raises:
        ConfigError: if the file cannot be read or has fewer prompts.
    """
    if source == "shapes":
        return _shapes_prompts(1000 if count is None else count, seed)
    try:
        lines = Path(source).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"prompts must be `shapes` or a text file, got {source!r}") from None
    texts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(texts) < (count or 1):
        raise ConfigError(f"{source} must hold {count or 1} different prompts, got {len(texts)}")
    return [(text, text) for text in texts[:count]]


def _shapes_prompts(count: int, seed: int) -> list[tuple[str, str]]:
    from core2_sampler.shapes.world import training_prompt

    rng = random.Random(f"collect/{seed}")
    found: dict[str, str] = {}
    for _ in range(100 * count):
        if len(found) == count:
            return list(found.items())
        prompt = training_prompt(rng)
        found[prompt.id] = prompt.text
    raise ConfigError(f"num_prompts must be at most about {len(found)} for shapes, got {count}")


def _collect(options: CollectOptions, prepare: Prepare, prompts: list[tuple[str, str]]) -> None:
    """Load the model and collect this process's share."""
    from accelerate import PartialState

    from core2_sampler.cli.console import progress_bars
    from core2_sampler.collect import Job
    from core2_sampler.info import pick_device

    with user_input():
        device = pick_device("cpu" if launched_on_cpu() else options.device)
    state = PartialState(cpu=device == "cpu")
    if device == "cuda":
        device = str(state.device)  # one GPU for each process
    fill = prepare(device)
    seeds = range(options.seed, options.seed + options.num_seeds)
    jobs = [Job(text, key, seed) for key, text in prompts for seed in seeds]
    shown = progress_bars({"trajectories": None}, state.is_main_process)
    with user_input(), shown as bars:
        added = fill(
            jobs=jobs,
            store=TrajectoryStore(options.output),
            config=options.kept,
            num_processes=state.num_processes,
            process_index=state.process_index,
            on_unit=lambda done, total: bars.set("trajectories", done, total),
        )
    print(f"process {state.process_index}: added {added} trajectories to {options.output}")
    state.wait_for_everyone()
    state.destroy_process_group()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
add_command(app, "collect", CollectOptions, run_collect)
