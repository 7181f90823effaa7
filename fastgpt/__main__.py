"""`python -m fastgpt` is `fastgpt`. A Ctrl-C and a SIGTERM are answered in one line from here on, before anything else
is imported."""

import sys

from .interrupts import answer, catch_sigterm


def main() -> int:
    """`cli.main` for sys.argv."""
    try:
        catch_sigterm()
        from .cli import main as run
    except KeyboardInterrupt as interrupt:
        return answer(interrupt)
    return run()


if __name__ == "__main__":
    sys.exit(main())
