"""`python -m wattune`: runs the program with the same arguments."""

import os
import subprocess
import sys

from .meter import binary


def main() -> int:
    command = [binary(), *sys.argv[1:]]
    if os.name != "nt":
        os.execv(command[0], command)
    try:
        return subprocess.run(command).returncode
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
