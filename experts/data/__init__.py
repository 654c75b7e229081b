"""Data sets: reading, long-tailed selection, decoding, and the randomness that batches are drawn with.

Read `config.py` first (what can be asked for), then `dataset.py` (the steps from there to images in memory or in
files). Each step has a file: `readers.py` and the files that it calls read a full set, `imbalance.py` selects from it,
`decode.py` and `images.py` turn image files into squares of pixels. `experts/batches.py` makes batches of the result.
"""
