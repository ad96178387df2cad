"""Checkpoints: bit for bit what was saved, or nothing; and always one to go on from."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.training import checkpoint
from experiments.training.checkpoint import SKELETON, TENSORS, CheckpointError, load, load_latest, save

ROOT = Path(__file__).parent.parent.parent
DYING = """
import json, os, random, resource, shutil, signal, sys, time
from pathlib import Path
import torch
from experiments.training.checkpoint import CheckpointError, load_latest, save

folder = Path(sys.argv[1])
def put(step, value, size=8, keep=1):
    save(folder, step, {"w": torch.full((size,), value), 7: {"n": [value]}}, keep)
def fork(work, *arguments):
    child = os.fork()
    if not child:
        try:
            work(*arguments)
        finally:
            os._exit(0)
    return child
def consistent():
    step, state = load_latest(folder, sys.exit)
    assert (state["w"] == state[7]["n"][0]).all()
    return step, state[7]["n"][0]
def die_at(call, *what):
    count = 0
    def hook(event, arguments):
        nonlocal count
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            count += 1
            if count > call:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    put(*what)
def everywhere(*what):
    before, outcomes = consistent(), []
    while os.WIFSIGNALED(os.waitpid(fork(die_at, len(outcomes), *what), 0)[1]):
        outcomes.append(consistent())
        shutil.rmtree(folder)
        put(*before)
    assert consistent() == what and len(list(folder.iterdir())) == 1
    return len(outcomes), sorted({*outcomes}) == sorted([before, what])
def loop():
    for step in range(consistent()[0] + 1, 10**6):
        put(step, float(step), 1 << 19, 2)
def full():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    try:
        put(10**6, 0.0, 1 << 20)
    except CheckpointError as error:
        (folder / "full").write_text(str(error))
put(1, 1.0)
result = {"new": everywhere(2, 2.0), "again": everywhere(2, 3.0)}
draw, cut, last = random.Random(0), 0, 2
for _ in range(20):
    child = fork(loop)
    time.sleep(draw.uniform(0.005, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    cut += any(p.suffix == ".part" for p in folder.iterdir())
    assert consistent()[0] >= last
    last = consistent()[0]
os.waitpid(fork(full), 0)
assert consistent()[0] == last and not list(folder.glob("*.part"))
print(json.dumps({**result, "cut": cut, "last": last, "full": (folder / "full").read_text()}))
"""


def same(a: Any, b: Any) -> bool:
    """Equal in structure, types and bits."""
    if flatten := getattr(a, "__tensor_flatten__", None):
        names, context = flatten()
        return type(a) is type(b) and context == b.__tensor_flatten__()[1] and all(same(getattr(a, n), getattr(b, n)) for n in names)
    if isinstance(a, Tensor):
        bits = [t.detach().resolve_conj().reshape(-1).contiguous().view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, dict):
        return isinstance(b, dict) and same([*a], [*b]) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def small(value: float = 1.0) -> dict[str, Any]:
    return {"w": torch.full((3,), value), "n": 1}


def test_every_kind_of_value_comes_back_bit_for_bit(tmp_path: Path, generator: torch.Generator) -> None:
    w = torch.randn(6, 5, generator=generator)
    bits = torch.randint(256, (64,), generator=generator, dtype=torch.uint8)
    state = {
        "dtypes": {d: bits.view(getattr(torch, d)) for d in ("bfloat16", "float16", "float32", "float64", "int64", "int32", "uint8")},
        "bool": w > 0,
        "scalar": torch.tensor(math.pi, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "tied": [w, w, w[1:3], w.view(-1)],
        "strided": (w.mT, w[::2, 1], w.expand(2, 6, 5)),
        "parameter": nn.Parameter(w.clone()),
        "imaginary": torch.complex(w, w).conj(),
        "": {0: {"0": 1}, "0": {0: 2}, "a/b": w + 1, "a": {"b": w + 2}, -1: {}, "__metadata__": w},
        "plain": [None, True, 1, 2**127, 0.1, -0.0, math.nan, math.inf, -math.inf, "é\n\ud800", [], (), {"tensor": "bool"}],
        "generator": generator.get_state(),
        "__metadata__": w + 3,
    }
    assert same(load(save(tmp_path, 3, state))[1], state)
    assert same(load(save(tmp_path, 4, w))[1], w)


@pytest.mark.parametrize(
    "value", [[object()], {1.5: 1}, {True: 1}, {1, 2}, torch.eye(2).to_sparse(), torch.zeros(2, dtype=torch.complex128)]
)
def test_what_cannot_be_held_is_refused_before_anything_is_touched(tmp_path: Path, value: Any) -> None:
    save(tmp_path, 1, small())
    with pytest.raises(TypeError, match="a checkpoint cannot hold"):
        save(tmp_path, 2, {"a": value})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000001"]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    **{n: lambda p, n=n: getattr(pytest.importorskip("torchao.optim"), n)(p, lr=1e-2) for n in ("AdamW8bit", "AdamW4bit", "AdamWFp8")},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_takes_the_same_steps(tmp_path: Path, name: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False))
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1, generator=draws)
    other = copy.deepcopy(model)
    optimizer, again = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](other.parameters())

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
        with torch.compiler.set_stance("force_eager"):
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(8, 64, generator=generator)).square().mean().backward()
                optimizer.step()

    train(model, optimizer, draws)
    save(tmp_path, 3, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": draws.get_state()})
    train(model, optimizer, draws)

    step, state = load_latest(tmp_path, pytest.fail) or (0, {})
    other.load_state_dict(state["model"])
    again.load_state_dict(state["optimizer"])
    draws.set_state(state["generator"])
    train(other, again, draws)
    assert step == 3 and same(dict(other.state_dict()), dict(model.state_dict())) and same(again.state_dict(), optimizer.state_dict())
    assert ("subclass" in (tmp_path / "checkpoint-00000003" / SKELETON).read_text()) == (name not in ("AdamW", "SGD"))


def test_no_class_is_looked_up_by_a_name_from_a_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1, small())
    body = b"{" + (path / SKELETON).read_bytes()[len(checkpoint.SEAL % (b"0" * 64)) :]
    evil = body.replace(b'["n", 1]', b'["n", {"subclass": "os.system", "parts": [], "context": null, "shape": [[], []]}]')
    (path / SKELETON).write_bytes(checkpoint._sealed(evil))
    with pytest.raises(CheckpointError, match=r"does not know the tensor class os\.system"):
        load(path)


def test_every_single_changed_byte_is_seen(tmp_path: Path) -> None:
    path = save(tmp_path, 1, small())
    for file in (path / TENSORS, path / SKELETON):
        raw = file.read_bytes()
        for i in range(len(raw)):
            file.write_bytes(raw[:i] + bytes([raw[i] ^ (1 << i % 8)]) + raw[i + 1 :])
            with pytest.raises(CheckpointError, match=f"damaged: the contents of {file.name} changed"):
                load(path)
        file.write_bytes(raw)
    assert same(load(path)[1], small())


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tensors": (lambda p: (p / TENSORS).unlink(), "state.safetensors is missing"),
    "no skeleton": (lambda p: (p / SKELETON).unlink(), "state.json is missing"),
    "cut tensors": (lambda p: os.truncate(p / TENSORS, 50), "state.safetensors has 50 bytes, "),
    "longer tensors": (lambda p: (p / TENSORS).open("ab").write(b"0"), "state.safetensors has "),
    "cut skeleton": (lambda p: os.truncate(p / SKELETON, 100), "the contents of state.json changed"),
    "not JSON": (lambda p: (p / SKELETON).write_bytes(b"\xff\x00{"), "the contents of state.json changed"),
    "another's name": (lambda p: p.rename(p.with_name("checkpoint-00000070")), "it holds step 60"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_one_is_passed_over_and_named(tmp_path: Path, kind: str) -> None:
    for step in (40, 60):
        save(tmp_path, step, small(float(step)))
    damage, why = DAMAGES[kind]
    damage(tmp_path / "checkpoint-00000060")
    said: list[str] = []
    step, state = load_latest(tmp_path, said.append) or (0, {})
    assert step == 40 and same(state, small(40.0))
    (line,) = said
    assert line.startswith(f"{tmp_path}/checkpoint-000000") and why in line and line.endswith("; checkpoint-00000040 is used instead")
    (tmp_path / "checkpoint-00000040" / TENSORS).unlink()
    assert load_latest(tmp_path, said.append) is load_latest(tmp_path / "none", pytest.fail) is None
    assert len(said) == 3 and all(line.endswith("; no intact one is left") for line in said[1:])


def test_the_last_complete_ones_are_kept(tmp_path: Path) -> None:
    def steps() -> list[int]:
        return sorted(int(p.name.removeprefix("checkpoint-")) for p in tmp_path.iterdir())

    for step in range(0, 100, 20):
        save(tmp_path, step, small(), keep=3)
    assert steps() == [40, 60, 80]
    DAMAGES["cut tensors"][0](tmp_path / "checkpoint-00000080")
    save(tmp_path, 70, small(), keep=2)
    assert steps() == [60, 70, 80]
    save(tmp_path, 80, small(8.0), keep=2)
    assert steps() == [70, 80] and same(load_latest(tmp_path, pytest.fail), (80, small(8.0)))
    DAMAGES["cut skeleton"][0](tmp_path / "checkpoint-00000080")
    save(tmp_path, 90, small())
    assert steps() == [70, 90]
    with pytest.raises(ValueError, match="keep=0"):
        save(tmp_path, 1, small(), keep=0)


def test_the_old_go_only_when_the_new_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, small())
    order: list[str] = []
    for where, name, word in ((checkpoint, "_sync", "sync"), (Path, "rename", "rename"), (checkpoint.shutil, "rmtree", "remove")):
        call = getattr(where, name)
        monkeypatch.setattr(where, name, lambda p, *a, f=call, w=word: (order.append(f"{w} {p.name}"), f(p, *a))[1])
    save(tmp_path, 2, small(), keep=1)
    old, new = "checkpoint-00000001", "checkpoint-00000002.part"
    synced = [f"sync {name}" for name in (tmp_path.parent.name, TENSORS, SKELETON, new)]
    assert order == [*synced, f"rename {new}", f"sync {tmp_path.name}", f"rename {old}", f"remove {old}.part"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("at", range(5))
def test_a_failing_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, at: int) -> None:
    folder = tmp_path / "run"
    if at:
        save(folder, 1, small())
    errors = iter([*[None] * (at - 1), OSError(code, os.strerror(code))])

    def fails(_: int) -> None:
        if error := next(errors):
            raise error

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError if code == errno.EIO else CheckpointError) as raised:
        save(folder, 2, small())
    monkeypatch.undo()
    kept = "checkpoint-00000001 is kept" if at else "there is no earlier one"
    line = rf"{folder}/checkpoint-00000002 was not written, no room \([\w ]+\): it needs \d+ bytes; {kept}"
    assert code == errno.EIO or re.fullmatch(line, str(raised.value))
    assert [p.name for p in folder.iterdir()] == ["checkpoint-00000001"] * bool(at)
    assert not at or same(load_latest(folder, pytest.fail), (1, small()))


def test_what_was_loaded_outlives_its_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {"w": torch.arange(1 << 16)})
    _, state = load(path)
    with (path / TENSORS).open("r+b") as file:
        file.write(b"\0" * (1 << 18))
    state["w"] += 1
    assert torch.equal(state["w"], torch.arange(1, (1 << 16) + 1))
    assert sys.platform != "linux" or str(path) not in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="forks, audits and limits file sizes")
def test_killed_at_any_moment_or_out_of_room_an_intact_one_is_left(tmp_path: Path) -> None:
    """Killed before every system call of a save, of a new step and of one that is there; then at random moments; then without room."""
    command, environment = [sys.executable, "-c", DYING, str(tmp_path / "run")], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    for calls, before_or_after in (result["new"], result["again"]):
        assert calls > 10 and before_or_after
    assert result["cut"] > 3 and result["last"] > 10
    line = f"{tmp_path}/run/checkpoint-01000000 was not written, no room (File too large): it needs 4,194,"
    assert result["full"].startswith(line) and result["full"].endswith(f"; checkpoint-{result['last']:08d} is kept")
