"""The command line: `fedsim run`, `resume`, `search`, `compare`, `embed`, `config`, `doctor`.

Heavy packages are imported inside commands, so that `--help` and configuration errors answer at once.
"""

from __future__ import annotations

import sys

from fedsim.errors import FedsimError


def main() -> None:
    """Entry point; a user's mistake is one line on stderr and exit code 2, Ctrl-C is exit code 130."""
    from fedsim.cli.app import app

    try:
        app()
    except FedsimError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except MemoryError as error:
        print(f"error: out of memory ({error or 'no details'}); ask for less", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
