"""Low-rank adapters and the classification head: names, first values, files and algebra.

``lora`` is the only module that knows PEFT; ``algebra`` and ``head`` work on named tensors alone.
"""
