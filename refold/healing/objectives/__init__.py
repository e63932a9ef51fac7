"""What a stage can minimise, one file each."""
