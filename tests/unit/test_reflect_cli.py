"""``core2 reflect`` on stores that are not as ``core2 collect`` makes them."""

from __future__ import annotations

import pytest

from core2_sampler.cli.reflect import ReflectOptions, run_reflect
from core2_sampler.config import ConfigError, load_config
from core2_sampler.trajectory import TrajectoryStore

IN_PYTHON = {"sigmas": [1.0, 0.0], "policy": "cfg", "guidance_scales": [3.0]}
STOCK = {**IN_PYTHON, "pipeline": "StableDiffusionPipeline"}


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        (IN_PYTHON, "model"),
        (STOCK, "call, model, steps"),
        ({**STOCK, "model": "shapes-sd3"}, "call, steps"),
    ],
)
def test_a_store_that_was_collected_in_python_is_to_be_trained_there(tmp_path, settings, missing):
    store = TrajectoryStore(tmp_path / "data")
    store.pin_settings(0, settings)
    given = {"output": tmp_path / "head", "data": store.root, "steps": 1, "device": "cpu"}
    with pytest.raises(ConfigError, match=f"a round without {missing} in .* reflect\\(head"):
        run_reflect(load_config(ReflectOptions, given=given))
