"""Checkpoints that survive a kill: written under a temporary name, fsynced, renamed, and verified when read.

A checkpoint is a folder `checkpoints/step-<n>` of a run: one safetensors file per group of tensors (the method, the
optimizer, ...) and `state.json` with the step, the loop's own state, and the size and SHA-256 of every file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from hf_ssl_or.errors import InputError

FORMAT = 1
_STEP = re.compile(r"(?:\.old-)?step-(\d+)")
_PLAIN = re.compile(r"\w[\w-]*")


class DamagedCheckpointError(InputError):
    """A checkpoint is incomplete, or its bytes are not those that were written; the message names the file."""


def step_of(path: Path) -> int:
    """Returns the step of a checkpoint's folder.

    Raises:
        InputError: It is none.
    """
    name = path.name.removeprefix("step-")
    if not name.isdecimal() or not path.is_dir():
        raise InputError(f"{path}: is no checkpoint; give a folder such as RUN/checkpoints/step-100, or True")
    return int(name)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Takes an optimizer's state apart into tensors and JSON.

    Args:
        optimizer: Any torch optimizer built with named parameters, whose state entries are tensors or plain numbers.

    Returns:
        The live tensors by `<parameter>/<entry>`, and what else `load_optimizer` needs. Learning rates and other
        settings are not in it: they are the run's arguments.
    """
    tensors: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name, parameter in _named_parameters(optimizer).items():
        state = optimizer.state.get(parameter, {})
        held = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        tensors |= {f"{name}/{key}": value for key, value in held.items()}
        entries[name] = {"tensors": list(held), "values": {key: state[key] for key in state if key not in held}}
    return tensors, {"optimizer": type(optimizer).__name__, "parameters": entries}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Puts back what `optimizer_tensors` took, whatever the order of the groups is now.

    Args:
        optimizer: Built with named parameters, as `build_optimizer` does; keeps its own settings.
        tensors: Tensors by `<parameter>/<entry>`; they are copied.
        state: The JSON part.

    Raises:
        InputError: Another kind of optimizer, or a missing, unexpected or differently shaped entry.
    """
    if state["optimizer"] != type(optimizer).__name__:
        raise InputError(f"optimizer: the state is of {state['optimizer']}, this run has {type(optimizer).__name__}")
    entries = state["parameters"]
    parameters = _named_parameters(optimizer)
    _same_names("parameter", parameters, entries)
    _same_names("tensor", [f"{name}/{key}" for name in entries for key in entries[name]["tensors"]], tensors)
    loaded = {}
    for index, (name, parameter) in enumerate(parameters.items()):
        held = {key: _like(parameter, f"{name}/{key}", tensors) for key in entries[name]["tensors"]}
        if values := held | entries[name]["values"]:
            loaded[index] = values
    optimizer.load_state_dict({"state": loaded, "param_groups": optimizer.state_dict()["param_groups"]})


def _named_parameters(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {n: p for g in optimizer.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}


def _same_names(kind: str, wanted: Iterable[str], found: Iterable[str]) -> None:
    wanted, found = set(wanted), set(found)
    for names, problem in ((wanted - found, "is missing from"), (found - wanted, "is unexpected in")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise InputError(f"optimizer: {kind} {min(names)!r}{more} {problem} the saved state")


def _like(parameter: Tensor, key: str, tensors: dict[str, Tensor]) -> Tensor:
    """Copies a state tensor to the parameter's device and memory layout, so that batched kernels stay batched."""
    tensor = tensors[key]
    if tensor.ndim == 0:  # a step counter; torch knows on which device each optimizer wants it
        return tensor.clone()
    if tensor.shape != parameter.shape:
        raise InputError(f"optimizer: {key!r} has shape {tuple(tensor.shape)}, not {tuple(parameter.shape)}")
    return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def snapshot(
    groups: dict[str, dict[str, Tensor]], *, into: dict[str, dict[str, Tensor]] | None = None
) -> dict[str, dict[str, Tensor]]:
    """Copies every tensor to contiguous CPU memory of its own, so that training may continue while it is written.

    Args:
        groups: Named groups of tensors, on any device, of any layout.
        into: An earlier copy whose memory is used again: new memory takes as long to get as to fill.
    """
    copies: dict[str, dict[str, Tensor]] = {}
    for group, tensors in groups.items():
        earlier = (into or {}).get(group, {})
        copies[group] = {name: _copy(tensor.detach(), earlier.get(name)) for name, tensor in tensors.items()}
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # copies into pinned memory are under way
    return copies


def _copy(tensor: Tensor, earlier: Tensor | None) -> Tensor:
    if earlier is None or earlier.shape != tensor.shape or earlier.dtype != tensor.dtype:
        earlier = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return earlier.copy_(tensor, non_blocking=True)


def write(folder: Path, step: int, groups: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Writes one checkpoint into a new folder and waits until it is on the disk.

    Args:
        folder: Must not exist.
        step: Number of finished steps.
        groups: What `snapshot` gave; each group becomes `<group>.safetensors`.
        state: Anything that JSON can hold.
    """
    folder.mkdir(parents=True)
    files = {}
    for group, tensors in groups.items():
        if not _PLAIN.fullmatch(group):
            raise ValueError(f"group {group!r}: a plain word is wanted, it becomes a file name")
        path = folder / f"{group}.safetensors"
        safetensors.torch.save_file(tensors, path)  # then reading back: half the time and memory of hashing first
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.name] = {"size": path.stat().st_size, "sha256": digest}
    content = json.loads(json.dumps({"format": FORMAT, "step": step, "files": files, "state": state}))
    _write_json(folder / "state.json", {"sha256": _json_digest(content), **content})
    for name in files:
        shutil.copymode(folder / "state.json", folder / name)  # safetensors lets nobody but the owner read
    _sync_folder(folder)


def _read_state(folder: Path) -> dict[str, Any]:
    """Reads and verifies `state.json`."""
    path = folder / "state.json"
    data = _read_bytes(path)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path}: damaged (it is not JSON)") from error
    if not isinstance(content, dict) or content.pop("sha256", None) != _json_digest(content):
        raise DamagedCheckpointError(f"{path}: damaged (its SHA-256 differs from the one noted in it)")
    if (found := content.get("format")) != FORMAT:
        raise InputError(f"{path}: format {found!r:.40}, but this version of hf_ssl_or reads format {FORMAT}")
    files = content.get("files")
    noted = list(files.values()) if isinstance(files, dict) else [None]
    sound = all(isinstance(note, dict) and note.keys() == {"size", "sha256"} for note in noted)
    if not (sound and isinstance(content.get("state"), dict) and type(content.get("step")) is int):
        raise DamagedCheckpointError(f"{path}: damaged (it does not hold what a checkpoint does)")
    for name in content["files"]:
        if not _PLAIN.fullmatch(name.removesuffix(".safetensors")):
            raise DamagedCheckpointError(f"{path}: {name!r} is not the name of a file in this folder")
    return content


def _read_files(folder: Path, files: dict[str, dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
    """Yields the name and the verified bytes of each file."""
    for name, noted in files.items():
        path = folder / name
        data = _read_bytes(path)
        if len(data) != noted["size"]:
            raise DamagedCheckpointError(f"{path}: incomplete ({len(data)} of {noted['size']} bytes)")
        if hashlib.sha256(data).hexdigest() != noted["sha256"]:
            raise DamagedCheckpointError(f"{path}: damaged (its SHA-256 differs from the one in state.json)")
        yield name, data


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamagedCheckpointError(f"{path}: cannot be read ({_reason(error)})") from error


def _reason(error: OSError | SafetensorError) -> str:
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)


def _json_digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_json(path: Path, content: Any) -> None:
    with path.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes names and renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class CheckpointStore:
    """The checkpoints of one run. Only the main process saves; anyone may read, also while the run continues.

    Args:
        run_dir: Folder of the run; the store is its `checkpoints`.
        keep_last: How many of the newest checkpoints stay; None keeps all. The best one stays besides.
    """

    def __init__(self, run_dir: Path, *, keep_last: int | None = 2) -> None:
        if keep_last is not None and keep_last < 1:
            raise InputError(f"keep_last: at least 1, or null to keep all, not {keep_last}")
        self.folder, self.keep_last = Path(run_dir) / "checkpoints", keep_last

    def save(self, step: int, groups: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
        """Saves a checkpoint, in place of an earlier one of the same step, and removes those that are too old.

        Args:
            step: Number of finished steps.
            groups: Named groups of tensors, on any device, of any layout; aliases are stored as separate tensors.
            state: Anything that JSON can hold.

        Returns:
            The checkpoint's folder.

        Raises:
            InputError: It cannot be written; the checkpoints before it are untouched.
        """
        return self.write(step, snapshot(groups), state)

    def write(self, step: int, groups: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
        """Does what `save` does with what `snapshot` gave."""
        final, temporary = self.folder / f"step-{step}", self.folder / f".tmp-step-{step}"
        try:
            self._clean()
            write(temporary, step, groups, state)
            self._publish(temporary, final)
            self._prune(step)
        except (OSError, SafetensorError) as error:
            problem = f"{self.folder}: step {step} cannot be saved ({_reason(error)})"
            raise InputError(f"{problem}; last good checkpoint: {self.latest() or 'none'}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return final

    def load(self, path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Reads the checkpoint in a folder.

        Returns:
            The groups of tensors on the CPU, and the state with the `step` beside it.

        Raises:
            InputError: A file is missing, incomplete, damaged, or of another format; the message names it.
        """
        content, groups = _read_state(Path(path)), {}
        for name, data in _read_files(Path(path), content["files"]):
            try:
                groups[name.removesuffix(".safetensors")] = safetensors.torch.load(data)
            except SafetensorError as error:
                raise DamagedCheckpointError(f"{path}/{name}: is no safetensors file ({error})") from error
        return groups, {**content["state"], "step": content["step"]}

    def clean(self) -> None:
        """Removes what a killed save left behind, and puts back a checkpoint that was about to be replaced.

        Raises:
            InputError: The folder cannot be written.
        """
        try:
            self._clean()
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written ({_reason(error)})") from error

    def steps(self) -> list[int]:
        """Lists the steps that have a checkpoint, oldest first."""
        return sorted(self._folders())

    def latest(self) -> Path | None:
        """Finds the newest checkpoint that is complete and undamaged; warns of each that it passes over."""
        problems = []
        for _, path in sorted(self._folders().items(), reverse=True):
            try:
                for _ in _read_files(path, _read_state(path)["files"]):
                    pass
            except DamagedCheckpointError as error:
                problems.append(str(error))
                continue
            self._warn(problems, f"using {path} instead")
            return path
        self._warn(problems, "no other checkpoint is left")
        return None

    def mark_best(self, step: int, value: float, name: str) -> None:
        """Keeps the checkpoint of `step` from being removed, in place of the former best, if its value is higher.

        Args:
            step: A saved step.
            value: How good it is: more is better, and NaN is never best.
            name: Name of that number; a best of another name is replaced.

        Raises:
            InputError: There is no such checkpoint, or the note cannot be written.
        """
        if step not in self._folders():
            raise InputError(f"{self.folder}: step {step} has no checkpoint and cannot be marked as the best")
        best = self.best()
        if math.isnan(value) or (best and best["name"] == name and value <= best["value"]):
            return
        try:
            temporary = self.folder / ".tmp-best.json"
            _write_json(temporary, {"step": step, "value": value, "name": name})
            os.replace(temporary, self.folder / "best.json")
            _sync_folder(self.folder)
            self._prune(step)
        except OSError as error:
            raise InputError(f"{self.folder}: best.json cannot be written ({_reason(error)})") from error

    def best(self) -> dict[str, Any] | None:
        """Returns the `step`, `value` and `name` of the best checkpoint, or None if none is marked or it is gone."""
        path = self.folder / "best.json"
        if not path.exists():
            return None
        try:
            best = json.loads(path.read_bytes())
            best = {"step": int(best["step"]), "value": float(best["value"]), "name": str(best["name"])}
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
            raise InputError(f"{path}: damaged; remove it to continue without a best one") from error
        return best if best["step"] in self._folders() else None

    @staticmethod
    def _warn(problems: list[str], outcome: str) -> None:
        if problems:
            warnings.warn("; ".join([*problems, outcome]), stacklevel=3)

    def _folders(self) -> dict[int, Path]:
        paths = sorted(self.folder.iterdir()) if self.folder.is_dir() else []  # ".old-step-7" first: "step-7" wins
        found = ((_STEP.fullmatch(path.name), path) for path in paths)
        return {int(match[1]): path for match, path in found if match}

    def _clean(self) -> None:
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            _sync_folder(self.folder.parent)
        for path in self._folders().values():
            if path.name.startswith("."):
                os.replace(path, path.with_name(path.name.removeprefix(".old-")))
        for pattern in (".tmp-*", ".old-*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def _publish(self, temporary: Path, final: Path) -> None:
        old = final.with_name(f".old-{final.name}")
        if final.exists():
            os.replace(final, old)  # a folder cannot be replaced in one move; `_folders` finds the old one meanwhile
        os.replace(temporary, final)
        _sync_folder(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def _prune(self, newest: int) -> None:
        if self.keep_last is None:
            return
        best = self.best()
        for step in [step for step in self.steps() if step <= newest][: -self.keep_last]:
            if best is None or step != best["step"]:
                gone = self.folder / f".tmp-gone-{step}"  # so that a kill meanwhile leaves no half checkpoint
                os.replace(self.folder / f"step-{step}", gone)
                shutil.rmtree(gone, ignore_errors=True)
