"""Continuous batching over depths: requests at different loops share launches of the parts they share."""
