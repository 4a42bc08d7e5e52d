"""python -m lowbit.compat script.py: the runner of old scripts."""

import sys

from lowbit.compat.runner import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
