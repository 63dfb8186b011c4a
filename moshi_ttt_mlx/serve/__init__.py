"""The server: a web page, two WebSocket protocols and downloads around one model (docs/server.md).

    app.py              routes
    guard.py, limits.py who may connect, and how much of everything there is
    link.py             one connection: its first message, its place, its talk
    wire.py, opus.py    what its messages look like: ours, and Kyutai's
    settings.py         what a client may choose
    outbox.py           what waits to be sent to it
    places.py           who may talk now, and who waits in line
    talks.py            all talks: beginning, keys, taking one up again, ending
    talk.py             one talk: sound in, turns on the model thread, events out
    model_thread.py     the one thread that may touch the model, and whose turn it is
    shelf.py, sound.py  saved talks, and the recording of a talk for download
    info.py             what the page is told of the model

Sound flows one way: link -> talk's queue -> model thread -> talk's outbox -> link.
"""
