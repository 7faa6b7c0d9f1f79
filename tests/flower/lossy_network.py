"""Network namespaces joined by a router in this process: packets take their time, get lost, and links can be cut.

What ``tc netem`` does, for kernels without it: every packet between two namespaces passes a TUN device (layer 3, no
offloading, so that packets are as large as on a wire) and is read, delayed or dropped, and written here.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Sequence
from types import TracebackType

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
SUBNET = "10.213.7."
MTU = 1500


class NotAllowedError(Exception):
    """This machine does not let us make namespaces or TUN devices."""


def ip(*words: str) -> None:
    """Run ``ip``; NotAllowedError with what it said where it fails."""
    try:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        raise NotAllowedError("there is no command `ip`") from None
    except subprocess.CalledProcessError as error:
        raise NotAllowedError(f"ip {' '.join(words[:2])}: {error.stderr.strip()}") from None


class LossyNetwork:
    """A context: ``names`` in a namespace each, 10.213.7.2 and up; this process's own is 10.213.7.1.

    Args:
        names: of the namespaces. delay: seconds of one way. loss: probability that a packet is dropped.
    """

    def __init__(self, names: Sequence[str], *, delay: float, loss: float) -> None:
        self.address, self.cut = f"{SUBNET}1", set[str]()
        self.passed = self.lost = self.severed = 0
        self._names, self._delay, self._loss = list(names), delay, loss
        self._spaces = {name: f"cf{os.getpid()}-{name}" for name in names}
        self._ends: dict[str, int] = {}  # address -> TUN
        self._stop = threading.Event()

    def inside(self) -> dict[str, list[str]]:
        """Return, by name, the command that runs another one in its namespace."""
        return {name: ["ip", "netns", "exec", space] for name, space in self._spaces.items()}

    def __enter__(self) -> LossyNetwork:
        try:
            self._attach("", "cf-here", 1)
            for number, name in enumerate(self._names, 2):
                ip("netns", "add", self._spaces[name])
                self._attach(self._spaces[name], f"cf-{number}", number)
        except NotAllowedError:
            self._remove()
            raise
        self._thread = threading.Thread(target=self._route, name="router")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(10.0)
        self._remove()

    def _attach(self, space: str, device: str, number: int) -> None:
        try:
            end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            self._ends[f"{SUBNET}{number}"] = end
            fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH", device.encode(), IFF_TUN | IFF_NO_PI))
        except OSError as error:
            raise NotAllowedError(f"TUN device: {error.strerror}") from None
        where: tuple[str, ...] = ()
        if space:
            ip("link", "set", device, "netns", space)
            where = ("-n", space)
            ip(*where, "link", "set", "lo", "up")
        ip(*where, "addr", "add", f"{SUBNET}{number}/24", "dev", device)
        ip(*where, "link", "set", device, "mtu", str(MTU), "up")

    def _remove(self) -> None:
        for end in self._ends.values():
            os.close(end)  # the device goes with it
        for space in self._spaces.values():
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True, timeout=30)

    def _route(self) -> None:
        dice, queue, order = random.Random(7), list[tuple[float, int, int, bytes]](), 0
        names = {f"{SUBNET}{number}": name for number, name in enumerate(self._names, 2)}
        while not self._stop.is_set():
            wait = max(0.0, queue[0][0] - time.monotonic()) if queue else 0.5
            ready, _, _ = select.select(list(self._ends.values()), [], [], min(wait, 0.5))
            for end in ready:
                packet = os.read(end, MTU + 100)
                if packet[0] >> 4 != 4:  # IPv6 has nobody to talk to here
                    continue
                source, target = (".".join(map(str, packet[at : at + 4])) for at in (12, 16))
                if self.cut & {names.get(source, ""), names.get(target, "")}:
                    self.severed += 1
                elif dice.random() < self._loss:
                    self.lost += 1
                elif target in self._ends:
                    order += 1
                    heapq.heappush(queue, (time.monotonic() + self._delay, order, self._ends[target], packet))
            while queue and queue[0][0] <= time.monotonic():
                os.write(queue[0][2], heapq.heappop(queue)[3])
                self.passed += 1
