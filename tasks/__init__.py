"""What a model can be asked, and how its answers are scored."""
