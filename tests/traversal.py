"""Strings that must not lead anywhere, on any way in that takes a path or the name of a folder (one shared table)."""

from __future__ import annotations

OUTSIDE = [
    "", "..", "../x", "a/../../x", "a/../b", "./../x", "x/..", "....//..", "/etc/passwd",
    "//server/share", "/", "~", "~/x", "~root/x", "C:\\x", "C:/x", "c:x", "\\\\server\\x", "a\\b",
    "..\\x", "a\\..\\x", "file:///etc/passwd", "file:x", "http://x/y.png", "https://x", "ftp://x",
    "s3://b/k", "data:image/png;base64,x", "javascript:x", "a\x00b", "\x00", "a\nb", "a\rb", "a\tb",
    "\x1b[2J", "a\x7f", "con", "CON", "nul.png", "a/AUX", "com1", "a/lpt9.png", "prn.", "x" * 2000,
    "x" * 256, "a/" + "é" * 200, "a/../a/../../b", "a//../../b", "../" * 20 + "etc/passwd", "..//x",
    "a/..", "/dev/zero", "/proc/self/mem", "\\", "gs://b", "hf://x", "AB:c", "a/b/../../../c", "../..",
    "~user", "a/./../..", "x/../..", "ldap://x",
]  # fmt: skip
