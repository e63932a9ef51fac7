"""SGLang's plugin: it imports the modules of this package if SGLANG_EXTERNAL_MODEL_PACKAGE names it.

Written from SGLang's source and tested without it: its wheels need a CUDA device.
"""
