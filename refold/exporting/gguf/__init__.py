"""GGUF files for llama.cpp: their keys and tensors as data, their number formats, their vocabulary, their writer."""
