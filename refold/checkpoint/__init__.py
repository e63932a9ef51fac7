"""Checkpoints on disk: finding and reading a source, and writing folders that are whole or not there.

Import the module that holds the noun: `locate`, `hub`, `headers`, `atomic_file`, `folder`, `lock`, `manifest`,
`provenance` and `companions` are torch-free; `dtypes`, `reader` and `writer` import torch.
"""
