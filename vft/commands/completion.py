"""``vft completion``: a script by which a shell completes the words of ``vft``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

HELP = 'Print a completion script: eval "$(vft completion bash)" in ~/.bashrc, or zsh in ~/.zshrc.'
SHELLS = ("bash", "zsh")

_SCRIPT = """_vft() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} words=
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    else
        case "${{COMP_WORDS[1]}} $before" in
{choices}
        *)
            case "${{COMP_WORDS[1]}}" in
{options}
            esac ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    case "$word" in
    -*) ;;
    *) [ "$COMP_CWORD" -gt 1 ] && COMPREPLY+=($(compgen -f -- "$word")) ;;
    esac
}}
complete -o filenames -F _vft vft
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="which shell it is for")


def run(args: argparse.Namespace) -> None:
    # zsh reads completions written for bash
    start = "autoload -Uz bashcompinit && bashcompinit\n" if args.shell == "zsh" else ""
    print(start + script(), end="")


def script() -> str:
    """The script for bash, made from the arguments of all commands."""
    from vft.cli import COMMANDS

    choices, options = [], []
    for command in COMMANDS:
        actions = list(_actions(command))
        names = sorted({name for action in actions for name in action.option_strings})
        positional = sorted({str(c) for a in actions if not a.option_strings and a.choices for c in a.choices})
        options.append(f'            {command}) words="{" ".join([*positional, *names])}" ;;')
        for action in actions:
            if action.option_strings and action.choices:
                pattern = "|".join(f'"{command} {name}"' for name in action.option_strings)
                choices.append(f'        {pattern}) words="{" ".join(map(str, action.choices))}" ;;')
    return _SCRIPT.format(
        commands=" ".join(COMMANDS), choices="\n".join(dict.fromkeys(choices)), options="\n".join(options)
    )


def _actions(command: str) -> Iterator[argparse.Action]:
    """The arguments of a command, of each kind of training in turn."""
    from vft.cli import parser_of

    from .train import KINDS

    for words in [[command, kind] for kind in KINDS] if command == "train" else [[command]]:
        yield from parser_of(words)._actions
