"""Fetch a file that the project may not ship: from a folder, the Hugging Face hub or the web."""

from __future__ import annotations

import hashlib
import re
import urllib.error
import urllib.request
from pathlib import Path

from core2_sampler.atomic import write_atomic
from core2_sampler.benchmarks.cache import digest

_HUB = re.compile(r"hf:(datasets/)?([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)")
_TIMEOUT = 60  # seconds without an answer


def fetch(address: str | Path, sha256: str | None = None) -> Path:
    """Return the local path of a file, downloaded on first use.

    Args:
        address: a path, ``hf:[datasets/]owner/name[@revision]/file``, or an ``https://`` address.
        sha256: hex digest that the file must have; None accepts any.

    Raises:
        ValueError: if there is no such file, it cannot be reached, or it has another digest.
    """
    text = str(address)
    if match := _HUB.fullmatch(text):
        path = _from_hub(text, *match.groups())
    elif text.startswith("https://"):
        path = _from_web(text)
    else:
        path = Path(address).expanduser()
    if not path.is_file():
        raise ValueError(f"a file must be there to be read, got {path}: check the path")
    if sha256 is not None and (found := _sha256(path)) != sha256:
        raise ValueError(
            f"{path} must have the sha256 {sha256}, got {found}: delete it to fetch it again"
        )
    return path


def unreachable(what: str, error: Exception) -> ValueError:
    """Return the error for something that is not here and cannot be downloaded either."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(
        f"{what} must be reachable or in the local cache ({reason}): go online once, or give the "
        "path of your own copy as the source"
    )


def _from_hub(address: str, kind: str | None, repo: str, revision: str | None, file: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    repo_type = "dataset" if kind else "model"
    try:
        return Path(hf_hub_download(repo, file, repo_type=repo_type, revision=revision))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise unreachable(address, error) from error


def _from_web(address: str) -> Path:
    from huggingface_hub import constants

    name = address.rsplit("/", 1)[-1]
    path = Path(constants.HF_HOME) / "core2_sampler" / digest(address) / name
    if path.is_file():
        return path
    if constants.HF_HUB_OFFLINE:
        raise unreachable(address, OSError("HF_HUB_OFFLINE is set"))
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT) as answer:
            write_atomic(path, answer.read())
    except (urllib.error.URLError, TimeoutError) as error:
        raise unreachable(address, error) from error
    return path


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
