"""Benchmarks: arms, paired studies, statistics and reports."""

if __name__ == "benchmarks":  # pragma: no cover
    raise ImportError("import core2_sampler.benchmarks, not the folder by its bare name")
