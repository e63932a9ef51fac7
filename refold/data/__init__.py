"""Text to tokens to training sequences and evaluation windows; knows files and tokenizers, no models."""
