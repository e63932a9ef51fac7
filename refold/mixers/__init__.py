"""Token mixers as typed data: recipe options, tensors, cost and transfer in one class each. Free of torch."""
