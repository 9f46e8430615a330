"""Merging on disk: (IA)³ vectors into the safetensors files of a checkpoint, without loading a model.

``layout`` reads what the files hold, ``plan`` finds which bytes the vectors scale, ``folder`` writes a merged copy of a
checkpoint, and ``patch`` merges where the files lie, with ``journal`` to finish or undo what was interrupted.
"""

from __future__ import annotations
