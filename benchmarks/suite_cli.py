"""The commands of ``core2 bench`` that serve every suite: what they check and run."""

from __future__ import annotations

from typing import Any

from core2_sampler.benchmarks.exchange_options import (
    ExportConfig,
    ImportConfig,
    ImportImagesConfig,
)
from core2_sampler.benchmarks.judges import GENEVAL, check_judge, default_judges, load_geneval
from core2_sampler.benchmarks.options import (
    CalibrateConfig,
    DoctorConfig,
    GenerateConfig,
    ReportConfig,
    RunConfig,
    ScoreConfig,
    command_line,
)
from core2_sampler.benchmarks.request import check_request, check_scorers
from core2_sampler.benchmarks.scorers.base import need
from core2_sampler.config import ConfigError, check_folder, user_input


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
    """Generate, score and report: the three commands below in one."""
    check_scorers(config.judging.scorers or ())
    own = config.generate
    if own.shard != "0/1":
        raise ConfigError(
            f"shard is for `core2 bench generate`, got {own.shard}: score and report when all "
            "shares are there"
        )
    request = check_request(own)
    if not config.judging.scorers:
        tasks = [prompt.task for prompt in request.prompts]
        with user_input():
            judges = default_judges(request.suite, tasks, [own.preset] if own.preset else [])
        check_scorers(judges)
    need("the report", "matplotlib")

    from core2_sampler.benchmarks.stages import generate_suite, score_runs

    run = generate_suite(own, request, command_line(config))
    if run is None:
        return
    score_runs(own.out, [run], config.judging, own.preset)
    bench_report(ReportConfig(out=own.out))


def bench_export(config: ExportConfig) -> None:
    """Copy images to the file names that an official evaluator reads."""
    from core2_sampler.benchmarks.export import export
    from core2_sampler.benchmarks.runs import read_runs

    with user_input():
        for folder, count in export(config.out, read_runs(config.out), config.layout, config.to):
            print(f"{count} images in {folder}")


def bench_import_images(config: ImportImagesConfig) -> None:
    """Take in images that were made elsewhere, as an arm of a run; nothing is taken twice."""
    from core2_sampler.benchmarks.importing import import_images

    with user_input():
        run, made = import_images(config)
    print(f"{made} images imported as {config.arm} of {run.name} in {config.out}")


def bench_import(config: ImportConfig) -> None:
    """Take in the verdicts of GenEval's own evaluator on an exported folder."""
    from core2_sampler.benchmarks.geneval.aggregate import summarize
    from core2_sampler.benchmarks.official import import_results
    from core2_sampler.benchmarks.runs import read_runs

    with user_input():
        rows, replaced = import_results(
            config.out, read_runs(config.out), config.results, config.images
        )
        found = summarize(rows)
    tasks = ", ".join(f"{task} {100 * each.score:.1f}" for task, each in found.tasks.items())
    print(f"{found.images} verdicts imported" + (f", {replaced} replaced" if replaced else ""))
    print(f"official overall {100 * found.overall:.1f} % (mean of the tasks: {tasks})")
    print(f"prompts with a correct image: {100 * found.correct_prompts:.1f} % of {found.prompts}")


def bench_calibrate(config: CalibrateConfig) -> None:
    """Compare GenEval's judge with the human labels that GenEval published."""
    from core2_sampler.benchmarks.calibration import (
        agreement_table,
        calibrate_judge,
        labelled_samples,
    )
    from core2_sampler.benchmarks.geneval.calibrate import read_labels
    from core2_sampler.benchmarks.report_render import markdown_lines
    from core2_sampler.benchmarks.suites import load
    from core2_sampler.info import pick_device
    from core2_sampler.progress import hide_loading, progress_bar

    check_folder(config.out, "out")
    hide_loading()
    with user_input():
        check_judge(GENEVAL, config.detector)
        device = pick_device(config.judge_device)
        labels = read_labels(config.labels)
        samples = labelled_samples(labels, load("geneval", config.source), config.images)
        judge = load_geneval(config.detector, device)
        with progress_bar("images judged", len(samples)) as bar:
            found = calibrate_judge(
                judge, samples, labels, config.labels.stem, config.out, on_image=bar.set
            )
    print(judge.name, markdown_lines(agreement_table(found)), sep="\n\n")


def bench_doctor(config: DoctorConfig) -> None:
    """Say what of this installation would change a score; exit with 1 if anything would."""
    from core2_sampler.benchmarks.doctor import examine
    from core2_sampler.progress import hide_loading

    hide_loading()
    words = {True: "ok", False: "WRONG", None: "not checked"}
    checks = examine()
    for check in checks:
        print(f"{words[check.ok]:<12} {check.name}: {check.means}")
    if any(check.ok is False for check in checks):
        raise SystemExit(1)


COMMANDS: dict[str, tuple[type[Any], Any]] = {
    "run": (RunConfig, bench_run),
    "generate": (GenerateConfig, bench_generate),
    "score": (ScoreConfig, bench_score),
    "report": (ReportConfig, bench_report),
    "export": (ExportConfig, bench_export),
    "import-images": (ImportImagesConfig, bench_import_images),
    "import": (ImportConfig, bench_import),
    "calibrate-geneval": (CalibrateConfig, bench_calibrate),
    "doctor": (DoctorConfig, bench_doctor),
}
"""Name of each command, the dataclass of its options, and the function that takes it."""
