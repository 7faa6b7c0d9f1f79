"""The ClientApp: it carries a message to the site's long-lived process and the answer back, and knows nothing else.

Flower starts a fresh process for every message. Data, backbone and personal state stay in the process of
``confrere site``, which is reached over a Unix socket that only its user can open.
"""

from __future__ import annotations

import os
import socket
import time

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from confrere.consortium import frame
from confrere.errors import ConfrereError
from confrere.flower.records import from_content, to_content

app = ClientApp()
PATIENCE = 30.0
"""Seconds to wait for the site's process, which may just be starting again."""


@app.train()
def train(message: Message, context: Context) -> Message:
    """Carry a request to train."""
    return carry(message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Carry a request to judge."""
    return carry(message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Carry any other request: to describe, to export, to compare, or a phase of secure aggregation."""
    return carry(message)


def carry(message: Message) -> Message:
    """Return the site's answer; when its process cannot be reached the coordinator is told to ask again."""
    try:
        content = frame.pack(*from_content(message.content))
        found = exchange(content)
        if found is None:
            down = frame.failure("the site's process is not running", "start `confrere site`", "site-down")
            return Message(to_content(down, {}), reply_to=message)
        return Message(to_content(*frame.unpack(found)), reply_to=message)
    except ConfrereError as error:
        return Message(to_content(frame.failure(error.reason, error.fix, error.code), {}), reply_to=message)


def exchange(content: bytes) -> bytes | None:
    """Return the answer of the site's process to one frame; None when it is not there or ends before it answers."""
    path, until = os.environ[frame.SOCKET], time.monotonic() + PATIENCE
    while True:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
                line.connect(path)
                frame.send(line, content)
                return frame.receive(line)
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > until:
                return None
            time.sleep(0.2)
        except (BrokenPipeError, ConnectionResetError):
            return None
