"""The folder that a call writes: its checkpoints while it learns, then the model, whole or not there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers
from accelerate.utils import gather_object

from sparse_cl.four_domains.files import MARK, complete, read_json, write_json
from sparse_cl.four_domains.folder import differences
from sparse_cl.methods.carried import HISTORY, Carried, load_carried, save_carried
from sparse_cl.models.processes import by_first, processes

_WORK = "unfinished"
"""Within the folder, until it is done."""


class Work:
    """What is on disk of one call. Of several processes the first writes; all must call each method.

    Raises:
        ValueError: the folder is a file, or holds something else.
    """

    def __init__(self, out: Path) -> None:
        self.out, self._work = out, out / _WORK
        self.checkpoints = self._work / "checkpoints"
        self.settings: dict[str, Any] = {}
        by_first(self._open)

    def _open(self) -> None:
        out = self.out
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is a file; --out must be a folder")
        mine = self._held() is not None
        if mine and (self._work / "finished").is_dir():
            self._place()
        elif mine and (out / MARK).is_file():
            shutil.rmtree(self._work, ignore_errors=True)  # a kill left a part of it
        if not mine and self._work.is_dir() and any(path.suffix != ".part" for path in self._work.iterdir()):
            raise ValueError(f"{self._work} is not empty and not of sparse-cl learn. Give another --out")
        if not mine and out.is_dir() and any(path.name != _WORK for path in out.iterdir()):
            raise ValueError(f"{out} is not empty and holds no model of sparse-cl learn. Give another --out")

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Whether the folder is this call's, or nobody's.

        Args:
            settings: with the fingerprint of the data; by them a call knows its own folder again.

        Raises:
            ValueError: it is of another call, or processes were given different ones; it is said in what they differ.
        """
        self.settings = dict(settings)
        for others in gather_object([self.settings]):
            if differing := differences(others, self.settings):
                raise ValueError(
                    f"the processes do not read the same (they differ in {differing}); give all of them one "
                    "command and the same files"
                )
        by_first(self._check_claim)

    def _check_claim(self) -> None:
        held = self._held()
        if held is not None and (differing := differences(held, self.settings)):
            raise ValueError(
                f"{self.out} is of another call (it differs in {differing}). Give another --out, or delete it"
            )

    def _held(self) -> Any:
        """The settings of the call whose folder this is; None: of no call."""
        if (path := self._work / "settings.json").is_file():
            return read_json(path)
        path = self.out / HISTORY
        domains = carried.domains if path.is_file() and (carried := load_carried(self.out)) else []
        return domains[-1].get("settings") if domains else None

    def is_done(self) -> bool:
        """Whether the model is there."""
        return by_first((self.out / MARK).is_file)

    def begin(self) -> None:
        """Makes the folder; before it, nothing is written."""
        by_first(self._begin)

    def _begin(self) -> None:
        self._work.mkdir(parents=True, exist_ok=True)
        write_json(self._work / "settings.json", self.settings)
        self.checkpoints.mkdir(exist_ok=True)

    def protected(self) -> Carried | None:
        """What an interrupted call remembered of the base model."""
        return load_carried(self._work) if self._work.is_dir() else None

    def keep_protected(self, carried: Carried) -> Carried:
        """Keeps it, so that it need not be found again."""
        self.begin()
        by_first(lambda: save_carried(self._work, carried))
        return carried

    def marker(self) -> transformers.TrainerCallback:
        """Marks each checkpoint that was written whole."""
        return _Marker()

    def last_checkpoint(self) -> str | None:
        """The last one that is whole; others are deleted."""
        return by_first(self._last_checkpoint)

    def _last_checkpoint(self) -> str | None:
        found = sorted(self.checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        whole = [path for path in found if (path / MARK).is_file()]
        for path in set(found) - set(whole[-1:]):
            shutil.rmtree(path)
        return str(whole[-1]) if whole else None

    def finish(self, write: Callable[[Path], object]) -> None:
        """Has the first process write the model into an empty folder, and puts what it wrote in its place."""
        by_first(lambda: self._finish(write))

    def _finish(self, write: Callable[[Path], object]) -> None:
        folder = self._work / "building"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write(folder)
        complete(folder, self._work / "finished")
        self._place()

    def _place(self) -> None:
        # The mark comes last: without it the folder is not done, and this is done again.
        parts = sorted((self._work / "finished").iterdir(), key=lambda path: path.name == MARK)
        for part in parts:
            if (target := self.out / part.name).is_dir():
                shutil.rmtree(target)
            part.rename(target)
        if (logs := self.checkpoints / "runs").is_dir() and not (self.out / "runs").exists():
            logs.rename(self.out / "runs")  # where TensorBoard's callback puts them
        shutil.rmtree(self._work)


class _Marker(transformers.TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        processes().wait_for_everyone()  # each writes a part
        if processes().is_main_process:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / MARK, {})
