"""The console command `edc-hub`. A subcommand is imported when it is asked for, so that `--help` needs no torch."""

import difflib
import sys
from importlib import import_module

from . import __version__
from .errors import STOPPED, InputError


_COMMANDS = {
    "condense": "condense a real image set: observers, moments, synthesis, soft labels, controls",
    "evaluate": "train students from a condensed set and report their accuracy beside its controls",
    "sweep": "a table of overrides x seeds, what they share made once, with the paper's figures beside ours",
    "publish": "a finished run goes to the Hub: one commit that holds images, labels and card, and one tag",
    "relabel": "label anyone's images by a recipe's observers: the same folder, under the same protocol",
    "diagnose": "what a finished run is like inside: curvature, gradients, moments, what observers and students see",
    "showcase": "accuracy of the lines of code that a set's card shows, for all of it and for its prefixes",
    "doctor": "what works here and what to do about what does not: versions, devices, token, endpoint, disk, source",
}


def main(argv: list[str] | None = None) -> int:
    """Runs `edc-hub COMMAND ...` and returns the exit status: 0 done, 2 the user's input is wrong, 1 anything else.

    The module of a command has `main(argv)`, which returns the status.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in _COMMANDS:
            return import_module(f".{argv[0]}", __package__).main(argv[1:])
        from . import launch

        return launch.status(lambda: _without_command(argv))
    except KeyboardInterrupt:  # while it was imported
        print(STOPPED, file=sys.stderr, flush=True)
        return 130


def _without_command(argv: list[str]) -> None:
    word = argv[0] if argv else None
    if word in ("-h", "--help"):
        print(_usage())
    elif word == "--version":
        print(__version__)
    else:
        near = difflib.get_close_matches(word or "", _COMMANDS, 1)
        wrong = f"unknown command '{word}'" if word else "a command is missing"
        meant = f"did you mean '{near[0]}'?" if near else f"write one of: {', '.join(_COMMANDS)}"
        raise InputError(f"{wrong}; {meant} (see edc-hub --help)")


def _usage() -> str:
    width = max(map(len, _COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {meaning}" for name, meaning in _COMMANDS.items())
    return (
        f"usage: edc-hub COMMAND ...\n\n{commands}\n\n"
        f"  --help     this text; edc-hub COMMAND --help has the keys and flags of a command\n"
        f"  --version  the version of edc-hub\n\n"
        f"On several devices: accelerate launch -m edc_hub.COMMAND ..."
    )


if __name__ == "__main__":
    sys.exit(main())
