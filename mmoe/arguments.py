"""How commands and their arguments are declared."""

import argparse
from collections.abc import Callable
from typing import NoReturn, TypeAlias

from mmoe.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, as every other user error."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """A command complains of what it does not know itself: the one above would name its own --help."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        raise UserError(message, "", f"see `{self.prog} --help`")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
    example: str,
) -> argparse.ArgumentParser:
    described = summary[0].upper() + summary[1:] + "."
    parser = commands.add_parser(
        name, help=summary, description=described, epilog=f"example: mmoe {example}", allow_abbrev=False
    )
    parser.set_defaults(run=run)
    return parser


def group(commands: Commands, name: str, summary: str) -> Commands:
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    return parser.add_subparsers(title="commands", metavar="COMMAND", required=True)


def add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="lay a value over the recipe, for example train.steps=100",
    )
