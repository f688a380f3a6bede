"""What works here, and what to do about what does not: what a bug report needs.

    edc-hub doctor [RECIPE] [--section.key value ...]

One line a check on stdout: `ok`, `FAIL`, or `warn` where the recipe given does without. All but `ok` end with what to
do. The status is 1 where one fails.
"""

import sys
from collections.abc import Iterator
from functools import partial

from . import arguments, checks, disk, documents, launch, recipes
from .checks import Finding
from .errors import InputError
from .recipe import Recipe


_USAGE = """\
usage: edc-hub doctor [RECIPE] [--section.key value ...]

Checks versions, devices, the Hub's endpoint, xet, the token and its write permission, and free disk; with a recipe
also its device, source and weights, without downloading them. Exits with 1 if a check fails."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 all is well, 1 something is not, 2 the recipe is wrong."""
    failed: list[Finding] = []
    given = sys.argv[1:] if argv is None else argv
    return launch.status(lambda: failed.extend(command(given))) or int(bool(failed))


def command(argv: list[str]) -> list[Finding]:
    """Prints the findings as they come; returns those that failed."""
    arguments.help_asked(argv, lambda: _USAGE)
    recipe, failed = _recipe(argv), []
    if not launch.is_first():  # under a launcher
        return []
    spared = ("endpoint", "xet", "token") if recipe and not _needs_hub(recipe) else ()
    for name, text, remedy in findings(recipe):
        mark = "ok" if not remedy else "warn" if name in spared else "FAIL"
        line = f"{mark:<6}{name:<12}{text}{f'; {remedy}' if remedy else ''}"
        print(" ".join(line.splitlines()), flush=True)
        if mark == "FAIL":
            failed.append(Finding(name, text, remedy))
    return failed


def _needs_hub(recipe: Recipe) -> bool:
    """Whether a run publishes or its source is on the Hub; weights that are have a line of their own."""
    path = recipe.source.path
    return recipe.hub.push or not (path == "sklearn/digits" or disk.local(path, "source.path").is_dir())


def findings(recipe: Recipe | None) -> Iterator[Finding]:
    """The outcome of every check, one after the other: some wait for the network."""
    for check in (checks.versions, partial(checks.devices, recipe), checks.hub, partial(checks.disk, recipe)):
        yield from check()
    if recipe:
        yield from checks.inputs(recipe)


def _recipe(argv: list[str]) -> Recipe | None:
    named, overrides, _ = arguments.split(argv, Recipe, {})
    if len(named) > 1 or (overrides and not named):
        raise InputError("recipe: expected one at most, and keys only after it; write e.g. edc-hub doctor cifar100")
    return recipes.resolve(documents.load(recipes.find(named[0])), overrides) if named else None


if __name__ == "__main__":
    sys.exit(main())
