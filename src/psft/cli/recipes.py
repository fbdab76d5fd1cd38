"""`psft recipes`: list the recipes that come with psft, or print one."""

from __future__ import annotations

HELP = "List the recipes, or print one as YAML."

_USAGE = (
    "usage: psft recipes [NAME]\n\nWithout NAME: every recipe in one line. With NAME: its YAML, to save and change."
)


def run(argv: list[str]) -> int:
    """Prints the list of recipes, or the YAML of the one named. Returns the exit code."""
    from psft import recipes
    from psft.errors import RequestError

    if any(argument in ("-h", "--help") for argument in argv):
        print(_USAGE)
        return 0
    if len(argv) > 1 or (argv and argv[0].startswith("-")):
        raise RequestError(f"psft recipes takes one name at most, not: {' '.join(argv)}")
    if argv:
        print(recipes.read_text(argv[0]), end="")
        return 0
    found = recipes.names()
    width = max(map(len, found))
    for name in found:
        print(f"{name:<{width}}  {recipes.describe(name)}")
    return 0
