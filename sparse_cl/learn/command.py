"""The command `sparse-cl learn`."""

from __future__ import annotations

import argparse
from typing import Any

from sparse_cl.arguments import add_options, chosen

from .settings import LearnSettings


def add_parser(commands: Any) -> None:
    """Adds `learn` to argparse's subparsers."""
    parser = commands.add_parser(
        "learn",
        help="teach a model one more domain, without what it learned before being lost",
        description="Teach a model one more domain. The folder that it leaves is a model as `from_pretrained` loads "
        "it, and holds what the next call must not forget; none of the data. A call that was stopped goes on with the "
        "same command.",
    )
    add_options(parser, LearnSettings)
    parser.set_defaults(command=_learn, resumes=True)


def _learn(arguments: argparse.Namespace) -> None:
    settings = chosen(LearnSettings, arguments)
    # transformers and its kin take seconds to import: not for --help or a mistyped option.
    from .domain import learn

    learn(settings)
