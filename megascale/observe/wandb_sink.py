"""Weights & Biases as a mirror of metrics.jsonl that cannot disturb training.

Everything that may be slow or fail happens in one daemon thread: the import, the start, each record, the end. Training
only puts records into a bounded queue. What goes wrong is said in one line and ends the mirror, not the run.
"""

from __future__ import annotations

import netrc
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from megascale.config.schema import Wandb
from megascale.observe.metrics import Record
from megascale.observe.redact import redact

_QUEUE_RECORDS = 10_000
_ID_FILE = "wandb_id"
_OFFLINE_SECONDS = 10.0


def logged_in() -> bool:
    """Whether a key for the W&B server is in WANDB_API_KEY or in the netrc file. The key itself is not read."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return path.is_file() and netrc.netrc(path).authenticators(host) is not None
    except netrc.NetrcParseError:
        return False


def run_identifier(run_folder: Path) -> str:
    """The W&B id of a run: made at its first start, kept in `RUN_FOLDER/wandb_id`, the same after every resume."""
    path = run_folder / _ID_FILE
    if not path.exists() or not path.read_text(encoding="utf-8").strip():
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def say_on_stderr(line: str) -> None:
    """Prints a notice of the mirror."""
    print(f"wandb: {line}", file=sys.stderr, flush=True)


def open_wandb(
    settings: Wandb,
    run_folder: Path,
    run_name: str,
    resolved_config: Mapping[str, Any],
    lineage: int,
    say: Callable[[str], None] = say_on_stderr,
) -> WandbSink | None:
    """Starts the mirror in the background and returns at once; None when `settings.mode` is off.

    `auto` is online when `logged_in()`, else offline. An online start without a login, or without an answer within
    `settings.timeout_seconds`, becomes an offline one with a single notice.

    Args:
        settings: the `observe.wandb` settings.
        run_folder: existing folder of the run; W&B's files go to its `wandb/`.
        run_name: name shown.
        resolved_config: the whole config; secrets are redacted before it leaves this process.
        lineage: number of this start, logged with each record.
        say: prints one line; called from the mirror's thread.
    """
    if settings.mode == "off":
        return None
    return WandbSink(settings, run_folder, run_name, redact(resolved_config), lineage, say)


class WandbSink:
    """A sink whose `write` never blocks and never raises. Made by `open_wandb`."""

    def __init__(
        self,
        settings: Wandb,
        run_folder: Path,
        run_name: str,
        redacted_config: dict[str, Any],
        lineage: int,
        say: Callable[[str], None],
    ):
        self._settings, self._run_folder, self._run_name = settings, run_folder, run_name
        self._config, self._lineage, self._say = redacted_config, lineage, say
        self._records: queue.Queue[dict[str, Any] | None] = queue.Queue(_QUEUE_RECORDS)
        self._disabled = threading.Event()
        self._thread = threading.Thread(target=self._mirror, name="wandb-mirror", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        """Queues the record. When the queue is full the mirror ends with a notice."""
        if self._disabled.is_set():
            return
        try:
            self._records.put_nowait({"lineage": self._lineage, **record})
        except queue.Full:
            self._disable(f"{_QUEUE_RECORDS} records are waiting and none is taken")

    def close(self) -> None:
        """Waits for what is queued and for the upload, for at most 2 `timeout_seconds` (start, end) and 10 seconds."""
        if not self._thread.is_alive():
            return
        deadline = time.monotonic() + 2 * self._settings.timeout_seconds + _OFFLINE_SECONDS
        try:
            self._records.put(None, timeout=self._settings.timeout_seconds)
        except queue.Full:
            self._disable("the queue was still full at the end")
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._disable(f"not finished in time; upload later with: wandb sync {self._run_folder / 'wandb'}/*run-*")

    def _disable(self, reason: str) -> None:
        if not self._disabled.is_set():
            self._disabled.set()
            self._say(f"mirror ended ({reason}); training and metrics.jsonl go on")

    def _mirror(self) -> None:
        """The thread: start, records until None, end."""
        try:
            run = self._start()
            run.define_metric("*", step_metric="tokens")
            while (record := self._records.get()) is not None and not self._disabled.is_set():
                run.log(record)
            run.finish()
        # A mirror has no failure that may reach training, and wandb documents no common base of its exceptions.
        except Exception as error:  # noqa: BLE001
            self._disable(_first_line(error))

    def _start(self) -> Any:
        """The started wandb run, online or offline."""
        # Its error reports go to a third server; where that does not answer they hold up the exit by 20 seconds.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        if self._settings.mode == "offline" or not logged_in():
            if self._settings.mode == "online":
                self._say("not logged in (WANDB_API_KEY or `wandb login`); recording offline")
            return self._init(wandb, "offline")
        try:
            run = self._init(wandb, "online")
        except wandb.Error as error:
            self._say(f"no usable server ({_first_line(error)}); recording offline")
            # The failed start keeps the run id occupied until its service ends.
            wandb.teardown()
            return self._init(wandb, "offline")
        self._say(f"online at {run.url}")
        return run

    def _init(self, wandb: Any, mode: str) -> Any:
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=self._settings.timeout_seconds,
            finish_timeout=self._settings.timeout_seconds,
            disable_git=True,
            disable_code=True,
            save_code=False,
            # Command line, user, host and remotes may hold secrets; manifest.json has what a rerun needs.
            x_disable_meta=True,
            x_save_requirements=False,
        )
        wandb.setup(settings=settings)
        return wandb.init(
            mode=mode,
            project=self._settings.project,
            entity=self._settings.entity,
            group=self._settings.group,
            tags=list(self._settings.tags),
            name=self._run_name,
            id=run_identifier(self._run_folder),
            resume="allow",
            dir=str(self._run_folder),
            config=self._config,
            settings=settings,
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
