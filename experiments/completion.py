"""Completion of the command for a shell: questions, their presets, and the flags of each, as they are now.

Examples:

    lowrank completion > ~/.local/share/bash-completion/completions/lowrank
    eval "$(lowrank completion --shell zsh)"
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, Literal

from experiments import cli


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write the script to standard output."""

    shell: Literal["bash", "zsh"] = "bash"
    """bash or zsh."""


def main(config: Config) -> None:
    """Write the script."""
    sys.stdout.write(script(config.shell))


def words() -> dict[str, list[str]]:
    """Question → its presets and flags."""
    found = {}
    for question in cli.QUESTIONS:
        module: Any = import_module(f"experiments.{cli.MODULES.get(question, question)}")
        flags = [f"--{field.name.replace('_', '-')}" for field in fields(module.Config)]
        found[question] = [*getattr(module, "PRESETS", {}), *flags, "--help", cli.JSON]
    return found


def script(shell: str) -> str:
    """For bash; in zsh the same through bashcompinit."""
    cases = [f'    "{question}") known="{" ".join(known)}" ;;' for question, known in words().items()]
    lines = [
        *(["autoload -U +X bashcompinit && bashcompinit"] if shell == "zsh" else []),
        "_lowrank() {",
        '  local known first="${COMP_WORDS[1]}" two="${COMP_WORDS[1]} ${COMP_WORDS[2]}" question',
        f'  local questions="{" ".join(question for question in cli.QUESTIONS if " " not in question)}"',
        '  question="$first"',
        *(
            f'  if [ "$two" = "{question}" ] && [ "$COMP_CWORD" -gt 2 ]; then question="$two"; fi'
            for question in cli.QUESTIONS
            if " " in question
        ),
        '  case "$question" in',
        *cases,
        "    *) known= ;;",
        "  esac",
        '  if [ "$COMP_CWORD" -le 1 ]; then known="$questions --help"; fi',
        *(
            f'  if [ "$first" = "{question.split()[0]}" ] && [ "$COMP_CWORD" -eq 2 ]; then known="{question.split()[1]} $known"; fi'
            for question in cli.QUESTIONS
            if " " in question
        ),
        '  local word="${COMP_WORDS[$COMP_CWORD]}" line',
        "  COMPREPLY=()",
        '  while IFS= read -r line; do COMPREPLY+=("$line"); done < <(compgen -W "$known" -- "$word")',
        '  if [ "$COMP_CWORD" -gt 1 ] && [ "${word#-}" = "$word" ]; then',
        '    while IFS= read -r line; do COMPREPLY+=("$line"); done < <(compgen -f -- "$word")',
        "    compopt -o filenames 2> /dev/null",
        "  fi",
        "}",
        "complete -F _lowrank lowrank",
    ]
    return "\n".join(lines) + "\n"
