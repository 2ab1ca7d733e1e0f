"""The command line: an error in one line, the nearest flag to a mistyped one, ranges by a flag's name."""

import argparse
import difflib
import os
import re
from pathlib import Path

SECONDS = {"s": 1, "m": 60, "h": 3600}
FROM_ZERO = ("seed", "workers", "task")  # integers; all others are from 1, or from
# in networks narrower than 8 oneDNN writes past its memory on AVX2 (uxlfoundation/oneDNN#6035)
SMALLEST = {"batch_size": 2, "width": 8}
AT_MOST_ONE = ("_p", "_scale", "_ema", "_fraction", "_momentum", "_split")  # endings of names
# 0 would switch all off
ABOVE_ZERO = ("lr", "_tau", "tau_distill", "_loss", "_epsilon", "_fraction", "_scale", "_split")


class Parser(argparse.ArgumentParser):
    """Errors are one line and exit status 2; flags are not abbreviated; --help shows defaults."""

    def __init__(self, description):
        summary, _, examples = description.partition("\n\n")
        options = {"allow_abbrev": False, "add_help": False, "formatter_class": Formatter}
        super().__init__(description=summary, epilog=examples, **options)

    def peek(self, argv, *names):
        """The values that argv gives the flags of these names. Of flags that are declared later nothing is
        known yet; but one that is near a known one, and not prefixed with such a value, is told at once."""
        args, unknown = self.parse_known_args(argv)
        values = [getattr(args, name) for name in names]
        own = tuple(f"--{value}_" for value in values)
        if near := [word for word in unknown if not word.startswith(own) and self.nearest(word, 0.8)]:
            self.refuse(near[0])
        return values

    def parse_args(self, argv=None):
        self.add_argument("-h", "--help", action="help", help="show this")  # once all flags are known
        args, unknown = self.parse_known_args(argv)
        if unknown:
            self.refuse(*unknown)
        for name, value in vars(args).items():
            for number in value if isinstance(value, (tuple, list)) else [value]:
                if isinstance(number, (int, float)) and not isinstance(number, bool):
                    self.check_range(name, number)
        return args

    def check_range(self, name, value):
        low = SMALLEST.get(name, 1 if isinstance(value, int) and name not in FROM_ZERO else 0)
        high = 1 if name.endswith(AT_MOST_ONE) else 2**62 if isinstance(value, int) else 1e6
        above = low == 0 and name.endswith(ABOVE_ZERO)
        if not low <= value <= high or (above and value == 0):
            limit = f" to {high:g}" if high < 2**62 else ""
            self.error(f"--{name} {value}: choose a number {'above' if above else 'from'} {low}{limit}")

    def check_folder_of(self, name, path):
        if path and not Path(path).absolute().parent.is_dir():
            self.error(f"--{name} {path}: there is no such folder")

    def nearest(self, flag, cutoff=0.6):
        known = re.findall(r"--\w+", self.format_usage())
        found = difflib.get_close_matches(flag.partition("=")[0], known, 1, cutoff)
        return found[0] if found and flag.startswith("--") else None

    def refuse(self, *words):
        for action in self._actions:
            for flags in (f"--{choice}_" for choice in action.choices or ()):
                if words[0].startswith(flags) and flags not in self.format_usage():
                    self.error(f"{words[0]} belongs to {action.option_strings[0]} {flags[2:-1]}")
        near = self.nearest(words[0])
        self.error(f"unrecognized arguments: {' '.join(words)}" + (f"; did you mean {near}?" if near else ""))

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def _print_message(self, message, file=None):
        if os.environ.get("RANK", "0") == "0":  # torchrun's processes all have the same arguments
            super()._print_message(message, file)


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except None and False, and keeps the lines of the epilog."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)

    def _fill_text(self, text, width, indent):
        return text if "\n" in text else super()._fill_text(text, width, indent)


def interval(text):
    """ "500" -> (500, "steps"); "10m" -> (600, "seconds")."""
    match = re.fullmatch(r"([1-9]\d*)([smh]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps (500) or a time (90s, 10m, 1h)")
    count, unit = int(match[1]), match[2]
    return (count * SECONDS[unit], "seconds") if unit else (count, "steps")
