"""What a source is and does, read a layer at a time: for planning, converting and analysing alike."""
