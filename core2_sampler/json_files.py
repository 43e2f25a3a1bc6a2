"""JSON files of folders and of hub repositories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from core2_sampler.config import ConfigError


def read_model_json(name: str, source: str, path: str) -> dict[str, Any]:
    """Return what a JSON file of a model holds; the arguments are those of `find_file`."""
    return read_json(find_file(name, source, path, kind="diffusers model"))


def find_file(
    name: str, source: str | Path, path: str, *, kind: str, revision: str | None = None
) -> Path:
    """Return a file of a folder, or of a hub repository: from the local cache, or into it.

    Args:
        name: what the user called it.
        source: a folder, or a hub id ``owner/name``; a ``Path`` is a folder.
        path: of the file in it.
        kind: what it should be, for the error.
        revision: of the repository: a branch, tag or commit; None is the main branch.

    Raises:
        ConfigError: if there is neither folder nor repository, or no such file in it.
    """
    if Path(source).is_dir():
        file = Path(source, path)
        if not file.is_file():
            raise ConfigError(f"{name} is not a {kind}: it has no {path}")
        return file
    lack = f"a {kind} must be a folder or a hub id owner/name, got {name}, which is not there"
    if isinstance(source, Path) or source.count("/") != 1:
        raise ConfigError(lack)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        _check_reachable(name, source, path, revision)
        return Path(hf_hub_download(source, path, revision=revision))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{lack}: no such folder, and no {path} from the hub ({type(error).__name__}: {reason})"
        ) from error


def _check_reachable(name: str, source: str, path: str, revision: str | None) -> None:
    """Ask the hub once for a file that is not in the local cache; downloads ask for half a minute.

    Raises:
        ConfigError: if there is no answer.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    if isinstance(try_to_load_from_cache(source, path, revision=revision), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(source, path, revision=revision))
    except (HFValidationError, OfflineModeIsEnabled):
        return  # it is not to be asked: the download says what is wrong, at once
    except Exception as error:  # of the HTTP client, which is another in each version of the hub's
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            return  # it answered: likewise
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise ConfigError(
            f"{name} is no folder and not in the local cache, and the hub could not be reached "
            f"({reason}): connect, or give a folder"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """Return what a JSON file holds.

    Raises:
        ConfigError: if that is no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} must be a JSON file: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content
