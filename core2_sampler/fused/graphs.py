"""CUDA graphs of the hot steps: one a kind and shape, in one memory pool, oldest shape first out.

A graph is replayed for any plan, scale, noise schedule and prompt of its shape, as all of these lie
in buffers. An in-model head alone has its guidance scale inside the graph, so it has one a scale.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from core2_sampler.fused.hot import Hot, step_of
from core2_sampler.fused.moves import Move, moves_of
from core2_sampler.fused.run import run_eagerly
from core2_sampler.steps import Plan

logger = logging.getLogger(__name__)

Replay = Callable[[], None]

Capture = Callable[[Callable[[], None], Callable[[], None]], Replay]
"""``replay = capture(step, restore)``: record a step; ``restore`` undoes what warm-ups changed."""

_WARM_UPS = 3


class CudaCapture:
    """Record steps as CUDA graphs that share one memory pool."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[Any, torch.cuda.Stream]] = {}

    def __call__(self, step: Callable[[], None], restore: Callable[[], None]) -> Replay:
        """Return the replay of a step; it is warmed up on a side stream, and not run by this.

        Raises:
            RuntimeError: something in the step cannot be captured.
        """
        here = torch.cuda.current_stream()
        # torch's own stream for captures is on whichever device was current first.
        if here.device_index not in self._places:
            place = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            self._places[here.device_index] = place
        pool, side = self._places[here.device_index]
        side.wait_stream(here)
        with torch.cuda.stream(here):  # a capture that fails leaves its own stream current
            with torch.cuda.stream(side):
                try:
                    for _ in range(_WARM_UPS - 1):
                        step()
                        restore()
                    with _no_waits():
                        step()
                    restore()
                finally:
                    here.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=side):
                step()
        return graph.replay


@contextmanager
def _no_waits() -> Iterator[None]:
    """Let what waits for the device raise, before it can spoil a capture."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@dataclass(slots=True, eq=False)
class Shape:
    """The buffers of one shape, the graphs that work on them, and what could not be captured."""

    hot: Hot
    replays: dict[Hashable, Replay] = field(default_factory=dict)
    eager: set[Hashable] = field(default_factory=set)


class Graphs:
    """The captured shapes of one pipeline.

    Args:
        capacity: shapes to keep; the least recently used one goes first.
        capture: how a step is recorded.
        device_type: where steps can be recorded; elsewhere they run eagerly.

    Attributes:
        replays: steps that were replays, over all runs.
    """

    def __init__(
        self, capacity: int = 4, capture: Capture | None = None, device_type: str = "cuda"
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self._capacity = capacity
        self._capture = CudaCapture() if capture is None else capture
        self.device_type = device_type
        self._shapes: OrderedDict[Hashable, Shape] = OrderedDict()
        self._logged: set[str] = set()
        self.replays = 0

    def __len__(self) -> int:
        """Return the number of shapes held."""
        return len(self._shapes)

    def shape(self, key: Hashable, make: Callable[[], Hot]) -> Shape:
        """Return the shape of a key, made if it is not there.

        Args:
            key: of `core2_sampler.fused.keys.shape_key`.
            make: makes its `Hot`.
        """
        if key not in self._shapes:
            while len(self._shapes) >= self._capacity:
                self._shapes.popitem(last=False)
            self._shapes[key] = Shape(make())
        self._shapes.move_to_end(key)
        return self._shapes[key]

    @contextmanager
    def launcher(self, shape: Shape, plan: Plan) -> Iterator[Callable[[Hot, Move], None]]:
        """Give the ``launch`` of a run; hooks are on the denoiser only while a graph is missing."""
        picks = shape.hot.online is not None
        keys = {_graph_key(shape.hot, move) for move in moves_of(plan, picks)}
        hooks: AbstractContextManager[None] = (
            nullcontext() if keys <= shape.replays.keys() else shape.hot.hooked()
        )

        def launch(hot: Hot, move: Move) -> None:
            key = _graph_key(hot, move)
            if key not in shape.replays and key not in shape.eager:
                self._record(shape, key, move)
            if key in shape.eager:
                run_eagerly(hot, move)
            else:
                shape.replays[key]()
                self.replays += 1

        with hooks:
            yield launch

    def _record(self, shape: Shape, key: Hashable, move: Move) -> None:
        """Capture a step and leave the run as it was; one log line if it cannot be captured."""
        restore, step = shape.hot.keep(), step_of(move)
        try:
            replay = self._capture(lambda: step(shape.hot), restore)
            shape.replays[key] = replay
        except RuntimeError as error:
            shape.eager.add(key)
            reason = str(error).splitlines()[0]
            self.explain(f"a {move.step.kind} step cannot be captured ({reason})")
        finally:
            restore()

    def explain(self, reason: str) -> None:
        """Log once why steps run eagerly."""
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning("CUDA graphs are not used: %s", reason)


def _graph_key(hot: Hot, move: Move) -> Hashable:
    step = move.step
    inside = hot.head is not None and hot.head.in_model and step.kind in ("fast", "slow")
    scale = step.guidance_scale if inside else None
    return step.kind, move.picks, scale, move.keeps, move.push is None
