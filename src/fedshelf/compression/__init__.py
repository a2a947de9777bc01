"""Vectors in fewer bytes: sparsifiers, quantizers, lossless coding, error feedback, and choice under a byte budget.

`chain` is the entry point: `parse("topk:0.01+int8+zstd")` returns a `Chain` that encodes and decodes. One file per
paper. Stages compute in numpy, chunk by chunk: chunks stay in the cache, and results do not depend on the thread count.
"""
