"""What the browser tests run on: a Chromium with a microphone from a file, and a server for faults."""
