"""The decoder Transformer, its configuration and its cache."""
