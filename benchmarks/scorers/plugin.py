"""Judges that need their own environment, run as a subprocess: JSON lines in, scores out.

The program first writes ``{"key": "..."}``, which must name its model and everything else that
changes its scores. Then, for each line ``{"id": 3, "image": "/path.png", "prompt": "..."}`` that it
reads, it writes ``{"id": 3, "score": 0.5}`` or ``{"id": 3, "error": "..."}``, in any order, and
flushes. It ends when its input ends. One process serves all batches. Whatever it writes to stderr
is shown if it fails.
"""

from __future__ import annotations

import contextlib
import json
import math
import queue
import shlex
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Self

import torch
from torch import Tensor

from core2_sampler.benchmarks.scorers.base import Images, Source, make_key, pairs

START_SECONDS = 900.0  # until the key; a judge of 7 B parameters loads meanwhile
PAIR_SECONDS = 120.0  # until the next answer
_END_SECONDS = 5.0
_SHOWN = 2000  # characters of stderr
_ENDED = ""


class PluginError(ValueError):
    """The judge's program failed; the text has the end of its stderr."""


class PluginScorer:
    """Scores with a program of the user's.

    Args:
        command: the program and its arguments.
        start_seconds: how long it may take to be ready.
        pair_seconds: how long it may take to the next score.

    Raises:
        ValueError: if there is no such program.
        PluginError: if it ends, answers something else or does not answer in time.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        start_seconds: float = START_SECONDS,
        pair_seconds: float = PAIR_SECONDS,
    ) -> None:
        self.pair_seconds = pair_seconds
        self._folder = tempfile.TemporaryDirectory(prefix="core2-plugin-")
        self._errors = open(Path(self._folder.name) / "stderr", "w+b")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            raise ValueError(
                f"a plugin must be a program that runs, got {shlex.join(command)} ({error})"
            ) from error
        self._close = weakref.finalize(self, _stop, self._process, self._errors, self._folder)
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(
            target=_read_lines, args=(self._process.stdout, self._lines), daemon=True
        ).start()
        answer = self._answer(start_seconds, "its key")
        if not isinstance(answer.get("key"), str) or not answer["key"]:
            raise self._failed(f'must begin with {{"key": "..."}}, got {answer}')
        self.key = make_key("plugin", judge=answer["key"])

    @classmethod
    def load(
        cls, source: Source = None, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Return the scorer; the program chooses device and dtype itself.

        Args:
            source: the command line.
            device: not used.
            dtype: not used.

        Raises:
            ValueError: if there is no command.
        """
        if not source:
            raise ValueError("the plugin scorer must have a command line as its source, got none")
        return cls(shlex.split(str(source)))

    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return one score a pair, as ``Scorer`` says.

        Raises:
            PluginError: see the class; the program is stopped.
        """
        rgb = pairs(images, prompts)
        scores: dict[int, float] = {}
        with tempfile.TemporaryDirectory(dir=self._folder.name) as folder:
            asked = []
            for index, (image, prompt) in enumerate(zip(rgb, prompts, strict=True)):
                path = Path(folder) / f"{index}.png"
                image.save(path)
                asked.append(json.dumps({"id": index, "image": str(path), "prompt": prompt}))
            # a thread, because a program that does not read would block here beyond any timeout
            writer = threading.Thread(target=_write_lines, args=(self._process.stdin, asked))
            writer.start()
            while len(scores) < len(rgb):
                index, value = self._score(self._answer(self.pair_seconds, "a score"))
                if index in scores or not 0 <= index < len(rgb):
                    raise self._failed(f"must answer every id once, got {index} again or unasked")
                scores[index] = value
        return torch.tensor([scores[index] for index in range(len(rgb))])

    def close(self) -> None:
        """End the program; also done when the scorer is no longer used."""
        self._close()

    def _answer(self, seconds: float, what: str) -> dict[str, Any]:
        """Return the next line of the program, parsed."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise self._failed(f"must give {what} within {seconds:g} s, got nothing") from None
        if line == _ENDED:
            self._lines.put(_ENDED)  # it stays ended
            raise self._failed(f"must give {what}, but it ended")
        try:
            answer = json.loads(line)
        except json.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict):
            raise self._failed(f"must write one JSON object a line, got {line.strip()!r}")
        return answer

    def _score(self, answer: dict[str, Any]) -> tuple[int, float]:
        index, value = answer.get("id"), answer.get("score")
        number = isinstance(value, (int, float)) and math.isfinite(value)
        if not isinstance(index, int) or not number:
            raise self._failed(f"must answer with an id and a finite score, got {answer}")
        return index, float(value)  # type: ignore[arg-type]

    def _failed(self, text: str) -> PluginError:
        """Stop the program and return the error, with the end of its stderr."""
        self._process.kill()
        code = self._process.wait()
        self._errors.seek(0)
        shown = self._errors.read().decode(errors="replace").strip()[-_SHOWN:]
        program = shlex.join(map(str, self._process.args))  # type: ignore[arg-type]
        return PluginError(f"the plugin {program} {text} (exit {code}); its stderr: {shown or '-'}")


def _write_lines(pipe: IO[str], lines: Sequence[str]) -> None:
    """Send lines to a program; that it has ended is seen where its answers are read."""
    with contextlib.suppress(OSError, ValueError):
        pipe.writelines(f"{line}\n" for line in lines)
        pipe.flush()


def _read_lines(pipe: IO[str], lines: queue.Queue[str]) -> None:
    """Pass on a program's lines, then the mark of its end."""
    for line in pipe:
        if line.strip():
            lines.put(line)
    lines.put(_ENDED)


def _stop(
    process: subprocess.Popen[str], errors: IO[bytes], folder: tempfile.TemporaryDirectory[str]
) -> None:
    """End a program politely, then for good, and remove its files."""
    with contextlib.suppress(OSError):
        process.stdin.close()  # type: ignore[union-attr]
    try:
        process.wait(timeout=_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()  # type: ignore[union-attr]
    errors.close()
    folder.cleanup()
