"""``core2 bench generate | score | report | run | export``: what they check and run."""

from __future__ import annotations

from typing import Any

from core2_sampler.benchmarks.options import (
    ExportConfig,
    GenerateConfig,
    ReportConfig,
    RunConfig,
    ScoreConfig,
    command_line,
)
from core2_sampler.benchmarks.request import check_request, check_scorers
from core2_sampler.config import ConfigError, user_input


def bench_generate(config: GenerateConfig) -> None:
    """Generate images of a suite in several ways; a killed run resumes, processes share the work.

    With N processes: accelerate launch --num_processes N -m core2_sampler bench generate ...
    """
    request = check_request(config)

    from core2_sampler.benchmarks.stages import generate_suite

    generate_suite(config, request, command_line(config))


def bench_score(config: ScoreConfig) -> None:
    """Score what was generated; nothing is scored twice."""
    check_scorers(config.judging.scorers or ())

    from core2_sampler.benchmarks.stages import chosen_runs, score_runs

    with user_input():
        runs = chosen_runs(config.out, config.suites)
    score_runs(config.out, runs, config.judging)


def bench_report(config: ReportConfig) -> None:
    """Write the report: Markdown, JSON, LaTeX and one HTML page."""
    from core2_sampler.benchmarks.report_page import write_report

    with user_input():
        print(write_report(config.out, config.sheet))


def bench_run(config: RunConfig) -> None:
    """Generate, score and report."""
    check_scorers(config.judging.scorers or ())
    own = config.generate
    if own.shard != "0/1":
        raise ConfigError(
            f"shard is for `core2 bench generate`, got {own.shard}: score and report when all "
            "shares are there"
        )
    request = check_request(own)

    from core2_sampler.benchmarks.stages import generate_suite, score_runs

    run = generate_suite(own, request, command_line(config))
    if run is None:
        return
    score_runs(own.out, [run], config.judging, own.preset)
    bench_report(ReportConfig(out=own.out))


def bench_export(config: ExportConfig) -> None:
    """Copy images to the file names of an official evaluator."""
    from core2_sampler.benchmarks.export import export
    from core2_sampler.benchmarks.runs import read_runs

    with user_input():
        for folder, count in export(config.out, read_runs(config.out), config.layout, config.to):
            print(f"{count} images in {folder}")


COMMANDS: dict[str, tuple[type[Any], Any]] = {
    "generate": (GenerateConfig, bench_generate),
    "score": (ScoreConfig, bench_score),
    "report": (ReportConfig, bench_report),
    "run": (RunConfig, bench_run),
    "export": (ExportConfig, bench_export),
}
"""Name of each command, the dataclass of its options, and the function that takes it."""
