"""A run: its configuration, its stages, what it starts from, and what it will cost."""
