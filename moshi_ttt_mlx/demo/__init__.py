"""A recorded talk of facts and questions, held with the memory and without it, side by side.

turns.py    what the user says when: the recording and the json beside it
runs.py     both talks at once, each a `Session` in a process of its own
story.py    passage by passage: what was answered, was it right, what has left the window
record.py   what is kept of it: sound, words, loudness, the memory's norms
picture.py  all of that on one page
"""
