"""Stage 0: a flow and its critic from demos."""
