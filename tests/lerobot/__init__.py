"""What needs LeRobot itself, in an environment of its own: `make test-lerobot`."""
