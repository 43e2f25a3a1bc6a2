"""What `core2 info` and every record say of this machine. Truth: the packages themselves."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

import core2_sampler
from core2_sampler.info import attention_backends, describe_device, pick_device, versions


def test_versions_are_those_of_the_packages():
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["core2_sampler"] == core2_sampler.__version__
    assert found["diffusers"] == diffusers.__version__
    assert found["torch"] == torch.__version__


def test_a_device_that_is_here_is_taken():
    assert pick_device("cpu") == "cpu"
    assert torch.empty(0, device=pick_device()).numel() == 0
    assert describe_device("cpu") == f"cpu ({torch.get_num_threads()} threads)"


@pytest.mark.parametrize("name", ["cuda:99", "gpu", ""])
def test_a_device_that_is_not_here_is_refused(name: str):
    with pytest.raises(ValueError, match="device must be one of this machine, got"):
        pick_device(name)


def test_the_native_attention_is_always_there():
    assert "native" in attention_backends()


def run_info(path: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "core2_sampler", "info"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "200"},
        timeout=120,
    )


def test_info_shows_versions_device_and_models():
    done = run_info()
    assert done.returncode == 0, done.stderr
    for text in (torch.__version__, "device", "attention", "native", "shapes-sd3"):
        assert text in done.stdout


def test_info_names_a_torchvision_that_does_not_fit(tmp_path: Path):
    # what a torchvision of another torch says on import
    fake = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    (tmp_path / "torchvision.py").write_text(fake)
    done = run_info(str(tmp_path))
    assert done.returncode == 2
    assert "torchvision must be built for the torch beside it" in done.stderr
    assert "torchvision::nms" in done.stderr
    assert done.stderr.count("\n") == 1
