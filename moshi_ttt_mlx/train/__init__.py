"""Training the memory: sound to shards, shards to losses, losses to an adapter.

`data.py` shards, `interleave.py` words to the text stream, `tokenize.py` sound to shards, `loss.py` the
teacher-forced losses, `segments.py` one stretch of a talk with gradients, `trainer.py` the loop,
`checkpoint.py` what survives a kill, `estimate.py` memory by computation, `plots.py` the curves.
"""
