"""What the parsers of several verbs share."""

from __future__ import annotations

import argparse
from typing import TypeAlias

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What verbs are added to."""

LAYOUTS = ("ours", "timm", "hf", "official", "fd")


def add_verb(verbs: Verbs, name: str, summary: str, text: str, examples: str) -> argparse.ArgumentParser:
    """Adds a verb with its summary, text and examples."""
    return verbs.add_parser(
        name,
        help=summary,
        description=text,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_recipe(parser: argparse.ArgumentParser, or_else: str = "") -> None:
    """Adds a recipe, or what may stand in its place, and overrides."""
    parser.add_argument("recipe", metavar="RECIPE", help=f"YAML file, or name of a packaged recipe{or_else}")
    add_overrides(parser)


def add_overrides(
    parser: argparse.ArgumentParser, meaning: str = "settings that replace the recipe's"
) -> None:
    """Adds `key=value` arguments, in any number."""
    # Without a default, argparse would call them required where the argument before them is missing.
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=meaning)


def add_format(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of a layout."""
    parser.add_argument(
        "--format", choices=LAYOUTS, default="ours", help="whose names the tensors get (default: ours)"
    )
