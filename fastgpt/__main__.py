"""`python -m fastgpt` is `fastgpt`. A Ctrl-C is answered in one line from here on, before anything else is imported."""

import sys


def main() -> int:
    """`cli.main` for sys.argv."""
    try:
        from .cli import main as run
    except KeyboardInterrupt:
        print("fastgpt: interrupted", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
