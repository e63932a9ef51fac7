"""Writes a model as one ONNX graph, built operator by operator from the blueprint."""
