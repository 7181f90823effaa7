#!/bin/sh
# Runs its arguments with a Python that fastgpt can use: $PYTHON if set, else the first of the usual names.
usable='import sys; sys.exit(sys.version_info < (3, 10))'
for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10 python}; do
    if "$python" -c "$usable" >/dev/null 2>&1; then
        exec "$python" "$@"
    fi
done
echo "fastgpt needs Python 3.10 or newer, and ${PYTHON:-python3} is not: install one, or name one with make PYTHON=/path/to/python3" >&2
exit 2
