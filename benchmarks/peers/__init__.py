"""The same work on other frameworks, each in an environment of its own.

`environments` makes those, `prepare` writes down what is to be done, `job` reads it there; every other module is one
peer's program, written as its documentation would. Only `environments`, `prepare` and `contenders` run in FedShelf's
own environment; the others import nothing of it.
"""
