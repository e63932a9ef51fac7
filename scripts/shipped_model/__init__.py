"""What `train_shipped_model.py` runs: training and measuring without refold."""
