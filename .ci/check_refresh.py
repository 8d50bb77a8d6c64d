"""Renew one login from many processes, before a token endpoint that ends it at the first reuse.

    python .ci/check_refresh.py [--long]

Needs pytest, for the storm of test_claude_shim.py. A kill -9 between the answer of the endpoint and
the file loses the token in any program; those are counted and told, and excuse the reuse that must
follow. Anything else that is lost is a failure.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.dont_write_bytecode = True

from test_claude_shim import storm  # noqa: E402

# title, processes, kill -9 at random moments, the disk
STORMS = [
    ("two processes", 2, False, "fine"),
    ("four processes", 4, False, "fine"),
    ("four processes, killed at random", 4, True, "fine"),
    ("four processes, two writes in three fail", 4, False, "full"),
]


def main() -> int:
    refreshes = 1000 if "--long" in sys.argv else 200
    failed = False
    for title, processes, kills, disk in STORMS:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            came = storm(Path(folder), processes, refreshes, kills, disk)
        lost = max(0, came.logins - 1 - came.orphans)
        sound = came.valid or kills  # the last kill may have orphaned a token, too
        fine = came.refreshes >= refreshes and not came.reuses and not lost and sound
        failed = failed or not fine
        print(
            f"{'ok    ' if fine else 'FAILED'} {title}: {came.refreshes} refreshes, "
            f"{len(came.reuses)} reuses, {lost} logins lost, {came.kills} kills "
            f"({came.orphans} between answer and file), {time.monotonic() - started:.0f} s",
            flush=True,
        )
        for reuse in came.reuses:
            print(f"       {reuse}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
