"""aider against the shim: one message, one edit, over Chat Completions."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from harness import SHIM, check, finished, folders, run, same, translated, upstream

AIDER = os.path.join(os.path.dirname(sys.executable), "aider")
OPTIONS = (
    "--model openai/sonnet --openai-api-key anything --edit-format diff --yes --no-git "
    "--no-check-update --no-show-model-warnings --analytics-disable --no-pretty"
).split()
MESSAGE = """\
notes.txt
```
<<<<<<< SEARCH
line one
=======
line two \u00e9\U0001f600
>>>>>>> REPLACE
```
"""  # the fake echoes it, so aider takes it for the answer


@check("a file is edited")
def edit() -> None:
    with folders() as (home, work):
        notes = Path(work, "notes.txt")
        notes.write_text("line one\n", encoding="utf-8")
        command = [AIDER, *OPTIONS, "--openai-api-base", SHIM + "/v1"]
        done = finished([*command, "--message", MESSAGE, "notes.txt"], home, work)
        same(notes.read_text(encoding="utf-8"), "line two \u00e9\U0001f600\n", done.out)
    body = upstream.last.body
    same((body["model"], body["messages"][-1]["role"]), ("claude-sonnet-5-5", "user"))


if __name__ == "__main__":
    sys.exit(run("aider", translated))
