"""What the Fast BLT paper reports of its decoders: its 1B models, French to English (table 3).

Taken where a model's own figures are not known: by `fastblt size`, and by benchmarks of random weights.
"""

PAPER_ACCEPTANCE = {("blt-s", 4): 0.9677, ("blt-s", 8): 0.9114, ("blt-s", 16): 0.7693, ("blt-dv", 8): 0.8034}
"""Share of the drafted bytes that are accepted, by decoder and length; blt-dv drafts in one step."""
PAPER_PASSES = {8: 3}
"""Decoder passes over a block of blt-d, by its size: 187 for 64 blocks, at confidence 0.7."""
