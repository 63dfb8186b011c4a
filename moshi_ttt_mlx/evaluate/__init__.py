"""Does the memory help? Measured on recorded talks that nothing was learned from.

talks.py              which shards are read, and why others are not
nll.py                negative log-likelihood by position, with and without memory
report.py             means, errors over talks, what has to be beaten; the JSON document
plots.py              the same as a PNG
"""
