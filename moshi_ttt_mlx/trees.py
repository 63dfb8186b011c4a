"""Flat trees: dictionaries whose names are paths, as saved files have them."""

from typing import TypeVar

Leaf = TypeVar("Leaf")


def under(prefix: str, tree: dict[str, Leaf]) -> dict[str, Leaf]:
    """The part of a tree whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): x for name, x in tree.items() if name.startswith(prefix)}
