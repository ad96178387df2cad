"""The words after a question become its configuration: ``--help`` as a page, and one line that says what is wrong and what there is instead."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from experiments import allowed

WIDEST = 120  # characters of a line of help
QUOTE = "'"
WORDS = {"INT": "an integer", "FLOAT": "a number", "PATH": "a path", "STR": "a word", "|": " or "}


def configuration(question: str, module: Any, arguments: Sequence[str]) -> Any:
    """The ``Config`` of a question's module, with the defaults of the preset that the first word names; None after ``--help``.

    Raises ``ValueError`` with one line.
    """
    import tyro

    presets, arguments = getattr(module, "PRESETS", {}), list(arguments)
    options: dict[str, Any] = {}
    name = " [PRESET]" if presets else ""
    if presets and arguments and not arguments[0].startswith("-"):
        preset, *arguments = arguments
        if preset not in presets:
            raise ValueError(f"unknown preset {preset!r}, known are {', '.join(presets)}")
        options["default"], name = presets[preset], f" {preset}"
    if {"-h", "--help"} & set(arguments):
        print(page(module, min(shutil.get_terminal_size().columns, WIDEST)), end="\n\n")
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            config = tyro.cli(module.Config, args=arguments, prog=f"lowrank {question}{name}", description="", **options)
    except SystemExit as stop:
        if not stop.code:
            return None
        raise ValueError(one_line(question, told.getvalue())) from None
    allowed.seeds(config)
    return config


def page(module: Any, width: int) -> str:
    """What stands above the options: the module's docstring in lines of ``width`` characters with its examples, and the presets."""
    parts: list[str] = []
    for block in (module.__doc__ or "").strip("\n").split("\n\n"):
        if block.startswith("    "):
            parts.append(block if parts[-1].endswith(":") else f"Examples:\n\n{block}")
        else:
            parts.append(textwrap.fill(" ".join(block.replace("``", "").split()), width))
    if presets := getattr(module, "PRESETS", {}):
        parts.append(
            textwrap.fill(f"Presets: {', '.join(presets)}. The defaults below are those of the preset that is named, or of none.", width)
        )
    return "\n\n".join([*parts, "Exit codes and --json: lowrank --help."])


def one_line(question: str, message: str) -> str:
    """tyro's boxed message in one line.

    >>> one_line("validate", "Error parsing --seed: invalid literal for int() with base 10: 'x'\\nArgument helptext:\\n --seed INT\\n Of everything.")
    "--seed takes an integer, got 'x'"
    """
    lines = [line.strip("│| ") for line in re.sub(r"\x1b\[[0-9;]*m", "", message).splitlines()]
    lines = [line for line in lines if line and line[0] not in "╭╰─+" and not re.match(r"-{5}|For full helptext", line)]
    line = re.sub(r"\s+", " ", " ".join(lines))
    if found := re.search(r"Error parsing (--\S+): (.*?) Argument helptext:", line):
        flag, what = found.groups()
        kind = lines[lines.index("Argument helptext:") + 1].removeprefix(flag)
        given = re.search(r"\[('.*?')\]|('[^']*')$", what)  # a list of words, or the last one
        return f"{flag} takes {_words(kind)}, got {(given[1] or given[2]).replace(',', '') if given else what}"
    if found := re.search(r"invalid choice ('.*?') for argument '(--\S+)'\. Expected one of \((.*?)\)", line):
        given, flag, known = found.groups()
        return f"unknown {flag} {given}, known are {known.replace(QUOTE, '')}"
    if found := re.search(r"Unrecognized options: (\S+?),?(?: |$)(?:.*Perhaps you meant: (--\S+))?", line):
        given, meant = found.groups()
        if not given.startswith("-"):
            return f"unexpected word {given!r}; options begin with --, `lowrank {question} --help` lists them"
        return f"unknown option {given}, " + (f"did you mean {meant}?" if meant else f"`lowrank {question} --help` lists them")
    if found := re.search(r"Missing value for argument '(--\S+)'. Expected (\d+) values", line):
        flag, count = found.groups()
        return f"{flag} needs {'a value' if count == '1' else f'{count} values'}"
    return re.sub(r"^(Value error )?Error parsing Config: ", "", line) or "wrong arguments"


def _words(kind: str) -> str:
    """What tyro calls the kind of a value.

    >>> _words("[FLOAT|{r/n} [FLOAT|{r/n} ...]]")
    'a number or r/n, one or several'
    """
    one, *more = kind.strip(" []").split(" [")
    for short, word in WORDS.items():
        one = one.replace(" " + short, f" and {word}").replace(short, word)
    return re.sub(r"[{}]", "", one) + (", one or several" if more else "")
