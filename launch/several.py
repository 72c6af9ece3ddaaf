"""several.py NUMBER COUNT -- TITLE mmoe ARGS… -- TITLE mmoe ARGS… …: `mmoe` commands one after another in one process.

What a small model's evaluation imports takes longer than the evaluation. COUNT of these processes, side by side, each
take every COUNT-th command, beginning with NUMBER. What a command prints comes in one piece, at its end, below TITLE.
"""

import contextlib
import io
import itertools
import sys
import time

from mmoe import cli


def main(arguments: list[str]) -> int:
    """The first status that is not 0; the commands behind it are not run."""
    number, count, *rest = arguments
    commands = [list(words) for ends, words in itertools.groupby(rest, lambda word: word == "--") if not ends]
    for title, _, *command in commands[int(number) :: int(count)]:
        begin, told = time.monotonic(), io.StringIO()
        with contextlib.redirect_stdout(told):
            status = cli.main(command)
        print(f"── {title}\n{told.getvalue()}   {time.monotonic() - begin:.0f} s", flush=True)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
