"""Training the memory: recorded talks to shards, shards to losses, losses to an adapter.

tokenize.py, interleave.py    sound and words to shards
data.py, plan.py              shards, and which are read when
loss.py                       teacher-forced losses, the frame loop's own numbers
segments.py                   a stretch of a talk as a pure function, with gradients
optimizer.py, together.py     a step, and the processes that make it together
trainer.py                    one update after another
run.py, checkpoint.py         a run in a folder, and what survives a kill
estimate.py, plots.py         memory by computation, curves
"""
