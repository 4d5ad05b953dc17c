"""All stages in one call."""
