"""GGUF files of llama.cpp as sources."""
