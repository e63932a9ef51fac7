"""Checkpoints on disk: finding and reading a source, and writing folders atomically.

Import from the modules of the package: `locate`, `hub`, `headers`, `atomic_file`, `folder`, `lock`, `manifest`,
`provenance` and `companions` are torch-free; `dtypes`, `reader` and `writer` import torch.
"""
