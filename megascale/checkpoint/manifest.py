"""manifest.json: format version, step, time, and size and digest of every other file. It carries a digest of itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megascale.checkpoint.errors import CheckpointError
from megascale.checkpoint.files import FileRecord, digest_bytes, encode_json

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"


@dataclass(frozen=True)
class Manifest:
    """Content of manifest.json.

    Attributes:
        step: optimizer steps done when the checkpoint was taken.
        saved_at: wall-clock time of the save, ISO 8601, UTC; a label, never used to order checkpoints.
        files: every other file of the checkpoint by its plain name.
    """

    step: int
    saved_at: str
    files: dict[str, FileRecord]

    @property
    def size(self) -> int:
        """Bytes of all listed files."""
        return sum(record.size for record in self.files.values())

    def encode(self) -> bytes:
        """The bytes of manifest.json."""
        body = {"format": FORMAT, **asdict(self)}
        return encode_json({"manifest": body, "digest": digest_bytes(encode_json(body))})


def read_manifest(checkpoint: Path) -> Manifest:
    """Read and check the manifest of a checkpoint folder.

    Raises:
        CheckpointError: there is none, it is damaged, or its format is newer than this program.
    """
    path = checkpoint / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read ({error.strerror})", "use another checkpoint") from error
    try:
        document = json.loads(raw)
        body = document["manifest"]
        # Comparing all bytes, and not only the digest, also finds changes that JSON does not see (white space, key order).
        intact = raw == encode_json(document) and document["digest"] == digest_bytes(encode_json(body))
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise CheckpointError(str(path), "is damaged: its content does not match its digest", "use another checkpoint")
    if body["format"] != FORMAT:
        reason = f"has format {body['format']}; this program reads format {FORMAT}"
        raise CheckpointError(str(path), reason, "use the version of megascale that wrote it, or a newer one")
    files = {name: FileRecord(**record) for name, record in body["files"].items()}
    for name in files:
        if Path(name).name != name:
            raise CheckpointError(str(path), f"lists {name!r}, which is not a plain file name", "do not use this checkpoint")
    return Manifest(body["step"], body["saved_at"], files)
