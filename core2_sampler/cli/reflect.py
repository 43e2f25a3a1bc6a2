"""``core2 reflect``: distil collected trajectories into a weak head."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import typer

from core2_sampler.cli.collect import PROMPTS_HELP, check_weights, model_facts, read_prompts
from core2_sampler.cli.loading import DEVICE_HELP, LENGTH_HELP, MODEL_HELP
from core2_sampler.cli.options import add_command
from core2_sampler.cli.stock import StockModel
from core2_sampler.config import ConfigError, check_folder, option, user_input
from core2_sampler.model_files import ModelFiles, find_model, model_source
from core2_sampler.reflect import ReflectConfig
from core2_sampler.trajectory import TrajectoryStore
from core2_sampler.weights import model_weights

if TYPE_CHECKING:
    from core2_sampler.rows import RowSource

Prepare = Callable[[str], dict[str, Any]]
"""``setup = prepare(device)``: loads the ``denoiser``, with what else `OnlineSource` takes."""


@dataclass(frozen=True, slots=True)
class ReflectOptions:
    """Options of ``core2 reflect``."""

    training: ReflectConfig
    output: Path = option(
        help="Folder of the head; the same command again resumes (from FOLDER.run).", short="-o"
    )
    data: Path | None = option(None, help="Folder that `core2 collect` filled.")
    online: bool = option(
        False, help="Collect while training and store nothing, in place of --data."
    )
    head: Literal["adapter", "conv", "patch", "tap"] = option(
        "adapter", help="Kind of head: adapter, conv, patch or tap."
    )
    rank: int | None = option(None, help="adapter: rank of the low-rank layers (8).", min=1)
    reference_scale: float | None = option(
        None, help="adapter: guidance scale of strength 1; by default the highest collected."
    )
    scale_range: tuple[float, ...] | None = option(
        None, help="adapter: LOW,HIGH guidance scales to train for; by default those collected."
    )
    rounds: int = option(
        0,
        help="On-policy rounds: so often the trained head drives the collected prompts itself, "
        "with CFG as the teacher, and is trained again on all states.",
        min=0,
    )
    held_out_share: float = option(
        0.1, help="Share of the prompts that only measure the error.", min=0.001, max=0.9
    )
    model: str | None = option(None, help=MODEL_HELP + " By default that of the data.")
    prompts: str = option("shapes", help="online: " + PROMPTS_HELP)
    num_prompts: int | None = option(None, help="online: only so many of the prompts.", min=1)
    sampling_steps: int = option(28, help="online: steps of a trajectory.", min=1)
    max_sequence_length: int | None = option(None, help="online: " + LENGTH_HELP, min=1, max=512)
    guidance_scales: tuple[float, ...] = option(
        (4.5,), help="online: scales that drive the trajectories.", min=1
    )
    device: str = option("auto", help=DEVICE_HELP)


def run_reflect(options: ReflectOptions) -> None:
    """Train a weak head on collected trajectories; a killed run resumes."""
    from core2_sampler.info import pick_device

    if options.online == (options.data is not None):
        raise ConfigError("either --data FOLDER or --online must be given, and not both")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("reflect runs in one process, got several: leave `accelerate launch` out")
    check_folder(options.output)
    if options.rounds and options.online:
        raise ConfigError(f"rounds are for --data, which they add to, got {options.rounds} online")
    scales, collected_from = _collected(options)
    head_options = adapter_options(options, scales) | _learned_gap(options)
    if isinstance(collected_from, StockModel) and options.rounds:
        raise ConfigError(
            f"rounds are for models of ours, got a {collected_from.pipeline}: run `core2 collect "
            "--round` yourself"
        )
    if isinstance(collected_from, StockModel):
        name, prepare = collected_from.model, _prepare_stock(options, collected_from)
    else:
        model = find_model(options.model or collected_from)
        name, prepare = model.name, _prepare_own(options, model)
    with user_input():
        device = pick_device(options.device)
    _reflect(options, name, prepare(device), head_options)


def _collected(options: ReflectOptions) -> tuple[list[float], str | StockModel]:
    """Return the guidance scales of the data, and what they are from: a model of ours by name."""
    if options.data is None:
        return sorted(options.guidance_scales), "shapes-sd3"
    rounds = list(TrajectoryStore(options.data).rounds().values())
    if not rounds:
        raise ConfigError(f"data must be a folder that `core2 collect` filled, got {options.data}")
    for each in rounds:
        needed = {"model", "call", "steps"} if "pipeline" in each else {"model"}
        if missing := needed - each.keys():
            raise ConfigError(
                "data must tell its model and call, as `core2 collect` does, got a round without "
                f"{', '.join(sorted(missing))} in {options.data}, collected in Python: train it "
                "there, by reflect(head, store.source(...), ReflectConfig(...), denoiser="
                "replay(...)), see docs/howto/train-a-head.md"
            )
    scales = sorted({scale for each in rounds for scale in each["guidance_scales"]})
    models = sorted({each["model"] for each in rounds})
    if len(models) > 1 or options.model not in (None, models[0]):
        raise ConfigError(
            f"data and head must be of one model, got {', '.join(models)} in the data"
        )
    stock = [StockModel.of_round(each) for each in rounds if "pipeline" in each]
    if stock and not all(each == stock[0] for each in stock) or 0 < len(stock) < len(rounds):
        raise ConfigError(
            "the rounds of the data must be of one pipeline and one call, got others in "
            f"{options.data}"
        )
    return scales, stock[0] if stock else models[0]


def _learned_gap(options: ReflectOptions) -> dict[str, float]:
    """Return ``weak_guidance`` of the data, if it was collected with one."""
    if options.data is None:
        return {}
    told = [each.get("weak_guidance") for each in TrajectoryStore(options.data).rounds().values()]
    if len(set(told)) > 1:
        raise ConfigError(f"the rounds of the data must be of one gap, got weak_guidance {told}")
    return {} if told[0] is None else {"weak_guidance": told[0]}


def adapter_options(options: ReflectOptions, scales: list[float]) -> dict[str, Any]:
    """Return the constructor arguments of the head that do not follow from the denoiser.

    Args:
        options: as given.
        scales: guidance scales of the data.

    Raises:
        ConfigError: if an option of one kind of head is given for another.
    """
    given = {
        name: getattr(options, name)
        for name in ("rank", "reference_scale", "scale_range")
        if getattr(options, name) is not None
    }
    if options.head != "adapter":
        if given:
            raise ConfigError(
                f"{min(given)} is an option of the adapter, got head {options.head!r}"
            )
        return {}
    low, high = given.setdefault("scale_range", (scales[0], scales[-1]))[:2]
    if len(given["scale_range"]) != 2 or not 1 < low <= high:
        raise ConfigError(
            f"scale_range must be two rising scales above 1, got {given['scale_range']}"
        )
    if given.setdefault("reference_scale", high) <= 1:
        raise ConfigError(f"reference_scale must be above 1, got {given['reference_scale']}")
    return given


def _prepare_own(options: ReflectOptions, model: ModelFiles) -> Prepare:
    """Return what loads one of our pipelines, where further rounds have a first one."""
    rounds = {} if options.data is None else TrajectoryStore(options.data).rounds()
    if options.rounds and 0 not in rounds:
        raise ConfigError(
            f"rounds must go on from round 0, got only {list(rounds)} in {options.data}: leave "
            "--rounds out, or collect round 0 there"
        )

    for n in range(1, options.rounds + 1):
        driver = str(_round_folder(options, n - 1))
        if n in rounds and rounds[n].get("head") != driver:
            raise ConfigError(
                f"round {n} of {options.data} must be driven by {driver}, got {rounds[n]['head']}: "
                "take a store that has round 0 alone"
            )

    def prepare(device: str) -> dict[str, Any]:
        from core2_sampler.cli.loading import load_model, sampling_setup

        pipe = load_model(model, device, "fp32")
        tokens, steps, weak = options.max_sequence_length, options.sampling_steps, None
        if rounds:  # a further round is collected as the first
            first = rounds[min(rounds)]
            tokens, steps = first["max_sequence_length"], len(first["sigmas"]) - 1
            weak = first.get("weak_guidance")
        tokens = model.check_tokens(tokens)
        about = model_facts(model, tokens, weak)
        if options.data is not None:
            check_weights(options.data, about["weights"])
        return {**sampling_setup(pipe, steps, tokens, weak), "about": about}

    return prepare


def _prepare_stock(options: ReflectOptions, stock: StockModel) -> Prepare:
    """Return what loads a stock pipeline, and learns how it calls its network."""

    def prepare(device: str) -> dict[str, Any]:
        from core2_sampler.attachment.checks import check_kind
        from core2_sampler.attachment.collecting import replay
        from core2_sampler.attachment.networks import find_networks
        from core2_sampler.weak_heads import HEADS

        store = TrajectoryStore(cast(Path, options.data))
        records = store.records()
        if not records:
            raise ConfigError(f"data must hold trajectories, got none in {options.data}")
        pipe = stock.load(device, "fp32")
        with user_input():
            check_kind(HEADS.get(options.head), find_networks(pipe)[0])
            weights = model_weights(stock.model, model_source(stock.model))
            check_weights(cast(Path, options.data), weights)
            first = next(iter(records.values()))
            return {"denoiser": replay(pipe, stock.arguments(), first, store)}

    return prepare


def _reflect(
    options: ReflectOptions, model: str, setup: dict[str, Any], head_options: dict[str, Any]
) -> None:
    """Train the head in what was loaded, round by round, save it with its card."""
    from core2_sampler.weak_heads import load_head

    with user_input():
        for round in range(options.rounds):
            folder = _round_folder(options, round)
            _train(options, model, setup, head_options, folder, folder, last_round=round)
            head = load_head(folder).to(setup["denoiser"].module.device)
            _collect_round(options, setup, head, round + 1, str(folder))
        _train(options, model, setup, head_options, options.output, _run_folder(options))


def _run_folder(options: ReflectOptions) -> Path:
    """Return where the training keeps its checkpoint."""
    return options.output.with_name(options.output.name + ".run")


def _round_folder(options: ReflectOptions, round: int) -> Path:
    """Return where the head that drives the next round is saved."""
    return _run_folder(options) / f"round-{round}"


def _train(
    options: ReflectOptions,
    model: str,
    setup: dict[str, Any],
    head_options: dict[str, Any],
    output: Path,
    run: Path,
    last_round: int | None = None,
) -> None:
    """Train a head on the data, up to ``last_round``, and save it with its card."""
    from core2_sampler.reflect import reflect
    from core2_sampler.weak_heads import HEADS
    from core2_sampler.weak_heads.card import save_head

    head = HEADS.get(options.head).for_denoiser(setup["denoiser"], **head_options)
    report = reflect(
        head,
        _source(options, setup, last_round),
        options.training,
        denoiser=setup["denoiser"],
        folder=run,
        log=print,
    )
    card = save_head(head, output, report, model=model)
    print(f"{output}: {head.num_parameters()} parameters, card in {card}")


def _collect_round(
    options: ReflectOptions, setup: dict[str, Any], head: Any, round: int, name: str
) -> None:
    """Let the head drive the trajectories of the data's first round, and keep what CFG says."""
    from core2_sampler.collect import CollectConfig, Job, collect

    store = TrajectoryStore(cast(Path, options.data))
    first = store.settings(0)
    kept = {key: first[key] for key in ("steps_per_trajectory", "features")}
    config = CollectConfig(tuple(first["guidance_scales"]), round=round, **kept)
    jobs = [
        Job(record.prompt, record.prompt_id, record.seed)
        for key, record in store.records().items()
        if key.round == 0
    ]
    given = setup | {"about": setup["about"] | {"head": name}}
    added = collect(jobs=jobs, store=store, config=config, policy=head, **given)
    print(f"round {round}: added {added} trajectories to {options.data}")


def _source(options: ReflectOptions, setup: dict[str, Any], last_round: int | None) -> RowSource:
    from core2_sampler.collect import CollectConfig
    from core2_sampler.online_source import OnlineSource

    share = options.held_out_share
    if options.data is not None:
        return TrajectoryStore(options.data).source(share, last_round=last_round)
    return OnlineSource(
        prompts=read_prompts(options.prompts, options.num_prompts, seed=0),
        config=CollectConfig(guidance_scales=options.guidance_scales),
        held_out_share=share,
        **setup,
    )


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
add_command(app, "reflect", ReflectOptions, run_reflect)
