"""The bars of the host libraries. Truth: what they write to stderr themselves."""

from __future__ import annotations

import diffusers
import pytest
import transformers

from core2_sampler.cli.ship import ship
from core2_sampler.testing import tiny_sd3_pipeline


@pytest.fixture
def bars():
    """Both libraries show their bars, as they do unless told otherwise."""
    logs = (diffusers.utils.logging, transformers.utils.logging)
    shown = [log.is_progress_bar_enabled() for log in logs]
    for log in logs:
        log.enable_progress_bar()
    yield
    for log, was in zip(logs, shown, strict=True):
        if not was:
            log.disable_progress_bar()


def test_a_model_is_shipped_without_bars(bars, tmp_path, capsys):
    tiny_sd3_pipeline().save_pretrained(tmp_path / "trained")
    assert "Writing model shards" in capsys.readouterr().err
    (tmp_path / "models").mkdir()
    ship(tmp_path / "trained", None, tmp_path / "models")
    assert capsys.readouterr().err == ""
    assert (tmp_path / "models/sd3/model_index.json").is_file()
