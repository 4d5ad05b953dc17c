"""What is steered: policies that turn noise into action chunks, and their networks."""
