"""The private implementation, one concern in each file."""
