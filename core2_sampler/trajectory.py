"""The trajectory store: what Collect writes and Reflect reads.

A store is a folder of safetensors files, each written once and never changed::

    rounds/000.json                 settings that every record of the round shares
    prompts/<key>.safetensors       one prompt's encoding (each prompt once, whatever its seeds)
    shards/<key>.safetensors        the rows of one work unit: step, sigma, x, cond, gap
    shards/<key>.json               its index entry: records, size, sha256

Every file appears by an atomic rename, and the index entry comes last: a unit is there with its
entry or it does not exist. The index of the store is the set of entries, so processes that own
different units need no lock, and a killed run loses only the unit that it was working on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from core2_sampler.atomic import write_atomic
from core2_sampler.rows import is_held_out, stable_hash
from core2_sampler.stored_rows import StoredRows, StoreSource


class RecordKey(NamedTuple):
    """What makes a trajectory unique within a store."""

    prompt_id: str
    seed: int
    round: int


@dataclass(frozen=True, slots=True)
class Record:
    """One trajectory: its prompt, seed, round and the guidance scale that drove it."""

    prompt_id: str
    prompt: str
    seed: int
    round: int
    guidance_scale: float

    @property
    def key(self) -> RecordKey:
        """Return what makes this trajectory unique within a store."""
        return RecordKey(self.prompt_id, self.seed, self.round)

    @property
    def prompt_file(self) -> str:
        """Return the name of the file with this prompt's encoding."""
        return f"{stable_hash(self.prompt_id, self.prompt):016x}.safetensors"


class TrajectoryStore:
    """A folder of trajectories (see the module's docstring)."""

    def __init__(self, root: str | Path, writer: int = 0) -> None:
        """Open the store at ``root``, which the first write makes, as one of its writers."""
        self.root = Path(root)
        self.writer = writer

    def _shard(self, name: str) -> Path:
        return self.root / "shards" / f"{name}.safetensors"

    def entries(self, last_round: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (unit name, index entry) of every complete unit, in a fixed order.

        Args:
            last_round: leave out the rounds after this one.
        """
        for path in sorted((self.root / "shards").glob("*.json")):
            entry = json.loads(path.read_text())
            if last_round is None or entry["records"][0]["round"] <= last_round:
                yield path.stem, entry

    def records(self) -> dict[RecordKey, Record]:
        """Return every record by its key.

        Raises:
            ValueError: if two units hold the same record.
        """
        found: dict[RecordKey, Record] = {}
        for name, entry in self.entries():
            for item in entry["records"]:
                record = Record(**item)
                if record.key in found:
                    raise ValueError(
                        f"each record must be stored once, got {record.key} twice in {self.root}: "
                        f"remove shards/{name}.json and collect again"
                    )
                found[record.key] = record
        return found

    def shard(self, name: str) -> dict[str, Tensor]:
        """Return the rows of a unit that ``entries`` names."""
        return load_file(self._shard(name))

    def _settings(self, round: int) -> Path:
        return self.root / "rounds" / f"{round:03d}.json"

    def settings(self, round: int) -> dict[str, Any]:
        """Return what ``pin_settings`` fixed for a round that has records."""
        return json.loads(self._settings(round).read_text())

    def rounds(self) -> dict[int, dict[str, Any]]:
        """Return the settings of every round by its number, the lowest first."""
        numbers = sorted(int(path.stem) for path in self.root.glob("rounds/*.json"))
        return {number: self.settings(number) for number in numbers}

    def pin_settings(self, round: int, settings: Mapping[str, Any]) -> None:
        """Fix the settings that all records of a round share, or check them where they are fixed.

        Raises:
            ValueError: if the round was collected with other settings.
        """
        path = self._settings(round)
        wanted = json.loads(json.dumps(settings))
        if not path.exists():
            write_atomic(path, json.dumps(wanted, indent=1).encode(), self.writer)
            return
        pinned = self.settings(round)
        changed = [key for key in {*pinned, *wanted} if pinned.get(key) != wanted.get(key)]
        if changed:
            key = sorted(changed)[0]
            raise ValueError(
                f"round {round} of {self.root} must keep its settings ({key} {pinned.get(key)!r}), "
                f"got {key} {wanted.get(key)!r}: take another round or another folder"
            )

    def write_unit(
        self,
        records: Sequence[Record],
        rows: Mapping[str, Tensor],
        encodings: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        """Store one work unit.

        Args:
            records: the trajectories of the unit.
            rows: ``x``, ``cond``, ``gap`` and optional ``features`` [R, ...], with ``sigma``,
                ``step`` and ``record`` (index into ``records``) [R].
            encodings: tensors of each prompt by its ``Record.prompt_file``, without a batch axis.
        """
        for name, tensors in encodings.items():
            path = self.root / "prompts" / name
            if not path.exists():
                write_atomic(path, _seal(tensors), self.writer)
        data = save(_plain(rows))
        name = f"{stable_hash([list(record.key) for record in records]):016x}"
        entry = {
            "records": [asdict(record) for record in records],
            "rows": len(rows["step"]),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        write_atomic(self._shard(name), data, self.writer)
        write_atomic(
            self._shard(name).with_suffix(".json"), json.dumps(entry).encode(), self.writer
        )

    def remove_leftovers(self, num_writers: int) -> None:
        """Remove half-written files that killed writers left; no reader ever looks at them.

        Args:
            num_writers: how many processes write now; this one cleans up after those whose number
                it has, modulo this.
        """
        for path in self.root.glob("*/*.tmp"):
            if int(path.suffixes[-2][1:]) % num_writers == self.writer:
                path.unlink()

    def verify(self) -> None:
        """Check every file of the store against its checksum.

        Raises:
            ValueError: on the first file that is missing or was changed.
        """
        for name, entry in self.entries():
            _check(self._shard(name), entry["sha256"] == _sha256(self._shard(name)))
        for prompt_file in {record.prompt_file for record in self.records().values()}:
            path = self.root / "prompts" / prompt_file
            _check(path, path.exists() and _is_sealed(path))

    def rows(
        self,
        select: Callable[[str], bool] = lambda prompt_id: True,
        last_round: int | None = None,
    ) -> StoredRows:
        """Return the rows of the prompts whose id ``select`` accepts, up to ``last_round``.

        Raises:
            ValueError: if there are none.
        """
        shards: list[tuple[dict[str, Tensor], list[Path]]] = []
        places, sigmas = [], []
        for name, entry in self.entries(last_round):
            records = [Record(**item) for item in entry["records"]]
            wanted = torch.tensor([select(record.prompt_id) for record in records])
            tensors = self.shard(name)
            index = wanted[tensors["record"].long()].nonzero().flatten()
            places.append(torch.stack([torch.full_like(index, len(shards)), index], 1))
            sigmas.append(tensors["sigma"][index])
            shards.append((tensors, [self.root / "prompts" / r.prompt_file for r in records]))
        if not sum(map(len, places)):
            raise ValueError(
                f"{self.root} must hold rows of the wanted prompts, got none "
                f"({len(shards)} units in all): collect first"
            )
        return StoredRows(shards, torch.cat(places), torch.cat(sigmas))

    def source(
        self,
        held_out_share: float = 0.1,
        held_out_rows: int = 512,
        last_round: int | None = None,
    ) -> StoreSource:
        """Check the store and return it as Reflect reads it.

        Args:
            held_out_share: share of the prompts kept for evaluation, 0 to 1 exclusive.
            held_out_rows: at most so many of their rows are used.
            last_round: leave out the rounds after this one.
        """
        self.verify()
        train = self.rows(lambda i: not is_held_out(i, held_out_share), last_round)
        held_out = self.rows(lambda i: is_held_out(i, held_out_share), last_round)
        entries = dict(self.entries(last_round))
        rounds = {
            f"{number:03d}": settings
            for number, settings in self.rounds().items()
            if last_round is None or number <= last_round
        }
        about = {
            "store": self.root.name,
            "contents": f"{stable_hash(entries):016x}",
            "records": sum(len(entry["records"]) for entry in entries.values()),
            "training_rows": len(train),
            "held_out_share": held_out_share,
            "rounds": rounds,
        }
        return StoreSource(train, held_out, held_out_rows, about)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def _seal(tensors: Mapping[str, Tensor]) -> bytes:
    """Return a safetensors file with a checksum of its own.

    Several processes may encode a prompt that they share, and their results differ by rounding, so
    its checksum must travel with the file.
    """
    data = _plain(tensors)
    return save(data, {"sha256": _digest(data)})


def _is_sealed(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata()["sha256"] == _digest(load_file(path))
    except (SafetensorError, UnicodeDecodeError, TypeError, KeyError):
        return False


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check(path: Path, intact: bool) -> None:
    if not intact:
        raise ValueError(
            f"{path} must be as it was written, got a missing or changed file: remove it and "
            "the shards/*.json that belong to it, and collect again"
        )
