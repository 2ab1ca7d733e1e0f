"""Command-line parsing: advice in --help, one line for an error, and the number types that flags use by
name."""

import argparse
import math
import re

from utils.distributed import first_to_speak

SECONDS = {"s": 1, "m": 60, "h": 3600}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and exit status 2, and which refuses abbreviated flags.

    Flags may name their type as a string: "count" (an integer from 1), "index" (an integer from 0),
    "positive", "weight" (a number from 0), "fraction" (0 to 1), "share" (the same without 0), "interval"
    (steps, or a time such as 90s, 10m, 1h).
    """

    def __init__(self, description):
        summary, _, examples = description.partition("\n\n")
        super().__init__(description=summary, epilog=examples, allow_abbrev=False, formatter_class=Formatter)
        self.register("type", "count", _number(int, 1, 10**9, "a whole number from 1"))
        self.register("type", "index", _number(int, 0, 2**62, "a whole number from 0"))
        self.register("type", "positive", _number(float, math.ulp(0.0), 1e6, "a number above 0"))
        self.register("type", "weight", _number(float, 0, 1e6, "a number from 0 to a million"))
        self.register("type", "fraction", _number(float, 0, 1, "a number from 0 to 1"))
        self.register("type", "share", _number(float, math.ulp(0.0), 1, "a number above 0, at most 1"))
        self.register("type", "interval", interval)

    def peek(self, argv, *flags):
        """The values that argv gives these flags, or else their defaults, before the whole is parsed."""
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        names = [
            first.add_argument(flag, nargs="?", default=self.get_default(flag.lstrip("-"))).dest
            for flag in flags
        ]
        known = vars(first.parse_known_args(argv)[0])
        return [known[name] for name in names]

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def _print_message(self, message, file=None):
        if first_to_speak():  # of torchrun's processes, which mostly have the same arguments
            super()._print_message(message, file)


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except None, and keeps the lines of the epilog."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)

    def _fill_text(self, text, width, indent):
        return text if "\n" in text else super()._fill_text(text, width, indent)


def _number(kind, low, high, words):
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
        return value

    return convert


def interval(text):
    """ "500" -> (500, "steps"); "10m" -> (600, "seconds")."""
    match = re.fullmatch(r"([1-9]\d*)([smh]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps (500) or a time (90s, 10m, 1h)")
    count, unit = int(match[1]), match[2]
    return (count * SECONDS[unit], "seconds") if unit else (count, "steps")
