"""A two-rank training run on a tiny corpus, stopped and resumed: do its weights equal those of an uninterrupted run?"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import megascale
from megascale.checkpoint.load import newest_good
from megascale.checkpoint.shard import tensor_bytes
from megascale.config.errors import InputError
from megascale.data.prepare import PrepareRequest, prepare_corpus
from megascale.data.sources import SourceRequest
from megascale.observe.sinks import read_metrics
from megascale.train.load_run import WEIGHTS
from megascale.train.machine import FAILED, OK, Finding

RANKS = 2
STEPS = 60
_TIMEOUT_SECONDS = 120.0
_LOG_LINES = 15

_CONFIG = """
model:
  width: 32
  layers: 2
  heads: 2
  streams: {{count: 2, prefix_tokens: 4}}
  experts: {{count: 4, per_token: 2, every: 2, offset: 1}}
  altup: {{blocks: 2}}
data: {{sources: [{{path: {corpus}}}], sequence_length: 64}}
batch: {{sequences: 8}}
schedule: {{steps: {steps}, warmup_steps: 5}}
compile: "off"
validation: {{every: 0}}
checkpoint: {{every: 0}}
observe: {{console_every: {steps}, wandb: {{mode: "off"}}}}
run: {{folder: {folder}}}
"""


class SelfTestError(RuntimeError):
    """A part of the self test did not end as it should; the message shows what it printed."""


@dataclass(frozen=True)
class SelfTest:
    """Where it happens: a temporary folder with the corpus, the config and two runs."""

    folder: Path

    def prepare(self) -> str:
        """Make the corpus and the config; returns what was made."""
        generator = random.Random(1)
        words = ["".join(generator.choices("abcdefghij", k=generator.randint(1, 7))) for _ in range(200)]
        texts = self.folder / "texts"
        texts.mkdir()
        for i in range(40):
            (texts / f"{i:02d}.txt").write_text(" ".join(generator.choices(words, k=400)))
        request = PrepareRequest(source=SourceRequest(paths=(texts,)), vocab_size=300, validation=0.1)
        manifest = prepare_corpus(self.folder / "corpus", request)
        (self.folder / "config.yaml").write_text(
            _CONFIG.format(corpus=json.dumps(str(self.folder / "corpus")), steps=STEPS, folder=json.dumps(str(self.folder)))
        )
        return f"{manifest.splits['train'].tokens:,} tokens"

    def train(self, name: str) -> str:
        """Train to the end; returns how long it took."""
        started = time.monotonic()
        self._finish(self._start(name), name)
        self._expect(name, "done")
        return f"{RANKS} ranks, {STEPS} steps, {time.monotonic() - started:.0f} s"

    def stop(self, name: str) -> str:
        """Train and ask for a stop after the first step; returns where it stopped."""
        process = self._start(name)
        metrics, run = self.folder / name / "metrics.jsonl", self.folder / name
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while process.poll() is None and time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.01)
        if process.poll() is None:
            (run / "STOP").touch()
        self._finish(process, name)
        self._expect(name, "stop")
        (run / "STOP").unlink()
        return f"after step {self._last_step(name)} of {STEPS}"

    def resume(self, name: str) -> str:
        """Train a stopped run to the end; returns where it went on. One that began anew, to the same weights, fails here."""
        stopped = self._last_step(name)
        self.train(name)
        first = min(record["step"] for record in read_metrics(self.folder / name / "metrics.jsonl") if record["lineage"] == 2)
        if first != stopped + 1:
            raise SelfTestError(f"went on with step {first} after a stop at step {stopped}")
        return f"from step {first} to {STEPS}"

    def compare(self, first: str, second: str) -> str:
        """Compare the weights at the ends of two runs; returns their digest."""
        digests = [weights_digest(self.folder / name) for name in (first, second)]
        if digests[0] != digests[1]:
            raise SelfTestError(f"the weights differ: {digests[0][:12]} and {digests[1][:12]}")
        return f"equal to the uninterrupted run, bit for bit (digest {digests[0][:12]})"

    def _start(self, name: str) -> subprocess.Popen[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        command = [*launcher, "-m", "megascale", "train", "--config", str(self.folder / "config.yaml"), f"run.name={name}"]
        package = str(Path(megascale.__file__).parent.parent)
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        # on the CPU everywhere: two ranks cannot share one GPU, and the verdict is about the code
        settings = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment = {**os.environ, **settings}
        with (self.folder / f"{name}.log").open("a") as log:
            return subprocess.Popen([sys.executable, *command], env=environment, stdout=log, stderr=log, text=True)

    def _finish(self, process: subprocess.Popen[str], name: str) -> None:
        try:
            process.wait(_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired as error:
            process.terminate()  # the launcher ends its ranks
            process.wait()
            raise SelfTestError(f"no end after {_TIMEOUT_SECONDS:.0f} s: {self._log_excerpt(name)}") from error

    def _last_step(self, name: str) -> int:
        return int(json.loads((self.folder / name / "exit.json").read_text())["step"])

    def _expect(self, name: str, reason: str) -> None:
        path = self.folder / name / "exit.json"
        found = json.loads(path.read_text())["reason"] if path.exists() else "no exit.json"
        if found != reason:
            raise SelfTestError(f"the run ended with {found}, not {reason}: {self._log_excerpt(name)}")

    def _log_excerpt(self, name: str) -> str:
        """The first error in the log and what follows it: the launcher's own account of its ranks comes last and says less."""
        lines = (self.folder / f"{name}.log").read_text().splitlines()
        first = next((i for i, line in enumerate(lines) if "error" in line.lower()), -_LOG_LINES)
        return "\n" + "\n".join(lines[first:][:_LOG_LINES])


def weights_digest(run_folder: Path) -> str:
    """SHA-256 of the names and bytes of all weights in the newest checkpoint of a run.

    Raises:
        SelfTestError: the run has no checkpoint.
    """
    reader = newest_good(run_folder / "checkpoints", lambda line: None)
    if reader is None:
        raise SelfTestError(f"{run_folder.name} has no checkpoint")
    digest = hashlib.sha256()
    with reader:
        for name in reader.names():
            if name.startswith(WEIGHTS):
                digest.update(name.encode())
                digest.update(tensor_bytes(reader.read(name)))
    return digest.hexdigest()


def run_self_test() -> Iterator[Finding]:
    """The findings of the self test, one after the other; the first failure ends it."""
    with tempfile.TemporaryDirectory(prefix="megascale-doctor-") as folder:
        test = SelfTest(Path(folder))
        parts: tuple[tuple[str, Callable[[], str]], ...] = (
            ("make a corpus", test.prepare),
            ("train", lambda: test.train("whole")),
            ("stop", lambda: test.stop("stopped")),
            ("resume", lambda: test.resume("stopped")),
            ("resumed weights", lambda: test.compare("whole", "stopped")),
        )
        for name, part in parts:
            try:
                yield Finding(name, OK, part())
            except (SelfTestError, InputError, OSError) as error:
                yield Finding(name, FAILED, str(error))
                return
