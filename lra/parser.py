"""From typed functions to a command line: jsonargparse, with short errors that name what is allowed."""

import difflib
import re
import sys
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, auto_cli, set_parsing_settings


class Parser(ArgumentParser):
    """Prints one line per error instead of the whole usage, with the nearest option names."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(message.split())
        if wrong := re.match(r'Parser key "([\w.]+)": ', text):
            allowed = text.partition("Given value type: ")[0]
            value = re.split(r"G(?:ot|iven) value: ", text)[-1]
            types = dict.fromkeys(re.findall(r"<class '(\w+)'>", allowed))
            choices = re.findall(r"Literal\[(.*?)\]", allowed)
            expected = " or ".join(["null" if t == "NoneType" else t for t in types]) or "one of " + " ".join(choices)
            text = f"--{wrong[1]}: expected {expected}; got {value}"
        print(
            f"lra: error: {text}{self.hint(text)}\nAll options: {self.prog.replace('[options] ', '')} --help",
            file=sys.stderr,
        )
        sys.exit(2)

    def hint(self, message: str) -> str:
        """For an unknown option: the ones it may have meant, which are those of its section if it has one."""
        unknown = re.search(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message)
        if not unknown:
            return ""
        name = unknown[1] or unknown[2]
        names = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        section = f"--{name.rpartition('.')[0]}."
        allowed = (
            [n for n in names if n.startswith(section)]
            or [n for n in names if n.endswith(f".{name}")]
            or difflib.get_close_matches(f"--{name}", names, n=3, cutoff=0.5)
        )
        return f"; allowed: {', '.join(allowed)}" if allowed else ""


def parse_and_call(commands: Any, argv: list[str], description: str) -> Any:
    """Parses `argv`, calls the function of its subcommand in `commands` (name to function), returns what it returns.

    Bad arguments exit with code 2.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return auto_cli(
        commands,
        args=argv,
        as_positional=False,
        prog="lra",
        description=description,
        parser_class=Parser,
    )
