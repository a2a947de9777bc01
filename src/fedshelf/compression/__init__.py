"""Vectors in fewer bytes: sparsifiers, quantizers, lossless coding, error feedback, and choice under a byte budget.

`chain` is the door: `parse("topk:0.01+int8+zstd")` gives a `Chain` that encodes and decodes. One paper, one file.
Stages compute in numpy, chunk by chunk: the chunks stay in the cache, and no result depends on a thread count.
"""
