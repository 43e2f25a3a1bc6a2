"""Forward hooks on networks that ``torch.compile`` may have compiled already."""

from __future__ import annotations

import sys
from typing import Any


def notice_hooks() -> None:
    """Make compiled networks notice forward hooks; call it before one is put on a denoiser.

    By default dynamo does not look for hooks again once a network is compiled, so those added later
    would silently never run. Where networks may have been compiled under that default, they are
    compiled anew at their next call. A process that never compiles does not pay for the import.
    """
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.config.skip_nnmodule_hook_guards:
        dynamo.config.skip_nnmodule_hook_guards = False
        dynamo.reset()
