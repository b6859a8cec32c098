"""How a verb becomes a part of the parser."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]


def add_verb(verbs: Verbs, name: str, function: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
    """A verb's parser, to which its arguments are added; `function` gets the options and returns the exit code (None: 0)."""
    parser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(verb=function)
    return parser
