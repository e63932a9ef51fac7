"""Source architectures as data: free of torch, one file per family."""
