"""Put trained Shapes models into an installation, with their heads inside."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from core2_sampler.shapes.sharing import share


def ship(folder: Path, head: Path | None, models: Path) -> list[str]:
    """Put a trained model beside the shipped ones; what they have in common is kept once.

    Args:
        folder: a pipeline's, or that of the CLIP pair.
        head: folder of the pipeline's weak head.
        models: folder of the shipped models; it is replaced as a whole, or left as it was.

    Returns:
        What was done, in lines.

    Raises:
        ValueError: if there is neither, or the head does not fit the pipeline or the pair.
        OSError: if a config is not JSON.
    """
    if not _is_pipeline(folder) and not _is_clip(folder):
        raise ValueError(f"folder must hold a pipeline or the CLIP pair, got {folder}")
    if head is not None and not _is_pipeline(folder):
        raise ValueError(f"head must be left out with the CLIP pair, got {head}")
    with tempfile.TemporaryDirectory(dir=models.parent) as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        shutil.copytree(models, new)  # follows links: a change of one model never reaches another
        name = _put_pipeline(folder, head, new) if _is_pipeline(folder) else _put_clip(folder, new)
        share(new)
        models.rename(old)
        new.rename(models)
    files = [path for path in models.rglob("*") if path.is_file() and not path.is_symlink()]
    total = sum(path.stat().st_size for path in files) / 1e6
    return [f"{models / name}", f"{total:.1f} MB in all shipped models"]


def _is_pipeline(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def _is_clip(folder: Path) -> bool:
    from transformers import CLIPConfig

    if not (folder / "config.json").is_file():
        return False
    return CLIPConfig.get_config_dict(folder)[0].get("model_type") == "clip"


def _put_clip(folder: Path, models: Path) -> str:
    shutil.rmtree(models / "clip", ignore_errors=True)
    shutil.copytree(folder, models / "clip")
    return "clip"


def _put_pipeline(folder: Path, head: Path | None, models: Path) -> str:
    from core2_sampler import CoRe2Pipeline
    from core2_sampler.model_files import find_model
    from core2_sampler.progress import hide_loading
    from core2_sampler.shapes.train import save_half
    from core2_sampler.weak_heads import load_head

    hide_loading()
    family = find_model(str(folder)).family
    pipeline = CoRe2Pipeline.from_pretrained(folder, weak_head=load_head(head) if head else None)
    shutil.rmtree(models / family, ignore_errors=True)
    save_half(pipeline, models / family)
    for card in head.glob("card.*") if head else ():
        shutil.copy(card, models / family / "weak_head")
    return family
