"""Read a checkpoint: any rectangle of any tensor, whatever layout wrote it."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megascale.checkpoint.errors import CheckpointError
from megascale.checkpoint.files import FileRecord, digest_bytes, digest_file
from megascale.checkpoint.folders import READABLE, list_checkpoints
from megascale.checkpoint.index import INDEX, Index, Placement, TensorEntry, from_json
from megascale.checkpoint.layout import DTYPES, Shape, overlap, region
from megascale.checkpoint.manifest import STATE, read_manifest

OTHER = "use another checkpoint; `megascale checkpoint verify FOLDER` says which are good"


class CheckpointReader:
    """A checkpoint that is open for reading. Opening checks the manifest; `verify` checks all the rest.

    Args:
        path: the checkpoint's folder, ``.../checkpoints/step-00000100``.

    Raises:
        CheckpointError: the folder has no good manifest, or the manifest is of another step.
    """

    def __init__(self, path: Path):
        self.path = path
        self.manifest = read_manifest(path)
        self.step = self.manifest.step
        self._open: dict[str, Any] = {}
        named = READABLE.fullmatch(path.name)
        if named and int(named[1]) != self.step:
            raise CheckpointError(str(path), f"its manifest is of step {self.step}: the folder was renamed", OTHER)

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the shards that reading has opened."""
        for handle in self._open.values():
            handle.__exit__(None, None, None)
        self._open.clear()

    @cached_property
    def state(self) -> dict[str, Any]:
        """What the trainer stored beside the tensors."""
        return self._read_json(STATE)

    @cached_property
    def index(self) -> Index:
        """Where each tensor is."""
        try:
            return from_json(self._read_json(INDEX))
        except (KeyError, TypeError) as error:
            raise CheckpointError(str(self.path / INDEX), f"is not an index ({error!r})", OTHER) from error

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self.index)

    def shape(self, name: str) -> Shape:
        """Global shape of a tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return DTYPES[self._entry(name).dtype]

    def read(self, name: str, offsets: Shape | None = None, sizes: Shape | None = None) -> torch.Tensor:
        """A rectangle of a tensor; by default the whole tensor. Only the bytes needed are read.

        Args:
            name: global name.
            offsets: where the rectangle starts; default: at 0.
            sizes: its shape; default: up to the end.

        Returns:
            A new contiguous tensor of shape ``sizes`` in host memory, in the stored dtype.

        Raises:
            CheckpointError: no such tensor, a rectangle outside its shape, or a shard that does not hold what the index says.
        """
        entry = self._entry(name)
        offsets = offsets if offsets is not None else (0,) * len(entry.shape)
        sizes = (
            sizes if sizes is not None else tuple(extent - offset for extent, offset in zip(entry.shape, offsets, strict=False))
        )
        self._check_inside(name, entry.shape, offsets, sizes)
        result = torch.empty(sizes, dtype=DTYPES[entry.dtype])
        for stored in entry.rectangles:
            shared = overlap(offsets, sizes, stored.offsets, stored.sizes)
            if shared is not None:
                result[region(_minus(shared[0], offsets), shared[1])] = self._read_part(stored, result.dtype, *shared)
        return result

    def verify(self) -> None:
        """Check presence, size and digest of every file, several files at a time.

        Raises:
            CheckpointError: names the first file that is missing, unreadable or damaged.
        """
        self.check_sizes()
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            jobs = {name: pool.submit(digest_file, self.path / name) for name in self.manifest.files}
            for name, job in jobs.items():
                try:
                    self._compare(name, job.result())
                except OSError as error:
                    raise CheckpointError(str(self.path / name), f"cannot be read ({error.strerror})", OTHER) from error

    def check_sizes(self) -> None:
        """Check presence and size of every file: quick, but blind to changed bytes.

        Raises:
            CheckpointError: names the first file that is missing or of another size.
        """
        for name, record in self.manifest.files.items():
            path = self.path / name
            if not path.is_file():
                raise CheckpointError(str(path), "is missing", OTHER)
            self._compare(name, FileRecord(path.stat().st_size, record.digest))

    def _compare(self, name: str, found: FileRecord) -> None:
        record = self.manifest.files[name]
        if found.size != record.size:
            raise CheckpointError(str(self.path / name), f"has {found.size:,} bytes instead of {record.size:,}", OTHER)
        if found.digest != record.digest:
            reason = f"is damaged: its digest is {found.digest} instead of {record.digest}"
            raise CheckpointError(str(self.path / name), reason, OTHER)

    def _read_json(self, name: str) -> Any:
        path = self._listed(name)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(str(path), f"cannot be read ({error.strerror})", OTHER) from error
        self._compare(name, FileRecord(len(content), digest_bytes(content)))
        return json.loads(content)

    def _listed(self, name: str) -> Path:
        """Path of a file of this checkpoint; nothing that the manifest does not list is ever opened."""
        if name not in self.manifest.files:
            raise CheckpointError(str(self.path / name), "is not listed in the manifest", OTHER)
        return self.path / name

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.index:
            near = difflib.get_close_matches(name, self.index, n=1)
            remedy = f"did you mean {near[0]}?" if near else "does the checkpoint belong to this model?"
            raise CheckpointError(str(self.path), f"has no tensor {name}", remedy)
        return self.index[name]

    def _check_inside(self, name: str, shape: Shape, offsets: Shape, sizes: Shape) -> None:
        inside = len(offsets) == len(sizes) == len(shape) and all(
            offset >= 0 and size >= 0 and offset + size <= extent
            for offset, size, extent in zip(offsets, sizes, shape, strict=True)
        )
        if not inside:
            reason = f"tensor {name} has shape {shape}; sizes {sizes} at offsets {offsets} were asked for"
            raise CheckpointError(str(self.path), reason, "does the checkpoint belong to this model?")

    def _read_part(self, stored: Placement, dtype: torch.dtype, offsets: Shape, sizes: Shape) -> torch.Tensor:
        try:
            shard = self._shard(stored.file)
            if sizes == stored.sizes:
                part = shard.get_tensor(stored.key)
            else:
                part = shard.get_slice(stored.key)[region(_minus(offsets, stored.offsets), sizes)]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(str(self.path / stored.file), f"cannot be read ({error})", OTHER) from error
        # An assignment would silently broadcast or convert.
        if tuple(part.shape) != sizes or part.dtype != dtype:
            reason = f"holds {part.dtype} {tuple(part.shape)} as {stored.key}, the index says {dtype} {sizes}"
            raise CheckpointError(str(self.path / stored.file), reason, OTHER)
        return part

    def _shard(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(self._listed(file), framework="pt").__enter__()
        return self._open[file]


def _minus(a: Shape, b: Shape) -> Shape:
    return tuple(one - other for one, other in zip(a, b, strict=True))


def newest_good(folder: Path, report: Callable[[str], None]) -> CheckpointReader | None:
    """The newest checkpoint whose files all have the right digest.

    Args:
        folder: the run's ``checkpoints`` folder; it need not exist.
        report: receives one line for each damaged checkpoint that is passed over.

    Returns:
        The reader, or None when there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but none is good.
    """
    candidates = list_checkpoints(folder)
    for path in candidates:
        try:
            reader = CheckpointReader(path)
            reader.verify()
            return reader
        except CheckpointError as error:
            report(f"checkpoint {path.name} is not used: {error.place} {error.reason}")
    if candidates:
        reason = f"none of the {len(candidates)} checkpoints is good"
        raise CheckpointError(str(folder), reason, "restore one from a copy, or move the folder away to start from step 0")
    return None


def open_newest(
    folder: Path, rank: int, broadcast: Callable[[object], Any], report: Callable[[str], None]
) -> CheckpointReader | None:
    """`newest_good` for many ranks: rank 0 verifies and tells the others which one to open.

    Args:
        folder, report: as in `newest_good`; only rank 0 reports.
        rank: of this process.
        broadcast: gives every rank what rank 0 passes (the others pass None).

    Raises:
        CheckpointError: there are checkpoints, but none is good; the same on every rank.
    """
    choice: tuple[str | None, tuple[str, str, str] | None] | None = None
    if rank == 0:
        try:
            newest = newest_good(folder, report)
            choice = (newest.path.name if newest else None, None)
        except CheckpointError as error:
            # As plain strings: an exception with more than one argument does not survive pickling.
            choice = (None, (error.place, error.reason, error.remedy))
    name, failure = broadcast(choice)
    if failure is not None:
        raise CheckpointError(*failure)
    return CheckpointReader(folder / name) if name is not None else None
