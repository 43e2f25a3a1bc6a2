"""The embedded world: 64x64 images of coloured shapes, their captions, a judge and small models."""

from __future__ import annotations

from pathlib import Path

MODELS = Path(__file__).parent / "models"


def model_path(name: str) -> Path:
    """Return the folder of a shipped model, such as ``sd3`` (a stock ``from_pretrained`` folder).

    Raises:
        ValueError: if this installation holds no such model.
    """
    shipped = sorted({file.parent.name for file in MODELS.glob("*/*.json")})
    if name not in shipped:
        known = ", ".join(shipped) or "none shipped"
        raise ValueError(f"model must be one of {known}, got {name!r}")
    return MODELS / name
