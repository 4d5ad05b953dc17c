"""What belongs to no stage: files, signals, progress, observations."""
