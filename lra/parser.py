"""From typed functions to a command line: jsonargparse, with short errors that name what is allowed."""

import difflib
import re
import sys
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, auto_cli, set_parsing_settings


class Parser(ArgumentParser):
    """Prints one line per error instead of the whole usage, with the nearest option names."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        names = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        hint = ""
        if unknown := re.search(r"[Uu]nrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message):
            name = unknown[1] or unknown[2]
            section = name.rpartition(".")[0]
            inside = [n for n in names if section and n.startswith(f"--{section}.")]
            near = difflib.get_close_matches(f"--{name}", names, n=3) or inside or [n for n in names if "." not in n]
            hint = f"; did you mean {near[0]}?" if len(near) == 1 else f"; allowed: {', '.join(near)}"
        text = " ".join(message.split()).replace("typing.Literal", "one of ")
        print(
            f"lra: error: {text}{hint}\nFor all options: {self.prog.replace('[options] ', '')} --help", file=sys.stderr
        )
        sys.exit(2)


def parse_and_call(commands: Any, argv: list[str], description: str) -> None:
    """Parses `argv` and calls the function of its subcommand in `commands` (name to function).

    Bad arguments exit with code 2.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    auto_cli(
        commands,
        args=argv,
        as_positional=False,
        prog="lra",
        description=description,
        parser_class=Parser,
    )
