"""Count denoiser evaluations: what a run cost, measured on the network, not by formula."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(slots=True)
class NfeCounter:
    """What a network was asked for.

    Attributes:
        calls: forward calls.
        rows: batch rows over all calls; a batched CFG pair of B samples is one call of 2B rows.
    """

    calls: int = 0
    rows: int = 0

    def per_sample(self, batch_size: int) -> int:
        """Return the evaluations of one sample (NFE).

        Args:
            batch_size: samples of the run.

        Returns:
            Rows divided by samples.

        Raises:
            ValueError: `batch_size` is below 1 or does not divide the rows counted.
        """
        if batch_size < 1 or self.rows % batch_size:
            raise ValueError(
                f"batch_size must be at least 1 and divide the {self.rows} rows counted, "
                f"got {batch_size}; pass the number of samples of the run"
            )
        return self.rows // batch_size


@contextmanager
def count_nfe(module: nn.Module) -> Iterator[NfeCounter]:
    """Count the forward passes of a network inside the context.

    Args:
        module: the denoiser network, a plain ``nn.Module`` or a diffusers model.

    Yields:
        The running counter.
    """
    counter = NfeCounter()

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        counter.calls += 1
        counter.rows += _first_tensor(output).shape[0]

    handle = module.register_forward_hook(hook)
    try:
        yield counter
    finally:
        handle.remove()


def _first_tensor(output: Any) -> Tensor:
    # A diffusers model returns a tuple or a ModelOutput; both hold the prediction at index 0.
    return output if isinstance(output, Tensor) else output[0]
