"""The same work in other frameworks, each in an environment of its own.

`environments` makes the environments, `export_workload` writes the work down, and `exported_workload` reads it there.
Every other module is a peer's program, written as the peer's documentation advises. Only `environments`,
`export_workload` and `registry` run in FedShelf's own environment. The peers' programs import nothing of FedShelf but
`fedshelf.core.process_exit`, which needs the standard library only.
"""
