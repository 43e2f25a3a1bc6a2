"""What ``.ci/run`` copies: the working tree as it stands. Truth: the files that are there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.checkout
SCRIPT = Path(__file__).parents[2] / ".ci/run"


def test_the_working_tree_is_copied_as_it_stands(tmp_path: Path):
    """Changed and new files go along; deleted and ignored ones do not."""
    tree, work = tmp_path / "tree", tmp_path / "work"
    tree.mkdir()
    work.mkdir()
    subprocess.run(["git", "init", "--quiet", tree], check=True)
    for name in ("kept", "changed", "deleted one", "staged"):
        (tree / name).write_text("old")
    (tree / ".gitignore").write_text("ignored\n")
    subprocess.run(["git", "-C", tree, "add", "."], check=True)
    (tree / "changed").write_text("new")
    (tree / "deleted one").unlink()
    subprocess.run(["git", "-C", tree, "rm", "--quiet", "--force", "staged"], check=True)
    for name in ("ignored", "untracked"):
        (tree / name).write_text("new")

    step = SCRIPT.read_text(encoding="utf-8").partition('step "copy the working tree"\n')[2]
    copy = "set -euo pipefail\n" + step.partition('cd "$work/checkout"')[0]
    subprocess.run(
        ["bash", "-c", copy], cwd=tree, env={**os.environ, "work": str(work)}, check=True
    )
    copied = {path.name: path.read_text() for path in (work / "checkout").iterdir()}
    assert copied == {
        ".gitignore": "ignored\n",
        "kept": "old",
        "changed": "new",
        "untracked": "new",
    }
