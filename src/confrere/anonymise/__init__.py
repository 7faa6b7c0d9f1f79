"""Anonymised tables: generalised quasi-identifiers and item sets, what was checked of them, and attacks on them.

A site writes a table in which no record is told apart from fewer than k - 1 others by what an attacker may know of it:
all its quasi-identifiers, and up to m of its items, (k, k^m)-anonymity. Nothing here says that a table is "anonymous":
:mod:`confrere.anonymise.statement` lists what was checked and what was not.
"""
