"""The stages of ``core2 bench``: generate what was asked for, score what is there."""

from __future__ import annotations

import dataclasses
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from core2_sampler.benchmarks.embedded_guidance import check_embeds
from core2_sampler.benchmarks.generate import Outcome, fill_arm
from core2_sampler.benchmarks.judges import (
    default_judges,
    load_judge,
    without_judge,
)
from core2_sampler.benchmarks.matching import is_plain, match
from core2_sampler.benchmarks.options import GenerateConfig, Judging
from core2_sampler.benchmarks.report import provenance
from core2_sampler.benchmarks.request import Request, check_scorers
from core2_sampler.benchmarks.runner import check_arm, cut_prompts, shared_key
from core2_sampler.benchmarks.runs import Run, RunArm, read_runs, write_run
from core2_sampler.benchmarks.scores import open_scores, score_tasks, tasks_of
from core2_sampler.benchmarks.shard import Shard
from core2_sampler.benchmarks.study import Study
from core2_sampler.config import user_input
from core2_sampler.info import environment, pick_device
from core2_sampler.pipelines.auto import load_pipeline
from core2_sampler.precision import DTYPES, pick_dtype
from core2_sampler.progress import hide_loading, progress_bar
from core2_sampler.registry import unknown_name


def generate_suite(config: GenerateConfig, request: Request, command: str) -> Run | None:
    """Load the model, generate this process's share and write down what is there.

    Returns:
        What the folder then holds; None in all processes but the first.

    Raises:
        ConfigError: if an arm's head does not fit the model, or there is no such device.
    """
    with user_input():
        device = pick_device(config.device)
    state = PartialState(cpu=device == "cpu")
    if device == "cuda":
        device = str(state.device)  # one GPU for each process
    with user_input():
        study = _open_study(config, request, device)
        for arm, _, _ in request.arms:
            check_arm(study, arm)
        if request.ga_eval_mode == "embedded" and config.ga_eval:
            check_embeds(study.pipe.transformer)
    shard = Shard.parse(config.shard).split(state.process_index, state.num_processes)
    entries, done = _fill_arms(config, request, study, shard, command, state.is_main_process)
    settings = run_settings(study, config.model)
    run = Run(request.suite, request.prompts, request.seeds, settings, tuple(entries))
    run = write_run(config.out, run, [each.made for each in done], shard.index)
    print(_outcome(config, shard, done))
    state.wait_for_everyone()
    main = state.is_main_process
    state.destroy_process_group()
    return run if main else None


def _outcome(config: GenerateConfig, shard: Shard, done: Sequence[Outcome]) -> str:
    """Say what a process made, and why not all of it."""
    made, failed = sum(each.made for each in done), sum(each.failed for each in done)
    process = f"process {shard.index}/{shard.total}: " if shard.total > 1 else ""
    text = f"{process}{made} images generated in {config.out}"
    if not failed:
        return text
    first = next(each.error for each in done if each.failed)
    return f"{text}, {failed} failed, the first with {first}; the same command tries them again"


def _fill_arms(
    config: GenerateConfig,
    request: Request,
    study: Study,
    shard: Shard,
    command: str,
    shown: bool,
) -> tuple[list[RunArm], list[Outcome]]:
    """Generate a shard of every arm, and of the CFG arms that GA-Eval sets beside methods.

    Raises:
        ConfigError: if an arm's effective scale cannot be measured.
    """
    shared = len(shard.of(study.cases))
    about = _provenance(config, request, study)
    entries: list[RunArm] = []
    done: list[Outcome] = []
    queue = deque(request.arms)
    with progress_bar("images", shared * len(queue), shown) as bar:
        while queue:
            arm, n, scale = queue.popleft()
            outcome = fill_arm(study, arm, shard, on_images=bar.advance)
            folder = str(outcome.folder.relative_to(config.out))
            entry = RunArm(arm, n, scale, folder, command, about)
            if config.ga_eval and arm.guidance_scale > 1 and not is_plain(arm):
                with user_input():
                    found = match(
                        study,
                        arm,
                        outcome.folder,
                        config.ga_eval,
                        shard.index,
                        request.ga_eval_mode,
                    )
                    queue.append((found.arm(arm), n, scale))
                bar.add(shared)
                entry = dataclasses.replace(
                    entry,
                    effective_scale=found.effective_scale,
                    orthogonal_share=found.orthogonal_share,
                    measured_on=found.measured_on,
                    measured_by=found.mode,
                )
            entries.append(entry)
            done.append(outcome)
    return entries, done


def _open_study(config: GenerateConfig, request: Request, device: str) -> Study:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    hide_loading()
    dtype = pick_dtype(config.dtype, device)
    return Study(
        pipe=load_pipeline(request.model.source, dtype=DTYPES[dtype]).to(device),
        family=request.model.family,
        prompts=request.prompts,
        seeds=request.seeds,
        folder=config.out / "images",
        batch_size=config.batch_size,
        dtype=dtype,
        autocast=False,
        max_sequence_length=request.model.check_tokens(config.max_sequence_length),
    )


def run_settings(study: Study, name: str) -> dict[str, Any]:
    """Return what all arms share, so that images of two models of one name are two runs."""
    shared = shared_key(study)
    return {**shared, "model": name, "weights": shared["model"], "family": study.family}


def _provenance(config: GenerateConfig, request: Request, study: Study) -> dict[str, Any]:
    """Return where the images of a request come from."""
    settings = run_settings(study, config.model) | {"device": str(study.pipe.device)}
    settings.pop("libraries")  # among the versions
    about = provenance(**settings, seeds=list(request.seeds))
    if cut := cut_prompts(study):
        about |= {"cut prompts": f"{cut} of {len(study.prompts)}, longer than a text encoder reads"}
    if config.preset is not None:
        about |= {"preset": config.preset, "deviations": list(request.deviations)}
    if config.skip_nsfw:
        about |= {"left out": "prompts that are not safe for work"}
    return about


def chosen_runs(out: Path, suites: Sequence[str] | None) -> list[Run]:
    """Return the runs of some suites, or all.

    Raises:
        ValueError: if there is none, or a suite was not generated.
    """
    runs = read_runs(out)
    for suite in suites or ():
        if suite not in {run.suite for run in runs}:
            raise unknown_name("suite in this folder", suite, {run.suite for run in runs})
    return [run for run in runs if suites is None or run.suite in suites]


def declared_judges(run: Run, preset: str | None) -> list[str]:
    """Return the judges of a run's presets, or those that its suite declares."""
    names = {entry.provenance.get("preset"): None for entry in run.arms}
    presets = [name for name in ([preset] if preset else names) if name is not None]
    with user_input():
        return default_judges(run.suite, [prompt.task for prompt in run.prompts], presets)


def score_runs(out: Path, runs: Sequence[Run], judging: Judging, preset: str | None = None) -> None:
    """Score runs with the given judges, one judge in memory at a time.

    Args:
        out: folder of the results.
        runs: what to score.
        judging: the judges; without any, the preset's, or those that each suite declares.
        preset: name of the preset; by default those that each run was generated with.

    Raises:
        ConfigError: if a judge does not exist, cannot be had, or cannot judge these prompts.
    """
    wanted: dict[str, list[Run]] = {}
    for run in runs:
        for spec in judging.scorers or declared_judges(run, preset):
            wanted.setdefault(spec, []).append(run)
    check_scorers(list(wanted))
    hide_loading()
    for run in runs:
        if warning := without_judge(run.suite, [prompt.task for prompt in run.prompts]):
            print(f"warning: {warning}", file=sys.stderr)
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    with user_input():
        device = pick_device(judging.judge_device)
        for spec, own in wanted.items():
            prompts = [prompt.text for run in own for prompt in run.prompts]
            judge = load_judge(
                spec, prompts, out / "tiny", device=device, dtype=dtypes[judging.judge_dtype]
            )
            tasks = tasks_of(out, own, judge.name)
            with progress_bar(judge.name, len(tasks)) as bar:
                count = score_tasks(
                    tasks,
                    judge,
                    open_scores(out, judge, environment(device)),
                    batch_size=judging.judge_batch_size,
                    on_images=bar.advance,
                )
            print(f"{judge.name}: {count} images scored, {len(tasks) - count} were known")
            del judge
