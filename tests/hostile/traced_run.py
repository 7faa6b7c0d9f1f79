"""A tiny run under an audit hook: ``python traced_run.py DATA OUT EVENTS`` writes what the interpreter was asked to do.

Kept are imports of pickled classes, sockets that listen or connect, names that are looked up, new processes, and every
``exec`` or ``compile`` with the file of the code that asked for it.
"""

from __future__ import annotations

import json
import sys
from collections import Counter

WATCHED = {
    "pickle.find_class", "marshal.loads", "socket.bind", "socket.listen", "socket.connect", "socket.getaddrinfo",
    "socket.sendto", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "ctypes.dlopen", "exec", "compile",
}  # fmt: skip
# Names of sites and of the folder of data: in code that is made of data they would turn up.
OF_DATA = ["ashford", "brindley", *sys.argv[1:2]]
SEEN: Counter[tuple[str, str, str]] = Counter()


def hook(event: str, arguments: tuple[object, ...]) -> None:
    if event not in WATCHED:
        return
    frame = sys._getframe(1)
    asked = frame.f_code.co_filename
    what = "" if event in ("exec", "marshal.loads") else repr(arguments)[:200]
    if event == "exec":
        what = str(getattr(arguments[0], "co_filename", type(arguments[0]).__name__))
    elif event == "compile":
        what = str(arguments[1])
        if any(word in str(arguments[0]) for word in OF_DATA):
            SEEN["compile of data", asked, what] += 1
    SEEN[event, asked, what] += 1


if __name__ == "__main__":
    data, out, events = sys.argv[1:]
    sys.addaudithook(hook)
    sys.argv = [
        "confrere", "run", data, "--out", out, "--backbone", "test-vit", "adapter.blocks=2", "rounds=2",
        "train.steps=2", "train.batch_size=4", "threads=1", "controls=['local']",
    ]  # fmt: skip
    from confrere import cli

    try:
        cli.main()
    except SystemExit as done:
        code = done.code or 0
    with open(events, "w", encoding="utf-8") as file:
        json.dump({"code": code, "events": [[*key, count] for key, count in SEEN.items()]}, file)
