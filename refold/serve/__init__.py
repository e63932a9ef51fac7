"""An HTTP server over the engine, which runs in a process of its own, and a page to try a model."""
