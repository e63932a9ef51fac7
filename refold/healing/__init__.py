"""Training after conversion: one stage at a time, resumable, from one model folder to the next."""
