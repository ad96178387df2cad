"""Checkpoints of a training run: safetensors and JSON, never pickle; whatever moment the process dies at, an intact one is left.

``checkpoint-00000060/`` holds ``state.safetensors``, every tensor under its slash path, and ``state.json``: the step, the structure around the
tensors, size and SHA-256 of the tensor file, and first the SHA-256 of its own other bytes. A byte changed anywhere is therefore seen.

It is written as ``checkpoint-00000060.part``, made durable (files, then folder), renamed, and the rename made durable; only then do older ones
go. A ``.part`` is never read and is removed by the next save. Saving a step that is there already moves the old one to ``.old``, which counts
until the new one stands.

A state is nested dicts, lists and tuples of tensors, None, bools, ints, floats and strings, as ``state_dict()`` gives. Dict keys are strings or
ints and stay what they were, in order; tuples stay tuples, their subclasses (torch.Size) and those of dict become plain. Tensors come back bit
for bit, on the CPU, owned and contiguous, without requires_grad; tied ones come back as equal copies. The quantised tensors of torchao's
optimizers are taken apart and put together by their own methods; no other class is ever looked up by a name from a file.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from experiments.runs import WrongInput, sha256

FORMAT = 1
TENSORS, SKELETON = "state.safetensors", "state.json"
NAME = re.compile(r"checkpoint-(\d+)(\.old)?")
SEAL = b'{"digest": "%s", '
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SUBCLASSES = frozenset(
    {
        "torchao.optim.subclass_8bit.OptimState8bit",
        "torchao.optim.subclass_4bit.OptimState4bit",
        "torchao.optim.subclass_fp8.OptimStateFp8",
    }
)


class CheckpointError(WrongInput):
    """A checkpoint that cannot be written or read; one line says which and why."""


def save(folder: Path, step: int, state: Any, keep: int = 2) -> Path:
    """Write ``state`` as the checkpoint of ``step`` and remove all older ones but the last ``keep`` − 1 complete ones.

    Checkpoints of later steps, which can only be damaged ones that a resumed run passed over, stay until their step is saved again or passed.
    Raises CheckpointError when there is no room, with everything as it was before; TypeError for a value that is not a state.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"checkpoint.save(step={step}, keep={keep}): step must be at least 0 and keep at least 1")
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_encode(state, "", tensors))
    _separate(tensors)
    path = folder / f"checkpoint-{step:08d}"
    part = path.with_name(f"{path.name}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sync(folder.parent)
        for left in folder.glob("checkpoint-*.part"):
            shutil.rmtree(left)
        part.mkdir()
        save_file(tensors, part / TENSORS)
        _sync(part / TENSORS)
        file = {"bytes": (part / TENSORS).stat().st_size, "sha256": sha256(part / TENSORS)}
        body = f'{{"format": {FORMAT}, "step": {step}, "tensors": {json.dumps(file)}, "state": {skeleton}}}\n'
        (part / SKELETON).write_bytes(_sealed(body.encode()))
        _sync(part / SKELETON)
        _sync(part)
        _put(part, path)
        _sync(folder)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if _code(error) not in FULL:
            raise
        needed = sum(t.nbytes for t in tensors.values()) + len(skeleton)
        kept = next((p.name for _, p in _found(folder) if _complete(p)), None)
        raise CheckpointError(
            f"{path} was not written, no room ({os.strerror(_code(error))}): it needs {needed:,} bytes; "
            + (f"{kept} is kept" if kept else "there is no earlier one")
        ) from error
    _prune(folder, step, keep)
    return path


def load_latest(folder: Path, say: Callable[[str], None]) -> tuple[int, Any] | None:
    """(step, state) of the newest intact checkpoint in ``folder``, or None; ``say`` hears one line of every damaged one passed over."""
    damaged: list[CheckpointError] = []
    loaded, used = None, "no intact one is left"
    for _, path in _found(folder):
        try:
            loaded, used = load(path), f"{path.name} is used instead"
            break
        except CheckpointError as error:
            damaged.append(error)
    for error in damaged:
        say(f"{error}; {used}")
    return loaded


def load(path: Path) -> tuple[int, Any]:
    """(step, state) of one checkpoint. Raises CheckpointError when it is not, byte for byte, what was written."""
    record = _record(path)
    try:
        if sha256(path / TENSORS) != record["tensors"]["sha256"]:
            raise CheckpointError(f"{path} is damaged: the contents of {TENSORS} changed")
        with safe_open(path / TENSORS, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  clone: not a view of the mapped file
        return record["step"], _decode(record["state"], tensors)
    except (OSError, SafetensorError, ImportError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _record(path: Path) -> dict[str, Any]:
    """The verified contents of state.json; the tensor file is there with its size, its contents not yet verified."""
    try:
        raw = (path / SKELETON).read_bytes()
        if raw != _sealed(b"{" + raw[len(SEAL % (b"0" * 64)) :]):
            raise CheckpointError(f"{path} is damaged: the contents of {SKELETON} changed")
        record = json.loads(raw)
        if record["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {record['format']}, this version reads format {FORMAT}")
        name = NAME.fullmatch(path.name)
        if name and int(name[1]) != record["step"]:
            raise CheckpointError(f"{path} is damaged: it holds step {record['step']}")
        found, written = (path / TENSORS).stat().st_size, record["tensors"]["bytes"]
        if found != written:
            raise CheckpointError(f"{path} is damaged: {TENSORS} has {found:,} bytes, {written:,} were written")
        return record
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is damaged: {Path(error.filename).name} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _complete(path: Path) -> bool:
    try:
        return bool(_record(path))
    except CheckpointError:
        return False


def _found(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of all that have the name of a checkpoint, newest first, the ``.old`` of a step after the one that replaced it."""
    named = [(NAME.fullmatch(p.name), p) for p in (folder.iterdir() if folder.is_dir() else ())]
    return sorted(((int(m[1]), p) for m, p in named if m), key=lambda found: (found[0], found[1].suffix != ".old"), reverse=True)


def _put(part: Path, path: Path) -> None:
    if path.exists():
        old = path.with_name(f"{path.name}.old")
        if old.exists():
            _remove(old)
        path.rename(old)
    part.rename(path)


def _prune(folder: Path, step: int, keep: int) -> None:
    older = [p for s, p in _found(folder) if s < step]
    kept = [p for p in older if _complete(p)][: keep - 1]
    replaced = folder / f"checkpoint-{step:08d}.old"
    for path in [p for p in older if p not in kept] + [replaced] * replaced.exists():
        _remove(path)


def _remove(path: Path) -> None:
    """Under a name that is never read, so that one half removed is not taken for a damaged one."""
    shutil.rmtree(path.rename(path.with_name(f"{path.name}.part")))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sealed(body: bytes) -> bytes:
    """A JSON object with the digest of its bytes as its first entry."""
    return SEAL % hashlib.sha256(body).hexdigest().encode() + body[1:]


def _code(error: BaseException) -> int:
    """The errno of a failed system call, 0 for other errors; safetensors gives it in its text only."""
    if isinstance(error, OSError):
        return error.errno or 0
    code = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return int(code[1]) if code else 0


def _separate(tensors: dict[str, Tensor]) -> None:
    """Clone what shares its storage with another, which safetensors refuses to write."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen:
            tensors[name] = tensor.clone()
        seen.add(storage)


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON. What JSON has no form for is an object with one of the markers of ``_decode``; its tensors go to ``tensors``."""
    inner = f"{path}/" if path else ""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{inner}{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
        return {"dict": [[key, _encode(item, f"{inner}{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, Tensor):
        value = value.detach() if isinstance(value, nn.Parameter) else value
        if (kind := f"{type(value).__module__}.{type(value).__qualname__}") in SUBCLASSES:
            names, context = value.__tensor_flatten__()
            parts = [[name, _encode(getattr(value, name), f"{inner}{name}", tensors)] for name in names]
            shape = [list(value.shape), list(value.stride())]
            return {"subclass": kind, "parts": parts, "context": _encode(context, path, tensors), "shape": shape}
        if type(value) is Tensor and value.layout == torch.strided and value.dtype != torch.complex128:  # safetensors has no complex128
            while path in tensors or path in ("", "__metadata__"):  # {"a": {"b": x}, "a/b": y}; the name that safetensors reserves
                path += "'"
            tensors[path] = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
            return {"tensor": path}
    raise TypeError(
        f"checkpoint.save: {path or 'the state'} is a {type(value).__qualname__}, or has keys or a dtype, that a checkpoint cannot hold"
    )


def _decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    match node:
        case list():
            return [_decode(item, tensors) for item in node]
        case {"dict": items}:
            return {key: _decode(item, tensors) for key, item in items}
        case {"tuple": items}:
            return tuple(_decode(item, tensors) for item in items)
        case {"tensor": name}:
            return tensors[name]
        case {"float": text}:
            return float(text)
        case {"dtype": name}:
            return getattr(torch, name)
        case {"subclass": kind, "parts": parts, "context": context, "shape": [shape, stride]}:
            if kind not in SUBCLASSES:
                raise CheckpointError(f"this version does not know the tensor class {kind}")
            module, _, name = kind.rpartition(".")
            inner = {part: _decode(item, tensors) for part, item in parts}
            build = getattr(importlib.import_module(module), name).__tensor_unflatten__
            return build(inner, _decode(context, tensors), torch.Size(shape), tuple(stride))
    return node
