"""W&B, which never stops a run: what it cannot do is told in one line, and the run goes on without."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlstitch.files import write_text
from rlstitch.telling import say

ID = "wandb-id"
SECONDS = 6  # to reach the service when a run starts
LAST_SECONDS = 120  # to upload the rest when it ends


class Tracker:
    """One W&B run a run folder: its id is kept there, so that a resumed run goes on in it. mode: auto (online where WANDB_API_KEY is set), online, offline, off.

    Where it cannot go online it is kept offline, in <run>/wandb; where that fails it is off.
    """

    def __init__(self, run: Path, *, mode: str, project: str, x_axis: str, config: dict[str, Any]):
        self.x_axis, self.folder, self.run = x_axis, run / "wandb", None
        first = ("online" if os.environ.get("WANDB_API_KEY") else "offline") if mode == "auto" else mode
        for attempt in {"online": ("online", "offline"), "offline": ("offline",), "off": ()}[first]:
            self._try(f"{attempt} logging to W&B", lambda: self._open(run, attempt, project, config))
            if self.run is not None:
                break

    def _open(self, run: Path, mode: str, project: str, config: dict[str, Any]) -> None:
        import wandb

        if not (run / ID).exists():
            write_text(run / ID, secrets.token_hex(4) + "\n")
        settings = wandb.Settings(silent=True, init_timeout=SECONDS, login_timeout=SECONDS)
        opened = wandb.init(
            project=project, name=run.name, id=(run / ID).read_text().strip(), resume="allow", dir=str(run), mode=mode, config=config, settings=settings,
        )  # fmt: skip
        opened.define_metric(self.x_axis)
        opened.define_metric("*", step_metric=self.x_axis)
        self.run = opened

    def log(self, row: dict[str, Any]) -> None:
        self._say(lambda run: run.log(_flat(row)))

    def image(self, name: str, path: Path, hours: float) -> None:
        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Image(str(path)), self.x_axis: hours})

        self._say(send)

    def close(self) -> None:
        """Send the rest; what the network does not take in time stays in the folder."""
        if self.run is None:
            return
        last = threading.Thread(target=lambda: self._say(lambda run: run.finish()), daemon=True)
        last.start()
        last.join(LAST_SECONDS)
        if last.is_alive():
            say(f"W&B has not taken everything in {LAST_SECONDS} s: `wandb sync {self.folder}/latest-run` sends the rest")
        self.run = None

    def _say(self, send: Callable[[Any], None]) -> None:
        if self.run is not None and not self._try("logging to W&B", lambda: send(self.run)):
            self.run = None

    def _try(self, what: str, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception as error:  # of a service, its network, its files: none of them is worth the run
            told = next(iter(str(error).splitlines()), type(error).__name__)
            say(f"{what} does not work ({told[:200]}); the run goes on, with metrics.jsonl as its log")
            return False
        return True


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in row.items():
        out.update(_flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return out
