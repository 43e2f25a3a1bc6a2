"""Benchmarks: arms, paired studies, statistics and reports (imported as core2_sampler.benchmarks)."""

if __name__ == "benchmarks":  # pragma: no cover
    raise ImportError("import core2_sampler.benchmarks, not the bare folder name")
