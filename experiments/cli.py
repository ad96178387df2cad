"""The command ``lowrank``: one question, an optional preset, and fields as flags. Wrong input ends with one line and exit code 2."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from experiments.arguments import WIDEST, configuration

QUESTIONS = {
    "validate": "predicted against measured moments and errors of every law, on synthetic or real gradients",
    "dynamics": "exact expected loss curves, stable steps and error feedback on a quadratic, against simulation",
    "data": "tokenizer and token files with a manifest, from the default corpus, local text or C4",
    "pretrain": "train a LLaMA with a low-rank gradient estimator, full AdamW, LoRA, ReLoRA, GaLore and others; resumable",
    "compare": "laws and baselines in one grid: tuned on equal budgets, paired by seed",
    "scaling": "fit one scaling law to runs of several sizes: does it describe them, and what is each estimator worth in tokens of full AdamW",
    "finetune": "fine-tune a pretrained model on few examples, with gradients or forward passes alone: accuracy, memory, seconds",
    "continual": "learn tasks one after the other with AdamW, LoRA, GORP and LowRank-IPA: average accuracy and forgetting",
    "optimizers": "the optimizers whose state lives in a frame: state bytes, bias and variance, mean update, and how each was verified",
    "lens": "a gradient in tokens: of a prompt, of singular directions, and what estimators keep of it",
    "bench": "times and bytes beside the machine's limits, full AdamW, LoRA and published packages, as ratios in one run",
    "memory": "bytes of a training step by category and bytes sent by collective, predicted for any number of devices, or measured",
    "memory measure": "bytes of a training step by category of every method, RoBERTa-large and LLaMA up to 7B, without hardware",
    "plan": "where sending m×r for m×n pays: memory and step time on up to 1,024 devices, by bandwidth and batch; measured with two processes",
    "advise": "which law, rank and K for your model and text: predicted error, memory and time, the Pareto set, one recommendation",
    "ranks": "a rank for every layer by spectra of weights, by gradients or uniform, at one budget: angles, factorised export, comparison",
    "report": "one self-contained HTML page from finished runs",
    "publish": "write finished runs as small CSV files with provenance into experiments/results",
    "completion": "a script that completes questions, presets and flags in bash or zsh",
    "demo": "validate on synthetic and tiny-LLaMA gradients, dynamics, optimizers, a short training run, and the report of all",
}
JSON = "--json"  # anywhere
MODULES = {"memory measure": "footprints"}  # of questions in two words

USAGE = """usage: lowrank QUESTION [PRESET] [--field value ...]

{questions}

lowrank QUESTION --help lists its fields with units and defaults, lowrank QUESTION PRESET --help those of a preset. --json after any question
writes its rows as one line for machines, to standard output; everything else goes to standard error.

Examples:
  lowrank demo
  lowrank validate --law gaussian haar_stiefel --shapes 12x20 --ratio 0.25
  lowrank validate --model tiny --steps 300
  lowrank validate --model smollm2
  lowrank dynamics --n 16 --rank 4 --lr 0.25
  lowrank pretrain tiny --law haar_stiefel --rank 0.25 --lr 3e-3
  lowrank pretrain tiny --method adamw
  lowrank pretrain tiny --method galore --rank 32 --lr 1e-2
  lowrank scaling cpu
  lowrank optimizers
  lowrank finetune --method adamw lowrank:spectral mezo --k 16
  lowrank lens --prompt "Water boils at a hundred degrees."
  lowrank continual --task r8 imdb --method lora gorp
  lowrank memory 7b --law haar_stiefel --rank 1024 --world-size 8 --shard fsdp
  lowrank memory measure roberta-large
  lowrank plan --model 70b --devices 64 1024
  lowrank advise --model smollm2 --data my.jsonl --budget-gb 2
  lowrank report runs/validate-* runs/dynamics-*

Exit codes: 0 done, and all that was checked holds; 1 a check did not hold, or a run could not go on; 2 wrong input, one line on standard
error says what and what instead; 130 interrupted, the same command continues."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        code = _answered(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has seen enough, as `head` and `less` have
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes when it ends
        return 0


def _answered(arguments: list[str]) -> int:
    os.environ.setdefault("MPLBACKEND", "Agg")  # figures go to files, never to a window
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(min(shutil.get_terminal_size().columns, WIDEST)))
        return 0
    if arguments[0] == "--version":
        print(f"lowrank {version('lowrank-gradients')}")
        return 0
    as_json, arguments = JSON in arguments, [word for word in arguments if word != JSON]
    words = 2 if " ".join(arguments[:2]) in QUESTIONS else 1
    question, rest = " ".join(arguments[:words]), arguments[words:]
    if question not in QUESTIONS:
        return _refuse(f"unknown question {question!r}, known are {', '.join(QUESTIONS)}")
    module = import_module(f"experiments.{MODULES.get(question, question)}")
    try:
        config = configuration(question, module, rest)
    except ValueError as error:
        return _refuse(f"{question}: {error}")
    if config is None:
        return 0
    from experiments import runs
    from experiments.pages import summary

    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            result = module.main(config)
    except runs.WrongInput as error:
        return _refuse(f"{question}: {error}")
    except runs.Stopped as stop:
        _tell(f"{question}: {stop}")
        return stop.code
    except KeyboardInterrupt:
        _tell(f"{question}: interrupted; the same command continues with what is not done")
        return 130

    if not _speaks():
        return 0
    return summary.written(result) if as_json else summary.show(result)


def usage(width: int) -> str:
    """The map of the questions in lines of ``width`` characters, examples as they are."""
    longest = max(map(len, QUESTIONS))
    beside = " " * (longest + 4)
    lines = [
        textwrap.fill(f"  {name:<{longest}}  {text}", width, subsequent_indent=beside, break_on_hyphens=False)
        for name, text in QUESTIONS.items()
    ]
    blocks = [
        block if "\n  " in block or block.startswith("{") else textwrap.fill(block, width, break_on_hyphens=False)
        for block in USAGE.split("\n\n")
    ]
    return "\n\n".join(blocks).format(questions="\n".join(lines))


def _refuse(message: str) -> int:
    _tell(message)
    return 2


def _tell(message: str) -> None:
    if _speaks():
        print(f"lowrank: {message}", file=sys.stderr)


def _speaks() -> bool:
    """Of several processes that torchrun started, one speaks."""
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
