"""The server: a web page, two WebSocket protocols and downloads around one model (docs/server.md).

    wire.py, opus.py    what messages look like: ours, and Kyutai's
    link.py             one connection: its first message, its place, its talk
    talks.py            all talks: places, keys, taking one up again, shutting down
    talk.py             one talk: sound in, turns on the model thread, events out
    model_thread.py     the one thread that may touch the model, and whose turn it is
    guard.py, limits.py who may connect, and how much of everything there is
    app.py              routes

Sound flows one way: link -> talk's queue -> model thread -> talk's outbox -> link.
"""
