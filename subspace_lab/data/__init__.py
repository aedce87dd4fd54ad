"""Text for language models: corpora, tokenizers, the token cache, and the order in which rows are read.

Follow a batch backwards: `module` (what Lightning sees) ← `loaders` ← `packing` (rows of `block_size` tokens)
and `order` (which rows) ← `cache` (tokens on disk) ← `tokenization` ← `corpora` (which files, what is held
out) ← `documents` (reading). `streaming` replaces cache and order where a corpus is too large to tokenise
first. Importing this package imports nothing.
"""
