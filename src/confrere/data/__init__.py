"""Images and labels of several sites: reading, checking, splitting and describing them.

One file a concern: :mod:`~confrere.data.federation` is the entry; ``sources``, ``folder``, ``table`` and
``manifest`` list files, ``register`` and ``decode`` judge them, ``cache`` keeps the decoded pixels,
``splits`` and ``partition`` assign patients, ``sheet`` and ``check`` describe what was found.
"""
