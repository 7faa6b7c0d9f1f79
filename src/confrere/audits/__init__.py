"""Audits: attacks on a finished run, from exactly what the server saw and what sites were given, beside controls.

They measure what these attacks find; that an attack finds nothing does not say that there is nothing to find.
"""
