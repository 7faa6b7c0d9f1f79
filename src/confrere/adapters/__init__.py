"""Low-rank adapters and the classification head: names, first values, files and algebra.

``layer`` computes, ``lora`` names and injects, ``folder`` reads and writes PEFT's format, ``algebra`` and ``head``
work on named tensors alone.
"""
