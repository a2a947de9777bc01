"""Asynchronous rounds: tasks in flight, the buffer of uploads, and the model versions made from it."""
